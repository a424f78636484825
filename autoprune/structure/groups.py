"""What tracing finds: groups of channels, where each channel sits in the network's
tensors, and what costs what.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from autoprune.structure.labels import LabelBook


@dataclass(frozen=True)
class Member:
    """Where a group's channels sit along one axis of one parameter or buffer.

    Attributes:
        tensor: Name in the model's state dict.
        axis: Axis of that tensor.
        role: "produce" (a layer's output axis), "consume" (a layer's input axis) or
            "follow" (batch norm, depthwise).
        index: int64 `(n_channels, k)`: the k positions that go when a channel goes.
    """

    tensor: str
    axis: int
    role: str
    index: Tensor

    def rows(self, tensor: Tensor) -> Tensor:
        """Each channel's values in the member's tensor, or in one of its shape,
        `(n_channels, k, ...)`, a copy.
        """
        return tensor.movedim(self.axis, 0)[self.index]

    def spread(self, values: Tensor, tensor: Tensor, rest: float) -> Tensor:
        """A value a channel `(n_channels,)` along the axis, to multiply the tensor
        with; `rest` where no channel is.
        """
        laid = tensor.new_full((tensor.shape[self.axis],), rest)
        laid[self.index.flatten()] = values.repeat_interleave(self.index.shape[1]).to(
            tensor.dtype
        )
        return laid.view(
            [-1 if axis == self.axis else 1 for axis in range(tensor.ndim)]
        )


@dataclass(frozen=True)
class Group:
    """Channels that can only be pruned together, across all layers that share them.

    Attributes:
        name: The first layer that produces the channels.
        channels: How many there are.
        members: Every place where they sit.
        pinned: Why the group can't be pruned, or None if it can.
        macs_share: Share of the network's MACs spent in layers that touch the group.
    """

    name: str
    channels: int
    members: tuple[Member, ...]
    pinned: str | None = None
    macs_share: float = 0.0

    @property
    def consumers(self) -> list[Member]:
        """The members whose layers read the channels."""
        return [member for member in self.members if member.role == "consume"]


@dataclass(frozen=True)
class Layer:
    """One use of a weight in a contraction: `positions` multiply-accumulates for each
    of its elements.

    Attributes:
        tensor: Name of the weight.
        kind: "conv", "grouped" (whole conv groups go), "depthwise" or "linear".
        positions: Places of the output at which the weight is applied, for one sample.
        size: Height and width of the output; (1, 1) for linear layers.
        stride: Of a convolution; 1 for linear layers.
    """

    tensor: str
    kind: str
    positions: int
    size: tuple[int, int] = (1, 1)
    stride: int = 1


@dataclass(frozen=True)
class Extent:
    """How many elements of something there are, and with which prunable groups they go.

    Attributes:
        fixed: Elements that no group removes.
        elements: Group to the elements that its channels hold in the dense network, all
            of them together; a pair of groups (rows and columns of cells, such as
            attention's heads and their width) to those of all its cells.
    """

    fixed: int
    elements: dict[tuple[str, ...], int]

    @property
    def dense(self) -> int:
        """All elements of the dense network."""
        return self.fixed + sum(self.elements.values())


@dataclass(frozen=True)
class Groups:
    """The groups of one network in the order of its forward pass, and the tables from
    which costs follow.

    Iterating, indexing by position or name and `len` reach the prunable groups;
    `pinned` holds the others.

    Attributes:
        all: Prunable and pinned groups.
        layers: Every contraction with a weight.
        shapes: Name to shape of every parameter and buffer.
        parameters: Names of those that are parameters.
        operations: Per operation the elements of the activations that are alive while
            it runs, for one sample.
        products: Multiply-accumulates of each product of two activations, as in
            attention, for one sample.
        cells: Pairs of groups that are the rows and the columns of the same cells.
        book: The labels that the trace handed out.
        units: Per label of the trace the one or two channels with which it goes,
            `(n_labels, 2)`, counted through all groups in order; -1 for none.
        unsupported: Operations without a rule, each with the module that uses it and
            the groups that it pins.
    """

    all: tuple[Group, ...]
    layers: tuple[Layer, ...]
    shapes: dict[str, tuple[int, ...]]
    parameters: frozenset[str]
    operations: tuple[Extent, ...] = ()
    products: tuple[Extent, ...] = ()
    cells: tuple[tuple[str, str], ...] = ()
    book: LabelBook | None = field(default=None, repr=False, compare=False)
    units: Tensor | None = field(default=None, repr=False, compare=False)
    unsupported: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Group]:
        return iter(self._prunable)

    def __len__(self) -> int:
        return len(self._prunable)

    def __getitem__(self, key: int | str) -> Group:
        if isinstance(key, int):
            return self._prunable[key]
        return next(group for group in self._prunable if group.name == key)

    @property
    def _prunable(self) -> list[Group]:
        return [group for group in self.all if group.pinned is None]

    @property
    def pinned(self) -> list[Group]:
        """The groups that keep every channel, each with its reason."""
        return [group for group in self.all if group.pinned is not None]

    @property
    def reasons(self) -> dict[str, str]:
        """Pinned group to its reason."""
        return {group.name: group.pinned for group in self.pinned}

    @property
    def channels(self) -> dict[str, int]:
        """Prunable group to its number of channels in the dense network."""
        return {group.name: group.channels for group in self}

    def filters(self, group: Group) -> list[Member]:
        """The weights that produce a group's channels, whatever they are called; biases
        are left out.
        """
        return [
            m
            for m in group.members
            if m.role == "produce" and len(self.shapes[m.tensor]) > 1
        ]

    @property
    def positions_per_weight(self) -> dict[str, int]:
        """Weight to the places of the output at which it is applied, all of its uses
        together, for one sample.
        """
        applied: dict[str, int] = {}
        for layer in self.layers:
            applied[layer.tensor] = applied.get(layer.tensor, 0) + layer.positions
        return applied

    def with_pins(self, reasons: Mapping[str, str]) -> "Groups":
        """The same groups, of which those named can't be pruned; what is pinned already
        keeps its reason.
        """
        pinned = (
            replace(group, pinned=group.pinned or reasons.get(group.name))
            for group in self.all
        )
        return replace(self, all=tuple(pinned))

    def removed_labels(self, kept: Mapping[str, Tensor]) -> Tensor:
        """Per label of the trace whether it goes when the prunable groups keep these
        channels, bool `(n_labels,)`.
        """
        channels = [
            removal_mask(group, kept if group.pinned is None else {}) for group in self.all
        ]
        return torch.cat([*channels, torch.zeros(1, dtype=torch.bool)])[self.units].any(
            1
        )

    @property
    def fingerprint(self) -> str:
        """Identifies the architecture: names, widths and members' shapes of all
        prunable groups.
        """
        layout = [
            [
                g.name,
                g.channels,
                [[m.tensor, m.axis, list(m.index.shape)] for m in g.members],
            ]
            for g in self
        ]
        return hashlib.sha256(json.dumps(layout).encode()).hexdigest()[:16]


def loses_whole_conv_groups(n_in: int, n_out: int, n_groups: int) -> bool:
    """Whether a grouped convolution or norm is pruned by whole groups rather than by
    the same positions in each.

    The finer choice: more groups than channels in each. Depthwise convolutions always
    lose whole groups.
    """
    return n_groups > 1 and (
        n_groups == n_in or n_groups >= max(n_in, n_out) // n_groups
    )


def removal_mask(group: Group, kept: Mapping[str, Tensor]) -> Tensor:
    """Per channel of a group whether it goes, bool `(n_channels,)`; a group that `kept`
    doesn't name keeps all.
    """
    gone = torch.ones(group.channels, dtype=torch.bool)
    gone[kept.get(group.name, slice(None))] = False
    return gone


def positions(member: Member, channels: Tensor) -> Tensor:
    """The positions along the member's axis that the given channels occupy, `(n * k,)`."""
    return member.index[channels].flatten().to(torch.int64)


def tensors_in(value: object) -> list[Tensor]:
    """The tensors in what a network or an operation returned, which may be nested in
    dicts, lists and tuples.
    """
    if isinstance(value, Tensor):
        return [value]
    children = (
        value.values()
        if isinstance(value, dict)
        else value
        if isinstance(value, list | tuple)
        else ()
    )
    return [tensor for child in children for tensor in tensors_in(child)]


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; one that goes by several names (tied weights)
    appears under the first.
    """
    first: dict[int, str] = {}
    tensors = model.state_dict(keep_vars=True)
    return {
        name: tensor
        for name, tensor in tensors.items()
        if first.setdefault(id(tensor), name) == name
    }
