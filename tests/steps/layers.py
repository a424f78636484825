"""Steps with weights that read the channels of one operand, or of a map and a vector."""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steps.base import (
    ACTS,
    NORMS,
    Do,
    Meeting,
    Parameterised,
    Step,
    act,
    among,
    norm,
    pooled,
    projection,
)


@dataclass(frozen=True, repr=False)
class Conv(Step):
    """Convolution, norm, activation. Width 0 is that of its input."""

    width: int = among(4, 0, 6, 8, 12)
    kernel: int = among(3, 1)
    stride: int = among(1, 1, 1, 2)
    dilation: int = among(1, 1, 1, 2)
    groups: int = among(1, 1, 1, 2, 4)
    bias: bool = among(True, False)
    padding_mode: str = among("zeros", "zeros", "zeros", "replicate")
    norm: str = among(*NORMS)
    act: str = among(*ACTS)

    def build(self, x: Tensor) -> nn.Module:
        n_in, n_out = x.shape[1], self.width or x.shape[1]
        groups, padding = (
            math.gcd(self.groups, n_in, n_out),
            self.dilation * (self.kernel // 2),
        )
        conv = nn.Conv2d(
            n_in,
            n_out,
            self.kernel,
            self.stride,
            padding,
            self.dilation,
            groups,
            self.bias,
            self.padding_mode,
        )
        return nn.Sequential(conv, norm(self.norm, n_out), act(self.act, n_out))


@dataclass(frozen=True, repr=False)
class Depthwise(Step):
    """Depthwise convolution with as many outputs a channel as `multiplier`, norm,
    activation.
    """

    multiplier: int = among(1, 1, 2)
    stride: int = among(1, 1, 2)
    norm: str = among(*NORMS)
    act: str = among(*ACTS)

    def build(self, x: Tensor) -> nn.Module:
        n_out = x.shape[1] * self.multiplier
        conv = nn.Conv2d(x.shape[1], n_out, 3, self.stride, 1, groups=x.shape[1])
        return nn.Sequential(conv, norm(self.norm, n_out), act(self.act, n_out))


@dataclass(frozen=True, repr=False)
class Transposed(Step):
    """Transposed convolution that doubles the size; 0 groups make it depthwise."""

    width: int = among(4, 6, 8)
    groups: int = among(1, 1, 1, 2, 0)
    norm: str = among(*NORMS)

    def build(self, x: Tensor) -> nn.Module:
        n_out = self.width if self.groups else x.shape[1]
        groups = math.gcd(self.groups, x.shape[1], n_out)
        return nn.Sequential(
            nn.ConvTranspose2d(x.shape[1], n_out, 2, 2, groups=groups),
            norm(self.norm, n_out),
        )


@dataclass(frozen=True, repr=False)
class Norm(Step):
    """A normalisation by itself."""

    kind: str = among(*NORMS[1:])

    def build(self, x: Tensor) -> nn.Module:
        return norm(self.kind, x.shape[1])


@dataclass(frozen=True, repr=False)
class Act(Step):
    """An activation by itself, possibly in place, where it changes what others read."""

    kind: str = among(*ACTS[1:])
    inplace: bool = among(False, False, True)

    def build(self, x: Tensor) -> nn.Module:
        return act(self.kind, x.shape[1], self.inplace)


@dataclass(frozen=True, repr=False)
class Residual(Step):
    """A block that adds to its own input; an inverted bottleneck when depthwise."""

    inner: int = among(4, 6, 12)
    depthwise: bool = among(False, False, True)
    norm: str = among(*NORMS)
    act: str = among("relu", *ACTS)

    def build(self, x: Tensor) -> nn.Module:
        n, groups = x.shape[1], self.inner if self.depthwise else 1
        branch = nn.Sequential(
            nn.Conv2d(n, self.inner, 1), norm(self.norm, self.inner), act(self.act, self.inner),
            nn.Conv2d(self.inner, self.inner, 3, padding=1, groups=groups), act(self.act, self.inner),
            nn.Conv2d(self.inner, n, 1), norm(self.norm, n),
        )  # fmt: skip
        return Do(lambda branch, x: x + branch(x), branch)


@dataclass(frozen=True, repr=False)
class ConvNeXt(Step):
    """Depthwise convolution, layer norm and an inverted bottleneck of linear layers,
    channels last; layer scale.
    """

    inner: int = among(6, 12)

    @property
    def sees_channels_together(self) -> bool:
        return True

    def build(self, x: Tensor) -> nn.Module:
        n = x.shape[1]
        mlp = nn.Sequential(
            nn.LayerNorm(n),
            nn.Linear(n, self.inner),
            nn.GELU(),
            nn.Linear(self.inner, n),
        )
        return Do(
            lambda conv, mlp, scale, x: x + scale(mlp(conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)),
            nn.Conv2d(n, n, 3, padding=1, groups=n), mlp, Parameterised((n, 1, 1), torch.mul),
        )  # fmt: skip


@dataclass(frozen=True, repr=False)
class Scale(Step):
    """Bare parameters and buffers that meet the channels."""

    how: str = among("channel", "buffer", "scalar", "shift", "position")

    def build(self, x: Tensor) -> nn.Module:
        shapes = {
            "scalar": (1,),
            "position": tuple(x.shape[1:]),
            "shift": (1, x.shape[1], 1, 1),
        }
        operation = torch.add if self.how in ("shift", "position") else torch.mul
        return Parameterised(
            shapes.get(self.how, (x.shape[1], 1, 1)), operation, self.how != "buffer"
        )


@dataclass(frozen=True, repr=False)
class SqueezeExcite(Step):
    """Channels gated by a function of their own means."""

    hidden: int = among(4, 2, 1)
    form: str = among("conv", "linear")
    gate: str = among("sigmoid", "hardsigmoid")

    def build(self, x: Tensor) -> nn.Module:
        n, gate = (
            x.shape[1],
            {"sigmoid": nn.Sigmoid(), "hardsigmoid": nn.Hardsigmoid()}[self.gate],
        )
        if self.form == "conv":
            ends = nn.Conv2d(n, self.hidden, 1), nn.Conv2d(self.hidden, n, 1)
            path = nn.Sequential(
                nn.AdaptiveAvgPool2d(1), ends[0], nn.ReLU(), ends[1], gate
            )
            return Do(lambda path, x: x * path(x), path)
        path = nn.Sequential(
            nn.Linear(n, self.hidden), nn.ReLU(), nn.Linear(self.hidden, n), gate
        )
        return Do(lambda path, x: x * path(x.mean((2, 3))).view(len(x), -1, 1, 1), path)


@dataclass(frozen=True, repr=False)
class SpatialGate(Step):
    """A map of one channel gates all, made by a convolution or from the channels' mean
    and maximum.
    """

    form: str = among("conv", "statistics")

    @property
    def sees_channels_together(self) -> bool:
        return self.form == "statistics"

    def build(self, x: Tensor) -> nn.Module:
        if self.form == "conv":
            return Do(
                lambda conv, x: x * conv(x).sigmoid(), nn.Conv2d(x.shape[1], 1, 1)
            )

        def maps(x):
            return torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)

        return Do(
            lambda conv, x: x * conv(maps(x)).sigmoid(), nn.Conv2d(2, 1, 3, padding=1)
        )


@dataclass(frozen=True, repr=False)
class Modulate(Meeting):
    """A vector scales or shifts the channels of a map."""

    how: str = among("scale", "shift", "both")

    def build(self, x: Tensor, y: Tensor) -> nn.Module:
        n = x.shape[1]
        linear = nn.Linear(y.shape[1], 2 * n if self.how == "both" else n)
        return Do(partial(_modulated, self.how), linear)


def _modulated(how: str, linear: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    codes = linear(pooled(y))[:, :, None, None]
    if how == "both":
        scale, shift = codes.chunk(2, 1)
        return x * scale.sigmoid() + shift
    return x * codes.sigmoid() if how == "scale" else x + codes


@dataclass(frozen=True, repr=False)
class Twice(Step):
    """One convolution, norm and activation used twice in a row."""

    norm: str = among(*NORMS)

    def build(self, x: Tensor) -> nn.Module:
        n = x.shape[1]
        shared = nn.Sequential(
            nn.Conv2d(n, n, 3, padding=1), norm(self.norm, n), nn.SiLU()
        )
        return Do(lambda shared, x: shared(shared(x)), shared)


@dataclass(frozen=True, repr=False)
class Siamese(Meeting):
    """One convolution and norm used on two maps, as heads are that several scales
    share.
    """

    width: int = among(4, 6)
    norm: str = among(*NORMS)

    def build(self, x: Tensor, y: Tensor) -> nn.Module:
        shared = nn.Sequential(
            nn.Conv2d(x.shape[1], self.width, 3, padding=1),
            norm(self.norm, self.width),
            nn.ReLU(),
        )
        fit = projection(y.shape[1], x.shape[1])
        return Do(lambda shared, fit, a, b: (shared(a), shared(fit(b))), shared, fit)


@dataclass(frozen=True, repr=False)
class Matmul(Step):
    """A 1x1 convolution written with a bare parameter.

    Not as `torch.einsum`: from a single channel it multiplies elementwise, which
    PyTorch's counter doesn't count.
    """

    how: str = among("matmul", "linear")
    width: int = among(4, 6)

    def build(self, x: Tensor) -> nn.Module:
        operation = {
            "matmul": lambda x, weight: (weight @ x.flatten(2)).view(
                len(x), -1, *x.shape[2:]
            ),
            "linear": lambda x, weight: F.linear(x.movedim(1, -1), weight).movedim(
                -1, 1
            ),
        }[self.how]
        return Parameterised((self.width, x.shape[1]), operation)


@dataclass(frozen=True, repr=False)
class Attention(Step):
    """Every pixel attends to every other: PyTorch's module, fused qkv, or 1x1
    convolutions with matrix products.
    """

    form: str = among("convs", "module", "with_weights", "fused")
    heads: int = among(1, 2, 4)
    width: int = among(4, 6, 1)

    @property
    def sees_channels_together(self) -> bool:
        return True

    def build(self, x: Tensor) -> nn.Module:
        n = x.shape[1]
        if self.form == "convs":
            q, k, v = (nn.Conv2d(n, self.width, 1) for _ in range(3))
            return Do(_non_local, q, k, v, nn.Conv2d(self.width, n, 1))
        if self.form == "fused":
            inner = self.heads * self.width
            return Do(
                partial(_fused, self.heads),
                nn.Linear(n, 3 * inner),
                nn.Linear(inner, n),
            )
        attention = nn.MultiheadAttention(n, math.gcd(self.heads, n), batch_first=True)
        return Do(partial(_attended, self.form == "with_weights"), attention)


def _non_local(
    q: nn.Module, k: nn.Module, v: nn.Module, out: nn.Module, x: Tensor
) -> Tensor:
    weights = torch.softmax(q(x).flatten(2).transpose(1, 2) @ k(x).flatten(2), -1)
    values = v(x).flatten(2) @ weights.transpose(1, 2)
    return x + out(values.view(len(x), -1, *x.shape[2:]))


def _fused(heads: int, qkv: nn.Module, out: nn.Module, x: Tensor) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    q, k, v = qkv(tokens).view(*tokens.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
    mixed = (
        F.scaled_dot_product_attention(q, k, v, scale=0.5).transpose(1, 2).flatten(2)
    )
    return x + out(mixed).transpose(1, 2).reshape(x.shape)


def _attended(need_weights: bool, attention: nn.Module, x: Tensor) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    mixed = attention(tokens, tokens, tokens, need_weights=need_weights)[0]
    return (tokens + mixed).transpose(1, 2).reshape(x.shape)


@dataclass(frozen=True, repr=False)
class Flatten(Step):
    """Every pixel of every channel on one axis, into a linear layer."""

    how: str = among("flatten", "view", "channels_last")
    width: int = among(6, 8)

    def build(self, x: Tensor) -> nn.Module:
        ways = {
            "flatten": lambda x: x.flatten(1),
            "view": lambda x: x.reshape(len(x), -1),
            "channels_last": lambda x: x.permute(0, 2, 3, 1).flatten(1),
        }
        shrink = nn.AdaptiveAvgPool2d(2) if x[0].numel() > 512 else nn.Identity()
        n = ways[self.how](shrink(x)).shape[1]
        return Do(
            lambda shrink, linear, x: linear(ways[self.how](shrink(x))),
            shrink,
            nn.Linear(n, self.width),
        )


@dataclass(frozen=True, repr=False)
class Linear(Step):
    """A linear layer on a vector, or on the mean or the maximum of a map over space."""

    width: int = among(6, 8, 3)
    pool: str = among("mean", "maximum")
    norm: str = among("none", "batch", "layer")
    act: str = among("none", "relu", "silu")

    def build(self, x: Tensor) -> nn.Module:
        norms = {
            "none": nn.Identity(),
            "batch": nn.BatchNorm1d(self.width),
            "layer": nn.LayerNorm(self.width),
        }
        tail = nn.Sequential(
            nn.Linear(x.shape[1], self.width),
            norms[self.norm],
            act(self.act, self.width),
        )
        pool = (
            (lambda x: x.amax((2, 3)) if x.ndim == 4 else x)
            if self.pool == "maximum"
            else pooled
        )
        return Do(lambda tail, x: tail(pool(x)), tail)
