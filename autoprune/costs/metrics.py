"""What is counted of an allocation: the interface of a metric, and the exact ones.

A metric's costs are whole numbers: MACs, parameters, bytes, nanoseconds. Whole numbers
compare exactly, so whether a budget is met never depends on rounding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np

BYTES = 4
"""Size of a float32 element; activations and weights are counted in it."""

KeptCounts: TypeAlias = Mapping[str, int] | np.ndarray
"""Group to count, or counts in the order of the prunable groups, `(..., n_groups)`."""

Cost: TypeAlias = Any
"""An int for one allocation, int64 `(...)` for an array of many.

Which of the two depends on how many axes the counts have, and types can't tell that.
"""


class Metric(Protocol):
    """Something that an allocation costs, and that may be budgeted."""

    def __call__(self, kept: KeptCounts) -> Cost:
        """The cost of one allocation or of each of many.

        Exact, in whole numbers, and it never falls when a count grows.
        """
        ...

    def continuous(self, kept: np.ndarray) -> np.ndarray:
        """A curve near the exact costs, for counts that aren't whole.

        Args:
            kept: Counts `(..., n_groups)`, fractions allowed.

        Returns:
            Costs `(...)`, float64, which never fall when a count grows.
        """
        ...


@dataclass(frozen=True)
class Terms:
    """What the lengths of axes are affine in: counts, then products of counts.

    Attributes:
        names: The prunable groups, in order.
        dense: Their channels in the dense network, int64 `(n_groups,)`.
        cell_pairs: The pairs of groups that are the rows and the columns of the same
            cells, by number, int64 `(n_pairs, 2)`.
    """

    names: Sequence[str]
    dense: np.ndarray
    cell_pairs: np.ndarray

    def of(self, kept: KeptCounts) -> np.ndarray:
        """The counts, followed by one product for each pair, `(..., n_terms)`.

        Args:
            kept: Counts, whole or not.
        """
        counts = counts_in_order(kept, self.names, self.dense)
        # Most networks have no attention, and then nothing needs to be copied.
        if not len(self.cell_pairs):
            return counts
        rows = counts[..., self.cell_pairs[:, 0]]
        columns = counts[..., self.cell_pairs[:, 1]]
        return np.concatenate([counts, rows * columns], -1)


def counts_in_order(
    kept: KeptCounts, names: Sequence[str], dense: np.ndarray
) -> np.ndarray:
    """Counts as an array in the order of the groups; arrays are that already.

    Args:
        kept: Counts; a mapping may leave out groups that keep all.
        names: The groups, in order.
        dense: Their channels in the dense network, `(n_groups,)`.
    """
    # A search asks with arrays, thousands of times; they must not be copied.
    if isinstance(kept, np.ndarray):
        return kept
    counts = []
    for name, channels in zip(names, dense, strict=True):
        counts.append(kept.get(name, channels))
    return np.array(counts, np.int64)


def whole_costs(values: np.ndarray) -> Cost:
    """Costs that were computed as floats, as the whole numbers that they stand for.

    Args:
        values: Whole numbers but for rounding, `(...)`.

    Returns:
        An int where there are no axes, else int64 `(...)`.
    """
    costs = np.rint(values).astype(np.int64)
    return costs if costs.ndim else int(costs)


@dataclass(frozen=True)
class QuadraticForm:
    """`fixed + (terms @ products + linear) @ terms`, computed in float64.

    Whole numbers up to 2^53 are exact in it.

    Attributes:
        fixed: The value at all zeros.
        linear: One factor for each term, `(n_terms,)`.
        products: One factor for each pair of terms, `(n_terms, n_terms)`.
    """

    fixed: float
    linear: np.ndarray
    products: np.ndarray

    def __call__(self, terms: np.ndarray) -> np.ndarray:
        """The values `(...)` at terms `(..., n_terms)`."""
        # int64 would have no fast matrix product.
        terms = np.asarray(terms, np.float64)
        slopes = terms @ self.products + self.linear
        return self.fixed + np.einsum("...i,...i->...", terms, slopes)


@dataclass(frozen=True)
class QuadraticMetric:
    """A metric that sums over tensors: MACs, parameters, or bytes of a file.

    Attributes:
        terms: What the form is one of.
        form: Terms to costs.
    """

    terms: Terms
    form: QuadraticForm

    def __call__(self, kept: KeptCounts) -> Cost:
        """As in `Metric`."""
        return whole_costs(self.form(self.terms.of(kept)))

    def continuous(self, kept: np.ndarray) -> np.ndarray:
        """As in `Metric`; the curve passes through the exact costs."""
        return self.form(self.terms.of(kept))


@dataclass(frozen=True)
class MemoryMetric:
    """The bytes that an inference of one sample needs at most, in float32.

    That is all parameters and buffers, and the inputs and outputs of the hungriest
    single operation.

    Attributes:
        terms: What the tables go by.
        elements: Terms to the elements of all parameters and buffers.
        live_fixed: Elements that are alive in each operation whatever is kept,
            `(n_operations,)`.
        live_per_term: Those that come with one more of each term, `(n_operations,
            n_terms)`.
    """

    terms: Terms
    elements: QuadraticForm
    live_fixed: np.ndarray
    live_per_term: np.ndarray

    def __call__(self, kept: KeptCounts) -> Cost:
        """As in `Metric`."""
        return whole_costs(self._bytes(self.terms.of(kept)))

    def continuous(self, kept: np.ndarray) -> np.ndarray:
        """As in `Metric`; the curve passes through the exact costs."""
        return self._bytes(self.terms.of(kept))

    def _bytes(self, terms: np.ndarray) -> np.ndarray:
        # int64 would have no fast matrix product.
        terms = np.asarray(terms, np.float64)
        live = terms @ self.live_per_term.T + self.live_fixed
        return BYTES * (self.elements(terms) + live.max(-1, initial=0))


def hungriest(fixed: np.ndarray, per_term: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The operations that need most at some allocation; others never matter.

    An operation with no more of anything than another one is never hungrier. Deep
    networks repeat the same few, so few are left.

    Args:
        fixed: Elements of each operation whatever is kept, `(n_operations,)`.
        per_term: Those that come with one more of each term, `(n_operations, n_terms)`.

    Returns:
        Both for the operations that are left.
    """
    # As floats, which multiply far faster; whole numbers up to 2^53 are exact in them.
    rows = np.unique(np.column_stack([fixed, per_term]), axis=0).astype(np.float64)
    is_left = np.ones(len(rows), bool)
    for number, row in enumerate(rows):
        is_at_least = (rows >= row).all(1)
        # Rows are distinct, so what is at least as hungry beside itself is hungrier.
        is_left[number] = is_at_least.sum() == 1
    return rows[is_left, 0], rows[is_left, 1:]
