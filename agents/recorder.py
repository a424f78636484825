"""Finished episodes: scored together, kept one by one, and paid for only once.

A search that was interrupted finds its episodes in the log and goes on from there.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from autoprune.agents.cost_baseline import CostBaseline
from autoprune.config import SearchConfig
from autoprune.costs.allocation import Allocation
from autoprune.costs.budget import BudgetRange, SingleBudget, chebyshev_budgets
from autoprune.envs.batch import BatchedEpisodes
from autoprune.envs.layer_pruning import LayerPruningEnv
from autoprune.evaluation.evaluate import Evaluation
from autoprune.runs import RunFolder

LANES = 10
"""Episodes that step and end together; a multiple of the cores of small machines, and
enough for a policy update.
"""
NEAR = 0.9
"""Least cost that counts as close to a budget, as a share of it; above the budget, the
other way round.
"""
START_STD = 0.4
"""Standard deviation of the first actions; 1 is half of the feasible interval, so that
this is about 0.2 in sparsity.
"""


@dataclass(frozen=True)
class Episode:
    """A finished episode.

    Attributes:
        number: Its place in the search, from 1.
        allocation: The channels that are kept.
        reward: Higher is better.
        evaluation: Score on the proxy split.
        macs: Multiply-accumulates of the pruned network.
    """

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
    def from_info(cls, number: int, reward: float, info: dict) -> "Episode":
        """From what an environment tells about a finished episode.

        Args:
            number: The episode's place in the search.
            reward: Its reward.
            info: The last step's info.
        """
        evaluation = Evaluation(info["accuracy"], info["loss"])
        return cls(number, info["allocation"], reward, evaluation, info["macs"])

    @classmethod
    def from_json(cls, entry: dict, network: str) -> "Episode":
        """From a line of the log.

        Args:
            entry: The line.
            network: Fingerprint of the network that the log is of.
        """
        allocation = Allocation(entry["kept"], network, entry["budget"])
        info = entry | {"allocation": allocation}
        return cls.from_info(entry["episode"], entry["reward"], info)


def counts_of(episodes: Sequence[Episode]) -> np.ndarray:
    """Kept channels `(n, n_groups)`."""
    return np.array([episode.counts for episode in episodes])


def is_near_budget(
    env: LayerPruningEnv, costs: np.ndarray, budget: SingleBudget
) -> np.ndarray:
    """Which costs lie so close to a budget that what is good there is good here.

    If none does, the closest. Where a budget is a ceiling and cost is searched too, all
    costs within it.

    Args:
        env: Says what the budget amounts to.
        costs: Of allocations, in the budget's metric, `(n,)`.
        budget: One budget.

    Returns:
        Booleans `(n,)`.
    """
    target = env.target_of(budget)
    if not env.reward.uses_up_budget:
        return costs <= target
    # As ratios, so that 10 % more and 10 % less are about as far.
    distances = np.abs(np.log(costs / target))
    return distances <= max(-np.log(NEAR), distances.min(initial=np.inf))


def _do_nothing(_: object) -> None:
    """A callback for callers that don't want to be told."""


class Recorder:
    """Keeps and logs every finished episode.

    A resumed search gets the scores that it paid for before from here.

    Args:
        env: The pruning environment.
        config: How many episodes are asked for, and the seed.
        folder: Where `log.jsonl` is kept; None keeps episodes in memory only.
        on_episode: Called after each new episode.
        on_pause: Called with what is done where no episode ends for a while.

    Attributes:
        episodes: The episodes so far.
        predict_rewards: An agent's model of the reward, from allocations `(n,
            n_groups)` to expected rewards `(n,)`; None where it has none.
        n_restored: Evaluations that an earlier, interrupted search paid for.
    """

    def __init__(
        self,
        env: LayerPruningEnv,
        config: SearchConfig,
        folder: RunFolder | None = None,
        on_episode: Callable[[Episode], None] = _do_nothing,
        on_pause: Callable[[str], None] = _do_nothing,
    ) -> None:
        self.env = env
        self.config = config
        self.folder = folder
        self.on_episode = on_episode
        self.on_pause = on_pause
        self.episodes: list[Episode] = []
        self.predict_rewards: Callable[[np.ndarray], np.ndarray] | None = None
        entries = folder.events("episode") if folder else []
        self._logged = [
            Episode.from_json(entry, env.groups.fingerprint) for entry in entries
        ]
        networks = set()
        for episode in self._logged:
            env.proxy.restore(episode.allocation.kept, episode.evaluation)
            networks.add(env.proxy.key(episode.allocation.kept))
        # Episodes that ended at the same network were scored once.
        self.n_restored = len(networks)

    @property
    def is_first(self) -> np.ndarray:
        """Whether each episode was the first with its network, `(n_episodes,)`.

        Later ones have its score and tell nothing new.
        """
        seen = set()
        is_first = np.zeros(len(self.episodes), bool)
        for place, episode in enumerate(self.episodes):
            key = self.env.proxy.key(episode.allocation.kept)
            is_first[place] = key not in seen
            seen.add(key)
        return is_first

    @property
    def distinct_evaluations(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What was learned from the different networks, in their order.

        Returns:
            Kept channels `(n, n_groups)`, rewards `(n,)`, and the blocks of images that
            they were scored on, `(n,)`.
        """
        is_first = self.is_first
        rewards = np.array([episode.reward for episode in self.episodes])
        kept = counts_of(self.episodes)
        return kept[is_first], rewards[is_first], self.blocks[is_first]

    @property
    def cost_baseline(self) -> CostBaseline | None:
        """What reward is usual at a cost.

        None without a range of budgets, or where the reward weighs the cost too.
        """
        is_range = isinstance(self.env.budget, BudgetRange)
        if not is_range or not self.env.reward.uses_up_budget:
            return None
        # Each network once, so that what a policy repeats doesn't count as usual.
        kept, rewards, _ = self.distinct_evaluations
        return CostBaseline(self.env.space.cost(kept), rewards)

    @property
    def blocks(self) -> np.ndarray:
        """Which block of images each episode was scored on, `(n_episodes,)`.

        That is so for the first one with its network; later ones have its score.
        """
        blocks = [
            self.env.proxy.block_of(place // LANES)
            for place in range(len(self.episodes))
        ]
        return np.array(blocks, int)

    @property
    def n_batches(self) -> int:
        """Batches so far; the last one may be a smaller one."""
        return -(-len(self.episodes) // LANES)

    @property
    def remaining(self) -> int:
        """Episodes that are still asked for."""
        return self.config.episodes - len(self.episodes)

    def resume_at(self, episode: int) -> None:
        """Lets the search go on after so many episodes, which come from the log."""
        # Later ones are run again, and found in the proxy's cache.
        self.episodes = self._logged[:episode]
        for known in self.episodes:
            self.on_episode(known)

    def budgets(self, n: int) -> list[SingleBudget]:
        """The budgets of `n` episodes, spread over the range if there is one.

        The same seed and number of episodes so far give the same budgets.
        """
        # A generator of its own: a resumed search has drawn less from others.
        seed = [self.config.seed, len(self.episodes)]
        offset = np.random.default_rng(seed).random()
        return chebyshev_budgets(self.env.budget, n, offset)

    def score(
        self, batch: BatchedEpisodes, budgets: Sequence[SingleBudget], n_recorded: int
    ) -> np.ndarray:
        """Scores finished episodes, and records the first ones.

        Args:
            batch: Episodes that are over.
            budgets: The budget of each.
            n_recorded: How many count; others are copies of them.

        Returns:
            Rewards `(n_lanes,)`.
        """
        # One block for a batch, so that its episodes can be compared.
        block = self.env.proxy.block_of(len(self.episodes) // LANES)
        rewards, infos = self.env.score(batch, budgets, block)
        for lane in range(n_recorded):
            number = len(self.episodes) + 1
            reward = float(rewards[lane])
            self._record(Episode.from_info(number, reward, infos[lane]))
        return rewards

    def _record(self, episode: Episode) -> None:
        """Keeps an episode, and logs it unless the log has it."""
        self.episodes.append(episode)
        # A resumed search meets episodes that are in the log already.
        if self.folder and episode.number > len(self._logged):
            self.folder.append("episode", **episode.to_json())
        self.on_episode(episode)

    def run_episodes(
        self, policy: Callable[[BatchedEpisodes], np.ndarray], n_lanes: int
    ) -> np.ndarray:
        """Runs, scores and records episodes that step together.

        Args:
            policy: From the episodes to actions `(n_lanes,)`, at every step.
            n_lanes: How many episodes.

        Returns:
            Their rewards, `(n_lanes,)`.
        """
        budgets = self.budgets(n_lanes)
        batch = self.env.start_episodes(budgets).rollout(policy)
        return self.score(batch, budgets, n_lanes)
