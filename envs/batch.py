"""Episodes side by side, in step: what an action does to an allocation. Knows nothing
of scores or learners.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from autoprune.costs.allocation import SearchSpace
from autoprune.envs.observation import Observer, State

FLAT = 1e-6
"""Width below which one side of the feasible interval counts as a point."""


class BatchedEpisodes:
    """Lanes that decide the same group at the same time, each under a budget of its
    own.

    All arithmetic is on arrays with a row a lane, so that ten or a hundred lanes cost
    little more than one.

    Args:
        space: The search space.
        observer: Makes observations.
        uses_up_budget: Whether an episode ends at its budget; otherwise that is a
            ceiling.
    """

    def __init__(self, space: SearchSpace, observer: Observer, uses_up_budget: bool):
        self.space, self.observer, self.uses_up_budget = space, observer, uses_up_budget
        self.state: State

    def start(self, targets: np.ndarray) -> None:
        """Begins an episode in every lane; `targets` are absolute costs, `(n_lanes,)`."""
        kept = np.repeat(self.space.costs.dense[None], len(targets), 0)
        self._look(0, kept, np.asarray(targets), np.zeros(len(targets)))

    def rollout(
        self, act: Callable[["BatchedEpisodes"], np.ndarray]
    ) -> "BatchedEpisodes":
        """Goes to the end; `act` wishes actions `(n_lanes,)` at every step. Returns
        itself.
        """
        while not self.is_over:
            self.step(act(self))
        return self

    @property
    def is_over(self) -> bool:
        """Whether all groups are decided; `state.kept` then holds the allocations."""
        return self.state.index == len(self.space.levels)

    def observe(self) -> np.ndarray:
        """The observations `(n_lanes, n_features)`; after the end still about the last
        group, and what was decided.
        """
        last = len(self.space.levels) - 1
        return self.observer.observe(
            replace(self.state, index=min(self.state.index, last))
        )

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Decides the current group.

        Args:
            actions: One wish a lane, `(n_lanes,)`, clipped to [-1, 1].

        Returns:
            What was executed, as actions, and as sparsities; `(n_lanes,)` each.
        """
        state, wishes = self.state, np.clip(np.asarray(actions, np.float64), -1, 1)
        counts = self.space.nearest(state.index, self._sparsities(wishes), self._counts)
        sparsities = 1 - counts / self.space.costs.dense[state.index]
        executed = self.actions_of(sparsities, wishes)
        kept = state.kept.copy()
        kept[:, state.index] = counts
        if state.index + 1 < len(self.space.levels):
            self._look(state.index + 1, kept, state.targets, sparsities)
        else:
            if self.uses_up_budget:
                kept = self.space.fill(kept, state.targets)
            self.state = replace(
                state, index=state.index + 1, kept=kept, previous=sparsities
            )
        return executed, sparsities

    def actions_of(self, sparsities: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
        """The actions that stand for sparsities of the current group, as far as those
        are feasible.

        Args:
            sparsities: Shares of channels to remove, `(n_lanes,)`.
            otherwise: What to return where a whole side of the interval is one point,
                so that any action would do.
        """
        lowest, centre, highest = self._interval()
        upwards = (sparsities > centre) | ((sparsities == centre) & (otherwise > 0))
        width = np.where(upwards, highest - centre, centre - lowest)
        actions = np.clip((sparsities - centre) / np.maximum(width, FLAT), -1, 1)
        return np.where(width < FLAT, otherwise, actions)

    def _sparsities(self, actions: np.ndarray) -> np.ndarray:
        lowest, centre, highest = self._interval()
        return centre + actions * np.where(
            actions > 0, highest - centre, centre - lowest
        )

    def _interval(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Lowest, uniform-to-go and highest sparsity; rounding can put the middle one
        just outside.
        """
        lowest, highest = self.state.bounds
        return lowest, np.clip(self.state.uniform_to_go, lowest, highest), highest

    def _look(
        self, index: int, kept: np.ndarray, targets: np.ndarray, previous: np.ndarray
    ) -> None:
        """The state before deciding group `index`."""
        dense = self.space.costs.dense[index]
        lowest, highest = self.space.feasible(kept, index, targets)
        if not self.uses_up_budget:
            lowest = np.full_like(lowest, self.space.low[index])
        self._counts = lowest, highest
        uniform = self.space.uniform_to_go(kept, index, targets)
        self.state = State(
            index,
            kept,
            targets,
            (1 - highest / dense, 1 - lowest / dense),
            uniform,
            previous,
        )


def uniform_policy(batch: BatchedEpisodes) -> np.ndarray:
    """Uniform pruning, as something to `rollout`."""
    return np.zeros(len(batch.state.kept))


def fixed_policy(sparsities: np.ndarray) -> Callable[[BatchedEpisodes], np.ndarray]:
    """Given sparsities `(n_lanes, n_groups)`, as far as they are feasible, as something
    to `rollout`.
    """
    nothing = np.zeros(len(sparsities))
    return lambda batch: batch.actions_of(sparsities[:, batch.state.index], nothing)
