"""How much each group holds: elements of activations, products, lengths of axes.

When groups are known, every label has one or two of them; what is labelled is counted
by them.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from autoprune.structure.labels import compress
from autoprune.structure.lengths import AttributePlace, Extent, Formula, Length
from autoprune.tracing.size_solver import Values
from autoprune.tracing.sizes import ComputedSize, Source
from autoprune.tracing.units import axis_units


@dataclass(frozen=True)
class Numbering:
    """Which group every label belongs to.

    Attributes:
        names: Of the groups, in order.
        groups: Per label the numbers of its one or two groups, counted from 1; 0 for
            none, `(n_labels, 2)`.
        prunable: The same, 0 for pinned groups too.
        channels: Per label the numbers of its channels, counted through all groups in
            order; -1 for none, `(n_labels, 2)`.
        prunable_of_unit: Per unit the number of its group, 0 for none and for pinned
            ones, `(n_labels,)`.
    """

    names: list[str]
    groups: np.ndarray
    prunable: np.ndarray
    channels: np.ndarray
    prunable_of_unit: np.ndarray


def count_extent(labels: Tensor, times: int, numbering: Numbering) -> Extent:
    """How many of the labelled elements each channel, or pair of channels, keeps.

    Args:
        labels: Of what is counted.
        times: How often each element counts.
        numbering: The groups of every label.
    """
    # Only axes along which labels vary are looked at; the others multiply the count.
    cells = compress(labels)
    times *= labels.numel() // cells.numel()
    return count_numbers(numbering.prunable[cells.numpy().ravel()], times, numbering)


def count_numbers(numbers: np.ndarray, times: int, numbering: Numbering) -> Extent:
    """How many elements go with each group, or pair of groups.

    Args:
        numbers: Of the one or two groups of each element, 0 for none, `(n, 2)`.
        times: How often each element counts.
        numbering: The groups' names.
    """
    # A pair of group numbers as one number, since those are counted much faster.
    base = len(numbering.names) + 1
    codes, counts = np.unique(numbers[:, 0] * base + numbers[:, 1], return_counts=True)
    fixed = 0
    elements: dict[tuple[str, ...], int] = {}
    for code, count in zip(codes.tolist(), counts.tolist(), strict=True):
        pair = divmod(code, base)
        names = tuple(numbering.names[number - 1] for number in pair if number)
        if names:
            elements[names] = elements.get(names, 0) + times * count
        else:
            fixed += times * count
    return Extent(fixed, elements)


def attribute_lengths(
    values: Values, units: np.ndarray, numbering: Numbering
) -> dict[AttributePlace, Length]:
    """The attributes that change when channels go.

    Args:
        values: Attribute to what it follows from.
        units: Those of every label.
        numbering: The groups of every unit.
    """
    lengths = {}
    for place, source in values.items():
        length = _length(source, values, units, numbering)
        if _is_variable(length):
            lengths[place] = length
    return lengths


def _length(
    source: Source, values: Values, units: np.ndarray, numbering: Numbering
) -> Length:
    """A size as it follows from what the groups keep."""
    if isinstance(source, int):
        return source
    if isinstance(source, AttributePlace):
        return _length(values[source], values, units, numbering)
    if isinstance(source, ComputedSize):
        left = _length(source.left, values, units, numbering)
        right = _length(source.right, values, units, numbering)
        return Formula(source.operation, left, right)
    if not source.has_channels:
        return source.dense
    own = axis_units(source.labels, source.axis, units)
    return count_numbers(numbering.prunable_of_unit[own], 1, numbering)


def _is_variable(length: Length) -> bool:
    """Whether a size changes when channels go."""
    if isinstance(length, Formula):
        return _is_variable(length.left) or _is_variable(length.right)
    return isinstance(length, Extent) and bool(length.elements)


def sum_extents(extents: list[Extent]) -> Extent:
    """All elements of several tensors together."""
    fixed = 0
    elements: dict[tuple[str, ...], int] = defaultdict(int)
    for extent in extents:
        fixed += extent.fixed
        for names, count in extent.elements.items():
            elements[names] += count
    return Extent(fixed, dict(elements))


def cell_pairs(numbering: Numbering) -> tuple[tuple[str, str], ...]:
    """The groups of rows and columns of the same cells."""
    is_cell = (numbering.groups > 0).all(1)
    pairs = []
    for row, column in np.unique(numbering.groups[is_cell], axis=0).tolist():
        pairs.append((numbering.names[row - 1], numbering.names[column - 1]))
    return tuple(pairs)
