"""How an exported network is called: its inputs, their names, and its free axis."""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.structure.groups import tensors_in
from autoprune.structure.inputs import Example, Inputs

ONNX_INPUT = "images"
"""Name of the one input of an image network in an ONNX file."""
ONNX_OUTPUT = "logits"
"""Name of the one output of a network in an ONNX file."""
BATCHES = (2, 3)
"""Lengths of the first axis with which a network has to run where that is a batch."""


@dataclass(frozen=True)
class Signature:
    """How a network is called.

    Attributes:
        inputs: An example, on the CPU, floats in float32; of a batch two samples, since
            exporters take the length of an axis of length 1 for a constant.
        arguments: The same by the names of the parameters of `forward`.
        input_names: A name for each tensor among them.
        output_names: A name for each tensor that the network returns.
        has_batch: Whether the first axis of all inputs is a batch of any length.
    """

    inputs: Inputs
    arguments: dict[str, Any]
    input_names: list[str]
    output_names: list[str]
    has_batch: bool

    def samples(self, n: int, generator: torch.Generator) -> Inputs:
        """Random floats; integers are those of the example.

        Args:
            n: Samples in a batch; where there is none, the example's shapes stay.
            generator: Where the numbers come from.
        """

        def sample(tensor: Tensor) -> Tensor:
            if self.has_batch:
                tensor = _repeat(tensor, n)
            if not tensor.is_floating_point():
                return tensor
            return torch.randn(tensor.shape, generator=generator)

        return self.inputs.change(sample)

    @property
    def dynamic_shapes(self) -> Any:
        """Tells exporters which axes may have any length; None where none may."""
        if not self.has_batch:
            return None
        batch = torch.export.Dim("batch")
        if not self.inputs.keywords:
            return _free_axes(self.inputs.positional, batch)
        return _free_axes(self.arguments, batch)


@torch.no_grad()
def signature_of(model: nn.Module, example: Example) -> Signature:
    """Finds out how a network is called.

    Args:
        model: The network, in evaluation mode, on the CPU.
        example: Its inputs, see `autoprune.structure.inputs.Example`.

    Raises:
        UserError: If the example doesn't fit the network's `forward`.
    """
    inputs = Inputs.from_example(example).in_float32()
    inputs.check_fits(model)
    has_batch = _has_batch(model, inputs)
    if has_batch:
        inputs = inputs.change(lambda tensor: _repeat(tensor, BATCHES[0]))
    bound = inspect.signature(model.forward).bind_partial(*inputs.positional)
    # Exporters list keywords in the caller's order, behind what is positional.
    arguments = dict(bound.arguments) | inputs.keywords
    input_names = list(_names(arguments))
    if len(input_names) == 1 and inputs.tensors()[0].ndim == 4:
        input_names = [ONNX_INPUT]
    output_names = _output_names(inputs.run(model), input_names)
    return Signature(inputs, arguments, input_names, output_names, has_batch)


def _output_names(output: object, taken: list[str]) -> list[str]:
    """A name for each tensor that a network returns.

    Args:
        output: What it returned.
        taken: The inputs' names; a file has one namespace for both.
    """
    if isinstance(output, dict):
        names = []
        for name in _names(output):
            names.append(f"output_{name}" if name in taken else name)
        return names
    n_outputs = len(tensors_in(output))
    if n_outputs == 1:
        return [ONNX_OUTPUT]
    return [f"output_{number}" for number in range(n_outputs)]


def _names(values: Mapping[Any, Any], prefix: str = "") -> Iterator[str]:
    """A name for each tensor in nested values, made of the keys that lead to it."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Tensor):
            yield name
        elif isinstance(value, dict):
            yield from _names(value, f"{name}_")
        elif isinstance(value, list | tuple):
            yield from _names(dict(enumerate(value)), f"{name}_")


def _has_batch(model: nn.Module, inputs: Inputs) -> bool:
    """Whether a network runs with two lengths of the inputs' first axis.

    What it returns has to be as much longer, so that a sample stays a sample.
    """
    lengths = {len(tensor) for tensor in inputs.tensors() if tensor.ndim}
    if len(lengths) != 1:
        return False
    counts = []
    for n in BATCHES:
        batch = inputs.change(lambda tensor, n=n: _repeat(tensor, n))
        try:
            outputs = tensors_in(batch.run(model))
        # Whatever code raises for inputs that it doesn't take.
        except Exception:
            return False
        counts.append([len(tensor) if tensor.ndim else 0 for tensor in outputs])
    first, second = counts
    if len(first) != len(second):
        return False
    grows = [
        a * BATCHES[1] == b * BATCHES[0] != 0
        for a, b in zip(first, second, strict=True)
    ]
    return any(grows)


def _repeat(tensor: Tensor, n: int) -> Tensor:
    """The first sample of a batch n times."""
    if not tensor.ndim:
        return tensor
    return tensor[:1].repeat(n, *[1] * (tensor.ndim - 1))


def _free_axes(values: Any, batch: Any) -> Any:
    """For each tensor in nested values that its first axis is free."""
    if isinstance(values, Tensor):
        return {0: batch} if values.ndim else None
    if isinstance(values, dict):
        return {key: _free_axes(value, batch) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return type(values)([_free_axes(value, batch) for value in values])
    return None
