"""After the forward pass: joins what must go together so that tensors stay boxes.

A pruned tensor has to be a box again, `(n, m, ...)`: its rows can't keep different
numbers of columns. Three things in the code can break that, and each asks for joins:

- lattices that share cells have to agree on rows and columns;
- an axis that was split keeps a product of what its parts keep (`Constraint.GRID`);
- an axis that was cut into equal parts keeps equally many channels in each
  (`Constraint.PARTS`).

The *representative* of a joined set is its smallest label; two labels are the same
channel where their representatives are equal.
"""

from collections import Counter

import numpy as np
import torch
from torch import Tensor

from autoprune.structure.labels import Constraint, LabelBook, Lattice, varying_axes


def solve_constraints(book: LabelBook) -> np.ndarray:
    """Joins until nothing changes any more.

    Constraints are met in the order of the forward pass, each with all joins before it
    made: what an earlier block leaves apart, a later one can balance with less.

    A residual block, for example: its stem produces labels 1, 2, 3 and its last
    convolution 4, 5, 6. The sum has joined 1 with 4, 2 with 5 and 3 with 6, so the
    representatives are `[0, 1, 2, 3, 1, 2, 3]`; label 0 is the constant. Nothing was
    reshaped, so this is the answer.

    Attention with two heads of three channels: labels 1 to 6 were reshaped to
    `[[1, 2, 3], [4, 5, 6]]`, a grid. As long as nothing sums over these cells by
    themselves, the six channels aren't a lattice, and a head that keeps two channels
    beside one that keeps three would be no box. So the grid joins its rows, 1 with 4, 2
    with 5 and 3 with 6. But when a product of queries and keys has summed each row,
    `LabelBook.factor` has made a lattice of the cells, with labels 7, 8 for the rows
    (heads) and 9, 10, 11 for the columns. A cell goes with its row or with its column,
    which always leaves a box, and nothing is joined.

    Args:
        book: The labels of one forward pass; the joins are added to it.

    Returns:
        The representative of every label, `(n_labels,)`.
    """
    # Lattices come first, since constraints look at the rows and columns of cells.
    representatives, factors = _solve_lattices(book, book.representatives(), 0)
    while True:
        before = representatives
        for constraint, labels in book.constraints:
            n_joins = book.n_joins
            for plane in planes(representatives[labels.numpy()], factors):
                if constraint is Constraint.GRID:
                    _keep_product(book, plane)
                else:
                    _balance(book, plane)
            if book.n_joins > n_joins:
                representatives, factors = _solve_lattices(
                    book, representatives, n_joins
                )
        # A join for a later constraint can break an earlier one; joins only ever make
        # fewer sets, so this ends.
        if np.array_equal(before, representatives):
            return representatives


def _solve_lattices(
    book: LabelBook, representatives: np.ndarray, since: int
) -> tuple[np.ndarray, np.ndarray]:
    """Takes new joins into account and makes the lattices agree.

    Args:
        book: The labels.
        representatives: Of the joins before `since`.
        since: How many joins those are.

    Returns:
        The representatives after all joins and the `lattice_factors` that go with them.
    """
    while True:
        representatives = book.representatives(representatives, since)
        since = book.n_joins
        # Rows that join may bring cells of further lattices together.
        _align_lattices(book, representatives)
        if book.n_joins == since:
            return representatives, lattice_factors(book, representatives)


def lattice_factors(book: LabelBook, representatives: np.ndarray) -> np.ndarray:
    """The row and the column of every cell.

    Heads 7, 8 and widths 9, 10, 11 with cells `[[1, 2, 3], [4, 5, 6]]` give cell 5 the
    factors `(8, 10)`.

    Args:
        book: The labels, with their lattices.
        representatives: Of all labels, `(n_labels,)`.

    Returns:
        `(n_labels, 2)`, by representative: those of its row and of its column; 0 for
        what is no cell.
    """
    factors = np.zeros((len(representatives), 2), np.int64)
    is_column = np.zeros(len(representatives), bool)
    for lattice in book.lattices:
        cells = representatives[lattice.cells.numpy()]
        rows = representatives[lattice.rows.numpy()]
        columns = representatives[lattice.columns.numpy()]
        # A lattice whose rows are an earlier one's columns is turned, so that heads
        # stay in the first place.
        if is_column[rows].any():
            cells = cells.T
            rows, columns = columns, rows
        factors[cells, 0] = rows[:, None]
        factors[cells, 1] = columns[None, :]
        is_column[columns] = True
    # Padding puts constants into lattices; a constant has no row to go with.
    factors[0] = 0
    return factors


def _align_lattices(book: LabelBook, representatives: np.ndarray) -> None:
    """Gives a cell that lies in several lattices, or twice in one, one row and column.

    Queries and keys, for example: cell 1 is row 0, column 0 of the queries' lattice
    and, since the product joined them, row 0, column 0 of the keys'. So the two rows
    have to be one head, and the two columns one channel of the width.
    """
    if not book.lattices:
        return
    positions = []
    for number, lattice in enumerate(book.lattices):
        cells = representatives[lattice.cells.numpy()]
        positions.append(_cell_positions(number, cells))
    positions = np.concatenate(positions, axis=1)
    # Constants lie in many lattices and tie none of them together.
    positions = positions[:, positions[0] != 0]
    # Each further position of a cell is compared with its first.
    _, first, cell = np.unique(positions[0], return_index=True, return_inverse=True)
    is_repeated = first[cell] != np.arange(positions.shape[1])
    first_positions = positions[1:, first[cell]]
    meetings = np.concatenate([first_positions, positions[1:]])[:, is_repeated]
    for number, other in np.unique(meetings[[0, 3]], axis=1).T:
        of_both = meetings[:, (meetings[0] == number) & (meetings[3] == other)]
        _join_axes(
            book,
            _with_representatives(book.lattices[number], representatives),
            _with_representatives(book.lattices[other], representatives),
            of_both[[1, 2, 4, 5]],
        )


def _with_representatives(lattice: Lattice, representatives: np.ndarray) -> Lattice:
    """The lattice with representatives for labels, so that nothing is joined twice."""
    return Lattice(
        cells=torch.from_numpy(representatives[lattice.cells.numpy()]),
        rows=torch.from_numpy(representatives[lattice.rows.numpy()]),
        columns=torch.from_numpy(representatives[lattice.columns.numpy()]),
    )


def _cell_positions(number: int, cells: np.ndarray) -> np.ndarray:
    """Cell, lattice, row and column of every cell, `(4, n_cells)`.

    Args:
        number: Of the lattice.
        cells: Its representatives, `(n_rows, n_columns)`.
    """
    row, column = np.indices(cells.shape).reshape(2, -1)
    return np.stack([cells.ravel(), np.full(cells.size, number), row, column])


def _join_axes(
    book: LabelBook, first: Lattice, second: Lattice, meetings: np.ndarray
) -> None:
    """Joins the rows and columns of two lattices that share cells.

    Args:
        book: The labels.
        first: One lattice.
        second: The other, which may be the same.
        meetings: Per shared cell its row and its column in the first lattice, then in
            the second, `(4, n)`.
    """
    row, column, other_row, other_column = torch.from_numpy(meetings)
    # An axis of one lattice is the axis of the other with which it pairs up in fewer
    # ways. A lattice of 2 x 3 cells that meets itself makes 2 pairs of rows and 3 of
    # columns, but 6 of rows with columns.
    n_straight = _n_pairs(row, other_row) + _n_pairs(column, other_column)
    n_turned = _n_pairs(row, other_column) + _n_pairs(column, other_row)
    if n_straight > n_turned:
        book.join(first.rows[row], second.columns[other_column])
        book.join(first.columns[column], second.rows[other_row])
    else:
        book.join(first.rows[row], second.rows[other_row])
        book.join(first.columns[column], second.columns[other_column])


def _n_pairs(a: Tensor, b: Tensor) -> int:
    """How many different pairs two lists of numbers make, position by position."""
    return torch.unique(torch.stack([a, b]), dim=1).shape[1]


def planes(representatives: np.ndarray, factors: np.ndarray) -> list[Tensor]:
    """What decides what is kept along a tensor's axes.

    Channels that are no cells decide for themselves. Of cells the rows decide and the
    columns do, so each constraint has to hold for both.

    Args:
        representatives: Of a tensor's labels, in any shape.
        factors: By representative the row and the column, `(n_labels, 2)`.

    Returns:
        The representatives as they are, or twice with their cells replaced: by the rows
        and by the columns.
    """
    if not factors[representatives].any():
        return [torch.from_numpy(representatives)]
    is_cell = factors[representatives, 0] > 0
    both = []
    for side in (0, 1):
        plane = np.where(is_cell, factors[representatives, side], representatives)
        both.append(torch.from_numpy(plane))
    return both


def _keep_product(book: LabelBook, plane: Tensor) -> None:
    """Lets the longest part of a split axis shrink, the same in all of the others.

    The others, such as the 3 of queries, keys and values, are taken for constants.
    """
    axes = varying_axes(plane)
    if len(axes) > 1:
        # Of axes that are equally long, the first: heads rather than their width.
        longest = max(axes, key=lambda axis: plane.shape[axis])
        lines = plane.movedim(longest, -1).reshape(-1, plane.shape[longest])
        book.join_lines(lines)


def _balance(book: LabelBook, parts: Tensor) -> None:
    """Joins channels until each joined set has equally many positions in every part.

    Two parts `[[1, 2, 3], [3, 1, 4]]`: channels 1 and 3 lie once in both and stay free;
    2 lies in the first only, 4 in the second only. The excess of the second part over
    the first is 0, -1, 0 and 1, so 2 and 4 join: they go together, one of each part.

    Args:
        book: The labels.
        parts: Representatives, `(n_parts, ...)`.
    """
    channels, index = np.unique(parts.numpy(), return_inverse=True)
    n_parts = len(parts)
    counts = np.zeros((len(channels), n_parts), np.int64)
    part_of_position = np.arange(n_parts)[:, None]
    # `counts[...] += 1` would count a channel that lies twice in a part only once.
    np.add.at(counts, (index.reshape(n_parts, -1), part_of_position), 1)
    excess = counts[:, 1:] - counts[:, :1]
    for balanced_set in _balanced_sets(excess):
        members = torch.from_numpy(channels[balanced_set])
        book.join(members[:1].expand_as(members), members)


def _balanced_sets(excess: np.ndarray) -> list[list[int]]:
    """Finds small sets of rows that add up to zero.

    A greedy search, since the smallest sets would need a subset-sum solver: a set takes
    the next row that brings its sum nearest to zero. Rows -1, 1, 1, -1 make the sets
    `[1, 0]` and `[3, 2]`. All rows together add up to zero, as parts are equally long,
    so every row ends in a set.

    Args:
        excess: Per channel how many more positions it has in each further part than in
            the first, `(n_channels, n_parts - 1)`.

    Returns:
        Sets of row numbers; rows of zeros are in none.
    """
    # Rows that are equal are interchangeable; each kind has a queue, its first row
    # last, where `pop` takes it.
    queues: dict[tuple[int, ...], list[int]] = {}
    for row in reversed(np.flatnonzero(excess.any(1))):
        queues.setdefault(tuple(excess[row]), []).append(int(row))
    sets = []
    while queues:
        balanced_set: list[int] = []
        total = np.zeros(excess.shape[1], np.int64)
        taken: Counter[tuple[int, ...]] = Counter()
        while queues and (not balanced_set or total.any()):
            step = _nearest_step(queues, total, taken)
            taken[step] += 1
            balanced_set.append(queues[step].pop())
            total = total + step
            if not queues[step]:
                del queues[step]
        sets.append(balanced_set)
    return sets


def _nearest_step(
    queues: dict[tuple[int, ...], list[int]],
    total: np.ndarray,
    taken: Counter[tuple[int, ...]],
) -> tuple[int, ...]:
    """The kind of row that brings a sum nearest to zero.

    Of kinds that come equally near, one that the set has fewest of: with four parts, a
    set is one row of each. Of those, the one whose next row has the highest number.

    Args:
        queues: Excess to the rows that have it.
        total: The sum, `(n_parts - 1,)`.
        taken: How many rows of each kind the set has.
    """

    def rank(step: tuple[int, ...]) -> tuple[int, int, int]:
        distance = np.abs(total + step).sum()
        return distance, taken[step], -queues[step][-1]

    return min(queues, key=rank)
