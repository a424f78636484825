"""MACs, parameters and memory of an allocation, from tables, without touching the
model.

Every cost is a sum over tensors of products of axis lengths, and every axis length is
affine in the kept counts, and in their products where two groups are the rows and
columns of the same cells (attention's heads and their width). So MACs and parameters
are quadratic forms, which answer in microseconds, for one allocation or thousands, what
`torch.utils.flop_counter` counts on the really pruned network. MACs are those of
convolutions, linear layers and products of activations for one sample.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from autoprune.structure.groups import Extent, Groups

BYTES = 4
"""Size of a float32 element; activations and weights are counted in it."""


KeptCounts = Mapping[str, int] | np.ndarray


@dataclass(frozen=True)
class QuadraticForm:
    """`fixed + (terms @ products + linear) @ terms`, in float64, where whole numbers up
    to 2^53 are exact.
    """

    fixed: float
    linear: np.ndarray
    products: np.ndarray

    def __call__(self, terms: np.ndarray) -> np.ndarray:
        """Values `(...)` at terms `(..., n_terms)`."""
        terms = np.asarray(terms, np.float64)
        return self.fixed + np.einsum(
            "...i,...i->...", terms @ self.products + self.linear, terms
        )


class CostTable:
    """Costs of every allocation of one network.

    Kept counts come as a mapping (groups left out keep all) or as an array in the order
    of the prunable groups; MACs and parameters also take arrays `(..., n_groups)` and
    answer with int64 `(...)`.

    Args:
        groups: The network's trace.
    """

    def __init__(self, groups: Groups):
        self.names = [group.name for group in groups]
        self.dense = np.array([group.channels for group in groups], dtype=np.int64)
        self._pairs = _overlaps(groups)
        self._build_axes(groups)
        names = list(groups.shapes)
        applied = dict.fromkeys(names, 0) | groups.applied
        counted = {name: name in groups.parameters for name in names}
        products = self._extents(groups, groups.products)
        self._forms = {
            "macs": self._form(
                [applied[name] for name in names], *(part.sum(0) for part in products)
            ),
            "params": self._form([counted[name] for name in names]),
        }
        self._alive_fixed, self._alive_by = self._extents(groups, groups.operations)
        self.metrics: dict[str, Callable[[KeptCounts], int]] = {
            "macs": self.macs,
            "params": self.params,
            "memory_bytes": self.memory_bytes,
        }

    def macs(self, kept: KeptCounts) -> int | np.ndarray:
        """Multiply-accumulates of one sample."""
        return self._exact("macs", kept)

    def params(self, kept: KeptCounts) -> int | np.ndarray:
        """Number of trainable values."""
        return self._exact("params", kept)

    def memory_bytes(self, kept: KeptCounts) -> int:
        """Parameters and buffers, and the inputs and outputs of the hungriest single
        operation, for one sample.
        """
        terms = self._terms(self._array(kept))
        alive = self._alive_fixed + self._alive_by @ terms
        return BYTES * int(self._elements(terms).sum() + alive.max(initial=0))

    def continuous(self, metric: str, kept: np.ndarray) -> np.ndarray:
        """MACs or parameters `(...)` at fractional counts `(..., n_groups)`: a smooth
        curve through the exact ones.
        """
        return self._forms[metric](self._terms(kept))

    def _exact(self, metric: str, kept: KeptCounts) -> int | np.ndarray:
        value = np.rint(self._forms[metric](self._terms(self._array(kept)))).astype(
            np.int64
        )
        return value if value.ndim else int(value)

    def _array(self, kept: KeptCounts) -> np.ndarray:
        if isinstance(kept, np.ndarray):
            return kept
        return np.array(
            [
                kept.get(name, count)
                for name, count in zip(self.names, self.dense, strict=True)
            ],
            np.int64,
        )

    def _terms(self, kept: np.ndarray) -> np.ndarray:
        """Kept counts of the groups, then their products for groups that are the rows
        and columns of the same cells.
        """
        if not len(self._pairs):
            return kept
        return np.concatenate(
            [kept, kept[..., self._pairs[:, 0]] * kept[..., self._pairs[:, 1]]], -1
        )

    def _form(
        self, weights: list[int], fixed: int = 0, by_term: np.ndarray | float = 0.0
    ) -> QuadraticForm:
        """The sum over tensors of weight times elements, plus an affine part."""
        weights = np.array(weights, np.float64) * self._rest
        (first, second), (by_first, by_second) = (
            self._fixed,
            self._by_term.astype(np.float64),
        )
        linear = (weights * first) @ by_second + (weights * second) @ by_first + by_term
        return QuadraticForm(
            weights @ (first * second) + fixed,
            linear,
            (by_first.T * weights) @ by_second,
        )

    def _elements(self, terms: np.ndarray) -> np.ndarray:
        """Elements of every tensor, `(n_tensors,)`."""
        lengths = self._fixed + self._by_term @ terms
        return self._rest * lengths[0] * lengths[1]

    def _build_axes(self, groups: Groups) -> None:
        """Length of up to two prunable axes a tensor: `fixed + by_term @ terms`; the
        other axes are a factor.
        """
        rows = {name: row for row, name in enumerate(groups.shapes)}
        axes = _prunable_axes(groups)
        terms = self._terms(self.dense)
        self._fixed = np.ones((2, len(rows)), np.int64)
        self._by_term = np.zeros((2, len(rows), len(terms)), np.int64)
        used = dict.fromkeys(rows, 0)
        for (tensor, axis), per_channel in axes.items():
            slot, row = used[tensor], rows[tensor]
            used[tensor] += 1
            for term, n in self._by_terms(per_channel).items():
                self._by_term[slot, row, term] = n
            self._fixed[slot, row] = (
                groups.shapes[tensor][axis] - self._by_term[slot, row] @ terms
            )
        rest = [
            [
                n
                for axis, n in enumerate(groups.shapes[name])
                if (name, axis) not in axes
            ]
            for name in rows
        ]
        self._rest = np.array([int(np.prod(lengths)) for lengths in rest], np.int64)

    def _by_terms(self, per_channel: dict[int, int]) -> dict[int, int]:
        """Positions that one channel of each group occupies on an axis, cells counted
        once for row and column.
        """
        counts = dict(per_channel)
        for number, (row, column) in enumerate(self._pairs):
            if row in counts and column in counts:
                cells = counts.pop(row) // int(self.dense[column])
                del counts[column]
                counts[len(self.names) + number] = cells
        return counts

    def _extents(
        self, groups: Groups, extents: tuple[Extent, ...]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Fixed elements `(n,)` and elements per term `(n, n_terms)`."""
        column = {(name,): term for term, name in enumerate(self.names)}
        for number, (row, other) in enumerate(self._pairs):
            column[self.names[row], self.names[other]] = len(self.names) + number
        dense = self._terms(self.dense)
        fixed = np.array([extent.fixed for extent in extents], np.int64)
        by_term = np.zeros((len(extents), len(column)), np.int64)
        for row, extent in enumerate(extents):
            for names, elements in extent.elements.items():
                # The proof may have pinned a group since; then its share of the cells
                # is there to stay.
                prunable = tuple(name for name in names if (name,) in column)
                if prunable:
                    by_term[row, column[prunable]] += (
                        elements // dense[column[prunable]]
                    )
                else:
                    fixed[row] += elements
        return fixed, by_term


def _prunable_axes(groups: Groups) -> dict[tuple[str, int], dict[int, int]]:
    """Per tensor and axis on which prunable groups sit, each group's positions for one
    channel.
    """
    axes: dict[tuple[str, int], dict[int, int]] = {}
    for number, group in enumerate(groups):
        for member in group.members:
            axes.setdefault((member.tensor, member.axis), {})[number] = (
                member.index.shape[1]
            )
    return axes


def _overlaps(groups: Groups) -> np.ndarray:
    """Pairs of groups that are the rows and the columns of the same cells, `(n, 2)`."""
    numbers = {group.name: number for number, group in enumerate(groups)}
    pairs = [
        [numbers[name] for name in cells]
        for cells in groups.cells
        if numbers.keys() >= set(cells)
    ]
    return np.array(sorted(pairs), np.int64).reshape(-1, 2)
