"""Allocations, and the space of those that meet a budget exactly."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from autoprune.costs.budget import Budget
from autoprune.costs.cost import CostTable
from autoprune.costs.root_finding import least_roots
from autoprune.errors import UserError
from autoprune.structure.groups import Groups


@dataclass(frozen=True)
class Allocation:
    """How many channels each group keeps: the hand-over between search and pruning.

    Attributes:
        kept: Prunable group to its kept channels.
        network: Fingerprint of the groups that it is for; empty if whoever wrote it
            doesn't say.
        budget: The budget it was made for, as text.
        source: Who made it: "policy", "episode 12", "uniform", ...
    """

    kept: dict[str, int]
    network: str = ""
    budget: str = ""
    source: str = ""

    def to_json(self) -> dict:
        """Plain data."""
        return {
            "kept": self.kept,
            "network": self.network,
            "budget": self.budget,
            "source": self.source,
        }

    @classmethod
    def read(cls, path: str | Path, groups: Groups) -> "Allocation":
        """From a JSON file, checked against the network.

        Raises:
            UserError: If the file is missing or damaged, or is for another network.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError("allocation", f"no file {str(path)!r}")
        try:
            data = json.loads(path.read_text())
            about = (
                str(data.get(name, "")) for name in ("network", "budget", "source")
            )
            allocation = cls(dict(data["kept"]), *about)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                "allocation", f"{str(path)!r} is damaged or no allocation ({error!r})"
            ) from error
        allocation.check(groups)
        return allocation

    def check(self, groups: Groups) -> None:
        """Raises a `UserError` unless the allocation fits the network."""
        channels = groups.channels
        if set(self.kept) != set(channels):
            stranger = sorted(set(self.kept) ^ set(channels))[0]
            where = f"group {stranger!r} exists in only one of the two"
            raise UserError(
                "allocation", f"it is for another network or another exclude: {where}"
            )
        for name, count in self.kept.items():
            if type(count) is not int or not 1 <= count <= channels[name]:
                raise UserError(
                    "allocation",
                    f"group {name!r} keeps {count!r}; allowed are 1 to "
                    f"{channels[name]} channels",
                )
        if self.network not in ("", groups.fingerprint):
            raise UserError(
                "allocation",
                "it is for another network whose groups are called alike "
                "(fingerprint "
                f"{self.network}, this one has {groups.fingerprint}); take its "
                f'"network" out to apply it all the same',
            )


@dataclass
class SearchSpace:
    """The allocations that a search may choose from, and which of them still meet a
    budget.

    Attributes:
        costs: The network's cost table.
        metric: The cost that is budgeted.
        round_to: Kept counts are multiples of it; keeping all channels is always
            allowed. One number for all groups, or group to number (1 for those left
            out).
        max_sparsity: Largest share of a group's channels that may go.
        min_width: Least channels that a group keeps, all if it has fewer; one number or
            group to number, as above.
    """

    costs: CostTable
    metric: str = "macs"
    round_to: int | Mapping[str, int] = 2
    max_sparsity: float = 0.9
    min_width: int | Mapping[str, int] = 1
    levels: list[np.ndarray] = field(init=False)

    def __post_init__(self):
        multiples, widths = self._per_group("round_to"), self._per_group("min_width")
        self.levels = [
            _levels(int(channels), multiple, width, self.max_sparsity)
            for channels, multiple, width in zip(
                self.costs.dense, multiples, widths, strict=True
            )
        ]
        self.low = np.array([levels[0] for levels in self.levels])
        self.high = np.array([levels[-1] for levels in self.levels])
        self.cost = self.costs.metrics[self.metric]
        # Group and count to the next larger level; the largest is its own.
        self._following = np.zeros(
            (len(self.levels), max(self.high, default=0) + 1), np.int64
        )
        for index, levels in enumerate(self.levels):
            self._following[index, levels] = np.append(levels[1:], levels[-1])

    def _per_group(self, argument: str) -> list[int]:
        """The numbers of `round_to` or `min_width` in the order of the groups."""
        value, names = getattr(self, argument), self.costs.names
        if not isinstance(value, Mapping):
            return [value] * len(names)
        strangers = sorted(value.keys() - set(names))
        if strangers:
            raise UserError(
                argument,
                f"no prunable group is called {strangers[0]!r}; use the "
                f"names of the trace",
            )
        return [value.get(name, 1) for name in names]

    def check(self, target: int, budget: Budget) -> None:
        """Raises a `UserError` unless some allocation costs at most `target`."""
        floor, dense = self.cost(self.low), self.cost(self.high)
        if target < floor:
            raise UserError(
                "budget",
                f"{budget} is below the reachable floor; with "
                f"{self._limits()} this network needs "
                f"{self.metric}={floor} ({floor / dense:.1%}) or more",
            )

    def _limits(self) -> str:
        """What keeps the floor up, as options."""
        multiples, widths = (
            _span(self._per_group("round_to")),
            _span(self._per_group("min_width")),
        )
        least = f", min_width {widths}" if widths != "1" else ""
        return f"max_sparsity {self.max_sparsity:g}{least} and round_to {multiples}"

    def feasible(
        self, kept: np.ndarray, index: int, target: int | np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest count `(...)` of group `index` from which the budget can
        still be met, and be used up.

        Args:
            kept: Counts of all groups, `(..., n_groups)`; those before `index` are
                decided, the others are ignored.
            index: The group to decide.
            target: The budget, a number or `(...)`.
        """
        levels = self.levels[index]
        # Twice: what comes later at its least, within the target; and at its most,
        # short of it.
        trial, targets = (
            np.stack([kept, kept]),
            np.stack([target, np.subtract(target, 1)]),
        )
        trial[0, ..., index + 1 :], trial[1, ..., index + 1 :] = (
            self.low[index + 1 :],
            self.high[index + 1 :],
        )
        highest, short = self._last_within(trial, index, targets)
        lowest = np.minimum(short + 1, highest)
        return levels[np.maximum(lowest, 0)], levels[np.maximum(highest, 0)]

    def _last_within(
        self, trial: np.ndarray, index: int, targets: np.ndarray
    ) -> np.ndarray:
        """Position of the last level of a group whose cost is within the target; -1 if
        none is.
        """
        levels = self.levels[index]
        low = np.full(trial.shape[:-1], -1)
        high = np.full(trial.shape[:-1], len(levels) - 1)
        while (low < high).any():
            middle = (low + high + 1) // 2
            trial[..., index] = levels[middle]
            # A lane that has converged on -1 looks at the last level, and must not
            # move.
            is_within, is_open = self.cost(trial) <= targets, low < high
            low, high = (
                np.where(is_within & is_open, middle, low),
                np.where(is_within | ~is_open, high, middle - 1),
            )
        return low

    def uniform_to_go(
        self, kept: np.ndarray, index: int, target: int | np.ndarray
    ) -> np.ndarray:
        """The sparsity `(...)` that meets the budget if group `index` and all later
        ones get the same.
        """
        return self._to_go(lambda sparsity: sparsity[..., None], 1, kept, index, target)

    def along_to_go(
        self, path: np.ndarray, kept: np.ndarray, index: int, target: int | np.ndarray
    ) -> np.ndarray:
        """The sparsity `(...)` of group `index` if it and all later ones go along a
        path until they meet the budget.

        Args:
            path: Sparsities that rise from point to point, `(n_points, n_groups)`.
            kept: As in `feasible`.
            index: The group to decide.
            target: The budget, a number or `(...)`.
        """
        rest = path[:, index:]

        def sparsities(at: np.ndarray) -> np.ndarray:
            point = np.minimum(at.astype(int), len(path) - 2)
            part = (at - point)[..., None]
            return rest[point] * (1 - part) + rest[point + 1] * part

        return self._to_go(sparsities, len(path) - 1, kept, index, target)

    def _to_go(
        self,
        sparsities: Callable[[np.ndarray], np.ndarray],
        most: float,
        kept: np.ndarray,
        index: int,
        target: int | np.ndarray,
    ) -> np.ndarray:
        """That of group `index` among the `sparsities`, from it on, of the least number
        up to `most` within budget.
        """
        shape, decided = (
            kept.shape[:-1],
            kept.reshape(-1, kept.shape[-1])[:, :index].astype(float),
        )
        dense, low, high = (
            counts[index:] for counts in (self.costs.dense, self.low, self.high)
        )

        def counts(at: np.ndarray, lanes: np.ndarray) -> np.ndarray:
            rest = np.clip(dense * (1 - sparsities(at)), low, high)
            return np.concatenate([decided[lanes], rest], 1)

        targets = np.broadcast_to(target, shape).ravel()
        at = self._least(
            counts, np.zeros(len(targets)), np.full(len(targets), float(most)), targets
        )
        return sparsities(at)[:, 0].reshape(shape)

    def shifted(self, sparsities: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Sparsities `(n, n_groups)`, each row raised or lowered by one number so that
        it meets its target `(n,)`.

        Counts aren't rounded; a group stops at what it may lose, and at dense.
        """
        least, most = 1 - self.high / self.costs.dense, 1 - self.low / self.costs.dense
        low, high = (
            np.full(len(sparsities), -1.0) - most.max(),
            np.full(len(sparsities), 1.0) + most.max(),
        )

        def wanted(by: np.ndarray, rows: np.ndarray) -> np.ndarray:
            return np.clip(sparsities[rows] + by[:, None], least, most)

        by = self._least(
            lambda by, rows: self.costs.dense * (1 - wanted(by, rows)),
            low,
            high,
            targets,
        )
        return wanted(by, np.arange(len(by)))

    def _least(
        self,
        counts: Callable[[np.ndarray, np.ndarray], np.ndarray],
        low: np.ndarray,
        high: np.ndarray,
        targets: np.ndarray,
    ) -> np.ndarray:
        """The least numbers `(n,)` for which `counts` of some of them, `(n, n_groups)`,
        meet their targets `(n,)`.
        """

        def excess(numbers: np.ndarray, lanes: np.ndarray) -> np.ndarray:
            return (
                self.costs.continuous(self.metric, counts(numbers, lanes))
                - targets[lanes]
            )

        return least_roots(excess, low, high)

    def nearest(
        self, index: int, sparsity: float | np.ndarray, bounds: tuple
    ) -> np.ndarray:
        """The allowed count `(...)` of group `index` nearest to a sparsity `(...)`,
        within bounds.
        """
        levels = self.levels[index]
        wanted = self.costs.dense[index] * (1 - np.asarray(sparsity))
        return np.clip(levels[np.abs(levels - wanted[..., None]).argmin(-1)], *bounds)

    def fill(self, kept: np.ndarray, target: int | np.ndarray) -> np.ndarray:
        """Spends what rounding left of the budget: grows groups by single steps, the
        largest that fits first.

        Afterwards no group can grow by one step without exceeding the budget.

        Args:
            kept: Counts `(..., n_groups)`.
            target: The budget, a number or `(...)`.
        """
        rows, every = (
            kept.reshape(-1, len(self.levels)).copy(),
            np.arange(len(self.levels)),
        )
        left = np.broadcast_to(target, kept.shape[:-1]).ravel() - self.cost(rows)
        grows = np.arange(len(rows))
        while len(grows):
            larger = self._following[every, rows[grows]]
            grown = np.where(
                np.eye(len(every), dtype=bool), larger[:, None], rows[grows][:, None]
            )
            steps = self.cost(grown) - self.cost(rows[grows])[:, None]
            fits = (steps > 0) & (steps <= left[grows][:, None])
            best = np.where(fits, steps, 0).argmax(1)
            fit = fits.any(1)
            grows, best = grows[fit], best[fit]
            rows[grows, best] = larger[fit, best]
            left[grows] -= steps[fit, best]
        return rows.reshape(kept.shape)

    def uniform(self, target: int) -> np.ndarray:
        """The allocation with one sparsity for all groups, rounded and filled so that
        it meets the budget.
        """
        return self.allocate(target, lambda index, uniform: uniform)

    def allocate(self, target: int, choose) -> np.ndarray:
        """Decides all groups in order: `choose(index, uniform_to_go)` wishes a
        sparsity, the budget bounds it.
        """
        kept = self.costs.dense.copy()
        for index in range(len(kept)):
            bounds = self.feasible(kept, index, target)
            wish = choose(index, self.uniform_to_go(kept, index, target))
            kept[index] = self.nearest(index, wish, bounds)
        return self.fill(kept, target)


def _span(numbers: list[int]) -> str:
    """ "2", or "2 to 8" where the numbers differ."""
    return (
        f"{min(numbers)} to {max(numbers)}"
        if len(set(numbers)) > 1
        else str(numbers[0])
    )


def _levels(
    channels: int, round_to: int, min_width: int, max_sparsity: float
) -> np.ndarray:
    fewest = max(1, min_width, math.ceil(channels * (1 - max_sparsity) - 1e-9))
    first = math.ceil(fewest / round_to) * round_to
    return np.unique([*range(first, channels, round_to), channels]).astype(np.int64)
