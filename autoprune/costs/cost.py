"""MACs, parameters and bytes of an allocation, from tables, without the model.

Every cost is a sum over tensors of products of axis lengths, and every axis length is
affine in the kept counts, and in their products where two groups are the rows and
columns of the same cells (attention's heads and their width). So MACs and parameters
are quadratic forms, which answer in microseconds, for one allocation or thousands, what
`torch.utils.flop_counter` counts on the really pruned network. MACs are those of
convolutions, linear layers and products of activations for one sample.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from autoprune.costs.joint import JointMetric
from autoprune.costs.metrics import (
    Cost,
    KeptCounts,
    MemoryMetric,
    Metric,
    QuadraticForm,
    QuadraticMetric,
    Terms,
    hungriest,
)
from autoprune.costs.units import amount_text
from autoprune.structure.groups import AxisPart, Extent, Groups, Layer, Member
from autoprune.structure.stored import header_bytes


class CostTable:
    """Costs of every allocation of one network.

    Kept counts come as a mapping (groups left out keep all) or as an array in the order
    of the prunable groups, `(..., n_groups)`, which are answered with int64 `(...)`.

    For example, a network of two convolutions, both 3 x 3 with a bias, on images of 3
    channels and 8 x 8 pixels; the first has 16 channels, the group, and the second 10,
    which are its output. With n channels kept, its tensors have

    - first weight: n * 3 * 9 = 27 n elements, applied at 64 places;
    - first bias: n elements;
    - second weight: 10 * n * 9 = 90 n elements, applied at 64 places;
    - second bias: 10 elements.

    So `params` is 10 + 118 n, and `macs` is 64 * 117 n. A weight between two groups
    that keep n and m channels has 9 n m elements, which makes the form quadratic.

    Args:
        groups: The network's trace.

    Attributes:
        names: The prunable groups, in order.
        dense: Their channels in the dense network, int64 `(n_groups,)`.
        least: The fewest channels with which the network runs, int64 `(n_groups,)`.
        terms: What lengths are affine in: counts, and products of counts.
        metrics: What can be counted: name to metric.
    """

    def __init__(self, groups: Groups):
        self.names = [group.name for group in groups]
        # int64 throughout: MACs of large networks exceed 32 bits.
        self.dense = np.array([group.channels for group in groups], dtype=np.int64)
        self.least = np.array([group.least for group in groups], dtype=np.int64)
        self.terms = Terms(self.names, self.dense, _cell_pairs(groups))
        partial_layers = [layer for layer in groups.layers if layer.parts]
        self._tabulate_axes(groups, partial_layers)
        self.metrics: dict[str, Metric] = {
            "macs": self._count_macs(groups, partial_layers),
            "params": self._count_params(groups),
            "memory": self._count_memory(groups),
            "size": self._count_size(groups),
        }

    def macs(self, kept: KeptCounts) -> Cost:
        """The multiply-accumulates of one sample."""
        return self.metrics["macs"](kept)

    def params(self, kept: KeptCounts) -> Cost:
        """The number of trainable values."""
        return self.metrics["params"](kept)

    def memory(self, kept: KeptCounts) -> Cost:
        """The bytes that an inference of one sample needs at most."""
        return self.metrics["memory"](kept)

    def size(self, kept: KeptCounts) -> Cost:
        """The bytes of the file of the weights, as `save_pruned` writes it.

        Never less than the file has: what comes before the tensors in it is counted as
        for the dense network.
        """
        return self.metrics["size"](kept)

    def continuous_cost(self, metric: str, kept: np.ndarray) -> np.ndarray:
        """A curve near the exact costs, for counts that aren't whole.

        Args:
            metric: A name of `metrics`.
            kept: Counts `(..., n_groups)`, fractions allowed.

        Returns:
            Costs `(...)`, float64.
        """
        return self.metrics[metric].continuous(kept)

    def describe(self, metric: str, kept: KeptCounts) -> str:
        """What an allocation costs, for messages: "macs=12000 (4.0%)".

        Args:
            metric: A name of `metrics`; of a joint one all that it joins are told.
            kept: One allocation.
        """
        metrics = {metric: self.metrics[metric]}
        joint = self.metrics[metric]
        if isinstance(joint, JointMetric):
            metrics = joint.metrics
        texts = []
        for name, cost in metrics.items():
            value = cost(kept)
            share = value / cost(self.dense)
            texts.append(f"{name}={amount_text(name, value)} ({share:.1%})")
        return " and ".join(texts)

    def with_metric(self, name: str, metric: Metric) -> "CostTable":
        """A cost table that knows one metric more.

        Args:
            name: What budgets call it.
            metric: It, for the groups of this table in their order.

        Returns:
            A copy; this table is left as it is.
        """
        extended = copy.copy(self)
        extended.metrics = {**self.metrics, name: metric}
        return extended

    def _count_macs(
        self, groups: Groups, partial_layers: list[Layer]
    ) -> QuadraticMetric:
        # Biases and buffers multiply nothing, so they have no positions.
        positions = dict.fromkeys(groups.shapes, 0)
        for layer in groups.layers:
            if not layer.parts:
                positions[layer.tensor] += layer.positions
        n_uses = list(positions.values())
        n_uses += [layer.positions for layer in partial_layers]
        fixed, per_term = self.tabulate_extents(groups.products)
        form = self._weighted_sizes(n_uses, fixed.sum(0), per_term.sum(0))
        return QuadraticMetric(self.terms, form)

    def _count_params(self, groups: Groups) -> QuadraticMetric:
        is_parameter = [name in groups.parameters for name in groups.shapes]
        return QuadraticMetric(self.terms, self._weighted_sizes(is_parameter))

    def _count_memory(self, groups: Groups) -> MemoryMetric:
        elements = self._weighted_sizes([1] * len(groups.shapes))
        # How much is alive in each operation; memory is about the largest of them.
        live = self.tabulate_extents(groups.operations)
        return MemoryMetric(self.terms, elements, *hungriest(*live))

    def _count_size(self, groups: Groups) -> QuadraticMetric:
        item_bytes = dict.fromkeys(groups.shapes, 0)
        pruned = {member.tensor for group in groups for member in group.members}
        for item in groups.stored:
            # Other buffers than these are in no file.
            if item.is_in_state or item.tensor in pruned:
                item_bytes[item.tensor] += item.item_bytes
        header = header_bytes(groups.stored, groups.shapes)
        form = self._weighted_sizes(list(item_bytes.values()), header)
        return QuadraticMetric(self.terms, form)

    def _weighted_sizes(
        self,
        weights: Sequence[int],
        fixed: int = 0,
        per_term: np.ndarray | float = 0.0,
    ) -> QuadraticForm:
        """The sum over tensors of weight times elements, plus an affine part.

        A tensor has `rest * (fixed[0] + per_term[0] @ terms) * (fixed[1] + per_term[1]
        @ terms)` elements; multiplied out, that is a quadratic form.

        Args:
            weights: One for each tensor, then for each part of one; 0 for those left
                out at the end.
            fixed: Added to the sum.
            per_term: Times terms, added to the sum, `(n_terms,)`.
        """
        # A part is a part of a tensor that counts already, unless it has a weight.
        parts = [0] * (len(self._rest_size) - len(weights))
        factors = np.array([*weights, *parts], np.float64) * self._rest_size
        first, second = self._axis_fixed
        # Integers up to 2^53 are exact as floats, which multiply far faster.
        by_first, by_second = self._axis_per_term.astype(np.float64)
        constant = float(factors @ (first * second) + fixed)
        linear = (
            (factors * first) @ by_second + (factors * second) @ by_first + per_term
        )
        products = (by_first.T * factors) @ by_second
        return QuadraticForm(constant, linear, products)

    def _tabulate_axes(self, groups: Groups, partial_layers: list[Layer]) -> None:
        """Writes down how the shape of every tensor follows from the terms.

        Up to two axes of a tensor are prunable; such an axis has the length `fixed +
        per_term @ terms`. The lengths of all other axes are one factor:

        - `_axis_fixed`: int64 `(2, n_rows)`;
        - `_axis_per_term`: int64 `(2, n_rows, n_terms)`;
        - `_rest_size`: int64 `(n_rows,)`.

        The rows are all tensors, then the parts of tensors that layers use by
        themselves.

        Args:
            groups: The network's trace.
            partial_layers: The layers that use a part of their weight.
        """
        boxes = _boxes(groups, partial_layers)
        n_terms = len(self.terms.of(self.dense))
        # A missing axis stays 1 + 0 @ terms, and so drops out of every product.
        self._axis_fixed = np.ones((2, len(boxes)), np.int64)
        self._axis_per_term = np.zeros((2, len(boxes), n_terms), np.int64)
        rest_sizes = []
        for row, box in enumerate(boxes):
            for slot, (axis, per_channel) in enumerate(box.axes.items()):
                fixed, per_term = self._axis_length(box.shape[axis], per_channel)
                self._axis_fixed[slot, row] = fixed
                self._axis_per_term[slot, row] = per_term
            rest = [n for axis, n in enumerate(box.shape) if axis not in box.axes]
            # The product of no lengths is 1, as it should be.
            rest_sizes.append(int(np.prod(rest)))
        self._rest_size = np.array(rest_sizes, np.int64)

    def _axis_length(
        self, length: int, per_channel: dict[int, int]
    ) -> tuple[int, np.ndarray]:
        """How the length of an axis follows from the terms.

        Args:
            length: In the dense network.
            per_channel: As for `_positions_per_term`.

        Returns:
            What stays, and what comes with one more of each term, int64 `(n_terms,)`.
        """
        dense_terms = self.terms.of(self.dense)
        per_term = np.zeros(len(dense_terms), np.int64)
        for term, n_positions in self._positions_per_term(per_channel).items():
            per_term[term] = n_positions
        # What no group's channels occupy stays: the axis less all that could go.
        return length - int(per_term @ dense_terms), per_term

    def _positions_per_term(self, per_channel: dict[int, int]) -> dict[int, int]:
        """How many positions of an axis come with one more of each term.

        An axis of 4 heads of width 3 has 12 positions. A head holds 3 of them and a
        place of the width 4, but together they don't hold 3 * 4 + 4 * 3: each position
        is the cell of one head and one place. So it's one position for each of the
        product's 12.

        The same heads may have places of several widths on one axis. Queries and keys
        of width 3 and values of width 5, say: a head holds 3 + 3 + 5 positions, a place
        of the first width 8, one of the second 4. That is two positions for each cell
        of heads and the first width, and one for each of heads and the second.

        Args:
            per_channel: Number of a group to the positions that one of its channels
                occupies in the dense network.

        Returns:
            Number of a term to the positions that come with it.
        """
        counts = dict(per_channel)
        for number, (row, column) in enumerate(self.terms.cell_pairs):
            n_rows = int(self.dense[row])
            n_columns = int(self.dense[column])
            # What either has left of them; 0 where it has no positions here.
            of_row = counts.get(row, 0) // n_columns
            of_column = counts.get(column, 0) // n_rows
            cells = min(of_row, of_column)
            if cells:
                counts[row] -= cells * n_columns
                counts[column] -= cells * n_rows
                counts[len(self.names) + number] = cells
        return counts

    def layer_axes(self, groups: Groups) -> tuple[np.ndarray, np.ndarray]:
        """Writes the channels of each layer's weight as affine functions of the terms.

        Args:
            groups: The network's trace.

        Returns:
            Of outputs and inputs what is fixed, int64 `(2, n_layers)`, and what comes
            with one more of each term, int64 `(2, n_layers, n_terms)`. A weight without
            an axis of inputs has one.
        """
        members = _members_by_tensor(groups)
        n_terms = len(self.terms.of(self.dense))
        fixed = np.ones((2, len(groups.layers)), np.int64)
        per_term = np.zeros((*fixed.shape, n_terms), np.int64)
        for row, layer in enumerate(groups.layers):
            shape = list(groups.shapes[layer.tensor])
            box = _box(shape, members[layer.tensor], layer.parts)
            for axis, length in enumerate(box.shape[:2]):
                fixed[axis, row], per_term[axis, row] = self._axis_length(
                    length, box.axes.get(axis, {})
                )
        return fixed, per_term

    def tabulate_extents(
        self, extents: tuple[Extent, ...]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Writes extents as affine functions of the terms.

        Args:
            extents: The elements of something, by the groups with which they go.

        Returns:
            The fixed elements `(n,)` and the elements per term `(n, n_terms)`.
        """
        term_of: dict[tuple[str, ...], int] = {}
        for term, name in enumerate(self.names):
            term_of[(name,)] = term
        for number, (row, column) in enumerate(self.terms.cell_pairs):
            term_of[self.names[row], self.names[column]] = len(self.names) + number
        dense_terms = self.terms.of(self.dense)
        fixed = np.array([extent.fixed for extent in extents], np.int64)
        per_term = np.zeros((len(extents), len(term_of)), np.int64)
        for number, extent in enumerate(extents):
            for names, elements in extent.elements.items():
                # The proof may have pinned a group since; then its share of the cells
                # is there to stay.
                prunable = tuple(name for name in names if (name,) in term_of)
                if prunable:
                    term = term_of[prunable]
                    # Elements come for all of the term; they divide evenly.
                    per_term[number, term] += elements // dense_terms[term]
                else:
                    fixed[number] += elements
        return fixed, per_term


@dataclass(frozen=True)
class _Box:
    """A tensor, or a part of one, and which groups sit where on it.

    Attributes:
        shape: In the dense network.
        axes: Axis to the prunable groups on it, each by its number, with the positions
            that one of its channels occupies.
    """

    shape: list[int]
    axes: dict[int, dict[int, int]]


def _boxes(groups: Groups, partial_layers: list[Layer]) -> list[_Box]:
    """All tensors, then the parts of tensors that layers use by themselves.

    Args:
        groups: The network's trace.
        partial_layers: The layers that use a part of their weight.
    """
    members = _members_by_tensor(groups)
    boxes = []
    for name, shape in groups.shapes.items():
        boxes.append(_box(list(shape), members[name], ()))
    for layer in partial_layers:
        shape = list(groups.shapes[layer.tensor])
        boxes.append(_box(shape, members[layer.tensor], layer.parts))
    return boxes


def _members_by_tensor(groups: Groups) -> dict[str, list[tuple[int, Member]]]:
    """Tensor to the groups on it by number, each with where its channels sit."""
    members: dict[str, list[tuple[int, Member]]] = {name: [] for name in groups.shapes}
    for number, group in enumerate(groups):
        for member in group.members:
            members[member.tensor].append((number, member))
    return members


def _box(
    shape: list[int],
    members: list[tuple[int, Member]],
    parts: tuple[AxisPart, ...],
) -> _Box:
    """A tensor, or the part of it that has some positions of its axes.

    Args:
        shape: Of the whole tensor.
        members: The groups on it by number, each with where its channels sit.
        parts: The axes that are cut; none for the whole tensor.
    """
    positions = {part.axis: part.positions for part in parts}
    for axis, kept in positions.items():
        shape[axis] = len(kept)
    axes: dict[int, dict[int, int]] = {}
    for number, member in members:
        if member.axis in positions:
            is_in_part = torch.isin(member.index, positions[member.axis])
            # All channels of a group lie equally often in every part.
            n_positions = int(is_in_part[0].sum())
        else:
            n_positions = member.index.shape[1]
        if n_positions:
            axes.setdefault(member.axis, {})[number] = n_positions
    return _Box(shape, axes)


def _cell_pairs(groups: Groups) -> np.ndarray:
    """The pairs of groups that are the rows and the columns of the same cells.

    Returns:
        Numbers of prunable groups, int64 `(n_pairs, 2)`, ascending.
    """
    numbers = {group.name: number for number, group in enumerate(groups)}
    pairs = []
    for row, column in groups.cells:
        # Where one of the two is pinned, the other prunes whole rows or columns.
        if row in numbers and column in numbers:
            pairs.append([numbers[row], numbers[column]])
    # Two columns also where there are no pairs.
    return np.array(sorted(pairs), np.int64).reshape(-1, 2)
