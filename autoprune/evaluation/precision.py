"""In which precision the CPU computes: bfloat16 where that is fast."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def has_fast_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; elsewhere it is emulated and
    slower than float32.
    """
    return torch.cpu.get_capabilities().get(
        "avx512_bf16", False
    ) or torch.cpu.get_capabilities().get("amx_bf16", False)


def autocast(bf16: str = "auto") -> AbstractContextManager:
    """bfloat16 autocast on the CPU: where it is fast ("auto"), always ("on") or never
    ("off").
    """
    return torch.autocast("cpu", torch.bfloat16, enabled=_is_wanted(bf16))


@contextmanager
def training_autocast(bf16: str = "auto") -> Iterator[None]:
    """As `autocast`, for passes that gradients follow: some depthwise convolutions then
    take float32.

    Those with a stride or a kernel larger than 3 have a slow gradient in bfloat16: with
    AMX or AVX-512 it takes 3 to 12 times as long as in float32, which was a fifth of a
    MobileNet-V2's training.
    """
    with autocast(bf16), _SomeInFloat32() if _is_wanted(bf16) else nullcontext():
        yield


def _is_wanted(bf16: str) -> bool:
    return bf16 == "on" or (bf16 == "auto" and has_fast_bf16())


class _SomeInFloat32(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        function = _conv2d if function is torch.conv2d else function
        return function(*args, **(kwargs or {}))


def _conv2d(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride=1,
    *rest,
    **options,
) -> Tensor:
    is_depthwise = weight.shape[1] == 1 and inputs.shape[1] > 1
    has_stride = max(stride) > 1 if isinstance(stride, tuple) else stride > 1
    if not is_depthwise or not (has_stride or max(weight.shape[2:]) > 3):
        return torch.conv2d(inputs, weight, bias, stride, *rest, **options)
    with torch.autocast("cpu", enabled=False):
        inputs, weight, bias = (
            None if x is None else x.float() for x in (inputs, weight, bias)
        )
        return torch.conv2d(inputs, weight, bias, stride, *rest, **options).bfloat16()
