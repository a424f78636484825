"""Budgets are read or refused with reasons, and met to within one step by every walk;
allocations are JSON.
"""

import functools
import json

import numpy as np
import pytest
import torch
from nets import NETS, build, images

from autoprune.costs.allocation import Allocation
from autoprune.costs.budget import Budget, BudgetRange, parse_budget
from autoprune.costs.cost import CostTable
from autoprune.costs.search_space import SearchSpace
from autoprune.data import models
from autoprune.errors import UserError
from autoprune.structure.groups import Groups
from autoprune.tracing.trace import trace


@functools.cache
def traced(name: str) -> Groups:
    if name in NETS:
        return trace(build(name), images(1, NETS[name].size), verify=False)
    return trace(models.build(name), images(1, 32), verify=False)


@functools.cache
def costs(name: str) -> CostTable:
    return CostTable(traced(name))


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("macs=50%", Budget("macs", share=0.5)),
        ("macs=0.5", Budget("macs", share=0.5)),
        ("macs=12.5%", Budget("macs", share=0.125)),
        ("params=100%", Budget("params", share=1.0)),
        ("macs=1", Budget("macs", share=1.0)),
        ("params=120000", Budget("params", amount=120_000)),
        ("macs=20M", Budget("macs", amount=20_000_000)),
        ("macs=1.5G", Budget("macs", amount=1_500_000_000)),
        ("params=90k", Budget("params", amount=90_000)),
        ("macs=1.001M", Budget("macs", amount=1_001_000)),
    ],
)
def test_budget_is_a_share_or_an_amount(text, budget):
    assert Budget.parse(text) == budget
    assert Budget.parse(budget) is budget
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize(
    "target",
    ["0", "0%", "-5%", "-0.5", "-20M", "100.1%", "150%", "nan", "nan%", "inf", "-inf"],
)
def test_target_outside_its_range_is_refused_with_the_range_and_the_value(target):
    with pytest.raises(UserError) as error:
        Budget.parse(f"macs={target}")
    assert str(error.value) == (
        f"budget: the target must be above 0 and at most 100%, got {target!r}; e.g. "
        f"macs=50%"
    )


@pytest.mark.parametrize("target", ["", "half", "%", "M", "5 0", "50%%", "1,5"])
def test_target_that_is_no_number_is_refused_with_examples(target):
    with pytest.raises(UserError) as error:
        Budget.parse(f"params={target}")
    assert (
        str(error.value)
        == f"budget: {target!r} is no number; write e.g. macs=50%, macs=0.5 or macs=20M"
    )


@pytest.mark.parametrize(
    "text", ["flops=50%", "50%", "", "=50%", "MACS=50%", "energy=3"]
)
def test_unknown_metric_is_refused_with_the_known_ones(text):
    metric = text.partition("=")[0]
    with pytest.raises(UserError) as error:
        Budget.parse(text)
    assert (
        str(error.value)
        == f"budget: unknown metric {metric!r}; use one of macs, params, memory, "
        f"size, latency, e.g. macs=50%"
    )


def test_metric_without_target_is_refused():
    with pytest.raises(UserError, match=r"^budget: '' is no number"):
        Budget.parse("macs")


@pytest.mark.parametrize("text", ["macs=30%..80%", "macs=0.3..0.8", "macs=30%..0.8"])
def test_a_range_goes_from_one_share_to_a_larger_one(text):
    budgets = parse_budget(text)
    assert budgets == BudgetRange(Budget("macs", share=0.3), Budget("macs", share=0.8))
    assert parse_budget(str(budgets)) == parse_budget(budgets) == budgets
    assert [budgets.at_position(position) for position in (0, 0.5, 1)] == [
        Budget("macs", share=s) for s in (0.3, 0.55, 0.8)
    ]


def test_a_single_budget_is_the_same_at_every_position():
    budget = parse_budget("params=40%")
    assert budget == Budget("params", share=0.4)
    assert budget.at_position(0) is budget.at_position(1) is budget


@pytest.mark.parametrize(
    "text", ["macs=80%..30%", "macs=50%..50%", "macs=10M..20M", "macs=30%..20M"]
)
def test_a_range_that_is_none_is_refused_with_an_example(text):
    with pytest.raises(UserError) as error:
        parse_budget(text)
    expected = "budget: a range goes from a smaller to a larger share, as in macs=30%..80%; got "
    assert str(error.value) == expected + repr(text)


@pytest.mark.parametrize(
    "text",
    ["macs=30%..", "flops=30%..80%", "macs=..80%", "macs=0%..80%", "macs=30%..150%"],
)
def test_a_range_with_a_wrong_end_is_refused_as_that_end_would_be(text):
    with pytest.raises(
        UserError,
        match=r"budget: (unknown metric|.* is no number|the target must be)",
    ):
        parse_budget(text)


@pytest.mark.parametrize("position", [0, 0.0001, 0.5, 0.9999, 1])
def test_every_budget_of_a_range_lies_within_it(position):
    asked = parse_budget("macs=33.333%..66.666%")
    assert 0.33333 <= asked.at_position(position).share <= 0.66666


@pytest.mark.parametrize("share", [0.07, 0.1, 0.29, 1 / 8, 0.123456, 0.999])
def test_budget_survives_its_own_text(share):
    assert Budget.parse(str(Budget("macs", share=share))) == Budget("macs", share=share)


def test_target_never_exceeds_the_share():
    table = costs("chain")
    dense = NETS["chain"].macs
    assert Budget.parse("macs=100%").target(table) == dense
    for percent in range(1, 101):
        target = Budget.parse(f"macs={percent}%").target(table)
        assert target == dense * percent // 100
    assert Budget.parse("macs=9999").target(table) == 9999


SPACES = [
    ("resnet20", "macs", 2, 0.9),
    ("resnet20", "params", 1, 0.8),
    ("resnet20_b", "macs", 8, 0.9),
    ("mobilenet_v1_cifar", "macs", 8, 0.7),
    ("concat", "macs", 1, 0.9),
    ("padded_shortcut", "params", 2, 0.5),
    ("flatten", "macs", 3, 0.9),
]


@pytest.mark.parametrize(("name", "metric", "round_to", "max_sparsity"), SPACES)
def test_every_walk_meets_the_budget_and_leaves_no_room_for_a_step(
    name, metric, round_to, max_sparsity
):
    space = SearchSpace(costs(name), metric, round_to, max_sparsity)
    floor, dense = space.cost(space.low), space.cost(space.high)
    generator = np.random.default_rng(0)
    for episode in range(200 if len(space.levels) < 12 else 60):
        target = int(generator.uniform(floor, dense)) if episode else floor
        wishes = generator.uniform(-0.5, 1.5, len(space.levels))
        kept = space.allocate(
            target, lambda index, uniform, wishes=wishes: wishes[index]
        )
        assert_meets(space, kept, target)


def assert_meets(space: SearchSpace, kept: np.ndarray, target: int) -> None:
    assert space.cost(kept) <= target
    for index, (count, levels) in enumerate(zip(kept, space.levels, strict=True)):
        assert count in levels
        if count < levels[-1]:
            grown = kept.copy()
            grown[index] = levels[levels > count][0]
            assert space.cost(grown) > target


@pytest.mark.parametrize(("name", "metric", "round_to", "max_sparsity"), SPACES)
def test_feasible_counts_are_never_none_and_always_lead_to_the_budget(
    name, metric, round_to, max_sparsity
):
    space = SearchSpace(costs(name), metric, round_to, max_sparsity)
    floor, dense = space.cost(space.low), space.cost(space.high)
    generator = np.random.default_rng(1)
    for _ in range(20):
        target, kept = int(generator.uniform(floor, dense)), space.costs.dense.copy()
        for index, levels in enumerate(space.levels):
            low, high = space.feasible_range(kept, index, target)
            assert low <= high
            assert low in levels
            assert high in levels
            least = np.concatenate([kept[:index], [high], space.low[index + 1 :]])
            assert space.cost(least) <= target
            if high < levels[-1]:
                least[index] = levels[levels > high][0]
                assert space.cost(least) > target
            if (
                low > levels[0] and low < high
            ):  # fewer would leave budget over even if all others stay whole
                most = np.concatenate(
                    [kept[:index], [levels[levels < low][-1]], space.high[index + 1 :]]
                )
                assert space.cost(most) < target
            kept[index] = generator.choice([low, high])


@pytest.mark.parametrize(
    "name", ["resnet20", "resnet20_b", "mobilenet_v2_cifar", "concat"]
)
def test_uniform_to_go_is_the_sparsity_that_meets_the_target_from_here(name):
    space = SearchSpace(costs(name), round_to=1)
    dense, target = space.costs.dense, space.cost(space.high) // 2
    for index in (0, 1, len(dense) - 1):
        kept = dense.copy()
        kept[:index] = (dense[:index] + 1) // 2
        sparsity = space.uniform_to_go(kept, index, target)
        trial = kept.astype(float)
        trial[index:] = np.clip(
            dense[index:] * (1 - sparsity), space.low[index:], space.high[index:]
        )
        reached = space.costs.continuous_cost("macs", trial)
        bounded = sparsity > 1 - 1e-3 or sparsity < 1e-3
        assert bounded or reached == pytest.approx(target, rel=1e-4)


def test_uniform_to_go_at_the_extremes_is_nothing_or_everything():
    space = SearchSpace(costs("chain"), round_to=1)
    assert space.uniform_to_go(
        space.costs.dense, 0, space.cost(space.high)
    ) == pytest.approx(0, abs=1e-5)
    assert space.uniform_to_go(space.costs.dense, 0, 0) == 1


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2_cifar", "concat"])
def test_uniform_allocation_is_even_within_rounding(name):
    space = SearchSpace(costs(name), round_to=1)
    target = space.cost(space.high) // 2
    kept = space.uniform(target)
    assert_meets(space, kept, target)
    sparsity = 1 - kept / space.costs.dense
    assert np.ptp(sparsity) <= 2 / space.costs.dense.min()


@pytest.mark.parametrize(
    ("channels", "round_to", "max_sparsity", "levels"),
    [
        (16, 2, 0.9, [2, 4, 6, 8, 10, 12, 14, 16]),
        (16, 8, 0.9, [8, 16]),
        (15, 4, 0.5, [8, 12, 15]),
        (6, 1, 0.5, [3, 4, 5, 6]),
        (6, 8, 0.9, [6]),
        (2, 1, 0.9, [1, 2]),
        (10, 1, 0.9, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        (5, 1, 0, [5]),
    ],
)
def test_levels_are_multiples_down_to_the_largest_sparsity_and_all_channels(
    channels, round_to, max_sparsity, levels
):
    table = CostTable(traced("chain"))
    table.dense = np.array([channels, 8])
    assert (
        SearchSpace(table, "macs", round_to, max_sparsity).levels[0].tolist() == levels
    )


def test_fill_grows_only_by_levels_and_only_within_the_target():
    space = SearchSpace(costs("resnet20"), round_to=4, max_sparsity=0.75)
    low, target = space.low.copy(), space.cost(space.high) // 3
    filled = space.fill(low, target)
    assert_meets(space, filled, target)
    assert (filled >= low).all()
    assert (low == space.low).all()
    assert (
        space.fill(space.high, target) == space.high
    ).all()  # already above: nothing to spend


def test_many_allocations_are_filled_as_each_would_be():
    space, generator = SearchSpace(costs("resnet20")), np.random.default_rng(0)
    kept = np.array(
        [[generator.choice(levels) for levels in space.levels] for _ in range(20)]
    )
    targets = generator.integers(space.cost(space.low), space.cost(space.high), (4, 5))
    filled = space.fill(kept.reshape(4, 5, -1), targets)
    alone = [
        space.fill(row, int(target))
        for row, target in zip(kept, targets.flat, strict=True)
    ]
    assert filled.shape == (4, 5, len(space.levels))
    assert filled.reshape(20, -1).tolist() == np.array(alone).tolist()
    assert len({tuple(row) for row in filled.reshape(20, -1) - kept}) > 2


def test_infeasible_budget_is_refused_with_the_reachable_floor():
    space = SearchSpace(costs("chain"), round_to=2, max_sparsity=0.5)
    floor, dense = space.cost(np.array([4, 4])), NETS["chain"].macs
    budget = Budget.parse("macs=1%")
    with pytest.raises(UserError) as error:
        space.check(budget.target(space.costs), budget)
    assert str(error.value) == (
        f"budget: macs=1% is below the reachable floor; with max_sparsity 0.5 and "
        f"round_to 2 this network needs "
        f"macs={floor} ({floor / dense:.1%}) or more"
    )
    space.check(floor, budget)
    with pytest.raises(UserError, match=f"needs macs={floor} "):
        space.check(floor - 1, Budget("macs", amount=floor - 1))


def test_nearest_level_stays_within_bounds():
    space = SearchSpace(costs("resnet20"), round_to=4)
    assert space.nearest_count(0, 0.5, (4, 16)) == 8
    assert space.nearest_count(0, 0.99, (8, 16)) == 8
    assert space.nearest_count(0, -1, (4, 12)) == 12


def allocation(groups: Groups, **changes) -> dict:
    data = Allocation(
        {name: 2 for name in groups.channels}, groups.fingerprint, "macs=50%", "uniform"
    ).to_json()
    return {**data, **changes}


def test_allocation_survives_json(tmp_path):
    groups = traced("chain")
    made = Allocation(
        {"conv1": 3, "conv2": 8}, groups.fingerprint, "macs=50%", "episode 12"
    )
    path = tmp_path / "allocation.json"
    path.write_text(json.dumps(made.to_json()))
    assert Allocation.read(path, groups) == made
    assert Allocation.read(str(path), groups) == made


def test_allocation_by_a_person_needs_only_counts_and_network(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"kept": {"conv1": 3, "conv2": 8}, "network": ""}))
    assert Allocation.read(path, traced("chain")).kept == {"conv1": 3, "conv2": 8}


def test_missing_allocation_is_named(tmp_path):
    with pytest.raises(UserError) as error:
        Allocation.read(tmp_path / "none.json", traced("chain"))
    assert str(error.value) == f"allocation: no file {str(tmp_path / 'none.json')!r}"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"kept": 3, "network": ""}', '{"network": ""}']
)
def test_damaged_allocation_is_named(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        Allocation.read(path, traced("chain"))
    assert str(error.value).startswith(
        f"allocation: {str(path)!r} is damaged or no allocation ("
    )


def test_binary_file_is_no_allocation(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(
        UserError, match=r"a\.json' is damaged or no allocation \(UnicodeDecodeError"
    ):
        Allocation.read(path, traced("chain"))


@pytest.mark.parametrize(
    ("kept", "stranger"),
    [
        ({"conv1": 2}, "conv2"),
        ({"conv1": 2, "conv2": 2, "conv9": 2}, "conv9"),
        ({}, "conv1"),
    ],
)
def test_allocation_for_another_network_names_the_stranger(kept, stranger):
    with pytest.raises(UserError) as error:
        Allocation(kept, "").check(traced("chain"))
    where = f"group {stranger!r} exists in only one of the two"
    assert (
        str(error.value)
        == f"allocation: it is for another network or another exclude: {where}"
    )


def test_allocation_by_hand_needs_no_fingerprint_but_a_wrong_one_is_refused(tmp_path):
    path, groups = tmp_path / "a.json", traced("chain")
    path.write_text('{"kept": {"conv1": 3, "conv2": 8}}')
    assert Allocation.read(path, groups).kept == {"conv1": 3, "conv2": 8}
    path.write_text('{"kept": {"conv1": 3, "conv2": 8}, "network": "0123"}')
    with pytest.raises(
        UserError, match=rf"fingerprint 0123, this one has {groups.fingerprint}\); take"
    ):
        Allocation.read(path, groups)


@pytest.mark.parametrize("count", [0, -1, 7, 2.0, "3", None, True])
def test_count_outside_a_groups_channels_is_refused_with_the_range(count):
    with pytest.raises(UserError) as error:
        Allocation({"conv1": count, "conv2": 8}, "").check(traced("chain"))
    assert (
        str(error.value)
        == f"allocation: group 'conv1' keeps {count!r}; allowed are 1 to 6 channels"
    )


def test_counts_of_the_search_are_json(tmp_path):
    space = SearchSpace(costs("chain"))
    kept = space.uniform(NETS["chain"].macs // 2)
    text = json.dumps(
        Allocation(
            dict(zip(space.costs.names, kept.tolist(), strict=True)), "x"
        ).to_json()
    )
    assert json.loads(text)["kept"] == {"conv1": int(kept[0]), "conv2": int(kept[1])}
    assert torch.tensor(kept).dtype == torch.int64
