"""Units: what goes as one. A label's channel, or the row or the column of cells."""

import numpy as np
from torch import Tensor

from autoprune.structure.labels import LabelBook, lines
from autoprune.tracing.constraint_solver import lattice_factors


def label_units(book: LabelBook, representatives: np.ndarray) -> np.ndarray:
    """Per label the units with which it goes, `(n_labels, 2)`; 0 for none.

    A cell goes with its row or with its column; any other label with its
    representative alone.

    Args:
        book: The labels, with their lattices.
        representatives: Of all labels, `(n_labels,)`.
    """
    # Factors are known of representatives; every label has its representative's.
    factors = lattice_factors(book, representatives)[representatives]
    alone = np.stack([representatives, np.zeros_like(representatives)], 1)
    return np.where(factors > 0, factors, alone)


def pinning_reasons(
    book: LabelBook, representatives: np.ndarray, units: np.ndarray
) -> dict[int, str]:
    """Why units are pinned; a pinned cell pins its row and its column.

    Args:
        book: The labels, with what was pinned.
        representatives: Of all labels, `(n_labels,)`.
        units: Those of every label, `(n_labels, 2)`.
    """
    reasons = book.reasons(representatives)
    for representative, reason in list(reasons.items()):
        for unit in units[representative]:
            # The first reason given stays.
            reasons.setdefault(int(unit), reason)
    return reasons


def axis_units(labels: Tensor, axis: int, units: np.ndarray) -> np.ndarray:
    """With which units the positions of an axis go, `(n, 2)`; 0 for none.

    A position is gone when all that lies there is. Of heads 7, 8 and widths 9, 10, 11
    with cells `[[1, 2, 3], [4, 5, 6]]`, the positions of the first axis go with 7 and
    8, those of the second with 9, 10 and 11; on one axis of all six cells, the fifth
    goes with 8 or with 10.

    Args:
        labels: Of an activation.
        axis: Which axis.
        units: Those of every label, `(n_labels, 2)`.
    """
    cells = units[lines(labels, axis).T.numpy()]
    # All cells of a position share the unit that takes them all; another one that a
    # cell has takes it alone.
    first = cells[:, 0]
    found = np.zeros_like(first)
    n_found = np.zeros(len(first), np.int64)
    for side in (0, 1):
        candidate = first[:, side]
        has_it = (cells == candidate[:, None, None]).any(2).all(1)
        is_shared = has_it & (candidate > 0)
        positions = is_shared.nonzero()[0]
        found[positions, n_found[positions]] = candidate[positions]
        n_found[positions] += 1
    return found


def removed_units(
    units: np.ndarray, pinned: set[int], n_trials: int, seed: int
) -> np.ndarray:
    """Random choices of units that go, bool `(n_trials, n_labels)`.

    Args:
        units: Those of every label, `(n_labels, 2)`.
        pinned: The units that stay.
        n_trials: How many choices.
        seed: Of the draws.
    """
    generator = np.random.default_rng(seed)
    is_removed = generator.random((n_trials, len(units))) < 0.4
    is_removed[:, [0, *pinned]] = False
    return is_removed
