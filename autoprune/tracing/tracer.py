"""The tracer's notebook: which labels an activation carries and which axes they met.

Labels ride on the tensors themselves, as an attribute; ids of tensors are reused as
soon as one is freed.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload

from autoprune.structure.groups import Layer, named_tensors
from autoprune.structure.labels import (
    CONSTANT,
    LabelBook,
    lines,
    look_up,
    take_at_origin,
    varying_axes,
)
from autoprune.tracing.parameter_views import ParameterView, distinct_views

LABELS = "_autoprune_labels"
"""Attribute of an activation that holds its labels."""
NOISE = "_autoprune_noise"
"""Attribute of a tensor of random numbers, which are nobody's channels."""
VIEW = "_autoprune_view"
"""Attribute of a parameter, or of what is computed from parameters alone, that says
which they are."""


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
        ties: Views of several parameters that met, element by element.
        is_cut_by_attribute: Whether the running operation cuts at a place that an
            attribute of a module says, which can follow what is left.
        training_tensors: Names of parameters and buffers that only the training mode
            uses.
        notes: Lines for people that pin nothing.
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
    ties: list[tuple[ParameterView, ...]] = field(default_factory=list)
    is_cut_by_attribute: bool = False
    training_tensors: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
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

    def mark_parameter(self, tensor: Tensor, *views: ParameterView) -> None:
        """Marks a tensor as a parameter, a view of one, or as computed from several.

        Args:
            tensor: What the code holds.
            views: Which elements of which parameters it shows, in its shape.
        """
        setattr(tensor, VIEW, self.tie(views))

    def tie(self, views: Sequence[ParameterView]) -> tuple[ParameterView, ...]:
        """Notes that parameters meet, element by element.

        Args:
            views: Of the parameters, all in one shape.

        Returns:
            Those that tell something.
        """
        distinct = distinct_views(views)
        if len(distinct) > 1:
            self.ties.append(distinct)
        return distinct

    def views(self, tensor: Tensor | None) -> tuple[ParameterView, ...]:
        """The parameters from which alone a tensor is computed; none for others."""
        # An operation in place may have made an activation of a parameter's copy.
        if tensor is None or self.is_activation(tensor):
            return ()
        return getattr(tensor, VIEW, ())

    def parameter(self, tensor: Tensor | None) -> ParameterView | None:
        """The parameter whose elements are those of a tensor, one by one.

        Others may scale it. None for activations, for constants, and for what no
        parameter has an element each for, such as an outer product.
        """
        views = self.views(tensor)
        # A part of a parameter is one too, as long as nothing else spreads it.
        if len(views) == 1:
            return views[0] if views[0].is_complete else None
        spread = set().union(*(view.varying_dims for view in views))
        for view in views:
            if view.is_complete and view.varying_dims == spread:
                return view
        return None

    def label_axes(
        self, tensor: Tensor, dims: Collection[int] | None = None
    ) -> list[Tensor]:
        """Labels those axes of a tensor's parameters that lie along some dimensions.

        Args:
            tensor: A parameter, or computed from some.
            dims: Which dimensions of it; None for all.

        Returns:
            The labels of each of those axes.
        """
        labelled = []
        for view in self.views(tensor):
            for axis, index in view.axes:
                if dims is None or set(dims) & set(varying_axes(index)):
                    labelled.append(self.label_axis(view.name, axis))
        return labelled

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
        views = self.views(tensor)
        if not views:
            # A scalar that is expanded takes no memory, however large the tensor.
            return torch.full((), CONSTANT, dtype=torch.int64).expand(tensor.shape)
        spreads = [self._view_labels(view, tensor.shape) for view in views]
        axes = [varying_axes(labels) for labels in spreads]
        # What tells most elements apart speaks for all.
        main = max(range(len(views)), key=lambda i: len(axes[i]))
        for labels, met_axes in zip(spreads, axes, strict=True):
            if labels is spreads[main] or not met_axes:
                continue
            if not set(met_axes) <= set(axes[main]):
                for crossed in (labels, spreads[main]):
                    self.book.pin(crossed, "is a parameter that crosses another one")
                continue
            rows = self.book.row_labels(spreads[main], met_axes).expand(tensor.shape)
            self.book.join(
                take_at_origin(rows, met_axes), take_at_origin(labels, met_axes)
            )
        return spreads[main]

    def _element_labels(self, name: str, shape: torch.Size) -> Tensor:
        """A label for each element of a bare parameter, in its shape."""
        if name not in self.bare_parameters:
            labels = self.book.new_labels(shape.numel(), name)
            self.bare_parameters[name] = labels.view(shape)
        return self.bare_parameters[name]

    def _view_labels(self, view: ParameterView, shape: torch.Size) -> Tensor:
        """Labels for the elements of one view of a parameter."""
        if view.is_complete:
            return self._element_labels(view.name, view.shape)[view.index]
        if len(view.axes) == 1:
            # The norm of each row of a weight, say: nothing else of it is left.
            axis, index = view.axes[0]
            return look_up(self.label_axis(view.name, axis), index)
        for axis, _ in view.axes:
            labels = self.label_axis(view.name, axis)
            self.book.pin(labels, f"sums over a part of {view.name}")
        return torch.full((), CONSTANT, dtype=torch.int64).expand(shape)

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

    @property
    def used_tensors(self) -> set[str]:
        """Names of the parameters and buffers that met anything."""
        names = set(self.bare_parameters)
        for name, _ in self.uses:
            names.add(name)
        for tie in self.ties:
            names.update(view.name for view in tie)
        return names

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

    def known_axis_labels(self, tensor: str, axis: int) -> Tensor | None:
        """The labels that `label_axis` gave in the trace; None where it gave none.

        Args:
            tensor: Name of the parameter.
            axis: Its axis.
        """
        is_vector = len(self.shapes[tensor]) == 1
        purpose = tensor if is_vector else ("axis", tensor, axis)
        return self.book.labels_by_purpose.get(purpose)

    def known_element_labels(self, view: ParameterView) -> Tensor | None:
        """The labels that a bare parameter's elements got in the trace, as viewed.

        Args:
            view: Of the parameter.

        Returns:
            In the view's shape; None where the trace gave none.
        """
        labels = self.book.labels_by_purpose.get(view.name)
        if labels is None or not view.is_complete:
            return None
        return labels.view(view.shape)[view.index]

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
            first_labels, first_role = first_use
            self.book.join(first_labels, labels)
            # Tied weights, as in an autoencoder: one axis makes and reads channels.
            if (first_role, role) == ("produce", "consume"):
                self.summed_labels.append(labels)
            # A layer that makes or reads channels says more than a norm that has them.
            if first_role == "follow":
                self.uses[key] = (first_labels, role)
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
        part = None if view is None else view.axis_part(0)
        if view is not None and part is not None:
            axis, positions = part
            self.use(view.name, axis, labels, role, positions)
        elif tensor is not None and (self.is_activation(tensor) or self.views(tensor)):
            # The code computes the vector, from the style of an image for instance, or
            # its elements are scattered; each meets what it meets.
            self.book.join(self.labels(tensor), labels)
