"""The tracer's notebook: which labels an activation carries, which labels met which axis of which tensor.

Labels ride on the tensors themselves, as an attribute; ids of tensors are reused as soon as one is freed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.groups import Layer, own_tensors
from autoprune.labels import LabelBook, along, spread, varying_axes

LABELS, VIEW = "_autoprune_labels", "_autoprune_view"


@dataclass(frozen=True)
class ParameterView:
    """A parameter, possibly seen through view operations.

    Attributes:
        name: Its name in the state dict.
        index: Per original axis the index along that axis of every element of the view.
    """

    name: str
    index: tuple[Tensor, ...]

    def moved(self, move: Callable[[Tensor], Tensor]) -> "ParameterView":
        """The view after one more movement."""
        return ParameterView(self.name, tuple(move(index) for index in self.index))

    def axis_at(self, dim: int) -> int | None:
        """The original axis that lies whole and in order along `dim` of the view, or None."""
        for axis, index in enumerate(self.index):
            line = along(index, dim)
            if line is not None and torch.equal(line, torch.arange(len(line))) and varying_axes(index) in ([dim], []):
                return axis
        return None


@dataclass(frozen=True)
class Call:
    """One executed operation: what went in, what came out."""

    tracer: "Tracer"
    func: Any
    args: tuple
    kwargs: dict
    out: Any

    def tensors(self) -> Iterator[Tensor]:
        """The tensor arguments, lists flattened."""
        for arg in [*self.args, *self.kwargs.values()]:
            yield from (item for item in (arg if isinstance(arg, list | tuple) else [arg]) if isinstance(item, Tensor))

    def replaced(self, substitute: Callable[[Tensor], Tensor]) -> tuple:
        """The positional arguments with every tensor exchanged."""
        one = lambda arg: substitute(arg) if isinstance(arg, Tensor) else arg  # noqa: E731
        return tuple([one(item) for item in arg] if isinstance(arg, list | tuple) else one(arg) for arg in self.args)


@dataclass
class Tracer:
    """Collects, during one forward pass, which labels meet which axis of which tensor."""

    model: nn.Module
    book: LabelBook = field(default_factory=LabelBook)
    layers: list[Layer] = field(default_factory=list)
    unsupported: list[str] = field(default_factory=list)
    uses: dict[tuple[str, int], tuple[Tensor, str]] = field(default_factory=dict)
    operations: list[list[Tensor]] = field(default_factory=list)
    bare: dict[str, Tensor] = field(default_factory=dict)
    _path: list[str] = field(default_factory=list)

    def __post_init__(self):
        self._names = {module: name or type(module).__name__ for name, module in self.model.named_modules()}
        for name, tensor in own_tensors(self.model).items():
            axes = (spread(torch.arange(size), axis, tensor.shape) for axis, size in enumerate(tensor.shape))
            self.see(tensor, ParameterView(name, tuple(axes)))

    def entered(self, module: nn.Module) -> None:
        """The forward pass goes into a module."""
        self._path.append(self._names.get(module, type(module).__name__))

    def left(self) -> None:
        """The forward pass comes out of the module that it entered last."""
        self._path.pop()

    @property
    def where(self) -> str:
        """The module that is running, for messages."""
        return self._path[-1] if self._path else "the model"

    def place(self, operation) -> str:
        """An operation and the module that runs it, for messages."""
        name = operation.overloadpacket.__name__
        return f"{name} in {self.where}" if self._path else name

    def label(self, tensor: Tensor | list | tuple, labels: Tensor | list | tuple) -> None:
        """Attaches labels to an activation, or to each of several."""
        if isinstance(tensor, Tensor):
            setattr(tensor, LABELS, labels)
        else:
            for one, its in zip(tensor, labels, strict=True):
                self.label(one, its)

    def see(self, tensor: Tensor, view: ParameterView) -> None:
        """Marks a tensor as a parameter or a view of one."""
        setattr(tensor, VIEW, view)

    def parameter(self, tensor: Tensor) -> ParameterView | None:
        """The parameter behind a tensor, unless it is an activation."""
        return getattr(tensor, VIEW, None)

    def is_activation(self, tensor: Tensor) -> bool:
        """Whether the tensor carries labels."""
        return hasattr(tensor, LABELS)

    def labels(self, tensor: Tensor) -> Tensor:
        """The labels of an activation, one an element for a bare parameter, 0 for constants; shaped like the tensor."""
        if self.is_activation(tensor):
            return getattr(tensor, LABELS)
        view = self.parameter(tensor)
        if view is None:
            return torch.zeros((), dtype=torch.int64).expand(tensor.shape)
        if view.name not in self.bare:
            shape = [int(index.max()) + 1 for index in view.index]
            self.bare[view.name] = self.book.new(int(np.prod(shape))).view(shape)
        return self.bare[view.name][view.index]

    def use(self, tensor: str, axis: int, labels: Tensor, role: str) -> None:
        """Records that `labels` meet an axis of a parameter; a second use (a shared module) joins both."""
        known = self.uses.get((tensor, axis))
        if known is not None:
            self.book.join(known[0], labels)
        else:
            self.uses[tensor, axis] = labels, role

    def settle_bare_parameters(self) -> None:
        """A bare parameter's channels lie along the one axis on which its elements stayed apart."""
        roots = self.book.roots()
        for name, labels in self.bare.items():
            joined = torch.from_numpy(roots[labels.numpy()])
            axes = varying_axes(joined)
            if len(axes) == 1:
                line = tuple(slice(None) if axis == axes[0] else 0 for axis in range(labels.ndim))
                self.use(name, axes[0], joined[line], "follow")
            elif axes:
                self.book.pin(labels, f"parameter {name} varies along several axes")
