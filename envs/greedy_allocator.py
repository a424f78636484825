"""A guide through a network that no policy knows: what a handful of measurements and
one assumption suggest.
"""

from collections.abc import Callable

import numpy as np

from autoprune.costs.allocation import SearchSpace
from autoprune.envs.observation import State

POWER = 1.5
"""How steeply the damage grows: with (1 / kept - 1) to that power, so that it is 1 at
half.
"""
FLOOR = 0.1
"""Least damage of a group, as a share of the mean: on so few images some groups seem to
do none.
"""
STEPS = 64
"""Steps in which a group shrinks on the way from dense to the least, and points of the
path that is kept.
"""


class GreedyAllocator:
    """Suggests sparsities on a network from what each group alone is worth there;
    nothing is learned.

    With every group at half of its channels each one is made whole again; how much the
    loss falls is what that group is worth. Cut alone, out of a dense network, groups
    look different: damage adds up over layers, and what a late layer loses may only
    make a network less sure of the same answers. Damage is assumed to add up over
    groups and to grow with (1 / kept - 1)^1.5; the path goes from dense to the least in
    steps of least damage per cost saved, which is greedy water filling. It depends on
    no budget: a budget is a point of it.

    Args:
        space: The allocations, and what they cost.
        losses: Proxy losses `(n,)` of allocations `(n, n_groups)`; asked once, for one
            more than there are groups.

    Attributes:
        worth: How much lower the loss is where each group is whole and all others are
            halved, `(n_groups,)`, 0 or more.
        path: Sparsities from dense to the least, `(n_points, n_groups)`, evenly spaced
            in cost.
    """

    def __init__(self, space: SearchSpace, losses: Callable[[np.ndarray], np.ndarray]):
        self._space = space
        self.marginal_gain = self._measured(losses)
        self.path = self._greedy()

    def _measured(self, losses: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        space, n = self._space, len(self._space.levels)
        halved = np.array(
            [
                space.nearest(index, 0.5, (space.low[index], space.high[index]))
                for index in range(n)
            ]
        )
        restored = np.where(np.eye(n, dtype=bool), space.high, halved)
        before, *after = losses(np.array([halved, *restored]))
        return np.maximum(before - np.array(after), 0)

    def _greedy(self) -> np.ndarray:
        space, dense = self._space, self._space.costs.dense
        damages, step = (
            self.marginal_gain + FLOOR * self.marginal_gain.mean() + 1e-12,
            np.maximum(dense / STEPS, 1),
        )
        kept, walked = space.high.astype(float), []
        while True:
            walked.append(kept)
            if (kept <= space.low).all():
                break
            smaller = np.maximum(space.low, kept - step)
            trials = np.where(np.eye(len(kept), dtype=bool), smaller, kept)
            saved = self._cost(kept) - self._cost(trials)
            added = damages * (_harm(smaller / dense) - _harm(kept / dense))
            kept = trials[
                np.where(
                    smaller < kept, added / np.maximum(saved, 1e-9), np.inf
                ).argmin()
            ]
        costs, sparsities = self._cost(np.array(walked)), 1 - np.array(walked) / dense
        points = np.linspace(costs[0], costs[-1], STEPS + 1)
        return np.column_stack(
            [np.interp(-points, -costs, column) for column in sparsities.T]
        )

    def suggest(self, state: State) -> np.ndarray:
        """Sparsities `(n_lanes,)` of the current group from which, followed to the end,
        the path meets the budgets.
        """
        return self._space.along_to_go(
            self.path, state.kept, state.index, state.targets
        )

    def _cost(self, kept: np.ndarray) -> np.ndarray:
        return self._space.costs.continuous(self._space.metric, kept)


def _harm(kept: np.ndarray) -> np.ndarray:
    """The damage of keeping a share of a group, in units of that of keeping half."""
    return (1 / kept - 1) ** POWER
