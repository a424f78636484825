"""Networks that draw random numbers: noise is nobody's channel, and during the proof
pruned and masked networks draw the same.
"""

import random

import numpy as np
import pytest
import torch
from nets import CLASSES, RGB, conv, images, pooled, randomise
from torch import nn
from torch.nn import functional as F

from autoprune.structure.slicing import prune
from autoprune.tracing.masking import mask
from autoprune.tracing.randomness import DRAWS, SWITCHES, fixed_randomness, is_random
from autoprune.tracing.trace import trace

ELSEWHERE = {"_fused_dropout", "_nested_tensor_softmax_with_shape"}
"""Random operations of other devices and of nested tensors."""
CHANNELS = {
    "dropout": lambda h, net: F.dropout(h, 0.5, training=True),
    "whole channels": lambda h, net: F.dropout2d(h, 0.5, training=True),
    "alpha": lambda h, net: F.alpha_dropout(h, 0.5, training=True),
    "noise like": lambda h, net: h + 0.1 * torch.randn_like(h),
    "noise by shape": lambda h, net: h + 0.1 * torch.randn(h.shape),
    "noise in a buffer": lambda h, net: h + torch.empty(h.shape).normal_(0, 0.1),
    "one map": lambda h, net: h + net.gain * torch.randn(len(h), 1, *h.shape[2:]),
    "by channel": lambda h, net: h * torch.rand(h.shape[1])[:, None, None],
    "slope": lambda h, net: F.rrelu(h, training=True),
    "sampled": lambda h, net: h + torch.exp(0.1 * h) * torch.randn_like(h),
    "coin": lambda h, net: h * torch.bernoulli(h.sigmoid()),
    "poisson": lambda h, net: h * torch.poisson(h.sigmoid()),
    "batch order": lambda h, net: h[torch.randperm(len(h))],
    "skipped by torch": lambda h, net: net.extra(h) if torch.rand(1) > 0.5 else h,
    "skipped by Python": lambda h, net: net.extra(h) if random.random() > 0.5 else h,
    "skipped by NumPy": lambda h, net: net.extra(h) if np.random.rand() > 0.5 else h,
}


class Drawing(nn.Module):
    """Two convolutions with something random between them."""

    def __init__(self, draw):
        super().__init__()
        self.draw = draw
        self.first = conv(RGB, 8)
        self.gain = nn.Parameter(torch.ones(1, 8, 1, 1))
        self.extra = conv(8, 8)
        self.second = conv(8, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x):
        h = self.draw(F.relu(self.first(x)), self)
        return self.head(pooled(F.relu(self.second(h))))


def drawing(draw) -> nn.Module:
    return randomise(Drawing(draw)).eval()


@pytest.mark.parametrize("name", CHANNELS)
def test_channels_beside_random_numbers_are_prunable(name):
    model = drawing(CHANNELS[name])
    groups = trace(model, images(1, 8))
    assert {"first", "second"} <= set(groups.channels)
    kept = {group.name: torch.arange(group.channels // 2) for group in groups}
    x = images(2, 8)
    with fixed_randomness():
        pruned = prune(model, groups, kept)(x)
    with fixed_randomness():
        masked = mask(model, groups, kept)(x)
    torch.testing.assert_close(pruned, masked)


def test_noise_of_a_fixed_size_pins_what_it_meets():
    groups = trace(drawing(lambda h, net: h + torch.randn(1, 8, 1, 1)), images(1, 8))
    assert set(groups.channels) == {"second"}


def test_generators_are_left_as_found():
    def states():
        return random.getstate(), str(np.random.get_state()), torch.get_rng_state()

    model = drawing(CHANNELS["dropout"])
    x = images(1, 8)
    python, numpy, before = states()
    trace(model, x)
    python_after, numpy_after, after = states()
    assert (python, numpy) == (python_after, numpy_after)
    assert torch.equal(before, after)


def test_every_random_operation_of_pytorch_has_a_constant():
    lacking = set()
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, rest = name.partition("::")
        packet, _, overload = rest.partition(".")
        if namespace != "aten":
            continue
        func = getattr(getattr(torch.ops.aten, packet), overload or "default")
        switches = {item.name for item in func._schema.arguments} & set(SWITCHES)
        if is_random(func) and func.overloadpacket not in DRAWS and not switches:
            lacking.add(packet)
    assert lacking == ELSEWHERE


@pytest.mark.parametrize(
    "draw",
    [
        lambda n: torch.rand(n),
        lambda n: torch.randn(n),
        lambda n: torch.empty(n).uniform_(2, 4),
        lambda n: torch.normal(torch.ones(n), 2.0),
        lambda n: torch.normal(1.0, 2.0, size=(n,)),
        lambda n: torch.empty(n).exponential_(),
        lambda n: torch.randint(3, 9, (n,)),
        lambda n: torch.empty(n).random_(3, 9),
        lambda n: torch.empty(n).bernoulli_(0.5),
        lambda n: torch.randperm(n),
        lambda n: torch.multinomial(torch.ones(n), n),
        lambda n: torch.binomial(torch.full((n,), 10.0), torch.full((n,), 0.5)),
        lambda n: torch.poisson(torch.full((n,), 3.0)),
        lambda n: F.dropout(torch.ones(n), 0.5),
    ],
)
def test_draws_of_two_sizes_begin_alike(draw):
    with fixed_randomness():
        few = draw(3)
        many = draw(5)
    assert torch.equal(few, many[:3])
    # Generators go on afterwards; a constant would mean that they are still replaced.
    assert not torch.equal(torch.rand(5), torch.rand(5))


class Remembering(nn.Module):
    """Answers by how often it was asked, which is kept outside of the network."""

    def __init__(self, calls):
        super().__init__()
        self.calls = lambda: calls.append(0) or len(calls)
        self.body = conv(RGB, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.head(pooled(self.body(x))) + self.calls()


def test_a_network_that_answers_differently_each_time_stays_whole():
    groups = trace(Remembering([]).eval(), images(1, 8))
    assert len(groups) == 0
    assert groups.reasons["body"] == (
        "the network answers the same input differently each time"
    )
