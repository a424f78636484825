"""From many scored allocations to the few that count.

A search scores hundreds of allocations on few images, so the best of them owes much to
luck. Here the most promising are compared again: first on the whole proxy split, the
best of those on the selection split, which no search has seen.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace

import numpy as np

from autoprune.agents.recorder import Episode, Recorder, counts_of, is_near_budget
from autoprune.agents.replay import Policy, make_actor
from autoprune.costs.allocation import Allocation
from autoprune.costs.budget import AnyBudget, SingleBudget
from autoprune.costs.metrics import counts_in_order
from autoprune.envs.batch import BatchedEpisodes, fixed_policy, uniform_policy
from autoprune.envs.layer_pruning import LayerPruningEnv
from autoprune.evaluation.evaluate import Evaluation

FRONT_BUDGETS = 6
"""Budgets of a range that are compared for the Pareto front."""
SURVEY_FACTOR = 4
"""Candidates scored on the whole proxy split for each that reaches the selection split.
"""
N_SURVEYED_PER_BUDGET = 8
"""Candidates scored on the whole proxy split at each budget of a range."""


@dataclass(frozen=True)
class Finalist:
    """A candidate of the final choice.

    Attributes:
        allocation: Kept channels, and who proposed them.
        proxy: Scores on the proxy split.
        selection: Scores on the selection split, which decide.
        reward: The reward for `selection`; higher is better.
        macs: Multiply-accumulates of the pruned network.
        cost: Its cost in the metric of the budget.
    """

    allocation: Allocation
    proxy: Evaluation
    selection: Evaluation
    reward: float
    macs: int
    cost: int

    def to_json(self) -> dict:
        """Plain data for the results."""
        scores = {}
        for split, evaluation in (("proxy", self.proxy), ("selection", self.selection)):
            for name, value in asdict(evaluation).items():
                scores[f"{split}_{name}"] = value
        return {
            "source": self.allocation.source,
            **scores,
            "reward": self.reward,
            "macs": self.macs,
        }


def choose_finalists(recorder: Recorder, policy: Policy | None) -> list[Finalist]:
    """The best allocations by proxy reward and the policy's own, each once.

    At least four times as many are scored on the whole proxy split before. Where the
    agent has a model of the reward, its estimates decide who gets that far; else as
    many come from each block of images. A search that was long enough for more blocks
    surveys more, so that no block sends fewer.

    Args:
        recorder: The search's episodes.
        policy: The trained policy; None for baselines.

    Returns:
        As many as `config.finalists`, and the policy's own; the best on the selection
        split first.
    """
    env = recorder.env
    episodes = recorder.episodes
    n_finalists = recorder.config.finalists
    n_blocks = 0
    if recorder.predict_rewards is None:
        n_blocks = len(np.unique(recorder.blocks))
    promise = _promise(recorder, episodes, counts_of(episodes))
    n_surveyed = n_finalists * max(SURVEY_FACTOR, n_blocks)
    candidates = _best(episodes, promise, n_surveyed)
    _, rewards = _survey(candidates, recorder)
    chosen = _best(candidates, rewards, n_finalists)
    if policy is not None:
        proposal = roll_out_policy(policy, env, env.budget)
        # In front, since it keeps its name where an episode had the same counts.
        others = [episode for episode in chosen if episode.counts != proposal.counts]
        chosen = [proposal, *others]
    return rank_on_selection(chosen, env)


def find_front(
    recorder: Recorder, policy: Policy | None
) -> tuple[list[Finalist], list[Finalist]]:
    """The Pareto front of a range of budgets: what no other candidate beats.

    At each of a few budgets the policy's own allocation competes with the best episode,
    resized to it, and with uniform pruning. A winner is on the front if its loss is
    below that of every cheaper winner.

    Args:
        recorder: The search's episodes.
        policy: The trained policy; None for baselines.

    Returns:
        The front, cheapest first, and uniform pruning at these budgets, to hold it
        against.
    """
    env = recorder.env
    # Both ends of the range are among them.
    positions = np.linspace(0, 1, FRONT_BUDGETS)
    budgets = [env.budget.at_position(position) for position in positions]
    uniform = roll_out(uniform_policy, env, budgets, "uniform")
    rivals = []
    for budget, even in zip(budgets, uniform, strict=True):
        rivals.append([even, *candidates_for_budget(recorder, policy, budget)])
    # All in one call, since the proxy scores candidates side by side.
    scored = _score_on_selection(
        [episode for group in rivals for episode in group], env
    )
    winners = []
    uniform_finalists = []
    start = 0
    for group in rivals:
        finalists = scored[start : start + len(group)]
        start += len(group)
        winners.append(min(finalists, key=_selection_loss))
        uniform_finalists.append(finalists[0])
    return _undominated(winners), uniform_finalists


def _selection_loss(finalist: Finalist) -> float:
    return finalist.selection.loss


def _undominated(points: list[Finalist]) -> list[Finalist]:
    """Those whose loss is below that of every cheaper one, cheapest first.

    Costs and losses (30, 1.2), (40, 1.3) and (50, 0.9) leave the first and the third.
    """
    lowest = np.inf
    front = []
    for point in sorted(points, key=lambda point: (point.cost, point.selection.loss)):
        if point.selection.loss < lowest:
            lowest = point.selection.loss
            front.append(point)
    return front


def candidates_for_budget(
    recorder: Recorder, policy: Policy | None, budget: SingleBudget
) -> list[Episode]:
    """The best of a search's episodes for a budget, and the policy's own allocation.

    An episode counts whichever budget near this one it was walked for, and is resized
    until this one is used up: a percent of the cost is worth more than what tells good
    allocations apart. The most promising are scored on the whole proxy split.

    Args:
        recorder: The search's episodes.
        policy: The trained policy; None for baselines.
        budget: One budget.

    Returns:
        Up to two episodes: the best resized one, if any is near, and the policy's.
    """
    env = recorder.env
    costs = np.array([_cost(episode, env) for episode in recorder.episodes])
    places = np.flatnonzero(is_near_budget(env, costs, budget))
    candidates = []
    if len(places):
        close = [recorder.episodes[place] for place in places]
        candidates.append(_best_resized(close, recorder, budget))
    if policy is not None:
        candidates.append(roll_out_policy(policy, env, budget))
    return candidates


def _best_resized(
    episodes: list[Episode], recorder: Recorder, budget: SingleBudget
) -> Episode:
    """The best of some episodes after each was resized to a budget.

    All sparsities of an episode are shifted alike until the budget is used up; where
    budgets are ceilings, episodes stay as they are.
    """
    env = recorder.env
    counts = counts_of(episodes)
    batch = env.start_episodes([budget] * len(episodes))
    if batch.uses_up_budget:
        # The environment rounds them again, so that counts stay allowed ones.
        walked = 1 - counts / env.space.costs.dense
        sparsities = env.space.shift_to_targets(walked, batch.state.targets)
        counts = batch.rollout(fixed_policy(sparsities)).state.kept
    resized = []
    for episode, row in zip(episodes, counts, strict=True):
        # An episode of this very budget stays what it is, and keeps its source.
        if tuple(row) != episode.counts:
            episode = _with_counts(episode, row, env, budget)
        resized.append(episode)
    # Without a model an episode is as good as its reward before it was resized.
    promise = _promise(recorder, episodes, counts)
    candidates = _best(resized, promise, N_SURVEYED_PER_BUDGET)
    scores, rewards = _survey(candidates, recorder)
    best = int(np.argmax(rewards))
    # A resized episode still holds the score of its old counts.
    return replace(candidates[best], evaluation=scores[best])


def _with_counts(
    episode: Episode, counts: np.ndarray, env: LayerPruningEnv, budget: SingleBudget
) -> Episode:
    """An episode with other counts `(n_groups,)`, made for another budget."""
    allocation = Allocation(
        env.counts(counts),
        env.groups.fingerprint,
        str(budget),
        f"episode {episode.number}, resized",
    )
    return replace(episode, allocation=allocation, macs=env.space.costs.macs(counts))


def _survey(
    candidates: list[Episode], recorder: Recorder
) -> tuple[list[Evaluation], np.ndarray]:
    """Scores on all images that scored the search, and the rewards `(n,)` for them."""
    env = recorder.env
    kept = [episode.allocation.kept for episode in candidates]
    scores = env.proxy.survey_all(kept, recorder.n_batches)
    rewards = []
    for score, episode in zip(scores, candidates, strict=True):
        rewards.append(env.reward_of(score, episode.macs))
    return scores, np.array(rewards)


def rank_on_selection(
    candidates: Iterable[Episode], env: LayerPruningEnv
) -> list[Finalist]:
    """Scores candidates on the selection split.

    Args:
        candidates: Episodes.
        env: Their environment.

    Returns:
        The candidates with their scores, highest reward first.
    """
    return sorted(
        _score_on_selection(candidates, env), key=lambda finalist: -finalist.reward
    )


def roll_out_policy(policy: Policy, env: LayerPruningEnv, budget: AnyBudget) -> Episode:
    """The allocation that a trained policy chooses by itself, as episode 0.

    Args:
        policy: The policy; it acts without chance.
        env: Where it acts.
        budget: The budget; of a range the middle.
    """
    middle = budget.at_position(0.5)
    (episode,) = roll_out(make_actor(policy, env), env, [middle], "policy")
    return episode


def roll_out(
    act: Callable[[BatchedEpisodes], np.ndarray],
    env: LayerPruningEnv,
    budgets: list[SingleBudget],
    source: str,
) -> list[Episode]:
    """Plays one episode a budget and scores it; no learner sees them.

    Args:
        act: From lanes to their actions, `(n_lanes,)`.
        env: The environment.
        budgets: One a lane.
        source: Who acts, for the allocations.

    Returns:
        The episodes, all with the number 0.
    """
    batch = env.start_episodes(budgets).rollout(act)
    rewards, infos = env.score(batch, budgets)
    episodes = []
    for reward, info in zip(rewards.tolist(), infos, strict=True):
        # The environment doesn't know who acted.
        allocation = replace(info["allocation"], source=source)
        episodes.append(Episode.from_info(0, reward, info | {"allocation": allocation}))
    return episodes


def knee_point(points: list[Finalist]) -> Finalist:
    """Where the front bends most: the point farthest from the line between its ends.

    Both axes are scaled to [0, 1], so the ends are (0, 1) and (1, 0), and the distance
    below the line between them grows as cost + loss falls. Scaled points (0, 1),
    (0.3, 0.2) and (1, 0) have the sums 1, 0.5 and 1: the second one is the knee.
    """
    costs = np.array([point.cost for point in points], float)
    losses = np.array([point.selection.loss for point in points], float)
    sums = _scaled(costs) + _scaled(losses)
    return points[int(sums.argmin())]


def _scaled(values: np.ndarray) -> np.ndarray:
    """Values `(n,)` moved and stretched to [0, 1]; all 0 if they are equal."""
    # A front of one point has no extent.
    return (values - values.min()) / max(np.ptp(values), 1e-12)


def _best(episodes: list[Episode], rewards: np.ndarray, n: int) -> list[Episode]:
    """The `n` best different allocations by the given rewards, best first."""
    best: dict[tuple[int, ...], Episode] = {}
    for place in np.argsort(-rewards, kind="stable"):
        # -inf marks an episode that repeats another one.
        if np.isfinite(rewards[place]):
            best.setdefault(episodes[place].counts, episodes[place])
    return list(best.values())[:n]


def _promise(
    recorder: Recorder, episodes: list[Episode], counts: np.ndarray
) -> np.ndarray:
    """How good allocations that came from some episodes are likely to be.

    If the agent has a model of the reward: what that expects. Else minus the rank of
    the episode's reward within its block of images. Rewards 0.5, 0.9 on one block and
    0.1, 0.3 on another give -1, 0, -1, 0. Blocks differ by more than good allocations
    do, so by reward alone one block would send nearly all of the best.

    Args:
        recorder: The search.
        episodes: `n` of its episodes.
        counts: Kept channels `(n, n_groups)` that the episodes have, or were resized
            to.

    Returns:
        `(n,)`, higher is better; -inf for an episode that repeats another one.
    """
    if recorder.predict_rewards is not None:
        return recorder.predict_rewards(counts)
    rewards = np.array([episode.reward for episode in episodes])
    cost_baseline = recorder.cost_baseline
    if cost_baseline is not None:
        # Under a range of budgets that are used up the dearest would win alike.
        costs = recorder.env.space.cost(counts_of(episodes))
        rewards = cost_baseline.to_relative(rewards, costs)
    # Episodes are numbered from 1 in the order in which the recorder keeps them.
    places = [episode.number - 1 for episode in episodes]
    is_first = recorder.is_first[places]
    blocks = recorder.blocks[places]
    promise = np.full(len(episodes), -np.inf)
    for block in np.unique(blocks):
        members = np.flatnonzero(is_first & (blocks == block))
        order = np.argsort(-rewards[members], kind="stable")
        promise[members[order]] = -np.arange(len(members))
    return promise


def _score_on_selection(
    candidates: Iterable[Episode], env: LayerPruningEnv
) -> list[Finalist]:
    """The candidates with their scores on the selection split, in order."""
    episodes = list(candidates)
    kept = [episode.allocation.kept for episode in episodes]
    selections = env.proxy.select_all(kept)
    finalists = []
    for episode, selection in zip(episodes, selections, strict=True):
        finalists.append(_finalist(episode, selection, env))
    return finalists


def _finalist(
    episode: Episode, selection: Evaluation, env: LayerPruningEnv
) -> Finalist:
    source = episode.allocation.source or f"episode {episode.number}"
    return Finalist(
        allocation=replace(episode.allocation, source=source),
        proxy=episode.evaluation,
        selection=selection,
        reward=env.reward_of(selection, episode.macs),
        macs=episode.macs,
        cost=_cost(episode, env),
    )


def _cost(episode: Episode, env: LayerPruningEnv) -> int:
    """What an episode's network costs in the metric of the budget."""
    costs = env.space.costs
    # By name, since an allocation from a file may list groups in another order.
    kept = counts_in_order(episode.allocation.kept, costs.names, costs.dense)
    return env.space.cost(kept)
