"""Several metrics as one: the largest of their costs, each in units of its target.

So whatever bounds a search by one metric bounds it by several at once.
"""

from collections.abc import Sequence

import numpy as np

from autoprune.costs.metrics import Cost, KeptCounts, Metric

JOINT_TARGET = 2**40
"""What a cost that is just at its target comes to.

So fine that steps of single channels differ, and far from what int64 can't hold.
"""


class JointMetric:
    """The largest of several costs, each in units of its target.

    It is within `JOINT_TARGET` exactly if every cost is within its own target, and it
    never falls when a count grows, as none of the costs does.

    Args:
        metrics: What is counted.
        targets: The largest allowed cost in each.
    """

    def __init__(self, metrics: Sequence[Metric], targets: Sequence[int]) -> None:
        self.metrics = tuple(metrics)
        self.targets = tuple(targets)

    def __call__(self, kept: KeptCounts) -> Cost:
        """As in `Metric`."""
        scaled = []
        for metric, target in zip(self.metrics, self.targets, strict=True):
            scaled.append(_scaled(np.asarray(metric(kept)), target))
        largest = np.max(scaled, 0)
        return largest if largest.ndim else int(largest)

    def continuous(self, kept: np.ndarray) -> np.ndarray:
        """As in `Metric`."""
        scaled = []
        for metric, target in zip(self.metrics, self.targets, strict=True):
            # A target below 1, of a tiny share, is out of reach however it is scaled.
            scaled.append(metric.continuous(kept) * (JOINT_TARGET / max(target, 1)))
        return np.max(scaled, 0)


def _scaled(cost: np.ndarray, target: int) -> np.ndarray:
    """Whole costs `(...)` in units of a target, int64, rounded up."""
    ratio = np.ceil(cost / max(target, 1) * JOINT_TARGET).astype(np.int64)
    # Division rounds, which must not decide on which side of the target a cost lies.
    within = np.minimum(ratio, JOINT_TARGET)
    beyond = np.maximum(ratio, JOINT_TARGET + 1)
    return np.where(cost <= target, within, beyond)
