"""PyTorch on the CPU: eager, and compiled by `torch.compile`. Both channels last."""

import time
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.errors import UserError, first_line
from autoprune.latency.engine_protocol import Kernel, Setting, check_answers
from autoprune.latency.processor import channel_tile
from autoprune.latency.samples import Samples
from autoprune.structure.groups import tensors_in
from autoprune.structure.inputs import Example, Inputs

Forward = Callable[[Inputs], Any]
"""A network's forward pass on inputs."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Precision to the type of weights and activations."""


class Eager:
    """PyTorch as a network's code runs in it."""

    name = "torch"
    precisions = tuple(DTYPES)

    def version(self) -> str:
        """See `Engine`."""
        return torch.__version__

    def tile(self, precision: str) -> int:
        """See `Engine`."""
        return channel_tile()

    def load(
        self, model: nn.Module, example: Example, setting: Setting
    ) -> "LoadedModule":
        """See `Engine`."""
        samples = Samples.of(model, example, setting)
        dtype = DTYPES[setting.precision]
        # The layout in which PyTorch convolves fastest on the CPU.
        network = samples.network.to(dtype).to(memory_format=torch.channels_last)

        def prepare(tensor: Tensor) -> Tensor:
            if tensor.is_floating_point():
                tensor = tensor.to(dtype)
            if tensor.ndim != 4:
                return tensor
            return tensor.contiguous(memory_format=torch.channels_last)

        inputs = samples.inputs.change(prepare)
        loaded = LoadedModule(self.forward_of(network), inputs, setting)
        check_answers(setting, samples.expected, loaded.outputs())
        return loaded

    def forward_of(self, network: nn.Module) -> Forward:
        """How this engine runs a network.

        Args:
            network: In its precision and layout.
        """
        return lambda inputs: inputs.run(network)


class Compiled(Eager):
    """PyTorch's compiler, with its defaults."""

    name = "compiled"

    def forward_of(self, network: nn.Module) -> Forward:
        """See `Eager`."""
        function = distinct(lambda inputs: inputs.run(network))
        # Lengths are fixed, as in the engines that know no others.
        return torch.compile(function, dynamic=False)


_NUMBERS = count()


def distinct(function: types.LambdaType) -> types.FunctionType:
    """The same function with code of its own.

    PyTorch keeps what it has compiled by the code that it came from, and gives up
    after eight networks of the same code: further ones would run uncompiled.

    Args:
        function: What runs a network.
    """
    code = function.__code__.replace(co_name=f"forward_{next(_NUMBERS)}")
    return types.FunctionType(
        code,
        function.__globals__,
        code.co_name,
        function.__defaults__,
        function.__closure__,
    )


class LoadedModule:
    """A network in PyTorch.

    Args:
        forward: Its forward pass.
        inputs: What it is given.
        setting: Its threads count.
    """

    def __init__(self, forward: Forward, inputs: Inputs, setting: Setting):
        self.forward = forward
        self.inputs = inputs
        self.setting = setting

    # As in use: nothing is kept for a backward pass.
    @torch.inference_mode()
    def seconds(self) -> float:
        """See `Loaded`."""
        with threads(self.setting.threads):
            started = time.perf_counter()
            self.forward(self.inputs)
            return time.perf_counter() - started

    def kernels(self) -> list[Kernel] | None:
        """See `Loaded`."""
        return None

    @torch.inference_mode()
    def outputs(self) -> list[Tensor]:
        """The network's answers.

        Raises:
            UserError: If PyTorch can't run it so.
        """
        setting = self.setting
        try:
            # What compilers and bfloat16 warn of concerns nobody here.
            with warnings.catch_warnings(), threads(setting.threads):
                warnings.simplefilter("ignore")
                return tensors_in(self.forward(self.inputs))
        # PyTorch's compiler and kernels raise a dozen types.
        except Exception as error:
            raise UserError(
                "latency.engine",
                f"{setting.engine} can't run this network in {setting.precision} "
                f"({type(error).__name__}: {first_line(error)}); choose another "
                f"engine or precision",
            ) from error


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Lets PyTorch use so many threads in a block.

    Args:
        n: The number.
    """
    before = torch.get_num_threads()
    # Setting it is what costs time, not asking.
    if before == n:
        yield
        return
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
