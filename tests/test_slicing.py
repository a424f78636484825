"""Pruned networks are really smaller, slices come from the right places, and a Slicer
can be used over and over.
"""

import copy

import pytest
import torch
from nets import NETS, SIZE, build, images, outputs, random_kept, tensors
from torch import Tensor, nn

from autoprune.structure.slicing import Slicer, fit_shapes, prune
from autoprune.tracing.masking import mask
from autoprune.tracing.trace import trace


def traced(name: str):
    model = build(name)
    return model, trace(model, images(1, NETS[name].size))


def test_slices_are_those_of_the_kept_channels():
    model, groups = traced("chain")
    first, second = torch.tensor([1, 4]), torch.tensor([0, 3, 7])
    pruned = prune(model, groups, {"conv1": first, "conv2": second})
    assert torch.equal(pruned.conv1.weight, model.conv1.weight[first])
    assert torch.equal(pruned.conv1.bias, model.conv1.bias[first])
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(getattr(pruned.bn1, name), getattr(model.bn1, name)[first])
    assert torch.equal(pruned.conv2.weight, model.conv2.weight[second][:, first])
    assert torch.equal(pruned.head.weight, model.head.weight[:, second])
    assert torch.equal(pruned.head.bias, model.head.bias)


def test_slices_of_a_concat_come_from_each_branchs_block():
    model, groups = traced("concat")
    pruned = prune(
        model, groups, {"left": torch.tensor([1]), "right": torch.tensor([0, 5])}
    )
    assert torch.equal(pruned.body.weight, model.body.weight[:, [1, 4, 9]])
    assert torch.equal(pruned.bn.running_mean, model.bn.running_mean[[1, 4, 9]])


def test_slices_of_a_padded_shortcut_keep_the_zeros_channels():
    model, groups = traced("padded_shortcut")
    pruned = prune(model, groups, {"stem": torch.tensor([0, 2])})
    assert torch.equal(pruned.outer.weight, model.outer.weight[[0, 1, 2, 4, 6, 7]])


@pytest.mark.parametrize("name", [name for name, net in NETS.items() if net.groups])
def test_module_attributes_follow_the_shapes(name):
    model, groups = traced(name)
    pruned = prune(model, groups, random_kept(groups, 0))
    for module in pruned.modules():
        if isinstance(module, nn.Conv2d):
            assert module.out_channels == module.weight.shape[0]
            assert module.out_channels % module.groups == 0
            assert module.in_channels == module.weight.shape[1] * module.groups
        if isinstance(module, nn.ConvTranspose2d):
            assert (module.in_channels, module.out_channels) == tuple(
                module.weight.shape[:2]
            )
        if isinstance(module, nn.BatchNorm2d):
            assert module.num_features == len(module.weight) == len(module.running_var)
        if isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == tuple(
                module.weight.shape
            )


def test_depthwise_convolutions_stay_depthwise_down_to_one_channel():
    for name, multiplier in (("depthwise", 1), ("depthwise_multiplier", 2)):
        model, groups = traced(name)
        for count in (4, 1):
            layer = prune(model, groups, {"stem": torch.arange(count)}).depthwise
            assert (layer.groups, layer.in_channels, layer.out_channels) == (
                count,
                count,
                count * multiplier,
            )


@pytest.mark.parametrize("training", [True, False])
def test_pruned_network_is_a_new_one_of_the_same_class_with_the_same_flags(training):
    model, groups = traced("residual")
    model.train(training)
    model.head.weight.requires_grad_(False)
    pruned = prune(model, groups, {"inner": torch.arange(3)})
    assert type(pruned) is type(model)
    assert pruned.training is training
    assert [name for name, p in pruned.named_parameters() if not p.requires_grad] == [
        "head.weight"
    ]
    assert all(
        isinstance(p, nn.Parameter) and p.grad is None for p in pruned.parameters()
    )
    own = {tensor.untyped_storage().data_ptr() for tensor in tensors(model)}
    assert not own & {tensor.untyped_storage().data_ptr() for tensor in tensors(pruned)}


def test_gradients_of_the_dense_network_are_not_taken_over():
    model, groups = traced("chain")
    model(images(2, SIZE)).sum().backward()
    pruned = prune(model, groups, {"conv1": torch.arange(3)})
    assert all(p.grad is None for p in pruned.parameters())
    assert all(p.grad is not None for p in model.parameters())


def test_slicer_gives_the_same_at_any_time_and_can_grow_back():
    model, groups = traced("residual")
    slicer, x = Slicer(model, groups), images(2, SIZE)
    for seed in (0, 1, 2, 0):
        kept = random_kept(groups, seed)
        sub = slicer.apply(kept)
        assert all(
            torch.equal(a, b)
            for a, b in zip(
                tensors(sub), tensors(prune(model, groups, kept)), strict=True
            )
        )
        with torch.no_grad():
            for tensor in tensors(sub):
                tensor.zero_()  # whatever is done to a sub-model doesn't reach the next one
    assert torch.equal(outputs(slicer.apply({}), x), outputs(model, x))
    assert slicer.apply({}) is slicer.apply({"inner": torch.arange(2)})


@pytest.mark.parametrize("name", [name for name, net in NETS.items() if net.groups])
def test_a_used_slicer_gives_what_a_fresh_prune_gives_and_leaves_the_network_alone(
    name,
):
    model, groups = traced(name)
    before, x = copy.deepcopy(model.state_dict()), images(2, NETS[name].size)
    slicer = Slicer(model, groups, borrow=True)
    for seed in (0, 1):
        sub, fresh = (
            slicer.apply(random_kept(groups, seed)),
            prune(model, groups, random_kept(groups, seed)),
        )
        assert all(
            torch.equal(tensor, sub.state_dict()[key])
            for key, tensor in fresh.state_dict().items()
        )
        assert [str(module) for module in sub.modules()] == [
            str(module) for module in fresh.modules()
        ]
        assert torch.equal(outputs(sub, x), outputs(fresh, x))
    assert all(
        torch.equal(before[key], tensor) for key, tensor in model.state_dict().items()
    )


def test_slicer_keeps_the_weights_that_the_network_had_when_it_was_made():
    model, groups = traced("chain")
    slicer, before = Slicer(model, groups), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.conv1.weight.zero_()
    assert torch.equal(slicer.apply({}).conv1.weight, before["conv1.weight"])


@pytest.mark.parametrize("name", ["chain", "layer_norm", "group_norm", "softmax"])
def test_masked_network_depends_on_what_is_left_and_on_nothing_else(name):
    model, groups = traced(name)
    group, x = groups[0], images(2, SIZE)
    kept = {group.name: torch.arange(group.channels - 1)}
    before = outputs(mask(model, groups, kept), x)
    producer = next(member for member in group.members if member.role == "produce")
    for channel, depends in ((group.channels - 1, False), (0, True)):
        changed = copy.deepcopy(model)
        changed.state_dict()[producer.tensor][producer.index[channel]] += 1
        assert (
            torch.equal(outputs(mask(changed, groups, kept), x), before) is not depends
        )


def test_masking_batch_norms_output_alone_would_not_be_the_same():
    # Why masks sit where channels are read: relu(beta) of a removed channel would live
    # on.
    model, groups = traced("chain")
    with torch.no_grad():
        model.bn1.bias.fill_(1)
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        zeroed.conv1.weight[3:] = 0
        zeroed.conv1.bias[3:] = 0
    x, kept = images(2, SIZE), {"conv1": torch.arange(3)}
    pruned = outputs(prune(model, groups, kept), x)
    torch.testing.assert_close(outputs(mask(model, groups, kept), x), pruned)
    assert (outputs(zeroed, x) - pruned).abs().max() > 0.01


def test_fit_shapes_takes_shapes_and_values_and_copies_them():
    model, groups = traced("residual")
    state = prune(model, groups, random_kept(groups, 3)).state_dict()
    fresh = NETS["residual"].build().eval()
    fit_shapes(fresh, state)
    assert all(
        torch.equal(tensor, state[name]) for name, tensor in fresh.state_dict().items()
    )
    fresh.stem.weight.data.zero_()
    assert state["stem.weight"].any()
    again = trace(fresh, images(1, SIZE))
    assert again.channels == {
        "stem": len(state["stem.weight"]),
        "inner": len(state["inner.weight"]),
    }


def test_a_pruned_network_can_be_traced_and_pruned_again():
    model, groups = traced("residual")
    once = prune(
        model,
        groups,
        {"stem": torch.tensor([0, 2, 3, 5, 6, 7]), "inner": torch.tensor([1, 2, 4, 5])},
    )
    again = trace(once, images(1, SIZE))
    assert again.channels == {"stem": 6, "inner": 4}
    twice = prune(
        once, again, {"stem": torch.tensor([1, 3, 4]), "inner": torch.tensor([0, 2])}
    )
    directly = prune(
        model, groups, {"stem": torch.tensor([2, 5, 6]), "inner": torch.tensor([1, 4])}
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(tensors(twice), tensors(directly), strict=True)
    )


def test_tied_weights_stay_tied():
    model, groups = traced("two_names")
    pruned = prune(model, groups, {"stem": torch.tensor([0, 3])})
    assert pruned.again is pruned.shared
    assert pruned.shared.weight.shape == (2, 2, 3, 3)
    tied = TiedParameter().eval()
    pruned = prune(tied, trace(tied, images(1, SIZE)), {"stem": torch.tensor([0, 3])})
    assert pruned.second.weight is pruned.first.weight
    assert pruned.second.out_channels == pruned.second.in_channels == 2


class TiedParameter(nn.Module):
    """Two modules, one weight."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.first, self.second = (
            nn.Conv2d(6, 6, 3, padding=1, bias=False) for _ in range(2)
        )
        self.second.weight = self.first.weight
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(
            self.second(self.first(self.stem(x)).relu()).relu().mean((2, 3))
        )
