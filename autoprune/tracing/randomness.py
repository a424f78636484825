"""Randomness that gives the same at every width, for networks that draw numbers.

Dropout, noise or a layer that is skipped by chance would make two runs of one network
differ, and so would a pruned and a masked one, whose tensors have different sizes.
While a network is traced and proven, every draw is a constant instead.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from autoprune.tracing.calls import argument

Draw: TypeAlias = Callable[["Draws"], Tensor | float]
"""From random numbers, and how they were drawn, to what is given instead of them."""

aten = torch.ops.aten


@contextmanager
def fixed_randomness() -> Iterator[None]:
    """Lets a network draw constants inside the `with` block.

    Python's and NumPy's generators, with which code may skip a layer, start from the
    same seed each time. All generators are left as found.
    """
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    torch_state = torch.get_rng_state()
    random.seed(0)
    np.random.seed(0)
    try:
        with _ConstantDraws():
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


def is_random(func: OpOverload) -> bool:
    """Whether an operation can draw random numbers.

    Args:
        func: An ATen overload.
    """
    return torch.Tag.nondeterministic_seeded in func.tags


class _ConstantDraws(TorchDispatchMode):
    """Replaces what random operations draw."""

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs one operation; a random one gives constants."""
        kwargs = kwargs or {}
        if not is_random(func):
            return func(*args, **kwargs)
        for position, declared in enumerate(func._schema.arguments):
            if declared.name not in SWITCHES:
                continue
            off = SWITCHES[declared.name]
            # By position or by name, as the call has it.
            if position < len(args):
                args = (*args[:position], off, *args[position + 1 :])
            else:
                kwargs = {**kwargs, declared.name: off}
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        draw = DRAWS.get(func.overloadpacket)
        if draw is not None:
            out.copy_(torch.as_tensor(draw(Draws(func, args, kwargs, out))))
        return out


@dataclass(frozen=True)
class Draws:
    """Random numbers and how they were drawn.

    Attributes:
        func: The ATen overload.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        out: The numbers.
    """

    func: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Tensor

    def __getitem__(self, name: str) -> Any:
        """An argument by its name in the operation's schema, or its default."""
        return argument(self.func, self.args, self.kwargs, name)


def _one(draws: Draws) -> float:
    """What is kept or dropped by chance is kept."""
    return 1.0


def _within_unit(draws: Draws) -> float:
    """Three quarters, of numbers between 0 and 1."""
    return 0.75


# Not the middle: of noise around zero, that would erase what it scales.
def _within_range(draws: Draws) -> float:
    """Three quarters of the way through a uniform distribution's range."""
    low = draws["from"]
    return low + 0.75 * (draws["to"] - low)


def _above_zero(draws: Draws) -> float:
    """Half a standard deviation above 0, where the deviation is 1."""
    return 0.5


def _above_mean(draws: Draws) -> Tensor | float:
    """Half a standard deviation above a normal distribution's mean."""
    return draws["mean"] + 0.5 * draws["std"]


def _least(draws: Draws) -> float:
    """The least of a range of integers."""
    for name in ("low", "from"):
        # Not all overloads have one; ranges start at 0 where they don't say.
        try:
            return draws[name]
        except KeyError:
            continue
    return 0.0


def _in_order(draws: Draws) -> Tensor:
    """Positions one after the other, along the last axis."""
    return torch.arange(draws.out.shape[-1]).expand(draws.out.shape)


def _expected(draws: Draws) -> Tensor:
    """The mean of a Poisson or a gamma distribution."""
    return draws["self"]


def _expected_count(draws: Draws) -> Tensor:
    """The mean of a binomial distribution."""
    return draws["count"] * draws["prob"]


def _expected_shares(draws: Draws) -> Tensor:
    """The mean of a Dirichlet distribution."""
    return draws["self"] / draws["self"].sum(-1, keepdim=True)


SWITCHES: dict[str, bool | float] = {
    "train": False,
    "training": False,
    "dropout": 0.0,
    "dropout_p": 0.0,
}
"""Arguments by which an operation draws or doesn't, to the value with which it
doesn't."""
DRAWS: dict[Any, Draw] = {
    aten.bernoulli: _one,
    aten.bernoulli_: _one,
    aten.geometric: _one,
    aten.geometric_: _one,
    aten.exponential: _one,
    aten.exponential_: _one,
    aten.log_normal: _one,
    aten.log_normal_: _one,
    aten.cauchy: _above_zero,
    aten.cauchy_: _above_zero,
    aten.uniform: _within_range,
    aten.uniform_: _within_range,
    aten.rand: _within_unit,
    aten.rand_like: _within_unit,
    aten.randn: _above_zero,
    aten.randn_like: _above_zero,
    aten.normal: _above_mean,
    aten.normal_: _above_mean,
    aten.normal_functional: _above_mean,
    aten.randint: _least,
    aten.randint_like: _least,
    aten.random: _least,
    aten.random_: _least,
    aten.randperm: _in_order,
    aten.multinomial: _in_order,
    aten.poisson: _expected,
    aten._standard_gamma: _expected,
    aten.binomial: _expected_count,
    aten._sample_dirichlet: _expected_shares,
}
"""Operation to what it gives instead of random numbers, whatever the size."""
