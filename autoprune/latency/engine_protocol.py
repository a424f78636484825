"""What measurements ask of an engine: the seam behind which any of them may stand.

An engine owns its clock. So one on a GPU may use the device's events, and one without a
clock can stand in for a machine in tests.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from autoprune.errors import UserError
from autoprune.reporting.wording import setting_text
from autoprune.structure.inputs import Example

LARGEST_ERRORS = {"float32": 1e-4, "bfloat16": 5e-2}
"""Precision to how far an engine's answers may be from PyTorch's in float32, as a share
of an output's largest value.

bfloat16 has 8 bits of mantissa, so each product is off by up to 0.4 %; layers add up.
"""


@dataclass(frozen=True)
class Setting:
    """What a latency is measured with, and what stands beside every one of them.

    Attributes:
        engine: Name of the engine.
        batch: Samples in a forward pass.
        threads: Threads that the engine may use.
        precision: What it computes in: "float32" or "bfloat16".
    """

    engine: str
    batch: int
    threads: int
    precision: str

    def __str__(self) -> str:
        return setting_text(asdict(self))


@dataclass(frozen=True)
class Kernel:
    """One kernel of one profiled pass: what an engine runs as a whole.

    Attributes:
        name: As the engine calls it.
        kind: What it computes, in the engine's words, such as "Conv".
        seconds: How long it took.
        weight: Shape of its weight in the network, where it has one and it is known.
        layer: The module of the network that it stands for, such as "layer1.0.conv1";
            None where that isn't known.
    """

    name: str
    kind: str
    seconds: float
    weight: tuple[int, ...] | None = None
    layer: str | None = None


class Loaded(Protocol):
    """A network in an engine, for one setting and one batch of random inputs."""

    def seconds(self) -> float:
        """Runs one forward pass.

        Returns:
            How long it took.
        """
        ...

    def kernels(self) -> list[Kernel] | None:
        """Runs one profiled pass, after one that warms up.

        Returns:
            The kernels in the order in which they ran; None from an engine without a
            profiler.
        """
        ...


class Engine(Protocol):
    """Runs networks and says how long that takes."""

    @property
    def name(self) -> str:
        """As users write it."""
        ...

    @property
    def precisions(self) -> tuple[str, ...]:
        """What it computes in on this machine, "float32" first."""
        ...

    def version(self) -> str:
        """Of the package that it comes from.

        Raises:
            UserError: If that isn't installed.
        """
        ...

    def tile(self, precision: str) -> int:
        """In how many channels its kernels work on this processor.

        A layer whose width is no multiple of it is padded, or leaves the fast path.

        Args:
            precision: One of `precisions`.
        """
        ...

    def load(self, model: nn.Module, example: Example, setting: Setting) -> Loaded:
        """Brings a network into the engine, and holds its answers against PyTorch's.

        Args:
            model: The network; it is left as found.
            example: Its inputs, as `trace` takes them.
            setting: Batch, threads and precision.

        Returns:
            The network, ready to be timed.

        Raises:
            ExportError: If the engine can't express the network.
            UserError: If it can't run it, or gives other answers.
        """
        ...


def check_answers(
    setting: Setting, expected: Sequence[Tensor], found: Sequence[Tensor]
) -> None:
    """Refuses an engine whose answers aren't the network's.

    Args:
        setting: The engine and its precision.
        expected: PyTorch's outputs in float32.
        found: The engine's outputs.

    Raises:
        UserError: If one differs by more than `LARGEST_ERRORS` allows.
    """
    limit = LARGEST_ERRORS[setting.precision]
    if len(found) != len(expected):
        raise UserError(
            "latency.engine",
            f"{setting.engine} gives {len(found)} outputs of this network, PyTorch "
            f"{len(expected)}; choose another engine",
        )
    for answer, right in zip(found, expected, strict=True):
        error = _difference(right, answer)
        # Not `error > limit`: a NaN has to fail as well.
        if not error <= limit:
            raise UserError(
                "latency.engine",
                f"{setting.engine} answers otherwise than PyTorch on this network: "
                f"in {setting.precision} the outputs differ by {error:.1e} of the "
                f"largest, the limit is {limit:.0e}; choose another engine or "
                f"precision",
            )


def _difference(expected: Tensor, found: Tensor) -> float:
    """The largest difference of one output, relative to its largest value."""
    if expected.shape != found.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    expected = expected.double()
    found = found.double()
    # What isn't finite has no difference: it is the same, or all of it is wrong.
    is_same = (expected == found) | (expected.isnan() & found.isnan())
    differences = (expected - found).abs().masked_fill(is_same, 0.0)
    finite = expected.abs().masked_fill(~expected.isfinite(), 0.0)
    # Where all outputs are 0, only 0 is right.
    scale = finite.max().clamp_min(torch.finfo(torch.float32).tiny)
    return (differences.max() / scale).item()
