"""The tracer's notebook: which labels an activation carries and which axes they met.

Labels ride on the tensors themselves, as an attribute; ids of tensors are reused as
soon as one is freed.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch._ops import OpOverload

from autoprune.errors import UserError
from autoprune.structure.groups import Layer, named_tensors
from autoprune.structure.labels import (
    CONSTANT,
    LabelBook,
    broadcast_labels,
    labels_on_axis,
    lines,
    varying_axes,
)
from autoprune.tracing.constraint_solver import (
    lattice_factors,
    planes,
    solve_constraints,
)

LABELS = "_autoprune_labels"
"""Attribute of an activation that holds its labels."""
NOISE = "_autoprune_noise"
"""Attribute of a tensor of random numbers, which are nobody's channels."""
VIEW = "_autoprune_view"
"""Attribute of a parameter, or of a view of one, that says which it is."""


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
    def from_parameter(cls, name: str, tensor: Tensor) -> "ParameterView":
        """The parameter as it is.

        Args:
            name: Its name in the state dict.
            tensor: The parameter or buffer.
        """
        index = []
        for axis, size in enumerate(tensor.shape):
            # Broadcast, so that a large weight takes no memory here.
            index.append(broadcast_labels(torch.arange(size), axis, tensor.shape))
        return cls(name, tensor.shape, tuple(index))

    def apply(self, move: Callable[[Tensor], Tensor]) -> "ParameterView":
        """The view after one more movement of its elements."""
        index = tuple(move(axis_index) for axis_index in self.index)
        return ParameterView(self.name, self.shape, index)

    def original_axis(self, dim: int) -> int | None:
        """The original axis that lies whole and in order along `dim` of the view.

        None if there is no such axis: a part of one, a permuted one, or two merged.
        """
        matches = []
        for axis, index in enumerate(self.index):
            line = labels_on_axis(index, dim)
            # In a slice or a permutation position i isn't channel i any more.
            if line is not None and torch.equal(line, torch.arange(self.shape[axis])):
                matches.append(axis)
        # Axes of length 1 look alike.
        if dim in matches:
            return dim
        return matches[0] if matches else None

    def axis_part(self, dim: int) -> tuple[int, Tensor | None] | None:
        """The original axis that lies along `dim` of the view, whole or in part.

        Queries' rows of a packed weight `(3 * n, m)` are a part of its axis 0: the
        positions 0 to n - 1.

        Args:
            dim: Of the view.

        Returns:
            The axis, and the positions of it that the view shows, `(n,)`, or None for
            all of them in order. None where no axis lies along `dim` by itself, or a
            position appears twice.
        """
        axis = self.original_axis(dim)
        if axis is not None:
            return axis, None
        for number, index in enumerate(self.index):
            line = labels_on_axis(index, dim)
            # One position could be anything; several say which axis they are on.
            if line is None or len(line) < 2 or not line.any():
                continue
            if len(line.unique()) == len(line):
                return number, line
        return None


def argument(
    func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], name: str
) -> Any:
    """One argument of an operation, or its default.

    Args:
        func: The ATen overload.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        name: As in the operation's schema; a `KeyError` if that has none of the name.
    """
    for position, declared in enumerate(func._schema.arguments):
        if declared.name != name:
            continue
        # Code may pass an argument by name, by position or not at all.
        if name in kwargs:
            return kwargs[name]
        if position < len(args):
            return args[position]
        return declared.default_value
    raise KeyError(name)


@dataclass(frozen=True)
class Call:
    """One executed operation: what went in, what came out.

    Attributes:
        tracer: The notebook of the running trace.
        func: The ATen overload.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        out: What it returned; None while it is yet to be executed.
    """

    tracer: "Tracer"
    func: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any

    def __getitem__(self, name: str) -> Any:
        """An argument by its name in the operation's schema, or its default."""
        return argument(self.func, self.args, self.kwargs, name)

    def refuse(self) -> NoReturn:
        """Raises a `UserError`: the operation reads an activation's values."""
        raise UserError(
            "model",
            f"its forward pass depends on the values of activations "
            f"({self.tracer.locate(self.func)}), so one "
            "pass can't show what belongs together; trace a network without "
            "data-dependent control flow",
        )

    def tensors(self) -> Iterator[Tensor]:
        """The tensor arguments, lists flattened."""
        for argument in [*self.args, *self.kwargs.values()]:
            # `cat` and indexing take lists.
            items = argument if isinstance(argument, list | tuple) else [argument]
            for item in items:
                if isinstance(item, Tensor):
                    yield item

    def substitute_tensors(self, substitute: Callable[[Tensor], Tensor]) -> list[Any]:
        """The positional arguments with every tensor exchanged for another."""

        def exchange(item: Any) -> Any:
            return substitute(item) if isinstance(item, Tensor) else item

        arguments: list[Any] = []
        for argument in self.args:
            if isinstance(argument, list | tuple):
                arguments.append([exchange(item) for item in argument])
            else:
                arguments.append(exchange(argument))
        return arguments


@dataclass
class Tracer:
    """Collects, during one forward pass, which labels meet which axis of which tensor.

    Attributes:
        model: The network that runs.
        book: Hands out labels and remembers what was joined and pinned.
        layers: Every use of a weight in a convolution or a linear layer.
        unsupported: Reasons for which operations pinned what reached them.
        uses: (tensor, axis) to the labels on it and their role there.
        part_uses: (tensor, axis, the positions as bytes) to the labels on a part of the
            axis that the code uses by itself.
        axis_labels: (tensor, axis) to labels for its positions, where parts of it are
            used by themselves.
        operations: Per operation the labels of the activations that are alive while it
            runs.
        products: Per product of two activations its labelled factor and how often each
            of its elements is used.
        blank_buffers: Labels of buffers that the code is yet to fill, by where they lie
            in memory.
        summed_labels: Labels over which an operation without a weight sums: it reads
            these channels.
        bare_parameters: Parameters that the code uses by themselves, with a label for
            each element.
    """

    model: nn.Module
    book: LabelBook = field(default_factory=LabelBook)
    layers: list[Layer] = field(default_factory=list)
    unsupported: list[str] = field(default_factory=list)
    uses: dict[tuple[str, int], tuple[Tensor, str]] = field(default_factory=dict)
    part_uses: dict[tuple[str, int, bytes], Tensor] = field(default_factory=dict)
    axis_labels: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    operations: list[list[Tensor]] = field(default_factory=list)
    products: list[tuple[Tensor, int]] = field(default_factory=list)
    blank_buffers: dict[int, Tensor] = field(default_factory=dict)
    summed_labels: list[Tensor] = field(default_factory=list)
    bare_parameters: dict[str, Tensor] = field(default_factory=dict)
    _path: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._names: dict[nn.Module, str] = {}
        for name, module in self.model.named_modules():
            # The network itself has an empty name.
            self._names[module] = name or type(module).__name__
        self.shapes: dict[str, torch.Size] = {}
        # Tied weights are one tensor, which goes by its first name.
        for name, tensor in named_tensors(self.model).items():
            self.shapes[name] = tensor.shape
            self.mark_parameter(tensor, ParameterView.from_parameter(name, tensor))

    def enter_module(self, module: nn.Module) -> None:
        """The forward pass goes into a module."""
        # Code may make modules as it runs, which have no name in the network.
        self._path.append(self._names.get(module, type(module).__name__))

    def leave_module(self) -> None:
        """The forward pass comes out of the module that it entered last."""
        self._path.pop()

    @property
    def current_module(self) -> str:
        """The module that is running, for messages."""
        return self._path[-1] if self._path else "the model"

    def locate(self, operation: OpOverload) -> str:
        """An operation and the module that runs it, for messages."""
        name = operation.overloadpacket.__name__
        return f"{name} in {self.current_module}" if self._path else name

    def label(
        self, tensor: Tensor | Sequence[Any], labels: Tensor | Sequence[Any]
    ) -> None:
        """Attaches labels to an activation, or to each of several.

        Args:
            tensor: One activation, or a list of them as `split` returns.
            labels: Labels of the same shape, or a list of as many.
        """
        # An attribute of the tensor goes when the tensor does; a table by id would
        # give a later tensor in the same place the labels of this one.
        if isinstance(tensor, Tensor):
            setattr(tensor, LABELS, labels)
        else:
            for item, item_labels in zip(tensor, labels, strict=True):
                self.label(item, item_labels)

    def mark_parameter(self, tensor: Tensor, view: ParameterView) -> None:
        """Marks a tensor as a parameter or a view of one.

        Args:
            tensor: What the code holds.
            view: Which of the parameter's elements it shows.
        """
        setattr(tensor, VIEW, view)

    def parameter(self, tensor: Tensor | None) -> ParameterView | None:
        """The parameter behind a tensor, unless it is an activation."""
        return getattr(tensor, VIEW, None)

    def mark_noise(self, tensor: Tensor) -> None:
        """Marks random numbers: of as many as there are, each is like the others."""
        setattr(tensor, NOISE, True)

    def is_noise(self, tensor: Tensor) -> bool:
        """Whether a tensor holds random numbers, or what follows from them alone."""
        return hasattr(tensor, NOISE)

    def is_activation(self, tensor: Tensor) -> bool:
        """Whether the tensor carries labels."""
        return hasattr(tensor, LABELS)

    def labels(self, tensor: Tensor) -> Tensor:
        """The labels of a tensor, in its shape.

        A bare parameter gets a label for each element, since nothing has shown yet on
        which of its axes channels lie. What is neither activation nor parameter is
        constant, label 0.
        """
        if self.is_activation(tensor):
            return getattr(tensor, LABELS)
        view = self.parameter(tensor)
        if view is None:
            # A scalar that is expanded takes no memory, however large the tensor.
            return torch.full((), CONSTANT, dtype=torch.int64).expand(tensor.shape)
        return self._element_labels(view.name, view.shape)[view.index]

    def _element_labels(self, name: str, shape: torch.Size) -> Tensor:
        """A label for each element of a bare parameter, in its shape."""
        if name not in self.bare_parameters:
            labels = self.book.new_labels(shape.numel(), name)
            self.bare_parameters[name] = labels.view(shape)
        return self.bare_parameters[name]

    def new_output_labels(self, weight: str, n: int) -> Tensor:
        """Labels for what a weight produces, `(n,)`.

        A layer that is used again produces others: the code may treat its two outputs
        differently.

        Args:
            weight: Name of the weight.
            n: How many channels it produces.
        """
        n_uses = 0
        for layer in self.layers:
            if layer.tensor == weight:
                n_uses += 1
        return self.book.new_labels(n, (weight, n_uses))

    def unify_axis(self, tensor: Tensor, axis: int) -> Tensor:
        """Joins all lines along one axis; returns the first, `(n,)`.

        A weight reads the axis as a whole, so a channel of it means the same at every
        position of the other axes.

        Args:
            tensor: An activation.
            axis: Where its channels lie.
        """
        axis_lines = lines(self.labels(tensor), axis)
        if len(axis_lines) > 1:
            self.book.join_lines(axis_lines)
        return axis_lines[0]

    def label_axis(self, tensor: str, axis: int) -> Tensor:
        """Labels for the positions of a parameter's axis, before anything meets it.

        Args:
            tensor: Name of the parameter.
            axis: Its axis.

        Returns:
            int64 `(n,)`; the same whenever it is asked.
        """
        key = (tensor, axis)
        if key not in self.axis_labels:
            shape = self.shapes[tensor]
            if len(shape) == 1:
                # Code may add a part of a bias by itself, as a bare parameter.
                labels = self._element_labels(tensor, shape)
            else:
                labels = self.book.new_labels(shape[axis], ("axis", *key))
            self.axis_labels[key] = labels
            first_use = self.uses.get(key)
            if first_use is not None:
                self.book.join(first_use[0], labels)
        return self.axis_labels[key]

    def use(
        self,
        tensor: str,
        axis: int,
        labels: Tensor,
        role: str,
        positions: Tensor | None = None,
    ) -> None:
        """Records that labels meet an axis of a parameter.

        A second use, by a shared module, joins its labels with the first one's: one
        weight can't lose different channels for each of its uses.

        Args:
            tensor: Name of the parameter or buffer.
            axis: Its axis.
            labels: What meets the axis or the part of it.
            role: "produce", "consume" or "follow", as in `Member`.
            positions: The part of the axis that is used, or None for all of it.
        """
        key = (tensor, axis)
        if positions is not None:
            axis_labels = self.label_axis(tensor, axis)
            self.uses.setdefault(key, (axis_labels, role))
            self.book.join(axis_labels[positions], labels)
            self.part_uses[tensor, axis, positions.numpy().tobytes()] = labels
            return
        first_use = self.uses.get(key)
        if first_use is not None:
            self.book.join(first_use[0], labels)
            return
        self.uses[key] = (labels, role)
        # Code that cut the axis into parts has asked something of its positions.
        if key in self.axis_labels:
            self.book.join(labels, self.axis_labels[key])

    def use_vector(self, tensor: Tensor | None, labels: Tensor, role: str) -> None:
        """Records that labels meet a bias, a scale or a running statistic.

        Args:
            tensor: The vector, or None where the layer has none.
            labels: What meets it, as long as it.
            role: "produce" or "follow".
        """
        view = self.parameter(tensor)
        if view is not None:
            part = view.axis_part(0)
            if part is None:
                # Its elements are scattered; each meets what it meets.
                assert tensor is not None, "it has a view"
                self.book.join(self.labels(tensor), labels)
                return
            axis, positions = part
            self.use(view.name, axis, labels, role, positions)
        elif tensor is not None and self.is_activation(tensor):
            # The code computes the vector, from the style of an image for instance.
            self.book.join(self.labels(tensor), labels)

    def solve_constraints(self) -> np.ndarray:
        """Makes all joins, those of bare parameters' axes included.

        Returns:
            The representative of every label, `(n_labels,)`.
        """
        # Only when all joins are made is it known what each element of a bare
        # parameter met.
        representatives = solve_constraints(self.book)
        factors = lattice_factors(self.book, representatives)
        for name, labels in self.bare_parameters.items():
            cells = representatives[labels.numpy()]
            # Cells that lie along one axis are used as they are; on two axes, rows lie
            # along one and columns along the other.
            if len(varying_axes(torch.from_numpy(cells))) > 1:
                cell_planes = planes(cells, factors)
            else:
                cell_planes = [torch.from_numpy(cells)]
            for plane in cell_planes:
                self._assign_bare_parameter(name, plane, labels)
        # Those axes have joined further labels, which constraints may have to answer.
        return solve_constraints(self.book)

    def _assign_bare_parameter(self, name: str, plane: Tensor, labels: Tensor) -> None:
        """Records on which axis of a bare parameter its channels lie.

        It is the one axis on which its elements stayed apart. A layer scale
        `(1, 3, 1, 1)` that multiplies channels 4, 5, 6 has the plane 4, 5, 6 along axis
        1; a table of positions `(1, 2, 3)` that is added to the same channels has it in
        each of its two rows.

        Args:
            name: Of the parameter.
            plane: The representatives of its elements, or their rows or columns.
            labels: Its elements' own labels, in its shape.
        """
        axes = varying_axes(plane)
        if len(axes) > 1:
            axes = self._consistent_axes(plane, labels)
        if len(axes) == 1:
            # Lines differ where the code read only a part of the parameter.
            axis_lines = lines(plane, axes[0])
            self.book.join_lines(axis_lines)
            self.use(name, axes[0], axis_lines[0], "follow")
        elif axes:
            self.book.pin(labels, f"parameter {name} varies along several axes")

    def _consistent_axes(self, plane: Tensor, labels: Tensor) -> list[int]:
        """The axes along which whatever an element met is the same in every line.

        Elements that met nothing are left aside: a table of positions needn't be read
        everywhere.
        """
        met_nothing = plane == labels
        consistent = []
        for axis in varying_axes(plane):
            axis_lines = lines(torch.where(met_nothing, -1, plane), axis)
            highest = axis_lines.amax(0)
            # -1 would be the least of any position, so here it counts as the greatest.
            unread = axis_lines < 0
            greatest = torch.iinfo(torch.int64).max
            lowest = torch.where(unread, greatest, axis_lines).amin(0)
            if bool((highest <= lowest).all()):
                consistent.append(axis)
        return consistent
