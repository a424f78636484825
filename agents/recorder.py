"""Episodes: walked in step, scored together, recorded one by one, and found again by a
resumed search.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from autoprune.agents.surrogate import CostBaseline
from autoprune.config import SearchConfig
from autoprune.costs.allocation import Allocation
from autoprune.costs.budget import Budget, BudgetRange, chebyshev_spaced
from autoprune.envs.batch import BatchedEpisodes
from autoprune.envs.layer_pruning import LayerPruningEnv
from autoprune.evaluation.evaluate import Evaluation
from autoprune.runs import RunFolder

LANES = 10
"""Episodes that end together; a multiple of the cores of small machines, and enough for
a policy update.
"""
NEAR = 0.9
"""Least cost that counts as close to a budget, as a share of it; above the budget, the
other way round.
"""
START_STD = 0.4
"""Spread of the first actions, as a share of the feasible interval's half: about 0.2 in
sparsity.
"""


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
        return cls(
            number,
            info["allocation"],
            reward,
            Evaluation(info["accuracy"], info["loss"]),
            info["macs"],
        )

    @classmethod
    def from_json(cls, entry: dict, network: str) -> "Episode":
        """From a line of the log of a network with that fingerprint."""
        info = entry | {
            "allocation": Allocation(entry["kept"], network, entry["budget"])
        }
        return cls.of(entry["episode"], entry["reward"], info)


def counts_of(episodes: Sequence[Episode]) -> np.ndarray:
    """Kept channels `(n, n_groups)`."""
    return np.array([episode.counts for episode in episodes])


def near(env: LayerPruningEnv, costs: np.ndarray, budget: Budget) -> np.ndarray:
    """Which costs `(n,)` lie close to a budget, so that what is good there is good
    here; if none does, the closest.

    Where a budget is a ceiling and cost is searched too, all within it.
    """
    target = env.target_of(budget)
    if not env.reward.uses_up_budget:
        return costs <= target
    distances = np.abs(np.log(costs / target))
    return distances <= max(-np.log(NEAR), distances.min(initial=np.inf))


class Recorder:
    """Keeps every finished episode, logs it, and feeds a resumed search with the scores
    that it paid for before.

    Args:
        env: The pruning environment.
        config: How many episodes are asked for, and the seed.
        folder: Where `log.jsonl` is kept; None keeps episodes in memory only.
        on_episode: Called after each new episode.
        on_pause: Called with what is done where no episode ends for a while.
    """

    def __init__(
        self,
        env: LayerPruningEnv,
        config: SearchConfig,
        folder: RunFolder | None = None,
        on_episode: Callable[[Episode], None] = lambda episode: None,
        on_pause: Callable[[str], None] = lambda what: None,
    ):
        self.env, self.config, self.folder = env, config, folder
        self.on_episode, self.on_pause = on_episode, on_pause
        self.episodes: list[Episode] = []
        self.expected: Callable[[np.ndarray], np.ndarray] | None = None
        """What an agent with a model of the reward expects of allocations `(n,
        n_groups)`: rewards `(n,)`.
        """
        entries = folder.events("episode") if folder else []
        self._logged = [
            Episode.from_json(entry, env.groups.fingerprint) for entry in entries
        ]
        for episode in self._logged:
            env.proxy.restore(episode.allocation.kept, episode.evaluation)
        self.n_restored = len(
            {env.proxy.key(episode.allocation.kept) for episode in self._logged}
        )
        """Evaluations that an earlier, interrupted search paid for."""

    @property
    def is_first(self) -> np.ndarray:
        """Whether each episode was the first with its network; others have its score
        and tell nothing new.
        """
        first: dict[tuple, int] = {}
        for place, episode in enumerate(self.episodes):
            first.setdefault(self.env.proxy.key(episode.allocation.kept), place)
        is_first = np.zeros(len(self.episodes), bool)
        is_first[list(first.values())] = True
        return is_first

    @property
    def evaluated(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Kept channels `(n, n_groups)`, rewards `(n,)` and blocks `(n,)` of the
        different allocations, in order.
        """
        is_first, rewards = (
            self.is_first,
            np.array([episode.reward for episode in self.episodes]),
        )
        return (
            counts_of(self.episodes)[is_first],
            rewards[is_first],
            self.blocks[is_first],
        )

    @property
    def cost_baseline(self) -> CostBaseline | None:
        """What reward is usual at a cost; None without a range of budgets, or where the
        reward weighs the cost too.
        """
        if (
            not isinstance(self.env.budget, BudgetRange)
            or not self.env.reward.uses_up_budget
        ):
            return None
        kept, rewards, _ = self.evaluated
        return CostBaseline(self.env.space.cost(kept), rewards)

    @property
    def blocks(self) -> np.ndarray:
        """Which block of images each episode was scored on, if it was the first with
        its allocation.
        """
        return np.array(
            [
                self.env.proxy.block_of(place // LANES)
                for place in range(len(self.episodes))
            ],
            int,
        )

    @property
    def n_batches(self) -> int:
        """Batches so far, the last one maybe a smaller one."""
        return -(-len(self.episodes) // LANES)

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
        """One budget a lane, spread over the range if there is one; the same for the
        same seed and episode.
        """
        offset = np.random.default_rng([self.config.seed, len(self.episodes)]).random()
        return chebyshev_spaced(self.env.budget, n, offset)

    def score(
        self, batch: BatchedEpisodes, budgets: Sequence[Budget], live: int
    ) -> np.ndarray:
        """Rewards `(n_lanes,)` of finished walks; the first `live` ones are recorded."""
        rewards, infos = self.env.score(
            batch, budgets, block=self.env.proxy.block_of(len(self.episodes) // LANES)
        )
        for reward, info in zip(rewards[:live].tolist(), infos[:live], strict=True):
            episode = Episode.of(len(self.episodes) + 1, reward, info)
            self.episodes.append(episode)
            if self.folder and episode.number > len(self._logged):
                self.folder.append("episode", **episode.to_json())
            self.on_episode(episode)
        return rewards

    def run_episodes(
        self, act: Callable[[BatchedEpisodes], np.ndarray], n_lanes: int
    ) -> np.ndarray:
        """Walks and records an episode a lane; `act` wishes actions `(n_lanes,)`.
        Returns their rewards.
        """
        budgets = self.budgets(n_lanes)
        return self.score(
            self.env.start_episodes(budgets).rollout(act), budgets, n_lanes
        )
