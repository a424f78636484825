"""Costs by hand: formulas in named dimensions for MACs and parameters, an independent
sum for memory.
"""

import numpy as np
import pytest
import torch
from nets import AREA, CLASSES, NETS, RGB, K, build, images, tensors
from torch import nn

from autoprune.costs.cost import CostTable
from autoprune.costs.metrics import BYTES
from autoprune.data import models
from autoprune.structure.slicing import prune
from autoprune.tracing.trace import trace


def table(name: str, verify: bool = True) -> CostTable:
    return CostTable(trace(build(name), images(1, NETS[name].size), verify=verify))


@pytest.mark.parametrize("name", NETS)
def test_dense_macs_are_the_formula(name):
    assert table(name).macs({}) == NETS[name].macs


def test_chain_follows_its_formula_at_every_allocation():
    costs = table("chain")
    for first in range(1, 7):
        for second in range(1, 9):
            macs = (
                AREA * K * RGB * first
                + AREA // 4 * K * first * second
                + second * CLASSES
            )
            weights = K * RGB * first + K * first * second + second * CLASSES
            others = (
                3 * first + 3 * second + CLASSES
            )  # bias, batch norm's scale and shift; the head's bias
            kept = {"conv1": first, "conv2": second}
            assert costs.macs(kept) == macs
            assert costs.params(kept) == weights + others


def test_concat_adds_both_branches_on_the_consumers_axis():
    costs = table("concat")
    for left, right, body in [(1, 1, 1), (4, 6, 8), (2, 5, 3), (3, 1, 8)]:
        macs = (
            AREA * K * (RGB * (left + right) + (left + right) * body) + body * CLASSES
        )
        assert costs.macs({"left": left, "right": right, "body": body}) == macs


def test_channels_that_reach_a_layer_twice_count_twice():
    costs = table("self_concat")
    assert costs.macs({"stem": 2}) == AREA * K * RGB * 2 + 2 * 2 * CLASSES


def test_depthwise_multiplier_makes_each_channel_count_for_two():
    costs = table("depthwise_multiplier")
    assert costs.macs({"stem": 5, "pointwise": 3}) == (
        AREA * (K * RGB * 5 + K * 2 * 5 + 2 * 5 * 3) + 3 * CLASSES
    )


def test_flattened_channels_count_once_a_position():
    costs = table("flatten")
    assert (
        costs.macs({"stem": 3, "hidden": 2})
        == 12**2 * (K * RGB * 3 + 3 * 2) + 2 * CLASSES
    )


def test_shared_layers_cost_every_use_but_have_their_parameters_once():
    for name in ("shared", "two_names"):
        costs = table(name)
        assert costs.macs({"stem": 4}) == AREA * K * (RGB * 4 + 2 * 4 * 4) + 4 * CLASSES
        assert costs.params({"stem": 4}) == (K * RGB * 4 + 4) + (K * 4 * 4 + 4) + (
            4 * CLASSES + CLASSES
        )


def test_zeros_of_a_padded_shortcut_cost_what_they_cost():
    costs = table(
        "padded_shortcut"
    )  # of the outer layer's 8 channels 4 are the stream's, 4 meet zeros and stay
    assert costs.macs({"stem": 1, "inner": 2}) == (
        AREA * K * RGB * 1 + AREA // 4 * K * (1 * 2 + 2 * (4 + 1)) + (4 + 1) * CLASSES
    )


def largest_operation(model: nn.Module, x: torch.Tensor) -> int:
    """Elements that the hungriest module reads and writes, one sample, measured while
    it runs.
    """
    sizes = []
    hooks = [
        module.register_forward_hook(
            lambda _, inputs, output: sizes.append(inputs[0].numel() + output.numel())
        )
        for module in model.modules()
        if not list(module.children())
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return max(sizes)


def test_memory_is_weights_plus_the_hungriest_operation_of_the_pruned_chain():
    model, x = build("chain"), images(1, 8)
    groups = trace(model, x)
    costs = CostTable(groups)
    for first, second in [(6, 8), (3, 8), (6, 2), (1, 1), (2, 5)]:
        kept = {"conv1": torch.arange(first), "conv2": torch.arange(second)}
        pruned = prune(model, groups, kept)
        by_hand = max(
            AREA * (RGB + first),  # conv1
            AREA * (first + first),  # batch norm, ReLU
            AREA * first + AREA // 4 * second,  # conv2
        )
        assert largest_operation(pruned, x) == by_hand
        elements = sum(tensor.numel() for tensor in tensors(pruned))
        assert costs.memory({"conv1": first, "conv2": second}) == BYTES * (
            elements + by_hand
        )


def test_counts_come_as_mapping_or_as_array_in_forward_order():
    costs = table("chain")
    assert costs.names == ["conv1", "conv2"]
    assert costs.dense.tolist() == [6, 8]
    for metric in costs.metrics.values():
        assert metric({"conv1": 2, "conv2": 5}) == metric(np.array([2, 5]))
        assert metric({"conv2": 5}) == metric(np.array([6, 5]))
        assert type(metric({})) is int


def test_continuous_curve_passes_through_the_exact_values_and_between_them():
    costs = table("residual")
    for metric in costs.metrics:
        at = [
            costs.continuous_cost(metric, np.array([5.0, width]))
            for width in (3, 3.5, 4)
        ]
        assert at[0] == costs.metrics[metric](np.array([5, 3]))
        assert at[2] == costs.metrics[metric](np.array([5, 4]))
        assert at[0] < at[1] < at[2]


def test_large_networks_do_not_overflow():
    costs = table("chain")
    assert costs.macs(np.array([2**20, 2**20])) > AREA // 4 * K * 2**40


@pytest.mark.parametrize("name", [name for name, net in NETS.items() if net.groups])
def test_arrays_of_counts_cost_what_each_row_costs_and_what_its_mapping_costs(name):
    costs, generator = table(name, verify=False), np.random.default_rng(0)
    kept = np.stack(
        [generator.integers(1, costs.dense + 1) for _ in range(12)]
    ).reshape(3, 4, -1)
    for metric, cost in costs.metrics.items():
        together = cost(kept)
        assert together.shape == (3, 4)
        assert together.dtype == np.int64
        rows = [[cost(row) for row in block] for block in kept]
        assert together.tolist() == rows
        assert rows == [
            [cost(dict(zip(costs.names, map(int, row), strict=True))) for row in block]
            for block in kept
        ]
        assert costs.continuous_cost(metric, kept.astype(float)) == pytest.approx(
            together
        )


def test_pfecs_resnet56_b_has_its_published_macs():
    """Li et al. 2017: 60, 30 and 10 % of the first convolution of most blocks; 27.6 %
    of 125.5 M MACs are saved.
    """
    model = models.build("resnet56")
    costs = CostTable(trace(model, torch.zeros(1, 3, 32, 32), verify=False))
    blocks = [
        f"layer{stage}.{number}.conv1" for stage in (1, 2, 3) for number in range(9)
    ]
    left_whole = {7, 8, 9, 16, 18, 26}  # their layers 16, 18, 20, 34, 38 and 54
    shares = {1: 0.6, 2: 0.3, 3: 0.1}
    kept = {
        name: int(costs.dense[costs.names.index(name)] * (1 - shares[number // 9 + 1]))
        for number, name in enumerate(blocks)
        if number not in left_whole
    }
    assert costs.macs(kept) == pytest.approx(90.9e6, abs=0.5e6)


def test_a_table_with_one_metric_more_leaves_the_other_as_it_is():
    costs = table("chain")
    extended = costs.with_metric("weights", costs.metrics["params"])
    assert "weights" not in costs.metrics
    assert extended.metrics["weights"]({"conv1": 2}) == costs.params({"conv1": 2})
    assert extended.macs({"conv1": 2}) == costs.macs({"conv1": 2})
    counts = np.array([2.5, 3.0])
    assert extended.continuous_cost("weights", counts) == costs.continuous_cost(
        "params", counts
    )


def test_memory_of_arrays_is_the_largest_operation_and_never_falls_with_a_count():
    costs, generator = table("residual"), np.random.default_rng(1)
    kept = generator.integers(1, costs.dense, (50, len(costs.dense)))
    memory = costs.memory(kept)
    for index in range(len(costs.dense)):
        grown = kept.copy()
        grown[:, index] += 1
        assert (costs.memory(grown) >= memory).all()
        between = kept.astype(float)
        between[:, index] += 0.5
        halfway = costs.continuous_cost("memory", between)
        assert (halfway >= memory).all()
        assert (halfway <= costs.memory(grown)).all()
