"""What a policy does where it knows nothing: a guide from measurements, and how far the
policy's own word counts.
"""

import gymnasium
import numpy as np
import pytest
import torch
from toys import digits_env, fake_env, some_policy, target_env, traced

from autoprune.agents.recorder import Episode, counts_of
from autoprune.agents.replay import SIMILARITY_SCALE, Policy, make_actor, replay
from autoprune.agents.search import SearchResult, search
from autoprune.config import SearchConfig
from autoprune.costs.budget import Budget
from autoprune.envs.batch import BatchedEpisodes, uniform_policy
from autoprune.envs.greedy_allocator import POWER
from autoprune.envs.layer_pruning import LayerPruningEnv
from autoprune.runs import RunFolder

HARMS = np.array([0.1, 3.0, 0.02, 1.0, 0.3])


def additive_env(
    harms: np.ndarray = HARMS, budget: str = "macs=50%"
) -> LayerPruningEnv:
    """Damage adds up over the five groups of a chain."""
    dense = fake_env("wide").space.costs.dense
    return fake_env(
        "wide",
        lambda kept: float((harms * (dense / kept - 1) ** POWER).sum()),
        budget=budget,
    )


def guided(env: LayerPruningEnv, budgets=None) -> BatchedEpisodes:
    greedy_allocator = env.greedy_allocator

    def act(batch: BatchedEpisodes) -> np.ndarray:
        return batch.actions_of(
            greedy_allocator.suggest(batch.state), np.zeros(len(batch.state.kept))
        ).astype(np.float32)

    return env.start_episodes(budgets or [env.budget]).rollout(act)


def test_a_group_is_worth_what_it_loses_at_half_where_damage_adds_up():
    env = additive_env()
    np.testing.assert_allclose(env.greedy_allocator.marginal_gain, HARMS, rtol=1e-6)
    assert env.proxy.evaluations == len(env.groups) + 1


def test_a_group_whose_return_does_harm_is_worth_nothing():
    env = fake_env("wide", lambda kept: float(kept[0] - kept[1:].sum()))
    marginal_gain = env.greedy_allocator.marginal_gain
    assert marginal_gain[0] == 0
    assert (marginal_gain[1:] > 0).all()


@pytest.mark.parametrize(
    "harms", [HARMS, np.zeros(5), np.array([1.0, 0.0, 0.0, 0.0, 0.0])]
)
def test_the_path_goes_from_dense_to_the_least_and_never_back(harms):
    env = additive_env(harms)
    space, path = env.space, env.greedy_allocator.path
    np.testing.assert_allclose(path[0], 1 - space.high / space.costs.dense, atol=1e-9)
    np.testing.assert_allclose(path[-1], 1 - space.low / space.costs.dense, atol=1e-9)
    assert (np.diff(path, axis=0) >= -1e-9).all()
    costs = space.costs.continuous_cost("macs", space.costs.dense * (1 - path))
    assert (np.diff(costs) < 0).all()


@pytest.mark.parametrize("budget", ["macs=30%", "macs=50%", "macs=75%", "params=40%"])
def test_where_its_assumption_holds_the_guide_is_in_the_best_hundredth_of_random_allocations(
    budget,
):
    env = additive_env(budget=budget)
    generator = np.random.default_rng(0)
    (even,), (found,) = (
        env.start_episodes([env.budget]).rollout(uniform_policy).state.kept,
        guided(env).state.kept,
    )
    others = (
        env.start_episodes([env.budget] * 300)
        .rollout(lambda batch: generator.uniform(-1, 1, 300))
        .state.kept
    )
    losses = [env.proxy.loss_of(kept) for kept in (found, even, *others)]
    assert env.space.cost(found) <= env.target
    assert losses[0] < 0.5 * losses[1]
    assert losses[0] < np.quantile(losses[2:], 0.01)


def test_suggestions_for_several_budgets_are_those_for_each():
    env = additive_env()
    budgets = [type(env.budget).parse(f"macs={share}%") for share in (35, 50, 65)]
    together = guided(env, budgets).state.kept
    assert [
        guided(env, [budget]).state.kept[0].tolist() for budget in budgets
    ] == together.tolist()


def test_the_guide_measures_a_real_network_in_the_company_of_halves():
    env = digits_env()
    halves = {group.name: group.channels // 2 for group in env.groups}
    before = env.proxy(halves).loss
    whole = [
        env.proxy(halves | {group.name: group.channels}).loss for group in env.groups
    ]
    evaluated = env.proxy.evaluations
    np.testing.assert_allclose(
        env.greedy_allocator.marginal_gain, np.maximum(before - np.array(whole), 0)
    )
    assert env.proxy.evaluations == evaluated


def trained(env: LayerPruningEnv) -> Policy:
    """A policy that knows the groups of an environment."""
    policy = some_policy()
    return Policy(
        policy.algorithm,
        policy.network,
        policy.policy_kwargs,
        env.observer.group_features,
    )


def stranger(env: LayerPruningEnv, name: str = "ppo") -> Policy:
    """A policy that knows nothing like the groups of an environment."""
    policy = some_policy(name)
    return Policy(
        policy.algorithm,
        policy.network,
        policy.policy_kwargs,
        env.observer.group_features + 5,
    )


def test_on_its_own_network_a_policy_acts_alone_and_nothing_is_measured():
    env = target_env("wide")
    policy = trained(env)
    assert (policy.similarity(env.observer) == 1).all()
    (kept,) = (
        env.start_episodes([env.budget]).rollout(make_actor(policy, env)).state.kept
    )
    (alone,) = (
        env.start_episodes([env.budget])
        .rollout(lambda batch: policy.act(batch.observe())[:, 0])
        .state.kept
    )
    assert kept.tolist() == alone.tolist()
    assert env.proxy.evaluations == 0


def test_a_policy_that_says_nothing_of_what_it_knows_is_trusted():
    assert (
        some_policy().similarity(fake_env("mobilenet_v2_cifar").observer) == 1
    ).all()


def test_trust_falls_with_the_distance_to_the_nearest_group_that_is_known():
    env = fake_env("wide")
    group_features = env.observer.group_features[[0]]
    away = np.linalg.norm(env.observer.group_features - group_features, axis=1)
    similarity = Policy("ppo", some_policy().network, {}, group_features).similarity(
        env.observer
    )
    np.testing.assert_allclose(
        similarity[1:], np.exp(-0.5 * (away[1:] / SIMILARITY_SCALE) ** 2)
    )
    assert similarity[0] == 1
    assert (similarity[1:] < 1).all()


def test_far_from_what_it_knows_a_policy_does_what_the_guide_suggests():
    env = additive_env()
    allocation, info = replay(stranger(env), env)
    assert list(allocation.kept.values()) == guided(env).state.kept[0].tolist()
    alone = replay(some_policy(), additive_env())[1]["loss"]
    assert info["loss"] < alone


@pytest.mark.parametrize("shift", [0, 0.05, 5])
def test_a_wrapped_environment_is_replayed_like_the_bare_one(shift):
    env = additive_env()
    policy = Policy(
        "ppo", some_policy().network, {}, env.observer.group_features + shift
    )
    options = {
        "model": traced("wide")[0],
        "groups": env.groups,
        "proxy": env.proxy,
        "round_to": 2,
    }
    wrapped = gymnasium.make("autoprune/LayerPruning-v0", **options)
    assert wrapped is not wrapped.unwrapped
    assert replay(policy, wrapped)[0] == replay(policy, env)[0]


def test_what_a_policy_knows_is_saved_with_it(tmp_path):
    policy = trained(fake_env("wide"))
    policy.save(tmp_path)
    assert np.array_equal(Policy.load(tmp_path).group_features, policy.group_features)
    some_policy().save(tmp_path / "silent")
    assert Policy.load(tmp_path / "silent").group_features is None


@pytest.mark.parametrize("agent", ["dyna", "ppo", "sac"])
def test_a_search_leaves_a_policy_that_knows_its_network(agent):
    env = target_env("wide")
    policy = search(env, SearchConfig(agent=agent, episodes=12, finalists=1)).policy
    assert np.array_equal(policy.group_features, env.observer.group_features)


@pytest.mark.parametrize(
    ("agent", "budget"),
    [
        ("dyna", "macs=50%"),
        ("ppo", "macs=30%..80%"),
        ("sac", "macs=30%..80%"),
        ("td3", "macs=50%"),
    ],
)
def test_a_stranger_leads_the_first_batch_with_the_guide_and_is_then_forgotten(
    agent, budget, tmp_path
):
    def searched(policy: Policy | None) -> SearchResult:
        if policy is not None:
            policy.save(tmp_path / "policy")
        start = "" if policy is None else str(tmp_path / "policy")
        return search(
            additive_env(budget=budget),
            SearchConfig(agent=agent, episodes=20, policy=start),
        )

    env = additive_env(budget=budget)
    led, fresh = searched(stranger(env, agent)), searched(None)
    budgets = [Budget.parse(episode.allocation.budget) for episode in led.episodes[:10]]
    ideal = guided(env, budgets).state.kept
    assert led.episodes[0].counts == tuple(ideal[0])
    far, near = (
        np.abs(counts_of(found.episodes[:10]) - ideal).sum() for found in (fresh, led)
    )
    assert 0 < near < 0.8 * far
    another = stranger(env, agent)
    with torch.no_grad():
        for parameter in another.network.parameters():
            parameter.mul_(-1)
    assert np.array_equal(
        counts_of(searched(another).episodes), counts_of(led.episodes)
    )


def test_a_search_led_by_a_stranger_and_interrupted_ends_as_one_left_alone(tmp_path):
    stranger(additive_env()).save(tmp_path / "policy")
    config = SearchConfig(
        agent="ppo", episodes=40, policy=str(tmp_path / "policy"), checkpoint_every=10
    )

    def searched(name: str, interrupt_at: int = 0) -> SearchResult:
        def on_episode(episode: Episode) -> None:
            if episode.number == interrupt_at:
                raise InterruptedError

        folder = RunFolder(tmp_path / name)
        folder.root.mkdir(exist_ok=True)
        return search(additive_env(), config, folder, on_episode)

    alone = searched("alone")
    for episode in (5, 25):
        with pytest.raises(InterruptedError):
            searched("interrupted", episode)
    resumed = searched("interrupted")
    assert np.array_equal(counts_of(resumed.episodes), counts_of(alone.episodes))
    assert resumed.best == alone.best
    assert resumed.evaluations == alone.evaluations
    # Episodes and the policy's own allocation, each network once; before them the
    # guide's measurements.
    networks = {episode.counts for episode in alone.episodes} | {
        tuple(alone.best.allocation.kept.values())
    }
    assert 0 <= alone.evaluations - len(networks) - len(HARMS) - 1 <= 1
