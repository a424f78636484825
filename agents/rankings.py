"""Allocations that need no search: one threshold for the importance of all channels,
and EagleEye's random shares.

They walk through the same door as every agent: the environment rounds, bounds and fills
up what they wish.
"""

from collections.abc import Callable

import numpy as np

from autoprune.agents.recorder import LANES, Recorder
from autoprune.costs.allocation import SearchSpace
from autoprune.envs.batch import fixed_policy

SHARES = 10_000
"""Allocations that EagleEye's sampler draws at once."""
TOLERANCE = 0.005
"""How far a sampled cost may be from the budget, as a share of the dense network's."""


def global_ranking(recorder: Recorder) -> None:
    """One threshold over all channels: the least important ones go, wherever they are.

    Network Slimming (Liu et al. 2017, section 3.2) with the criterion `bn_scale`; with
    others, global pruning as Torch-Pruning and Molchanov et al. 2019 do it. No group
    loses more than the search space allows, so none is cut off.
    """
    _by_threshold(recorder, lambda scores, saved: scores)


def cost_aware(recorder: Recorder) -> None:
    """One threshold over all channels for importance per cost saved, so that expensive
    layers go first.

    What a channel saves is counted in its own layer and in those that read it, next to
    the dense network, in the metric of the budget.
    """
    _by_threshold(recorder, lambda scores, saved: scores / saved)


def eagleeye(recorder: Recorder) -> None:
    """EagleEye's sampling (Li et al. 2020, section 3.2): shares drawn uniformly, kept
    where the cost is right.

    A share of each group's channels is drawn from [0, r]; an allocation counts if its
    cost is within half a percent of the dense network's of the budget. The paper gives
    an r for each of its budgets (0.7 for half of the MACs); here it is the one at which
    the mean cost is the budget. Use `--proxy.statistics calibration` for the paper's
    adaptive batch norm, which measures its statistics on other images than the score.
    """
    core, generator = recorder.env, np.random.default_rng(recorder.config.seed)
    target = core.target_of(core.budget.at(0.5))
    widest = _widest(core.space, target, generator)
    while recorder.remaining:
        sparsities = _sampled(core.space, target, widest, generator)
        n_lanes = min(LANES, recorder.remaining)
        recorder.run_episodes(fixed_policy(sparsities[:n_lanes]), n_lanes)


ONE_SHOT: dict[str, Callable[[Recorder], None]] = {
    "global": global_ranking,
    "cost_aware": cost_aware,
    "eagleeye": eagleeye,
}


def _by_threshold(
    recorder: Recorder, weigh: Callable[[np.ndarray, float], np.ndarray]
) -> None:
    core, space = recorder.env, recorder.env.space
    target = core.target_of(core.budget.at(0.5))
    importance = [
        core.proxy.importance[group.name].double().numpy() for group in core.groups
    ]
    dense = space.costs.dense
    savings = space.cost(dense) - space.cost(dense - np.eye(len(dense), dtype=np.int64))
    scores = [weigh(own, saved) for own, saved in zip(importance, savings, strict=True)]
    kept = _above(space, scores, target)
    recorder.run_episodes(fixed_policy(1 - kept[None] / dense), 1)


def _above(space: SearchSpace, scores: list[np.ndarray], target: int) -> np.ndarray:
    """How many channels of each group score above the lowest threshold that meets the
    budget, within its limits.
    """
    thresholds = np.unique(np.concatenate(scores))

    def kept(threshold: float) -> np.ndarray:
        above = np.array([(own > threshold).sum() for own in scores])
        return np.clip(above, space.low, space.high)

    low, high = -1, len(thresholds) - 1  # below all thresholds nothing goes
    if space.cost(kept(-np.inf)) <= target:
        return kept(-np.inf)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (
            (low, middle)
            if space.cost(kept(thresholds[middle])) <= target
            else (middle, high)
        )
    return kept(thresholds[high])


def _widest(space: SearchSpace, target: int, generator: np.random.Generator) -> float:
    """The largest share to draw at which allocations cost the target on average, as far
    as that can be.
    """
    units, low, high = generator.random((SHARES // 10, len(space.low))), 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        too_dear = (
            space.costs.continuous(space.metric, _kept(space, middle * units)).mean()
            > target
        )
        low, high = (middle, high) if too_dear else (low, middle)
    return high


def _sampled(
    space: SearchSpace, target: int, widest: float, generator: np.random.Generator
) -> np.ndarray:
    """Sparsities `(n, n_groups)`, at least as many as there are lanes, of allocations
    that cost the target.

    Where hardly any does, as in networks whose channels are few, the nearest of each
    draw are taken.
    """
    sparsities = widest * generator.random((SHARES, len(space.low)))
    distances = np.abs(
        space.costs.continuous(space.metric, _kept(space, sparsities)) - target
    )
    right = distances <= TOLERANCE * space.cost(space.costs.dense)
    return sparsities[
        right if right.sum() >= LANES else np.argsort(distances, kind="stable")[:LANES]
    ]


def _kept(space: SearchSpace, sparsities: np.ndarray) -> np.ndarray:
    wanted = np.rint(space.costs.dense * (1 - sparsities)).astype(np.int64)
    return np.clip(wanted, space.low, space.high)
