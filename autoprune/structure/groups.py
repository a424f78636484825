"""Groups of coupled channels: what tracing finds and everything else works with.

A group says where each of its channels sits in the network's tensors. `Groups` holds
all of them, together with the tables from which costs follow.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from autoprune.structure.labels import LabelBook
from autoprune.structure.lengths import (
    AttributePlace,
    Extent,
    Length,
    evaluate_length,
)

if TYPE_CHECKING:
    # It needs this module.
    from autoprune.structure.stored import StoredTensor


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
        """Each channel's values in the member's tensor, or in one of its shape.

        Args:
            tensor: A tensor of that shape.

        Returns:
            A copy, `(n_channels, k, ...)`.
        """
        return tensor.movedim(self.axis, 0)[self.index]

    def spread(self, values: Tensor, tensor: Tensor, rest: float) -> Tensor:
        """Lays one value for each channel along the axis, to multiply a tensor with.

        Three channels that hold two positions each, `[[0, 1], [2, 3], [4, 5]]`, of an
        axis of length 7, with the values 0.5, 2 and 3 and a rest of 1 give 0.5, 0.5, 2,
        2, 3, 3, 1.

        Args:
            values: One for each channel, `(n_channels,)`.
            tensor: The member's tensor, or one of its shape.
            rest: The value at positions that belong to no channel.

        Returns:
            A tensor of the same number of axes, with length 1 along all but the
            member's.
        """
        # A channel may hold several positions, after a flattening for example.
        n_positions = self.index.shape[1]
        line = tensor.new_full((tensor.shape[self.axis],), rest)
        repeated = values.repeat_interleave(n_positions)
        line[self.index.flatten()] = repeated.to(tensor.dtype)
        # Length 1 broadcasts; the tensor's size would cost as much as the tensor.
        shape = [1] * tensor.ndim
        shape[self.axis] = -1
        return line.view(shape)


@dataclass(frozen=True)
class Group:
    """Channels that can only be pruned together, across all layers that share them.

    Attributes:
        name: The first layer that produces the channels.
        channels: How many there are.
        members: Every place where they sit.
        pinned: Why the group can't be pruned, or None if it can.
        macs_share: Share of the network's MACs spent in layers that touch the group.
        least: Fewest channels to keep. With fewer the network's own code doesn't run,
            in this group or in another one.
    """

    name: str
    channels: int
    members: tuple[Member, ...]
    pinned: str | None = None
    macs_share: float = 0.0
    least: int = 1

    @property
    def consumers(self) -> list[Member]:
        """The members whose layers read the channels."""
        return [member for member in self.members if member.role == "consume"]


@dataclass(frozen=True)
class AxisPart:
    """Positions of one axis of a tensor.

    Attributes:
        axis: Which axis.
        positions: int64 `(n,)`.
    """

    axis: int
    positions: Tensor = field(compare=False)


@dataclass(frozen=True)
class Layer:
    """One use of a weight in a contraction.

    Each element of the weight, or of the part that is used, is multiplied once at each
    position.

    Attributes:
        tensor: Name of the weight.
        kind: "conv", "grouped" (whole conv groups go), "depthwise" or "linear".
        positions: Places of the output at which the weight is applied, for one sample.
        size: Height and width of the output; (1, 1) for linear layers.
        stride: Of a convolution; 1 for linear layers.
        parts: The axes of which only some positions are used, such as the rows of the
            queries in a packed weight; empty where all of the weight is.
    """

    tensor: str
    kind: str
    positions: int
    size: tuple[int, int] = (1, 1)
    stride: int = 1
    parts: tuple[AxisPart, ...] = ()

    def n_elements(self, shape: tuple[int, ...]) -> int:
        """How many elements of the weight are used.

        Args:
            shape: The weight's shape.
        """
        lengths = list(shape)
        for part in self.parts:
            lengths[part.axis] = len(part.positions)
        return math.prod(lengths)


@dataclass(frozen=True)
class Groups:
    """The groups of one network in the order of its forward pass.

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
        attributes: Sizes that the network's modules keep for their code, each with how
            it follows what the groups keep.
        stored: What a file of the network's weights can hold.
    """

    all: tuple[Group, ...]
    layers: tuple[Layer, ...]
    shapes: dict[str, tuple[int, ...]]
    parameters: frozenset[str]
    operations: tuple[Extent, ...] = ()
    products: tuple[Extent, ...] = ()
    cells: tuple[tuple[str, str], ...] = ()
    # Tensors compare elementwise, so what holds them takes no part in comparisons.
    book: LabelBook | None = field(default=None, repr=False, compare=False)
    units: Tensor | None = field(default=None, repr=False, compare=False)
    unsupported: tuple[str, ...] = ()
    attributes: Mapping[AttributePlace, Length] = field(default_factory=dict)
    stored: "tuple[StoredTensor, ...]" = ()

    def __iter__(self) -> Iterator[Group]:
        return iter(self._prunable)

    def __len__(self) -> int:
        return len(self._prunable)

    def __getitem__(self, key: int | str) -> Group:
        if isinstance(key, int):
            return self._prunable[key]
        for group in self._prunable:
            if group.name == key:
                return group
        raise KeyError(key)

    @property
    def _prunable(self) -> list[Group]:
        """The groups that aren't pinned."""
        return [group for group in self.all if group.pinned is None]

    @property
    def pinned(self) -> list[Group]:
        """The groups that keep every channel, each with its reason."""
        return [group for group in self.all if group.pinned is not None]

    @property
    def reasons(self) -> dict[str, str]:
        """Pinned group to its reason."""
        reasons = {}
        for group in self.all:
            if group.pinned is not None:
                reasons[group.name] = group.pinned
        return reasons

    @property
    def channels(self) -> dict[str, int]:
        """Prunable group to its number of channels in the dense network."""
        return {group.name: group.channels for group in self}

    def filters(self, group: Group) -> list[Member]:
        """The weights that produce a group's channels, whatever they are called.

        Args:
            group: A prunable or pinned group.

        Returns:
            Its producing members but for biases, which have one axis only.
        """
        filters = []
        for member in group.members:
            # A bias of a layer is produced by it too, but filters nothing.
            has_inputs = len(self.shapes[member.tensor]) > 1
            if member.role == "produce" and has_inputs:
                filters.append(member)
        return filters

    @property
    def positions_per_weight(self) -> dict[str, int]:
        """Weight to the places of the output at which it is applied, for one sample.

        A weight that is used several times counts the places of all its uses. Of a
        weight whose parts are applied at different numbers of places, as in
        cross-attention, it is the mean over its elements, rounded.
        """
        multiplications: dict[str, int] = {}
        for layer in self.layers:
            so_far = multiplications.get(layer.tensor, 0)
            n_elements = layer.n_elements(self.shapes[layer.tensor])
            multiplications[layer.tensor] = so_far + layer.positions * n_elements
        positions = {}
        for name, count in multiplications.items():
            positions[name] = round(count / math.prod(self.shapes[name]))
        return positions

    def with_pins(self, reasons: Mapping[str, str]) -> "Groups":
        """The same groups, of which those named can't be pruned.

        Args:
            reasons: Group to why it stays whole. What is pinned already keeps its
                reason.
        """
        pinned = []
        for group in self.all:
            # The first reason is the network's own and says more than a later wish.
            reason = group.pinned or reasons.get(group.name)
            pinned.append(replace(group, pinned=reason))
        return replace(self, all=tuple(pinned))

    def with_least(self, least: int) -> "Groups":
        """The same groups, each keeping so many channels at least, or all that it has.

        Args:
            least: The fewest channels.
        """
        kept = []
        for group in self.all:
            kept.append(replace(group, least=min(least, group.channels)))
        return replace(self, all=tuple(kept))

    def removed_labels(self, kept: Mapping[str, Tensor]) -> Tensor:
        """Per label of the trace whether its channel goes.

        Args:
            kept: Prunable group to the channels that it keeps; those left out keep all.

        Returns:
            bool `(n_labels,)`.
        """
        assert self.units is not None, "groups of a trace know what their labels mean"
        masks = []
        for group in self.all:
            # A pinned group keeps all, whatever somebody says of it.
            masks.append(removal_mask(group, kept if group.pinned is None else {}))
        # One more at the end, which never goes: there the -1 of `units` points to.
        masks.append(torch.zeros(1, dtype=torch.bool))
        # A cell goes with its row or with its column, hence `any`.
        return torch.cat(masks)[self.units].any(1)

    def attribute_values(self, kept: Mapping[str, Tensor]) -> dict[AttributePlace, int]:
        """What the sizes that modules keep for their code are after pruning.

        Args:
            kept: Prunable group to the channels that it keeps; those left out keep all.
        """
        counts = {name: len(channels) for name, channels in kept.items()}
        dense = {group.name: group.channels for group in self.all}
        # A pinned group keeps all, whatever somebody says of it.
        for name in self.reasons:
            counts[name] = dense[name]
        values = {}
        for place, length in self.attributes.items():
            values[place] = evaluate_length(length, dense, counts)
        return values

    @property
    def fingerprint(self) -> str:
        """Identifies the architecture, as 16 hexadecimal digits.

        It follows from names, widths and members' shapes of all prunable groups.
        """
        # Files carry this digest, so its layout must never change.
        layout = []
        for group in self:
            members = []
            for member in group.members:
                members.append([member.tensor, member.axis, list(member.index.shape)])
            layout.append([group.name, group.channels, members])
        return hashlib.sha256(json.dumps(layout).encode()).hexdigest()[:16]


def loses_whole_conv_groups(n_in: int, n_out: int, n_groups: int) -> bool:
    """Whether a grouped convolution or norm is pruned by whole groups.

    If not, it loses the same positions of each group. Whole groups go where that is the
    finer choice: where there are more groups than channels in each. A convolution of 8
    channels in 4 groups loses pairs of channels; in 2 groups it loses the same one or
    more of the four places in both. Depthwise convolutions always lose whole groups.

    Args:
        n_in: Input channels.
        n_out: Output channels.
        n_groups: Groups of the convolution or norm; 1 is none.
    """
    if n_groups == 1:
        return False
    # One input a group: there are no positions within it to choose from.
    is_depthwise = n_groups == n_in
    return is_depthwise or n_groups >= max(n_in, n_out) // n_groups


def removal_mask(group: Group, kept: Mapping[str, Tensor]) -> Tensor:
    """Per channel of a group whether it goes.

    Args:
        group: The group.
        kept: Group to the channels that it keeps; those left out keep all.

    Returns:
        bool `(n_channels,)`.
    """
    if group.name not in kept:
        return torch.zeros(group.channels, dtype=torch.bool)
    mask = torch.ones(group.channels, dtype=torch.bool)
    mask[kept[group.name]] = False
    return mask


def positions(member: Member, channels: Tensor) -> Tensor:
    """The positions along a member's axis that some channels occupy.

    Args:
        member: Where the channels sit.
        channels: Their numbers, `(n,)`, or a mask, `(n_channels,)`.

    Returns:
        int64 `(n * k,)`, channel by channel.
    """
    return member.index[channels].flatten().to(torch.int64)


def tensors_in(value: object) -> list[Tensor]:
    """The tensors in what a network or an operation returned, in order.

    Args:
        value: A tensor, or dicts, lists, tuples and dataclasses of them, nested;
            anything else holds none.
    """
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        # A detector returns its losses or its heads by name, for example.
        children = list(value.values())
    elif isinstance(value, list | tuple):
        children = list(value)
    elif is_dataclass(value) and not isinstance(value, type):
        children = [getattr(value, each.name) for each in fields(value)]
    else:
        return []
    tensors = []
    for child in children:
        tensors += tensors_in(child)
    return tensors


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, as in the state dict.

    Buffers that the state dict leaves out, such as a bias that is always zero, come
    last.

    Args:
        model: The network.

    Returns:
        The tensors themselves. One that goes by several names (tied weights) appears
        under the first of them only.
    """
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    # With variables, since detached tensors would be new objects for each name.
    saved = model.state_dict(keep_vars=True)
    for name, tensor in [*saved.items(), *model.named_buffers()]:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor
    return tensors
