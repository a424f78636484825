"""From labels to groups: channels with the same pattern of members form a group."""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from autoprune.structure.groups import Extent, Group, Groups, Member, own_tensors
from autoprune.structure.labels import compressed
from autoprune.tracing.constraint_solver import factors_of
from autoprune.tracing.mac_coverage import with_macs_shares
from autoprune.tracing.tracer import Tracer

LAYER_TENSORS = (".weight", ".bias", ".in_proj_weight", ".in_proj_bias")
"""Tensors that go by the name of their layer; others have a name of their own."""


@dataclass(frozen=True)
class _Family:
    """Channels that sit equally often in the same places and are pinned for the same
    reason, if for any.

    A channel is a unit: a root, or the row or the column of cells.
    """

    units: np.ndarray
    uses: tuple[int, ...]
    reason: str | None


def derive(tracer: Tracer) -> Groups:
    """The groups of a finished trace."""
    representatives = tracer.solve_constraints()
    factors = factors_of(tracer.book, representatives)
    # Per label the units with which it goes: its row and its column, or its root; 0 for
    # none.
    sides = np.where(
        factors[representatives] > 0,
        factors[representatives],
        np.stack([representatives, np.zeros_like(representatives)], 1),
    )
    reasons = _reasons(tracer, representatives, sides)
    places = [
        _sorted_places(sides[labels.numpy()]) for labels, _ in tracer.uses.values()
    ]
    families = _families(places, reasons)
    groups = _groups(tracer, sides, places, families)

    channel_of, group_of = (
        np.full(len(representatives), -1),
        np.zeros_like(representatives),
    )
    first = 0
    for number, family in enumerate(families, 1):
        channel_of[family.units] = np.arange(first, first + len(family.units))
        group_of[family.units] = number
        first += len(family.units)
    names, groups_of = [group.name for group in groups], group_of[sides]
    is_prunable = np.array([False, *(group.pinned is None for group in groups)])
    prunable_of = groups_of * is_prunable[groups_of]
    result = Groups(
        all=tuple(groups),
        layers=tuple(tracer.layers),
        shapes={
            name: tuple(tensor.shape)
            for name, tensor in own_tensors(tracer.model).items()
        },
        parameters=frozenset(name for name, _ in tracer.model.named_parameters()),
        operations=tuple(
            _sum([_extent(x, 1, prunable_of, names) for x in alive])
            for alive in tracer.operations
        ),
        products=tuple(
            _extent(x, times, prunable_of, names) for x, times in tracer.products
        ),
        cells=_cells(groups_of, names),
        book=tracer.book,
        units=torch.from_numpy(np.where(sides > 0, channel_of[sides], -1)),
        unsupported=_unsupported(tracer, representatives, groups_of, names),
    )
    return with_macs_shares(result)


def _reasons(
    tracer: Tracer, representatives: np.ndarray, sides: np.ndarray
) -> dict[int, str]:
    """Why units are pinned; a pinned cell pins its row and its column."""
    reasons = tracer.book.reasons(representatives)
    for root, reason in list(reasons.items()):
        for unit in sides[root]:
            reasons.setdefault(int(unit), reason)
    return reasons


def _sorted_places(units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Units on an axis and their positions, sorted by both; `units` is `(n_positions,
    2)`.
    """
    positions = np.broadcast_to(np.arange(len(units))[:, None], units.shape)[units > 0]
    units = units[units > 0]
    order = np.lexsort((positions, units))
    return units[order], positions[order]


def _families(
    places: list[tuple[np.ndarray, np.ndarray]], reasons: dict[int, str]
) -> list[_Family]:
    triples = []
    for use, (units, _) in enumerate(places):
        distinct, counts = np.unique(units, return_counts=True)
        triples.append(np.stack([distinct, np.full_like(distinct, use), counts]))
    triples = np.concatenate(triples, axis=1) if triples else np.zeros((3, 0), np.int64)
    triples = triples[:, np.lexsort((triples[1], triples[0]))]
    distinct, starts = np.unique(triples[0], return_index=True)
    patterns = np.split(triples[1:], starts[1:], axis=1)
    found: dict[tuple[bytes, str | None], list[int]] = defaultdict(list)
    uses: dict[bytes, tuple[int, ...]] = {}
    for unit, pattern in zip(distinct.tolist(), patterns, strict=len(distinct) > 0):
        key = pattern.tobytes()
        uses.setdefault(key, tuple(pattern[0].tolist()))
        found[key, reasons.get(unit)].append(unit)
    return [
        _Family(np.array(units), uses[key], reason)
        for (key, reason), units in found.items()
    ]


def _groups(
    tracer: Tracer, sides: np.ndarray, places, families: list[_Family]
) -> list[Group]:
    uses = list(tracer.uses.items())
    read = {
        unit
        for labels in tracer.contracted
        for unit in np.unique(sides[labels.numpy()]).tolist()
    }
    is_cell = sides[:, 1] > 0
    suffixes = dict.fromkeys(sides[is_cell, 0].tolist(), ":heads") | dict.fromkeys(
        sides[is_cell, 1].tolist(), ":width"
    )
    groups, taken = [], set()
    for family in families:
        members = []
        for use in family.uses:
            (tensor, axis), (_, role) = uses[use]
            units, positions = places[use]
            index = positions[np.isin(units, family.units)].reshape(
                len(family.units), -1
            )
            members.append(Member(tensor, axis, role, torch.from_numpy(index)))
        first = int(family.units[0])
        name = _name(members, suffixes.get(first, ""), taken)
        reason = family.reason or _unprunable(members, len(family.units), first in read)
        groups.append(Group(name, len(family.units), tuple(members), reason))
    return groups


def _name(members: list[Member], suffix: str, taken: set[str]) -> str:
    first = next((m for m in members if m.role == "produce"), members[0])
    name = (
        first.tensor.rpartition(".")[0]
        if first.tensor.endswith(LAYER_TENSORS)
        else first.tensor
    )
    name += suffix if first.role != "consume" else f"{suffix}:input"
    unique, number = name, 2
    while unique in taken:
        unique, number = f"{name}#{number}", number + 1
    taken.add(unique)
    return unique


def _unprunable(members: list[Member], n_channels: int, is_read: bool) -> str | None:
    roles = {member.role for member in members}
    if "produce" not in roles:
        return "no layer of the network produces it"
    if "consume" not in roles and not is_read:
        return "no layer reads it"
    return "is a single channel" if n_channels < 2 else None


def _extent(
    labels: Tensor, times: int, group_of: np.ndarray, names: list[str]
) -> Extent:
    """How many of the labelled elements each channel, or pair of channels, keeps.

    Args:
        labels: Of what is counted.
        times: How often each element counts.
        group_of: Per label the numbers of its prunable groups, counted from 1; 0 for
            none.
        names: Names of the groups.
    """
    cells = compressed(labels)
    times *= labels.numel() // cells.numel()
    found = group_of[cells.numpy().ravel()]
    codes, counts = np.unique(
        found[:, 0] * (len(names) + 1) + found[:, 1], return_counts=True
    )
    fixed, elements = 0, {}
    for code, count in zip(codes.tolist(), counts.tolist(), strict=True):
        groups = tuple(
            names[number - 1] for number in divmod(code, len(names) + 1) if number
        )
        if groups:
            elements[groups] = elements.get(groups, 0) + times * count
        else:
            fixed += times * count
    return Extent(fixed, elements)


def _sum(extents: list[Extent]) -> Extent:
    total: dict[tuple[str, ...], int] = defaultdict(int)
    for extent in extents:
        for names, elements in extent.elements.items():
            total[names] += elements
    return Extent(sum(extent.fixed for extent in extents), dict(total))


def _cells(groups: np.ndarray, names: list[str]) -> tuple[tuple[str, str], ...]:
    """The groups of rows and columns of the same cells."""
    pairs = np.unique(groups[(groups > 0).all(1)], axis=0)
    return tuple((names[row - 1], names[column - 1]) for row, column in pairs.tolist())


def _unsupported(
    tracer: Tracer, representatives: np.ndarray, groups: np.ndarray, names: list[str]
) -> tuple[str, ...]:
    """One line per operation that pinned what reached it: the operation, its module,
    the groups.
    """
    said = []
    for reason in dict.fromkeys(tracer.unsupported):
        pinned = np.unique(
            groups[sorted(tracer.book.pinned_for(reason, representatives))]
        )
        said.append(
            f"{reason}; it pins "
            f"{', '.join(names[number - 1] for number in pinned if number) or 'nothing'}"
        )
    return tuple(said)
