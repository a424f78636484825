"""MACs, parameters and memory of an allocation, from tables, without touching the model.

Every cost is a sum over tensors of products of axis lengths, and every axis length is affine in the kept counts. So one
small matrix product answers in microseconds what `torch.utils.flop_counter` counts on the really pruned network.
MACs are those of convolutions and linear layers for one sample.
"""

from collections.abc import Callable, Mapping

import numpy as np

from autoprune.groups import Activation, Groups

BYTES = 4
"""Size of a float32 element; activations and weights are counted in it."""


class CostTable:
    """Costs of every allocation of one network.

    Kept counts come as a mapping (groups left out keep all) or as an int array in the order of the prunable groups.

    Args:
        groups: The network's trace.
    """

    def __init__(self, groups: Groups):
        self.names = [group.name for group in groups]
        self.dense = np.array([group.channels for group in groups], dtype=np.int64)
        self._build_axes(groups)
        names = list(groups.shapes)
        applied = dict.fromkeys(names, 0)
        for layer in groups.layers:
            applied[layer.tensor] += layer.positions
        self._applied = np.array([applied[name] for name in names], dtype=np.int64)
        self._counted = np.array([name in groups.parameters for name in names], dtype=np.int64)
        self._build_activations(groups)
        self.metrics: dict[str, Callable[[Mapping[str, int] | np.ndarray], int]] = {
            "macs": self.macs,
            "params": self.params,
            "memory_bytes": self.memory_bytes,
        }

    def macs(self, kept: Mapping[str, int] | np.ndarray) -> int:
        """Multiply-accumulates of one sample."""
        return int(self._applied @ self._elements(self._array(kept)))

    def params(self, kept: Mapping[str, int] | np.ndarray) -> int:
        """Number of trainable values."""
        return int(self._counted @ self._elements(self._array(kept)))

    def memory_bytes(self, kept: Mapping[str, int] | np.ndarray) -> int:
        """Parameters and buffers, and the inputs and outputs of the hungriest single operation, for one sample."""
        kept = self._array(kept)
        alive = self._alive_fixed + self._alive_by_group @ kept
        return BYTES * int(self._elements(kept).sum() + alive.max(initial=0))

    def continuous(self, metric: str, kept: np.ndarray) -> float:
        """MACs or parameters at fractional kept counts: the smooth curve through the exact values."""
        weights = {"macs": self._applied, "params": self._counted}[metric]
        return float(weights @ self._elements(kept))

    def _array(self, kept: Mapping[str, int] | np.ndarray) -> np.ndarray:
        if isinstance(kept, np.ndarray):
            return kept
        return np.array([kept.get(name, count) for name, count in zip(self.names, self.dense, strict=True)], np.int64)

    def _elements(self, kept: np.ndarray) -> np.ndarray:
        """Elements of every tensor, `(n_tensors,)`."""
        lengths = self._fixed + self._by_group @ kept
        return self._rest * lengths[0] * lengths[1]

    def _build_axes(self, groups: Groups) -> None:
        """Length of up to two prunable axes a tensor: `fixed + by_group @ kept`; the other axes are a factor."""
        rows = {name: row for row, name in enumerate(groups.shapes)}
        slots: dict[str, list[int]] = {name: [] for name in rows}
        self._fixed = np.ones((2, len(rows)), np.int64)
        self._by_group = np.zeros((2, len(rows), len(groups)), np.int64)
        for column, group in enumerate(groups):
            for member in group.members:
                axes = slots[member.tensor]
                if member.axis not in axes:
                    axes.append(member.axis)
                    self._fixed[axes.index(member.axis), rows[member.tensor]] = groups.shapes[member.tensor][
                        member.axis
                    ]
                slot, per_channel = axes.index(member.axis), member.index.shape[1]
                self._by_group[slot, rows[member.tensor], column] += per_channel
                self._fixed[slot, rows[member.tensor]] -= per_channel * group.channels
        rest = [[n for axis, n in enumerate(groups.shapes[name]) if axis not in slots[name]] for name in rows]
        self._rest = np.array([int(np.prod(lengths)) for lengths in rest], np.int64)

    def _build_activations(self, groups: Groups) -> None:
        fixed, by_group = [], []
        for alive in groups.operations:
            rows = [self._activation(activation) for activation in alive]
            fixed.append(sum(row[0] for row in rows))
            by_group.append(sum(row[1] for row in rows))
        self._alive_fixed = np.array(fixed, np.int64)
        self._alive_by_group = np.array(by_group, np.int64).reshape(len(fixed), len(self.names))

    def _activation(self, activation: Activation) -> tuple[int, np.ndarray]:
        per_channel = np.array([activation.kept_by.get(name, 0) for name in self.names], np.int64)
        return activation.width * int(activation.channels - per_channel @ self.dense), activation.width * per_channel
