"""After the forward pass: joins what must be joined so that every tensor of the pruned
network stays a box.

Lattices that share cells agree on rows and columns; an axis that was split keeps a
product of what its parts keep; an axis that was cut into equal parts keeps equally many
channels in each.
"""

import numpy as np
import torch
from torch import Tensor

from autoprune.structure.labels import Constraint, LabelBook, Lattice, varying_axes


def solve_constraints(book: LabelBook) -> np.ndarray:
    """Joins until nothing changes. Returns the root of every label, `(n_labels,)`.

    Constraints are met in the order of the forward pass, each with all joins before it
    made: what an earlier block leaves apart, a later one can balance with less.
    """
    representatives, factors = _aligned(book, book.representatives(), 0)
    while True:
        before = representatives
        for constraint, labels in book.constraints:
            n_joins = book.n_joins
            for plane in planes(representatives[labels.numpy()], factors):
                MEET[constraint](book, plane)
            if book.n_joins > n_joins:
                representatives, factors = _aligned(book, representatives, n_joins)
        if np.array_equal(before, representatives):
            return representatives


def _aligned(
    book: LabelBook, representatives: np.ndarray, since: int
) -> tuple[np.ndarray, np.ndarray]:
    """Roots and factors after the joins since then, and those that make lattices agree."""
    while True:
        representatives, since = (
            book.representatives(representatives, since),
            book.n_joins,
        )
        _align_lattices(book, representatives)
        if book.n_joins == since:
            return representatives, factors_of(book, representatives)


def factors_of(book: LabelBook, representatives: np.ndarray) -> np.ndarray:
    """Per root the roots of its row and its column, `(n_labels, 2)`; 0 for what is no
    cell.

    A lattice whose rows are an earlier one's columns is turned, so that heads stay in
    the first place.
    """
    factors = np.zeros((len(representatives), 2), np.int64)
    is_column = np.zeros(len(representatives), bool)
    for lattice in book.lattices:
        cells, rows, columns = (
            representatives[x.numpy()]
            for x in (lattice.cells, lattice.rows, lattice.columns)
        )
        if is_column[rows].any():
            cells, rows, columns = cells.T, columns, rows
        factors[cells, 0], factors[cells, 1] = rows[:, None], columns[None, :]
        is_column[columns] = True
    factors[0] = 0
    return factors


def _align_lattices(book: LabelBook, representatives: np.ndarray) -> None:
    """A cell that lies in several lattices, or twice in one, has one row and one
    column.
    """
    places = [
        _places(number, representatives[lattice.cells.numpy()])
        for number, lattice in enumerate(book.lattices)
    ]
    if not places:
        return
    places = np.concatenate(places, axis=1)
    places = places[:, places[0] != 0]
    _, first, cell = np.unique(places[0], return_index=True, return_inverse=True)
    again = first[cell] != np.arange(places.shape[1])
    meetings = np.concatenate([places[1:, first[cell]], places[1:]])[:, again]
    for number, other in np.unique(meetings[[0, 3]], axis=1).T:
        of_both = meetings[:, (meetings[0] == number) & (meetings[3] == other)]
        _align(
            book,
            *(_rooted(book.lattices[n], representatives) for n in (number, other)),
            of_both[[1, 2, 4, 5]],
        )


def _rooted(lattice: Lattice, representatives: np.ndarray) -> Lattice:
    """With roots for labels, so that nothing is joined twice."""
    return Lattice(
        *(
            torch.from_numpy(representatives[x.numpy()])
            for x in (lattice.cells, lattice.rows, lattice.columns)
        )
    )


def _places(number: int, cells: np.ndarray) -> np.ndarray:
    """Cell, lattice, row and column of every cell, `(4, n_cells)`."""
    row, column = np.indices(cells.shape).reshape(2, -1)
    return np.stack([cells.ravel(), np.full(cells.size, number), row, column])


def _align(
    book: LabelBook, first: Lattice, second: Lattice, meetings: np.ndarray
) -> None:
    row, column, other_row, other_column = torch.from_numpy(meetings)
    # An axis of one lattice is the axis of the other with which it pairs up in fewer
    # ways.
    straight = _n_pairs(row, other_row) + _n_pairs(column, other_column)
    if straight > _n_pairs(row, other_column) + _n_pairs(column, other_row):
        book.join(first.rows[row], second.columns[other_column])
        book.join(first.columns[column], second.rows[other_row])
    else:
        book.join(first.rows[row], second.rows[other_row])
        book.join(first.columns[column], second.columns[other_column])


def _n_pairs(a: Tensor, b: Tensor) -> int:
    return torch.unique(torch.stack([a, b]), dim=1).shape[1]


def planes(found: np.ndarray, factors: np.ndarray) -> list[Tensor]:
    """What decides what is kept along a tensor's axes: its roots `found`, or the rows
    and the columns of its cells.
    """
    if not factors[found].any():
        return [torch.from_numpy(found)]
    is_cell = factors[found, 0] > 0
    return [
        torch.from_numpy(np.where(is_cell, factors[found, side], found))
        for side in (0, 1)
    ]


def _keep_product(book: LabelBook, plane: Tensor) -> None:
    """Of an axis that was split the longest part can shrink; the others, such as the 3
    of q, k, v, are constants.
    """
    axes = varying_axes(plane)
    if len(axes) > 1:
        longest = max(axes, key=lambda axis: plane.shape[axis])
        book.join_lines(plane.movedim(longest, -1).reshape(-1, plane.shape[longest]))


def _balance(book: LabelBook, parts: Tensor) -> None:
    """Joins channels until each joined set has equally many positions in every part."""
    classes, index = np.unique(parts.numpy(), return_inverse=True)
    counts = np.zeros((len(classes), len(parts)), np.int64)
    np.add.at(
        counts, (index.reshape(len(parts), -1), np.arange(len(parts))[:, None]), 1
    )
    excess = counts[:, 1:] - counts[:, :1]
    for together in _balanced_sets(excess):
        members = torch.from_numpy(classes[together])
        book.join(members[:1].expand_as(members), members)


def _balanced_sets(excess: np.ndarray) -> list[list[int]]:
    """Sets of rows that add up to zero, small ones: a set takes the next row that
    brings its sum nearer to zero.
    """
    queues: dict[tuple[int, ...], list[int]] = {}
    for row in reversed(np.flatnonzero(excess.any(1))):
        queues.setdefault(tuple(excess[row]), []).append(int(row))
    sets = []
    while queues:
        together: list[int] = []
        total = np.zeros(excess.shape[1], np.int64)
        while queues and (not together or total.any()):
            nearest = min(
                queues, key=lambda step: (np.abs(total + step).sum(), -queues[step][-1])
            )
            together.append(queues[nearest].pop())
            total = total + nearest
            if not queues[nearest]:
                del queues[nearest]
        sets.append(together)
    return sets


MEET = {Constraint.GRID: _keep_product, Constraint.PARTS: _balance}
