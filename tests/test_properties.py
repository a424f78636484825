"""What holds for every network and every allocation: pruned equals masked, costs are
exact, inputs are left as found.

The tests run network by network, so that each is traced once and then forgotten.
"""

import copy
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pytest
import torch
from nets import (
    NETS,
    build,
    counted_macs,
    difference,
    images,
    outputs,
    random_kept,
    randomise,
    tensors,
)
from torch import Tensor, nn

from autoprune.costs.cost import CostTable
from autoprune.costs.search_space import SearchSpace
from autoprune.data import models
from autoprune.structure.attention import open_attention
from autoprune.structure.groups import Groups
from autoprune.structure.slicing import fit_shapes, prune
from autoprune.tracing.masking import mask
from autoprune.tracing.trace import trace

TORCHVISION = ("resnet18", "resnet34", "resnet50")
SLOW = ("resnet110", "resnet110_b", "vgg16_bn_cifar", *TORCHVISION)
SMALL = [name for name, net in NETS.items() if net.groups]
NAMES = (*SMALL, *models.MODELS, *TORCHVISION)


@dataclass
class Case:
    """One network with random weights, traced."""

    name: str

    def fresh(self) -> nn.Module:
        """The network as a user builds it anew, with other weights."""
        return NETS[self.name].build() if self.name in NETS else models.build(self.name)

    @cached_property
    def model(self) -> nn.Module:
        return (
            build(self.name)
            if self.name in NETS
            else randomise(models.build(self.name)).eval()
        )

    @property
    def size(self) -> int:
        return (
            NETS[self.name].size
            if self.name in NETS
            else 64
            if self.name in TORCHVISION
            else 32
        )

    @property
    def seeds(self) -> range:
        """Random allocations to try."""
        return range(4 if self.name in NETS else 1 if self.name in SLOW else 2)

    @cached_property
    def groups(self) -> Groups:
        return trace(self.model, images(1, self.size), verify=self.name in NETS)

    @cached_property
    def costs(self) -> CostTable:
        return CostTable(self.groups)


@pytest.fixture(scope="module", params=NAMES)
def case(request) -> Case:
    return Case(request.param)


def counts(kept: dict[str, Tensor]) -> dict[str, int]:
    return {name: len(channels) for name, channels in kept.items()}


def test_pruned_equals_masked_and_masking_changes_the_output(case):
    x = images(2, case.size)
    dense = outputs(case.model, x)
    for seed in case.seeds:
        kept = random_kept(case.groups, seed)
        masked = outputs(mask(case.model, case.groups, kept), x)
        assert (
            difference(outputs(prune(case.model, case.groups, kept), x), masked) < 1e-4
        )
        assert difference(dense, masked) > 1e-3


def test_predicted_costs_equal_counted_costs(case):
    for seed in case.seeds:
        kept = random_kept(case.groups, seed)
        pruned = prune(case.model, case.groups, kept)
        assert case.costs.macs(counts(kept)) == counted_macs(pruned, case.size)
        assert case.costs.params(counts(kept)) == sum(
            p.numel() for p in pruned.parameters()
        )


def test_keeping_everything_is_the_identity(case):
    everything = {group.name: torch.arange(group.channels) for group in case.groups}
    for kept in (everything, {}):
        same = prune(case.model, case.groups, kept)
        state = same.state_dict()
        assert all(
            torch.equal(state[name], tensor)
            for name, tensor in case.model.state_dict().items()
        )
    # Attention comes out opened, whose sums run in another order.
    dense = open_attention(copy.deepcopy(case.model))
    torch.testing.assert_close(
        outputs(dense, images(1, case.size)), outputs(case.model, images(1, case.size))
    )
    assert torch.equal(
        outputs(same, images(1, case.size)), outputs(dense, images(1, case.size))
    )
    assert case.costs.macs({}) == counted_macs(case.model, case.size)
    assert case.costs.params(case.costs.dense) == sum(
        p.numel() for p in case.model.parameters()
    )


def test_costs_grow_with_every_kept_channel(case):
    generator = np.random.default_rng(0)
    for metric in ("macs", "params"):
        for _ in range(5):
            kept = generator.integers(1, case.costs.dense + 1)
            for index in np.flatnonzero(kept < case.costs.dense):
                grown = kept.copy()
                grown[index] += 1
                assert case.costs.metrics[metric](grown) > case.costs.metrics[metric](
                    kept
                )


def test_uniform_allocation_meets_every_reachable_budget(case):
    space = SearchSpace(case.costs, round_to=1)
    floor, dense = space.cost(space.low), space.cost(space.high)
    for share in (0.0, 0.37, 0.5, 1.0):
        target = int(floor + share * (dense - floor))
        kept = space.uniform(target)
        assert space.cost(kept) <= target
        assert (space.low <= kept).all()
        assert (kept <= space.high).all()


def test_model_is_bit_identical_after_pruning_and_masking(case):
    before, classes = (
        copy.deepcopy(case.model.state_dict()),
        [vars(m).copy() for m in case.model.modules()],
    )
    kept = random_kept(case.groups, 0)
    pruned, masked = (
        prune(case.model, case.groups, kept),
        mask(case.model, case.groups, kept),
    )
    for tensor in (*tensors(pruned), *tensors(masked)):
        tensor.zero_()
    assert all(
        torch.equal(before[name], tensor)
        for name, tensor in case.model.state_dict().items()
    )
    assert [vars(m).keys() for m in case.model.modules()] == [
        before.keys() for before in classes
    ]
    assert not case.model.training
    assert all(p.requires_grad and p.grad is None for p in case.model.parameters())


def test_pruned_network_trains_a_step_and_reloads_bit_identically(case, tmp_path):
    pruned = prune(case.model, case.groups, random_kept(case.groups, 1)).train()
    before = [p.detach().clone() for p in pruned.parameters()]
    optimizer = torch.optim.SGD(pruned.parameters(), lr=0.01)
    output = pruned(images(2, case.size))
    (
        output["logits"] if isinstance(output, dict) else output
    ).square().mean().backward()
    assert all(
        p.grad is not None and p.grad.shape == p.shape for p in pruned.parameters()
    )
    optimizer.step()
    assert any(
        not torch.equal(a, b) for a, b in zip(before, pruned.parameters(), strict=True)
    )

    pruned.eval()
    torch.save(pruned.state_dict(), tmp_path / "pruned.pt")
    reloaded = case.fresh().eval()
    fit_shapes(reloaded, torch.load(tmp_path / "pruned.pt", weights_only=True))
    (tmp_path / "pruned.pt").unlink()
    assert all(
        torch.equal(a, b)
        for a, b in zip(tensors(reloaded), tensors(pruned), strict=True)
    )
    x = images(2, case.size, seed=1)
    assert torch.equal(outputs(reloaded, x), outputs(pruned, x))


@pytest.mark.parametrize("name", SMALL)
def test_pruned_equals_masked_to_rounding_in_float64(name):
    case, x = Case(name), images(3, NETS[name].size, torch.float64)
    model = case.model.double()
    for seed in range(10):
        kept = random_kept(case.groups, seed)
        masked = outputs(mask(model, case.groups, kept), x)
        assert difference(outputs(prune(model, case.groups, kept), x), masked) < 1e-9


@pytest.mark.parametrize("name", SMALL)
def test_single_channels_are_enough_for_every_group(name):
    case, x = Case(name), images(3, NETS[name].size, torch.float64)
    model = case.model.double()
    kept = {group.name: torch.tensor([group.channels - 1]) for group in case.groups}
    masked = outputs(mask(model, case.groups, kept), x)
    assert difference(outputs(prune(model, case.groups, kept), x), masked) < 1e-9
    assert case.costs.macs(counts(kept)) == counted_macs(
        prune(model, case.groups, kept), case.size
    )
