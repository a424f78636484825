"""What the kernels of CPU engines are made for on this processor."""

import platform

import torch

SIMD_FLOATS = {"AVX512": 16, "AVX2": 8}
"""PyTorch's name of a processor's vector instructions to float32 numbers in one.

ONNX Runtime blocks channels by as many (NCHWc; `NchwcBlockSize` in
onnxruntime/core/mlas/lib/platform.cpp: 16 where there is AVX-512F, else 8), and oneDNN,
which PyTorch and OpenVINO convolve with, computes as many output channels in a vector
whatever the layout (`simd_w` in src/cpu/x64/jit_brgemm_conv_utils.cpp).
"""
OTHER_TILE = 4
"""Channels of a vector where there is neither: 128 bits, as SSE and NEON have them."""


def channel_tile() -> int:
    """Channels that kernels of CPU engines compute together.

    The same in bfloat16, whose products oneDNN adds up in float32, in AMX tiles 16 rows
    high as well.
    """
    return SIMD_FLOATS.get(torch.backends.cpu.get_cpu_capability(), OTHER_TILE)


def processor_name() -> str:
    """The processor's model, for what is stored per machine."""
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass  # no Linux
    return platform.processor() or platform.machine()
