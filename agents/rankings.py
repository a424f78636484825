"""Allocations that need no search.

One threshold for the importance of all channels, or EagleEye's random shares. They play
in the same environment as every agent, which rounds and bounds the sparsities that they
propose and uses up the budget.
"""

import numpy as np

from autoprune.agents.recorder import LANES, Recorder
from autoprune.costs.search_space import SearchSpace
from autoprune.envs.batch import fixed_policy
from autoprune.envs.layer_pruning import LayerPruningEnv

N_DRAWS = 10_000
"""Allocations that EagleEye's sampler draws at once."""
TOLERANCE = 0.005
"""How far a sampled cost may be from the budget, as a share of the dense network's."""


def global_ranking(recorder: Recorder) -> None:
    """One threshold over all channels: the least important ones go, wherever they are.

    Network Slimming (Liu et al. 2017, section 3.2) with the criterion `bn_scale`; with
    others, global pruning as Torch-Pruning and Molchanov et al. 2019 do it. No group
    loses more than the search space allows, so none is cut off.
    """
    _run_with_threshold(recorder, _importance(recorder.env))


def cost_aware(recorder: Recorder) -> None:
    """One threshold over all channels for importance per cost saved.

    So channels of expensive layers go first. What a channel saves is counted in its own
    layer and in those that read it, next to the dense network, in the metric of the
    budget.
    """
    env = recorder.env
    space = env.space
    dense = space.costs.dense
    one_less = dense - np.eye(len(dense))
    # By the curve: a single channel may save nothing where costs fall in steps.
    costs = space.costs.continuous_cost
    savings = costs(space.metric, dense) - costs(space.metric, one_less)
    scores = []
    for importance, saved in zip(_importance(env), savings, strict=True):
        # Nor does it where another one of several budgets is the tighter.
        scores.append(importance / max(saved, 1e-9))
    _run_with_threshold(recorder, scores)


def eagleeye(recorder: Recorder) -> None:
    """EagleEye's sampling (Li et al. 2020, section 3.2).

    A share of each group's channels is drawn uniformly from [0, r]; an allocation
    counts if its cost is within half a percent of the dense network's of the budget.
    The paper gives an r for each of its budgets (0.7 for half of the MACs); here it is
    the one at which the mean cost is the budget, since any budget can be asked for. Use
    `--proxy.statistics calibration` for the paper's adaptive batch norm, which measures
    its statistics on other images than the score.
    """
    env = recorder.env
    generator = np.random.default_rng(recorder.config.seed)
    target = env.target_of(env.budget.at_position(0.5))
    max_share = _max_share(env.space, target, generator)
    while recorder.remaining:
        # A new draw for each batch, as it is cheap; most of it isn't used.
        sparsities = _sample(env.space, target, max_share, generator)
        n_lanes = min(LANES, recorder.remaining)
        recorder.run_episodes(fixed_policy(sparsities[:n_lanes]), n_lanes)


def _importance(env: LayerPruningEnv) -> list[np.ndarray]:
    """Importance of each group's channels, `(channels,)` each; higher is kept."""
    scores = env.proxy.importance
    return [scores[group.name].double().numpy() for group in env.groups]


def _run_with_threshold(recorder: Recorder, scores: list[np.ndarray]) -> None:
    """One episode that keeps the channels with the highest scores over all groups."""
    env = recorder.env
    target = env.target_of(env.budget.at_position(0.5))
    kept = _above_threshold(env.space, scores, target)
    sparsities = 1 - kept[None] / env.space.costs.dense
    recorder.run_episodes(fixed_policy(sparsities), 1)


def _above_threshold(
    space: SearchSpace, scores: list[np.ndarray], target: int
) -> np.ndarray:
    """Counts `(n_groups,)` above the lowest threshold that meets the budget.

    Two groups with scores (0.2, 0.5, 0.9) and (0.1, 0.3, 0.4): above the threshold 0.3
    lie two and one of them. A group keeps no fewer than its limit, whatever its scores.
    """
    # Between two neighbouring scores all thresholds are alike.
    thresholds = np.unique(np.concatenate(scores))

    def counts_above(threshold: float) -> np.ndarray:
        counts = np.array([(group > threshold).sum() for group in scores])
        return np.clip(counts, space.low, space.high)

    # Where everything fits, no threshold cuts anything.
    if space.cost(counts_above(-np.inf)) <= target:
        return counts_above(-np.inf)
    # Bisection: the cost is above the budget at `low`, which stands for no threshold
    # where it is -1, and within it at `high`.
    low = -1
    high = len(thresholds) - 1
    while high - low > 1:
        middle = (low + high) // 2
        if space.cost(counts_above(thresholds[middle])) <= target:
            high = middle
        else:
            low = middle
    return counts_above(thresholds[high])


def _max_share(
    space: SearchSpace, target: int, generator: np.random.Generator
) -> float:
    """The r at which shares from [0, r] cost the target on average.

    Where even r = 1 costs more, because groups keep their least, it is 1.
    """
    # The same draws at every step, so that the mean cost falls as r grows.
    units = generator.random((N_DRAWS // 10, len(space.low)))
    low = 0.0
    high = 1.0
    for _ in range(20):
        middle = (low + high) / 2
        counts = _counts(space, middle * units)
        if space.costs.continuous_cost(space.metric, counts).mean() > target:
            low = middle
        else:
            high = middle
    return high


def _sample(
    space: SearchSpace, target: int, max_share: float, generator: np.random.Generator
) -> np.ndarray:
    """Sparsities `(n, n_groups)`, n >= `LANES`, of allocations that cost the target.

    Where hardly any does, as in networks whose channels are few, the nearest of the
    draw are taken.
    """
    sparsities = max_share * generator.random((N_DRAWS, len(space.low)))
    costs = space.costs.continuous_cost(space.metric, _counts(space, sparsities))
    distances = np.abs(costs - target)
    is_close = distances <= TOLERANCE * space.cost(space.costs.dense)
    if is_close.sum() >= LANES:
        return sparsities[is_close]
    nearest = np.argsort(distances, kind="stable")[:LANES]
    return sparsities[nearest]


def _counts(space: SearchSpace, sparsities: np.ndarray) -> np.ndarray:
    """The counts `(n, n_groups)` nearest to sparsities, within the groups' limits."""
    rounded = np.rint(space.costs.dense * (1 - sparsities)).astype(np.int64)
    return np.clip(rounded, space.low, space.high)
