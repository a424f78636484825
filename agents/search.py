"""One search: an agent or a baseline walks episodes, the best allocations are compared
again, one is chosen.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from autoprune.agents.baselines import BASELINES
from autoprune.agents.dyna import train_dyna
from autoprune.agents.finalists import Finalist, finalists, front, knee
from autoprune.agents.policies import starting_policy
from autoprune.agents.recorder import Episode, Recorder
from autoprune.agents.replay import Policy, check_installed
from autoprune.agents.training import ALGORITHMS, train
from autoprune.config import SearchConfig
from autoprune.costs.budget import Budget, BudgetRange
from autoprune.envs.layer_pruning import LayerPruningEnv
from autoprune.errors import UserError, check_known
from autoprune.runs import RunFolder

AGENTS = (*ALGORITHMS, *BASELINES)
FOR_RANGES = ("uniform", "random")
"""Baselines that mean something where every episode has a budget of its own."""


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


def check_agent(
    agent: str, budget: Budget | BudgetRange, others: Iterable[str] = ()
) -> None:
    """Raises a `UserError` unless there is such an agent, for such a budget, and what
    it needs is installed.

    Args:
        agent: Its name; those of `others` are known too.
        budget: Most baselines search for a single one.
        others: Further names.
    """
    check_installed(agent, "agent")
    check_known("agent", agent, (*AGENTS, *others))
    if (
        isinstance(budget, BudgetRange)
        and agent in BASELINES
        and agent not in FOR_RANGES
    ):
        known = ", ".join((*ALGORITHMS, *FOR_RANGES))
        raise UserError(
            "agent",
            f"{agent} is for one budget, got the range {budget}; for a range "
            f"take {known}",
        )


def search(
    env: LayerPruningEnv,
    config: SearchConfig,
    folder: RunFolder | None = None,
    on_episode: Callable[[Episode], None] = lambda episode: None,
    on_pause: Callable[[str], None] = lambda what: None,
) -> SearchResult:
    """Runs one agent or baseline and chooses among its finalists on the selection
    split.

    With a folder every episode is logged and the learner is checkpointed; called again
    after a kill, the search goes on and ends with the same allocation.

    Args:
        env: The environment, fresh.
        config: Agent, episodes, seed, policy to start from, number of finalists.
        folder: Run folder for log, checkpoint and TensorBoard events.
        on_episode: Called after each episode, for progress.
        on_pause: Called with what is done where no episode ends for a while.

    Raises:
        UserError: If the agent is unknown, a checkpoint is damaged, or the policy to
            start from can't be used.
    """
    check_agent(config.agent, env.budget)
    started, recorder = (
        time.perf_counter(),
        Recorder(env, config, folder, on_episode, on_pause),
    )
    evaluated = env.proxy.evaluations
    policy = _run_agent(recorder, config, folder)
    recorder.on_pause("comparing the best")
    points, uniform = (
        front(recorder, policy) if isinstance(env.budget, BudgetRange) else ([], [])
    )
    compared = points or finalists(recorder, policy)
    best = knee(points) if points else compared[0]
    evaluations = env.proxy.evaluations - evaluated + recorder.n_restored
    seconds = time.perf_counter() - started
    return SearchResult(
        best, compared, points, uniform, recorder, policy, evaluations, seconds
    )


def _run_agent(
    recorder: Recorder, config: SearchConfig, folder: RunFolder | None
) -> Policy | None:
    if config.agent in BASELINES:
        BASELINES[config.agent](recorder)
        return None
    start = starting_policy(config.agent, config.policy, folder and folder.start)
    checkpoint = log = None
    if folder is not None:
        folder.checkpoints.mkdir(parents=True, exist_ok=True)
        checkpoint, log = folder.checkpoints / "learner.pt", folder.tensorboard
    if config.agent == "dyna":
        return train_dyna(recorder, log, start)
    return train(config.agent, recorder, checkpoint, log, start)
