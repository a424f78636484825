"""Policies as files: they act the same after loading, execute no code, and serve other
budgets and networks.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import (
    FakeProxy,
    chain,
    fake_env,
    fake_proxy,
    some_policy,
    target_env,
    traced,
)

from autoprune.agents.policy_files import describe_policy, shipped_policies
from autoprune.agents.recorder import Recorder
from autoprune.agents.replay import Home, Policy, replay
from autoprune.agents.sb3_env import RecordedVecEnv
from autoprune.agents.training import ALGORITHMS, make_learner, policy_of
from autoprune.config import SearchConfig
from autoprune.envs.layer_pruning import LayerPruningEnv
from autoprune.envs.observation import FEATURES, Observer
from autoprune.errors import UserError


@pytest.fixture
def saved(tmp_path):
    some_policy().save(tmp_path, budget="macs=50%")
    return tmp_path


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_loaded_policy_acts_identically(name, tmp_path):
    policy = some_policy(name)
    policy.save(tmp_path)
    loaded = Policy.load(tmp_path)
    assert loaded.algorithm == name
    observations = np.random.default_rng(0).random(
        (50, len(FEATURES)), dtype=np.float32
    )
    actions = [policy.act(observation) for observation in observations]
    assert np.ptp(actions) > 0.05
    for observation, action in zip(observations, actions, strict=True):
        assert action.shape == (1,)
        assert -1 <= action[0] <= 1
        assert np.array_equal(loaded.act(observation), action)


def test_a_policy_acts_at_the_middle_of_a_range_unless_told_otherwise_and_always_the_same():
    env, policy = fake_env(budget="macs=30%..80%"), some_policy()
    first, again, asked = (
        replay(policy, env),
        replay(policy, env),
        replay(policy, env, "macs=55%"),
    )
    assert first == again == asked
    assert first[0].budget == "macs=55%"
    with pytest.raises(UserError, match=r"budget: '30%..40%' is no number"):
        replay(policy, env, "macs=30%..40%")


def test_what_is_known_of_groups_is_kept_by_name(tmp_path):
    env = target_env("wide")
    policy = replace(some_policy(), group_features=env.observer.group_features)
    policy.save(tmp_path)
    stored = json.loads((tmp_path / "policy.json").read_text())["kinds"]
    assert stored == {name: env.observer.static[name].tolist() for name in stored}
    assert len(stored) == 12
    assert np.array_equal(
        Policy.load(tmp_path).group_features, env.observer.group_features
    )


def test_saved_policy_is_json_and_safetensors_only(saved, monkeypatch):
    assert sorted(path.name for path in saved.iterdir()) == [
        "policy.json",
        "policy.safetensors",
    ]
    assert json.loads((saved / "policy.json").read_text())["features"] == [
        feature.name for feature in FEATURES if feature.name != "latency_share"
    ]
    assert load_file(saved / "policy.safetensors")

    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    monkeypatch.setattr("pickle.load", refuse)
    monkeypatch.setattr("pickle.loads", refuse)
    monkeypatch.setattr("pickle.Unpickler", refuse)
    monkeypatch.setattr("torch.load", refuse)
    Policy.load(saved)


def test_what_is_said_about_a_policy_is_stored_beside_it(saved):
    assert describe_policy(saved)["budget"] == "macs=50%"


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_replay_reproduces_the_policys_allocation_exactly(name, tmp_path):
    policy = some_policy(name)
    policy.save(tmp_path)
    first, info = replay(policy, target_env("wide"))
    second, again = replay(Policy.load(tmp_path), target_env("wide"))
    assert first == second
    assert (info["macs"], info["loss"]) == (again["macs"], again["loss"])


@pytest.mark.parametrize("network", ["chain", "wide", "resnet20", "mobilenet_v2_cifar"])
@pytest.mark.parametrize("budget", ["macs=30%", "macs=75%"])
def test_replay_meets_another_budget_on_another_network(saved, network, budget):
    env = fake_env(network)
    allocation, info = replay(Policy.load(saved), env, budget)
    share = float(budget[5:7]) / 100
    assert (
        info["cost"]
        <= info["target"]
        == int(env.space.cost(env.space.high) * share + 1e-9)
    )
    allocation.check(env.groups)
    assert env.space.cost(np.array(list(allocation.kept.values()))) == info["cost"]
    assert env.space.fill(
        np.array(list(allocation.kept.values())), env.target
    ).tolist() == list(allocation.kept.values())


def test_replay_for_another_metric_is_refused(saved):
    with pytest.raises(UserError, match=r"budgets macs, got params"):
        replay(Policy.load(saved), fake_env(), "params=50%")


def test_missing_policy_says_how_to_get_one(tmp_path):
    advice = "baselines learn none, search with agent dyna or ppo or sac"
    with pytest.raises(UserError, match=rf"no policy in '.*'; {advice}"):
        Policy.load(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null", '{"features": 3'])
def test_damaged_description_is_refused_in_one_line(saved, content):
    (saved / "policy.json").write_text(content)
    with pytest.raises(
        UserError, match=r"policy\.json' is damaged \(.*\); search anew"
    ) as caught:
        Policy.load(saved)
    assert "\n" not in str(caught.value)


def test_policy_for_other_observations_is_refused(saved):
    description = describe_policy(saved)
    description["features"] = description["features"][::-1]
    (saved / "policy.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match="was trained on other observations"):
        Policy.load(saved)


@pytest.mark.parametrize(
    "damage", ["missing", "cut", "empty", "pickle", "other shape", "dqn", "no kwargs"]
)
def test_damaged_policy_is_refused_in_one_line(saved, damage):
    weights, description = saved / "policy.safetensors", describe_policy(saved)
    if damage == "missing":
        weights.unlink()
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:500])
    elif damage == "empty":
        weights.write_bytes(b"")
    elif damage == "pickle":
        torch.save({"log_std": torch.zeros(1)}, weights)
    elif damage == "other shape":
        save_file(
            {name: tensor[:1] for name, tensor in load_file(weights).items()}, weights
        )
    elif damage == "dqn":
        (saved / "policy.json").write_text(
            json.dumps(description | {"algorithm": "dqn"})
        )
    else:
        del description["policy_kwargs"]
        (saved / "policy.json").write_text(json.dumps(description))
    with pytest.raises(
        UserError, match=r"run: the policy in '.*' is damaged \(.*\); search anew"
    ) as caught:
        Policy.load(saved)
    assert "\n" not in str(caught.value)


def scored_otherwise(name: str, seed: int, **options) -> LayerPruningEnv:
    """An environment of a network whose channels and groups are judged otherwise."""
    model, groups, _ = traced(name)
    generator = torch.Generator().manual_seed(seed)
    proxy = ScoredOtherwise(groups, fake_proxy(name).example, lambda kept: 1.0)
    for group in groups:
        proxy.importance[group.name] = torch.rand(group.channels, generator=generator)
    proxy.damage = torch.rand(len(groups), generator=generator).numpy()
    return LayerPruningEnv(model, groups, proxy, round_to=2, **options)


class ScoredOtherwise(FakeProxy):
    damage: np.ndarray

    @property
    def sensitivity(self) -> np.ndarray:
        return self.damage


def trained_on(env: LayerPruningEnv) -> Policy:
    """A policy of a learner on a network, as a run keeps it."""
    recorder = Recorder(env, SearchConfig())
    learner = make_learner("ppo", RecordedVecEnv(recorder), len(env.groups), 0)
    return policy_of("ppo", learner)


@pytest.mark.parametrize(
    "budget", ["macs=30%", "macs=50%", "macs=80%", "macs=30%..80%", "params=40%"]
)
def test_on_its_own_network_a_policy_is_trusted_wholly_however_candidates_are_scored(
    budget, tmp_path
):
    trained_on(fake_env("wide")).save(tmp_path)
    policy = Policy.load(tmp_path)
    for seed in range(3):
        env = scored_otherwise("wide", seed, budget=budget)
        # Its features alone would tell a stranger.
        assert replace(policy, home=None).mean_similarity(env.observer) < 1
        assert policy.mean_similarity(env.observer) == 1


def test_a_policy_does_not_take_other_weights_or_other_networks_for_its_own():
    policy = trained_on(fake_env("wide"))
    for env in (scored_otherwise("three", 0), scored_otherwise("chain", 0)):
        assert policy.mean_similarity(env.observer) < 1
    env = scored_otherwise("wide", 0)
    other = chain(16, 40, 24, 48, 32, seed=1)
    stranger = Observer(env.groups, env.space, env.proxy, other)
    assert stranger.group_names == env.observer.group_names
    assert stranger.network != env.observer.network
    assert policy.mean_similarity(stranger) < 1


def test_of_its_own_network_a_policy_knows_the_groups_that_it_decided():
    env = scored_otherwise("wide", 0)
    left_out = env.groups.with_pins({env.observer.group_names[1]: "user asked"})
    proxy = FakeProxy(left_out, env.proxy.example, lambda kept: 1.0)
    model, _, _ = traced("wide")
    policy = trained_on(LayerPruningEnv(model, left_out, proxy))
    similarity = policy.similarity(env.observer)
    assert similarity[1] < 1
    assert (np.delete(similarity, 1) == 1).all()


def test_a_shipped_policy_is_trusted_on_the_network_that_comes_with_it():
    env = LayerPruningEnv("resnet20", budget="macs=30%")
    for folder in shipped_policies().values():
        policy = Policy.load(folder)
        assert policy.home == Home.of(env.observer)
        assert policy.mean_similarity(env.observer) == 1
