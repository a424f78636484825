"""What is known of each group by itself, whatever has been decided of the others."""

from math import log2

import numpy as np
from torch import Tensor

from autoprune.costs.search_space import SearchSpace
from autoprune.structure.groups import Group, Groups


def relative(values: np.ndarray, parts: np.ndarray | None = None) -> np.ndarray:
    """Numbers as x / (1 + x), with x in units of the mean: 0.5 is average.

    Worked example: of 1, 2 and 6 the mean is 3, so x is 1/3, 2/3 and 2, and the result
    0.25, 0.4 and 0.67.

    Args:
        values: What the mean is taken of, `(n,)`.
        parts: The numbers, `(n,)`; None for `values` themselves.
    """
    numbers = values if parts is None else parts
    # Where all are 0 there is no unit; they stay 0.
    scaled = numbers / max(values.mean(), 1e-12)
    return scaled / (1 + scaled)


def rank(values: np.ndarray) -> np.ndarray:
    """0 for the smallest, 1 for the largest."""
    # Stable, so that equal values rank the same on every machine.
    ranks = values.argsort(kind="stable").argsort(kind="stable")
    return ranks / max(1, len(values) - 1)


def means_ahead(values: np.ndarray) -> np.ndarray:
    """For each group the mean over the groups after it; the last one's own value."""
    last = len(values) - 1
    means = np.empty(len(values))
    for index in range(len(values)):
        means[index] = values[min(index + 1, last) :].mean()
    return means


def describe_group(group: Group, groups: Groups, scores: Tensor) -> dict[str, float]:
    """What is known of a group without measuring anything; not yet relative.

    Args:
        group: The group.
        groups: The network's trace.
        scores: Importance of the group's channels, `(n_channels,)`.
    """
    members = {member.tensor for member in group.members}
    by_tensor = {layer.tensor: layer for layer in groups.layers}
    layers = [by_tensor[m.tensor] for m in group.members if m.tensor in by_tensor]
    if not layers:
        # Depth and image size have no members: they touch everything.
        layers = list(groups.layers)
    # A depthwise layer passes channels on; the first other one makes them.
    kinds = [layer.kind for layer in layers]
    producers = [kind for kind in kinds if kind != "depthwise"]
    producer = producers[0] if producers else kinds[0]
    # Members include buffers, which aren't parameters.
    tensors = members & groups.parameters
    if not tensors:
        tensors = groups.parameters
    n_parameters = 0
    for name in tensors:
        n_parameters += int(np.prod(groups.shapes[name]))
    # Twice its share is 1 where all channels matter alike.
    weaker_half = scores.sort().values[: len(scores) // 2]
    weak_share = weaker_half.sum() / scores.sum().clamp_min(1e-12)
    return {
        "is_linear": producer == "linear",
        "has_depthwise": "depthwise" in kinds,
        "n_layers": log2(1 + len({layer.tensor for layer in layers})) / 8,
        "resolution": max(max(layer.size) for layer in layers),
        "macs_share": group.macs_share,
        "params_share": n_parameters,
        "weak_half": 2 * float(weak_share),
    }


def latency_shares(space: SearchSpace) -> np.ndarray:
    """By how much the latency falls when each group alone goes to its least.

    Args:
        space: The search space.

    Returns:
        Relative numbers, `(n_groups,)`; all 0 where the costs know no latency.
    """
    dense = space.costs.dense
    latency = space.costs.metrics.get("latency")
    if latency is None:
        return np.zeros(len(dense))
    # In row i only the i-th group shrinks.
    alone = np.where(np.eye(len(dense), dtype=bool), space.low, dense)
    return relative(latency(dense) - latency(alone))
