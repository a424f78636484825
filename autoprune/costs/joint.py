"""Several metrics as one: the largest of their costs, each in units of its target.

So whatever bounds a search by one metric bounds it by several at once.
"""

from collections.abc import Mapping

import numpy as np

from autoprune.costs.metrics import Cost, KeptCounts, Metric

JOINT_TARGET = 2**40
"""What a cost that is just at its target comes to: so fine that steps of single
channels differ.
"""
LARGEST = 2.0**62
"""What costs millions of times beyond their target come to; int64 holds no more."""


class JointMetric:
    """The largest of several costs, each in units of its target.

    It is within `JOINT_TARGET` exactly if every cost is within its own target, and it
    never falls when a count grows, as none of the costs does.

    Args:
        metrics: What is counted, by name.
        targets: The largest allowed cost in each, by name.
    """

    def __init__(
        self, metrics: Mapping[str, Metric], targets: Mapping[str, int]
    ) -> None:
        self.metrics = dict(metrics)
        self.targets = dict(targets)

    def __call__(self, kept: KeptCounts) -> Cost:
        """As in `Metric`."""
        scaled = []
        for name, metric in self.metrics.items():
            scaled.append(_scaled(np.asarray(metric(kept)), self.targets[name]))
        largest = np.max(scaled, 0)
        return largest if largest.ndim else int(largest)

    def continuous(self, kept: np.ndarray) -> np.ndarray:
        """As in `Metric`."""
        scaled = []
        for name, metric in self.metrics.items():
            # A target below 1, of a tiny share, is out of reach however it is scaled.
            target = max(self.targets[name], 1)
            scaled.append(metric.continuous(kept) * (JOINT_TARGET / target))
        return np.max(scaled, 0)


def _scaled(cost: np.ndarray, target: int) -> np.ndarray:
    """Whole costs `(...)` in units of a target, int64, rounded up."""
    ratio = np.ceil(cost / max(target, 1) * JOINT_TARGET)
    ratio = np.minimum(ratio, LARGEST).astype(np.int64)
    # Division rounds, which must not decide on which side of the target a cost lies.
    within = np.minimum(ratio, JOINT_TARGET)
    beyond = np.maximum(ratio, JOINT_TARGET + 1)
    return np.where(cost <= target, within, beyond)
