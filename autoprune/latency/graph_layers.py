"""Which layers of a network an engine's kernels stand for, told from an ONNX graph."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from autoprune.latency.engine_protocol import Kernel

WEIGHTED = ("Conv", "Gemm", "MatMul", "ConvTranspose", "LSTM", "GRU", "RNN")
"""Operators of ONNX that read a weight."""
WEIGHTED_KINDS = (*WEIGHTED, "FullyConnected")
"""What the kinds of kernels contain that compute these operators."""
AFFIXES = re.compile(r"^fused |_nchwc$|/?_?[A-Z]\w+Fusion_?$|_token_\d+$|/\w+$")
"""What engines add to the name of a node, or of its output, that they exchange."""


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

    OpenVINO calls a kernel by its node. ONNX Runtime calls a convolution in its blocked
    layout by the tensor that it makes, which is that of an activation where this is
    computed along with it; whatever else it joins gets a word before or behind its
    name.

    Attributes:
        by_name: Name of a node or of what it makes, to the layer.
    """

    by_name: dict[str, Layer]

    @classmethod
    def of(cls, path: Path, network: nn.Module) -> "GraphLayers":
        """Reads them from an exported network.

        Args:
            path: The ONNX file, from `autoprune.deploy.export.export_named`.
            network: What it was exported from.
        """
        import onnx

        graph = onnx.load(path).graph
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

    def kernel(self, name: str, kind: str, seconds: float) -> Kernel:
        """A kernel with the layer that it stands for, where it is one.

        Args:
            name: As the engine calls it.
            kind: What it computes, in the engine's words.
            seconds: How long it took.
        """
        layer = None
        if any(operator in kind for operator in WEIGHTED_KINDS):
            layer = self._find(name)
        if layer is None:
            return Kernel(name, kind, seconds)
        return Kernel(name, kind, seconds, layer.weight, layer.name)

    def _find(self, name: str) -> Layer | None:
        """The layer of a kernel by its node's name, whatever was added to that."""
        while name not in self.by_name:
            plain = AFFIXES.sub("", name)
            if plain == name:
                return None
            name = plain
        return self.by_name[name]


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
