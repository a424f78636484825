"""From labels to groups: channels with the same pattern of members form a group."""

import re
from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np
import torch

from autoprune.structure.groups import (
    Group,
    Groups,
    Layer,
    Member,
    named_tensors,
)
from autoprune.structure.stored import stored_tensors
from autoprune.tracing.extents import (
    Numbering,
    attribute_lengths,
    cell_pairs,
    count_extent,
    sum_extents,
)
from autoprune.tracing.mac_coverage import with_macs_shares
from autoprune.tracing.parameter_axes import solve
from autoprune.tracing.size_solver import solve_sizes
from autoprune.tracing.sizes import Demand
from autoprune.tracing.tracer import Tracer
from autoprune.tracing.training_mode import AttributeReads
from autoprune.tracing.units import label_units, pinning_reasons
from autoprune.tracing.unread_attributes import Boundaries, follow_unread

LAYER_TENSORS = (".weight", ".bias", ".in_proj_weight", ".in_proj_bias")
"""Tensors that go by the name of their layer; others have a name of their own."""
PARAMETRIZATION = re.compile(
    r"\.parametrizations\.weight\.original\d*$|\.weight_(v|orig|ih|ih_l0)$"
)
"""How PyTorch's parametrizations, new and old, call what a weight is computed from, and
its recurrent layers their first one."""


@dataclass(frozen=True)
class _Places:
    """The units on one axis of one tensor, sorted by unit, then by position.

    Attributes:
        units: Of every position; cells appear twice, with their row and their column.
        positions: Along the axis.
    """

    units: np.ndarray
    positions: np.ndarray


@dataclass(frozen=True)
class _Family:
    """Channels that sit equally often in the same places, pinned for the same reason.

    Attributes:
        units: The channels, ascending. A channel is a unit: a representative, or the
            row or the column of cells.
        uses: Numbers of the (tensor, axis) pairs on which they sit, ascending.
        reason: Why they are pinned, or None if nothing in the forward pass pins them.
    """

    units: np.ndarray
    uses: tuple[int, ...]
    reason: str | None


def derive_groups(
    tracer: Tracer,
    demands: list[Demand],
    boundaries: Boundaries,
    reads: AttributeReads,
) -> Groups:
    """The groups of a finished trace.

    An example: `stem`, a convolution with three channels on an image of three, whose
    output of one by two pixels is flattened and read by `head`, a linear layer with two
    outputs. The image's channels are labels 1, 2, 3, the stem produces 4, 5, 6 and the
    head 7, 8. The tracer's uses, numbered from 0 in the order of the forward pass:

    ==== =============== ================= =======
    use  tensor, axis    labels            role
    ==== =============== ================= =======
    0    stem.weight, 0  4 5 6             produce
    1    stem.weight, 1  1 2 3             consume
    2    stem.bias, 0    4 5 6             produce
    3    head.weight, 1  4 4 5 5 6 6       consume
    4    head.weight, 0  7 8               produce
    5    head.bias, 0    7 8               produce
    ==== =============== ================= =======

    Units 4, 5 and 6 have the same pattern, once in uses 0 and 2 and twice in use 3, so
    they are a family. It becomes the group `stem` of three channels, with the members
    stem.weight, axis 0, `[[0], [1], [2]]`; stem.bias, axis 0, the same; and
    head.weight, axis 1, `[[0, 1], [2, 3], [4, 5]]`: when channel 1 goes, so do the
    head's columns 2 and 3. Units 1 to 3 and 7 to 8 are families of their own, pinned as
    the network's input and output.

    Args:
        tracer: The notebook of the forward pass.
        demands: The sizes that its code asked for.
        boundaries: What entered and left its modules.
        reads: The attributes that its code has read.

    Returns:
        Prunable and pinned groups, with the tables from which costs follow.
    """
    representatives, values = solve_sizes(tracer, demands, solve(tracer))
    units = label_units(tracer.book, representatives)
    values |= follow_unread(tracer, boundaries, reads, units)
    reasons = pinning_reasons(tracer.book, representatives, units)
    places = []
    for labels, _ in tracer.uses.values():
        places.append(_sorted_places(units[labels.numpy()]))
    # Channels that lie in other parts of an axis cost something else, so they are
    # families of their own; the parts themselves are no members.
    for labels in tracer.part_uses.values():
        places.append(_sorted_places(units[labels.numpy()]))
    families = _families(places, reasons)
    groups = _groups(tracer, units, places, families)
    numbering = _number(units, families, groups)

    shapes = {}
    for name, tensor in named_tensors(tracer.model).items():
        shapes[name] = tuple(tensor.shape)
    # What no prunable group removes is fixed, so only those count here.
    operations = []
    for alive in tracer.operations:
        operations.append(
            sum_extents([count_extent(labels, 1, numbering) for labels in alive])
        )
    products = []
    for labels, times in tracer.products:
        products.append(count_extent(labels, times, numbering))
    result = Groups(
        all=tuple(groups),
        layers=_whole_layers(tracer.layers, shapes),
        shapes=shapes,
        parameters=frozenset(name for name, _ in tracer.model.named_parameters()),
        operations=tuple(operations),
        products=tuple(products),
        cells=cell_pairs(numbering),
        book=tracer.book,
        units=torch.from_numpy(numbering.channels),
        unsupported=_unsupported(tracer, representatives, numbering),
        attributes=attribute_lengths(values, units, numbering),
        stored=stored_tensors(tracer.model),
    )
    # Shares need to know every layer and every group, hence last.
    return with_macs_shares(result)


def _whole_layers(
    layers: list[Layer], shapes: dict[str, tuple[int, ...]]
) -> tuple[Layer, ...]:
    """Puts the uses of a weight's parts together where they make up all of it.

    Queries, keys and values of the same tokens, for example, each use a third of a
    packed weight at equally many positions.
    """
    whole: list[Layer] = []
    waiting: dict[tuple, list[Layer]] = defaultdict(list)
    for layer in layers:
        if len(layer.parts) != 1:
            whole.append(layer)
            continue
        axis = layer.parts[0].axis
        together = waiting[layer.tensor, axis, layer.positions]
        together.append(layer)
        positions = torch.cat([item.parts[0].positions for item in together])
        n = shapes[layer.tensor][axis]
        if len(positions) == n and len(positions.unique()) == n:
            whole.append(replace(layer, parts=()))
            together.clear()
    for together in waiting.values():
        whole += together
    return tuple(whole)


def _sorted_places(units: np.ndarray) -> _Places:
    """The units on an axis.

    Args:
        units: Of its positions, `(n_positions, 2)`; 0 for none.
    """
    positions = np.broadcast_to(np.arange(len(units))[:, None], units.shape)
    is_unit = units > 0
    positions = positions[is_unit]
    units = units[is_unit]
    # Sorted by the last key first.
    order = np.lexsort((positions, units))
    return _Places(units[order], positions[order])


def _families(places: list[_Places], reasons: dict[int, str]) -> list[_Family]:
    """Puts units with the same pattern and the same reason together.

    A unit's pattern is `(2, n_uses)`: the uses in which it lies, and how often in each.
    In the example of `derive_groups`, unit 5 has `[[0, 2, 3], [1, 1, 2]]`.

    Args:
        places: Per use the units on it.
        reasons: Pinned unit to its reason.

    Returns:
        The families, in the order of their first units.
    """
    triples = [np.zeros((3, 0), np.int64)]
    for use, place in enumerate(places):
        distinct, counts = np.unique(place.units, return_counts=True)
        triples.append(np.stack([distinct, np.full_like(distinct, use), counts]))
    # One column per unit and use; sorted, those of one unit stand side by side.
    table = np.concatenate(triples, axis=1)
    table = table[:, np.lexsort((table[1], table[0]))]
    distinct, starts = np.unique(table[0], return_index=True)
    if not len(distinct):
        return []
    patterns = np.split(table[1:], starts[1:], axis=1)
    members: dict[tuple[bytes, str | None], list[int]] = defaultdict(list)
    uses: dict[bytes, tuple[int, ...]] = {}
    for unit, pattern in zip(distinct.tolist(), patterns, strict=True):
        # Arrays can't be keys of a dict.
        key = pattern.tobytes()
        uses.setdefault(key, tuple(pattern[0].tolist()))
        # Units that are pinned for another reason stay apart, to be reported.
        members[key, reasons.get(unit)].append(unit)
    families = []
    for (key, reason), units in members.items():
        families.append(_Family(np.array(units), uses[key], reason))
    return families


def _groups(
    tracer: Tracer,
    units: np.ndarray,
    places: list[_Places],
    families: list[_Family],
) -> list[Group]:
    """One group for each family, named and, where nothing can be pruned, pinned."""
    uses = list(tracer.uses.items())
    # A mean over channels reads them, though no weight does.
    read_units = set()
    for labels in tracer.summed_labels:
        read_units.update(np.unique(units[labels.numpy()]).tolist())
    suffixes = _suffixes(units)
    groups = []
    taken_names: set[str] = set()
    for family in families:
        members = []
        for use in family.uses:
            if use >= len(uses):
                continue
            (tensor, axis), (_, role) = uses[use]
            index = torch.from_numpy(_member_index(places[use], family))
            members.append(Member(tensor, axis, role, index))
        # All units of a family are rows, or columns, or neither.
        first = int(family.units[0])
        name = _unique_name(members, suffixes.get(first, ""), taken_names)
        reason = family.reason or _unprunable_reason(
            members, len(family.units), first in read_units
        )
        if reason is None and _runs_in_training_only(members, tracer):
            reason = "runs in training only"
        groups.append(Group(name, len(family.units), tuple(members), reason))
    return groups


def _suffixes(units: np.ndarray) -> dict[int, str]:
    """Row and column units to what distinguishes their groups' names."""
    is_cell = units[:, 1] > 0
    suffixes = dict.fromkeys(units[is_cell, 0].tolist(), ":heads")
    suffixes.update(dict.fromkeys(units[is_cell, 1].tolist(), ":width"))
    return suffixes


def _member_index(places: _Places, family: _Family) -> np.ndarray:
    """Per channel of a family its positions on one axis, `(n_channels, k)`.

    All channels have equally many positions, as their patterns are the same, and places
    are sorted by unit; so cutting the list into equal pieces gives each its own.
    """
    is_member = np.isin(places.units, family.units)
    return places.positions[is_member].reshape(len(family.units), -1)


def _unique_name(members: list[Member], suffix: str, taken_names: set[str]) -> str:
    """Names a group by the first layer that produces it.

    Args:
        members: Of the group.
        suffix: ":heads" or ":width" for rows and columns of cells, else "".
        taken_names: Names given so far; the new one is added.
    """
    # Members are in the order of the forward pass.
    first = next((m for m in members if m.role == "produce"), members[0])
    # A parametrized weight's name says how it is computed.
    name = PARAMETRIZATION.sub(".weight", first.tensor)
    if name.endswith(LAYER_TENSORS):
        name = name.rpartition(".")[0]
    # No layer produces it, so it goes by one that reads it.
    name += f"{suffix}:input" if first.role == "consume" else suffix
    # Channels of one layer that go different ways after it are different groups.
    unique = name
    number = 2
    while unique in taken_names:
        unique = f"{name}#{number}"
        number += 1
    taken_names.add(unique)
    return unique


def _unprunable_reason(
    members: list[Member], n_channels: int, is_read: bool
) -> str | None:
    """Why there is nothing to prune in a group that nothing pins.

    Args:
        members: Of the group.
        n_channels: How many it has.
        is_read: Whether an operation without a weight sums over its channels.
    """
    roles = {member.role for member in members}
    if "produce" not in roles:
        return "no layer of the network produces it"
    if "consume" not in roles and not is_read:
        return "no layer reads it"
    return "is a single channel" if n_channels < 2 else None


def _runs_in_training_only(members: list[Member], tracer: Tracer) -> bool:
    """Whether no layer that evaluation runs holds a group's channels.

    Without them the network would be as slow as before.
    """
    return all(member.tensor in tracer.training_tensors for member in members)


def _number(
    units: np.ndarray, families: list[_Family], groups: list[Group]
) -> Numbering:
    """Numbers groups from 1 and channels from 0, and says which are each label's."""
    n_labels = len(units)
    channel_of_unit = np.full(n_labels, -1)
    group_of_unit = np.zeros(n_labels, np.int64)
    first = 0
    for number, family in enumerate(families, 1):
        n_channels = len(family.units)
        # Channel i of a group is unit i of its family, as in its members' index.
        channel_of_unit[family.units] = np.arange(first, first + n_channels)
        group_of_unit[family.units] = number
        first += n_channels
    groups_of_label = group_of_unit[units]
    # Number 0 stands for no group, which can't be pruned either.
    is_prunable = [False]
    for group in groups:
        is_prunable.append(group.pinned is None)
    is_prunable_group = np.array(is_prunable)
    return Numbering(
        names=[group.name for group in groups],
        groups=groups_of_label,
        prunable=groups_of_label * is_prunable_group[groups_of_label],
        channels=np.where(units > 0, channel_of_unit[units], -1),
        prunable_of_unit=group_of_unit * is_prunable_group[group_of_unit],
    )


def _unsupported(
    tracer: Tracer, representatives: np.ndarray, numbering: Numbering
) -> tuple[str, ...]:
    """One line per operation that pinned what reached it: where it is, which groups."""
    lines = []
    # An operation in a loop gives its reason many times.
    for reason in dict.fromkeys(tracer.unsupported):
        pinned = sorted(tracer.book.pinned_for(reason, representatives))
        numbers = np.unique(numbering.groups[pinned])
        names = [numbering.names[number - 1] for number in numbers if number]
        lines.append(f"{reason}; it pins {', '.join(names) or 'nothing'}")
    return (*lines, *tracer.notes)
