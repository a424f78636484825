"""Widths that modules keep for code that no forward pass runs, such as the fusing of
branches, follow pruning by their names.
"""

from typing import Any

import pytest
import timm
import torch
from nets import CLASSES, RGB, conv, images, pooled, random_kept, randomise
from timm.utils.model import reparameterize_model
from torch import nn
from torch.nn import functional as F

from autoprune import load_pruned, save_pruned
from autoprune.structure.slicing import prune
from autoprune.tracing.trace import trace


class Fusing(nn.Module):
    """A convolution and a batch norm beside it, which `fuse` makes one."""

    def __init__(self, n: int, groups: int = 1):
        super().__init__()
        self.in_channels = n
        self.groups = groups
        self.conv: Any = conv(n, n, groups=groups)
        self.bn: Any = nn.BatchNorm2d(n)

    def forward(self, x):
        return self.conv(x) + self.bn(x)

    def fuse(self) -> nn.Module:
        """One convolution that does the same."""
        n = self.in_channels
        fused: Any = conv(n, n, groups=self.groups)
        # Whole: the convolution's weight says how wide it is, not the attributes.
        assert fused.weight.shape == self.conv.weight.shape
        scale = self.bn.weight / (self.bn.running_var + self.bn.eps).sqrt()
        kernel = torch.zeros_like(fused.weight)
        per_group = n // self.groups
        for channel in range(n):
            kernel[channel, channel % per_group, 1, 1] = scale[channel]
        shift = self.bn.bias - self.bn.running_mean * scale
        fused.weight.data = self.conv.weight + kernel
        fused.bias.data = self.conv.bias + shift
        return fused


class Network(nn.Module):
    """Two blocks that fuse, one of them depthwise."""

    def __init__(self, n_classes: int = CLASSES):
        super().__init__()
        self.stem = conv(RGB, 8)
        self.block = Fusing(8)
        self.middle = conv(8, 6)
        self.depthwise = Fusing(6, groups=6)
        self.head = nn.Linear(6, n_classes)

    def forward(self, x):
        h = F.relu(self.block(F.relu(self.stem(x))))
        h = self.depthwise(F.relu(self.middle(h)))
        return self.head(pooled(F.relu(h)))


def fused(network: Any) -> Any:
    for name in ("block", "depthwise"):
        setattr(network, name, network.get_submodule(name).fuse())
    return network


def made(n_classes: int = CLASSES) -> nn.Module:
    """As a run's plan would name it."""
    return randomise(Network(n_classes)).eval()


def pruned_network() -> Any:
    model = made()
    groups = trace(model, images(1, 8))
    assert groups.channels == {"stem": 8, "middle": 6}
    return prune(model, groups, random_kept(groups, seed=0))


@torch.no_grad()
def test_blocks_fuse_after_pruning_as_before():
    pruned = pruned_network()
    assert pruned.block.in_channels == pruned.stem.out_channels < 8
    assert pruned.depthwise.groups == pruned.middle.out_channels < 6
    x = images(2, 8)
    before = pruned(x)
    torch.testing.assert_close(fused(pruned)(x), before, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_blocks_fuse_after_loading(tmp_path):
    pruned = pruned_network()
    plan = {"model": "test_unread_attributes:made", "n_classes": CLASSES}
    save_pruned(pruned, tmp_path, plan)
    loaded = load_pruned(tmp_path)
    x = images(2, 8)
    before = loaded(x)
    assert torch.equal(before, pruned(x))
    torch.testing.assert_close(fused(loaded)(x), before, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["mobileone_s0", "fastvit_t8"])
def test_timms_networks_are_reparameterised_after_pruning(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=CLASSES).eval()
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        if buffer_name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    x = images(1, 32)
    # The proof is another test's; here it would take most of the time.
    groups = trace(model, x, verify=False)
    pruned = prune(model, groups, random_kept(groups, seed=0))
    before = pruned(x)
    after = reparameterize_model(pruned)(x)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4 * before.abs().max())


class Keeping(nn.Module):
    """Keeps numbers under given names; `use` may read some of them as it runs."""

    def __init__(self, use=lambda block: None, **numbers: int):
        super().__init__()
        self.first, self.second = conv(8, 12), conv(12, 8)
        self.use = use
        for name, number in numbers.items():
            setattr(self, name, number)

    def forward(self, x):
        self.use(self)
        return self.second(F.relu(self.first(x)))


def kept_numbers(block: Keeping) -> dict[str, int]:
    """What is left of a block's numbers: its input keeps 5 of 8, its inner width 3."""
    model = nn.Sequential(conv(RGB, 8), nn.ReLU(), block, nn.ReLU(), conv(8, 4))
    groups = trace(randomise(model).eval(), images(1, 8))
    kept = {
        "0": torch.arange(5),
        "2.first": torch.arange(3),
        "2.second": torch.arange(4),
    }
    assert set(groups.channels) == set(kept)
    pruned = prune(model, groups, kept).get_submodule("2")
    names = [name for name, value in vars(pruned).items() if type(value) is int]
    return {name: getattr(pruned, name) for name in names}


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ({"in_channels": 8}, {"in_channels": 5}),
        ({"out_chs": 8}, {"out_chs": 4}),
        ({"hidden_channels": 12}, {"hidden_channels": 3}),
        # Its input and its output keep different numbers.
        ({"dim": 8}, {"dim": 8}),
        # Inside, the input's width is no other layer's.
        ({"stride": 8, "seed": 12}, {"stride": 8, "seed": 12}),
        # No axis is as long.
        ({"in_channels": 7}, {"in_channels": 7}),
    ],
)
def test_names_say_which_width_a_number_follows(numbers, expected):
    assert kept_numbers(Keeping(**numbers)) == expected


def test_numbers_that_the_forward_pass_reads_are_left_to_it():
    block = Keeping(use=lambda block: block.in_channels > 7, in_channels=8)
    assert kept_numbers(block) == {"in_channels": 8}
