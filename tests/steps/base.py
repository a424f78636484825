"""What steps are made of: fields that list their choices, and modules that hold a
function.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NORMS = (
    "none",
    "batch",
    "batch",
    "batch",
    "batch",
    "group",
    "layer",
    "instance",
    "group_of_all",
    "plain",
    "plain_group",
)
ACTS = (
    "none",
    "relu",
    "relu",
    "relu",
    "silu",
    "sigmoid",
    "gelu",
    "hardswish",
    "prelu",
    "tanh",
)
STATISTICS = {"group", "layer", "group_of_all", "plain_group"}
"""Norms whose statistics are taken over channels."""


def among(*choices):
    """A field of a step: one of these, by default the first."""
    return field(default=choices[0], metadata={"choices": choices})


@dataclass(frozen=True, repr=False)
class Step:
    """One operation on a value that the network has made before, counted back from the
    newest.
    """

    source: int = among(0, 0, 0, 0, 1, 2, 4)

    def __repr__(self) -> str:
        changed = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)
            if getattr(self, f.name) != f.default
        ]
        return f"{type(self).__name__}({', '.join(changed)})"

    @property
    def sees_channels_together(self) -> bool:
        """Whether it takes statistics over channels: a channel of zeros isn't the same
        as none.
        """
        return {
            getattr(self, "norm", "none"),
            getattr(self, "kind", "none"),
        } & STATISTICS != set()

    def build(self, x: Tensor) -> nn.Module:
        """The module for an operand of this shape."""
        raise NotImplementedError


@dataclass(frozen=True, repr=False)
class Meeting(Step):
    """A step with a second operand."""

    other: int = among(1, 2, 3, 5, 0)


class Do(nn.Module):
    """A function of the operands and of modules of its own, which come first."""

    def __init__(self, function: Callable, *modules: nn.Module):
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(modules)

    def forward(self, *operands: Tensor):
        return self.function(*self.parts, *operands)


class Parameterised(nn.Module):
    """An elementwise operation with a bare parameter, or a buffer."""

    def __init__(
        self, shape: tuple[int, ...], operation: Callable, learned: bool = True
    ):
        super().__init__()
        self.operation = operation
        if learned:
            self.value = nn.Parameter(torch.ones(shape))
        else:
            self.register_buffer("value", torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(x, self.value)


def norm(kind: str, n: int) -> nn.Module:
    """A normalisation of `n` channels."""
    channels_last = Do(
        lambda inner, x: inner(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
        nn.LayerNorm(n),
    )
    return {
        "none": nn.Identity(),
        "batch": nn.BatchNorm2d(n),
        "group": nn.GroupNorm(math.gcd(4, n), n),
        "layer": channels_last,
        "instance": nn.InstanceNorm2d(n, affine=True),
        "group_of_all": nn.GroupNorm(1, n),
        "plain": nn.BatchNorm2d(n, affine=False),
        "plain_group": nn.GroupNorm(math.gcd(4, n), n, affine=False),
    }[kind]


def act(kind: str, n: int, inplace: bool = False) -> nn.Module:
    """An activation of `n` channels."""
    plain = {
        "none": nn.Identity,
        "sigmoid": nn.Sigmoid,
        "gelu": nn.GELU,
        "tanh": nn.Tanh,
    }
    if kind in plain:
        return plain[kind]()
    if kind == "prelu":
        return nn.PReLU(n)
    return {"relu": nn.ReLU, "silu": nn.SiLU, "hardswish": nn.Hardswish}[kind](inplace)


def resized(x: Tensor, like: Tensor) -> Tensor:
    """A map at the size of another."""
    return x if x.shape[2:] == like.shape[2:] else F.interpolate(x, size=like.shape[2:])


def pooled(x: Tensor) -> Tensor:
    """A vector, of a map by its mean over space."""
    return x.mean((2, 3)) if x.ndim == 4 else x


def projection(n_in: int, n_out: int) -> nn.Module:
    """What brings a map to another width; nothing where it has it."""
    return nn.Identity() if n_in == n_out else nn.Conv2d(n_in, n_out, 1)
