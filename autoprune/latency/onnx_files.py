"""Networks as ONNX files, for the engines that read these."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from autoprune.deploy.export import export_for_timing, export_named
from autoprune.errors import UserError
from autoprune.latency.samples import Samples

Loaded = TypeVar("Loaded")


def load_as_onnx(samples: Samples, load: Callable[[Path], Loaded]) -> Loaded:
    """Loads a network into an engine by way of a temporary file.

    Args:
        samples: The network, and how it is called.
        load: Loads the file, which is gone afterwards, and compares its answers.

    Returns:
        What `load` did.

    Raises:
        ExportError: If ONNX can't express the network.
        UserError: If the engine can't run it, or gives other answers.
    """
    network = samples.network
    signature = samples.signature
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
