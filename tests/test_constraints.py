"""What the user excludes is never pruned; widths keep to the multiples and least widths
asked for; budgets hold.
"""

import functools
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from nets import NETS, build, images
from toys import fake_env, run_episode, traced

from autoprune.config import SearchConfig
from autoprune.costs.budget import Budget
from autoprune.costs.constraints import numbers_per_group, pin_excluded, search_limits
from autoprune.costs.cost import CostTable
from autoprune.costs.search_space import SearchSpace
from autoprune.data import models
from autoprune.errors import UserError
from autoprune.structure.groups import Groups, named_tensors
from autoprune.structure.slicing import prune
from autoprune.tracing.trace import trace

NETWORKS = [
    "chain",
    "residual",
    "concat",
    "depthwise",
    "padded_shortcut",
    "conv_groups",
    "attention",
    "resnet20_b",
]
NETWORKS += ["mobilenet_v2_cifar"]


@functools.cache
def network(name: str) -> tuple[torch.nn.Module, Groups]:
    model, size = (
        (build(name), NETS[name].size)
        if name in NETS
        else (models.build(name).eval(), 32)
    )
    return model, trace(model, images(1, size), verify=False)


def some_of(groups: Groups, generator: np.random.Generator) -> list[str]:
    """Names of at least one prunable group."""
    names = list(groups.channels)
    return list(
        generator.choice(names, generator.integers(1, len(names) + 1), replace=False)
    )


def axes_of(groups: Groups, names: Iterable[str]) -> set[tuple[str, int]]:
    """Every tensor and axis in which channels of the named groups sit."""
    return {
        (member.tensor, member.axis)
        for group in groups.all
        if group.name in names
        for member in group.members
    }


@pytest.mark.parametrize("name", NETWORKS)
def test_excluded_groups_never_change_and_the_others_are_pruned_as_before(name):
    model, groups = network(name)
    generator = np.random.default_rng(0)
    for _ in range(3):
        excluded = some_of(groups, generator)
        rest = pin_excluded(groups, excluded)
        assert rest.channels.keys() <= groups.channels.keys() - set(excluded)
        kept = {
            n: torch.arange(int(generator.integers(1, c + 1)))
            for n, c in rest.channels.items()
        }
        pruned, same = prune(model, rest, kept), prune(model, groups, kept)
        shapes = {n: tensor.shape for n, tensor in named_tensors(pruned).items()}
        assert shapes == {n: tensor.shape for n, tensor in named_tensors(same).items()}
        whole = axes_of(
            groups, groups.channels.keys() - rest.channels.keys()
        ) - axes_of(groups, rest.channels)
        assert whole
        assert all(
            shapes[tensor][axis] == groups.shapes[tensor][axis]
            for tensor, axis in whole
        )


@pytest.mark.parametrize("name", NETWORKS)
def test_costs_with_excluded_groups_are_those_with_the_groups_kept_whole(name):
    _, groups = network(name)
    generator = np.random.default_rng(1)
    for _ in range(5):
        rest = pin_excluded(groups, some_of(groups, generator))
        kept = {n: int(generator.integers(1, c + 1)) for n, c in rest.channels.items()}
        before, after = CostTable(groups), CostTable(rest)
        for metric in ("macs", "params", "memory"):
            assert after.metrics[metric](kept) == before.metrics[metric](kept), metric


def test_a_pattern_means_groups_by_name_and_layers_by_what_they_read_or_produce():
    _, groups = network("chain")  # stem -> conv1 -> conv2 -> head
    assert [
        g.name for g in pin_excluded(groups, ["conv2"])
    ] == []  # it reads conv1's channels and produces its own
    assert [g.name for g in pin_excluded(groups, ["head"])] == ["conv1"]
    _, groups = network("resnet20_b")
    left = [g.name for g in pin_excluded(groups, ["layer1.*", "layer2.?.conv1"])]
    assert left == [
        "layer3.0.conv1",
        "layer3.0.conv2",
        "layer3.1.conv1",
        "layer3.2.conv1",
    ]


def test_the_reason_names_the_pattern_and_other_reasons_stay():
    _, groups = network("resnet20_b")
    before = {group.name: group.pinned for group in groups.pinned}
    after = {
        group.name: group.pinned
        for group in pin_excluded(groups, ["layer2.1.conv1", "*"]).pinned
    }
    assert {name: after[name] for name in before} == before
    assert after["layer2.1.conv1"] == "user asked (exclude layer2.1.conv1)"
    assert after["layer1.0.conv1"] == "user asked (exclude *)"


def test_excluding_nothing_changes_nothing_and_the_trace_is_left_as_found():
    _, groups = network("chain")
    assert pin_excluded(groups, SearchConfig(exclude=" , ").excluded).all == groups.all
    pin_excluded(groups, ["*"])
    assert groups.channels == NETS["chain"].groups


@pytest.mark.parametrize(
    "options",
    [{"exclude": "conv9"}, {"min_width": "conv9=4"}, {"round_to_for": "conv9=4"}],
)
def test_a_pattern_that_means_nothing_is_refused_with_names_that_exist(options):
    _, groups = network("chain")
    config, (flag,) = SearchConfig(**options), options
    with pytest.raises(
        UserError,
        match=rf"^{flag}: no group or layer is called 'conv9'; there are e\.g\. conv",
    ):
        search_limits(pin_excluded(groups, config.excluded), config)


@pytest.mark.parametrize(
    "text",
    ["conv1", "conv1=", "=4", "conv1=0", "conv1=-2", "conv1=2.5", "conv1=4,conv2=x"],
)
@pytest.mark.parametrize("flag", ["min_width", "round_to_for"])
def test_numbers_by_pattern_that_cannot_be_read_are_refused_with_the_value(flag, text):
    with pytest.raises(
        UserError, match=rf"^{flag}: expected PATTERN=N.*got '{text.split(',')[-1]}'"
    ):
        SearchConfig(**{flag: text})


def test_the_last_pattern_that_means_a_group_counts():
    _, groups = network("resnet20_b")
    numbers = SearchConfig(round_to_for="*=8, layer3.*=4,layer3.1.conv1=1").multiples
    values = numbers_per_group(
        groups, "round_to_for", numbers, dict.fromkeys(groups.channels, 2)
    )
    assert values["layer1.0.conv1"] == 8
    assert values["layer3.0.conv1"] == 4
    assert values["layer3.1.conv1"] == 1
    assert set(
        numbers_per_group(
            groups, "round_to_for", {}, dict.fromkeys(groups.channels, 2)
        ).values()
    ) == {2}


LIMITS = [
    {"min_width": "*=6"},
    {"round_to_for": "*=4,layer2.*=3"},
    {
        "min_width": "layer1.*=10,layer3.*=7",
        "round_to_for": "layer3.*=8",
        "round_to": 3,
    },
    {"min_width": "*=1000,layer3.*=2"},
]


@pytest.mark.parametrize("metric", ["macs", "params"])
@pytest.mark.parametrize("options", LIMITS, ids=str)
def test_walks_meet_every_budget_down_to_the_floor_within_the_limits_of_each_group(
    options, metric
):
    _, groups = network("resnet20_b")
    limits = search_limits(groups, SearchConfig(**{"round_to": 2} | options))
    space = SearchSpace(CostTable(groups), metric, **limits)
    dense, generator = space.costs.dense, np.random.default_rng(2)
    multiples, widths = (
        np.array([limits[k][n] for n in space.costs.names])
        for k in ("round_to", "min_width")
    )
    floor, full = space.cost(space.low), space.cost(dense)
    for episode in range(40):
        target = int(generator.uniform(floor, full)) if episode else floor
        wishes = generator.uniform(-0.5, 1.5, len(dense))
        kept = space.allocate(target, lambda index, _, wishes=wishes: wishes[index])
        assert space.cost(kept) <= target
        assert ((kept % multiples == 0) | (kept == dense)).all()
        assert (kept >= np.minimum(widths, dense)).all()
        for index, levels in enumerate(space.levels):
            for more in levels[levels > kept[index]][:1]:
                assert (
                    space.cost(np.where(np.arange(len(dense)) == index, more, kept))
                    > target
                )
    budget = Budget(metric, amount=floor - 1)
    with pytest.raises(UserError, match=rf"needs {metric}={floor} "):
        space.check(floor - 1, budget)


def test_the_floor_names_the_limits_that_keep_it_up():
    _, groups = network("resnet20_b")
    limits = search_limits(
        groups, SearchConfig(round_to=2, min_width="*=8", round_to_for="layer1.*=4")
    )
    with pytest.raises(
        UserError,
        match=r"with max_sparsity 0\.9, min_width 8 and round_to 2 to 4 this network",
    ):
        SearchSpace(CostTable(groups), "macs", **limits).check(
            1, Budget("macs", amount=1)
        )


def test_one_number_stands_for_all_groups_and_groups_left_out_of_a_mapping_are_free():
    _, groups = network("chain")
    table = CostTable(groups)
    assert [levels[0] for levels in SearchSpace(table, "macs", 2, 0.9, 4).levels] == [
        4,
        4,
    ]
    mapped = SearchSpace(table, "macs", {"conv2": 4}, 0.9, {"conv1": 5}).levels
    assert [levels.tolist() for levels in mapped] == [[5, 6], [4, 8]]
    with pytest.raises(
        UserError, match="min_width: no prunable group is called 'conv3'"
    ):
        SearchSpace(table, "macs", min_width={"conv3": 2})


def test_episodes_keep_excluded_groups_out_and_the_others_within_their_limits():
    _, groups, _ = traced("wide")
    names = list(groups.channels)
    env = fake_env(
        "wide",
        budget="macs=60%",
        round_to=dict.fromkeys(names, 4),
        min_width={names[1]: 24},
    )
    generator = np.random.default_rng(3)
    for _ in range(30):
        info = run_episode(env, lambda _: generator.uniform(-1, 1))
        kept = info["allocation"].kept
        assert info["cost"] <= info["target"]
        assert kept[names[1]] >= 24
        assert all(count % 4 == 0 for count in kept.values())
