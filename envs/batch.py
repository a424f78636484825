"""Episodes that step together: what an action does to an allocation.

Knows nothing of scores or learners. A *lane* is one of the episodes; all lanes decide
the same group at the same time.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from autoprune.costs.search_space import SearchSpace
from autoprune.envs.observation import Observer, State

MIN_INTERVAL = 1e-6
"""Width below which one side of the feasible interval counts as a point."""


class BatchedEpisodes:
    """Episodes that step together, each under a budget of its own.

    All arithmetic is on arrays with one row for each lane, so that ten or a hundred
    lanes cost little more than one.

    Worked example: three groups of 8 channels, and a budget that leaves the first group
    between 2 and 8 of them, so sparsities from 0 to 0.75; uniform pruning would take
    0.5. Then action -1 stands for sparsity 0, action 0 for 0.5 and action 1 for 0.75;
    action 0.4 stands for 0.5 + 0.4 x 0.25 = 0.6. That would keep 3.2 channels; with
    multiples of 2 the group keeps 4, and the executed action is 0 again.

    Args:
        space: The search space.
        observer: Makes observations.
        uses_up_budget: Whether an episode ends at its budget; otherwise the budget is a
            ceiling.

    Attributes:
        state: What is decided so far; there is one after `start`.
    """

    def __init__(
        self, space: SearchSpace, observer: Observer, uses_up_budget: bool
    ) -> None:
        self.space = space
        self.observer = observer
        self.uses_up_budget = uses_up_budget
        self.state: State

    def start(self, targets: np.ndarray) -> None:
        """Begins an episode in every lane, under absolute costs `(n_lanes,)`."""
        n_lanes = len(targets)
        # Groups that aren't decided yet count as dense.
        kept = np.repeat(self.space.costs.dense[None], n_lanes, 0)
        self._prepare(0, kept, np.asarray(targets), np.zeros(n_lanes))

    def rollout(
        self, policy: Callable[["BatchedEpisodes"], np.ndarray]
    ) -> "BatchedEpisodes":
        """Steps to the end of all episodes.

        Args:
            policy: From these episodes to the actions `(n_lanes,)` of the current
                group.

        Returns:
            These episodes, so that calls can be chained.
        """
        while not self.is_over:
            self.step(policy(self))
        return self

    @property
    def is_over(self) -> bool:
        """Whether all groups are decided; `state.kept` then holds the allocations."""
        return self.state.index == len(self.space.levels)

    def observe(self) -> np.ndarray:
        """The observations, float32 `(n_lanes, n_features)`.

        After the end they are still about the last group, with what was decided.
        """
        # Learners also want an observation at which no action is left.
        last = len(self.space.levels) - 1
        index = min(self.state.index, last)
        return self.observer.observe(replace(self.state, index=index))

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Decides the current group in every lane.

        Args:
            actions: One for each lane, `(n_lanes,)`; clipped to [-1, 1].

        Returns:
            What was executed, as actions and as sparsities, `(n_lanes,)` each. Counts
            are rounded, so it isn't quite what was asked for.
        """
        state = self.state
        clipped = np.clip(np.asarray(actions, np.float64), -1, 1)
        counts = self.space.nearest_count(
            state.index, self._sparsities(clipped), self._count_bounds
        )
        sparsities = 1 - counts / self.space.costs.dense[state.index]
        executed = self.actions_of(sparsities, clipped)
        # A copy: whoever holds the state before this step sees it unchanged.
        kept = state.kept.copy()
        kept[:, state.index] = counts
        if state.index + 1 < len(self.space.levels):
            self._prepare(state.index + 1, kept, state.targets, sparsities)
        else:
            self._finish(kept, sparsities)
        return executed, sparsities

    def actions_of(self, sparsities: np.ndarray, fallback: np.ndarray) -> np.ndarray:
        """The actions `(n_lanes,)` that stand for sparsities of the current group.

        Args:
            sparsities: Shares of channels to remove, `(n_lanes,)`; those that aren't
                feasible are clipped.
            fallback: What to return where a whole side of the interval is one point, so
                that any action would do; `(n_lanes,)`.
        """
        lowest, centre, highest = self._interval()
        # The centre belongs to both sides; there the fallback's sign decides.
        is_upper = (sparsities > centre) | ((sparsities == centre) & (fallback > 0))
        width = np.where(is_upper, highest - centre, centre - lowest)
        offsets = (sparsities - centre) / np.maximum(width, MIN_INTERVAL)
        # On a side without width all actions mean the same, so none is wrong.
        return np.where(width < MIN_INTERVAL, fallback, np.clip(offsets, -1, 1))

    def _sparsities(self, actions: np.ndarray) -> np.ndarray:
        """What actions stand for, `(n_lanes,)`; the inverse of `actions_of`."""
        lowest, centre, highest = self._interval()
        width = np.where(actions > 0, highest - centre, centre - lowest)
        return centre + actions * width

    def _interval(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The lowest, the uniform-to-go and the highest sparsity, `(n_lanes,)` each."""
        lowest, highest = self.state.bounds
        # Counts are rounded and the uniform-to-go sparsity isn't, so it can lie just
        # outside the bounds.
        centre = np.clip(self.state.uniform_to_go, lowest, highest)
        return lowest, centre, highest

    def _prepare(
        self, index: int, kept: np.ndarray, targets: np.ndarray, previous: np.ndarray
    ) -> None:
        """Makes the state before group `index` is decided."""
        dense = self.space.costs.dense[index]
        fewest, most = self.space.feasible_range(kept, index, targets)
        if not self.uses_up_budget:
            # Under a ceiling an episode may end far below its budget.
            fewest = np.full_like(fewest, self.space.low[index])
        # Kept beside the sparsities, from which counts can't be had without rounding.
        self._count_bounds = (fewest, most)
        self.state = State(
            index=index,
            kept=kept,
            targets=targets,
            bounds=(1 - most / dense, 1 - fewest / dense),
            uniform_to_go=self.space.uniform_to_go(kept, index, targets),
            previous=previous,
        )

    def _finish(self, kept: np.ndarray, sparsities: np.ndarray) -> None:
        """Makes the state after the last group, and spends what rounding left."""
        if self.uses_up_budget:
            kept = self.space.fill(kept, self.state.targets)
        self.state = replace(
            self.state, index=self.state.index + 1, kept=kept, previous=sparsities
        )


def uniform_policy(batch: BatchedEpisodes) -> np.ndarray:
    """Uniform pruning, as a policy for `rollout`."""
    return np.zeros(len(batch.state.kept))


def fixed_policy(sparsities: np.ndarray) -> Callable[[BatchedEpisodes], np.ndarray]:
    """A policy for `rollout` that follows given sparsities as far as is feasible.

    Args:
        sparsities: One row for each lane, `(n_lanes, n_groups)`.
    """
    zeros = np.zeros(len(sparsities))

    def policy(batch: BatchedEpisodes) -> np.ndarray:
        return batch.actions_of(sparsities[:, batch.state.index], zeros)

    return policy
