"""What runs in training only: heads and modules that evaluation never touches follow
pruning, so that the pruned network trains.
"""

import copy

import pytest
import torch
from nets import CLASSES, RGB, conv, images, pooled, random_kept, randomise
from torch import nn
from torch.nn import functional as F

from autoprune.costs.cost import CostTable
from autoprune.structure.groups import tensors_in
from autoprune.structure.slicing import prune
from autoprune.tracing.masking import mask
from autoprune.tracing.trace import trace
from autoprune.tracing.training_mode import depends_on_mode, set_mode, watch_reads

RUNS_IN_TRAINING = "runs in training only"


class Auxiliary(nn.Module):
    """A head of two layers that only runs in training, as GoogLeNet has."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = conv(RGB, 8), nn.BatchNorm2d(8)
        self.body = conv(8, 10)
        self.head = nn.Linear(10, CLASSES)
        self.aux_conv, self.aux_head = conv(8, 6), nn.Linear(6, CLASSES)

    def forward(self, x):
        h = F.relu(self.bn(self.stem(x)))
        y = self.head(pooled(F.relu(self.body(h))))
        if not self.training:
            return y
        return y, self.aux_head(pooled(F.relu(self.aux_conv(h))))


class Branch(nn.Module):
    """A branch that is added in training only, which ties two widths together."""

    def __init__(self):
        super().__init__()
        self.first, self.second = conv(RGB, 8), conv(8, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        h = F.relu(self.first(x))
        y = F.relu(self.second(h))
        if self.training:
            y = y + h
        return self.head(pooled(y))


class Gain(nn.Module):
    """A parameter and buffers that only training uses."""

    average: torch.Tensor

    def __init__(self):
        super().__init__()
        self.first = conv(RGB, 8)
        self.gain = nn.Parameter(torch.ones(8))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("average", torch.zeros(8))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        h = self.first(x)
        if self.training:
            self.steps += 1
            self.average.mul_(0.9).add_(0.1 * h.mean((0, 2, 3)))
            h = h * self.gain[:, None, None]
        return self.head(pooled(F.relu(h)))


class OwnMode(nn.Module):
    """Keeps its mode by itself instead of asking `training`."""

    def __init__(self):
        super().__init__()
        self.first = conv(RGB, 8)
        self.head, self.aux = nn.Linear(8, CLASSES), nn.Linear(8, 2)
        self.is_learning = False

    def train(self, mode=True):
        self.is_learning = mode
        return super().train(mode)

    def forward(self, x):
        h = pooled(F.relu(self.first(x)))
        return (self.head(h), self.aux(h)) if self.is_learning else self.head(h)


class Targets(nn.Module):
    """Wants targets in training, as detectors do."""

    def __init__(self):
        super().__init__()
        self.first, self.second = conv(RGB, 8), conv(8, 6)
        self.head, self.loss_head = nn.Linear(6, CLASSES), nn.Linear(8, 2)

    def forward(self, x, targets=None):
        h = F.relu(self.first(x))
        y = self.head(pooled(F.relu(self.second(h))))
        if not self.training:
            return y
        if targets is None:
            raise ValueError("targets should not be none when in training mode")
        return F.cross_entropy(self.loss_head(pooled(h)), targets)


class Functional(nn.Module):
    """Asks its mode for dropout alone."""

    def __init__(self):
        super().__init__()
        self.first = conv(RGB, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        h = F.dropout(F.relu(self.first(x)), 0.5, self.training)
        return self.head(pooled(h))


def traced(network):
    model = randomise(network()).eval()
    return model, trace(model, images(2, 8))


def outputs_in_training(model, x):
    set_mode(model, True)
    return torch.cat([tensor.flatten() for tensor in tensors_in(model(x))])


@pytest.mark.parametrize("network", [Auxiliary, Branch, Gain, OwnMode, Functional])
def test_pruned_networks_train_and_equal_the_masked_ones_in_training(network):
    model, groups = traced(network)
    assert len(groups)
    x = images(2, 8)
    kept = random_kept(groups, seed=0)
    pruned = prune(model, groups, kept)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        outputs_in_training(pruned, x).sum().backward()
    if network is not Functional:  # whose dropout draws by its width
        masked = outputs_in_training(mask(model, groups, kept), x)
        fresh = outputs_in_training(prune(model, groups, kept), x)
        torch.testing.assert_close(fresh, masked, rtol=1e-4, atol=1e-5)


def test_what_runs_in_training_only_keeps_its_width_and_follows_its_input():
    _, groups = traced(Auxiliary)
    assert groups.channels == {"stem": 8, "body": 10}
    assert groups.reasons["aux_conv"] == RUNS_IN_TRAINING
    places = {(member.tensor, member.axis) for member in groups["stem"].members}
    assert ("aux_conv.weight", 1) in places
    assert not groups.unsupported


def test_costs_are_those_of_evaluation():
    model, groups = traced(Auxiliary)
    plain = CostTable(groups)
    assert plain.macs(plain.dense) == 64 * 9 * (RGB * 8 + 8 * 10) + 10 * CLASSES
    half = {name: channels // 2 for name, channels in groups.channels.items()}
    kept = {name: torch.arange(count) for name, count in half.items()}
    pruned = prune(model, groups, kept)
    assert plain.params(half) == sum(p.numel() for p in pruned.parameters())


def test_channels_that_training_adds_up_go_together():
    _, groups = traced(Branch)
    assert groups.channels == {"first": 8}
    places = {(member.tensor, member.axis) for member in groups["first"].members}
    assert {("first.weight", 0), ("second.weight", 0), ("second.weight", 1)} <= places


def test_parameters_and_buffers_of_training_alone_follow():
    model, groups = traced(Gain)
    places = {(member.tensor, member.axis) for member in groups["first"].members}
    assert {("gain", 0), ("average", 0)} <= places
    assert model.steps == 0


@pytest.mark.parametrize("network", [Auxiliary, Gain, OwnMode])
@pytest.mark.parametrize("is_training", [False, True])
def test_tracing_leaves_networks_of_two_modes_as_found(network, is_training):
    model = randomise(network()).train(is_training)
    before = copy.deepcopy(model.state_dict())
    trace(model, images(2, 8))
    assert model.training is is_training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_training_mode_that_wants_more_than_the_example_is_told_of():
    model, groups = traced(Targets)
    assert groups.channels == {"first": 8, "second": 6}
    (line,) = groups.unsupported
    assert line.startswith("the training mode can't be traced with this example")
    assert "targets should not be none" in line
    pruned = prune(model, groups, random_kept(groups, seed=0)).state_dict()
    assert pruned["loss_head.weight"].shape == (2, 8)


def test_with_targets_in_the_example_the_training_mode_is_traced():
    model = randomise(Targets()).eval()
    example = (images(1, 8), torch.tensor([1]))
    groups = trace(model, example)
    assert not groups.unsupported
    pruned = prune(model, groups, random_kept(groups, seed=0)).train()
    pruned(*example).backward()
    shapes = {name: tuple(value.shape) for name, value in pruned.state_dict().items()}
    assert shapes["loss_head.weight"][1] == shapes["first.weight"][0] < 8


def test_only_networks_that_ask_for_their_mode_run_twice():
    depends = {}
    modules = (Auxiliary(), OwnMode(), Functional(), nn.Dropout(), nn.BatchNorm2d(RGB))
    for model in modules:
        with watch_reads(model.eval()) as reads:
            model(images(1, 8))
        depends[type(model)] = depends_on_mode(model, reads)
    assert depends == {
        Auxiliary: True,
        OwnMode: True,
        Functional: True,
        nn.Dropout: False,
        nn.BatchNorm2d: False,
    }
    # Reads are watched inside the block alone.
    assert "__getattribute__" not in vars(nn.Module)
