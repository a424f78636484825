"""The tracer's notebook: which labels an activation carries, which labels met which
axis of which tensor.

Labels ride on the tensors themselves, as an attribute; ids of tensors are reused as
soon as one is freed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.errors import UserError
from autoprune.structure.groups import Layer, own_tensors
from autoprune.structure.labels import (
    LabelBook,
    broadcast_labels,
    labels_on_axis,
    lines,
    varying_axes,
)
from autoprune.tracing.constraint_solver import factors_of, planes, solve_constraints

LABELS, VIEW = "_autoprune_labels", "_autoprune_view"


@dataclass(frozen=True)
class ParameterView:
    """A parameter, possibly seen through view operations.

    Attributes:
        name: Its name in the state dict.
        shape: Its own shape.
        index: Per original axis the index along that axis of every element of the view.
    """

    name: str
    shape: torch.Size
    index: tuple[Tensor, ...]

    @classmethod
    def whole(cls, name: str, tensor: Tensor) -> "ParameterView":
        """The parameter as it is."""
        axes = (
            broadcast_labels(torch.arange(size), axis, tensor.shape)
            for axis, size in enumerate(tensor.shape)
        )
        return cls(name, tensor.shape, tuple(axes))

    def moved(self, move: Callable[[Tensor], Tensor]) -> "ParameterView":
        """The view after one more movement."""
        return ParameterView(
            self.name, self.shape, tuple(move(index) for index in self.index)
        )

    def axis_at(self, dim: int) -> int | None:
        """The original axis that lies whole and in order along `dim` of the view, or
        None.
        """
        lines = [labels_on_axis(index, dim) for index in self.index]
        fits = [
            axis
            for axis, line in enumerate(lines)
            if line is not None and torch.equal(line, torch.arange(self.shape[axis]))
        ]
        # Axes of length 1 look alike.
        return dim if dim in fits else next(iter(fits), None)


@dataclass(frozen=True)
class Call:
    """One executed operation: what went in, what came out."""

    tracer: "Tracer"
    func: Any
    args: tuple
    kwargs: dict
    out: Any

    def __getitem__(self, name: str) -> Any:
        """An argument by its name in the operation's schema; its default where it
        wasn't given.
        """
        for position, argument in enumerate(self.func._schema.arguments):
            if argument.name == name:
                given = (
                    self.args[position]
                    if position < len(self.args)
                    else argument.default_value
                )
                return self.kwargs.get(name, given)
        raise KeyError(name)

    def refuse(self) -> NoReturn:
        """Raises a `UserError`: the operation reads an activation's values."""
        raise UserError(
            "model",
            f"its forward pass depends on the values of activations "
            f"({self.tracer.place(self.func)}), so one "
            "pass can't show what belongs together; trace a network without "
            "data-dependent control flow",
        )

    def tensors(self) -> Iterator[Tensor]:
        """The tensor arguments, lists flattened."""
        for arg in [*self.args, *self.kwargs.values()]:
            yield from (
                item
                for item in (arg if isinstance(arg, list | tuple) else [arg])
                if isinstance(item, Tensor)
            )

    def replaced(self, substitute: Callable[[Tensor], Tensor]) -> tuple:
        """The positional arguments with every tensor exchanged."""
        one = lambda arg: substitute(arg) if isinstance(arg, Tensor) else arg  # noqa: E731
        return tuple(
            [one(item) for item in arg] if isinstance(arg, list | tuple) else one(arg)
            for arg in self.args
        )


@dataclass
class Tracer:
    """Collects, during one forward pass, which labels meet which axis of which tensor.

    Attributes:
        uses: (tensor, axis) to the labels on it and their role there.
        operations: Per operation the labels of the activations that are alive while it
            runs.
        products: Per product of two activations its labelled factor and how often each
            of its elements is used.
        contracted: Labels over which an operation without a weight sums: it reads these
            channels.
        blanks: Labels of buffers that the code is yet to fill, by where they lie in
            memory.
        bare: Parameters that the code uses by themselves, with a label for each
            element.
        unsupported: Reasons for which operations pinned what reached them.
    """

    model: nn.Module
    book: LabelBook = field(default_factory=LabelBook)
    layers: list[Layer] = field(default_factory=list)
    unsupported: list[str] = field(default_factory=list)
    uses: dict[tuple[str, int], tuple[Tensor, str]] = field(default_factory=dict)
    operations: list[list[Tensor]] = field(default_factory=list)
    products: list[tuple[Tensor, int]] = field(default_factory=list)
    blanks: dict[int, Tensor] = field(default_factory=dict)
    contracted: list[Tensor] = field(default_factory=list)
    bare: dict[str, Tensor] = field(default_factory=dict)
    _path: list[str] = field(default_factory=list)

    def __post_init__(self):
        self._names = {
            module: name or type(module).__name__
            for name, module in self.model.named_modules()
        }
        for name, tensor in own_tensors(self.model).items():
            self.see(tensor, ParameterView.whole(name, tensor))

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

    def label(
        self, tensor: Tensor | list | tuple, labels: Tensor | list | tuple
    ) -> None:
        """Attaches labels to an activation, or to each of several."""
        if isinstance(tensor, Tensor):
            setattr(tensor, LABELS, labels)
        else:
            for one, its in zip(tensor, labels, strict=True):
                self.label(one, its)

    def see(self, tensor: Tensor, view: ParameterView) -> None:
        """Marks a tensor as a parameter or a view of one."""
        setattr(tensor, VIEW, view)

    def parameter(self, tensor: Tensor | None) -> ParameterView | None:
        """The parameter behind a tensor, unless it is an activation."""
        return getattr(tensor, VIEW, None)

    def is_activation(self, tensor: Tensor) -> bool:
        """Whether the tensor carries labels."""
        return hasattr(tensor, LABELS)

    def labels(self, tensor: Tensor) -> Tensor:
        """The labels of an activation, one an element for a bare parameter, 0 for
        constants; shaped like the tensor.
        """
        if self.is_activation(tensor):
            return getattr(tensor, LABELS)
        view = self.parameter(tensor)
        if view is None:
            return torch.zeros((), dtype=torch.int64).expand(tensor.shape)
        if view.name not in self.bare:
            self.bare[view.name] = self.book.new(view.shape.numel(), view.name).view(
                view.shape
            )
        return self.bare[view.name][view.index]

    def produced(self, weight: str, n: int) -> Tensor:
        """Labels for what a weight produces; a layer that is used again produces
        others, `(n,)`.
        """
        times = sum(layer.tensor == weight for layer in self.layers)
        return self.book.new(n, (weight, times))

    def line(self, tensor: Tensor, axis: int) -> Tensor:
        """The labels along one axis where a weight reads it: the same at every other
        position, `(n,)`.
        """
        found = lines(self.labels(tensor), axis)
        if len(found) > 1:
            self.book.join_lines(found)
        return found[0]

    def use(self, tensor: str, axis: int, labels: Tensor, role: str) -> None:
        """Records that `labels` meet an axis of a parameter; a second use (a shared
        module) joins both.
        """
        known = self.uses.get((tensor, axis))
        if known is not None:
            self.book.join(known[0], labels)
        else:
            self.uses[tensor, axis] = labels, role

    def use_vector(self, tensor: Tensor | None, labels: Tensor, role: str) -> None:
        """Records that `labels` meet a bias, a scale or a running statistic, if there
        is one.
        """
        view = self.parameter(tensor)
        if view is not None:
            self.use(view.name, 0, labels, role)
        elif tensor is not None and self.is_activation(tensor):
            self.book.join(self.labels(tensor), labels)

    def solve_constraints(self) -> np.ndarray:
        """The root of every label, after all joins are made and bare parameters have
        found their axes.
        """
        representatives = solve_constraints(self.book)
        factors = factors_of(self.book, representatives)
        for name, labels in self.bare.items():
            found = torch.from_numpy(representatives[labels.numpy()])
            # Cells that lie along one axis are used as they are; on two axes, rows lie
            # along one and columns along the other.
            for plane in (
                planes(found.numpy(), factors)
                if len(varying_axes(found)) > 1
                else [found]
            ):
                self._settle_bare(name, plane, labels)
        return solve_constraints(self.book)

    def _settle_bare(self, name: str, plane: Tensor, labels: Tensor) -> None:
        """A bare parameter's channels lie along the one axis on which its elements
        stayed apart.
        """
        axes = [axis for axis in varying_axes(plane) if plane.shape[axis] > 1]
        if len(axes) > 1:
            axes = self._axes_of_met(plane, labels)
        if len(axes) == 1:
            met = lines(plane, axes[0])
            self.book.join_lines(met)
            self.use(name, axes[0], met[0], "follow")
        elif axes:
            self.book.pin(labels, f"parameter {name} varies along several axes")

    def _axes_of_met(self, plane: Tensor, labels: Tensor) -> list[int]:
        """The varying axes, elements left aside that met nothing: a table of positions
        needn't be read everywhere.
        """
        alone = plane == labels
        candidates = []
        for axis in varying_axes(plane):
            met = lines(torch.where(alone, -1, plane), axis)
            low = torch.where(met < 0, torch.iinfo(torch.int64).max, met).amin(0)
            if bool((met.amax(0) <= low).all()):
                candidates.append(axis)
        return candidates
