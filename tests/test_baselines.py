"""The baselines: the same door, the same evaluations, and the optimum where it is
known.
"""

import itertools
import sys

import numpy as np
import pytest
from toys import digits_env, fake_env, run_episode, target_env

from autoprune.agents.baselines import BASELINES
from autoprune.agents.recorder import Recorder
from autoprune.agents.searchers import DETERMINISTIC, check_agent, parse_baselines
from autoprune.config import SearchConfig
from autoprune.costs.budget import Budget
from autoprune.errors import UserError


def run(name: str, env, **config) -> list:
    """All episodes of a baseline."""
    recorder = Recorder(env, SearchConfig(agent=name, **config))
    BASELINES[name](recorder)
    return recorder.episodes


def counts(episode) -> list[int]:
    return list(episode.allocation.kept.values())


@pytest.mark.parametrize("agent", ["dyna", "sac", "random", "evolution", "eagleeye"])
def test_a_search_is_held_against_the_usual_baselines_unless_others_are_named(agent):
    assert parse_baselines(None, agent) == ["uniform", "random", "sensitivity"]
    assert parse_baselines("uniform, tpe", agent) == ["uniform", "tpe"]
    assert parse_baselines("none", agent) == []


@pytest.mark.parametrize("agent", DETERMINISTIC)
def test_what_decides_at_once_waits_for_no_search_unless_it_is_asked_for(agent):
    assert parse_baselines(None, agent) == []
    assert parse_baselines("random", agent) == ["random"]


def additive(network: str, weights, budget: str = "macs=50%"):
    """An environment whose loss is a sum over groups, each quadratic in the share
    removed.
    """
    dense = fake_env(network).space.costs.dense
    return fake_env(
        network,
        lambda kept: float((weights * (1 - kept / dense) ** 2).sum()),
        budget=budget,
    )


def best_of_all(env) -> float:
    """Brute force: the lowest loss of any allocation within the budget."""
    losses = []
    for kept in itertools.product(*env.space.levels):
        if env.space.cost(np.array(kept)) <= env.target:
            losses.append(env.proxy.loss_of(np.array(kept)))
    return min(losses)


def test_uniform_is_one_evaluation_of_the_uniform_allocation():
    env = fake_env("wide")
    (episode,) = run("uniform", env, episodes=50)
    assert env.proxy.evaluations == 1
    assert counts(episode) == env.space.uniform(env.target).tolist()


def test_random_is_reproducible_by_seed():
    first, again, other = (
        run("random", fake_env("wide"), episodes=8, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again
    assert [counts(e) for e in first] != [counts(e) for e in other]


def test_random_walks_as_many_different_episodes_as_asked_within_the_budget():
    env = fake_env("wide")
    episodes = run("random", env, episodes=30)
    assert len(episodes) == 30
    assert 25 <= env.proxy.evaluations <= 30
    assert all(
        env.space.cost(np.array(counts(episode))) <= env.target for episode in episodes
    )


@pytest.mark.parametrize("weights", [(20, 1, 1, 5), (1, 30, 0.1, 1), (0.1, 1, 10, 30)])
@pytest.mark.parametrize("budget", ["macs=35%", "macs=50%", "params=60%"])
def test_sensitivity_comes_close_to_the_optimum_of_an_additive_damage(weights, budget):
    env = additive("chain", np.array(weights), budget)
    losses = [
        episode.evaluation.loss for episode in run("sensitivity", env, episodes=100)
    ]
    plain, best = run_episode(env, lambda _: 0.0)["loss"], best_of_all(env)
    # Damages add up here but costs don't: what is saved in one group depends on its
    # neighbours.
    assert best <= losses[0] < plain - 0.65 * (plain - best)


def test_sensitivity_finds_the_optimum_itself_where_costs_nearly_add_up():
    for weights in ((1, 1, 1, 1), (20, 1, 1, 5)):
        env = additive("chain", np.array(weights))
        assert min(
            e.evaluation.loss for e in run("sensitivity", env, episodes=100)
        ) == pytest.approx(best_of_all(env))


@pytest.mark.parametrize("network", ["chain", "wide", "resnet20"])
@pytest.mark.parametrize("episodes", [1, 2, 5, 6, 7, 8, 12, 23, 50, 300])
def test_sensitivity_stays_within_the_evaluations(network, episodes):
    env = additive(network, np.linspace(1, 5, len(fake_env(network).groups)))
    walked = run("sensitivity", env, episodes=episodes)
    assert env.proxy.evaluations <= episodes
    assert all(
        env.space.cost(np.array(counts(episode))) <= env.target for episode in walked
    )
    assert walked


@pytest.mark.parametrize("budget", ["macs=100%", "macs=99G", "params=100%"])
def test_sensitivity_prunes_nothing_if_everything_fits(budget):
    env = additive("chain", np.ones(4), budget)
    assert (
        counts(run("sensitivity", env, episodes=50)[0])
        == env.space.costs.dense.tolist()
    )


def test_sensitivity_meets_the_smallest_reachable_budget():
    env = additive("chain", np.ones(4))
    env = additive("chain", np.ones(4), f"macs={env.space.cost(env.space.low)}")
    assert counts(run("sensitivity", env, episodes=50)[0]) == env.space.low.tolist()


def test_sensitivity_beats_uniform_on_a_trained_network():
    env = digits_env("macs=40%")
    losses = [
        episode.evaluation.loss for episode in run("sensitivity", env, episodes=40)
    ]
    assert min(losses) < run_episode(env, lambda _: 0.0)["loss"]


@pytest.mark.parametrize("name", list(BASELINES))
@pytest.mark.parametrize("network", ["one", "wide"])
@pytest.mark.parametrize("episodes", [1, 9, 13])
def test_every_baseline_walks_at_most_the_asked_episodes_on_any_network(
    name, network, episodes
):
    env = target_env(network)
    walked = run(name, env, episodes=episodes)
    walks_once = {"uniform": 1, "global": 1, "cost_aware": 1}
    assert len(walked) == walks_once.get(name, episodes) or (
        name == "sensitivity" and 1 <= len(walked) <= 2
    )
    assert [episode.number for episode in walked] == list(range(1, len(walked) + 1))
    assert all(
        env.space.cost(np.array(counts(episode))) <= env.target for episode in walked
    )


@pytest.mark.parametrize("name", ["evolution", "tpe"])
def test_model_based_baselines_are_reproducible_by_seed_and_come_close_to_a_known_optimum(
    name,
):
    first, again, other = (
        run(name, target_env(), episodes=60, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again
    assert [counts(e) for e in first] != [counts(e) for e in other]
    uniform = run_episode(target_env(), lambda _: 0.0)["loss"]
    assert min(episode.evaluation.loss for episode in first) < 0.3 * uniform


@pytest.mark.parametrize(("name", "package"), [("evolution", "cma"), ("tpe", "optuna")])
def test_a_missing_package_is_named_with_the_way_to_install_it(
    name, package, monkeypatch
):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        UserError,
        match=f"^baselines: {name} needs {package}; install it with: pip install",
    ):
        parse_baselines(f"uniform,{name}", "dyna")
    with pytest.raises(
        UserError,
        match=f"^agent: {name} needs {package}; install it with: pip install",
    ):
        check_agent(name, Budget.parse("macs=50%"))
    with pytest.raises(UserError) as error:
        run(name, fake_env(), episodes=5)
    assert (
        str(error.value)
        == f"agent: {name} needs {package}; install it with: pip install {package}"
    )
