"""Networks written by hand: sizes that the code computes follow what is left."""

import pytest
import torch
from nets import counted_macs, difference, random_kept, randomise
from own_code import (
    ATTENTIONS,
    HEADS,
    WIDTH,
    PartialConvolution,
    Tokens,
    example,
    networks,
)

from autoprune.costs.cost import CostTable
from autoprune.structure.slicing import prune
from autoprune.tracing.mac_coverage import both_axes_share
from autoprune.tracing.masking import mask
from autoprune.tracing.trace import trace

SIZE = 32
NETWORKS = networks()


def prepare(name):
    """A network with random weights in double precision, and its trace."""
    model = randomise(networks()[name].double()).eval()
    return model, trace(model, example().double())


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_left_computes_what_the_masked_network_does(name):
    model, groups = prepare(name)
    x = example().double()
    assert len(groups) > 0
    for seed in range(2):
        kept = random_kept(groups, seed, max_sparsity=0.5)
        pruned = prune(model, groups, kept)
        counts = {group: len(channels) for group, channels in kept.items()}
        costs = CostTable(groups)
        assert costs.macs(counts) == counted_macs(pruned, SIZE)
        assert costs.params(counts) == sum(p.numel() for p in pruned.parameters())
        masked = mask(model, groups, kept)
        assert difference(pruned(x), masked(x)) < 1e-9
        assert difference(masked(x), model(x)) > 1e-6


@pytest.mark.parametrize("name", NETWORKS)
def test_a_trace_of_one_sample_masks_a_batch_of_three(name):
    model, groups = prepare(name)
    x = torch.cat([example().double(), example().double()[:1].flip(-1)])
    alone = trace(model, x[:1])
    assert alone.channels == groups.channels
    # Every group loses its first channel, so that none is kept by chance.
    kept = {group: torch.arange(1, n) for group, n in alone.channels.items() if n > 1}
    masked = mask(model, alone, kept)
    assert difference(prune(model, alone, kept)(x), masked(x)) < 1e-9


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_heads_and_widths_of_attention_written_by_hand_can_go(kind):
    model = Tokens(kind)
    groups = trace(model.eval(), example())
    # All that stays is the patches' input and the head's output.
    assert both_axes_share(groups) > 0.5
    assert set(groups.reasons.values()) <= {
        "is the network's input",
        "feeds the network's output",
    }


def test_the_number_of_heads_in_an_attribute_is_that_of_the_heads_left():
    model, groups = prepare("FreeWidth")
    heads = next(name for name in groups.channels if name.endswith("qkv:heads"))
    pruned = prune(model, groups, {heads: torch.tensor([0, 2])})
    assert [block.heads for block in pruned.blocks] == [HEADS - 1, HEADS]
    assert [block.heads for block in model.blocks] == [HEADS, HEADS]


def test_parts_of_a_split_follow_what_is_left_of_each():
    model, groups = prepare("PartialConvolution")
    kept = random_kept(groups, 1, max_sparsity=0.6)
    pruned = prune(model, groups, kept)
    n_convolved = pruned.conv.in_channels
    assert n_convolved < WIDTH // 4 or pruned.dim_rest < WIDTH - WIDTH // 4
    assert pruned.dim_conv == n_convolved
    assert pruned.dim_rest == pruned.stem.out_channels - n_convolved


class Literal(PartialConvolution):
    """The sizes of the split are numbers in the code."""

    def forward(self, x):
        first, rest = torch.split(self.stem(x).relu(), [3, 9], dim=1)
        x = torch.cat((self.conv(first).relu(), rest), 1)
        return self.head(x.mean((2, 3)))


def test_what_a_network_keeps_of_evaluation_is_not_taken_for_constant():
    model = randomise(networks()["CachedTable"].double()).eval()
    x = example().double()
    model(x)
    groups = trace(model, x)
    kept = random_kept(groups, 0, max_sparsity=0.5)
    pruned = prune(model, groups, kept)
    assert difference(pruned(x), mask(model, groups, kept)(x)) < 1e-9
    assert not any(module.training for module in pruned.modules())


def test_numbers_in_the_code_pin_what_they_split_and_nothing_else():
    groups = trace(randomise(Literal()).eval(), example())
    assert set(groups.channels) == {"conv"}
    reasons = [groups.reasons[name] for name in groups.reasons if "stem" in name]
    assert any("the pruned network doesn't run" in reason for reason in reasons)


@pytest.mark.parametrize("name", ["LearnedQueries", "Autoencoder"])
def test_parameters_that_layers_read_leave_every_channel_free(name):
    _, groups = prepare(name)
    assert set(groups.reasons.values()) == {
        "is the network's input",
        "feeds the network's output",
    }


class Branching(PartialConvolution):
    """Narrow maps are treated otherwise than wide ones."""

    def __init__(self, moved):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 64, 3, 2, 1)
        self.head = torch.nn.Linear(64, 10)
        self.moved = moved

    def forward(self, x):
        x = self.stem(x).relu()
        n = self.moved(x.shape[1])
        return self.head(torch.cat((2 * x[:, :n], x[:, n:]), 1).mean((2, 3)))


@pytest.mark.parametrize(
    "moved",
    [
        lambda n: max(2, n // 8),
        lambda n: n // 8 if n > 8 else 2,
        lambda n: n // 8 + (n < 12),
    ],
)
def test_code_that_does_otherwise_below_a_width_keeps_what_it_looks_at(moved):
    model = randomise(Branching(moved)).eval()
    groups = trace(model, example())
    assert "stem" not in groups.channels
    assert "stem" in trace(model, example(), verify=False).channels


class Thrice(PartialConvolution):
    """A sixth of three copies of the channels, rounded up, moves by a pixel."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(3 * WIDTH, 10)

    def forward(self, x):
        x = self.stem(x).relu().repeat(1, 3, 1, 1)
        n = -(-x.shape[1] // 5)
        return self.head(torch.cat((x[:, :n].roll(1, 3), x[:, n:]), 1).mean((2, 3)))


def test_what_no_choice_of_channels_makes_as_long_as_the_code_says_stays():
    groups = trace(randomise(Thrice()).eval(), example(), verify=False)
    assert "stem" not in groups.channels
    reason = "the code computes its length otherwise than channels are removed"
    assert reason in groups.reasons.values()


class Compared(PartialConvolution):
    """The code compares attributes with each other, and one with itself in a sum."""

    def __init__(self):
        super().__init__()
        self.before = 7
        self.after = 7

    def forward(self, x):
        assert self.before == self.after
        assert self.before + self.after == self.after + self.before
        return super().forward(x)


def test_attributes_that_are_only_compared_with_each_other_stay():
    model = randomise(Compared()).eval()
    groups = trace(model, example())
    assert groups.channels == trace(PartialConvolution().eval(), example()).channels
    pruned = prune(model, groups, random_kept(groups, 0, max_sparsity=0.5))
    assert (pruned.before, pruned.after) == (7, 7)


def test_tracing_leaves_the_attributes_plain_integers():
    model = Tokens(ATTENTIONS[0])
    trace(model.eval(), example())
    assert type(model.blocks[0].num_heads) is int
