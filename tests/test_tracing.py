"""Tracing finds the known groups of tiny networks, pins what it can't prove, and leaves
everything as found.
"""

import copy
import re

import pytest
import torch
import torchvision
from nets import (
    CLASSES,
    NETS,
    RGB,
    Chain,
    build,
    conv,
    images,
    outputs,
    pooled,
    randomise,
)
from torch import nn
from torch.nn import functional as F

from autoprune.data import models
from autoprune.errors import UserError
from autoprune.structure.labels import CONSTANT, LabelBook
from autoprune.structure.slicing import prune
from autoprune.tracing.rules import table
from autoprune.tracing.trace import trace
from autoprune.tracing.tracer import LABELS, VIEW

aten = torch.ops.aten


def described(groups) -> list:
    """Everything about the prunable groups, comparable."""
    return [
        (
            g.name,
            g.channels,
            [(m.tensor, m.axis, m.role, m.index.tolist()) for m in g.members],
        )
        for g in groups
    ]


@pytest.mark.parametrize("name", NETS)
def test_groups_and_pins_are_the_known_ones(name):
    net = NETS[name]
    groups = trace(build(name), images(1, net.size))
    assert groups.channels == net.groups
    pinned = {group.name: group.pinned for group in groups.pinned}
    assert set(pinned) == set(net.all_pinned), pinned
    for group, reason in net.all_pinned.items():
        assert reason in pinned[group]


@pytest.mark.parametrize("name", models.MODELS)
def test_every_group_of_a_cifar_network_is_prunable_but_input_output_and_padded_shortcuts(
    name,
):
    groups = trace(models.build(name), images(1, 32), verify=False)
    reasons = {
        re.sub(r"^(layer\d).*", r"\1", group.name): group.pinned
        for group in groups.pinned
    }
    padded = (
        {"layer2", "layer3"}
        if name.startswith("resnet") and not name.endswith("_b")
        else set()
    )
    assert {
        place for place, reason in reasons.items() if "constant" in reason
    } == padded
    assert len(reasons) == 2 + len(padded)
    assert not groups.unsupported


@pytest.mark.parametrize(
    ("name", "n_blocks"), [("resnet20", 9), ("resnet56", 27), ("resnet20_b", 9)]
)
def test_residual_networks_have_a_group_a_block_and_their_streams(name, n_blocks):
    groups = trace(models.build(name), images(1, 32), verify=False)
    inner = {group.name: group.channels for group in groups if ".conv1" in group.name}
    assert len(inner) == n_blocks
    # Option A pads zeros on both sides of the first stream, so 16 channels run through;
    # option B has a stream a stage.
    streams = {
        group.name: group.channels for group in groups if group.name not in inner
    }
    assert streams == (
        {"conv1": 16, "layer2.0.conv2": 32, "layer3.0.conv2": 64}
        if "_b" in name
        else {"conv1": 16}
    )


def test_padded_stream_lies_between_the_zeros():
    stem = trace(build("padded_shortcut"), images(1, 8))["stem"]
    at = {
        m.tensor: m.index[:, 0].tolist()
        for m in stem.members
        if m.axis == 0 or m.tensor == "head.weight"
    }
    assert at["outer.weight"] == at["head.weight"] == [2, 3, 4, 5]
    assert at["stem.weight"] == [0, 1, 2, 3]


def test_flattened_channels_are_blocks_of_the_linear_layer():
    stem = trace(build("flatten"), images(1, 12))["stem"]
    (consumer,) = stem.consumers
    assert (consumer.tensor, consumer.axis) == ("hidden.weight", 1)
    assert torch.equal(consumer.index, torch.arange(4 * 12**2).view(4, 12**2))


def test_grouped_convolution_loses_the_same_positions_in_every_conv_group():
    grouped = trace(build("grouped"), images(1, 8))["grouped"]
    produced = next(
        member for member in grouped.members if member.tensor == "grouped.weight"
    )
    assert produced.index.tolist() == [[i, i + 6] for i in range(6)]


def test_partition_of_convolutions_equals_torch_prunings_on_resnet18():
    # An independent implementation: it resolves a table of layer couplings along
    # autograd's graph.
    import torch_pruning

    model = torchvision.models.resnet18(num_classes=10).eval()
    graph = torch_pruning.DependencyGraph().build_dependency(model, images(1, 64))
    theirs = {
        frozenset(
            item.dep.target.name.split(" ")[0]
            for item in group
            if item.dep.handler == torch_pruning.prune_conv_out_channels
        )
        for group in graph.get_all_groups(root_module_types=[nn.Conv2d])
    }
    ours = {
        frozenset(
            m.tensor.removesuffix(".weight")
            for m in group.members
            if m.role == "produce" and m.axis == 0
        )
        for group in trace(model, images(1, 64), verify=False)
    }
    assert ours == theirs
    assert (
        sorted(map(len, ours)) == [1] * 8 + [3] * 4
    )  # the inner convolution of each block, and a stream a stage


def mislabel_cat(call) -> None:
    """Concatenation as if the second operand came first."""
    first, second = (call.tracer.labels(tensor) for tensor in call.args[0])
    call.tracer.label(call.out, torch.cat([second, first], call.args[1]))


def forget_second_operand(call) -> None:
    """An addition that forgets that its second operand has channels of its own."""
    call.tracer.label(call.out, call.tracer.labels(call.args[0]))


def test_wrong_labels_are_caught_and_pinned_with_the_difference(monkeypatch):
    monkeypatch.setitem(table.RULES, aten.cat, mislabel_cat)
    believed = trace(SameWidths().eval(), images(1, 8), verify=False)
    assert set(believed.channels) == {"left", "right", "body"}
    proven = trace(SameWidths().eval(), images(1, 8))
    assert set(proven.channels) == {"body"}
    for group in proven.pinned[1:3]:
        assert re.fullmatch(
            r"pruned and masked network differ by \d\.\de[-+]\d\d", group.pinned
        )


class SameWidths(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.body = conv(RGB, 6), conv(RGB, 6), conv(12, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.head(
            pooled(F.relu(self.body(torch.cat([self.left(x), self.right(x)], 1))))
        )


def test_forgotten_coupling_is_caught_and_pinned(monkeypatch):
    monkeypatch.setitem(table.RULES, aten.add, forget_second_operand)
    proven = trace(build("residual"), images(1, 8))
    assert set(proven.channels) == {"inner"}
    reasons = {group.name: group.pinned for group in proven.pinned}
    assert reasons["stem"].startswith(
        "the pruned network doesn't run: The size of tensor"
    )


def test_group_without_effect_on_the_output_is_pinned():
    class Ignored(Chain):
        def forward(self, x):
            x = F.relu(self.bn1(self.conv1(x)))
            return self.head(0 * pooled(self.bn2(self.conv2(x))))

    groups = trace(Ignored().eval(), images(1, 8))
    assert not groups.channels
    assert [group.pinned for group in groups.pinned][1:3] == [
        "masking it doesn't change the output"
    ] * 2


def test_forward_that_casts_to_float32_is_proven_in_float32(monkeypatch):
    class Casting(SameWidths):
        def forward(self, x):
            return super().forward(x.float())

    assert trace(Casting().eval(), images(1, 8)).channels == {
        "left": 6,
        "right": 6,
        "body": 8,
    }
    monkeypatch.setitem(table.RULES, aten.cat, mislabel_cat)
    assert set(trace(Casting().eval(), images(1, 8)).channels) == {"body"}


def test_model_and_example_are_left_as_found():
    for training in (True, False):
        model, example = build("residual").train(training), images(2, 8)
        model.bn.eval()
        model.stem.weight.requires_grad_(False)
        before, flags = (
            copy.deepcopy(model.state_dict()),
            [module.training for module in model.modules()],
        )
        attributes = [set(vars(module)) for module in model.modules()]
        rng, untouched = torch.get_rng_state(), example.clone()
        trace(model, example)
        assert all(
            torch.equal(before[name], tensor)
            for name, tensor in model.state_dict().items()
        )
        assert [module.training for module in model.modules()] == flags
        assert [set(vars(module)) for module in model.modules()] == attributes
        assert not any(
            module._forward_hooks or module._forward_pre_hooks
            for module in model.modules()
        )
        assert not nn.modules.module._global_forward_hooks
        assert not nn.modules.module._global_forward_pre_hooks
        tensors = [*model.parameters(), *model.buffers(), example]
        assert not any(
            hasattr(tensor, name) for tensor in tensors for name in (LABELS, VIEW)
        )
        assert [
            name for name, p in model.named_parameters() if not p.requires_grad
        ] == ["stem.weight"]
        assert torch.equal(torch.get_rng_state(), rng)
        assert torch.equal(example, untouched)


class Failing(nn.Module):
    def forward(self, x):
        raise KeyError("no such feature\nand more")


def test_forward_that_raises_names_the_module_and_the_reason():
    model = nn.Sequential(conv(RGB, 4), nn.Sequential(nn.ReLU(), Failing()))
    with pytest.raises(
        UserError,
        match=r"^model: tracing failed in 1\.1: KeyError: 'no such feature\\nand more'$",
    ):
        trace(model, images(1, 8))
    assert not nn.modules.module._global_forward_hooks
    assert torch.backends.mha.get_fastpath_enabled()
    assert trace(build("chain"), images(1, 8)).channels == NETS["chain"].groups


def test_input_of_the_wrong_shape_names_the_layer_and_the_shapes():
    with pytest.raises(
        UserError,
        match=r"tracing failed in conv1: RuntimeError: Given groups=1.*to have 3 channels",
    ):
        trace(Chain(), torch.randn(1, 4, 8, 8))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_with_their_name(value):
    model = Chain()
    model.bn2.running_var[3] = value
    with pytest.raises(
        UserError, match=r"^model: bn2\.running_var holds NaN or infinite values"
    ):
        trace(model, images(1, 8))


def test_users_rule_teaches_an_operation(monkeypatch):
    class Flipped(Chain):
        def forward(self, x):
            x = F.relu(self.bn1(self.conv1(x)))
            return self.head(
                pooled(torch.renorm(F.relu(self.bn2(self.conv2(x))), 2, 1, 1.0))
            )

    model = randomise(Flipped()).eval()
    untaught = trace(model, images(1, 8))
    assert untaught.channels == {"conv1": 6}
    assert untaught.unsupported == (
        "operation renorm in Flipped has no rule; it pins conv2",
    )

    def channel_by_channel(call) -> None:
        call.tracer.label(call.out, call.tracer.labels(call.args[0]))

    monkeypatch.setitem(table.RULES, aten.renorm, channel_by_channel)
    taught = trace(model, images(1, 8))
    assert taught.channels == {"conv1": 6, "conv2": 8}
    assert not taught.unsupported


class Deciding(Chain):
    """Takes another path for bright images."""

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        if x.mean() > 0:
            x = x * 2
        return self.head(pooled(F.relu(self.bn2(self.conv2(x)))))


class Selecting(Chain):
    """Keeps the positive values, however many they are."""

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.head(pooled(F.relu(self.bn2(self.conv2(x))))) + x[x > 0].sum()


@pytest.mark.parametrize(
    ("kind", "operation"),
    [(Deciding, "_local_scalar_dense in Deciding"), (Selecting, "index in Selecting")],
)
def test_control_flow_that_depends_on_the_data_is_refused_with_its_place(
    kind, operation
):
    message = rf"^model: its forward pass depends on the values of activations \({operation}\)"
    with pytest.raises(UserError, match=message):
        trace(kind().eval(), images(1, 8))


@pytest.mark.parametrize(
    "name",
    ["chain", "residual", "concat", "depthwise", "flatten", "padded_shortcut", "gated"],
)
def test_groups_depend_on_neither_memory_format_batch_mode_nor_dtype(name):
    model, x = build(name), images(3, NETS[name].size)
    expected = described(trace(model, x[:1]))
    fast = copy.deepcopy(model).to(memory_format=torch.channels_last)
    assert (
        described(trace(fast, x.contiguous(memory_format=torch.channels_last)))
        == expected
    )
    assert described(trace(model, x)) == expected
    assert described(trace(copy.deepcopy(model).train(), x)) == expected
    assert described(trace(copy.deepcopy(model).double(), x.double())) == expected


def test_channels_last_network_prunes_to_the_same_output():
    model, x = build("residual"), images(2, 8)
    kept = {"stem": torch.tensor([1, 4, 6]), "inner": torch.tensor([0, 5])}
    fast = copy.deepcopy(model).to(memory_format=torch.channels_last)
    groups = trace(fast, x)
    torch.testing.assert_close(
        outputs(prune(fast, groups, kept), x), outputs(prune(model, groups, kept), x)
    )


def test_fingerprint_is_stable_and_tells_widths_and_networks_apart():
    prints = [
        trace(Chain(widths).eval(), images(1, 8)).fingerprint
        for widths in ((6, 8), (6, 8), (8, 6), (6, 9))
    ]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3
    assert trace(build("residual"), images(1, 8)).fingerprint not in prints


def test_groups_are_reached_by_position_and_name_in_forward_order():
    groups = trace(build("chain"), images(1, 8))
    assert (
        [group.name for group in groups]
        == ["conv1", "conv2"]
        == [groups[0].name, groups["conv2"].name]
    )
    assert len(groups) == 2
    assert [m.tensor for m in groups["conv1"].members if m.role == "produce"] == [
        "conv1.weight",
        "conv1.bias",
    ]
    assert [m.tensor for m in groups["conv1"].members if m.role == "follow"] == [
        f"bn1.{name}" for name in ("weight", "bias", "running_mean", "running_var")
    ]


def test_macs_share_counts_every_use_of_a_shared_layer():
    group = trace(build("shared"), images(1, 8))["stem"]
    assert group.macs_share == 1
    pinned = {g.name: g.macs_share for g in trace(build("shared"), images(1, 8)).pinned}
    assert pinned["stem:input"] == pytest.approx(64 * 9 * 3 * 6 / NETS["shared"].macs)


def test_joined_labels_share_the_smallest_as_root_and_the_first_reason():
    book = LabelBook()
    a, b, c = book.new_labels(3), book.new_labels(3), book.new_labels(3)
    book.join(b, c)
    book.join(a, b.flip(0))
    assert book.representatives()[7:10].tolist() == [3, 2, 1]
    book.pin(c[:1], "first")
    book.pin(a, "second")
    book.join(a[1:2], torch.tensor([CONSTANT]))
    assert book.reasons(book.representatives()) == {
        1: "second",
        2: "second",
        3: "first",
    }
