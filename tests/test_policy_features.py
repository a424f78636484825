"""Policies that know fewer features than there are: those saved before latency was
observed, and those of networks whose latency nobody predicts.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.torch import load_file
from toys import (
    costs_with_latency,
    fake_env,
    learner_of,
    some_policy,
    traced,
)

from autoprune.agents.algorithms import ALGORITHMS
from autoprune.agents.policy_files import shipped_policies
from autoprune.agents.replay import Policy, replay
from autoprune.agents.search import search
from autoprune.config import SearchConfig
from autoprune.envs.observation import FEATURE_NAMES, STATIC
from autoprune.errors import UserError

KNOWN_BEFORE = [name for name in FEATURE_NAMES if name != "latency_share"]


def observations(n_features: int = len(FEATURE_NAMES)) -> np.ndarray:
    """Random ones, the latency's share among them."""
    return np.random.default_rng(0).random((50, n_features), dtype=np.float32)


def latency_env(**options):
    costs = costs_with_latency("chain")
    return fake_env(costs=costs, **({"budget": "latency=70%"} | options))


@pytest.mark.parametrize("name", list(shipped_policies()))
def test_shipped_policies_act_as_the_networks_in_their_files_whatever_time_it_takes(
    name,
):
    folder = shipped_policies()[name]
    policy = Policy.load(folder)
    assert policy.inputs == KNOWN_BEFORE
    weights = load_file(folder / "policy.safetensors")
    state = policy.network.state_dict()
    assert {key: value.tolist() for key, value in state.items()} == {
        key: value.tolist() for key, value in weights.items()
    }
    everything = observations()
    before = np.ascontiguousarray(everything[:, : len(KNOWN_BEFORE)])
    direct, _ = policy.network.predict(before, deterministic=True)
    assert np.array_equal(policy.act(everything), direct)
    assert np.array_equal(policy.act(before), direct)
    assert np.array_equal(policy.act(everything[3]), policy.act(before[3]))
    other = everything.copy()
    other[:, -1] = 0
    assert np.array_equal(policy.act(other), policy.act(everything))
    # What it never saw makes no group strange to it.
    features = policy.group_features
    assert features.shape[1] == len(STATIC)
    assert (features[:, STATIC.index("latency_share")] == 0).all()


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name != "dyna"])
def test_a_learner_that_sees_time_begins_as_the_policy_that_does_not(name):
    start = some_policy(name)
    assert start.inputs == KNOWN_BEFORE
    learner = learner_of(name, start, latency_env())
    assert learner.observation_space.shape == (len(FEATURE_NAMES),)
    everything = observations()
    taken = Policy(name, learner.policy, start.policy_kwargs)
    assert taken.inputs == FEATURE_NAMES
    assert taken.act(everything) == pytest.approx(start.act(everything), abs=1e-6)
    other = everything.copy()
    other[:, -1] = 0
    assert np.array_equal(taken.act(other), taken.act(everything))
    # Critics too: none of their weights on it isn't 0, and all others are the policy's.
    given = start.network.state_dict()
    for key, value in learner.policy.state_dict().items():
        # PPO begins with a critic and a spread of its own.
        if value.shape == given[key].shape or (name == "ppo" and "value_net" in key):
            continue
        n = len(KNOWN_BEFORE)
        assert (value[:, n] == 0).all()
        assert (value[:, :n] == given[key][:, :n]).all()
        assert (value[:, n + 1 :] == given[key][:, n:]).all()


def test_learners_of_networks_without_predicted_latency_see_what_they_always_did():
    env = fake_env()
    assert env.observer.static["latency_share"].tolist() == [0] * len(env.groups)
    assert learner_of("ppo").observation_space.shape == (len(KNOWN_BEFORE),)
    batch = env.start_episodes([env.budget] * 3)
    seen = env.observer.seen(batch.observe())
    assert seen.flags.c_contiguous
    assert np.array_equal(seen, batch.observe()[:, :-1])
    assert env.observation_space.contains(batch.observe()[0])


def test_policies_that_see_time_are_saved_with_it_and_serve_networks_without(tmp_path):
    env = latency_env()
    result = search(env, SearchConfig(agent="ppo", episodes=20))
    result.policy.save(tmp_path)
    told = json.loads((tmp_path / "policy.json").read_text())
    assert told["features"] == FEATURE_NAMES
    assert told["kinds"]["latency_share"] == pytest.approx(
        env.observer.static["latency_share"]
    )
    loaded = Policy.load(tmp_path)
    assert np.array_equal(loaded.act(observations()), result.policy.act(observations()))
    assert np.array_equal(loaded.group_features, result.policy.group_features)
    allocation, info = replay(loaded, fake_env(budget="macs=50%"))
    assert info["costs"]["macs"] == info["macs"] <= info["target"]
    assert allocation.kept
    # A learner that doesn't see it begins as the policy acts where it is 0.
    learner = learner_of("ppo", loaded, fake_env())
    before = observations(len(KNOWN_BEFORE))
    padded = np.column_stack([before, np.zeros(len(before), np.float32)])
    taken = Policy("ppo", learner.policy, loaded.policy_kwargs)
    assert taken.act(before) == pytest.approx(loaded.act(padded), abs=1e-6)


def test_the_latency_share_is_what_the_latency_falls_by_next_to_the_mean_group():
    env = latency_env()
    latency = env.space.costs.metrics["latency"]
    dense = env.space.costs.dense
    saved = []
    for index in range(len(dense)):
        alone = dense.copy()
        alone[index] = env.space.levels[index][0]
        saved.append(latency(dense) - latency(alone))
    units = np.array(saved) / np.mean(saved)
    assert env.observer.static["latency_share"] == pytest.approx(units / (1 + units))
    observation, _ = env.reset()
    assert observation[-1] == pytest.approx(units[0] / (1 + units[0]))
    # Under another budget too, where the costs know the time.
    other = latency_env(budget="macs=50%")
    assert other.reset()[0][-1] == observation[-1]


def test_a_policy_knows_its_groups_again_where_time_is_observed():
    env, timed = fake_env(), latency_env(budget="macs=50%")
    policy = replace(some_policy(), group_features=env.observer.group_features)
    assert policy.similarity(timed.observer).tolist() == [1] * len(env.groups)
    seeing = replace(
        some_policy(),
        group_features=timed.observer.group_features,
        features=tuple(FEATURE_NAMES),
    )
    assert (seeing.similarity(env.observer) < 1).any()


@pytest.mark.parametrize(
    "features",
    [
        [*KNOWN_BEFORE[::-1]],
        [*KNOWN_BEFORE, "colour"],
        [*KNOWN_BEFORE, "position"],
        [],
        "position",
    ],
)
def test_features_that_there_are_not_or_in_another_order_are_refused(
    features, tmp_path
):
    some_policy().save(tmp_path)
    told = json.loads((tmp_path / "policy.json").read_text())
    (tmp_path / "policy.json").write_text(json.dumps(told | {"features": features}))
    with pytest.raises(UserError, match="was trained on other observations"):
        Policy.load(tmp_path)


def test_an_agent_and_baselines_search_under_several_budgets():
    _, groups, _ = traced("chain")
    budget = "macs=60%,latency=70%,size=80%"
    for agent in ("dyna", "uniform", "cost_aware", "global", "eagleeye", "sensitivity"):
        env = latency_env(budget=budget)
        result = search(env, SearchConfig(agent=agent, episodes=20))
        kept = result.best.allocation.kept
        assert result.best.allocation.budget == budget
        counts = np.array([kept[group.name] for group in groups])
        for part in env.budget.parts:
            cost = env.space.costs.metrics[part.metric](counts)
            assert cost <= part.target(env.space.costs)
