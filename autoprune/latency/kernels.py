"""What the layers of a network have to do, as functions of how much each group keeps.

An engine's kernels work on tiles: vectors of 8 or 16 channels. A layer of 17 channels
takes as long as one of 32 then, so work is counted in channels that are rounded up, as
`Rounding` has it. Every amount of work never falls when a count grows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autoprune.costs.cost import CostTable
from autoprune.structure.groups import Groups, Layer


@dataclass(frozen=True)
class Signature:
    """Layers that one kernel computes, with the same time for the same work.

    Attributes:
        kind: Of the layers: "conv", "grouped", "depthwise" or "linear"; "product" for
            products of two activations, "move" for what every operation reads and
            writes.
        taps: Elements of a filter for one input channel: 9 of a 3 x 3 convolution.
        stride: Of a convolution; 1 otherwise.
        positions: Places of the output at which the weight is applied.
    """

    kind: str
    taps: int = 1
    stride: int = 1
    positions: int = 1


@dataclass(frozen=True)
class Rounding:
    """How many channels an engine computes for those that a layer has.

    With a tile of 16, 20 channels take as long as 32. Less than a tile takes as long as
    all of it, or, where tiles can be halved, as the next power of two: 5 as 8.

    Attributes:
        tile: Channels that are computed at a time, a power of two; 0 where each counts.
        is_halved: Whether channels that don't fill one tile take a smaller one.
    """

    tile: int
    is_halved: bool = False

    def up(self, lengths: np.ndarray) -> np.ndarray:
        """What numbers of channels `(...)` are computed as.

        Args:
            lengths: The numbers; fractions are allowed.
        """
        if not self.tile:
            return lengths
        # Less a little, so that a sum of fractions that should be whole isn't rounded
        # up.
        rounded = np.ceil(lengths / self.tile - 1e-9) * self.tile
        if not self.is_halved:
            return rounded
        powers = 2 ** np.ceil(np.log2(np.maximum(lengths, 1)) - 1e-9)
        return np.minimum(rounded, powers, out=rounded, where=lengths < self.tile)


EXACT = Rounding(0)
"""Every channel counts."""


class WorkTable:
    """Amounts of work of every allocation of one network.

    For example, a 3 x 3 convolution that keeps 20 of its 32 outputs and 10 of its 16
    inputs, at 64 places, in tiles of 8: 24 outputs and 16 inputs, so it computes
    24 * 16 * 9 * 64 products, reads 16 * 64 values and writes 24 * 64. Layers of one
    signature are added up.

    Args:
        groups: The network's trace.
        costs: Its cost table.

    Attributes:
        terms: What lengths are affine in.
        labels: For each column of `amounts` the signature and what is counted:
            "compute" (multiply-accumulates), "read" (inputs) or "write" (outputs).
    """

    def __init__(self, groups: Groups, costs: CostTable) -> None:
        self.terms = costs.terms
        signatures = [_signature(layer, groups) for layer in groups.layers]
        fixed, per_term = costs.layer_axes(groups)
        self._outputs = (fixed[0], per_term[0])
        self._inputs = (fixed[1], per_term[1])
        self._products = costs.tabulate_extents(groups.products)
        self._moves = costs.tabulate_extents(groups.operations)
        self._taps = np.array([signature.taps for signature in signatures], float)
        self._positions = np.array([one.positions for one in signatures], float)
        strides = np.array([signature.stride for signature in signatures])
        self._places_read = self._positions * strides**2
        kinds = np.array([signature.kind for signature in signatures])
        self._is_depthwise = kinds == "depthwise"
        self._tabulate_columns(signatures)

    def amounts(self, kept: np.ndarray, rounding: Rounding) -> np.ndarray:
        """The work of allocations, float64 `(..., n_columns)`.

        Args:
            kept: Counts `(..., n_groups)`; fractions are allowed.
            rounding: How channels are rounded up.
        """
        terms = np.asarray(self.terms.of(kept), float)
        outputs = rounding.up(_lengths(self._outputs, terms))
        inputs = rounding.up(_lengths(self._inputs, terms))
        # A depthwise filter has one input channel, whatever the tile.
        per_output = np.where(self._is_depthwise, 1.0, inputs)
        read = np.where(self._is_depthwise, outputs, inputs)
        by_layer = np.stack(
            [
                outputs * per_output * self._taps * self._positions,
                read * self._places_read,
                outputs * self._positions,
            ],
            -1,
        )
        # `(..., n_layers, 3)` to one sum for each signature and amount.
        sums = np.einsum("...la,ls->...sa", by_layer, self._is_of_signature)
        columns = [sums.reshape(*sums.shape[:-2], -1)]
        whole = np.asarray(self.terms.of(self._whole_tiles(kept, rounding)), float)
        for table in (self._products, self._moves):
            columns.append(_lengths(table, whole).sum(-1)[..., None])
        return np.concatenate(columns, -1)

    def _whole_tiles(self, kept: np.ndarray, rounding: Rounding) -> np.ndarray:
        """Counts rounded up to tiles, as engines hold channels between layers.

        Heads of attention and their width aren't: neither is the length of an axis.
        """
        rounded = np.minimum(rounding.up(kept), self.terms.dense)
        is_cell = np.isin(np.arange(len(self.terms.dense)), self.terms.cell_pairs)
        return np.where(is_cell, kept, rounded)

    def _tabulate_columns(self, signatures: Sequence[Signature]) -> None:
        """Writes down which layers are added up into which columns."""
        distinct = list(dict.fromkeys(signatures))
        self._is_of_signature = np.zeros((len(signatures), len(distinct)))
        for row, signature in enumerate(signatures):
            self._is_of_signature[row, distinct.index(signature)] = 1
        self.labels: list[tuple[Signature, str]] = []
        for signature in distinct:
            for amount in ("compute", "read", "write"):
                self.labels.append((signature, amount))
        self.labels.append((Signature("product"), "compute"))
        self.labels.append((Signature("move"), "read"))


def _signature(layer: Layer, groups: Groups) -> Signature:
    """The signature of one use of a weight."""
    shape = groups.shapes[layer.tensor]
    taps = int(np.prod(shape[2:]))
    return Signature(layer.kind, taps, layer.stride, layer.positions)


def _lengths(table: tuple[np.ndarray, np.ndarray], terms: np.ndarray) -> np.ndarray:
    """Lengths `(..., n)` at terms `(..., n_terms)`."""
    fixed, per_term = table
    return fixed + terms @ per_term.T
