"""From many scored allocations to the ones that count: compared once more, on images
that no search has seen.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice

import numpy as np

from autoprune.agents.recorder import Episode, Recorder, counts_of, near
from autoprune.agents.replay import Policy, acting
from autoprune.costs.allocation import Allocation
from autoprune.costs.budget import Budget, BudgetRange
from autoprune.envs.batch import BatchedEpisodes, fixed_policy, uniform_policy
from autoprune.envs.layer_pruning import LayerPruningEnv
from autoprune.evaluation.evaluate import Evaluation

FRONT_BUDGETS = 6
"""Budgets of a range that are compared for the Pareto front."""

SURVEYED = 4
"""Candidates that are scored on the whole proxy split for each one that reaches the
selection split.
"""

SURVEYED_WITHIN = 8
"""The same for the one best episode within a budget of a range."""


@dataclass(frozen=True)
class Finalist:
    """A candidate of the final choice: its proxy score, and the score on the selection
    split that decides.
    """

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
        return {
            "source": self.allocation.source,
            **scores,
            "reward": self.reward,
            "macs": self.macs,
        }


def finalists(recorder: Recorder, policy: Policy | None) -> list[Finalist]:
    """The best allocations by proxy reward and the policy's own, each once, best on the
    selection split first.

    Four times as many are scored on the whole proxy split before, since the best of
    hundreds of scores on few images owes much to luck. Where the agent has a model of
    the reward, its estimates decide who gets that far; else as many come from each
    block of images, and no fewer because the search was long enough for more blocks.
    """
    env, n, episodes = recorder.env, recorder.config.finalists, recorder.episodes
    n_blocks = len(np.unique(recorder.blocks)) if recorder.expected is None else 0
    candidates = _best(
        episodes,
        _promise(recorder, episodes, counts_of(episodes)),
        n * max(SURVEYED, n_blocks),
    )
    chosen = _best(candidates, _surveyed(candidates, recorder)[1], n)
    if policy is not None:
        its = own(policy, env, env.budget)
        chosen = [its, *(episode for episode in chosen if episode.counts != its.counts)]
    return rank_on_selection(chosen, env)


def front(
    recorder: Recorder, policy: Policy | None
) -> tuple[list[Finalist], list[Finalist]]:
    """For a range of budgets the allocations that no other one beats at its cost or
    below, cheapest first.

    At each of a few budgets the policy's own allocation competes with the best episode,
    resized to it, and with uniform pruning; the winners make the front, as far as they
    aren't beaten by that of a smaller budget.

    Returns:
        The front, and uniform pruning at these budgets, to hold it against.
    """
    env = recorder.env
    budgets = [env.budget.at(position) for position in np.linspace(0, 1, FRONT_BUDGETS)]
    uniform = rolled_out(uniform_policy, env, budgets, "uniform")
    rivals = [
        [even, *within(recorder, policy, budget)]
        for budget, even in zip(budgets, uniform, strict=True)
    ]
    points = iter(_judged(chain.from_iterable(rivals), env))
    judged = [list(islice(points, len(group))) for group in rivals]
    winners = [
        min(group, key=lambda finalist: finalist.selection.loss) for group in judged
    ]
    return _undominated(winners), [group[0] for group in judged]


def _undominated(points: list[Finalist]) -> list[Finalist]:
    best, found = np.inf, []
    for point in sorted(
        points, key=lambda finalist: (finalist.cost, finalist.selection.loss)
    ):
        if point.selection.loss < best:
            best = point.selection.loss
            found.append(point)
    return found


def within(recorder: Recorder, policy: Policy | None, budget: Budget) -> list[Episode]:
    """The best of the episodes within a budget, and the policy's own allocation for it.

    An episode counts whichever budget near this one it was walked for, and is resized
    until this one is used up: a percent of the cost is worth more than what tells good
    allocations apart. The most promising are scored on the whole proxy split.
    """
    env = recorder.env
    is_near = near(
        env, np.array([_cost(episode, env) for episode in recorder.episodes]), budget
    )
    close = [recorder.episodes[place] for place in np.flatnonzero(is_near)]
    best = [_resized(close, recorder, budget)] if close else []
    return best + ([own(policy, env, budget)] if policy is not None else [])


def _resized(episodes: list[Episode], recorder: Recorder, budget: Budget) -> Episode:
    """The best of some episodes after all sparsities of each were shifted alike until
    the budget is used up.
    """
    env, counts = recorder.env, counts_of(episodes)
    batch = env.start_episodes([budget] * len(episodes))
    if batch.uses_up_budget:
        sparsities = env.space.shifted(
            1 - counts / env.space.costs.dense, batch.state.targets
        )
        counts = batch.rollout(fixed_policy(sparsities)).state.kept
    resized = [
        episode if tuple(row) == episode.counts else _changed(episode, row, env, budget)
        for episode, row in zip(episodes, counts, strict=True)
    ]
    candidates = _best(resized, _promise(recorder, episodes, counts), SURVEYED_WITHIN)
    scores, rewards = _surveyed(candidates, recorder)
    best = int(np.argmax(rewards))
    return replace(candidates[best], evaluation=scores[best])


def _surveyed(
    candidates: list[Episode], recorder: Recorder
) -> tuple[list[Evaluation], list[float]]:
    """Scores on all images that judged the search, and the rewards for them."""
    env = recorder.env
    scores = env.proxy.survey_all(
        [episode.allocation.kept for episode in candidates], recorder.n_batches
    )
    return scores, [
        env.reward_of(score, episode.macs)
        for score, episode in zip(scores, candidates, strict=True)
    ]


def _changed(
    episode: Episode, counts: np.ndarray, env: LayerPruningEnv, budget: Budget
) -> Episode:
    source = f"episode {episode.number}, resized"
    allocation = Allocation(
        env.counts(counts), env.groups.fingerprint, str(budget), source
    )
    return replace(episode, allocation=allocation, macs=env.space.costs.macs(counts))


def rank_on_selection(
    candidates: Iterable[Episode], env: LayerPruningEnv
) -> list[Finalist]:
    """The candidates with their scores on the selection split, best first."""
    return sorted(_judged(candidates, env), key=lambda finalist: -finalist.reward)


def own(policy: Policy, env: LayerPruningEnv, budget: Budget | BudgetRange) -> Episode:
    """The trained policy's own allocation, as episode 0."""
    return rolled_out(acting(policy, env), env, [budget.at(0.5)], "policy")[0]


def rolled_out(
    act: Callable[[BatchedEpisodes], np.ndarray],
    env: LayerPruningEnv,
    budgets: list[Budget],
    source: str,
) -> list[Episode]:
    """Where `act` goes under each budget: roll-outs that nobody learned from, as
    episodes 0.
    """
    rewards, infos = env.score(env.start_episodes(budgets).rollout(act), budgets)
    named = [
        info | {"allocation": replace(info["allocation"], source=source)}
        for info in infos
    ]
    return [
        Episode.of(0, reward, info)
        for reward, info in zip(rewards.tolist(), named, strict=True)
    ]


def knee(points: list[Finalist]) -> Finalist:
    """Where the front bends most: the point farthest from the line between its ends,
    both axes scaled to [0, 1].
    """
    costs, losses = (
        np.array([of(p) for p in points], float)
        for of in (lambda p: p.cost, lambda p: p.selection.loss)
    )
    scaled = [
        (values - values.min()) / max(np.ptp(values), 1e-12)
        for values in (costs, losses)
    ]
    return points[int((scaled[0] + scaled[1]).argmin())]


def _best(episodes: list[Episode], rewards: Sequence[float], n: int) -> list[Episode]:
    """The best different allocations by the given rewards."""
    best: dict[tuple[int, ...], Episode] = {}
    for place in np.argsort(-np.array(rewards), kind="stable"):
        if np.isfinite(rewards[place]):
            best.setdefault(episodes[place].counts, episodes[place])
    return list(best.values())[:n]


def _promise(
    recorder: Recorder, episodes: list[Episode], counts: np.ndarray
) -> np.ndarray:
    """How good allocations `(n, n_groups)` that came from some episodes are: what the
    agent expects if it has a model.

    Else minus the place of the episode's reward among those of its block, -inf where it
    repeats another one. Blocks differ by more than good allocations do, so by reward
    alone one block would send nearly all of the best. Under a range of budgets that are
    used up the dearest would win alike; there rewards are relative to the usual at a
    cost.
    """
    if recorder.expected is not None:
        return recorder.expected(counts)
    rewards, promise = (
        np.array([episode.reward for episode in episodes]),
        np.full(len(episodes), -np.inf),
    )
    cost_baseline = recorder.cost_baseline
    if cost_baseline is not None:
        rewards = cost_baseline.relative(
            rewards, recorder.env.space.cost(counts_of(episodes))
        )
    places = [episode.number - 1 for episode in episodes]
    is_first, blocks = recorder.is_first[places], recorder.blocks[places]
    for block in np.unique(blocks):
        here = np.flatnonzero(is_first & (blocks == block))
        promise[here[np.argsort(-rewards[here], kind="stable")]] = -np.arange(len(here))
    return promise


def _judged(candidates: Iterable[Episode], env: LayerPruningEnv) -> list[Finalist]:
    """The candidates with their scores on the selection split."""
    episodes = list(candidates)
    selections = env.proxy.select_all([episode.allocation.kept for episode in episodes])
    return [
        _finalist(episode, selection, env)
        for episode, selection in zip(episodes, selections, strict=True)
    ]


def _finalist(
    episode: Episode, selection: Evaluation, env: LayerPruningEnv
) -> Finalist:
    source = episode.allocation.source or f"episode {episode.number}"
    allocation, reward = (
        replace(episode.allocation, source=source),
        env.reward_of(selection, episode.macs),
    )
    return Finalist(
        allocation,
        episode.evaluation,
        selection,
        reward,
        episode.macs,
        _cost(episode, env),
    )


def _cost(episode: Episode, env: LayerPruningEnv) -> int:
    return env.space.cost(
        np.array([episode.allocation.kept[name] for name in env.space.costs.names])
    )
