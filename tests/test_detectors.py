"""A YOLO-like detector and a U-Net lose channels everywhere but at their ends, and
compute what they should.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from contracts import Findings, check_allocation
from detectors import BINS, C2f, Detector, UNet
from nets import images, outputs, random_kept, randomise, tensors
from torch import nn

from autoprune.costs.cost import CostTable
from autoprune.deploy.export import export_onnx
from autoprune.structure.groups import Groups, tensors_in
from autoprune.structure.slicing import fit_shapes, prune
from autoprune.tracing.masking import mask
from autoprune.tracing.trace import describe, trace

WIDTH = 8
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "detector": (lambda: Detector(WIDTH), 64),
    "detector_decoded": (lambda: Detector(WIDTH, halve="two_convs", decoded=True), 64),
    # At 40 the deepest maps come back smaller than their skips, so that they are
    # padded.
    "u_net": (lambda: UNet(WIDTH), 40),
    "u_net_bilinear": (lambda: UNet(WIDTH, bilinear=True), 40),
}
INPUTS = {"stem.conv:input", "inc.0:input"}
HEADS = {
    "outc",
    "detect.dfl",
    *(f"detect.cv{branch}.{scale}.2" for branch in (2, 3) for scale in range(3)),
}


@dataclass(frozen=True)
class Traced:
    """One of the networks with random weights, and its groups."""

    fresh: Callable[[], nn.Module]
    size: int
    model: nn.Module
    groups: Groups


@functools.cache
def traced(name: str) -> Traced:
    """A network of `NETWORKS`, traced once."""
    fresh, size = NETWORKS[name]
    model = randomise(fresh()).eval()
    return Traced(fresh, size, model, trace(model, images(1, size)))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_layer_but_the_heads_can_lose_outputs(name):
    case = traced(name)
    layers = {
        n
        for n, module in case.model.named_modules()
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)
    }
    for group in case.groups:
        for member in group.members:
            if member.role == "produce":
                layers.discard(member.tensor.removesuffix(".weight"))
    assert layers <= HEADS
    assert {group.name for group in case.groups.pinned} <= HEADS | INPUTS
    assert describe(case.groups)["prunable_macs_share"] > 0.99


def test_halves_of_a_chunk_shrink_alike_and_those_of_two_convolutions_apart():
    chunked, apart = traced("detector").groups, traced("detector_decoded").groups
    (member,) = [
        m
        for m in chunked["stage4.cv1.conv"].members
        if m.tensor == "stage4.cv1.conv.weight" and m.axis == 0
    ]
    half = 8 * WIDTH // 2
    assert member.index.tolist() == [[i, i + half] for i in range(half)]
    assert (
        apart["stage4.cv0.conv"].channels == apart["stage4.cv1.conv"].channels == half
    )


def test_a_pooled_map_that_is_concatenated_four_times_loses_four_inputs_a_channel():
    (consumer,) = [
        m
        for m in traced("detector").groups["sppf.cv1.conv"].consumers
        if "sppf.cv2" in m.tensor
    ]
    assert consumer.index.tolist() == [
        [i + 8 * WIDTH * part for part in range(4)] for i in range(8 * WIDTH)
    ]


@pytest.mark.parametrize("name", NETWORKS)
def test_pruned_equals_masked_and_costs_are_exact(name):
    case, findings = traced(name), Findings()
    model = prune(case.model, case.groups, {}).double()
    for kept in (
        *(random_kept(case.groups, seed) for seed in range(2)),
        {g.name: torch.tensor([0]) for g in case.groups},
    ):
        check_allocation(model, case.groups, kept, findings, case.size)
    assert findings.failures == []


@pytest.mark.parametrize("name", NETWORKS)
def test_one_channel_a_group_leaves_few_macs(name):
    costs = CostTable(traced(name).groups)
    assert costs.macs(dict.fromkeys(costs.names, 1)) < 0.02 * costs.macs({})


@pytest.mark.parametrize("name", NETWORKS)
def test_pruned_network_trains_a_step_and_is_rebuilt_bit_identically(name):
    case = traced(name)
    pruned = prune(case.model, case.groups, random_kept(case.groups, 1)).train()
    optimizer = torch.optim.SGD(pruned.parameters(), lr=0.01)
    before = [parameter.detach().clone() for parameter in pruned.parameters()]
    sum(
        output.square().mean() for output in tensors_in(pruned(images(2, case.size)))
    ).backward()
    optimizer.step()
    trained = zip(before, pruned.parameters(), strict=True)
    assert all(torch.equal(a, b) != b.requires_grad for a, b in trained)

    rebuilt = case.fresh()
    fit_shapes(rebuilt, pruned.state_dict())
    assert all(
        torch.equal(a, b)
        for a, b in zip(tensors(rebuilt), tensors(pruned), strict=True)
    )
    x = images(2, case.size, seed=1)
    assert torch.equal(outputs(rebuilt.eval(), x), outputs(pruned.eval(), x))


EXPORTED = {
    "detector": (lambda: Detector(4, decoded=True), 64),
    "u_net": (lambda: UNet(4, levels=1), 9),
}


@pytest.mark.parametrize("name", EXPORTED)
def test_pruned_networks_are_exported_with_all_their_outputs(name, tmp_path):
    build, size = EXPORTED[name]
    model, x = randomise(build()).eval(), images(1, size)
    groups = trace(model, x)
    assert (
        export_onnx(
            prune(model, groups, random_kept(groups, 0)), x, tmp_path / "network.onnx"
        )
        < 1e-4
    )


class Block(nn.Module):
    """One C2f between two convolutions."""

    def __init__(self, halve: str):
        super().__init__()
        self.stem, self.block, self.head = (
            nn.Conv2d(3, 6, 1),
            C2f(6, 8, halve=halve),
            nn.Conv2d(8, BINS, 1),
        )

    def forward(self, x):
        return self.head(self.block(self.stem(x)))


def test_sizes_in_attributes_follow_what_is_left_of_what_they_split():
    model, x = randomise(Block("split")).eval(), images(1, 8)
    groups = trace(model, x)
    assert set(groups.reasons.values()) == {
        "is the network's input",
        "feeds the network's output",
    }
    kept = random_kept(groups, 0)
    pruned, masked = prune(model, groups, kept), mask(model, groups, kept)
    torch.testing.assert_close(pruned(x), masked(x))
    assert pruned.block.c == pruned.block.m[0].cv1.conv.in_channels
