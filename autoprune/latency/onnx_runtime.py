"""ONNX Runtime on the CPU."""

import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from autoprune.deploy.export import feed, onnx_session
from autoprune.errors import UserError, first_line, missing_package
from autoprune.latency.engine_protocol import Kernel, Setting
from autoprune.latency.onnx_files import PASSES, load_as_onnx, named_file
from autoprune.latency.processor import channel_tile
from autoprune.latency.samples import Samples
from autoprune.structure.inputs import Example

SUFFIX = "_kernel_time"
"""What the name of a kernel ends with in a profile."""


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
        # Before anything is exported, which takes long.
        self.version()
        return load_as_onnx(model, example, setting, LoadedSession)


class LoadedSession:
    """A network in ONNX Runtime.

    Args:
        path: Its ONNX file, which is read whole.
        samples: Its inputs.
        setting: Its threads count.
    """

    def __init__(self, path: Path, samples: Samples, setting: Setting):
        self.setting = setting
        self.samples = samples
        self.session = onnx_session(path, setting.threads)
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
        with named_file(self.samples) as (path, layers):
            # In a session of its own: writing the profile takes time.
            session = onnx_session(path, self.setting.threads, path.parent / "profile")
            for _ in range(1 + PASSES):
                session.run(None, self.arrays)
            # It lies beside the network, and goes with it.
            passes = _profiled_passes(Path(session.end_profiling()))
        kernels = []
        # Of one session all passes have the same kernels.
        for events in zip(*passes[1:], strict=True):
            # The file counts microseconds.
            seconds = median(event["dur"] for event in events) * 1e-6
            name = events[0]["name"].removesuffix(SUFFIX)
            kernels.append(layers.kernel(name, events[0]["args"]["op_name"], seconds))
        return kernels


def _profiled_passes(path: Path) -> list[list[dict[str, Any]]]:
    """The kernels of each pass in a profile of ONNX Runtime, in order."""
    events = json.loads(path.read_text())
    # What a pass consists of is written before the pass itself, which began earlier.
    events.sort(key=lambda event: event["ts"])
    passes: list[list[dict[str, Any]]] = []
    for event in events:
        if event["name"] == "model_run":
            passes.append([])
        if event["cat"] == "Node" and event["name"].endswith(SUFFIX):
            passes[-1].append(event)
    return passes
