"""The allocations that a search may choose from, and which of them meet a budget.

A search decides the groups one after the other. Here is the arithmetic that keeps such
a walk within its budget: with which counts the budget can still be met
(`SearchSpace.feasible_range`), what an even cut of the rest would be (`uniform_to_go`),
and how what rounding left over is spent (`fill`). It answers for one walk or for many
in step: counts are `(..., n_groups)`, with one target for each leading place.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from autoprune.costs.budget import SingleBudget
from autoprune.costs.cost import CostTable
from autoprune.costs.levels import (
    levels_of_group,
    numbers_in_order,
    span_of,
    tabulate_next_levels,
)
from autoprune.costs.metrics import Metric
from autoprune.costs.root_finding import least_roots
from autoprune.errors import UserError


@dataclass
class SearchSpace:
    """The allocations that a search may choose from.

    Args:
        costs: The network's cost table.
        metric: The cost that is budgeted, a name of `CostTable.metrics`.
        round_to: Kept counts are multiples of it; keeping all channels is always
            allowed. One number for all groups, or group to number (1 for those left
            out).
        max_sparsity: Largest share of a group's channels that may go, in [0, 1].
        min_width: Fewest channels that a group keeps, all if it has fewer; one number
            or group to number, as above. Never fewer than the network runs with.

    Attributes:
        levels: For each group the counts that it may keep, int64, ascending.
        low: The least level of each group, `(n_groups,)`.
        high: The largest level of each group, `(n_groups,)`: all of its channels.
        cost: From counts to what they cost in the metric.
    """

    costs: CostTable
    metric: str = "macs"
    round_to: int | Mapping[str, int] = 2
    max_sparsity: float = 0.9
    min_width: int | Mapping[str, int] = 1
    levels: list[np.ndarray] = field(init=False)
    low: np.ndarray = field(init=False)
    high: np.ndarray = field(init=False)
    cost: Metric = field(init=False)

    def __post_init__(self) -> None:
        names = self.costs.names
        self._multiples = numbers_in_order("round_to", self.round_to, names)
        widths = numbers_in_order("min_width", self.min_width, names)
        self._widths = np.maximum(widths, self.costs.least).tolist()
        self.levels = []
        for channels, multiple, width in zip(
            self.costs.dense, self._multiples, self._widths, strict=True
        ):
            levels = levels_of_group(int(channels), multiple, width, self.max_sparsity)
            self.levels.append(levels)
        self.low = np.array([levels[0] for levels in self.levels])
        self.high = np.array([levels[-1] for levels in self.levels])
        self.cost = self.costs.metrics[self.metric]
        self._next_level = tabulate_next_levels(self.levels)

    def check(self, target: int, budget: SingleBudget) -> None:
        """Checks that some allocation of the space meets a target.

        Args:
            target: The largest allowed cost.
            budget: The budget that it stands for, as the message is to call it.

        Raises:
            UserError: If even the least of all counts cost more; the message names the
                floor of every metric that is budgeted.
        """
        if target >= self.cost(self.low):
            return
        limits = f"max_sparsity {self.max_sparsity:g}"
        # A least width of 1 limits nothing, so it isn't worth a word.
        if set(self._widths) != {1}:
            limits += f", min_width {span_of(self._widths)}"
        limits += f" and round_to {span_of(self._multiples)}"
        raise UserError(
            "budget",
            f"{budget} is below the reachable floor; with {limits} this network needs "
            f"{self.costs.describe(self.metric, self.low)} or more",
        )

    def feasible_range(
        self, kept: np.ndarray, index: int, target: int | np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The counts of a group from which the budget can still be met and be used up.

        The highest is the last level that fits if all later groups keep their least;
        with more, the budget can't be met any more. The lowest is the first level that
        uses the budget up if all later groups stay whole; with less, part of it would
        be left over whatever follows. If no level does both, lowest is highest.

        For example, three groups with the levels 2, 4, 6 and 8, and a cost that is the
        sum of their counts; the target is 16. Group 0 keeps 4, group 1 is asked for:

        - Highest: with group 2 at its least, 2, the levels of group 1 cost 8, 10, 12
          and 14. All fit into 16, so it's the last one, 8.
        - Lowest: with group 2 whole, 8, they cost 14, 16, 18 and 20. Only the 14 falls
          short of 16, so it's the second one, 4.

        Args:
            kept: Counts of all groups, `(..., n_groups)`; those before `index` are
                decided, the others are ignored.
            index: The group to decide.
            target: The largest allowed cost, a number or `(...)`.

        Returns:
            The lowest and the highest count of the group, `(...)` each. Where the
            budget can't be met any more, both are the group's least level.
        """
        levels = self.levels[index]
        last_fitting = self._last_level_within(kept, index, self.low, target)
        # Costs are whole numbers, joint ones too: short of the target is within the
        # target less one.
        short = np.subtract(target, 1)
        last_short = self._last_level_within(kept, index, self.high, short)
        # Costs grow with the count: what isn't short follows the last that is.
        first_using_up = np.minimum(last_short + 1, last_fitting)
        # Where not even the first level fits, its position is -1.
        lowest = levels[np.maximum(first_using_up, 0)]
        highest = levels[np.maximum(last_fitting, 0)]
        return lowest, highest

    def _last_level_within(
        self,
        kept: np.ndarray,
        index: int,
        later: np.ndarray,
        target: int | np.ndarray,
    ) -> np.ndarray:
        """The position of a group's last level within a target; -1 where none is.

        Earlier groups keep what `kept` says, later ones what `later` says.
        """
        levels = self.levels[index]
        trial = kept.copy()
        trial[..., index + 1 :] = later[index + 1 :]
        # A binary search in all places at once; each answer is within [first, last].
        first = np.full(trial.shape[:-1], -1)
        last = np.full(trial.shape[:-1], len(levels) - 1)
        while True:
            is_open = first < last
            if not is_open.any():
                return first
            middle = (first + last + 1) // 2
            trial[..., index] = levels[middle]
            is_within = self.cost(trial) <= target
            # Where a place has converged on -1, `levels[middle]` is the last level,
            # which says nothing; closed places must not move.
            first = np.where(is_open & is_within, middle, first)
            last = np.where(is_open & ~is_within, middle - 1, last)

    def uniform_to_go(
        self, kept: np.ndarray, index: int, target: int | np.ndarray
    ) -> np.ndarray:
        """The one sparsity for a group and all later ones that meets the budget.

        Counts aren't rounded; a group stops at its least level.

        Args:
            kept: As in `feasible_range`.
            index: The group to decide.
            target: The largest allowed cost, a number or `(...)`.

        Returns:
            Sparsities `(...)`: the least that meets the budget, 1 where none does.
        """

        def same_for_all(sparsity: np.ndarray) -> np.ndarray:
            # One column, which broadcasts over the groups to decide.
            return sparsity[..., None]

        return self._sparsity_to_go(same_for_all, 1, kept, index, target)

    def path_to_go(
        self, path: np.ndarray, kept: np.ndarray, index: int, target: int | np.ndarray
    ) -> np.ndarray:
        """The sparsity of a group if it and all later ones follow a path to the budget.

        The path is straight between its points. All groups to decide follow it
        together, from its beginning, until the budget is met.

        Args:
            path: Sparsities that rise from point to point, `(n_points, n_groups)`.
            kept: As in `feasible_range`.
            index: The group to decide.
            target: The largest allowed cost, a number or `(...)`.

        Returns:
            Sparsities `(...)` of group `index`.
        """
        rest = path[:, index:]

        def point_of_path(place: np.ndarray) -> np.ndarray:
            # Place 2.25 is a quarter of the way from point 2 to point 3. The path's end
            # belongs to its last piece.
            start = np.minimum(place.astype(int), len(path) - 2)
            part = (place - start)[..., None]
            return rest[start] * (1 - part) + rest[start + 1] * part

        return self._sparsity_to_go(point_of_path, len(path) - 1, kept, index, target)

    def _sparsity_to_go(
        self,
        sparsities: Callable[[np.ndarray], np.ndarray],
        most: float,
        kept: np.ndarray,
        index: int,
        target: int | np.ndarray,
    ) -> np.ndarray:
        """The sparsity of a group where a curve meets the budget, `(...)`.

        Along the curve the group and all later ones shrink together: `sparsities` leads
        from numbers `(n,)` between 0 and `most` to the sparsities of these groups,
        `(n, n_groups - index)`, or `(n, 1)` where they are all the same.
        """
        # The search for roots knows one axis of lanes only.
        shape = kept.shape[:-1]
        rows = kept.reshape(-1, kept.shape[-1])
        targets = np.broadcast_to(target, shape).ravel()
        decided = rows[:, :index].astype(float)
        dense = self.costs.dense[index:]

        def excess(numbers: np.ndarray, lanes: np.ndarray) -> np.ndarray:
            exact = dense * (1 - sparsities(numbers))
            # A group that has reached its least level waits there for the others.
            rest = np.clip(exact, self.low[index:], self.high[index:])
            counts = np.concatenate([decided[lanes], rest], 1)
            return self.costs.continuous_cost(self.metric, counts) - targets[lanes]

        begin = np.zeros(len(targets))
        end = np.full(len(targets), float(most))
        numbers = least_roots(excess, begin, end)
        return sparsities(numbers)[:, 0].reshape(shape)

    def shift_to_targets(
        self, sparsities: np.ndarray, targets: np.ndarray
    ) -> np.ndarray:
        """Raises or lowers all sparsities of a row by one number to meet its target.

        Differences between groups stay, except where one reaches its least level or all
        of its channels. Counts aren't rounded.

        Args:
            sparsities: Shares of channels to remove, `(n, n_groups)`.
            targets: The largest allowed costs, `(n,)`.

        Returns:
            The shifted sparsities, `(n, n_groups)`.
        """
        # The largest level is all channels, so the least sparsity is 0.
        least = 1 - self.high / self.costs.dense
        most = 1 - self.low / self.costs.dense
        # Enough to move any sparsity in [-1, 1] from one end to the other.
        reach = 1.0 + most.max()

        def shift(by: np.ndarray, rows: np.ndarray) -> np.ndarray:
            return np.clip(sparsities[rows] + by[:, None], least, most)

        def excess(by: np.ndarray, rows: np.ndarray) -> np.ndarray:
            counts = self.costs.dense * (1 - shift(by, rows))
            return self.costs.continuous_cost(self.metric, counts) - targets[rows]

        n_rows = len(sparsities)
        by = least_roots(excess, np.full(n_rows, -reach), np.full(n_rows, reach))
        return shift(by, np.arange(n_rows))

    def nearest_count(
        self,
        index: int,
        sparsity: float | np.ndarray,
        bounds: tuple[ArrayLike, ArrayLike],
    ) -> np.ndarray:
        """The allowed count of a group that is nearest to a sparsity, within bounds.

        Args:
            index: The group.
            sparsity: Share of its channels to remove, a number or `(...)`.
            bounds: The lowest and the highest count, such as `feasible_range` returns.

        Returns:
            Counts `(...)`; the smaller one of two that are equally near.
        """
        levels = self.levels[index]
        # `asarray` since arithmetic on arrays without axes gives plain numbers.
        exact = np.asarray(self.costs.dense[index] * (1 - np.asarray(sparsity)))
        distances = np.abs(levels - exact[..., None])
        nearest = levels[distances.argmin(-1)]
        return np.clip(nearest, *bounds)

    def fill(self, kept: np.ndarray, target: int | np.ndarray) -> np.ndarray:
        """Spends what rounding left of the budget on single steps of single groups.

        Of all steps to a group's next level after which the budget is still met, the
        most expensive is taken, until none is left. A step that costs nothing always
        fits, so none of those is left either.

        For example, three groups keep 4, 6 and 2 channels, their levels are 2, 4, 6
        and 8, and a channel costs 5, 3 and 1. Together that is 20 + 18 + 2 = 40; with a
        target of 55, 15 are left. The steps cost 10, 6 and 2:

        - The first group takes its step to 6 channels, which leaves 5.
        - Neither 10 nor 6 fits any more. The third group takes its step to 4, then to
          6, which leaves 1. Nothing fits into that. The counts are 6, 6 and 6.

        Args:
            kept: Counts `(..., n_groups)`, each a level of its group.
            target: The largest allowed cost, a number or `(...)`. What costs more
                already stays as it is.

        Returns:
            The filled counts, `(..., n_groups)`.
        """
        rows = kept.reshape(-1, len(self.levels)).copy()
        targets = np.broadcast_to(target, kept.shape[:-1]).ravel()
        # The numbers of the rows that may still grow; in each round each takes a step.
        growing = np.arange(len(rows))
        while len(growing):
            larger, costs = self._next_steps(rows[growing])
            is_within = costs <= targets[growing][:, None]
            # A group that keeps all channels already takes no step.
            can_grow = is_within & (larger > rows[growing])
            # Of equally expensive steps, that of the earliest group. A step's price
            # differs from its cost by the same for all groups.
            choices = np.where(can_grow, costs, -1).argmax(1)
            has_room = can_grow.any(1)
            growing = growing[has_room]
            choices = choices[has_room]
            rows[growing, choices] = larger[has_room, choices]
        return rows.reshape(kept.shape)

    def _next_steps(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Each group's next level, and what a row costs after the step to it."""
        n_groups = len(self.levels)
        larger = self._next_level[np.arange(n_groups), rows]
        # `(n, n_groups, n_groups)`: trial i of a row has group i at its next level and
        # the others where they are.
        is_stepping = np.eye(n_groups, dtype=bool)
        trials = np.where(is_stepping, larger[:, None], rows[:, None])
        return larger, self.cost(trials)

    def uniform(self, target: int) -> np.ndarray:
        """The allocation with one sparsity for all groups, rounded and filled.

        Args:
            target: The largest allowed cost.

        Returns:
            Counts `(n_groups,)`.
        """

        def choose_uniform(index: int, uniform_to_go: np.ndarray) -> np.ndarray:
            return uniform_to_go

        return self.allocate(target, choose_uniform)

    def allocate(
        self, target: int, choose: Callable[[int, np.ndarray], float | np.ndarray]
    ) -> np.ndarray:
        """Decides all groups in order; the budget bounds what is chosen.

        Args:
            target: The largest allowed cost.
            choose: From a group's index and its `uniform_to_go` to the sparsity that it
                should have; the nearest feasible count is taken.

        Returns:
            Counts `(n_groups,)`, filled up to the target.
        """
        # What isn't decided yet is ignored; it's there so that the shape is right.
        kept = self.costs.dense.copy()
        for index in range(len(kept)):
            bounds = self.feasible_range(kept, index, target)
            sparsity = choose(index, self.uniform_to_go(kept, index, target))
            kept[index] = self.nearest_count(index, sparsity, bounds)
        return self.fill(kept, target)
