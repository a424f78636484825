"""Global ranking cuts by one threshold, cost-aware ranking where it pays; EagleEye's
shares cost what they should.
"""

import numpy as np
import pytest
import torch
from toys import fake_env

from autoprune.agents.baselines import BASELINES
from autoprune.agents.rankings import TOLERANCE, _counts, _max_share, _sample
from autoprune.agents.recorder import Recorder
from autoprune.config import SearchConfig

BUDGETS = ["macs=35%", "macs=60%", "params=50%"]


def ranked_env(budget: str, scale: float = 1.0, **options):
    """An environment whose channels have known, different importance."""
    env = fake_env("wide", budget=budget, round_to=1, **options)
    generator = torch.Generator().manual_seed(3)
    scores = {
        g.name: scale * torch.rand(g.channels, generator=generator) * (1 + n)
        for n, g in enumerate(env.groups)
    }
    env.proxy.importance = scores
    return env, [scores[group.name].double().numpy() for group in env.groups]


def walked(name: str, env, **config) -> list[np.ndarray]:
    recorder = Recorder(env, SearchConfig(agent=name, **config))
    BASELINES[name](recorder)
    return [
        np.array(list(episode.allocation.kept.values()))
        for episode in recorder.episodes
    ]


def saved_by_one_channel(env) -> list[int]:
    dense = env.space.costs.dense
    return [
        env.space.cost(dense) - env.space.cost(dense - np.eye(len(dense), dtype=int)[n])
        for n in range(len(dense))
    ]


def weighed(name: str, env, scores: list[np.ndarray]) -> list[np.ndarray]:
    saved = saved_by_one_channel(env) if name == "cost_aware" else [1] * len(scores)
    return [own / by for own, by in zip(scores, saved, strict=True)]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", ["global", "cost_aware"])
def test_what_is_kept_outranks_what_goes_but_for_the_limits_and_the_rest_of_the_budget(
    name, budget
):
    env, scores = ranked_env(budget)
    (kept,) = walked(name, env)
    values = [np.sort(own)[::-1] for own in weighed(name, env, scores)]
    # What filling up added is taken back: the cheapest kept channels of the groups that
    # could lose one.
    below = max(
        own[count] for own, count in zip(values, kept, strict=True) if count < len(own)
    )
    above = [
        own[count - 1]
        for own, count, low in zip(values, kept, env.space.low, strict=True)
        if count > low
    ]
    assert env.space.cost(kept) <= env.target
    assert sum(score < below for score in above) <= 1


@pytest.mark.parametrize("name", ["global", "cost_aware"])
def test_only_the_order_of_scores_counts(name):
    (first,), (again,) = (
        walked(name, ranked_env("macs=50%", scale)[0]) for scale in (1.0, 1000.0)
    )
    assert first.tolist() == again.tolist()


def test_cost_aware_ranking_cuts_more_where_a_channel_saves_more():
    env, _ = ranked_env("macs=50%")
    env.proxy.importance = {
        group.name: torch.linspace(0.5, 1.5, group.channels) for group in env.groups
    }
    (kept,) = walked("cost_aware", env)
    share = kept / env.space.costs.dense
    saved = saved_by_one_channel(env)
    dearest, cheapest = int(np.argmax(saved)), int(np.argmin(saved))
    (plain,) = walked("global", env)
    assert (
        share[dearest]
        < plain[dearest] / env.space.costs.dense[dearest]
        <= share[cheapest]
    )


@pytest.mark.parametrize("name", ["global", "cost_aware"])
def test_nothing_goes_where_everything_fits(name):
    env, _ = ranked_env("macs=100%")
    assert walked(name, env)[0].tolist() == env.space.costs.dense.tolist()


@pytest.mark.parametrize("budget", ["macs=35%", "macs=50%", "macs=75%"])
def test_eagleeyes_shares_cost_half_a_percent_around_the_budget_before_they_are_filled_up(
    budget,
):
    env = fake_env("wide", budget=budget)
    generator = np.random.default_rng(0)
    max_share = _max_share(env.space, env.target, generator)
    sparsities = _sample(env.space, env.target, max_share, generator)
    off = np.abs(
        env.space.cost(_counts(env.space, sparsities)) - env.target
    ) / env.space.cost(env.space.costs.dense)
    assert off.max() <= TOLERANCE
    assert len(sparsities) > 100
    assert sparsities.max() <= max_share
    assert sparsities.min() >= 0
    assert (
        sparsities.max(0).min() > 0.8 * max_share
    )  # every group is cut deeply in some of them


def test_eagleeye_walks_different_allocations_reproducibly():
    first, again, other = (
        walked("eagleeye", fake_env("wide"), episodes=20, seed=seed)
        for seed in (1, 1, 2)
    )
    assert [kept.tolist() for kept in first] == [kept.tolist() for kept in again]
    assert [kept.tolist() for kept in first] != [kept.tolist() for kept in other]
    assert len({tuple(kept) for kept in first}) > 15
