"""An engine without a clock: its times follow from the network's shapes alone, so that
tests know what is true of them.

A layer takes the longer of two times, that of its multiplications and that of the
channels that it moves; both count channels in tiles. So time climbs in stairs, and
has a knee where a layer is so narrow that moving is what takes long.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from autoprune.errors import ExportError
from autoprune.latency.engine_protocol import Kernel, Setting, check_answers
from autoprune.latency.samples import Samples
from autoprune.structure.inputs import Example

SECONDS_PER_MAC = 1e-9
SECONDS_PER_VALUE = 2e-8
"""Of an activation that is read or written."""
CONSTANT = 5e-5
"""Seconds of a pass beside its layers."""
KINDS = {nn.Conv2d: "Conv", nn.Linear: "Gemm"}


@dataclass
class FakeEngine:
    """See the module.

    Attributes:
        name: What it is entered as.
        width: Its tile, in channels.
        is_halved: Whether fewer channels than a tile take a half of it, a quarter, ...
        noise: Relative deviation of a pass, drawn from `generator`.
        error: By how much its answers differ, relative to the largest.
        refuses: Why it can't express any network; empty where it can.
        has_profiler: Whether it tells its kernels.
        generator: Where the noise comes from.
        loads: Settings of the networks that it was given.
    """

    name: str = "fake"
    width: int = 8
    is_halved: bool = False
    noise: float = 0.0
    error: float = 0.0
    refuses: str = ""
    has_profiler: bool = True
    generator: np.random.Generator = field(
        default_factory=lambda: np.random.default_rng(0)
    )
    loads: list[Setting] = field(default_factory=list)
    precisions: tuple[str, ...] = ("float32", "bfloat16")

    def version(self) -> str:
        return "1.0"

    def tile(self, precision: str) -> int:
        return self.width

    def load(
        self, model: nn.Module, example: Example, setting: Setting
    ) -> "FakeLoaded":
        if self.refuses:
            raise ExportError(self.refuses)
        samples = Samples.of(model, example, setting)
        answers = [
            output + self.error * output.abs().max() for output in samples.expected
        ]
        check_answers(setting, samples.expected, answers)
        self.loads.append(setting)
        return FakeLoaded(self, kernels_of(samples, setting, self._rounded_up))

    def _rounded_up(self, n_channels: int) -> int:
        tile = self.width
        while self.is_halved and tile // 2 >= n_channels:
            tile //= 2
        return -(-n_channels // tile) * tile


@dataclass
class FakeLoaded:
    """A network of which all times are known.

    Attributes:
        engine: Whose noise counts.
        layers: Its layers with their times.
    """

    engine: FakeEngine
    layers: list[Kernel]

    @property
    def exact_seconds(self) -> float:
        """What a pass takes without noise."""
        return CONSTANT + sum(layer.seconds for layer in self.layers)

    def seconds(self) -> float:
        return self.exact_seconds * self._factor()

    def kernels(self) -> list[Kernel] | None:
        if not self.engine.has_profiler:
            return None
        kernels = []
        for layer in self.layers:
            seconds = layer.seconds * self._factor()
            kernels.append(
                Kernel(layer.name, layer.kind, seconds, layer.weight, layer.layer)
            )
        return kernels

    def _factor(self) -> float:
        # No pass is over before it has begun.
        return max(0.1, 1 + self.engine.noise * self.engine.generator.standard_normal())


def kernels_of(
    samples: Samples, setting: Setting, rounded_up: Callable[[int], int]
) -> list[Kernel]:
    """The layers of a network in the order in which they run, with their times."""
    kernels = []
    handles = []

    def note(name: str):
        def hook(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            seconds = layer_seconds(module, inputs[0], output, rounded_up)
            seconds /= setting.threads
            if setting.precision == "bfloat16":
                seconds /= 2
            kind = KINDS[type(module)]
            shape = tuple(module.weight.shape)
            kernels.append(Kernel(name, kind, seconds, shape, name))

        return hook

    for name, module in samples.network.named_modules():
        if type(module) in KINDS:
            handles.append(module.register_forward_hook(note(name)))
    with torch.no_grad():
        samples.inputs.run(samples.network)
    for handle in handles:
        handle.remove()
    return kernels


def layer_seconds(
    module: nn.Module,
    read: torch.Tensor,
    written: torch.Tensor,
    rounded_up: Callable[[int], int],
) -> float:
    """What one layer takes on one thread in float32."""
    n_out, n_in, *kernel = module.weight.shape
    n_groups = getattr(module, "groups", 1)
    positions_read = read.numel() // (n_in * n_groups)
    positions_written = written.numel() // n_out
    wide_out = rounded_up(n_out)
    wide_in = rounded_up(n_in * n_groups)
    # A group reads only its own channels: of a depthwise layer each its one.
    per_output = n_in if n_groups > 1 else wide_in
    macs = positions_written * math.prod(kernel) * wide_out * per_output
    values = positions_read * wide_in + positions_written * wide_out
    return max(macs * SECONDS_PER_MAC, values * SECONDS_PER_VALUE)
