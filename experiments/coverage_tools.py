"""What the checks of coverage measure with: outputs, counts, time and memory."""

import copy
import math
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from autoprune.structure.groups import Groups, positions, removal_mask, tensors_in

STATUS = Path("/proc/self/status")
RESET_PEAK = Path("/proc/self/clear_refs")


class CheckError(Exception):
    """Something that has to hold doesn't."""


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    """Everything that a network returns, as one vector.

    Args:
        model: The network.
        x: Its input.
    """
    with torch.no_grad():
        return torch.cat([tensor.flatten() for tensor in tensors_in(model(x))])


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value of `b`.

    Args:
        a: An output.
        b: What it should be.

    Returns:
        The difference; infinite where values aren't finite.
    """
    require(
        a.shape == b.shape,
        f"the output's shape {tuple(a.shape)} isn't {tuple(b.shape)}",
    )
    error = ((a - b).abs().max() / b.abs().max()).item()
    return float("inf") if math.isnan(error) else error


def zero_removed(
    model: nn.Module, groups: Groups, kept: dict[str, Tensor]
) -> nn.Module:
    """A dense copy with zeros in all weights that read a removed channel.

    Args:
        model: The dense network; not changed.
        groups: Its groups.
        kept: Group to kept channels.
    """
    twin = copy.deepcopy(model)
    tensors = twin.state_dict()
    for group in groups:
        for member in group.consumers:
            removed = positions(member, removal_mask(group, kept))
            tensors[member.tensor].index_fill_(member.axis, removed, 0)
    return twin


def operations(model: nn.Module, x: Tensor) -> set[str]:
    """Names of the ATen operations in a forward pass.

    Args:
        model: The network.
        x: Its input.
    """
    with _Names() as names, torch.no_grad():
        model(x)
    return names.seen


class _Names(TorchDispatchMode):
    """Notes the name of every operation that runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = func._schema.name.removeprefix("aten::")
        # One that measures its input, as those that standardise weights do.
        if name == "native_batch_norm" and args[5]:
            name = "native_batch_norm_of_its_input"
        self.seen.add(name)
        return func(*args, **(kwargs or {}))


def n_params(model: nn.Module) -> int:
    """A network's number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def counted_macs(model: nn.Module, shape: torch.Size) -> tuple[str, int]:
    """MACs that PyTorch counts for one sample.

    Without computing it if the forward pass reads no values.

    Args:
        model: The network; not changed.
        shape: Of its input.

    Returns:
        The device on which they were counted, and the number.
    """
    for device in ("meta", "cpu"):
        # With gradients the counter would hook into backward passes.
        plain = copy.deepcopy(model).float().requires_grad_(False)
        try:
            x = torch.zeros(shape, device=device)
            with (
                FlopCounterMode(display=False) as counter,
                torch.no_grad(),
                plain_attention(),
            ):
                plain.to(device)(x)
            return device, counter.get_total_flops() // 2
        # Index tensors and plain attributes can't be read on meta.
        except (RuntimeError, NotImplementedError):
            continue
    raise CheckError("the network can't be counted")


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention as the matrix products that it consists of.

    The fused kernels aren't counted.
    """
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


def without_gradient(model: nn.Module, x: Tensor) -> set[str]:
    """Names of the parameters that training leaves without a finite gradient.

    Args:
        model: The network; left in training mode, with gradients.
        x: Its input.
    """
    model.train().requires_grad_(True)
    torch.manual_seed(0)
    means = [tensor.square().mean() for tensor in tensors_in(model(x))]
    torch.stack(means).sum().backward()
    lacking = set()
    for name, parameter in model.named_parameters():
        if not _has_gradient(parameter):
            lacking.add(name)
    return lacking


def _has_gradient(parameter: nn.Parameter) -> bool:
    grad = parameter.grad
    return (
        grad is not None
        and grad.shape == parameter.shape
        and bool(torch.isfinite(grad).all())
    )


def require(condition: bool, message: str) -> None:
    """Raises a `CheckError` unless something holds.

    Args:
        condition: What has to hold.
        message: What to say if it doesn't.
    """
    if not condition:
        raise CheckError(message)


def describe_error(error: Exception) -> str:
    """Type and first line, for a cell of a table."""
    text = (str(error).strip().splitlines() or [""])[0][:200]
    return text if isinstance(error, CheckError) else f"{type(error).__name__}: {text}"


class Usage:
    """Measures time and memory of what runs inside.

    Attributes:
        seconds: CPU seconds; other programs on the machine don't count.
        mib: Its peak of memory in MiB.
    """

    seconds: float
    mib: int

    def __enter__(self) -> "Usage":
        if STATUS.exists():
            RESET_PEAK.write_text("5")
        self._before = self._resident("VmRSS")
        self._started = time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = round(time.process_time() - self._started, 2)
        self.mib = round(self._resident("VmHWM") - self._before)

    @staticmethod
    def _resident(field_name: str) -> float:
        if not STATUS.exists():  # no Linux: the peak of the whole process so far
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        for line in STATUS.read_text().splitlines():
            if line.startswith(field_name):
                return int(line.split()[1]) / 2**10
        raise AssertionError(f"Linux tells {field_name} of every process")


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raises a TimeoutError inside after so many CPU seconds."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    previous = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)
