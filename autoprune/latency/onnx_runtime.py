"""ONNX Runtime on the CPU."""

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from autoprune.deploy.export import export_for_timing, export_named, feed, onnx_session
from autoprune.errors import UserError, first_line, missing_package
from autoprune.latency.engine_protocol import Kernel, Setting, check_answers
from autoprune.latency.onnx_kernels import GraphLayers, profiled_passes
from autoprune.latency.processor import channel_tile
from autoprune.latency.samples import Samples
from autoprune.structure.inputs import Example

PASSES = 5
"""Profiled passes, of which each kernel's median counts."""


class OnnxRuntime:
    """The engine that runs what `autoprune export` writes."""

    name = "onnxruntime"
    # Its convolutions on a CPU know no bfloat16.
    precisions = ("float32",)

    def version(self) -> str:
        """See `Engine`."""
        try:
            import onnxruntime
        except ImportError as error:
            raise missing_package(
                "latency.engine", "the engine onnxruntime", "onnxruntime onnxscript"
            ) from error
        return onnxruntime.__version__

    def tile(self, precision: str) -> int:
        """See `Engine`."""
        return channel_tile()

    def load(
        self, model: nn.Module, example: Example, setting: Setting
    ) -> "LoadedSession":
        """See `Engine`."""
        self.version()
        samples = Samples.of(model, example, setting)
        with TemporaryDirectory() as folder:
            path = Path(folder) / "network.onnx"
            export_for_timing(samples.network, samples.signature, samples.inputs, path)
            loaded = LoadedSession(path.read_bytes(), samples, setting)
        check_answers(setting, samples.expected, loaded.outputs())
        return loaded


class LoadedSession:
    """A network in ONNX Runtime.

    Args:
        content: Its ONNX file.
        samples: Its inputs.
        setting: Its threads count.
    """

    def __init__(self, content: bytes, samples: Samples, setting: Setting):
        self.setting = setting
        self.session = onnx_session(content, setting.threads)
        self.samples = samples
        names = samples.signature.input_names
        self.arrays = feed(self.session, names, samples.inputs)

    def seconds(self) -> float:
        """See `Loaded`."""
        started = time.perf_counter()
        self.session.run(None, self.arrays)
        return time.perf_counter() - started

    def outputs(self) -> list[torch.Tensor]:
        """The network's answers.

        Raises:
            UserError: If ONNX Runtime can't run it.
        """
        try:
            answers: Any = self.session.run(None, self.arrays)
        # ONNX Runtime's errors have no common class.
        except Exception as error:
            raise UserError(
                "latency.engine",
                f"onnxruntime can't run this network at batch {self.setting.batch} "
                f"({first_line(error)}); choose another engine",
            ) from error
        return [torch.from_numpy(answer) for answer in answers]

    def kernels(self) -> list[Kernel] | None:
        """See `Loaded`."""
        with TemporaryDirectory() as folder:
            path = Path(folder) / "network.onnx"
            export_named(self.samples.network, self.samples.signature, path)
            content = path.read_bytes()
            # In a session of its own: writing the profile takes time.
            session = onnx_session(
                content, self.setting.threads, Path(folder) / "profile"
            )
            for _ in range(1 + PASSES):
                session.run(None, self.arrays)
            # The folder goes at the end of the block, and the file with it.
            passes = profiled_passes(Path(session.end_profiling()))
        layers = GraphLayers.of(content, self.samples.network)
        return layers.kernels(passes[1:])
