"""One search: an agent or a baseline plays episodes, and the best are compared again.

How a baseline is added, a searcher that learns no policy:

1. Write a function of a `Recorder` that calls `recorder.run_episodes(act, n_lanes)`
   while `recorder.remaining` is above 0; `random` in `autoprune.agents.baselines` is an
   example of ten lines. `act` gets the lanes (`BatchedEpisodes`) before each group's
   decision and returns an action in [-1, 1] for each lane.
2. Enter it into `BASELINES` there and its name into `autoprune.names`; in
   `autoprune.agents.searchers` into `DETERMINISTIC` if it has no chance in it, into
   `FOR_RANGES` if it works where every episode has another budget.

How a learner of Stable-Baselines3 is added, an agent:

1. Enter its class into `ALGORITHMS` in `autoprune.agents.algorithms`, and its name into
   `autoprune.names`.
2. Write its settings into `agents/hyperparameters/NAME.yaml`.
3. If it isn't trained as `autoprune.agents.training.train` does it, write a function
   like `train_dyna` and call it in `_run_agent` below.

A package that only this searcher needs goes into `OPTIONAL_PACKAGES` in
`autoprune.agents.searchers`. The command line's checks and messages, and the tests
that every searcher has to pass, take the names from these registries; only the help of
`--agent`, the docstring of `SearchConfig.agent`, lists them by hand. An example of a
baseline that runs is in `docs/how-to/add-an-agent.md`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from autoprune.agents.algorithms import ALGORITHMS
from autoprune.agents.baselines import BASELINES
from autoprune.agents.dyna import train_dyna
from autoprune.agents.events import episode_events
from autoprune.agents.finalists import (
    Finalist,
    choose_finalists,
    find_front,
    knee_point,
)
from autoprune.agents.policies import starting_policy
from autoprune.agents.recorder import Episode, Recorder
from autoprune.agents.replay import Policy
from autoprune.agents.searchers import check_agent
from autoprune.agents.settings import check_hyperparameters
from autoprune.agents.training import train
from autoprune.config import SearchConfig
from autoprune.costs.budget import BudgetRange
from autoprune.envs.layer_pruning import LayerPruningEnv
from autoprune.errors import UserError
from autoprune.runs import RunFolder

OwnAgent = Callable[[Recorder], Policy | None]
"""Plays a recorder's episodes, as the functions in `BASELINES` do; returns the policy
that it has learned, if any.
"""
AGENTS = (*ALGORITHMS, *BASELINES)
"""Whoever can search: what `--agent` may name."""


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        best: The finalist with the highest reward on the selection split; under a range
            of budgets the front's knee.
        finalists: All of them, best first; under a range of budgets the front.
        front: Under a range of budgets the Pareto front, cheapest first; else empty.
        uniform: Under a range of budgets uniform pruning at those that were compared;
            else empty.
        recorder: Every finished episode.
        policy: The trained policy; None for baselines.
        evaluations: Sub-models scored on the proxy split.
        seconds: Wall time of the search, choice among the finalists included; a resumed
            run counts its last part.
    """

    best: Finalist
    finalists: list[Finalist]
    front: list[Finalist]
    uniform: list[Finalist]
    recorder: Recorder
    policy: Policy | None
    evaluations: int
    seconds: float

    @property
    def episodes(self) -> list[Episode]:
        """Every finished episode in order."""
        return self.recorder.episodes


def search(
    env: LayerPruningEnv,
    config: SearchConfig,
    folder: RunFolder | None = None,
    on_episode: Callable[[Episode], None] = lambda episode: None,
    on_pause: Callable[[str], None] = lambda what: None,
    agent: OwnAgent | None = None,
) -> SearchResult:
    """Runs one agent or baseline and chooses among its finalists.

    With a folder every episode is logged and the learner is checkpointed; called again
    after a kill, the search goes on and ends with the same allocation.

    Args:
        env: The environment, fresh.
        config: Agent, episodes, seed, policy to start from, number of finalists.
        folder: Run folder for log, checkpoint and TensorBoard events.
        on_episode: Called after each episode, for progress.
        on_pause: Called with what is done where no episode ends for a while.
        agent: An agent of one's own, in the place of the one that `config` names: it
            plays the recorder's episodes, and may return a policy.

    Raises:
        UserError: If the agent is unknown or plays no episode, a checkpoint is damaged,
            or a hyperparameter or the policy to start from can't be used.
    """
    if agent is None:
        check_agent(config.agent, env.budget)
        check_hyperparameters(config.agent, config.hyperparameters, bool(config.policy))
    started = time.perf_counter()
    # Scores that a resumed search gets back from its log are none of the proxy's, so
    # they are counted in below.
    evaluations_before = env.proxy.evaluations
    with episode_events(folder, env) as write_events:

        def note_episode(episode: Episode) -> None:
            write_events(episode)
            on_episode(episode)

        recorder = Recorder(env, config, folder, note_episode, on_pause)
        if agent is None:
            policy = _run_agent(recorder, config, folder)
        else:
            policy = agent(recorder)
    if not recorder.episodes:
        raise UserError(
            "agent",
            "it played no episode; call recorder.run_episodes while recorder.remaining",
        )
    recorder.on_pause("comparing the best")
    front: list[Finalist] = []
    uniform: list[Finalist] = []
    if isinstance(env.budget, BudgetRange):
        front, uniform = find_front(recorder, policy)
    # A range whose front is empty, as no loss is a number, is chosen from like one
    # budget.
    if front:
        finalists = front
        best = knee_point(front)
    else:
        finalists = choose_finalists(recorder, policy)
        best = finalists[0]
    evaluations = env.proxy.evaluations - evaluations_before + recorder.n_restored
    return SearchResult(
        best=best,
        finalists=finalists,
        front=front,
        uniform=uniform,
        recorder=recorder,
        policy=policy,
        evaluations=evaluations,
        seconds=time.perf_counter() - started,
    )


def _run_agent(
    recorder: Recorder, config: SearchConfig, folder: RunFolder | None
) -> Policy | None:
    """Plays all episodes; returns the trained policy, None of a baseline."""
    if config.agent in BASELINES:
        BASELINES[config.agent](recorder)
        return None
    if folder is None:
        start = starting_policy(config.agent, config.policy)
        checkpoint = log = None
    else:
        start = starting_policy(config.agent, config.policy, folder.start)
        folder.checkpoints.mkdir(parents=True, exist_ok=True)
        checkpoint = folder.checkpoints / "learner.pt"
        log = folder.tensorboard
    # Dyna needs no checkpoint: its practice is repeated in seconds, for free.
    if config.agent == "dyna":
        return train_dyna(recorder, log, start)
    return train(config.agent, recorder, checkpoint, log, start)
