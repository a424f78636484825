"""Steps that let maps meet, move channels and pixels, or see all channels at once."""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steps.base import Do, Meeting, Step, among, projection, resized


@dataclass(frozen=True, repr=False)
class Add(Meeting):
    """Two maps meet element by element, the second brought to the first one's shape."""

    how: str = among(
        "add",
        "add",
        "add",
        "mul",
        "maximum",
        "sub",
        "stack",
        "weighted",
        "where",
        "inplace",
    )

    def build(self, x: Tensor, y: Tensor) -> nn.Module:
        meet = {
            "add": torch.add, "mul": lambda a, b: a * torch.tanh(b), "maximum": torch.maximum, "sub": torch.sub,
            "stack": lambda a, b: torch.stack([a, b]).sum(0), "weighted": lambda a, b: 0.3 * a + 0.7 * b,
            "where": lambda a, b: torch.where(a > 0, a, b), "inplace": lambda a, b: a.clone().add_(b),
        }[self.how]  # fmt: skip
        return Do(
            lambda fit, a, b: meet(a, resized(fit(b), a)),
            projection(y.shape[1], x.shape[1]),
        )


@dataclass(frozen=True, repr=False)
class Broadcast(Meeting):
    """A map meets another's mean over space, its mean over channels, or one channel
    made of it.
    """

    how: str = among("space", "one", "channels")

    @property
    def sees_channels_together(self) -> bool:
        return self.how == "channels"

    def build(self, x: Tensor, y: Tensor) -> nn.Module:
        if self.how == "one":
            return Do(
                lambda conv, a, b: a + resized(conv(b), a), nn.Conv2d(y.shape[1], 1, 1)
            )
        if self.how == "channels":
            return Do(lambda a, b: a + resized(b.mean(1, keepdim=True), a))
        return Do(
            lambda fit, a, b: a + fit(b).mean((2, 3), keepdim=True),
            projection(y.shape[1], x.shape[1]),
        )


@dataclass(frozen=True, repr=False)
class Concat(Meeting):
    """Two maps side by side, the first possibly twice."""

    again: bool = among(False, False, True)

    def build(self, x: Tensor, y: Tensor) -> nn.Module:
        return Do(
            lambda a, b: torch.cat([a, resized(b, a), *([a] if self.again else [])], 1)
        )


@dataclass(frozen=True, repr=False)
class Split(Step):
    """The channels go different ways."""

    how: str = among("chunk", "sizes", "slices", "alternate", "view")
    pieces: int = among(2, 3, 4)

    def build(self, x: Tensor) -> nn.Module:
        n, k = x.shape[1], math.gcd(self.pieces, x.shape[1])
        first = max(1, n // self.pieces)
        ways = {
            "chunk": lambda x: x.chunk(self.pieces, 1),
            "sizes": lambda x: x.split([first, n - first] if n > 1 else [n], 1),
            "slices": lambda x: (x[:, :first], x[:, first:] if n > 1 else x),
            "alternate": lambda x: (x[:, ::2], x[:, 1::2] if n > 1 else x),
            "view": lambda x: x.view(len(x), k, -1, *x.shape[2:]).unbind(1),
        }
        return Do(ways[self.how])


@dataclass(frozen=True, repr=False)
class Gated(Step):
    """One half of the channels gates the other."""

    how: str = among("chunk", "glu")

    def build(self, x: Tensor) -> nn.Module:
        expand = nn.Identity() if x.shape[1] % 2 == 0 else nn.Conv2d(x.shape[1], 8, 1)
        return Do(
            _halves_gated
            if self.how == "chunk"
            else lambda expand, x: F.glu(expand(x), 1),
            expand,
        )


def _halves_gated(expand: nn.Module, x: Tensor) -> Tensor:
    value, gate = expand(x).chunk(2, 1)
    return value * gate.sigmoid()


@dataclass(frozen=True, repr=False)
class Maxout(Step):
    """The larger of each two neighbouring channels."""

    def build(self, x: Tensor) -> nn.Module:
        if x.shape[1] % 2:
            return nn.Identity()
        return Do(lambda x: x.view(len(x), -1, 2, *x.shape[2:]).amax(2))


@dataclass(frozen=True, repr=False)
class Pad(Step):
    """Padding in space."""

    mode: str = among("constant", "reflect", "replicate", "circular")

    def build(self, x: Tensor) -> nn.Module:
        mode = self.mode if min(x.shape[2:]) > 1 else "constant"
        return Do(lambda x: F.pad(x, (1, 0, 1, 1), mode))


@dataclass(frozen=True, repr=False)
class ChannelPad(Step):
    """Zeros before and behind the channels."""

    how: str = among("pad", "cat")
    before: int = among(0, 2)

    def build(self, x: Tensor) -> nn.Module:
        if self.how == "pad":
            return Do(lambda x: F.pad(x, (0, 0, 0, 0, self.before, 2)))
        return Do(lambda x: torch.cat([torch.zeros_like(x), x], 1))


@dataclass(frozen=True, repr=False)
class Shuffle(Step):
    """The channels of several groups take turns."""

    how: str = among("view", "module")
    groups: int = among(2, 4, 3)

    def build(self, x: Tensor) -> nn.Module:
        groups = math.gcd(self.groups, x.shape[1])
        if self.how == "module":
            return nn.ChannelShuffle(groups)
        return Do(
            lambda x: (
                x.view(len(x), groups, -1, *x.shape[2:]).transpose(1, 2).flatten(1, 2)
            )
        )


@dataclass(frozen=True, repr=False)
class PixelShuffle(Step):
    """Channels become space, after a convolution that makes them divisible, or space
    becomes channels.
    """

    how: str = among("shuffle", "unshuffle")

    def build(self, x: Tensor) -> nn.Module:
        if self.how == "unshuffle":
            return (
                nn.PixelUnshuffle(2)
                if all(size % 2 == 0 for size in x.shape[2:])
                else nn.Identity()
            )
        fit = nn.Identity() if x.shape[1] % 4 == 0 else nn.Conv2d(x.shape[1], 16, 1)
        return nn.Sequential(fit, nn.PixelShuffle(2))


@dataclass(frozen=True, repr=False)
class Pool(Step):
    """Smaller maps."""

    how: str = among("max", "average", "adaptive", "slice", "max_same", "adaptive_max")

    def build(self, x: Tensor) -> nn.Module:
        if min(x.shape[2:]) < 2:
            return nn.Identity()
        slices = Do(lambda x: x[:, :, ::2, 1::2])
        return {
            "max": nn.MaxPool2d(2), "average": nn.AvgPool2d(2), "adaptive": nn.AdaptiveAvgPool2d(3), "slice": slices,
            "max_same": nn.MaxPool2d(3, 1, 1), "adaptive_max": nn.AdaptiveMaxPool2d(2),
        }[self.how]  # fmt: skip


@dataclass(frozen=True, repr=False)
class Upsample(Step):
    """Larger maps."""

    how: str = among("nearest", "bilinear", "bicubic", "repeat")

    def build(self, x: Tensor) -> nn.Module:
        if self.how == "repeat":
            return Do(lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3))
        return nn.Upsample(scale_factor=2, mode=self.how)


@dataclass(frozen=True, repr=False)
class ChannelOrder(Step):
    """The channels change places."""

    how: str = among("flip", "roll", "permuted")

    def build(self, x: Tensor) -> nn.Module:
        if self.how == "permuted":
            return Permuted(
                torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(0))
            )
        return Do(lambda x: x.flip(1) if self.how == "flip" else x.roll(1, 1))


class Permuted(nn.Module):
    """Channels picked by a buffer of indices."""

    def __init__(self, order: Tensor):
        super().__init__()
        self.register_buffer("order", order)

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.order]


@dataclass(frozen=True, repr=False)
class Write(Step):
    """Part of a tensor is written after it was made."""

    how: str = among("into_copy", "into_zeros", "shift")

    def build(self, x: Tensor) -> nn.Module:
        return Do(partial(_written, self.how))


def _written(how: str, x: Tensor) -> Tensor:
    out = torch.zeros_like(x) if how == "into_zeros" else x.clone()
    if how == "shift":  # the first quarter of the channels moves one pixel
        n = -(-x.shape[1] // 4)
        out[:, :n, :, 1:] = x[:, :n, :, :-1]
    else:
        out[:, :, ::2] = x[:, :, ::2].relu()
    return out


@dataclass(frozen=True, repr=False)
class AcrossChannels(Step):
    """Functions that see all channels at once, or their number."""

    how: str = among(
        "softmax",
        "normalize",
        "centre",
        "centre_all",
        "cumsum",
        "width",
        "ramp",
        "mean_map",
        "gram",
        "neighbours",
    )

    @property
    def sees_channels_together(self) -> bool:
        return True

    def build(self, x: Tensor) -> nn.Module:
        return Do(_ACROSS[self.how])


def _gram(x: Tensor) -> Tensor:
    flat = x.flatten(2)
    return x + (torch.softmax(flat @ flat.transpose(1, 2), -1) @ flat).view(x.shape)


_ACROSS = {
    "softmax": lambda x: torch.softmax(x, 1),
    "normalize": lambda x: F.normalize(x, dim=1),
    "centre": lambda x: x - x.mean(1, keepdim=True),
    "centre_all": lambda x: x - x.mean(),
    "cumsum": lambda x: 0.3 * x.cumsum(1),
    "width": lambda x: 3 * x / x.shape[1],
    "ramp": lambda x: (
        x
        * torch.linspace(1, 2, x.shape[1], dtype=x.dtype, device=x.device)[
            :, None, None
        ]
    ),
    "mean_map": lambda x: x.mean(1, keepdim=True),
    "gram": _gram,
    "neighbours": lambda x: F.local_response_norm(x, 3, alpha=1.0),
}


@dataclass(frozen=True, repr=False)
class SpaceMoves(Step):
    """Pixels change places, among them by cutting the map into windows and back."""

    how: str = among("flip", "roll", "transpose", "windows", "patches")

    def build(self, x: Tensor) -> nn.Module:
        if self.how == "windows" and any(size % 2 for size in x.shape[2:]):
            return nn.Identity()
        return Do(_MOVES[self.how])


def _windows_normed(x: Tensor) -> Tensor:
    batch, n, height, width = x.shape
    windows = (
        x.view(batch, n, height // 2, 2, width // 2, 2)
        .permute(0, 2, 4, 3, 5, 1)
        .reshape(-1, 4, n)
    )
    windows = windows - windows.amax(1, keepdim=True)
    back = windows.view(batch, height // 2, width // 2, 2, 2, -1).permute(
        0, 5, 1, 3, 2, 4
    )
    return back.reshape(batch, -1, height, width)


_MOVES = {
    "flip": lambda x: x.flip(3),
    "roll": lambda x: x.roll((1, 1), (2, 3)),
    "transpose": lambda x: x.transpose(2, 3),
    "windows": _windows_normed,
    "patches": lambda x: (
        F.unfold(x, 3, padding=1).view(len(x), -1, 9, *x.shape[2:])[:, :, 0::4].mean(2)
    ),
}
