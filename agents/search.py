"""One search: an agent or a baseline walks episodes, the best allocations are compared again, one is chosen."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import gymnasium
import numpy as np

from agents.baselines import BASELINES
from agents.replay import Policy, replay
from agents.training import ALGORITHMS, train
from autoprune.allocation import Allocation
from autoprune.config import SearchConfig
from autoprune.errors import check_known
from autoprune.proxy import Evaluation
from autoprune.runs import RunFolder
from envs.layer_pruning import LayerPruningEnv
from envs.rewards import Outcome

AGENTS = (*ALGORITHMS, *BASELINES)


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
            "kept": self.allocation.kept,
        }


@dataclass(frozen=True)
class Finalist:
    """A candidate of the final choice: its proxy score, and the score on the selection split that decides."""

    allocation: Allocation
    proxy: Evaluation
    selection: Evaluation
    reward: float
    macs: int

    def to_json(self) -> dict:
        """Plain data for the results."""
        scores = {
            f"{split}_{name}": value
            for split in ("proxy", "selection")
            for name, value in asdict(getattr(self, split)).items()
        }
        return {"source": self.allocation.source, **scores, "reward": self.reward, "macs": self.macs}


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        best: The finalist with the highest reward on the selection split.
        finalists: All of them, best first.
        episodes: Every finished episode in order.
        policy: The trained policy; None for baselines.
        evaluations: Sub-models scored on the proxy split.
        seconds: Wall time of the search, choice among the finalists included; a resumed run counts its last part.
    """

    best: Finalist
    finalists: list[Finalist]
    episodes: list[Episode]
    policy: Policy | None
    evaluations: int
    seconds: float


class Recorder(gymnasium.Wrapper):
    """Keeps every finished episode, logs it, and feeds a resumed search with the scores that it paid for before.

    Args:
        env: The pruning environment.
        folder: Where `log.jsonl` is kept; None keeps episodes in memory only.
        on_episode: Called after each new episode.
    """

    def __init__(self, env: gymnasium.Env, folder: RunFolder | None, on_episode: Callable[[Episode], None]):
        super().__init__(env)
        self.folder, self.on_episode = folder, on_episode
        self.episodes: list[Episode] = []
        self._logged = [_from_log(entry, env) for entry in folder.events("episode")] if folder else []
        for episode in self._logged:
            env.unwrapped.proxy.restore(episode.allocation.kept, episode.evaluation)
        self.n_restored = len({tuple(episode.allocation.kept.values()) for episode in self._logged})
        """Evaluations that an earlier, interrupted search paid for."""

    def resume_at(self, episode: int) -> None:
        """The learner goes on after `episode` episodes; those before count as walked."""
        self.episodes = self._logged[:episode]
        for known in self.episodes:
            self.on_episode(known)

    def step(self, action):
        """As the environment's; a finished episode is recorded."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        if terminated:
            evaluation = Evaluation(info["accuracy"], info["loss"])
            episode = Episode(len(self.episodes) + 1, info["allocation"], reward, evaluation, info["macs"])
            self.episodes.append(episode)
            if self.folder and episode.number > len(self._logged):
                self.folder.append("episode", **episode.to_json())
            self.on_episode(episode)
        return observation, reward, terminated, truncated, info


def _from_log(entry: dict, env: gymnasium.Env) -> Episode:
    core: LayerPruningEnv = env.unwrapped
    allocation = Allocation(entry["kept"], core.groups.fingerprint, str(core.budget))
    evaluation = Evaluation(entry["accuracy"], entry["loss"])
    return Episode(entry["episode"], allocation, entry["reward"], evaluation, entry["macs"])


def search(
    env: LayerPruningEnv,
    config: SearchConfig,
    folder: RunFolder | None = None,
    on_episode: Callable[[Episode], None] = lambda episode: None,
) -> SearchResult:
    """Runs one agent or baseline and chooses among its finalists on the selection split.

    With a folder every episode is logged and the learner is checkpointed; called again after a kill, the search goes on
    and ends with the same allocation.

    Args:
        env: The environment, fresh.
        config: Agent, episodes, seed, number of finalists.
        folder: Run folder for log, checkpoint and TensorBoard events.
        on_episode: Called after each episode, for progress.

    Raises:
        UserError: If the agent is unknown, or a checkpoint is damaged.
    """
    check_known("agent", config.agent, AGENTS)
    started, recorder = time.perf_counter(), Recorder(env, folder, on_episode)
    evaluated = env.proxy.evaluations
    policy = _run_agent(recorder, config, folder)
    candidates = _candidates(recorder.episodes, config.finalists)
    if policy is not None:
        candidates.insert(0, _act(policy, env))
    finalists = sorted((_finalist(candidate, env) for candidate in candidates), key=lambda f: -f.reward)
    evaluations = env.proxy.evaluations - evaluated + recorder.n_restored
    seconds = time.perf_counter() - started
    return SearchResult(finalists[0], finalists, recorder.episodes, policy, evaluations, seconds)


def _run_agent(recorder: Recorder, config: SearchConfig, folder: RunFolder | None) -> Policy | None:
    if config.agent in BASELINES:
        BASELINES[config.agent](recorder, config)
        return None
    checkpoint = log = None
    if folder is not None:
        folder.checkpoints.mkdir(parents=True, exist_ok=True)
        checkpoint, log = folder.checkpoints / "learner.pt", folder.tensorboard
    return train(config.agent, recorder, config, checkpoint, log)


def _candidates(episodes: list[Episode], n: int) -> list[Episode]:
    """The best different allocations by reward."""
    best: dict[tuple, Episode] = {}
    for episode in episodes:
        best.setdefault(tuple(episode.allocation.kept.values()), episode)
    return sorted(best.values(), key=lambda episode: -episode.reward)[:n]


def _act(policy: Policy, env: LayerPruningEnv) -> Episode:
    """The trained policy's own allocation, as episode 0."""
    allocation, info = replay(policy, env)
    return Episode(0, allocation, np.nan, Evaluation(info["accuracy"], info["loss"]), info["macs"])


def _finalist(episode: Episode, env: LayerPruningEnv) -> Finalist:
    kept = episode.allocation.kept
    selection = env.proxy.select(kept)
    outcome = Outcome(selection, episode.macs, env.space.costs.macs(env.space.costs.dense), env.accuracy_floor)
    source = f"episode {episode.number}" if episode.number else "policy"
    allocation = Allocation(kept, episode.allocation.network, episode.allocation.budget, source)
    return Finalist(allocation, episode.evaluation, selection, env.reward.function(outcome), episode.macs)
