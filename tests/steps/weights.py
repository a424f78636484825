"""Steps with weights that the code computes, constant kernels, recurrent layers, and maps
of one and three dimensions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from steps.base import Do, Step, act, among, pooled

ACROSS = {"softplus", "weight_norm", "spectral_norm", "standard", "mean_abs"}
"""Forms in which a weight of zero isn't the same as none."""


class ComputedConv(nn.Conv2d):
    """A convolution whose weight is computed from a kernel and a gain."""

    def __init__(self, form: str, n_in: int, n_out: int):
        super().__init__(n_in, n_out, 3, padding=1)
        self.form = form
        self.gain = nn.Parameter(torch.ones(n_out, 1, 1, 1))
        self.register_buffer("mask", torch.ones(n_out, n_in, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        computed = {
            "half": lambda: weight * 0.5,
            "gain": lambda: weight * self.gain,
            "mask": lambda: weight * self.mask,
            "softplus": lambda: F.softplus(weight) - 0.7,
            "standard": lambda: standardised(weight) * self.gain,
            "mean_abs": lambda: weight.sign() * weight.abs().mean((1, 2, 3), True),
        }[self.form]()
        return F.conv2d(x, computed, self.bias, padding=1)


def standardised(weight: Tensor) -> Tensor:
    """A weight with mean 0 and variance 1 of each filter."""
    deviation = weight - weight.mean((1, 2, 3), keepdim=True)
    return deviation / (deviation.var((1, 2, 3), keepdim=True) + 1e-3).sqrt() * 0.3


@dataclass(frozen=True, repr=False)
class Computed(Step):
    """A convolution whose weight is computed."""

    form: str = among("half", "gain", "mask", "weight_norm", "standard", "spectral_norm", "softplus", "mean_abs")  # fmt: skip
    width: int = among(4, 6, 8)
    act: str = among("none", "relu", "tanh")

    @property
    def sees_channels_together(self) -> bool:
        return self.form in ACROSS

    def build(self, x: Tensor) -> nn.Module:
        n_in = x.shape[1]
        if self.form in ("weight_norm", "spectral_norm"):
            plain = nn.Conv2d(n_in, self.width, 3, padding=1)
            conv = getattr(parametrizations, self.form)(plain)
        else:
            conv = ComputedConv(self.form, n_in, self.width)
        return nn.Sequential(conv, act(self.act, self.width))


class Blurring(nn.Module):
    """One kernel for every channel."""

    def __init__(self, form: str):
        super().__init__()
        self.form = form
        self.register_buffer("kernel", torch.ones(1, 1, 3, 3) / 9)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        if self.form == "batch":
            rows = F.conv2d(x.flatten(0, 1)[:, None], self.kernel, padding=1)
            return rows.unflatten(0, x.shape[:2])[:, :, 0]
        if self.form == "constant":
            kernel = torch.full((n, 1, 3, 3), 0.1, dtype=x.dtype, device=x.device)
        elif self.form == "repeat":
            kernel = self.kernel.repeat(n, 1, 1, 1)
        else:
            kernel = self.kernel.expand(n, -1, -1, -1)
        stride = 2 if self.form == "repeat" else 1
        return F.conv2d(x, kernel, None, stride, 1, groups=n)


@dataclass(frozen=True, repr=False)
class Blur(Step):
    """Blurs, and pools, with a kernel that nobody learned."""

    form: str = among("expand", "repeat", "constant", "batch")

    def build(self, x: Tensor) -> nn.Module:
        return Blurring(self.form)


@dataclass(frozen=True, repr=False)
class Recurrent(Step):
    """Reads the columns of a map as steps; the result is a map of equal rows."""

    kind: str = among("gru", "lstm", "rnn")
    hidden: int = among(4, 6)
    layers: int = among(1, 1, 2)
    both_ways: bool = among(False, True)

    def build(self, x: Tensor) -> nn.Module:
        kind = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn": nn.RNN}[self.kind]
        layer = kind(
            x.shape[1] * x.shape[2],
            self.hidden,
            self.layers,
            batch_first=True,
            bidirectional=self.both_ways,
        )
        return Do(_read_columns, layer)


def _read_columns(layer: nn.RNNBase, x: Tensor) -> Tensor:
    """Columns as steps; the outputs, one above the other as often as there are steps."""
    made = layer(x.permute(0, 3, 1, 2).flatten(2))[0].transpose(1, 2)
    return made[:, :, None].expand(-1, -1, made.shape[2], -1)


@dataclass(frozen=True, repr=False)
class ToMap(Step):
    """A linear layer whose outputs become a map, as a generator begins."""

    width: int = among(4, 6)
    side: int = among(2, 4)
    then: str = among("conv", "upsample", "pool")

    def build(self, x: Tensor) -> nn.Module:
        linear = nn.Linear(x.shape[1], self.width * self.side**2)
        then = {
            "conv": nn.Conv2d(self.width, 6, 3, padding=1),
            "upsample": nn.Upsample(scale_factor=2, mode="bilinear"),
            "pool": nn.MaxPool2d(2, 1),
        }[self.then]
        side = self.side
        return Do(
            lambda linear, then, x: then(
                linear(pooled(x)).view(len(x), -1, side, side)
            ),
            linear,
            then,
        )


@dataclass(frozen=True, repr=False)
class OtherRank(Step):
    """A map read as a line or as a volume, and what is left of it as a small map."""

    n_axes: int = among(1, 3)
    width: int = among(4, 6)
    then: str = among("pool", "resize", "pad", "sort")

    def build(self, x: Tensor) -> nn.Module:
        kind = nn.Conv1d if self.n_axes == 1 else nn.Conv3d
        conv = kind(x.shape[1], self.width, 3, padding=1)
        return Do(self._read, conv)

    def _read(self, conv: nn.Module, x: Tensor) -> Tensor:
        shaped = x.flatten(2) if self.n_axes == 1 else x.unsqueeze(2)
        made = conv(shaped)
        pixels = F.adaptive_avg_pool1d(self._follow(made).flatten(2), 16)
        return pixels.unflatten(2, (4, 4))

    def _follow(self, made: Tensor) -> Tensor:
        if self.then == "pool":
            pool = F.adaptive_max_pool1d if self.n_axes == 1 else F.adaptive_max_pool3d
            return pool(made, 2)
        if self.then == "resize":
            mode = "linear" if self.n_axes == 1 else "trilinear"
            return F.interpolate(made, size=[3] * self.n_axes, mode=mode)
        if self.then == "pad":
            return F.pad(made, [0, 1], mode="replicate") if self.n_axes == 1 else made
        return made.sort(-1)[0][..., -4:]
