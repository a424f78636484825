"""One search: an agent or a baseline walks episodes, the best allocations are compared again, one is chosen."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import numpy as np

from agents.baselines import BASELINES
from agents.dyna import train_dyna
from agents.lanes import Episode, Recorder
from agents.replay import Policy, replay
from agents.training import ALGORITHMS, train
from autoprune.allocation import Allocation
from autoprune.config import SearchConfig
from autoprune.errors import check_known
from autoprune.runs import RunFolder
from autoprune.scoring import Evaluation
from envs.layer_pruning import LayerPruningEnv

AGENTS = (*ALGORITHMS, *BASELINES)


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
    started, recorder = time.perf_counter(), Recorder(env, config, folder, on_episode)
    evaluated = env.proxy.evaluations
    policy = _run_agent(recorder, config, folder)
    candidates = _candidates(recorder.episodes, config.finalists)
    if policy is not None:
        candidates.insert(0, _act(policy, env))
    finalists = _judged(candidates, env)
    evaluations = env.proxy.evaluations - evaluated + recorder.n_restored
    seconds = time.perf_counter() - started
    return SearchResult(finalists[0], finalists, recorder.episodes, policy, evaluations, seconds)


def _run_agent(recorder: Recorder, config: SearchConfig, folder: RunFolder | None) -> Policy | None:
    if config.agent in BASELINES:
        BASELINES[config.agent](recorder)
        return None
    checkpoint = log = None
    if folder is not None:
        folder.checkpoints.mkdir(parents=True, exist_ok=True)
        checkpoint, log = folder.checkpoints / "learner.pt", folder.tensorboard
    if config.agent == "dyna":
        return train_dyna(recorder, log)
    return train(config.agent, recorder, checkpoint, log)


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


def _judged(candidates: list[Episode], env: LayerPruningEnv) -> list[Finalist]:
    """The candidates with their scores on the selection split, best first."""
    selections = env.proxy.select_all([candidate.allocation.kept for candidate in candidates])
    pairs = zip(candidates, selections, strict=True)
    return sorted((_finalist(episode, selection, env) for episode, selection in pairs), key=lambda f: -f.reward)


def _finalist(episode: Episode, selection: Evaluation, env: LayerPruningEnv) -> Finalist:
    source = f"episode {episode.number}" if episode.number else "policy"
    allocation = replace(episode.allocation, source=source)
    return Finalist(allocation, episode.evaluation, selection, env.reward_of(selection, episode.macs), episode.macs)
