"""The vector environment: Gymnasium's interface, and in every lane what a single
environment does.
"""

import gymnasium
import numpy as np
import pytest
from toys import fake_env, fake_proxy, traced

from autoprune.envs.vector import LayerPruningVectorEnv
from autoprune.errors import UserError


def made(n: int, name: str = "wide", **options) -> LayerPruningVectorEnv:
    model, groups, _ = traced(name)
    options |= {"model": model, "groups": groups, "proxy": fake_proxy(name)}
    options |= {"round_to": 2}
    return gymnasium.make_vec(
        "autoprune/LayerPruning-v0",
        num_envs=n,
        vectorization_mode="vector_entry_point",
        **options,
    ).unwrapped


def test_lanes_end_together_where_single_environments_end():
    n, lanes, single = 4, made(4), fake_env("wide")
    actions = np.random.default_rng(0).uniform(-1, 1, (5, n, 1))
    lanes.reset(seed=0)
    for step, row in enumerate(actions):
        _, rewards, terminated, truncated, infos = lanes.step(row)
        assert terminated.all() == (step == 4)
        assert not truncated.any()
    for lane in range(n):
        single.reset()
        for row in actions:
            observation, reward, *_, info = single.step(row[lane])
        assert reward == rewards[lane]
        assert info["allocation"] == infos["final_info"]["allocation"][lane]
        assert np.array_equal(observation, infos["final_obs"][lane])


def test_observations_and_actions_are_in_the_batched_spaces():
    lanes = made(3)
    observations, _ = lanes.reset(seed=0)
    for _ in range(11):
        assert lanes.observation_space.contains(observations)
        observations, *_ = lanes.step(lanes.action_space.sample())


def test_a_finished_episode_is_followed_by_the_next_ones_first_observation():
    lanes = made(2)
    first, _ = lanes.reset(seed=0)
    for _ in range(5):
        observations, *_ = lanes.step(np.zeros((2, 1)))
    assert np.array_equal(observations, first)


def test_lanes_share_a_range_of_budgets_evenly_and_repeatably():
    lanes = made(5, budget="macs=30%..80%")
    lanes.reset(seed=3)
    shares = [budget.share for budget in lanes.budgets]
    assert np.array_equal(np.floor((np.array(shares) - 0.3) / 0.1), np.arange(5))
    lanes.reset(seed=3)
    assert shares == [budget.share for budget in lanes.budgets]


def test_infos_tell_every_lane_its_budget_and_the_group_that_was_decided():
    lanes = made(2)
    _, info = lanes.reset(options={"budgets": ["macs=40%", "macs=60%"]})
    assert info["budget"].tolist() == ["macs=40%", "macs=60%"]
    groups = [lanes.step(np.zeros((2, 1)))[-1]["group"].tolist() for _ in range(5)]
    assert groups == [[name, name] for name in traced("wide")[1].channels]


def test_lanes_refuse_what_they_cannot_do():
    lanes = made(4)
    with pytest.raises(
        UserError, match=r"^budgets: one for each of the 4 lanes, got 2$"
    ):
        lanes.reset(options={"budgets": ["macs=40%", "macs=60%"]})
    with pytest.raises(
        UserError, match=r"^render_mode: lanes aren't drawn, got 'rgb_array'"
    ):
        made(4, render_mode="rgb_array")


@pytest.mark.parametrize(
    "options", [{"budget": "macs=40%"}, {"budgets": ["macs=40%", "macs=60%"]}]
)
def test_reset_options_set_the_targets_of_the_lanes(options):
    lanes = made(2)
    lanes.reset(options=options)
    wanted = options.get("budgets", ["macs=40%"] * 2)
    assert [str(budget) for budget in lanes.budgets] == wanted
