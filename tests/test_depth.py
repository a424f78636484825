"""Residual blocks are found by what they do, cost what they cost, and go in the order
of least damage.
"""

import itertools
from collections.abc import Callable

import pytest
import torch
import torchvision
from nets import (
    AREA,
    CLASSES,
    RGB,
    SIZE,
    K,
    conv,
    counted_macs,
    images,
    pooled,
    randomise,
    tensors,
)
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune.data import models
from autoprune.data.datasets import Images
from autoprune.errors import UserError
from autoprune.scaling.depth import (
    Block,
    block_importance,
    removable_blocks,
    remove_blocks,
    select_blocks_to_remove,
)

EXAMPLE = images(2, SIZE)
PIXELS = torch.randint(
    0,
    256,
    (12, RGB, SIZE, SIZE),
    generator=torch.Generator().manual_seed(0),
    dtype=torch.uint8,
)
DATA = Images(PIXELS, torch.arange(12) % CLASSES)


class Inner(nn.Module):
    """Two convolutions around `width` channels with batch norm, added to the input;
    ReLU after the sum.
    """

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.body = nn.Sequential(
            conv(channels, width),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            conv(width, channels),
        )
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm(self.body(x)))

    @staticmethod
    def macs(channels: int, width: int) -> int:
        return 2 * AREA * K * channels * width


class Stack(nn.Module):
    """Residual blocks of 4 channels and the given inner widths."""

    def __init__(self, widths: tuple[int, ...] = (2, 6, 3)):
        super().__init__()
        self.stem, self.head = conv(RGB, 4), nn.Linear(4, CLASSES)
        self.blocks = nn.Sequential(*(Inner(4, width) for width in widths))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(pooled(self.blocks(F.relu(self.stem(x)))))


def stack(*widths: int) -> nn.Module:
    """A `Stack` in eval mode, the same at every call."""
    return randomise(Stack(widths)).eval()


def importance(model: nn.Module, *names: str) -> dict[str, float]:
    chosen = [
        block for block in removable_blocks(model, EXAMPLE) if block.name in names
    ]
    return block_importance(model, chosen, DATA)


def names_of(model: nn.Module, x: Tensor = EXAMPLE) -> list[str]:
    return [block.name for block in removable_blocks(model, x)]


def silence(block: nn.Module) -> None:
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()


@torch.no_grad()
def answers(model: nn.Module) -> Tensor:
    """Log-probabilities, batch norm on the statistics of the images; the model is used
    up.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    return model(DATA.inputs).log_softmax(1)


def test_a_block_has_the_macs_and_parameters_of_its_layers():
    expected = [
        Block(
            f"blocks.{i}",
            Inner.macs(4, width),
            2 * K * 4 * width + width + 4 + 2 * width + 2 * 4,
        )
        for i, width in enumerate((2, 6, 3))
    ]
    assert removable_blocks(stack(2, 6, 3), EXAMPLE) == expected


@pytest.mark.parametrize("name", ["resnet20", "resnet18"])
def test_removing_blocks_saves_exactly_their_macs_and_keeps_shapes(name):
    model = models.build(name, CLASSES).eval()
    blocks = removable_blocks(model, EXAMPLE)
    for chosen in (blocks[:1], blocks[-1:], blocks):
        shallow = remove_blocks(model, [block.name for block in chosen])
        saved = counted_macs(model, SIZE) - counted_macs(shallow, SIZE)
        assert saved == sum(block.macs for block in chosen) > 0
        lost = len(torch.nn.utils.parameters_to_vector(model.parameters())) - sum(
            parameter.numel() for parameter in shallow.parameters()
        )
        assert lost == sum(block.n_params for block in chosen)
        assert shallow(EXAMPLE).shape == (2, CLASSES)


@pytest.mark.parametrize("name", ["resnet20", "resnet20_b"])
def test_downsampling_blocks_stay(name):
    assert names_of(models.build(name)) == [
        "layer1.0",
        "layer1.1",
        "layer1.2",
        *_later(2),
        *_later(3),
    ]


def _later(stage: int) -> list[str]:
    return [f"layer{stage}.1", f"layer{stage}.2"]


def test_torchvisions_resnet_gives_the_blocks_without_downsampling():
    model = models.build("resnet18")
    blocks = {
        name: block
        for name, block in model.named_modules()
        if hasattr(block, "downsample")
    }
    assert names_of(model) == [
        name for name, block in blocks.items() if block.downsample is None
    ]


def test_mobilenet_v2_gives_exactly_its_residual_blocks():
    model = models.build("mobilenet_v2_cifar")
    residual = [
        name
        for name, block in model.named_modules()
        if getattr(block, "is_residual", False)
    ]
    assert names_of(model) == residual
    assert len(residual) == 10


def test_mobilenet_v3_gives_exactly_its_residual_blocks():
    model = models.build("mobilenet_v3_small")
    residual = [
        name
        for name, block in model.named_modules()
        if getattr(block, "use_res_connect", False)
    ]
    assert names_of(model) == residual
    assert len(residual) == 6


def test_encoder_layers_of_a_vision_transformer_are_blocks_attention_products_included():
    dim, hidden, tokens = 8, 16, SIZE**2 // 4**2 + 1
    model = torchvision.models.VisionTransformer(
        SIZE, 4, 2, 2, dim, hidden, num_classes=CLASSES
    ).eval()
    blocks = removable_blocks(model, EXAMPLE)
    assert [block.name for block in blocks] == [
        f"encoder.layers.encoder_layer_{i}" for i in range(2)
    ]
    projections, products = tokens * dim * 4 * dim, 2 * tokens**2 * dim
    assert [block.macs for block in blocks] == [
        projections + products + 2 * tokens * dim * hidden
    ] * 2


@pytest.mark.parametrize("name", ["vgg16_bn_cifar", "mobilenet_v1_cifar"])
def test_networks_without_shortcuts_have_none(name):
    assert names_of(models.build(name), images(2, 32)) == []


def wrap(block: nn.Module) -> nn.Module:
    return nn.Sequential(conv(RGB, 4), nn.ReLU(), nn.Sequential(block))


class Signed(Inner):
    """A shortcut that changes the sign."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.body(x)) - x


class Pair(Inner):
    """Returns two tensors."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), x


class Chain(Inner):
    """The same layers without a shortcut."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.body(x))


class Thin(nn.Module):
    """A single layer with weights."""

    def __init__(self):
        super().__init__()
        self.layer = conv(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x)


class Outer(nn.Module):
    """A residual block around two others."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(Inner(4, 2), Inner(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x + 0 * self.inner(x)


class InPlace(Inner):
    """Starts with an operation in place, as blocks with the activation first do."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.relu_()
        return x + self.norm(self.body(x))


class Unscaled(Inner):
    """Its batch norms have statistics, but no parameters."""

    def __init__(self, channels: int, width: int):
        super().__init__(channels, width)
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.norm.running_mean.fill_(0.5)


def test_batch_norm_without_parameters_is_no_obstacle():
    assert names_of(wrap(Unscaled(4, 2))) == ["2.0"]


@pytest.mark.parametrize("block", [Signed(4, 2), Chain(4, 2), Thin()])
def test_what_does_not_hand_its_input_on_or_is_one_layer_is_no_block(block):
    assert names_of(wrap(block)) == []


class Caller(nn.Module):
    """A stem, then one block in an `nn.Sequential`, called in an own way."""

    def __init__(
        self, block: nn.Module, call: Callable[[nn.Sequential, Tensor], Tensor]
    ):
        super().__init__()
        self.stem, self.blocks, self.call = conv(RGB, 4), nn.Sequential(block), call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.blocks, F.relu(self.stem(x)))


@pytest.mark.parametrize(
    ("kind", "call", "expected"),
    [
        (Inner, lambda blocks, x: blocks(x), ["blocks.0"]),
        (Inner, lambda blocks, x: blocks(blocks(x)), []),
        (Inner, lambda blocks, x: blocks[0](x=x), []),
        (Inner, lambda blocks, x: x, []),
        (Pair, lambda blocks, x: blocks(x)[0], []),
    ],
    ids=["once", "twice", "by keyword", "never", "two results"],
)
def test_a_block_is_called_once_with_one_tensor_and_returns_one(kind, call, expected):
    assert names_of(Caller(kind(4, 2), call)) == expected


def test_a_relu_after_the_sum_is_an_obstacle_where_the_input_can_be_negative():
    layers = [conv(RGB, 4), nn.ReLU(), nn.Sequential(Inner(4, 2))]
    assert names_of(nn.Sequential(*layers)) == ["2.0"]
    assert names_of(nn.Sequential(layers[0], layers[2])) == []


def test_zeros_that_reach_a_chain_do_not_make_it_a_block():
    model = wrap(Chain(4, 2))
    silence(model[0])
    assert names_of(model) == []


def test_the_outermost_block_counts_and_plain_sequentials_are_looked_into():
    assert names_of(wrap(Outer())) == ["2.0"]
    assert names_of(wrap(nn.Sequential(Inner(4, 2), Inner(4, 3)))) == ["2.0.0", "2.0.1"]


def test_a_block_that_works_in_place_is_found():
    assert names_of(wrap(InPlace(4, 2))) == ["2.0"]


def test_a_second_name_that_the_forward_pass_does_not_use_is_not_offered():
    model = stack(2, 3)
    model.blocks, model.used = (
        nn.Sequential(model.blocks[0]),
        nn.Sequential(model.blocks[0], model.blocks[1]),
    )
    model.forward = lambda x: model.head(pooled(model.used(F.relu(model.stem(x)))))
    assert "blocks.0" not in names_of(model)


def test_what_follows_a_removed_block_gets_what_the_block_got():
    model, seen = stack(2, 6, 3), []
    shallow = remove_blocks(model, ["blocks.1"])
    model.blocks[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    shallow.blocks[2].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(EXAMPLE), shallow(EXAMPLE)
    assert torch.equal(*seen)


def test_parameters_that_another_layer_uses_too_do_not_go_with_a_block():
    model = stack(3, 3)
    before = removable_blocks(model, EXAMPLE)
    model.blocks[1].body[0].weight = model.blocks[0].body[0].weight
    for block, whole in zip(removable_blocks(model, EXAMPLE), before, strict=True):
        assert (block.macs, block.n_params) == (whole.macs, whole.n_params - 3 * 4 * K)


def test_a_silent_block_can_go_without_a_change():
    model = stack(2, 6, 3)
    silence(model.blocks[1])
    shallow = remove_blocks(model, ["blocks.1"])
    with torch.no_grad():
        assert torch.equal(shallow(EXAMPLE), model(EXAMPLE))
        assert not torch.equal(
            remove_blocks(model, ["blocks.0"])(EXAMPLE), model(EXAMPLE)
        )
    damage = importance(model, "blocks.0", "blocks.1")
    assert damage["blocks.1"] == 0 < damage["blocks.0"]


def test_a_block_inside_another_can_be_named_beside_it():
    shallow = remove_blocks(wrap(Outer()), ["2.0", "2.0.inner.1"])
    assert isinstance(shallow[2][0], nn.Identity)


def test_importance_is_the_divergence_on_batch_statistics():
    model, names = stack(2, 6, 3), ["blocks.0", "blocks.2"]
    whole = answers(stack(2, 6, 3))
    damage = importance(model, *names)
    assert list(damage) == names
    for name in names:
        without = answers(remove_blocks(model, [name]))
        expected = (whole.exp() * (whole - without)).sum(1).mean().item()
        assert damage[name] == pytest.approx(expected, rel=1e-4, abs=1e-7)


def greedy(model: nn.Module, saved: dict[str, int], needed: int) -> list[str]:
    """The definition in plain loops: KL to the whole network's answers, the least
    increase per MAC first; then the largest that is too much returns.
    """
    whole, removed, so_far = answers(remove_blocks(model, [])), [], 0.0
    while sum(saved[name] for name in removed) < needed:
        totals = {}
        for name in saved.keys() - set(removed):
            without = answers(remove_blocks(model, [*removed, name]))
            totals[name] = (whole.exp() * (whole - without)).sum(1).mean().item()
        best = min(totals, key=lambda name: (totals[name] - so_far) / saved[name])
        removed, so_far = [*removed, best], totals[best]
    for name in sorted(removed, key=saved.get, reverse=True):
        if sum(saved[other] for other in removed if other != name) >= needed:
            removed.remove(name)
    return removed


WIDTHS = (2, 6, 3, 4)


@pytest.mark.parametrize("share", [0.95, 0.7, 0.5, 0.25])
def test_greedy_meets_the_target_and_can_not_do_with_one_fewer(share):
    model = stack(*WIDTHS)
    target = share * counted_macs(model, SIZE)
    removed = select_blocks_to_remove(model, EXAMPLE, DATA, target)
    assert counted_macs(remove_blocks(model, removed), SIZE) <= target
    for spared in removed:
        others = [name for name in removed if name != spared]
        assert counted_macs(remove_blocks(model, others), SIZE) > target
    saved = {f"blocks.{i}": Inner.macs(4, width) for i, width in enumerate(WIDTHS)}
    assert removed == greedy(model, saved, counted_macs(model, SIZE) - target)


def test_greedy_takes_silent_blocks_first_and_nothing_when_nothing_is_needed():
    model = stack(3, 3, 3)
    silence(model.blocks[1])
    macs = counted_macs(model, SIZE)
    assert select_blocks_to_remove(model, EXAMPLE, DATA, macs) == []
    assert select_blocks_to_remove(model, EXAMPLE, DATA, macs - 1) == ["blocks.1"]


def test_a_small_block_that_went_first_returns_where_a_large_one_is_enough():
    model = stack(2, 8)
    silence(model.blocks[0])
    macs = counted_macs(model, SIZE)
    assert select_blocks_to_remove(model, EXAMPLE, DATA, macs - Inner.macs(4, 2)) == [
        "blocks.0"
    ]
    assert select_blocks_to_remove(model, EXAMPLE, DATA, macs - Inner.macs(4, 8)) == [
        "blocks.1"
    ]


def test_the_floor_is_reachable_and_below_it_is_an_error():
    model = stack(2, 6, 3)
    floor = AREA * K * RGB * 4 + 4 * CLASSES
    assert sorted(select_blocks_to_remove(model, EXAMPLE, DATA, floor)) == [
        "blocks.0",
        "blocks.1",
        "blocks.2",
    ]
    message = rf"^target_macs: {floor - 1} is below the reachable floor; .*3 removable blocks .* has {floor} MACs \(\d"
    with pytest.raises(UserError, match=message):
        select_blocks_to_remove(model, EXAMPLE, DATA, floor - 1)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_found(training):
    model = stack(2, 6, 3).train(training)
    before = [tensor.clone() for tensor in tensors(model)]
    remove_blocks(model, names_of(model))
    importance(model, "blocks.1")
    select_blocks_to_remove(model, EXAMPLE, DATA, 0.6 * counted_macs(model, SIZE))
    assert all(itertools.starmap(torch.equal, zip(tensors(model), before, strict=True)))
    assert all(module.training is training for module in model.modules())
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in model.modules()
    )
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert names_of(model) == ["blocks.0", "blocks.1", "blocks.2"]


@pytest.mark.parametrize("name", ["block.1", "blocks", "stem", "blocks.1.body.0", ""])
def test_a_name_that_can_not_be_a_block_is_refused_with_the_nearest(name):
    with pytest.raises(
        UserError,
        match=rf"^names: {name!r} is not a removable block; did you mean 'blocks\.\d'\?$",
    ):
        remove_blocks(stack(2, 3), ["blocks.0", name])


def test_with_an_example_a_block_that_changes_the_shape_is_refused_as_well():
    model = models.build("resnet20")
    assert isinstance(
        remove_blocks(model, ["layer2.1"], EXAMPLE).layer2[1], nn.Identity
    )
    with pytest.raises(
        UserError,
        match=r"^names: 'layer2\.0' is not a removable block; did you mean 'layer2\.\d'\?$",
    ):
        remove_blocks(model, ["layer2.0"], EXAMPLE)


def test_a_network_without_blocks_has_no_name_to_offer():
    with pytest.raises(
        UserError,
        match=r"^names: 'stem' is not a removable block; this network has none; ",
    ):
        remove_blocks(Thin(), ["stem"])
