"""In which precision the CPU computes: bfloat16 where that is fast."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

DEVICE = "cpu"
"""The kind of device whose precision this module decides on."""


def has_fast_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware.

    Elsewhere it is emulated and slower than float32.
    """
    capabilities = torch.cpu.get_capabilities()
    return capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)


def autocast(bf16: str = "auto") -> AbstractContextManager:
    """Computes in bfloat16 what PyTorch's autocast does, if wished.

    Args:
        bf16: "auto" for where bfloat16 is fast, "on" for always, "off" for never.

    Returns:
        A context manager.
    """
    return torch.autocast(DEVICE, torch.bfloat16, enabled=_is_enabled(bf16))


@contextmanager
def training_autocast(bf16: str = "auto") -> Iterator[None]:
    """As `autocast`, but fit for passes that gradients follow.

    Depthwise convolutions with a stride, or with a kernel larger than 3, compute in
    float32: their gradient in bfloat16 is several times slower, even with AMX or
    AVX-512.

    Args:
        bf16: As for `autocast`.
    """
    # Where all is float32 there is nothing to exchange.
    slow_in_float32 = _SlowInFloat32() if _is_enabled(bf16) else nullcontext()
    with autocast(bf16), slow_in_float32:
        yield


def _is_enabled(bf16: str) -> bool:
    """Whether "auto", "on" or "off" means bfloat16 on this machine."""
    return bf16 == "on" or (bf16 == "auto" and has_fast_bf16())


class _SlowInFloat32(TorchFunctionMode):
    """Exchanges `torch.conv2d` for `_conv2d`, whoever calls it."""

    # A mode and not a hook on modules: functional calls are to be seen, too.
    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if function is torch.conv2d:
            function = _conv2d
        return function(*args, **(kwargs or {}))


def _conv2d(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    *rest: Any,
    **options: Any,
) -> Tensor:
    """As `torch.conv2d`, but in float32 where bfloat16's gradient would be slow."""
    # With one input channel in all, one a group is an ordinary convolution.
    is_depthwise = weight.shape[1] == 1 and inputs.shape[1] > 1
    largest_stride = max(stride) if isinstance(stride, tuple) else stride
    has_large_step = largest_stride > 1
    if not is_depthwise or not (has_large_step or max(weight.shape[2:]) > 3):
        return torch.conv2d(inputs, weight, bias, stride, *rest, **options)
    with torch.autocast(DEVICE, enabled=False):
        if bias is not None:
            bias = bias.float()
        output = torch.conv2d(
            inputs.float(), weight.float(), bias, stride, *rest, **options
        )
        # As every other convolution under autocast.
        return output.bfloat16()
