"""Tiny networks that carry what is known about them: their groups, what is pinned and
why, and their MACs.

Every expectation is written down by hand, in named dimensions, so that nothing here
comes from the code under test.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

RGB, CLASSES, SIZE = 3, 5, 8
AREA = SIZE**2
PATCHES = AREA // 4
K = 9  # weights of a 3x3 kernel


def conv(n_in: int, n_out: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A 3x3 convolution with bias that keeps the size at stride 1."""
    return nn.Conv2d(n_in, n_out, 3, stride, 1, groups=groups)


def pooled(x: Tensor) -> Tensor:
    """The mean over space."""
    return x.mean((2, 3))


class Chain(nn.Module):
    """Two convolutions with batch norm and a head."""

    def __init__(self, widths: tuple[int, int] = (6, 8)):
        super().__init__()
        self.conv1, self.bn1 = conv(RGB, widths[0]), nn.BatchNorm2d(widths[0])
        self.conv2, self.bn2 = (
            conv(widths[0], widths[1], stride=2),
            nn.BatchNorm2d(widths[1]),
        )
        self.head = nn.Linear(widths[1], CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.head(pooled(F.relu(self.bn2(self.conv2(x)))))


class Residual(nn.Module):
    """A stream of 8 channels to which a block of inner width 6 adds."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = conv(RGB, 8), nn.BatchNorm2d(8)
        self.inner, self.outer = conv(8, 6), conv(6, 8)
        self.bn_inner, self.bn_outer = nn.BatchNorm2d(6), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        y = F.relu(self.bn_inner(self.inner(x)))
        x = x + self.bn_outer(self.outer(y))
        return self.head(pooled(F.relu(x)))


class Concat(nn.Module):
    """Two branches side by side on the consumer's input axis."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.bn = conv(RGB, 4), conv(RGB, 6), nn.BatchNorm2d(10)
        self.body, self.head = conv(10, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.left(x), self.right(x)], 1)
        return self.head(pooled(F.relu(self.body(F.relu(self.bn(x))))))


class SelfConcat(nn.Module):
    """Each channel reaches its consumer twice, at distant positions."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = conv(RGB, 6), nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(pooled(torch.cat([F.relu(x), torch.sigmoid(x)], 1)))


class Depthwise(nn.Module):
    """A depthwise convolution that makes `multiplier` channels of each."""

    def __init__(self, multiplier: int = 1):
        super().__init__()
        self.stem, self.depthwise = conv(RGB, 6), conv(6, 6 * multiplier, groups=6)
        self.bn = nn.BatchNorm2d(6 * multiplier)
        self.pointwise = nn.Conv2d(6 * multiplier, 8, 1)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.depthwise(F.relu(self.stem(x)))))
        return self.head(pooled(F.relu(self.pointwise(x))))


class Grouped(nn.Module):
    """A convolution in two conv groups: the same positions go in both."""

    def __init__(self):
        super().__init__()
        self.stem, self.grouped, self.head = (
            conv(RGB, 8),
            conv(8, 12, groups=2),
            nn.Linear(12, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(pooled(F.relu(self.grouped(F.relu(self.stem(x))))))


class ConvGroups(nn.Module):
    """A convolution in more conv groups than each has channels: whole conv groups go."""

    def __init__(self):
        super().__init__()
        self.stem, self.grouped, self.head = (
            conv(RGB, 8),
            conv(8, 16, groups=4),
            nn.Linear(16, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(pooled(F.relu(self.grouped(F.relu(self.stem(x))))))


class Shared(nn.Module):
    """One convolution used twice, so that its inputs and outputs are the same channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.shared, self.head = (
            conv(RGB, 6),
            conv(6, 6),
            nn.Linear(6, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(pooled(F.relu(self.shared(F.relu(self.shared(x))))))


class TwoNames(nn.Module):
    """The same, but the convolution is registered under two names."""

    def __init__(self):
        super().__init__()
        self.stem, self.shared, self.head = (
            conv(RGB, 6),
            conv(6, 6),
            nn.Linear(6, CLASSES),
        )
        self.again = self.shared

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(pooled(F.relu(self.again(F.relu(self.shared(x))))))


class Flatten(nn.Module):
    """Each channel is a block of positions on the linear layer's input axis."""

    def __init__(self, size: int):
        super().__init__()
        self.stem, self.hidden, self.head = (
            conv(RGB, 4),
            nn.Linear(4 * size**2, 6),
            nn.Linear(6, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(F.relu(self.stem(x)).flatten(1))))


class PaddedShortcut(nn.Module):
    """Option A: the stream's 4 channels become the middle of 8, zeros on both sides."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.outer = (
            conv(RGB, 4),
            conv(4, 6, stride=2),
            conv(6, 8),
        )
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        return self.head(pooled(F.relu(self.outer(F.relu(self.inner(x))) + shortcut)))


class OneChannel(nn.Module):
    """A bottleneck of a single channel."""

    def __init__(self):
        super().__init__()
        self.narrow, self.wide, self.head = (
            conv(RGB, 1),
            conv(1, 6),
            nn.Linear(6, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(pooled(F.relu(self.wide(torch.tanh(self.narrow(x))))))


class SqueezeExcitation(nn.Module):
    """Channels gated by a function of their own means, with a hidden layer of only two."""

    def __init__(self):
        super().__init__()
        self.stem, self.squeeze, self.excite = (
            conv(RGB, 8),
            nn.Linear(8, 2),
            nn.Linear(2, 8),
        )
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(pooled(x)))))
        return self.head(pooled(x * gate[:, :, None, None]))


class Chunk(nn.Module):
    """The stem's halves go different ways; `chunk` cuts in the middle, so both keep
    equally many.
    """

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = conv(RGB, 12), conv(6, 4), conv(6, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        first, second = F.relu(self.stem(x)).chunk(2, 1)
        return self.head(pooled(F.relu(self.left(first) + self.right(second))))


class Gated(nn.Module):
    """One half of the stem gates the other (a gated linear unit), so both lose the same
    positions.

    Halving with `chunk` follows; sizes written in the code don't.
    """

    def __init__(self, halve):
        super().__init__()
        self.halve = halve
        self.stem, self.head = conv(RGB, 12), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.halve(self.stem(x))
        return self.head(pooled(value * torch.sigmoid(gate)))


class LayerScale(nn.Module):
    """Bare parameters on the channel axis: a scale, and a shift that also varies over
    space.
    """

    def __init__(self):
        super().__init__()
        self.stem, self.head = conv(RGB, 6), nn.Linear(6, CLASSES)
        self.scale = nn.Parameter(torch.ones(6, 1, 1))
        self.shift = nn.Parameter(torch.zeros(1, 6, SIZE, SIZE))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(pooled(F.relu(self.stem(x) * self.scale + self.shift)))


class NoRule(nn.Module):
    """Channels whose norms are limited, which no rule covers."""

    def __init__(self):
        super().__init__()
        self.stem, self.body, self.head = (
            conv(RGB, 6),
            conv(6, 4),
            nn.Linear(4, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(
            pooled(F.relu(self.body(torch.renorm(self.stem(x), 2, 1, 1.0))))
        )


class SpatialAttention(nn.Module):
    """A map of one channel multiplies all others."""

    def __init__(self):
        super().__init__()
        self.stem, self.attention, self.head = (
            conv(RGB, 6),
            conv(6, 1),
            nn.Linear(6, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(pooled(x * torch.sigmoid(self.attention(x))))


class ChannelStatistics(nn.Module):
    """A norm over channels: removing some changes what all others become."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.stem, self.norm, self.body, self.head = (
            conv(RGB, 6),
            norm,
            conv(6, 4),
            nn.Linear(4, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head(pooled(F.relu(self.body(x))))


class GroupNorm(nn.Module):
    """Statistics over groups of channels: the same positions go in both norm groups."""

    def __init__(self, n_groups: int = 2):
        super().__init__()
        self.stem, self.norm, self.head = (
            conv(RGB, 6),
            nn.GroupNorm(n_groups, 6),
            nn.Linear(6, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(pooled(F.relu(self.norm(self.stem(x)))))


class Shuffle(nn.Module):
    """Channels of two halves interleaved, then cut in halves again, as ShuffleNet does."""

    def __init__(self):
        super().__init__()
        self.left, self.right = conv(RGB, 4), conv(RGB, 4)
        self.body, self.head = conv(4, 6), nn.Linear(4 + 6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(torch.cat([self.left(x), self.right(x)], 1))
        batch, channels, height, width = x.shape
        x = (
            x.view(batch, 2, channels // 2, height, width)
            .transpose(1, 2)
            .reshape(x.shape)
        )
        first, second = x.chunk(2, 1)
        return self.head(pooled(torch.cat([first, F.relu(self.body(second))], 1)))


class Attention(nn.Module):
    """Patches as tokens with a class token, layer norm, attention in two heads, a
    residual stream.
    """

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(RGB, 8, 2, stride=2), nn.LayerNorm(8)
        self.token, self.position = (
            nn.Parameter(torch.randn(1, 1, 8)),
            nn.Parameter(torch.randn(1, PATCHES + 1, 8)),
        )
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        y = self.norm(x)
        return self.head((x + self.attention(y, y, y, need_weights=False)[0])[:, 0])


class Windows(nn.Module):
    """A convolution inside each quarter of the image, the quarters side by side on the
    batch axis.
    """

    def __init__(self):
        super().__init__()
        self.stem, self.body, self.head = (
            conv(RGB, 6),
            conv(6, 4),
            nn.Linear(4, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = (
            F.relu(self.stem(x))
            .unflatten(2, (2, -1))
            .unflatten(4, (2, -1))
            .permute(0, 2, 4, 1, 3, 5)
        )
        x = F.relu(self.body(x.flatten(0, 2))).unflatten(0, (-1, 4))
        return self.head(x.mean((1, 3, 4)))


class Centred(nn.Module):
    """The mean over everything is subtracted, which involves every channel."""

    def __init__(self):
        super().__init__()
        self.stem, self.body, self.head = (
            conv(RGB, 6),
            conv(6, 4),
            nn.Linear(4, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(pooled(F.relu(self.body(x - x.mean()))))


class DictOutput(nn.Module):
    """Returns a dict with a list inside; everything in it is an output."""

    def __init__(self):
        super().__init__()
        self.stem, self.body, self.head = (
            conv(RGB, 6),
            conv(6, 4),
            nn.Linear(4, CLASSES),
        )

    def forward(self, x: Tensor) -> dict:
        features = F.relu(self.body(F.relu(self.stem(x))))
        return {"logits": self.head(pooled(features)), "features": [features]}


class UpAndDown(nn.Module):
    """Pooling, a transposed convolution and a skip over them."""

    def __init__(self):
        super().__init__()
        self.stem, self.deep = conv(RGB, 6), conv(6, 8)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.body, self.head = conv(10, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = F.relu(self.up(F.relu(self.deep(F.max_pool2d(x, 2)))))
        return self.head(pooled(F.relu(self.body(torch.cat([x, y], 1)))))


class OwnNames(nn.Module):
    """Convolutions written as functions, with parameters that no layer class named."""

    def __init__(self):
        super().__init__()
        self.filters, self.offset = (
            nn.Parameter(torch.randn(6, RGB, 3, 3)),
            nn.Parameter(torch.randn(6)),
        )
        self.matrix = nn.Parameter(torch.randn(CLASSES, 6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(
            pooled(F.relu(F.conv2d(x, self.filters, self.offset, padding=1))),
            self.matrix,
        )


@dataclass(frozen=True)
class Net:
    """A network and what is known about it.

    Attributes:
        build: Makes it.
        groups: Prunable group to its channels.
        macs: Multiply-accumulates of one sample.
        pinned: Pinned group to a part of the reason; every network's input and head
            come on top.
        input: The layer that reads the image.
        size: Height and width of the image.
    """

    build: Callable[[], nn.Module]
    groups: dict[str, int]
    macs: int
    pinned: dict[str, str] = field(default_factory=dict)
    input: tuple[str, ...] = ("stem",)
    head: str = "head"
    size: int = SIZE

    @property
    def all_pinned(self) -> dict[str, str]:
        """Pinned group to a part of the reason, the input and the head included."""
        inputs = {f"{self.input[0]}:input": "is the network's input"}
        return {**inputs, **self.pinned, self.head: "feeds the network's output"}


STEM6 = AREA * K * RGB * 6
NETS: dict[str, Net] = {
    "chain": Net(
        Chain,
        {"conv1": 6, "conv2": 8},
        macs=STEM6 + AREA // 4 * K * 6 * 8 + 8 * CLASSES,
        input=("conv1",),
    ),
    "residual": Net(Residual, {"stem": 8, "inner": 6}, macs=AREA * K * (RGB * 8 + 8 * 6 + 6 * 8) + 8 * CLASSES),
    "concat": Net(
        Concat,
        {"left": 4, "right": 6, "body": 8},
        macs=AREA * K * (RGB * 4 + RGB * 6 + (4 + 6) * 8) + 8 * CLASSES,
        input=("left", "right"),
    ),
    "self_concat": Net(SelfConcat, {"stem": 6}, macs=STEM6 + 2 * 6 * CLASSES),
    "depthwise": Net(
        Depthwise, {"stem": 6, "pointwise": 8}, macs=STEM6 + AREA * (K * 6 + 6 * 8) + 8 * CLASSES
    ),
    "depthwise_multiplier": Net(
        lambda: Depthwise(multiplier=2),
        {"stem": 6, "pointwise": 8},
        macs=STEM6 + AREA * (K * 2 * 6 + 2 * 6 * 8) + 8 * CLASSES,
    ),
    "grouped": Net(
        Grouped,
        {"stem": 8 // 2, "grouped": 12 // 2},
        macs=AREA * K * (RGB * 8 + 8 * 12 // 2) + 12 * CLASSES,
    ),
    "conv_groups": Net(
        ConvGroups, {"stem": 4}, macs=AREA * K * (RGB * 8 + 8 * 16 // 4) + 16 * CLASSES
    ),
    "shuffle": Net(
        Shuffle,
        {"left": 4 // 2, "body": 6},
        macs=AREA * K * (RGB * 4 * 2 + 4 * 6) + (4 + 6) * CLASSES,
        input=("left", "right"),
    ),
    "group_norm": Net(GroupNorm, {"stem": 6 // 2}, macs=STEM6 + 6 * CLASSES),
    "instance_norm": Net(lambda: GroupNorm(6), {"stem": 6}, macs=STEM6 + 6 * CLASSES),
    "attention": Net(
        Attention,
        {"stem": 8, "attention:heads": 2, "attention:width": 4},
        macs=PATCHES * 4 * RGB * 8 + (PATCHES + 1) * 8 * (3 * 8 + 8) + 2 * (PATCHES + 1) ** 2 * 8 + 8 * CLASSES,
    ),
    "windows": Net(Windows, {"stem": 6, "body": 4}, macs=STEM6 + AREA * K * 6 * 4 + 4 * CLASSES),
    "shared": Net(Shared, {"stem": 6}, macs=STEM6 + 2 * AREA * K * 6 * 6 + 6 * CLASSES),
    "two_names": Net(TwoNames, {"stem": 6}, macs=STEM6 + 2 * AREA * K * 6 * 6 + 6 * CLASSES),
    "flatten": Net(
        lambda: Flatten(12),
        {"stem": 4, "hidden": 6},
        macs=12**2 * K * RGB * 4 + 12**2 * 4 * 6 + 6 * CLASSES,
        size=12,
    ),
    "padded_shortcut": Net(
        PaddedShortcut,
        {"stem": 4, "inner": 6},
        macs=AREA * K * RGB * 4 + AREA // 4 * K * (4 * 6 + 6 * 8) + 8 * CLASSES,
        pinned={"outer": "meets a constant that the code writes"},
    ),
    "one_channel": Net(
        OneChannel,
        {"wide": 6},
        macs=AREA * K * (RGB * 1 + 1 * 6) + 6 * CLASSES,
        pinned={"narrow": "is a single channel"},
        input=("narrow",),
    ),
    "squeeze_excitation": Net(
        SqueezeExcitation, {"stem": 8, "squeeze": 2}, macs=AREA * K * RGB * 8 + 8 * 2 + 2 * 8 + 8 * CLASSES
    ),
    "chunk": Net(
        Chunk,
        {"stem": 12 // 2, "left": 4},
        macs=AREA * K * (RGB * 12 + 6 * 4 + 6 * 4) + 4 * CLASSES,
    ),
    "gated": Net(
        lambda: Gated(lambda x: x.chunk(2, 1)), {"stem": 6}, macs=AREA * K * RGB * 12 + 6 * CLASSES
    ),
    "split": Net(
        lambda: Gated(lambda x: x.split([6, 6], 1)),
        {},
        macs=AREA * K * RGB * 12 + 6 * CLASSES,
        pinned={"stem": "the pruned network doesn't run: split_with_sizes expects split_sizes to sum exactly to"},
    ),
    "layer_scale": Net(LayerScale, {"stem": 6}, macs=STEM6 + 6 * CLASSES),
    "no_rule": Net(
        NoRule,
        {"body": 4},
        macs=STEM6 + AREA * K * 6 * 4 + 4 * CLASSES,
        pinned={"stem": "operation renorm in NoRule has no rule"},
    ),
    "spatial_attention": Net(
        SpatialAttention,
        {"stem": 6},
        macs=STEM6 + AREA * K * 6 * 1 + 6 * CLASSES,
        pinned={"attention": "is broadcast over other channels by mul in SpatialAttention"},
    ),
    "softmax": Net(
        lambda: ChannelStatistics(nn.Softmax(-1)),
        {"stem": 6, "body": 4},
        macs=STEM6 + AREA * K * 6 * 4 + 4 * CLASSES,
    ),
    "layer_norm": Net(
        lambda: ChannelStatistics(nn.LayerNorm(6)),
        {"stem": 6, "body": 4},
        macs=STEM6 + AREA * K * 6 * 4 + 4 * CLASSES,
    ),
    "centred": Net(
        Centred,
        {"stem": 6, "body": 4},
        macs=STEM6 + AREA * K * 6 * 4 + 4 * CLASSES,
    ),
    "dict_output": Net(
        DictOutput,
        {"stem": 6},
        macs=STEM6 + AREA * K * 6 * 4 + 4 * CLASSES,
        pinned={"body": "feeds the network's output"},
    ),
    "up_and_down": Net(
        UpAndDown,
        {"stem": 6, "deep": 8, "up": 4, "body": 6},
        macs=STEM6 + AREA // 4 * (K * 6 * 8 + 4 * 8 * 4) + AREA * K * (6 + 4) * 6 + 6 * CLASSES,
    ),
    "own_names": Net(
        OwnNames, {"filters": 6}, macs=STEM6 + 6 * CLASSES, input=("filters",), head="matrix"
    ),
}  # fmt: skip


def build(name: str) -> nn.Module:
    """A network of `NETS` in eval mode, the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomise(NETS[name].build()).eval()


def images(
    n: int, size: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensor:
    """Random normalised images `(n, 3, size, size)`."""
    return torch.randn(
        n, RGB, size, size, generator=torch.Generator().manual_seed(seed), dtype=dtype
    )


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draws every parameter and buffer in place, so that no zero or one hides anything;
    sizes stay tame.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var") or (
            tensor.ndim == 1 and name.endswith("weight")
        ):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.is_floating_point():
            tensor.normal_(
                0,
                tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.2,
                generator=generator,
            )
    return model


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    """Everything that the network returns, as one vector."""

    def leaves(value) -> list[Tensor]:
        if isinstance(value, Tensor):
            return [value.flatten()]
        return [
            leaf
            for child in (value.values() if isinstance(value, dict) else value)
            for leaf in leaves(child)
        ]

    with torch.no_grad():
        return torch.cat(leaves(model(x)))


def random_kept(groups, seed: int, max_sparsity: float = 0.8) -> dict[str, Tensor]:
    """Random channels of every group, at least one of each, and fewer than all of at
    least one.
    """
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for group in groups:
        fewest = max(1, int(group.channels * (1 - max_sparsity)))
        count = int(
            torch.randint(
                fewest, group.channels + 1 - (not kept), (1,), generator=generator
            )
        )
        kept[group.name] = (
            torch.randperm(group.channels, generator=generator)[:count].sort().values
        )
    return kept


def tensors(model: nn.Module) -> list[Tensor]:
    """Every parameter and buffer."""
    return list(model.state_dict().values())


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value; infinite where there are other
    many values.
    """
    if a.shape != b.shape:
        return float("inf")
    return ((a - b).abs().max() / b.abs().max()).item()


def counted_macs(model: nn.Module, size: int) -> int:
    """What PyTorch counts on the network without computing it."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(model).float().to("meta")(
            torch.empty(1, 3, size, size, device="meta")
        )
    return counter.get_total_flops() // 2
