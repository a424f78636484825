"""Networks as ONNX files, for the engines that read these."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol, TypeVar

from torch import Tensor, nn

from autoprune.deploy.export import export_for_timing, export_named
from autoprune.errors import UserError
from autoprune.latency.engine_protocol import Setting, check_answers
from autoprune.latency.graph_layers import GraphLayers
from autoprune.latency.samples import Samples
from autoprune.structure.inputs import Example

PASSES = 5
"""Profiled passes, of which each kernel's median counts."""


class Answering(Protocol):
    """A loaded network that can be asked for its answers."""

    def outputs(self) -> list[Tensor]:
        """The answers to its samples."""
        ...


Loaded = TypeVar("Loaded", bound=Answering)


def load_as_onnx(
    model: nn.Module,
    example: Example,
    setting: Setting,
    read: Callable[[Path, Samples, Setting], Loaded],
) -> Loaded:
    """Loads a network into an engine by way of a temporary file.

    Args:
        model: The network; it is left as found.
        example: Its inputs, as `trace` takes them.
        setting: Batch, threads and precision.
        read: Reads the file, which is gone afterwards.

    Returns:
        What `read` made, after its answers were compared with PyTorch's.

    Raises:
        ExportError: If ONNX can't express the network.
        UserError: If the engine can't run it, or gives other answers.
    """
    samples = Samples.of(model, example, setting)
    network = samples.network
    signature = samples.signature

    def load(path: Path) -> Loaded:
        loaded = read(path, samples, setting)
        check_answers(setting, samples.expected, loaded.outputs())
        return loaded

    with TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        export_for_timing(network, signature, samples.inputs, path)
        try:
            return load(path)
        # That exporter flattens inputs otherwise, and writes down what it saw where
        # code chooses by values; the slower one doesn't.
        except UserError:
            export_named(network, signature, path)
            return load(path)


@contextmanager
def named_file(samples: Samples) -> Iterator[tuple[Path, GraphLayers]]:
    """A temporary file whose nodes know the layers that they come from.

    The file that is timed doesn't.

    Args:
        samples: The network, and how it is called.

    Yields:
        The file, alone in a folder that goes at the end of the block, and its layers.
    """
    with TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        export_named(samples.network, samples.signature, path)
        yield path, GraphLayers.of(path, samples.network)
