"""Which layers of a network the kernels in ONNX Runtime's profile stand for."""

import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from autoprune.latency.engine_protocol import Kernel

WEIGHTED = ("Conv", "Gemm", "MatMul", "ConvTranspose", "LSTM", "GRU", "RNN")
"""Operators of ONNX that read a weight."""
AFFIXES = re.compile(r"^fused |_nchwc$|/?_?[A-Z][A-Za-z]+Fusion_?$|_token_\d+$")
"""What ONNX Runtime adds to the name of a node, or of its output, that it exchanges."""
SUFFIX = "_kernel_time"
"""What the name of a kernel ends with in a profile."""


@dataclass(frozen=True)
class Event:
    """One kernel of one profiled pass.

    Attributes:
        name: Name of its node.
        kind: Its operator.
        seconds: How long it took.
    """

    name: str
    kind: str
    seconds: float


def profiled_passes(path: Path) -> list[list[Event]]:
    """The passes in a profile of ONNX Runtime.

    Args:
        path: The file.

    Returns:
        A list for each pass, its kernels in the order in which they ran.
    """
    events = json.loads(path.read_text())
    # What a pass consists of is written before the pass itself, which began earlier.
    events.sort(key=lambda event: event["ts"])
    passes: list[list[Event]] = []
    for event in events:
        if event["name"] == "model_run":
            passes.append([])
        if event["cat"] == "Node" and event["name"].endswith(SUFFIX):
            name = event["name"].removesuffix(SUFFIX)
            kind = event["args"]["op_name"]
            # The file counts microseconds.
            passes[-1].append(Event(name, kind, event["dur"] * 1e-6))
    return passes


@dataclass(frozen=True)
class Layer:
    """A module of the network with a weight, and a node of the graph that reads it.

    Attributes:
        name: Of the module.
        weight: Shape of its weight in the network.
    """

    name: str
    weight: tuple[int, ...]


@dataclass(frozen=True)
class GraphLayers:
    """The layers of a network by the names that their nodes may have in a profile.

    ONNX Runtime calls a convolution in its blocked layout by the tensor that it makes,
    which is that of an activation where this is computed along with it; whatever else
    it joins gets a word before or behind its name.

    Attributes:
        by_name: Name of a node or of what it makes, to the layer.
    """

    by_name: dict[str, Layer]

    @classmethod
    def of(cls, content: bytes, network: nn.Module) -> "GraphLayers":
        """Reads them from an exported network.

        Args:
            content: The ONNX file.
            network: What it was exported from.
        """
        import onnx

        graph = onnx.load_from_string(content).graph
        shapes = {}
        for name, tensor in network.named_parameters():
            shapes[name] = tuple(tensor.shape)
        by_name: dict[str, Layer] = {}
        # Nodes come after those whose outputs they read.
        for node in graph.node:
            layer = None
            if node.op_type in WEIGHTED:
                layer = _layer_of(node, shapes)
            elif len(node.output) == 1 and node.input:
                # What may be computed along with what made its first input.
                layer = by_name.get(node.input[0])
            if layer is None:
                continue
            if node.op_type in WEIGHTED:
                by_name[node.name] = layer
            for output in node.output:
                by_name[output] = layer
        return cls(by_name)

    def kernels(self, passes: Sequence[Sequence[Event]]) -> list[Kernel]:
        """The kernels of passes of one session, each with its median time.

        Args:
            passes: At least one; all have the same kernels.
        """
        kernels = []
        for events in zip(*passes, strict=True):
            first = events[0]
            seconds = statistics.median(event.seconds for event in events)
            layer = self._find(first.name) if _has_weight(first.kind) else None
            if layer is None:
                kernels.append(Kernel(first.name, first.kind, seconds))
                continue
            kernels.append(
                Kernel(first.name, first.kind, seconds, layer.weight, layer.name)
            )
        return kernels

    def _find(self, name: str) -> Layer | None:
        """The layer of a kernel by its node's name, whatever was added to that."""
        while name not in self.by_name:
            plain = AFFIXES.sub("", name)
            if plain == name:
                return None
            name = plain
        return self.by_name[name]


def _has_weight(kind: str) -> bool:
    """Whether a kernel of such a name, such as "FusedConv", may be a layer."""
    return any(operator in kind for operator in WEIGHTED)


def _layer_of(node: Any, shapes: dict[str, tuple[int, ...]]) -> Layer | None:
    """The layer whose weight a node reads."""
    for name in node.input:
        if name in shapes and len(shapes[name]) > 1:
            return Layer(name.rpartition(".")[0], shapes[name])
    # The exporter gives weights that it has turned new names, but says of each node in
    # which module the code of it ran: "['', 'head', 'linear']", the operation last.
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            scopes = re.findall(r"'([^']*)'", entry.value)
            module = scopes[-2] if len(scopes) > 1 else ""
            shape = shapes.get(f"{module}.weight" if module else "weight")
            if shape is not None and len(shape) > 1:
                return Layer(module, shape)
    return None
