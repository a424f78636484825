"""From labels to groups: channels with the same pattern of members form a group."""

from collections import defaultdict
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from autoprune.groups import Extent, Group, Groups, Member, own_tensors
from autoprune.labels import compressed
from autoprune.settling import factors_of
from autoprune.shares import macs_share
from autoprune.tracer import Tracer

LAYER_TENSORS = (".weight", ".bias", ".in_proj_weight", ".in_proj_bias")
"""Tensors that go by the name of their layer; others have a name of their own."""
Pattern = tuple[tuple[int, int], ...]
"""Per use of a tensor's axis the number of positions there."""


def derive(tracer: Tracer) -> Groups:
    """The groups of a finished trace."""
    roots = tracer.settle()
    factors = factors_of(tracer.book, roots)
    reasons = _reasons(tracer, roots, factors)
    families = _families(tracer, roots, factors, reasons)
    groups = _named_groups(tracer, roots, factors, families, reasons)

    channel_of = np.full(len(roots), -1)
    group_of, first = {}, 0
    for group, (_, members) in zip(groups, families, strict=True):
        channel_of[members] = np.arange(first, first + len(members))
        if group.pinned is None:
            group_of.update(dict.fromkeys(members, group.name))
        first += len(members)
    sides = np.where(factors[roots] > 0, factors[roots], np.stack([roots, np.zeros_like(roots)], 1))
    units = torch.from_numpy(np.where(sides > 0, channel_of[sides], -1))

    names = {root: group.name for group, (_, members) in zip(groups, families, strict=True) for root in members}
    extent = lambda labels, times=1: _extent(labels, times, sides, group_of)  # noqa: E731
    result = Groups(
        all=tuple(groups),
        layers=tuple(tracer.layers),
        shapes={name: tuple(tensor.shape) for name, tensor in own_tensors(tracer.model).items()},
        parameters=frozenset(name for name, _ in tracer.model.named_parameters()),
        operations=tuple(_sum([extent(labels) for labels in alive]) for alive in tracer.operations),
        products=tuple(extent(labels, times) for labels, times in tracer.products),
        cells=_cells(sides, names),
        units=units,
        unsupported=_unsupported(tracer, roots, factors, names),
    )
    return replace(result, all=tuple(replace(group, macs_share=macs_share(group, result)) for group in groups))


def _cells(sides: np.ndarray, names: dict[int, str]) -> tuple[tuple[str, str], ...]:
    """The groups of rows and columns."""
    pairs = np.unique(sides[sides[:, 1] > 0], axis=0).tolist()
    return tuple(dict.fromkeys((names[row], names[column]) for row, column in pairs if {row, column} <= names.keys()))


def _reasons(tracer: Tracer, roots: np.ndarray, factors: np.ndarray) -> dict[int, str]:
    """Why roots are pinned; a pinned cell pins its row and its column."""
    reasons = tracer.book.reasons(roots)
    for root, reason in list(reasons.items()):
        for factor in factors[root]:
            if factor:
                reasons.setdefault(int(factor), reason)
    return reasons


def _families(tracer: Tracer, roots, factors, reasons) -> list[tuple[Pattern, list[int]]]:
    """Channels that sit equally often in the same places, and are pinned for the same reason."""
    places: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for use, (labels, _) in enumerate(tracer.uses.values()):
        for root in roots[labels.numpy()]:
            for unit in _units(root, factors):
                places[unit][use] += 1
    families = defaultdict(list)
    for root in sorted(places):
        families[tuple(places[root].items()), reasons.get(root)].append(root)
    return [(pattern, members) for (pattern, _), members in families.items()]


def _units(root: int, factors: np.ndarray) -> list[int]:
    """A channel goes by itself, a cell with its row and with its column; constants never."""
    pair = [int(factor) for factor in factors[root] if factor]
    return pair or ([int(root)] if root else [])


def _named_groups(tracer: Tracer, roots, factors, families, reasons) -> list[Group]:
    uses = list(tracer.uses.items())
    found = [_positions(roots[labels.numpy()], factors) for _, (labels, _) in uses]
    contracted = {root for labels in tracer.contracted for root in np.unique(roots[labels.numpy()])}
    read = {unit for root in contracted for unit in _units(root, factors)}
    sides = dict.fromkeys(factors[:, 0], ":heads") | dict.fromkeys(factors[:, 1], ":width") | {0: ""}
    groups, taken = [], set()
    for pattern, members in families:
        located = tuple(
            Member(*uses[use][0], uses[use][1][1], torch.tensor([found[use][root] for root in members]))
            for use, _ in pattern
        )
        name = _name(located, sides.get(members[0], ""), taken)
        reason = reasons.get(members[0]) or _unprunable(located, len(members), members[0] in read)
        groups.append(Group(name, len(members), located, reason))
    return groups


def _positions(line: np.ndarray, factors: np.ndarray) -> dict[int, list[int]]:
    positions = defaultdict(list)
    for position, root in enumerate(line):
        for unit in _units(root, factors):
            positions[unit].append(position)
    return positions


def _name(members: tuple[Member, ...], side: str, taken: set[str]) -> str:
    first = next((m for m in members if m.role == "produce"), members[0])
    name = first.tensor.rpartition(".")[0] if first.tensor.endswith(LAYER_TENSORS) else first.tensor
    name += side if first.role != "consume" else f"{side}:input"
    unique, suffix = name, 2
    while unique in taken:
        unique, suffix = f"{name}#{suffix}", suffix + 1
    taken.add(unique)
    return unique


def _unprunable(members: tuple[Member, ...], n_channels: int, is_read: bool) -> str | None:
    roles = {member.role for member in members}
    if "produce" not in roles:
        return "no layer of the network produces it"
    if "consume" not in roles and not is_read:
        return "no layer reads it"
    return "is a single channel" if n_channels < 2 else None


def _extent(labels: Tensor, times: int, sides: np.ndarray, group_of: dict[int, str]) -> Extent:
    """How many of the labelled elements each channel, or pair of channels, keeps."""
    cells = compressed(labels)
    times *= labels.numel() // cells.numel()
    pairs, counts = np.unique(sides[cells.numpy().ravel()], axis=0, return_counts=True)
    elements: dict[tuple[int, ...], int] = defaultdict(int)
    for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
        elements[tuple(unit for unit in pair if unit in group_of)] += count
    fixed = elements.pop((), 0)
    per_channel: dict[tuple[str, ...], int] = defaultdict(int)
    for units, count in elements.items():
        names = tuple(group_of[unit] for unit in units)
        per_channel[names] = max(per_channel[names], times * count)
    return Extent(times * fixed, dict(per_channel))


def _sum(extents: list[Extent]) -> Extent:
    total: dict[tuple[str, ...], int] = defaultdict(int)
    for extent in extents:
        for names, per_channel in extent.kept_by.items():
            total[names] += per_channel
    return Extent(sum(extent.fixed for extent in extents), dict(total))


def _unsupported(tracer: Tracer, roots, factors, names: dict[int, str]) -> tuple[str, ...]:
    """One line per operation that pinned what reached it: the operation, its module, the groups."""
    said = []
    for reason in dict.fromkeys(tracer.unsupported):
        pinned = tracer.book.pinned_for(reason, roots)
        units = {unit for root in pinned for unit in _units(root, factors)}
        groups = dict.fromkeys(names[unit] for unit in sorted(units) if unit in names)
        said.append(f"{reason}; it pins {', '.join(groups) or 'nothing'}")
    return tuple(said)
