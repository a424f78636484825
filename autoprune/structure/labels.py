"""Labels: one integer per channel, joined where channels can only be pruned together.

A label tensor has the shape of the activation that it describes; stride 0 along the
axes that don't matter keeps it small. Label 0 stands for constants that the code
writes, zero padding for example.

Where channels lie on two axes, as attention's (heads, width) do, a channel is a cell:
it goes when its row goes or when its column goes. `LabelBook.factor` makes such a
lattice; `autoprune.tracing.constraint_solver` makes all lattices agree.
"""

from collections.abc import Collection, Hashable
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor

CONSTANT = 0
"""The label of what no channel holds."""


@dataclass(frozen=True)
class Lattice:
    """Channels that are cells, with labels for whole rows and whole columns of them.

    Attributes:
        cells: Labels `(n_rows, n_columns)`.
        rows: A label for each row, `(n_rows,)`.
        columns: A label for each column, `(n_columns,)`.
    """

    cells: Tensor
    rows: Tensor
    columns: Tensor


class Constraint(Enum):
    """What must hold for the channels that are kept.

    GRID: The axes came from splitting one axis; what is kept must stay a product.
    PARTS: `(n_parts, n)`, one axis cut into equal parts; all must keep equally many.
    """

    GRID = "grid"
    PARTS = "parts"


@dataclass
class LabelBook:
    """Hands out labels and remembers what the network's code demands of them.

    That is which were joined, pinned and laid out. Nothing is solved before the forward
    pass is over; see `autoprune.tracing.constraint_solver`.

    Attributes:
        n_labels: How many labels there are, the constant among them.
        is_recording: Whether joins are remembered; a run that only follows labels needs
            none.
        labels_by_purpose: Labels by what they were handed out for, so that a second run
            of the network gets the same.
        constraints: In the order of the forward pass, what the code's reshaping demands
            of labels: kind and labels.
        lattices: Cells with their rows and columns.
    """

    n_labels: int = 1
    is_recording: bool = True
    labels_by_purpose: dict[Hashable, Tensor] = field(default_factory=dict)
    constraints: list[tuple[Constraint, Tensor]] = field(default_factory=list)
    lattices: list[Lattice] = field(default_factory=list)
    _edges: list[np.ndarray] = field(default_factory=list)
    _pins: list[tuple[np.ndarray, str]] = field(default_factory=list)

    def new_labels(self, n: int, purpose: Hashable = None) -> Tensor:
        """Hands out labels.

        Args:
            n: How many.
            purpose: What they are for, such as a weight and how often it was used
                before. Who asks for the same purpose again gets the same labels; None
                gets fresh ones each time.

        Returns:
            int64 `(n,)`.
        """
        if purpose in self.labels_by_purpose:
            return self.labels_by_purpose[purpose]
        # Counted up, so that a label's number tells how early it was handed out.
        self.n_labels += n
        labels = torch.arange(self.n_labels - n, self.n_labels)
        if purpose is not None:
            self.labels_by_purpose[purpose] = labels
        return labels

    def copy_for_rerun(self) -> "LabelBook":
        """A book for another run of the same network, with the same labels.

        It has the lattices too, but remembers no joins.
        """
        return LabelBook(
            self.n_labels,
            is_recording=False,
            labels_by_purpose=dict(self.labels_by_purpose),
            lattices=list(self.lattices),
        )

    def copy_for_second_pass(self) -> "LabelBook":
        """A book for a pass in another mode, with the same labels and joins.

        What the pass adds leaves this one as it is.
        """
        return replace(
            self,
            labels_by_purpose=dict(self.labels_by_purpose),
            constraints=list(self.constraints),
            lattices=list(self.lattices),
            _edges=list(self._edges),
            _pins=list(self._pins),
        )

    def take_pins(self, other: "LabelBook") -> None:
        """Takes the pins of a copy in place of one's own, which are among them.

        Args:
            other: From `copy_for_second_pass`; labels that only it has are left out.
        """
        self._pins = []
        for labels, reason in other._pins:
            self._pins.append((labels[labels < self.n_labels], reason))

    def drop_repeated_constraints(self, first: "LabelBook") -> None:
        """Drops what a second pass has asked for just as the first one did.

        Args:
            first: The book of which this one is a copy.
        """
        n_first = len(first.constraints)
        known = {_constraint_key(*item) for item in first.constraints}
        more = []
        for item in self.constraints[n_first:]:
            key = _constraint_key(*item)
            if key not in known:
                known.add(key)
                more.append(item)
        self.constraints[n_first:] = more

    def join(self, a: Tensor, b: Tensor) -> None:
        """Makes the channels behind two label tensors the same, position by position.

        A channel that meets a constant can't go, since the code would still write the
        constant.

        Args:
            a: Labels of any shape.
            b: Labels of the same shape.
        """
        # Comparing labels costs more than following them; who won't solve needn't.
        if not self.is_recording:
            return
        pairs = distinct_pairs(a, b)
        is_constant = (pairs == CONSTANT).any(0)
        if is_constant.any():
            # The constant is label 0, so the larger one of a pair is the channel.
            channels = pairs[:, is_constant].max(0)
            reason = "meets a constant that the code writes, such as zero padding"
            self._pins.append((channels, reason))
        # No empty joins: the solver stops when nothing is joined any more.
        if not is_constant.all():
            self._edges.append(pairs[:, ~is_constant])

    def join_lines(self, lines: Tensor) -> None:
        """Joins all lines of `(n_lines, n)` with the first, position by position."""
        self.join(lines[:1].expand_as(lines), lines)

    def pin(self, labels: Tensor, reason: str) -> None:
        """Forbids pruning the channels behind some labels.

        Args:
            labels: Of any shape.
            reason: Why. Of several reasons for a channel, the first is reported.
        """
        # Unique, since a label is repeated at every pixel of an activation.
        self._pins.append((np.unique(labels.numpy()), reason))

    def factor(self, cells: Tensor) -> Tensor:
        """Gives every row of cells a label, which goes when the whole row goes.

        Equal rows share a label, and cells that are known already keep theirs, also
        where they come back transposed.

        Args:
            cells: Labels `(n_rows, n_columns)`.

        Returns:
            Labels `(n_rows,)`; the cells themselves where there is one column.
        """
        # A row of one cell goes when the cell does.
        if cells.shape[1] == 1:
            return cells[:, 0]
        distinct, row_of = torch.unique(cells, dim=0, return_inverse=True)
        # `unique` has sorted the rows, so equal sets of rows are equal tensors.
        for known in self.lattices:
            if torch.equal(known.cells, distinct):
                return known.rows[row_of]
            if torch.equal(known.cells.T, distinct):
                return known.columns[row_of]
        rows = self.new_labels(len(distinct))
        columns = self.new_labels(distinct.shape[1])
        self.lattices.append(Lattice(distinct, rows, columns))
        return rows[row_of]

    def row_labels(self, labels: Tensor, axes: list[int]) -> Tensor:
        """One label for all the cells that share a position on some axes.

        Cells `[[1, 2, 3], [4, 5, 6]]` on axes 1 and 2 of `(1, 2, 3)` have the rows 7, 8
        on axis 1, as `(1, 2, 1)`.

        Args:
            labels: Of an activation.
            axes: Some of those along which the labels vary.

        Returns:
            Labels that vary along `axes` alone, of length 1 on all others.
        """
        if not axes:
            # What is left of all channels is there whichever of them are.
            return torch.zeros([1] * labels.ndim, dtype=torch.int64)
        varying = varying_axes(labels)
        cells = compress(labels)
        # Rows first, then all other axes as the cells of a row.
        order = []
        for axis in [*axes, *(set(varying) - set(axes))]:
            order.append(varying.index(axis))
        cells = cells.permute(order)
        row_shape = cells.shape[: len(axes)]
        rows = self.factor(cells.reshape(row_shape.numel(), -1))
        shape = []
        for axis in range(labels.ndim):
            shape.append(labels.shape[axis] if axis in axes else 1)
        return rows.view(row_shape).view(shape)

    def cross(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Cells that go with the row or with the column that they are computed from.

        Args:
            rows: Labels `(n_rows,)`.
            columns: Labels `(n_columns,)`.

        Returns:
            Labels `(n_rows, n_columns)`; the same for the same rows and columns, as
            those of each sample of a batch are.
        """
        distinct_rows, row_of = torch.unique(rows, return_inverse=True)
        distinct_columns, column_of = torch.unique(columns, return_inverse=True)
        cells = self._crossed(distinct_rows, distinct_columns)
        return cells[row_of][:, column_of]

    def _crossed(self, rows: Tensor, columns: Tensor) -> Tensor:
        """As `cross`, for rows and columns that are ascending and distinct."""
        for known in self.lattices:
            is_known = torch.equal(known.rows, rows)
            if is_known and torch.equal(known.columns, columns):
                return known.cells
        cells = self.new_labels(rows.numel() * columns.numel())
        cells = cells.view(len(rows), len(columns))
        self.lattices.append(Lattice(cells, rows, columns))
        return cells

    @property
    def n_pins(self) -> int:
        """How many times something was pinned."""
        return len(self._pins)

    @property
    def n_joins(self) -> int:
        """How many joins were made; each may change representatives."""
        return len(self._edges)

    def representatives(
        self, known: np.ndarray | None = None, since: int = 0
    ) -> np.ndarray:
        """Finds each label's representative, the smallest label of its joined set.

        With five labels, and the joins 4-3 and 3-1, each label starts as its own:
        0, 1, 2, 3, 4. The first round lowers them to 0, 1, 2, 1, 3, as each join takes
        the smaller representative to the larger one; then each label takes that of its
        own: 0, 1, 2, 1, 1. The next round changes nothing.

        Args:
            known: The representatives after the first `since` joins, to start from.
            since: How many joins `known` has seen.

        Returns:
            int64 `(n_labels,)`.
        """
        found = np.arange(self.n_labels)
        if known is not None:
            # Labels that were handed out since represent themselves.
            found[: len(known)] = known
        edges = self._edges[since:]
        if not edges:
            edges = [np.zeros((2, 0), dtype=np.int64)]
        a, b = np.concatenate(edges, axis=1)
        while True:
            lower = np.minimum(found[a], found[b])
            before = found.copy()
            # `at`, since many joins may lower the same representative.
            np.minimum.at(found, found[a], lower)
            np.minimum.at(found, found[b], lower)
            found = found[found]
            if np.array_equal(found, before):
                return found

    def reasons(self, representatives: np.ndarray) -> dict[int, str]:
        """Why representatives are pinned.

        Args:
            representatives: That of every label, `(n_labels,)`.

        Returns:
            Pinned representative to the first reason given for one of its labels.
        """
        reasons: dict[int, str] = {}
        for labels, reason in self._pins:
            # Pins come in the order of the forward pass; the first is the cause.
            for representative in np.unique(representatives[labels]):
                reasons.setdefault(int(representative), reason)
        return reasons

    def pinned_for(self, reason: str, representatives: np.ndarray) -> set[int]:
        """The representatives pinned for a reason, even if not for that one first.

        Args:
            reason: Why, word by word.
            representatives: That of every label, `(n_labels,)`.
        """
        pinned: set[int] = set()
        for labels, given in self._pins:
            if given == reason:
                pinned.update(np.unique(representatives[labels]).tolist())
        return pinned


def _constraint_key(constraint: Constraint, labels: Tensor) -> tuple[Any, ...]:
    """Equal for constraints that say the same of the same labels."""
    # Tensors compare elementwise and don't hash; their bytes do.
    return constraint, tuple(labels.shape), labels.numpy().tobytes()


def distinct_pairs(a: Tensor, b: Tensor) -> np.ndarray:
    """The distinct pairs of unequal labels that meet at some position.

    Args:
        a: Labels of any shape.
        b: Labels of the same shape.

    Returns:
        int64 `(2, n_pairs)`.
    """
    # Pairs of equal labels say nothing and are most of them.
    first = a.flatten().numpy()
    second = b.flatten().numpy()
    is_different = first != second
    pairs = np.stack([first[is_different], second[is_different]])
    return np.unique(pairs, axis=1)


def varying_axes(labels: Tensor) -> list[int]:
    """The axes along which a label tensor isn't constant.

    Args:
        labels: Of any shape.
    """
    # Decided by values, since copies have lost their zero strides.
    labels = thin(labels)
    axes = []
    for axis in range(labels.ndim):
        first = labels.narrow(axis, 0, 1)
        if labels.shape[axis] > 1 and bool((labels != first).any()):
            axes.append(axis)
    return axes


def thin(labels: Tensor) -> Tensor:
    """Cuts axes of stride 0, which are constant, to length 1.

    Args:
        labels: Of any shape.

    Returns:
        A view with as many axes, which broadcasts to the same.
    """
    whole = slice(None)
    first = slice(0, 1)
    return labels[tuple(whole if stride else first for stride in labels.stride())]


def look_up(line: Tensor, index: Tensor) -> Tensor:
    """`line[index]` that leaves axes at stride 0 where the index has it.

    Args:
        line: `(n,)`.
        index: Positions in it, of any shape.
    """
    return line[thin(index)].expand(index.shape)


def compress(labels: Tensor) -> Tensor:
    """Drops the axes along which labels are constant."""
    return take_at_origin(labels, varying_axes(labels))


def take_at_origin(labels: Tensor, axes: Collection[int]) -> Tensor:
    """Takes the labels along some axes, at the first position of all others.

    Args:
        labels: Of any shape.
        axes: The axes that stay, in the order that they have.
    """
    whole = slice(None)
    return labels[tuple(whole if axis in axes else 0 for axis in range(labels.ndim))]


def labels_on_axis(labels: Tensor, axis: int) -> Tensor | None:
    """The labels along one axis, or None where they also vary along another.

    Args:
        labels: Of any shape.
        axis: Which axis.

    Returns:
        `(n,)`.
    """
    if any(other != axis for other in varying_axes(labels)):
        return None
    return take_at_origin(labels, [axis])


def lines(labels: Tensor, axis: int) -> Tensor:
    """The lines along one axis, one for each position of the other varying axes.

    Labels `(1, 3, 2)` that vary along the last two axes have along axis 1 two lines of
    three labels, and along axis 2 three lines of two.

    Args:
        labels: Of any shape.
        axis: Which axis.

    Returns:
        `(n_lines, n)`.
    """
    others = [other for other in varying_axes(labels) if other != axis]
    kept = take_at_origin(labels, [*others, axis])
    # Where the axis is now, after the constant ones before it have gone.
    place = sum(other < axis for other in others)
    return kept.movedim(place, -1).reshape(-1, labels.shape[axis])


def broadcast_labels(labels: Tensor, axis: int, shape: torch.Size) -> Tensor:
    """Lays labels along one axis of a tensor, the same at all positions of the others.

    Args:
        labels: `(n,)`.
        axis: Along which axis.
        shape: The tensor's shape; `n` on that axis.

    Returns:
        A view of the shape, with stride 0 along the other axes.
    """
    # `expand` gives stride 0, which `thin` recognizes.
    view = [1] * len(shape)
    view[axis] = -1
    return labels.view(view).expand(shape)
