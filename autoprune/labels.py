"""Labels: one integer per channel, joined where channels can only be pruned together.

A label tensor has the shape of the activation that it describes; stride 0 along the axes that don't matter keeps it
small. Label 0 stands for constants that the code writes, zero padding for example.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

CONSTANT = 0


@dataclass
class LabelBook:
    """Hands out labels and remembers which were joined and which are pinned; resolved once, after the forward pass."""

    n_labels: int = 1
    _edges: list[np.ndarray] = field(default_factory=list)
    _pins: list[tuple[np.ndarray, str]] = field(default_factory=list)

    def new(self, n: int) -> Tensor:
        """`n` fresh labels, `(n,)`."""
        self.n_labels += n
        return torch.arange(self.n_labels - n, self.n_labels)

    def join(self, a: Tensor, b: Tensor) -> None:
        """Makes the channels behind two label tensors of equal shape the same, position by position.

        A channel that meets a constant can't go, since the code would still write the constant.
        """
        pairs = np.unique(np.stack([a.flatten().numpy(), b.flatten().numpy()]), axis=1)
        pairs = pairs[:, pairs[0] != pairs[1]]
        constant = (pairs == CONSTANT).any(0)
        if constant.any():
            self._pins.append(
                (pairs[:, constant].max(0), "meets a constant that the code writes, such as zero padding")
            )
        self._edges.append(pairs[:, ~constant])

    def pin(self, labels: Tensor, reason: str) -> None:
        """Forbids pruning the channels behind `labels`; the first reason given is the one reported."""
        self._pins.append((np.unique(labels.numpy()), reason))

    def roots(self) -> np.ndarray:
        """Per label the smallest label of its joined set, `(n_labels,)`."""
        root = np.arange(self.n_labels)
        a, b = np.concatenate(self._edges, axis=1) if self._edges else np.zeros((2, 0), dtype=np.int64)
        while True:
            low = np.minimum(root[a], root[b])
            before = root.copy()
            np.minimum.at(root, root[a], low)
            np.minimum.at(root, root[b], low)
            root = root[root]
            if np.array_equal(root, before):
                return root

    def reasons(self, roots: np.ndarray) -> dict[int, str]:
        """Pinned root to the first reason that was given for one of its labels."""
        reasons: dict[int, str] = {}
        for labels, reason in self._pins:
            for root in np.unique(roots[labels]):
                reasons.setdefault(int(root), reason)
        return reasons


def varying_axes(labels: Tensor) -> list[int]:
    """The axes along which a label tensor isn't constant; decided by values, since copies lose their zero strides."""
    return [axis for axis in range(labels.ndim) if _varies(labels, axis)]


def _varies(labels: Tensor, axis: int) -> bool:
    if labels.shape[axis] < 2 or labels.stride(axis) == 0:
        return False
    return bool((labels != labels.narrow(axis, 0, 1)).any())


def along(labels: Tensor, axis: int) -> Tensor | None:
    """The labels along one axis, `(n,)`, or None where they also vary along another."""
    if any(other != axis for other in varying_axes(labels)):
        return None
    index = tuple(slice(None) if other == axis else 0 for other in range(labels.ndim))
    return labels[index]


def spread(labels: Tensor, axis: int, shape: torch.Size) -> Tensor:
    """Labels `(n,)` laid along `axis` of a tensor of `shape`, without copies."""
    view = [1] * len(shape)
    view[axis] = -1
    return labels.view(view).expand(shape)
