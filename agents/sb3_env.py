"""Episodes that step together, as the vector environments of Stable-Baselines3.

A *lane* is one of the episodes.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import VecEnv

from autoprune.agents.recorder import LANES, Recorder
from autoprune.costs.budget import Budget, BudgetRange, SingleBudget
from autoprune.envs.batch import BatchedEpisodes, uniform_policy
from autoprune.envs.layer_pruning import LayerPruningEnv
from autoprune.envs.observation import space_of

UNIFORM_POINTS = 6
"""Budgets of a range at which uniform pruning is scored."""


class SB3VecEnv(VecEnv):
    """Lanes of one environment that end together; subclasses say how they are scored.

    Args:
        env: The environment.
        n_lanes: Number of episodes that step together.

    Attributes:
        budgets: The budget of each lane.
        batch: The episodes.
    """

    def __init__(self, env: LayerPruningEnv, n_lanes: int) -> None:
        # First: the parent asks for attributes of the environment.
        self.env = env
        super().__init__(n_lanes, space_of(env.observer.columns), env.action_space)
        self.budgets: list[SingleBudget] = []
        self.batch: BatchedEpisodes
        self._actions = np.zeros(n_lanes)

    def next_budgets(self) -> list[SingleBudget]:
        """The budgets of the next episodes, one for each lane."""
        raise NotImplementedError

    def rewards(self) -> np.ndarray:
        """The rewards `(n_lanes,)` of the finished episodes."""
        raise NotImplementedError

    def reset(self) -> np.ndarray:
        """Starts the next episodes."""
        self.budgets = self.next_budgets()
        self.batch = self.env.start_episodes(self.budgets)
        return self._observe()

    def _observe(self) -> np.ndarray:
        """What the learner sees, `(n_lanes, n_columns)`."""
        return self.env.observer.seen(self.batch.observe())

    def step_async(self, actions: np.ndarray) -> None:
        """Takes one action for each lane, `(n_lanes, 1)`."""
        self._actions = np.asarray(actions, np.float64)[:, 0]

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict]]:
        """Decides a group in every lane; after the last one all start anew."""
        executed, _ = self.batch.step(self._actions)
        infos: list[dict[str, Any]] = [
            {"executed_action": action} for action in executed.tolist()
        ]
        observations = self._observe()
        if not self.batch.is_over:
            no_rewards = np.zeros(self.num_envs, np.float32)
            return observations, no_rewards, np.zeros(self.num_envs, bool), infos
        rewards = self.rewards()
        for lane, info in enumerate(infos):
            # By this name Stable-Baselines3 looks for it.
            info["terminal_observation"] = observations[lane]
            # What Stable-Baselines3 logs; the duration means nothing here.
            info["episode"] = {
                "r": float(rewards[lane]),
                "l": len(self.env.groups),
                "t": 0.0,
            }
        dones = np.ones(self.num_envs, bool)
        return self.reset(), rewards.astype(np.float32), dones, infos

    def close(self) -> None:
        """Nothing to release."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list:
        """The environment's attribute, once for each lane.

        Args:
            attr_name: Its name.
            indices: Ignored; all lanes have the same.
        """
        return [getattr(self.env, attr_name)] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Refuses: the lanes share one environment.

        Args:
            attr_name: Name of the attribute.
            value: Ignored.
            indices: Ignored.
        """
        raise NotImplementedError(
            f"{attr_name}: lanes share one environment; make another one"
        )

    def env_method(
        self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any
    ) -> list:
        """Calls the environment's method, once.

        Args:
            method_name: Name of the method.
            *args: Its arguments.
            indices: Ignored; the lanes share one environment.
            **kwargs: Its keyword arguments.
        """
        return [getattr(self.env, method_name)(*args, **kwargs)]

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        """Lanes are never wrapped.

        Args:
            wrapper_class: Ignored.
            indices: Ignored.
        """
        return [False] * self.num_envs


class RecordedVecEnv(SB3VecEnv):
    """Lanes whose networks are scored side by side and recorded.

    Where fewer episodes are asked for than there are lanes, the surplus lanes copy the
    first ones: same budget, same actions, nothing recorded, nothing evaluated twice.
    With ten lanes and three episodes to go, lanes 3, 6 and 9 copy lane 0.

    Under a range of budgets the learner sees how much better than uniform pruning at
    the same budget a network is, so that a tight budget isn't taken for a bad policy.

    Args:
        recorder: Where episodes go.
        n_lanes: Number of episodes that step together.
        warm_start: A policy that acts in the very first batch. The first lane does what
            it says; in the others the learner's actions are added, which of a learner
            at uniform pruning are its noise. Learners store what was executed, so they
            learn from it all the same.
    """

    def __init__(
        self,
        recorder: Recorder,
        n_lanes: int = LANES,
        warm_start: Callable[[BatchedEpisodes], np.ndarray] | None = None,
    ) -> None:
        super().__init__(recorder.env, n_lanes)
        self.recorder = recorder
        self._warm_start = warm_start
        self._copied_lanes = np.arange(n_lanes)

    def next_budgets(self) -> list[SingleBudget]:
        """Spread over the range, and the same in a lane and its copies."""
        # After the last episode a learner still resets its environment once.
        n_live = min(self.num_envs, self.recorder.remaining) or self.num_envs
        self._copied_lanes = np.arange(self.num_envs) % n_live
        budgets = self.recorder.budgets(n_live)
        return [budgets[lane] for lane in self._copied_lanes]

    def step_async(self, actions: np.ndarray) -> None:
        """Takes one action for each lane, `(n_lanes, 1)`; copies' own don't count."""
        # What the learner asked for in a copy is dropped; it stores what was executed.
        super().step_async(np.asarray(actions)[self._copied_lanes])
        if self._warm_start is not None and not self.recorder.episodes:
            noise = np.where(self._copied_lanes == 0, 0, self._actions)
            self._actions = self._warm_start(self.batch) + noise

    def rewards(self) -> np.ndarray:
        """Scores and records the networks."""
        expected = 0.0
        if isinstance(self.env.budget, BudgetRange):
            # Uniform pruning is scored first: a resumed search then sees it scored
            # before its episodes too, on the same block of images.
            expected = self._uniform.interpolate(self.budgets, self._uniform_rewards)
        n_recorded = min(self.num_envs, self.recorder.remaining)
        return self.recorder.score(self.batch, self.budgets, n_recorded) - expected

    @cached_property
    def _uniform(self) -> "UniformBaseline":
        return UniformBaseline(self.env)

    @cached_property
    def _uniform_rewards(self) -> np.ndarray:
        return self.env.score(self._uniform.batch, self._uniform.budgets)[0]


class UniformBaseline:
    """Uniform pruning at a few budgets of an environment's range.

    Args:
        env: An environment with a range of budgets.

    Attributes:
        budgets: The budgets.
        batch: Episodes of uniform pruning under them, at their end.
    """

    def __init__(self, env: LayerPruningEnv) -> None:
        positions = np.linspace(0, 1, UNIFORM_POINTS)
        self.budgets = [env.budget.at_position(position) for position in positions]
        self.batch = env.start_episodes(self.budgets).rollout(uniform_policy)

    def interpolate(
        self, budgets: Sequence[SingleBudget], rewards: np.ndarray
    ) -> np.ndarray:
        """What uniform pruning earns under other budgets, linear between those known.

        Args:
            budgets: Shares within the range, `n` of them.
            rewards: What it earned in `batch`, `(n_points,)`.

        Returns:
            Rewards `(n,)`.
        """
        return np.interp(_shares(budgets), _shares(self.budgets), rewards)


def _shares(budgets: Sequence[SingleBudget]) -> list[float]:
    shares = []
    for budget in budgets:
        assert isinstance(budget, Budget), "a range is one of shares"
        assert budget.share is not None, "a range is one of shares"
        shares.append(budget.share)
    return shares
