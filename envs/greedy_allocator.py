"""An allocator for networks that no policy knows: greedy, from a few measurements.

It assumes one law of how damage grows, and measures one number for each group.
"""

from collections.abc import Callable

import numpy as np

from autoprune.costs.search_space import SearchSpace
from autoprune.envs.observation import State

POWER = 1.5
"""How steeply damage grows: with (1 / kept - 1) to that power, so that it is 1 at half.
"""
FLOOR = 0.1
"""Least damage of a group, as a share of the mean over groups: on so few images some
groups seem to do none.
"""
STEPS = 64
"""Steps in which a group shrinks from dense to its least, and number of intervals of
the path that is kept.
"""


class GreedyAllocator:
    """Suggests sparsities from what each group alone is worth; nothing is learned.

    With every group at half of its channels, each one in turn is made whole again; how
    much the loss falls is what that group is worth. Pruning single groups of the dense
    network would tell something else: damage adds up over layers, and what a late layer
    loses may only make a network less sure of the same answers.

    Damage is assumed to add up over groups and to grow with (1 / kept - 1)^1.5. The
    path goes from dense to the least in steps of least damage per cost saved, which is
    greedy water filling. It doesn't depend on a budget: a budget is a point of it.

    Worked example: three groups that are worth 0.3, 0.1 and 0.2 nats and cost the same.
    The second is pruned first; once its next step would do more damage than the third's
    first one, the third is pruned too, and the first group last.

    Args:
        space: The allocations, and what they cost.
        losses: Proxy losses `(n,)` of allocations `(n, n_groups)`; called once, with
            one allocation more than there are groups.

    Attributes:
        marginal_gain: How much lower the loss is where each group is whole and all
            others are halved, `(n_groups,)`, 0 or more.
        path: Sparsities from dense to the least, `(n_points, n_groups)`, evenly spaced
            in cost.
    """

    def __init__(
        self, space: SearchSpace, losses: Callable[[np.ndarray], np.ndarray]
    ) -> None:
        self._space = space
        self.marginal_gain = self._measure(losses)
        self.path = self._greedy_path()

    def suggest(self, state: State) -> np.ndarray:
        """Sparsities `(n_lanes,)` of the current group.

        If this and all later groups follow the path from there on, the budgets are met.
        """
        return self._space.path_to_go(self.path, state.kept, state.index, state.targets)

    def _measure(self, losses: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Measures the marginal gains, `(n_groups,)`."""
        space = self._space
        n_groups = len(space.levels)
        halved = np.array(
            [
                space.nearest_count(index, 0.5, (space.low[index], space.high[index]))
                for index in range(n_groups)
            ]
        )
        # In row i all groups are halved but the i-th.
        restored = np.where(np.eye(n_groups, dtype=bool), space.high, halved)
        # One call, since the proxy scores allocations side by side.
        measured = losses(np.array([halved, *restored]))
        # A group whose return does harm is worth nothing, not less than nothing.
        return np.maximum(measured[0] - measured[1:], 0)

    def _greedy_path(self) -> np.ndarray:
        """Shrinks the group that does least damage per cost saved, again and again."""
        space = self._space
        dense = space.costs.dense
        gain = self.marginal_gain
        # Above 0 even where nothing does harm, so that cost decides then.
        damage_at_half = gain + FLOOR * gain.mean() + 1e-12
        # Small groups can't shrink by less than a channel.
        step = np.maximum(dense / STEPS, 1)
        kept = space.high.astype(float)
        points = [kept]
        while not (kept <= space.low).all():
            smaller = np.maximum(space.low, kept - step)
            # In row i only the i-th group shrinks.
            trials = np.where(np.eye(len(kept), dtype=bool), smaller, kept)
            saved = self._cost(kept) - self._cost(trials)
            growth = _damage(smaller / dense) - _damage(kept / dense)
            price = damage_at_half * growth / np.maximum(saved, 1e-9)
            # Groups that are at their least can't be chosen.
            kept = trials[np.where(smaller < kept, price, np.inf).argmin()]
            points.append(kept)
        return self._evenly_spaced(np.array(points))

    def _evenly_spaced(self, points: np.ndarray) -> np.ndarray:
        """The sparsities of counts `(n, n_groups)`, interpolated at even costs."""
        costs = self._cost(points)
        sparsities = 1 - points / self._space.costs.dense
        even_costs = np.linspace(costs[0], costs[-1], STEPS + 1)
        # `np.interp` wants rising positions; costs fall along the path.
        return np.column_stack(
            [np.interp(-even_costs, -costs, column) for column in sparsities.T]
        )

    def _cost(self, kept: np.ndarray) -> np.ndarray:
        """The cost `(...)` of counts `(..., n_groups)` that needn't be integers."""
        return self._space.costs.continuous_cost(self._space.metric, kept)


def _damage(kept: np.ndarray) -> np.ndarray:
    """The damage of keeping a share of a group, in units of that of keeping half."""
    return (1 / kept - 1) ** POWER
