"""Lanes walked together end exactly where the same actions end one by one, each under a
budget of its own.
"""

import numpy as np
import pytest
from toys import fake_env, traced

from autoprune.costs.cost import CostTable
from autoprune.costs.search_space import SearchSpace
from autoprune.envs.batch import fixed_policy
from autoprune.envs.layer_pruning import LayerPruningEnv

NETWORKS = ("one", "chain", "wide", "resnet20", "mobilenet_v2_cifar")
BUDGETS = ("macs=30%", "macs=50%", "macs=77%", "macs=100%")


def parsed(metric: str, shares) -> list:
    return [fake_env(budget=f"{metric}={share:.0%}").budget for share in shares]


def one_by_one(env: LayerPruningEnv, budget, actions) -> tuple[np.ndarray, list[dict]]:
    """Where an episode of the environment ends, and the info of its steps."""
    env.reset(options={"budget": str(budget)})
    infos = [env.step(np.array([action]))[4] for action in actions]
    return np.array(list(infos[-1]["allocation"].kept.values())), infos


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("metric", ["macs", "params"])
@pytest.mark.parametrize(
    "options",
    [{}, {"round_to": 3, "max_sparsity": 0.7}, {"reward": "accuracy_guaranteed"}],
)
def test_lanes_end_where_the_environment_does(network, metric, options):
    env = fake_env(network, budget=f"{metric}=60%", **options)
    budgets = parsed(metric, (0.45, 0.5, 0.62, 0.8, 1.0, 0.5, 0.5))
    actions = np.random.default_rng(0).uniform(
        -1.3, 1.3, (len(env.groups), len(budgets))
    )
    actions[:, 1], actions[:, 2], actions[:, 3] = 0, 1, -1
    batch = env.start_episodes(budgets)
    steps = [batch.step(row) for row in actions]
    assert batch.is_over
    for lane, budget in enumerate(budgets):
        kept, infos = one_by_one(env, budget, actions[:, lane])
        assert batch.state.kept[lane].tolist() == kept.tolist()
        assert [executed[lane] for executed, _ in steps] == [
            info["executed_action"] for info in infos
        ]
        assert [sparsities[lane] for _, sparsities in steps] == [
            info["sparsity"] for info in infos
        ]
        assert env.space.cost(kept) <= batch.state.targets[lane] == infos[-1]["target"]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("metric", ["macs", "params"])
def test_an_allocation_that_a_walk_reached_is_reached_again_along_its_sparsities(
    network, metric
):
    env = fake_env(network, budget=f"{metric}=60%")
    budgets = parsed(metric, np.linspace(0.45, 1, 12))
    actions = np.random.default_rng(1).uniform(-1, 1, (len(env.groups), 12))
    kept = (
        env.start_episodes(budgets)
        .rollout(lambda batch: actions[batch.state.index])
        .state.kept
    )
    assert np.array_equal(
        env.start_episodes(budgets)
        .rollout(fixed_policy(1 - kept / env.space.costs.dense))
        .state.kept,
        kept,
    )


def test_a_walk_leaves_what_others_have_seen_of_it_as_it_was():
    env = fake_env("wide")
    batch = env.start_episodes(parsed("macs", (0.4, 0.6)))
    before, kept = batch.state, batch.state.kept.copy()
    batch.step(np.array([0.3, -0.3]))
    assert np.array_equal(before.kept, kept)
    assert batch.state is not before


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("metric", ["macs", "params"])
def test_shifted_sparsities_keep_their_differences_and_meet_their_targets(
    network, metric
):
    env = fake_env(network, budget=f"{metric}=60%")
    space, targets = (
        env.space,
        np.array(
            [env.target_of(budget) for budget in parsed(metric, (0.45, 0.6, 0.8, 1.0))]
        ),
    )
    wishes = np.random.default_rng(2).uniform(-0.5, 1.5, (4, len(env.groups)))
    shifted = space.shift_to_targets(wishes, targets)
    counts = space.costs.dense * (1 - shifted)
    assert space.costs.continuous_cost(metric, counts) == pytest.approx(
        targets, rel=1e-3
    )
    inside = (counts > space.low + 1e-9) & (counts < space.high - 1e-9)
    for lane in range(4):
        by = (shifted - wishes)[lane, inside[lane]]
        assert by.size == 0 or np.ptp(by) < 1e-9


SPACES = [
    ("chain", "macs", 1, 0.9),
    ("wide", "params", 2, 0.9),
    ("resnet20", "macs", 2, 0.9),
    ("resnet20", "params", 8, 0.6),
    ("mobilenet_v2_cifar", "macs", 3, 0.8),
]


def space_of(name: str, metric: str, round_to: int, max_sparsity: float) -> SearchSpace:
    return SearchSpace(CostTable(traced(name)[1]), metric, round_to, max_sparsity)


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_feasible_uniform_to_go_and_nearest_of_lanes_are_those_of_each(space):
    space = space_of(*space)
    generator = np.random.default_rng(0)
    floor, dense = space.cost(space.low), space.cost(space.high)
    kept = np.stack(
        [[generator.choice(levels) for levels in space.levels] for _ in range(20)]
    )
    targets = generator.integers(floor, dense + 1, 20)
    targets[:3] = floor, dense, dense + 10**6
    for index in range(len(space.levels)):
        before = kept.copy()
        lowest, highest = space.feasible_range(kept, index, targets)
        uniform = space.uniform_to_go(kept, index, targets)
        wishes = generator.uniform(-0.2, 1.2, 20)
        nearest = space.nearest_count(index, wishes, (lowest, highest))
        assert np.array_equal(kept, before)
        for lane, (row, target) in enumerate(zip(kept, targets, strict=True)):
            bounds = space.feasible_range(row, index, int(target))
            assert (lowest[lane], highest[lane]) == bounds
            assert uniform[lane] == space.uniform_to_go(row, index, int(target))
            assert nearest[lane] == space.nearest_count(
                index, float(wishes[lane]), bounds
            )


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_feasible_counts_are_those_of_a_search_through_all_levels(space):
    space = space_of(*space)
    generator = np.random.default_rng(2)
    floor, dense = space.cost(space.low), space.cost(space.high)
    for index in generator.permutation(len(space.levels))[:5]:
        kept, target = (
            space.costs.dense.copy(),
            int(generator.integers(floor, dense + 1)),
        )
        for before in range(
            index
        ):  # decided so that the rest can still meet the budget
            kept[before] = generator.choice(space.feasible_range(kept, before, target))
        levels = space.levels[index]
        with_least, with_most = (
            np.repeat(kept[None], len(levels), 0) for _ in range(2)
        )
        with_least[:, index], with_most[:, index] = levels, levels
        with_least[:, index + 1 :], with_most[:, index + 1 :] = (
            space.low[index + 1 :],
            space.high[index + 1 :],
        )
        meets = levels[[space.cost(row) <= target for row in with_least]]
        uses_up = levels[[space.cost(row) >= target for row in with_most]]
        lowest, highest = space.feasible_range(kept, index, target)
        assert highest == meets.max()
        assert lowest == min([*uses_up, meets.max()])
