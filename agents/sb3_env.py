"""Lanes: episodes of one environment side by side, as Stable-Baselines3 wants them."""

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
from stable_baselines3.common.vec_env import VecEnv

from autoprune.agents.recorder import LANES, Recorder
from autoprune.costs.budget import Budget, BudgetRange
from autoprune.envs.batch import BatchedEpisodes, uniform_policy
from autoprune.envs.layer_pruning import LayerPruningEnv


class SB3VecEnv(VecEnv):
    """Lanes of one environment that end together, as Stable-Baselines3 wants them. How
    they are judged is left open.

    Args:
        env: The environment.
        n_lanes: How many walk at once.
    """

    def __init__(self, env: LayerPruningEnv, n_lanes: int):
        self.env = env  # first: the parent asks for attributes of the environment
        super().__init__(n_lanes, env.observation_space, env.action_space)
        self.budgets: list[Budget] = []
        self.batch: BatchedEpisodes
        self._actions = np.zeros(n_lanes)

    def next_budgets(self) -> list[Budget]:
        """The budgets of the next episodes, one a lane."""
        raise NotImplementedError

    def rewards(self) -> np.ndarray:
        """Rewards `(n_lanes,)` of the finished walks."""
        raise NotImplementedError

    def reset(self) -> np.ndarray:
        """Starts the next episodes."""
        self.budgets = self.next_budgets()
        self.batch = self.env.start_episodes(self.budgets)
        return self.batch.observe()

    def step_async(self, actions: np.ndarray) -> None:
        """Takes one action a lane, `(n_lanes, 1)`."""
        self._actions = np.asarray(actions, np.float64)[:, 0]

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict]]:
        """Decides a group in every lane; after the last one all are judged and start
        anew.
        """
        executed, _ = self.batch.step(self._actions)
        infos: list[dict] = [
            {"executed_action": action} for action in executed.tolist()
        ]
        observations, n = self.batch.observe(), self.num_envs
        if not self.batch.is_over:
            return observations, np.zeros(n, np.float32), np.zeros(n, bool), infos
        rewards = self.rewards()
        for info, observation, reward in zip(
            infos, observations, rewards.tolist(), strict=True
        ):
            info |= {
                "terminal_observation": observation,
                "episode": {"r": reward, "l": len(self.env.groups), "t": 0.0},
            }
        return self.reset(), rewards.astype(np.float32), np.ones(n, bool), infos

    def close(self) -> None:
        """Nothing to release."""

    def get_attr(self, attr_name: str, indices=None) -> list:
        """The environment's attribute, once a lane."""
        return [getattr(self.env, attr_name)] * self.num_envs

    def set_attr(self, attr_name: str, value, indices=None) -> None:
        """Not possible: the lanes share one environment."""
        raise NotImplementedError(
            f"{attr_name}: lanes share one environment; make another one"
        )

    def env_method(self, method_name: str, *args, indices=None, **kwargs) -> list:
        """Calls the environment's method, once."""
        return [getattr(self.env, method_name)(*args, **kwargs)]

    def env_is_wrapped(self, wrapper_class: type, indices=None) -> list[bool]:
        """Lanes are never wrapped."""
        return [False] * self.num_envs


class RecordedVecEnv(SB3VecEnv):
    """Lanes whose networks are really scored, side by side, and recorded.

    Where fewer episodes are asked for than there are lanes, the surplus lanes shadow
    the first ones: same budget, same actions, nothing recorded, nothing evaluated
    twice.

    Under a range of budgets the learner sees how much better than uniform pruning at
    the same budget a network is, so that a tight budget isn't taken for a bad policy.

    Args:
        recorder: Where episodes go.
        n_lanes: How many walk at once.
        lead: Wishes actions `(n_lanes,)` for the first batch of all. The first lane
            does as it says; in the others the learner's wishes are added, which of a
            learner at uniform pruning are its noise. Learners store what was executed,
            so they learn from it all the same.
    """

    def __init__(
        self,
        recorder: Recorder,
        n_lanes: int = LANES,
        warm_start: Callable[[BatchedEpisodes], np.ndarray] | None = None,
    ):
        super().__init__(recorder.env, n_lanes)
        self.recorder, self._warm_start = recorder, warm_start
        self._shadows = np.arange(n_lanes)

    def next_budgets(self) -> list[Budget]:
        """Spread over the range, and the same in a lane and its shadow."""
        live = min(self.num_envs, self.recorder.remaining) or self.num_envs
        self._shadows = np.arange(self.num_envs) % live
        budgets = self.recorder.budgets(live)
        return [budgets[lane] for lane in self._shadows]

    def step_async(self, actions: np.ndarray) -> None:
        """Takes one action a lane, `(n_lanes, 1)`; those of shadows don't count, those
        of the first batch are led.
        """
        super().step_async(np.asarray(actions)[self._shadows])
        if self._warm_start is not None and not self.recorder.episodes:
            self._actions = self._warm_start(self.batch) + np.where(
                self._shadows == 0, 0, self._actions
            )

    def rewards(self) -> np.ndarray:
        """Scores the networks."""
        # Par first: a resumed search then sees it scored before its episodes too, on
        # the same block of images.
        expected = (
            self._uniform.at(self.budgets, self._uniform_rewards)
            if isinstance(self.env.budget, BudgetRange)
            else 0.0
        )
        return (
            self.recorder.score(
                self.batch, self.budgets, min(self.num_envs, self.recorder.remaining)
            )
            - expected
        )

    @cached_property
    def _uniform(self) -> "UniformBaseline":
        return UniformBaseline(self.env)

    @cached_property
    def _uniform_rewards(self) -> np.ndarray:
        return self.env.score(self._uniform.batch, self._uniform.budgets)[0]


UNIFORM_POINTS = 6


class UniformBaseline:
    """What a budget of an environment's range is worth to uniform pruning, which is
    judged at a few of them.

    Args:
        env: An environment with a range of budgets.

    Attributes:
        budgets: Where uniform pruning is judged.
        walks: Its episodes under those budgets, at their end.
    """

    def __init__(self, env: LayerPruningEnv):
        self.budgets = [
            env.budget.at(position) for position in np.linspace(0, 1, UNIFORM_POINTS)
        ]
        self.batch = env.start_episodes(self.budgets).rollout(uniform_policy)

    def at(self, budgets: Sequence[Budget], rewards: np.ndarray) -> np.ndarray:
        """What uniform pruning earns under `budgets`, linear between its `rewards` in
        the walks.
        """
        shares, asked = (
            [budget.share for budget in some] for some in (self.budgets, budgets)
        )
        return np.interp(asked, shares, rewards)
