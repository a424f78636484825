"""Episodes side by side for learners and baselines: walked in step, scored together, recorded one by one."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
from stable_baselines3.common.vec_env import VecEnv

from agents.surrogate import Usual
from autoprune.allocation import Allocation
from autoprune.budget import Budget, BudgetRange, spread_to_learn
from autoprune.config import SearchConfig
from autoprune.runs import RunFolder
from autoprune.scoring import Evaluation
from envs.layer_pruning import LayerPruningEnv
from envs.walks import Walks, uniformly

LANES = 10
"""Episodes that end together; a multiple of the cores of small machines, and enough for a policy update."""
NEAR = 0.9
"""Least cost that counts as close to a budget, as a share of it; above the budget, the other way round."""
START_STD = 0.4
"""Spread of the first actions, as a share of the feasible interval's half: about 0.2 in sparsity."""


@dataclass(frozen=True)
class Episode:
    """A finished episode: what was allocated and how it scored on the proxy split."""

    number: int
    allocation: Allocation
    reward: float
    evaluation: Evaluation
    macs: int

    def to_json(self) -> dict:
        """One line of the log."""
        return {
            "episode": self.number,
            "reward": self.reward,
            **asdict(self.evaluation),
            "macs": self.macs,
            "budget": self.allocation.budget,
            "kept": self.allocation.kept,
        }

    @property
    def counts(self) -> tuple[int, ...]:
        """Kept channels in the order of the groups."""
        return tuple(self.allocation.kept.values())

    @classmethod
    def of(cls, number: int, reward: float, info: dict) -> "Episode":
        """From what an environment tells about a finished episode."""
        return cls(number, info["allocation"], reward, Evaluation(info["accuracy"], info["loss"]), info["macs"])

    @classmethod
    def from_json(cls, entry: dict, network: str) -> "Episode":
        """From a line of the log of a network with that fingerprint."""
        info = entry | {"allocation": Allocation(entry["kept"], network, entry["budget"])}
        return cls.of(entry["episode"], entry["reward"], info)


def counts_of(episodes: Sequence[Episode]) -> np.ndarray:
    """Kept channels `(n, n_groups)`."""
    return np.array([episode.counts for episode in episodes])


def near(env: LayerPruningEnv, costs: np.ndarray, budget: Budget) -> np.ndarray:
    """Which costs `(n,)` lie close to a budget, so that what is good there is good here; if none does, the closest.

    Where a budget is a ceiling and cost is searched too, all within it.
    """
    target = env.target_of(budget)
    if not env.reward.uses_up_budget:
        return costs <= target
    distances = np.abs(np.log(costs / target))
    return distances <= max(-np.log(NEAR), distances.min(initial=np.inf))


class Recorder:
    """Keeps every finished episode, logs it, and feeds a resumed search with the scores that it paid for before.

    Args:
        env: The pruning environment.
        config: How many episodes are asked for, and the seed.
        folder: Where `log.jsonl` is kept; None keeps episodes in memory only.
        on_episode: Called after each new episode.
    """

    def __init__(
        self,
        env: LayerPruningEnv,
        config: SearchConfig,
        folder: RunFolder | None = None,
        on_episode: Callable[[Episode], None] = lambda episode: None,
    ):
        self.env, self.config, self.folder, self.on_episode = env, config, folder, on_episode
        self.episodes: list[Episode] = []
        self.expected: Callable[[np.ndarray], np.ndarray] | None = None
        """What an agent with a model of the reward expects of allocations `(n, n_groups)`: rewards `(n,)`."""
        entries = folder.events("episode") if folder else []
        self._logged = [Episode.from_json(entry, env.groups.fingerprint) for entry in entries]
        for episode in self._logged:
            env.proxy.restore(episode.allocation.kept, episode.evaluation)
        self.n_restored = len({episode.counts for episode in self._logged})
        """Evaluations that an earlier, interrupted search paid for."""

    @property
    def is_first(self) -> np.ndarray:
        """Whether each episode was the first with its allocation; others have its score and tell nothing new."""
        is_first = np.zeros(len(self.episodes), bool)
        is_first[np.unique(counts_of(self.episodes), axis=0, return_index=True)[1]] = True
        return is_first

    @property
    def evaluated(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Kept channels `(n, n_groups)`, rewards `(n,)` and blocks `(n,)` of the different allocations, in order."""
        is_first, rewards = self.is_first, np.array([episode.reward for episode in self.episodes])
        return counts_of(self.episodes)[is_first], rewards[is_first], self.blocks[is_first]

    @property
    def usual(self) -> Usual | None:
        """What reward is usual at a cost; None without a range of budgets, or where the reward weighs the cost too."""
        if not isinstance(self.env.budget, BudgetRange) or not self.env.reward.uses_up_budget:
            return None
        kept, rewards, _ = self.evaluated
        return Usual(self.env.space.cost(kept), rewards)

    @property
    def blocks(self) -> np.ndarray:
        """Which block of proxy images each episode was scored on, if it was the first with its allocation."""
        return np.arange(len(self.episodes)) // LANES % self.env.proxy.n_blocks

    @property
    def remaining(self) -> int:
        """Episodes that are still asked for."""
        return self.config.episodes - len(self.episodes)

    def resume_at(self, episode: int) -> None:
        """The search goes on after `episode` episodes; those before count as walked."""
        self.episodes = self._logged[:episode]
        for known in self.episodes:
            self.on_episode(known)

    def budgets(self, n: int) -> list[Budget]:
        """One budget a lane, spread over the range if there is one; the same for the same seed and episode."""
        offset = np.random.default_rng([self.config.seed, len(self.episodes)]).random()
        return spread_to_learn(self.env.budget, n, offset)

    def score(self, walks: Walks, budgets: Sequence[Budget], live: int) -> np.ndarray:
        """Rewards `(n_lanes,)` of finished walks; the first `live` ones are recorded."""
        rewards, infos = self.env.score(walks, budgets, block=len(self.episodes) // LANES)
        for reward, info in zip(rewards[:live].tolist(), infos[:live], strict=True):
            episode = Episode.of(len(self.episodes) + 1, reward, info)
            self.episodes.append(episode)
            if self.folder and episode.number > len(self._logged):
                self.folder.append("episode", **episode.to_json())
            self.on_episode(episode)
        return rewards

    def walk(self, act: Callable[[Walks], np.ndarray], n_lanes: int) -> np.ndarray:
        """Walks and records an episode a lane; `act` wishes actions `(n_lanes,)`. Returns their rewards."""
        budgets = self.budgets(n_lanes)
        return self.score(self.env.walks(budgets).follow(act), budgets, n_lanes)


class Walkers(VecEnv):
    """Lanes of one environment that end together, as Stable-Baselines3 wants them. How they are judged is left open.

    Args:
        env: The environment.
        n_lanes: How many walk at once.
    """

    def __init__(self, env: LayerPruningEnv, n_lanes: int):
        self.env = env  # first: the parent asks for attributes of the environment
        super().__init__(n_lanes, env.observation_space, env.action_space)
        self.budgets: list[Budget] = []
        self.walks: Walks
        self._actions = np.zeros(n_lanes)

    def draw(self) -> list[Budget]:
        """The budgets of the next episodes, one a lane."""
        raise NotImplementedError

    def judge(self) -> np.ndarray:
        """Rewards `(n_lanes,)` of the finished walks."""
        raise NotImplementedError

    def reset(self) -> np.ndarray:
        """Starts the next episodes."""
        self.budgets = self.draw()
        self.walks = self.env.walks(self.budgets)
        return self.walks.observe()

    def step_async(self, actions: np.ndarray) -> None:
        """Takes one action a lane, `(n_lanes, 1)`."""
        self._actions = np.asarray(actions, np.float64)[:, 0]

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict]]:
        """Decides a group in every lane; after the last one all are judged and start anew."""
        executed, _ = self.walks.step(self._actions)
        infos: list[dict] = [{"executed_action": action} for action in executed.tolist()]
        observations, n = self.walks.observe(), self.num_envs
        if not self.walks.is_over:
            return observations, np.zeros(n, np.float32), np.zeros(n, bool), infos
        rewards = self.judge()
        for info, observation, reward in zip(infos, observations, rewards.tolist(), strict=True):
            info |= {"terminal_observation": observation, "episode": {"r": reward, "l": len(self.env.groups), "t": 0.0}}
        return self.reset(), rewards.astype(np.float32), np.ones(n, bool), infos

    def close(self) -> None:
        """Nothing to release."""

    def get_attr(self, attr_name: str, indices=None) -> list:
        """The environment's attribute, once a lane."""
        return [getattr(self.env, attr_name)] * self.num_envs

    def set_attr(self, attr_name: str, value, indices=None) -> None:
        """Not possible: the lanes share one environment."""
        raise NotImplementedError(f"{attr_name}: lanes share one environment; make another one")

    def env_method(self, method_name: str, *args, indices=None, **kwargs) -> list:
        """Calls the environment's method, once."""
        return [getattr(self.env, method_name)(*args, **kwargs)]

    def env_is_wrapped(self, wrapper_class: type, indices=None) -> list[bool]:
        """Lanes are never wrapped."""
        return [False] * self.num_envs


class Lanes(Walkers):
    """Lanes whose networks are really scored, side by side, and recorded.

    Where fewer episodes are asked for than there are lanes, the surplus lanes shadow the first ones: same budget, same
    actions, nothing recorded, nothing evaluated twice.

    Under a range of budgets the learner sees how much better than uniform pruning at the same budget a network is, so
    that a tight budget isn't taken for a bad policy.

    Args:
        recorder: Where episodes go.
        n_lanes: How many walk at once.
    """

    def __init__(self, recorder: Recorder, n_lanes: int = LANES):
        super().__init__(recorder.env, n_lanes)
        self.recorder = recorder
        self._shadows = np.arange(n_lanes)

    def draw(self) -> list[Budget]:
        """Spread over the range, and the same in a lane and its shadow."""
        live = min(self.num_envs, self.recorder.remaining) or self.num_envs
        self._shadows = np.arange(self.num_envs) % live
        budgets = self.recorder.budgets(live)
        return [budgets[lane] for lane in self._shadows]

    def step_async(self, actions: np.ndarray) -> None:
        """Takes one action a lane, `(n_lanes, 1)`; those of shadows don't count."""
        super().step_async(np.asarray(actions)[self._shadows])

    def judge(self) -> np.ndarray:
        """Scores the networks."""
        # Par first: a resumed search then sees it scored before its episodes too, on the same block of images.
        expected = self._par.at(self.budgets, self._par_rewards) if isinstance(self.env.budget, BudgetRange) else 0.0
        return self.recorder.score(self.walks, self.budgets, min(self.num_envs, self.recorder.remaining)) - expected

    @cached_property
    def _par(self) -> "Par":
        return Par(self.env)

    @cached_property
    def _par_rewards(self) -> np.ndarray:
        return self.env.score(self._par.walks, self._par.budgets)[0]


PAR_POINTS = 6


class Par:
    """What a budget of an environment's range is worth to uniform pruning, which is judged at a few of them.

    Args:
        env: An environment with a range of budgets.

    Attributes:
        budgets: Where uniform pruning is judged.
        walks: Its episodes under those budgets, at their end.
    """

    def __init__(self, env: LayerPruningEnv):
        self.budgets = [env.budget.at(position) for position in np.linspace(0, 1, PAR_POINTS)]
        self.walks = env.walks(self.budgets).follow(uniformly)

    def at(self, budgets: Sequence[Budget], rewards: np.ndarray) -> np.ndarray:
        """What uniform pruning earns under `budgets`, linear between its `rewards` in the walks."""
        shares, asked = ([budget.share for budget in some] for some in (self.budgets, budgets))
        return np.interp(asked, shares, rewards)
