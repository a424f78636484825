"""Labels: one integer per channel, joined where channels can only be pruned together.

A label tensor has the shape of the activation that it describes; stride 0 along the
axes that don't matter keeps it small. Label 0 stands for constants that the code
writes, zero padding for example.

Where channels lie on two axes, as attention's (heads, width) do, a channel is a cell:
it goes when its row goes or when its column goes. `LabelBook.factor` makes such a
lattice; `autoprune.tracing.constraint_solver` makes all lattices agree.
"""

from collections.abc import Collection, Hashable
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import torch
from torch import Tensor

CONSTANT = 0


@dataclass(frozen=True)
class Lattice:
    """Cells `(n_rows, n_columns)` with a label for each row and for each column."""

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
    """Hands out labels and remembers which were joined, pinned and laid out; settled
    once, after the forward pass.

    Attributes:
        records: Whether joins are remembered; a run that only follows labels needs
            none.
        known: Labels by what they were handed out for, so that a second run of the
            network gets the same.
        constraints: In the order of the forward pass, what the code's reshaping demands
            of labels: kind and labels.
        lattices: Cells with their rows and columns.
    """

    n_labels: int = 1
    records: bool = True
    known: dict[Hashable, Tensor] = field(default_factory=dict)
    constraints: list[tuple["Constraint", Tensor]] = field(default_factory=list)
    lattices: list[Lattice] = field(default_factory=list)
    _edges: list[np.ndarray] = field(default_factory=list)
    _pins: list[tuple[np.ndarray, str]] = field(default_factory=list)

    def new_labels(self, n: int, purpose: Hashable = None) -> Tensor:
        """`n` labels, `(n,)`: those that were handed out for the same purpose before,
        else fresh ones.
        """
        if purpose in self.known:
            return self.known[purpose]
        self.n_labels += n
        labels = torch.arange(self.n_labels - n, self.n_labels)
        if purpose is not None:
            self.known[purpose] = labels
        return labels

    def copy_for_rerun(self) -> "LabelBook":
        """A book for another run of the same network, with the same labels and
        lattices.
        """
        return LabelBook(
            self.n_labels,
            records=False,
            known=dict(self.known),
            lattices=list(self.lattices),
        )

    def join(self, a: Tensor, b: Tensor) -> None:
        """Makes the channels behind two label tensors of equal shape the same, position
        by position.

        A channel that meets a constant can't go, since the code would still write the
        constant.
        """
        if not self.records:
            return
        pairs = distinct_pairs(a, b)
        constant = (pairs == CONSTANT).any(0)
        if constant.any():
            self._pins.append(
                (
                    pairs[:, constant].max(0),
                    "meets a constant that the code writes, such as zero padding",
                )
            )
        if (
            not constant.all()
        ):  # nor empty: settling stops when nothing is joined any more
            self._edges.append(pairs[:, ~constant])

    def join_lines(self, lines: Tensor) -> None:
        """Joins all lines of `(n_lines, n)` with the first, position by position."""
        self.join(lines[:1].expand_as(lines), lines)

    def pin(self, labels: Tensor, reason: str) -> None:
        """Forbids pruning the channels behind `labels`; the first reason given is the
        one reported.
        """
        self._pins.append((np.unique(labels.numpy()), reason))

    def factor(self, cells: Tensor) -> Tensor:
        """One label per row of `(n_rows, n_columns)`: what goes when the whole row
        goes. Equal rows share theirs.
        """
        if cells.shape[1] == 1:
            return cells[:, 0]
        distinct, row_of = torch.unique(cells, dim=0, return_inverse=True)
        for known in self.lattices:
            if torch.equal(known.cells, distinct):
                return known.rows[row_of]
            if torch.equal(known.cells.T, distinct):
                return known.columns[row_of]
        lattice = Lattice(
            distinct, self.new_labels(len(distinct)), self.new_labels(distinct.shape[1])
        )
        self.lattices.append(lattice)
        return lattice.rows[row_of]

    @property
    def n_joins(self) -> int:
        """How many joins were made; grows with each that may change a root."""
        return len(self._edges)

    def representatives(
        self, known: np.ndarray | None = None, since: int = 0
    ) -> np.ndarray:
        """Per label the smallest label of its joined set, `(n_labels,)`.

        Args:
            known: The roots after the first `since` joins, to start from.
            since: See `known`.
        """
        root = np.arange(self.n_labels)
        if known is not None:
            root[: len(known)] = known
        edges = self._edges[since:]
        a, b = (
            np.concatenate(edges, axis=1) if edges else np.zeros((2, 0), dtype=np.int64)
        )
        while True:
            low = np.minimum(root[a], root[b])
            before = root.copy()
            np.minimum.at(root, root[a], low)
            np.minimum.at(root, root[b], low)
            root = root[root]
            if np.array_equal(root, before):
                return root

    def reasons(self, representatives: np.ndarray) -> dict[int, str]:
        """Pinned root to the first reason that was given for one of its labels."""
        reasons: dict[int, str] = {}
        for labels, reason in self._pins:
            for root in np.unique(representatives[labels]):
                reasons.setdefault(int(root), reason)
        return reasons

    def roots_pinned_for(self, reason: str, representatives: np.ndarray) -> set[int]:
        """The roots that were pinned for one reason, whatever was said of them before."""
        return {
            int(root)
            for labels, why in self._pins
            if why == reason
            for root in np.unique(representatives[labels])
        }


def distinct_pairs(a: Tensor, b: Tensor) -> np.ndarray:
    """The distinct pairs of unequal labels that meet at some position, `(2, n)`."""
    a, b = a.flatten().numpy(), b.flatten().numpy()
    differ = a != b
    return np.unique(np.stack([a[differ], b[differ]]), axis=1)


def varying_axes(labels: Tensor) -> list[int]:
    """The axes along which a label tensor isn't constant; decided by values, since
    copies lose their zero strides.
    """
    labels = thin(labels)
    return [
        axis
        for axis in range(labels.ndim)
        if labels.shape[axis] > 1 and bool((labels != labels.narrow(axis, 0, 1)).any())
    ]


def thin(labels: Tensor) -> Tensor:
    """With length 1 along the axes of stride 0, which are constant; it broadcasts to
    the same.
    """
    return labels[
        tuple(slice(None) if stride else slice(0, 1) for stride in labels.stride())
    ]


def compress(labels: Tensor) -> Tensor:
    """The labels on their varying axes alone."""
    return take_at_origin(labels, varying_axes(labels))


def take_at_origin(labels: Tensor, axes: Collection[int]) -> Tensor:
    """The labels along some axes, at the first position of all others."""
    return labels[
        tuple(slice(None) if axis in axes else 0 for axis in range(labels.ndim))
    ]


def labels_on_axis(labels: Tensor, axis: int) -> Tensor | None:
    """The labels along one axis, `(n,)`, or None where they also vary along another."""
    if any(other != axis for other in varying_axes(labels)):
        return None
    return take_at_origin(labels, [axis])


def lines(labels: Tensor, axis: int) -> Tensor:
    """The lines along one axis, `(n_lines, n)`, each distinct position of the other
    varying axes once.
    """
    axes = [other for other in varying_axes(labels) if other != axis]
    kept = take_at_origin(labels, [*axes, axis])
    return kept.movedim(sum(other < axis for other in axes), -1).reshape(
        -1, labels.shape[axis]
    )


def broadcast_labels(labels: Tensor, axis: int, shape: torch.Size) -> Tensor:
    """Labels `(n,)` laid along `axis` of a tensor of `shape`, without copies."""
    view = [1] * len(shape)
    view[axis] = -1
    return labels.view(view).expand(shape)
