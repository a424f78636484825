"""The observation: bounded, of the group that the next action is for, and documented as it is."""

from math import log2
from pathlib import Path

import numpy as np
import pytest
from toys import fake_env

from envs.observation import FEATURES, OBSERVATION_SPACE, Observer, feature_table

INDEX = {feature.name: index for index, feature in enumerate(FEATURES)}
NETWORKS = ("chain", "wide", "resnet20", "mobilenet_v2_cifar")
DOCS = Path(__file__).parents[1] / "docs" / "environment.md"


def observations(env, action) -> np.ndarray:
    """Every observation of an episode that precedes an action, `(n_groups, n_features)`."""
    rows = [env.reset()[0]]
    for position in range(len(env.groups)):
        rows.append(env.step(np.array([action(position)]))[0])
    return np.array(rows[:-1])


def test_feature_names_are_unique_and_fill_the_space():
    assert len(INDEX) == len(FEATURES) == OBSERVATION_SPACE.shape[0] == 20


@pytest.mark.parametrize("network", NETWORKS)
def test_observation_describes_the_group_that_the_next_action_is_for(network):
    env = fake_env(network)
    rows = observations(env, lambda _: 0.1)
    channels = [log2(1 + group.channels) / 13 for group in env.groups]
    assert rows[:, INDEX["channels"]] == pytest.approx(channels, abs=1e-6)
    assert rows[:, INDEX["macs_share"]] == pytest.approx([group.macs_share for group in env.groups], abs=1e-6)
    assert rows[:, INDEX["position"]] == pytest.approx(np.arange(len(channels)) / len(channels), abs=1e-6)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("budget", ["macs=30%", "params=80%", "macs=99G"])
def test_observations_stay_within_the_bounds_without_being_clipped(network, budget):
    env = fake_env(network, budget=budget)
    generator = np.random.default_rng(0)
    for _ in range(5):
        rows = observations(env, lambda _: generator.uniform(-1, 1))
        assert np.isfinite(rows).all()
        assert all(OBSERVATION_SPACE.contains(row) for row in rows)
        state, clipped = env._state, {"budget"} if budget == "macs=99G" else set()
        state = type(state)(0, env.space.costs.dense, env.target, state.bounds, state.uniform_to_go, state.previous)
        for feature in FEATURES:
            if feature.name not in clipped:
                assert 0 <= feature.value(env.observer, state) <= 1, feature.name


def test_bounds_and_uniform_to_go_are_those_of_the_next_action():
    env = fake_env("wide")
    observation, _ = env.reset()
    for position in range(5):
        low, high = env.bounds
        assert observation[INDEX["lowest"]] == pytest.approx(low, abs=1e-6)
        assert observation[INDEX["highest"]] == pytest.approx(high, abs=1e-6)
        assert env.action_of(observation[INDEX["uniform_to_go"]]) == pytest.approx(0, abs=1e-5)
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
    kept[:2] = np.round((1 - np.array([info["sparsity"], second["sparsity"]])) * dense[:2])
    smallest = np.concatenate([kept[:2], env.space.low[2:]])
    cost = env.space.cost
    assert observation[INDEX["reduced"]] == pytest.approx(1 - cost(kept) / cost(dense), abs=1e-6)
    assert observation[INDEX["rest"]] == pytest.approx((cost(kept) - cost(smallest)) / cost(dense), abs=1e-6)


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
            layer.kind == "depthwise" and layer.tensor in {m.tensor for m in group.members}
            for layer in env.groups.layers
        )
        for group in env.groups
    ]
    assert any(marked) and not all(marked)
    assert rows[:, INDEX["has_depthwise"]].tolist() == marked


def test_weak_half_tells_equal_channels_from_unequal_ones():
    env = fake_env("wide")
    equal = {name: scores * 0 + 1 for name, scores in env.proxy.importance.items()}
    steep = {name: scores.argsort().float() ** 4 for name, scores in env.proxy.importance.items()}
    values = [Observer(env.groups, env.space, scores).static[0]["weak_half"] for scores in (equal, steep)]
    assert values[0] == pytest.approx(1)
    assert values[1] < 0.1


def test_documented_table_is_that_of_the_code():
    assert feature_table() in DOCS.read_text(), "paste envs.observation.feature_table() into docs/environment.md"
