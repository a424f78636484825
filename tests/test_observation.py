"""The observation: bounded, of the group that the next action is for, and documented as
it is.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from toys import fake_env

from autoprune.costs.budget import Budget
from autoprune.envs.observation import (
    FEATURES,
    OBSERVATION_SPACE,
    Observer,
    feature_table,
)

INDEX = {feature.name: index for index, feature in enumerate(FEATURES)}
NETWORKS = ("chain", "wide", "resnet20", "mobilenet_v2_cifar")
DOCS = Path(__file__).parents[1] / "docs" / "reference" / "environment.md"


def observations(env, action) -> np.ndarray:
    """Every observation of an episode that precedes an action, `(n_groups,
    n_features)`.
    """
    rows = [env.reset()[0]]
    for position in range(len(env.groups)):
        rows.append(env.step(np.array([action(position)]))[0])
    return np.array(rows[:-1])


def test_feature_names_are_unique_and_fill_the_space():
    assert len(INDEX) == len(FEATURES) == OBSERVATION_SPACE.shape[0] == 22


@pytest.mark.parametrize("network", NETWORKS)
def test_observation_describes_the_group_that_the_next_action_is_for(network):
    env = fake_env(network)
    rows = observations(env, lambda _: 0.1)
    widths = np.array([group.channels for group in env.groups])
    macs = np.array([group.macs_share for group in env.groups])
    assert rows[:, INDEX["width"]] == pytest.approx(widths / max(widths), abs=1e-6)
    assert rows[:, INDEX["macs_share"]] == pytest.approx(
        macs / (macs + macs.mean()), abs=1e-6
    )
    assert rows[:, INDEX["position"]] == pytest.approx(
        np.arange(len(widths)) / len(widths), abs=1e-6
    )


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("budget", ["macs=30%", "params=80%", "macs=99G"])
def test_observations_stay_within_the_bounds_without_being_clipped(network, budget):
    env = fake_env(network, budget=budget)
    generator = np.random.default_rng(0)
    for _ in range(5):
        rows = observations(env, lambda _: generator.uniform(-1, 1))
        assert np.isfinite(rows).all()
        assert all(OBSERVATION_SPACE.contains(row) for row in rows)
        env.reset()
        for _ in env.groups:
            for feature in FEATURES:
                if feature.name != "budget" or budget != "macs=99G":
                    assert 0 <= feature.value(env.observer, env.episode.state) <= 1, (
                        feature.name
                    )
            env.step(np.array([generator.uniform(-1, 1)]))


def test_bounds_and_uniform_to_go_are_those_of_the_next_action():
    env = fake_env("wide")
    observation, _ = env.reset()
    for position in range(5):
        low, high = env.bounds
        assert observation[INDEX["lowest"]] == pytest.approx(low, abs=1e-6)
        assert observation[INDEX["highest"]] == pytest.approx(high, abs=1e-6)
        assert env.action_of(observation[INDEX["uniform_to_go"]]) == pytest.approx(
            0, abs=1e-5
        )
        observation, *_, info = env.step(np.array([0.2 if position % 2 else -0.2]))
        if position < 4:
            assert observation[INDEX["previous"]] == pytest.approx(info["sparsity"])


def test_reduced_and_rest_are_costs_of_real_allocations():
    env = fake_env("wide")
    dense = env.space.costs.dense
    env.reset()
    _, *_, info = env.step(np.array([0.2]))
    observation, *_, second = env.step(np.array([-0.1]))
    kept = dense.copy()
    kept[:2] = np.round(
        (1 - np.array([info["sparsity"], second["sparsity"]])) * dense[:2]
    )
    smallest = np.concatenate([kept[:2], env.space.low[2:]])
    cost = env.space.cost
    assert observation[INDEX["reduced"]] == pytest.approx(
        1 - cost(kept) / cost(dense), abs=1e-6
    )
    assert observation[INDEX["rest"]] == pytest.approx(
        (cost(kept) - cost(smallest)) / cost(dense), abs=1e-6
    )


def test_budget_and_its_metric_are_observed():
    for budget, share, is_params in (("macs=40%", 0.4, 0), ("params=70%", 0.7, 1)):
        observation, _ = fake_env("wide", budget=budget).reset()
        assert observation[INDEX["budget"]] == pytest.approx(share, abs=1e-3)
        assert observation[INDEX["is_params"]] == is_params


def test_depthwise_groups_are_marked():
    env = fake_env("mobilenet_v2_cifar")
    rows = observations(env, lambda _: 0.0)
    marked = [
        any(
            layer.kind == "depthwise"
            and layer.tensor in {m.tensor for m in group.members}
            for layer in env.groups.layers
        )
        for group in env.groups
    ]
    assert any(marked)
    assert not all(marked)
    assert rows[:, INDEX["has_depthwise"]].tolist() == marked


def test_weak_half_tells_equal_channels_from_unequal_ones():
    env = fake_env("wide")
    equal = {name: scores * 0 + 1 for name, scores in env.proxy.importance.items()}
    steep = {
        name: scores.argsort().float() ** 4
        for name, scores in env.proxy.importance.items()
    }
    values = [
        observed(env, "weak_half", importance=scores) for scores in (equal, steep)
    ]
    assert values[0] == pytest.approx(1)
    assert (values[1] < 0.1).all()


def observed(env, feature: str, **measured) -> np.ndarray:
    """A feature `(n_groups,)` if the proxy measured something else."""
    proxy = SimpleNamespace(
        **{"importance": env.proxy.importance, "sensitivity": env.proxy.sensitivity}
        | measured
    )
    return Observer(env.groups, env.space, proxy).static[feature]


def test_sensitivity_is_told_relative_to_the_mean_and_by_rank():
    env, damage = fake_env("wide"), np.array([0.3, 0.0, 0.1, 0.5, 0.1])
    assert observed(env, "sensitivity", sensitivity=damage) == pytest.approx(
        [0.6, 0, 1 / 3, 5 / 7, 1 / 3]
    )
    # Of equals the earlier one comes first.
    assert observed(env, "sensitivity_rank", sensitivity=damage).tolist() == [
        0.75,
        0,
        0.25,
        1,
        0.5,
    ]
    ahead = np.array([0.175, 0.7 / 3, 0.3, 0.1, 0.1]) / 0.2
    assert observed(env, "sensitivity_ahead", sensitivity=damage) == pytest.approx(
        ahead / (1 + ahead)
    )


def test_damage_rank_orders_the_groups_by_damage_for_the_cost_that_half_of_each_saves():
    env, dense = fake_env("wide"), fake_env("wide").space.costs.dense
    saved = []
    for index in range(5):
        halved = dense.copy()
        halved[index] -= dense[index] // 2
        saved.append(env.space.cost(dense) - env.space.cost(halved))
    saved = np.array(saved)
    rank = observed(env, "damage_rank", sensitivity=saved * np.array([3, 1, 5, 2, 4]))
    assert rank.tolist() == [0.5, 0, 1, 0.25, 0.75]


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_the_unit_of_damage_does_not_matter_and_no_damage_at_all_is_bearable(factor):
    env = fake_env("wide")
    for feature in (
        "sensitivity",
        "sensitivity_rank",
        "damage_rank",
        "sensitivity_ahead",
    ):
        as_is, scaled = (
            observed(env, feature, sensitivity=env.proxy.sensitivity * by)
            for by in (1, factor)
        )
        assert scaled == pytest.approx(as_is)
        assert np.isfinite(observed(env, feature, sensitivity=np.zeros(5))).all()


def test_sensitivity_is_measured_no_earlier_than_for_the_first_observation():
    env = fake_env()
    observer = Observer(
        env.groups, env.space, SimpleNamespace(importance=env.proxy.importance)
    )
    with pytest.raises(AttributeError, match="sensitivity"):
        observer.observe(env.episode.state)


def test_lanes_are_observed_as_each_would_be_alone():
    env, generator = fake_env("resnet20"), np.random.default_rng(0)
    budgets = [Budget("macs", share) for share in np.linspace(0.3, 0.8, 6).tolist()]
    together, alone = (
        env.start_episodes(budgets),
        [env.start_episodes([budget]) for budget in budgets],
    )
    for _ in env.groups:
        actions = generator.uniform(-1, 1, 6)
        assert np.array_equal(
            together.observe(),
            np.concatenate([run_episode.observe() for run_episode in alone]),
        )
        together.step(actions)
        for run_episode, action in zip(alone, actions, strict=True):
            run_episode.step(np.array([action]))


def test_documented_table_is_that_of_the_code():
    assert feature_table() in DOCS.read_text(), (
        "paste autoprune.envs.observation.feature_table() into docs/reference/environment.md"
    )
