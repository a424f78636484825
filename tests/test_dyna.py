"""Dyna: practises on predictions only, tries what is new, and one policy serves a range
of budgets.
"""

import threading

import numpy as np
import pytest
from toys import fake_env, target_env

from autoprune.agents import dyna
from autoprune.agents.dyna import ModelEnv, train_dyna
from autoprune.agents.recorder import Recorder
from autoprune.agents.replay import Policy, replay
from autoprune.agents.search import search
from autoprune.config import SearchConfig
from autoprune.costs.budget import Budget
from autoprune.envs.layer_pruning import LayerPruningEnv


def trained(env, episodes: int, seed: int = 0) -> tuple[Policy, list]:
    recorder = Recorder(env, SearchConfig(episodes=episodes, seed=seed))
    return train_dyna(recorder), recorder.episodes


def kept(episode) -> tuple[int, ...]:
    return tuple(episode.allocation.kept.values())


@pytest.mark.parametrize("budget", ["macs=50%", "macs=30%..80%"])
def test_same_seed_gives_the_same_episodes_and_another_seed_others(budget, monkeypatch):
    monkeypatch.setattr(dyna, "PRACTICE", 10)  # after the last episode
    runs = [trained(weighted(budget), 23, seed)[1] for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert list(map(kept, runs[0])) != list(map(kept, runs[2]))


def weighted(budget: str = "macs=30%..80%") -> LayerPruningEnv:
    """An environment in which the first groups matter most."""
    dense, weights = fake_env("wide").space.costs.dense, np.geomspace(1, 0.1, 5)
    return fake_env(
        "wide", lambda kept: float(weights @ np.log2(dense / kept) ** 2), budget=budget
    )


def test_no_allocation_is_evaluated_twice_while_new_ones_are_proposed():
    env = target_env("wide", round_to=1)
    _, episodes = trained(env, 50)
    assert len(set(map(kept, episodes[10:]))) == 40
    assert not set(map(kept, episodes[:10])) & set(map(kept, episodes[10:]))
    assert env.proxy.evaluations == len(set(map(kept, episodes)))


def test_a_search_writes_one_file_of_events_and_a_repeated_one_begins_it_anew(tmp_path):
    for _ in range(2):
        before = threading.active_count()
        train_dyna(Recorder(target_env(), SearchConfig(episodes=30)), tmp_path)
        assert threading.active_count() == before
        assert len(list((tmp_path / "dyna").iterdir())) == 1


def test_where_there_is_nothing_new_it_goes_on_all_the_same():
    env = target_env("one")
    floor = env.space.cost(env.space.low)
    env = fake_env("one", budget=f"macs={floor}")
    _, episodes = trained(env, 25)
    assert len(episodes) == 25
    assert env.proxy.evaluations == 1


@pytest.mark.parametrize("network", ["one", "chain"])
@pytest.mark.parametrize("episodes", [1, 2, 7, 11])
def test_any_number_of_episodes_on_any_network(network, episodes):
    env = target_env(network)
    policy, walked = trained(env, episodes)
    assert [episode.number for episode in walked] == list(range(1, episodes + 1))
    assert replay(policy, env)[1]["cost"] <= env.target
    assert all(
        np.isfinite(value.numpy()).all()
        for value in policy.network.state_dict().values()
    )


def test_one_policy_serves_a_range_of_budgets_and_is_better_than_uniform_at_each():
    env = weighted()
    policy, episodes = trained(env, 60)
    for episode in episodes:
        assert env.space.cost(np.array(kept(episode))) <= env.target_of(
            Budget.parse(episode.allocation.budget)
        )
    allocations = []
    for budget in ("macs=30%", "macs=55%", "macs=80%"):
        allocation, info = replay(policy, env, budget)
        assert info["cost"] <= info["target"] == env.target_of(Budget.parse(budget))
        uniform = env.space.uniform(info["target"])
        assert info["loss"] < env.proxy.loss_of(uniform)
        allocations.append(np.array(list(allocation.kept.values())))
    assert allocations[0].sum() < allocations[1].sum() < allocations[2].sum()


def test_a_search_over_a_range_ends_with_a_front_within_it():
    result = search(weighted(), SearchConfig(agent="dyna", episodes=30))
    space = weighted().space
    costs = [space.cost(np.array(kept(point))) for point in result.front]
    losses = [point.selection.loss for point in result.front]
    assert costs == sorted(set(costs))
    assert losses == sorted(set(losses), reverse=True)
    assert costs[-1] <= 0.8 * space.cost(space.high)
    assert len(costs) >= 3
    assert result.best in result.front


def test_imagined_episodes_end_with_the_predicted_reward_and_cost_no_evaluation():
    env = target_env("wide")
    recorder = Recorder(env, SearchConfig(episodes=20))
    recorder.run_episodes(lambda batch: np.linspace(-1, 1, 20), 20)
    model_env = ModelEnv(env, 8)
    model_env.learn_from(recorder)
    paid = env.proxy.evaluations
    model_env.reset()
    generator, single = np.random.default_rng(0), env.start_episodes([env.budget] * 8)
    actions = generator.uniform(-1, 1, (5, 8))
    for row in actions:
        _, rewards, dones, _ = model_env.step(row[:, None])
    for row in actions:
        single.step(row)
    assert dones.all()
    assert rewards == pytest.approx(
        model_env.surrogate.mean(single.state.kept), rel=1e-5
    )
    assert env.proxy.evaluations == paid


def test_imagined_rewards_under_a_range_are_expected_ones_relative_to_the_usual_at_their_cost():
    env = weighted()
    recorder = Recorder(env, SearchConfig(episodes=40))
    recorder.run_episodes(
        lambda batch: np.random.default_rng(batch.state.index).uniform(-1, 1, 40), 40
    )
    model_env = ModelEnv(env, 6)
    model_env.learn_from(recorder)
    model_env.reset()
    budgets = list(model_env.budgets)
    assert len({str(budget) for budget in budgets}) == 6
    for _ in env.groups:
        _, rewards, *_ = model_env.step(np.zeros((6, 1)))
    uniform = np.array([env.space.uniform(env.target_of(budget)) for budget in budgets])
    costs, cost_baseline = env.space.cost(uniform), model_env.cost_baseline
    relative = (
        model_env.predict_rewards(uniform) - cost_baseline.centre(costs)
    ) / cost_baseline.scale(costs)
    assert rewards == pytest.approx(relative, abs=1e-5)
    known = np.array([episode.counts for episode in recorder.episodes])
    earned = [episode.reward for episode in recorder.episodes]
    assert np.corrcoef(model_env.predict_rewards(known), earned)[0, 1] > 0.9


def test_the_policy_keeps_trying():
    policy, _ = trained(target_env("one"), 40)
    assert policy.network.log_std.item() >= np.log(dyna.LEAST_STD) - 0.5
