"""The environment: every episode meets its budget, says what it executed, and repeats
itself for the same actions.
"""

import warnings
from dataclasses import replace
from itertools import pairwise

import cloudpickle
import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env as check_gymnasium
from processes import run_python
from stable_baselines3.common.env_checker import check_env as check_stable_baselines
from toys import (
    FakeProxy,
    chain,
    digits,
    digits_env,
    digits_proxy,
    fake_env,
    fake_proxy,
    run_episode,
    traced,
)

from autoprune.cli.search_stage import make_env
from autoprune.config import Settings
from autoprune.costs.budget import Budget
from autoprune.envs import ENV_ID, register_envs
from autoprune.envs.layer_pruning import LayerPruningEnv
from autoprune.errors import UserError
from autoprune.pipeline.context import RunContext
from autoprune.structure.slicing import prune
from autoprune.tracing.trace import trace

NETWORKS = ("chain", "resnet20", "mobilenet_v2_cifar")
BUDGETS = (
    "macs=30%",
    "macs=0.4",
    "macs=50%",
    "macs=65%",
    "macs=80%",
    "params=30%",
    "params=55%",
    "params=80%",
)


def rollout(env: gymnasium.Env, actions: np.ndarray, **reset) -> list[tuple]:
    """Observation, reward, terminated and info of every step, the reset first."""
    steps = [(env.reset(**reset)[0], 0.0, False, {})]
    for action in actions:
        observation, reward, terminated, truncated, info = env.step(
            np.array([action], dtype=np.float32)
        )
        assert not truncated
        steps.append((observation, reward, terminated, info))
    return steps


def assert_same_rollout(first: list[tuple], second: list[tuple]) -> None:
    for (obs, *rest), (other_obs, *other_rest) in zip(first, second, strict=True):
        assert np.array_equal(obs, other_obs)
        assert rest == other_rest


def kept_of(env: LayerPruningEnv, info: dict) -> np.ndarray:
    return np.array([info["allocation"].kept[name] for name in env.space.costs.names])


def assert_budget_is_met_and_used_up(env: LayerPruningEnv, info: dict) -> None:
    kept = kept_of(env, info)
    assert env.space.cost(kept) == info["cost"] <= info["target"] == env.target
    for index, levels in enumerate(env.space.levels):
        assert kept[index] in levels
        larger = levels[levels > kept[index]]
        if len(larger):
            grown = kept.copy()
            grown[index] = larger[0]
            assert env.space.cost(grown) > info["target"], (
                f"group {index} could still grow"
            )


def made(**options) -> gymnasium.Env:
    model, groups, _ = traced("chain")
    return gymnasium.make(
        "autoprune/LayerPruning-v0",
        model=model,
        groups=groups,
        proxy=fake_proxy(),
        **options,
    )


def test_importing_envs_registers_the_environment():
    assert "autoprune/LayerPruning-v0" in gymnasium.registry
    env = made(budget="macs=40%")
    assert isinstance(env.unwrapped, LayerPruningEnv)
    assert env.unwrapped.budget == Budget.parse("macs=40%")


def printed_by(code: str) -> list[str]:
    """What a fresh interpreter prints, in which every warning is an error."""
    done = run_python("-W", "error", "-c", code)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_an_id_that_names_the_package_works_where_nothing_of_it_was_imported():
    code = f"""
import sys
import gymnasium

env = gymnasium.make("autoprune.envs:{ENV_ID}", budget="macs=40%")
env.reset(seed=0)
terminated = False
while not terminated:
    *_, terminated, _, info = env.step(env.action_space.sample())
print(info["cost"] <= info["target"], env.spec.id)
small = {{"model": "tests.tiny:network", "data": "digits"}}
lanes = gymnasium.make_vec("autoprune.envs:{ENV_ID}", num_envs=2, **small)
lanes.reset(seed=0)
print(lanes.step(lanes.action_space.sample())[0].shape)
"""
    assert printed_by(code) == ["True", ENV_ID, "(2,", "22)"]


def test_registering_imports_nothing_heavy():
    heavy = {"torch", "stable_baselines3", "matplotlib"}
    code = f"import autoprune.envs, sys; print(*{heavy} & set(sys.modules))"
    assert printed_by(code) == []


def test_registering_again_changes_nothing_and_warns_of_nothing():
    before = gymnasium.spec(ENV_ID)
    register_envs()
    assert gymnasium.spec(ENV_ID) is before


@pytest.fixture(scope="module")
def named() -> gymnasium.Env:
    """The environment that text alone makes."""
    return gymnasium.make(ENV_ID, budget="macs=40%", max_sparsity=0.8)


def test_a_stored_specification_makes_the_same_environment_again(named):
    spec = EnvSpec.from_json(named.spec.to_json())
    assert spec.kwargs == {"budget": "macs=40%", "max_sparsity": 0.8}
    again = gymnasium.make(spec)
    actions = np.random.default_rng(0).uniform(-1, 1, len(named.unwrapped.groups))
    assert_same_rollout(
        rollout(named.unwrapped, actions), rollout(again.unwrapped, actions)
    )
    lanes = gymnasium.make_vec(ENV_ID, num_envs=2, budget="macs=40%")
    assert EnvSpec.from_json(lanes.spec.to_json()).kwargs["budget"] == "macs=40%"


def test_names_make_what_the_command_line_makes_without_options():
    by_command = make_env(RunContext(Settings()))
    by_name = gymnasium.make(ENV_ID).unwrapped
    actions = np.random.default_rng(1).uniform(-1, 1, len(by_name.groups))
    assert_same_rollout(rollout(by_name, actions), rollout(by_command, actions))


def test_both_checkers_pass_on_what_text_makes_without_a_warning(named):
    check_gymnasium(named.unwrapped)
    check_stable_baselines(named.unwrapped)


def digits_network(n_classes: int) -> torch.nn.Module:
    return digits()[0]


@pytest.mark.parametrize(
    ("budget", "is_lost"), [("params=12%", True), ("macs=60%", False)]
)
def test_a_factorys_name_does_too_and_its_proxy_suits_the_budget(budget, is_lost):
    env = LayerPruningEnv(
        f"{__name__}:digits_network", data="digits", budget=budget, round_to=2
    )
    assert env.proxy.reconstructs == is_lost
    assert run_episode(env, lambda _: 0.2)["cost"] <= env.target


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"model": "resnet56"},
            "model: 'resnet56' has no trained weights for 'sample'",
        ),
        ({"data": "digits"}, "model: 'resnet20' has no trained weights for 'digits'"),
        ({"data": "sampel"}, "data: no dataset 'sampel'; did you mean 'sample'"),
        ({"budget": "macs=1%"}, "budget: macs=1% is below the reachable floor"),
    ],
)
def test_names_that_mean_nothing_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        LayerPruningEnv(**options)


def test_a_name_together_with_a_networks_groups_or_proxy_is_refused():
    _, groups, _ = traced("chain")
    for options in ({"groups": groups}, {"proxy": fake_proxy()}):
        with pytest.raises(UserError, match="model: groups and proxy are of a network"):
            LayerPruningEnv(**options)


@pytest.mark.parametrize("reward", ["weighted_sum", "accuracy_guaranteed"])
def test_both_checkers_pass_without_a_warning(reward):
    env = made(reward=reward)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_gymnasium(env.unwrapped)
        check_stable_baselines(env.unwrapped)
        check_stable_baselines(made(render_mode="rgb_array").unwrapped)
    assert [str(warning.message) for warning in caught] == []


def test_two_seeded_rollouts_of_a_trained_network_are_equal_step_by_step():
    actions = np.random.default_rng(0).uniform(-0.5, 0.5, 3)
    first, second = (rollout(digits_env(), actions, seed=3) for _ in range(2))
    assert first[-1][2]
    assert first[-1][3]["loss"] > 0
    assert_same_rollout(first, second)


def test_second_episode_of_one_environment_equals_that_of_a_fresh_one():
    used, fresh = fake_env("wide"), fake_env("wide")
    first, second = np.random.default_rng(1).uniform(-1, 1, (2, 5))
    rollout(used, first)
    used.reset()
    used.step(np.array([0.3]))  # an episode broken off
    assert_same_rollout(rollout(used, second), rollout(fresh, second))


def test_pickled_environment_goes_on_as_the_original():
    env = digits_env()
    env.reset()
    env.step(np.array([0.2]))
    twin = cloudpickle.loads(cloudpickle.dumps(env))
    for action in ([0.1], [-0.1]):
        ours, theirs = env.step(np.array(action)), twin.step(np.array(action))
        assert np.array_equal(ours[0], theirs[0])
        assert ours[1:] == theirs[1:]


@pytest.mark.parametrize("network", NETWORKS)
def test_random_episodes_meet_the_budget_and_leave_no_room_for_a_step(network):
    generator = np.random.default_rng(0)
    env = fake_env(network)
    for _ in range(200):
        spread = generator.choice([0.1, 0.5, 1.0])
        info = run_episode(
            env, lambda position, spread=spread: generator.uniform(-spread, spread)
        )
        assert_budget_is_met_and_used_up(env, info)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("budget", BUDGETS)
def test_every_kind_of_budget_is_met_even_by_extreme_actions(network, budget):
    generator = np.random.default_rng(1)
    env = fake_env(network, budget=budget)
    for action in (
        lambda _: 1.0,
        lambda _: -1.0,
        lambda p: (-1.0) ** p,
        lambda _: generator.uniform(-1, 1),
    ):
        assert_budget_is_met_and_used_up(env, run_episode(env, action))


@pytest.mark.parametrize("metric", ["macs", "params"])
def test_absolute_budget_is_the_target_itself(metric):
    dense = fake_env("resnet20", budget=f"{metric}=100%").target
    env = fake_env("resnet20", budget=f"{metric}={dense // 2 + 7}")
    info = run_episode(env, lambda _: 0.1)
    assert info["target"] == dense // 2 + 7
    assert_budget_is_met_and_used_up(env, info)


def test_budget_above_the_dense_cost_prunes_nothing():
    for budget in ("macs=100%", "macs=99G"):
        env = fake_env("wide", budget=budget)
        assert (
            kept_of(env, run_episode(env, lambda _: 0.5)).tolist()
            == env.space.costs.dense.tolist()
        )


def test_budget_at_the_reachable_floor_leaves_one_allocation():
    env = fake_env("wide")
    floor = env.space.cost(env.space.low)
    env = fake_env("wide", budget=f"macs={floor}")
    for action in (-1.0, 0.0, 1.0):
        assert (
            kept_of(env, run_episode(env, lambda _, action=action: action)).tolist()
            == env.space.low.tolist()
        )


@pytest.mark.parametrize(("round_to", "max_sparsity"), [(1, 0.9), (8, 0.5), (3, 0.99)])
def test_counts_are_multiples_within_the_largest_sparsity(round_to, max_sparsity):
    env = fake_env(
        "wide", round_to=round_to, max_sparsity=max_sparsity, budget="params=60%"
    )
    generator = np.random.default_rng(2)
    for _ in range(20):
        info = run_episode(env, lambda _: generator.uniform(-1, 1))
        assert_budget_is_met_and_used_up(env, info)
        for kept, dense in zip(kept_of(env, info), env.space.costs.dense, strict=True):
            assert kept == dense or (
                kept % round_to == 0 and 1 - kept / dense <= max_sparsity
            )


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("budget", ["macs=30%", "macs=50%", "params=70%"])
def test_zero_actions_are_uniform_pruning(network, budget):
    env = fake_env(network, budget=budget)
    info = run_episode(env, lambda _: 0.0)
    kept = kept_of(env, info)
    assert kept.tolist() == env.space.uniform(env.target).tolist()
    steps = 2 * env.space.round_to / env.space.costs.dense
    sparsities = 1 - kept / env.space.costs.dense
    assert (np.abs(sparsities - np.median(sparsities)) <= np.maximum(steps, 0.05)).all()


@pytest.mark.parametrize("network", NETWORKS)
def test_executed_actions_replayed_give_the_same_allocation(network):
    generator = np.random.default_rng(3)
    env = fake_env(network)
    for _ in range(20):
        wished = generator.uniform(-1, 1, len(env.groups))
        first = rollout(env, wished)
        executed = [info["executed_action"] for *_, info in first[1:]]
        assert all(-1 <= action <= 1 for action in executed)
        second = rollout(env, np.array(executed))
        assert second[-1][3]["allocation"] == first[-1][3]["allocation"]
        assert [info["executed_action"] for *_, info in second[1:]] == executed


def test_the_action_space_covers_the_feasible_interval_from_end_to_end():
    env = fake_env("wide")
    for action, end in ((-1.0, 0), (1.0, 1)):
        env.reset()
        bounds = env.bounds
        assert bounds[0] < bounds[1]
        info = env.step(np.array([action]))[4]
        assert info["sparsity"] == pytest.approx(bounds[end])
        assert info["executed_action"] == pytest.approx(action)


def test_where_any_action_would_do_the_wish_counts_as_executed():
    env = fake_env("chain")
    for wish in (-0.7, 0.3):
        env.reset()
        for _ in range(len(env.groups) - 1):
            env.step(np.zeros(1))
        assert env.bounds[0] == env.bounds[1]
        assert env.step(np.array([wish]))[4]["executed_action"] == pytest.approx(wish)


def test_the_action_of_a_sparsity_executes_that_sparsity():
    env = fake_env("wide")
    for count in env.space.levels[0]:
        env.reset()
        lowest, highest = env.space.feasible_range(env.space.costs.dense, 0, env.target)
        kept = round(
            (
                1
                - env.step(
                    np.array([env.action_of(1 - int(count) / env.space.costs.dense[0])])
                )[4]["sparsity"]
            )
            * env.space.costs.dense[0]
        )
        assert kept == np.clip(count, lowest, highest)


def test_reward_is_zero_until_the_last_step():
    steps = rollout(fake_env("wide"), np.zeros(5))
    assert [reward for _, reward, *_ in steps[:-1]] == [0.0] * 5
    assert [terminated for _, _, terminated, _ in steps] == [False] * 5 + [True]
    info = steps[-1][3]
    assert steps[-1][1] == pytest.approx(
        -info["loss"] + 0.05 * (1 - info["macs"] / 642720), abs=0.01
    )
    assert {"allocation", "macs", "cost", "target", "accuracy", "loss"} <= set(info)


def test_reset_option_sets_the_target_of_that_episode_only():
    env = fake_env("wide")
    usual = env.target
    _, info = env.reset(options={"budget": "macs=30%"})
    assert Budget.parse(info["budget"]) == Budget.parse("macs=30%")
    assert env.target == pytest.approx(0.6 * usual, abs=1)
    for _ in range(5):
        *_, info = env.step(np.array([0.0]))
    assert info["cost"] <= info["target"] == env.target
    assert Budget.parse(info["allocation"].budget) == Budget.parse("macs=30%")
    env.reset()
    assert env.target == usual


def test_refused_reset_leaves_the_episode_as_it_was():
    env, actions = fake_env("wide"), [0.3, -0.2, 0.1, 0.4, 0.0]
    expected = rollout(env, actions)[-1]
    env.reset()
    for action in actions:
        with pytest.raises(UserError, match="budgets macs, got params="):
            env.reset(options={"budget": "params=50%"})
        with pytest.raises(
            UserError, match=r"budget: macs=.* is below the reachable floor"
        ):
            env.reset(options={"budget": "macs=0.1%"})
        *_, info = env.step(np.array([action]))
    assert info == expected[3]


def test_accuracy_guaranteed_treats_the_budget_as_a_ceiling():
    env = fake_env(
        "wide", reward="accuracy_guaranteed", accuracy_floor=0.0, budget="macs=80%"
    )
    info = run_episode(env, lambda _: 1.0)
    assert kept_of(env, info).tolist() == env.space.low.tolist()
    assert info["cost"] < 0.1 * info["target"]
    generator = np.random.default_rng(4)
    costs = [run_episode(env, lambda _: generator.uniform(-1, 1)) for _ in range(50)]
    assert all(info["cost"] <= info["target"] for info in costs)
    assert run_episode(env, lambda _: -1.0)["cost"] > 0.9 * info["target"]


def test_model_is_left_as_found():
    model, groups, _ = digits()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run_episode(LayerPruningEnv(model, groups, digits_proxy()), lambda _: 0.1)
    run_episode(LayerPruningEnv(model, None, digits_proxy()), lambda _: 0.1)
    assert all(
        torch.equal(before[name], value) for name, value in model.state_dict().items()
    )
    assert not model.training


def test_render_changes_as_the_episode_goes():
    env = fake_env("wide", render_mode="rgb_array")
    env.reset()
    pictures = [env.render()]
    for _ in range(5):
        env.step(np.array([0.0]))
        pictures.append(env.render())
    assert pictures[0].dtype == np.uint8
    assert pictures[0].ndim == 3
    assert pictures[0].shape[2] == 3
    assert all((one != other).any() for one, other in pairwise(pictures))
    assert fake_env("wide").render() is None


def test_environment_without_proxy_is_refused():
    model, groups, _ = traced("chain")
    with pytest.raises(UserError, match="proxy: the environment needs a ProxyAccuracy"):
        LayerPruningEnv(model, groups)


def test_groups_of_another_network_are_refused():
    model, groups, _ = traced("chain")
    for other_groups, proxy in (
        (traced("wide")[1], fake_proxy()),
        (groups, fake_proxy("wide")),
    ):
        with pytest.raises(
            UserError, match="groups: model, groups and proxy are of different networks"
        ):
            LayerPruningEnv(model, other_groups, proxy)


def test_a_network_that_differs_in_one_shape_or_lacks_a_layer_is_refused():
    _, groups, _ = traced("chain")
    for other in (
        chain(8, 16, 12, 16, n_classes=9),
        chain(8, 16, 12),
        chain(8, 16, 12, 16)[:-1],
    ):
        with pytest.raises(
            UserError, match="groups: model, groups and proxy are of different networks"
        ):
            LayerPruningEnv(other, groups, fake_proxy())


def test_a_trace_may_hold_a_buffer_that_the_model_lacks():
    model, groups, example = traced("chain")
    groups = replace(groups, shapes=groups.shapes | {"0.scale": (8, 1, 1)})
    LayerPruningEnv(
        model, groups, FakeProxy(groups, example, lambda kept: 1 / kept.sum())
    )


def test_a_network_with_tied_weights_is_accepted_and_its_cost_is_that_of_the_pruned_one():
    model, example = chain(8, 8, 8), torch.randn(1, 3, 16, 16)
    model[2][0].weight = model[1][0].weight
    groups = trace(model, example)
    env = LayerPruningEnv(
        model,
        groups,
        FakeProxy(groups, example, lambda kept: 1 / kept.sum()),
        "params=60%",
    )
    kept = run_episode(env, lambda _: 0.0)["allocation"].kept
    pruned = prune(
        model, groups, {name: torch.arange(count) for name, count in kept.items()}
    )
    assert (
        sum(p.numel() for p in pruned.parameters())
        == env.space.costs.params(kept)
        <= env.target
    )


def test_unreachable_budget_is_refused_with_the_floor():
    space = fake_env("wide").space
    floor, dense = space.cost(space.low), space.cost(space.high)
    expected = rf"budget: macs=(0\.01|1%) is below the reachable floor.* needs macs={floor} \({floor / dense:.1%}\)"
    with pytest.raises(UserError, match=expected):
        fake_env("wide", budget="macs=1%")
    fake_env("wide", budget=f"macs={floor}")


def test_unknown_reward_is_refused_with_the_nearest():
    with pytest.raises(
        UserError, match="unknown reward 'weighted_sun'; did you mean 'weighted_sum'"
    ):
        fake_env(reward="weighted_sun")


def test_step_after_the_end_is_refused():
    env = fake_env()
    run_episode(env, lambda _: 0.0)
    with pytest.raises(
        RuntimeError, match=r"step\(\) after the episode's end; call reset\(\) first"
    ):
        env.step(np.array([0.0]))
