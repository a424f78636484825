"""OpenVINO on the CPU, by way of ONNX."""

import functools
import time
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from autoprune.errors import UserError, first_line, missing_package
from autoprune.latency.engine_protocol import Kernel, Setting
from autoprune.latency.onnx_files import PASSES, load_as_onnx, named_file
from autoprune.latency.processor import channel_tile
from autoprune.latency.samples import Samples
from autoprune.structure.inputs import Example

HINTS = {"float32": "f32", "bfloat16": "bf16"}
"""Precision to what OpenVINO calls it."""


class OpenVino:
    """Intel's engine, which convolves with oneDNN."""

    name = "openvino"

    @property
    def precisions(self) -> tuple[str, ...]:
        """See `Engine`; bfloat16 where the processor has it, else it is ignored."""
        capabilities = _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return ("float32", "bfloat16") if "BF16" in capabilities else ("float32",)

    def version(self) -> str:
        """See `Engine`."""
        return _openvino().__version__

    def tile(self, precision: str) -> int:
        """See `Engine`."""
        return channel_tile()

    def load(
        self, model: nn.Module, example: Example, setting: Setting
    ) -> "LoadedRequest":
        """See `Engine`."""
        # Before anything is exported, which takes long.
        self.version()
        return load_as_onnx(model, example, setting, LoadedRequest)


class LoadedRequest:
    """A network in OpenVINO.

    Args:
        path: Its ONNX file.
        samples: Its inputs.
        setting: Its threads and precision count.

    Raises:
        UserError: If OpenVINO doesn't take it.
    """

    def __init__(self, path: Path, samples: Samples, setting: Setting):
        self.samples = samples
        self.setting = setting
        try:
            self.request = self._compile(path, is_profiled=False)
        # OpenVINO raises plain `RuntimeError`s, and others for other inputs.
        except Exception as error:
            raise self._refusal(error) from error

    def seconds(self) -> float:
        """See `Loaded`."""
        started = time.perf_counter()
        self.request.infer()
        return time.perf_counter() - started

    def outputs(self) -> list[torch.Tensor]:
        """The network's answers.

        Raises:
            UserError: If OpenVINO can't run it.
        """
        try:
            self.request.infer()
        except Exception as error:
            raise self._refusal(error) from error
        answers = []
        for port in self.request.model_outputs:
            # A copy, since the next pass writes into the same memory.
            answers.append(torch.from_numpy(self.request.get_tensor(port).data.copy()))
        return answers

    def kernels(self) -> list[Kernel] | None:
        """See `Loaded`."""
        with named_file(self.samples) as (path, layers):
            # Compiled once more: keeping times takes time.
            request = self._compile(path, is_profiled=True)
        request.infer()
        passes = []
        for _ in range(PASSES):
            request.infer()
            passes.append(request.get_profiling_info())
        kernels = []
        # Each pass lists all nodes; one that took less than a microsecond may count as
        # not run in some of them, and what was computed beforehand does in all.
        for infos in zip(*passes, strict=True):
            if not any(map(_has_run, infos)):
                continue
            seconds = median(info.real_time / timedelta(seconds=1) for info in infos)
            name = infos[0].node_name
            kernels.append(layers.kernel(name, infos[0].node_type, seconds))
        return kernels

    def _compile(self, path: Path, is_profiled: bool) -> Any:
        """The network compiled for its batch, and its inputs set."""
        core = _core()
        model = core.read_model(path)
        arrays = self._arrays(model)
        model.reshape({name: array.shape for name, array in arrays.items()})
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": self.setting.threads,
            "INFERENCE_PRECISION_HINT": HINTS[self.setting.precision],
            "PERF_COUNT": is_profiled,
        }
        request = core.compile_model(model, "CPU", options).create_infer_request()
        for name, array in arrays.items():
            request.set_tensor(name, _openvino().Tensor(array))
        return request

    def _arrays(self, model: Any) -> dict[str, Any]:
        """The inputs that are in a graph, by name; what nothing reads isn't."""
        known = set()
        for port in model.inputs:
            known |= port.get_names()
        names = self.samples.signature.input_names
        arrays = {}
        for name, tensor in zip(names, self.samples.inputs.tensors(), strict=True):
            if name in known:
                arrays[name] = tensor.numpy()
        return arrays

    def _refusal(self, error: Exception) -> UserError:
        return UserError(
            "latency.engine",
            f"openvino can't run this network at batch {self.setting.batch} "
            f"({first_line(error)}); choose another engine",
        )


def _has_run(info: Any) -> bool:
    """Whether a node was executed in a pass."""
    return str(info.status).endswith(".EXECUTED")


def _openvino() -> Any:
    """The package.

    Raises:
        UserError: If it isn't installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise missing_package(
            "latency.engine", "the engine openvino", "openvino"
        ) from error
    return openvino


@functools.cache
def _core() -> Any:
    """OpenVINO's devices, which take a while to find."""
    return _openvino().Core()
