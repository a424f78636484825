"""From many scored allocations to the ones that count: compared once more, on images that no search has seen."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from agents.lanes import Episode, Recorder
from agents.replay import Policy
from autoprune.allocation import Allocation, Budget, BudgetRange
from autoprune.scoring import Evaluation
from envs.layer_pruning import LayerPruningEnv
from envs.walks import Walks, uniformly

FRONT_BUDGETS = 6
"""Budgets of a range that are compared for the Pareto front."""

SURVEYED = 4
"""Candidates that are scored on the whole proxy split for each one that reaches the selection split."""


@dataclass(frozen=True)
class Finalist:
    """A candidate of the final choice: its proxy score, and the score on the selection split that decides."""

    allocation: Allocation
    proxy: Evaluation
    selection: Evaluation
    reward: float
    macs: int
    cost: int

    def to_json(self) -> dict:
        """Plain data for the results."""
        scores = {
            f"{split}_{name}": value
            for split in ("proxy", "selection")
            for name, value in asdict(getattr(self, split)).items()
        }
        return {"source": self.allocation.source, **scores, "reward": self.reward, "macs": self.macs}


def finalists(recorder: Recorder, policy: Policy | None) -> list[Finalist]:
    """The best different allocations by proxy reward, and the policy's own, best on the selection split first.

    Four times as many are scored on the whole proxy split before, since the best of hundreds of scores on few images
    owes much to luck. Where the agent has a model of the reward, its estimates decide who gets that far; else as many
    come from each block of images.
    """
    env, n = recorder.env, recorder.config.finalists
    candidates = _best(recorder.episodes, recorder.estimates or _places(recorder), SURVEYED * n)
    surveyed = env.proxy.survey_all([episode.allocation.kept for episode in candidates])
    pairs = zip(candidates, surveyed, strict=True)
    chosen = _best(candidates, [env.reward_of(evaluation, episode.macs) for episode, evaluation in pairs], n)
    if policy is not None:
        chosen.insert(0, own(policy, env, env.budget))
    return judge(chosen, env)


def front(recorder: Recorder, policy: Policy | None) -> tuple[list[Finalist], list[Finalist]]:
    """For a range of budgets the allocations that no other one beats at its cost or below, cheapest first.

    At each of a few budgets the policy's own allocation competes with the best episode within it and with uniform
    pruning.

    Returns:
        The front, and uniform pruning at these budgets, to hold it against.
    """
    env, candidates = recorder.env, {}
    budgets = [env.budget.at(position) for position in np.linspace(0, 1, FRONT_BUDGETS)]
    uniform = rolled_out(uniformly, env, budgets, "uniform")
    for budget, even in zip(budgets, uniform, strict=True):
        for episode in [even, *within(recorder, policy, budget)]:
            candidates[episode.counts] = episode
    points = _judged(candidates.values(), env)
    selections = {counts: point.selection for counts, point in zip(candidates, points, strict=True)}
    return _undominated(points), [_finalist(even, selections[even.counts], env) for even in uniform]


def _undominated(points: list[Finalist]) -> list[Finalist]:
    best, found = np.inf, []
    for point in sorted(points, key=lambda finalist: (finalist.cost, finalist.selection.loss)):
        if point.selection.loss < best:
            best = point.selection.loss
            found.append(point)
    return found


def within(recorder: Recorder, policy: Policy | None, budget: Budget) -> list[Episode]:
    """The best episode within a budget, and the policy's own allocation for it.

    An episode counts for every budget that it meets, whichever it was walked for.
    """
    env = recorder.env
    target, costs = env.target_of(budget), np.array([_cost(episode, env) for episode in recorder.episodes])
    best = _best(recorder.episodes, np.where(costs <= target, recorder.judgements, -np.inf), 1)
    return best + ([own(policy, env, budget)] if policy is not None else [])


def judge(candidates: Iterable[Episode], env: LayerPruningEnv) -> list[Finalist]:
    """The candidates with their scores on the selection split, best first."""
    return sorted(_judged(candidates, env), key=lambda finalist: -finalist.reward)


def own(policy: Policy, env: LayerPruningEnv, budget: Budget | BudgetRange) -> Episode:
    """The trained policy's own allocation, as episode 0."""
    return rolled_out(lambda walks: policy.act(walks.observe())[:, 0], env, [budget.at(0.5)], "policy")[0]


def rolled_out(
    act: Callable[[Walks], np.ndarray], env: LayerPruningEnv, budgets: list[Budget], source: str
) -> list[Episode]:
    """Where `act` goes under each budget: roll-outs that nobody learned from, as episodes 0."""
    rewards, infos = env.score(env.walks(budgets).follow(act), budgets)
    named = [info | {"allocation": replace(info["allocation"], source=source)} for info in infos]
    return [Episode.of(0, reward, info) for reward, info in zip(rewards.tolist(), named, strict=True)]


def knee(points: list[Finalist]) -> Finalist:
    """Where the front bends most: the point farthest from the line between its ends, both axes scaled to [0, 1]."""
    costs, losses = (np.array([of(p) for p in points], float) for of in (lambda p: p.cost, lambda p: p.selection.loss))
    scaled = [(values - values.min()) / max(np.ptp(values), 1e-12) for values in (costs, losses)]
    return points[int((scaled[0] + scaled[1]).argmin())]


def _best(episodes: list[Episode], rewards: Sequence[float], n: int) -> list[Episode]:
    """The best different allocations by the given rewards."""
    best: dict[tuple[int, ...], Episode] = {}
    for place in np.argsort(-np.array(rewards), kind="stable"):
        if np.isfinite(rewards[place]):
            best.setdefault(episodes[place].counts, episodes[place])
    return list(best.values())[:n]


def _places(recorder: Recorder) -> np.ndarray:
    """Minus the place of each episode among those of its block, the best reward first; -inf where one is repeated.

    Blocks differ by more than good allocations do, so by reward alone one block would send nearly all of the best.
    """
    episodes, places = recorder.episodes, np.full(len(recorder.episodes), -np.inf)
    rewards = np.array([episode.reward for episode in episodes])
    # A repeated allocation has kept the score of the block that judged it first.
    first = np.sort(np.unique([episode.counts for episode in episodes], axis=0, return_index=True)[1])
    for block in range(recorder.env.proxy.n_blocks):
        own = first[recorder.blocks[first] == block]
        places[own[np.argsort(-rewards[own], kind="stable")]] = -np.arange(len(own))
    return places


def _judged(candidates: Iterable[Episode], env: LayerPruningEnv) -> list[Finalist]:
    """The candidates with their scores on the selection split."""
    episodes = list(candidates)
    selections = env.proxy.select_all([episode.allocation.kept for episode in episodes])
    return [_finalist(episode, selection, env) for episode, selection in zip(episodes, selections, strict=True)]


def _finalist(episode: Episode, selection: Evaluation, env: LayerPruningEnv) -> Finalist:
    source = f"episode {episode.number}" if episode.number else episode.allocation.source
    allocation, reward = replace(episode.allocation, source=source), env.reward_of(selection, episode.macs)
    return Finalist(allocation, episode.evaluation, selection, reward, episode.macs, _cost(episode, env))


def _cost(episode: Episode, env: LayerPruningEnv) -> int:
    return env.space.cost(np.array([episode.allocation.kept[name] for name in env.space.costs.names]))
