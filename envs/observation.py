"""The observation: named features with bounds, so that a policy means the same on every network.

Everything is a share, a logarithm or a small count scaled into [0, 1]; nothing names the network.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import log2

import numpy as np
from gymnasium import spaces

from autoprune.allocation import SearchSpace
from autoprune.criteria import Importance
from autoprune.groups import Group, Groups, Layer


@dataclass(frozen=True)
class State:
    """What is known when the sparsity of one group has to be chosen.

    Attributes:
        index: Position of the group among the prunable groups.
        kept: Counts of all groups; those from `index` on are still dense.
        target: The budget as an absolute cost.
        bounds: Lowest and highest sparsity from which the budget can still be met.
        uniform_to_go: Sparsity that meets the budget if all remaining groups get the same.
        previous: Executed sparsity of the group before; 0 at the start.
    """

    index: int
    kept: np.ndarray
    target: int
    bounds: tuple[float, float]
    uniform_to_go: float
    previous: float


@dataclass(frozen=True)
class Feature:
    """One number of the observation, within [0, 1]."""

    name: str
    meaning: str
    value: Callable[["Observer", State], float]


class Observer:
    """Computes observations of one network.

    Args:
        groups: The network's trace.
        space: Its search space, budgeted metric included.
        importance: Scores per channel, whose spread tells how much the weakest channels matter.
    """

    def __init__(self, groups: Groups, space: SearchSpace, importance: Importance):
        self.space = space
        self.dense_cost = space.cost(space.costs.dense)
        self.static = [self._describe(group, groups, importance[group.name]) for group in groups]

    def observe(self, state: State) -> np.ndarray:
        """The features, float32 `(n_features,)`, clipped to [0, 1]."""
        values = [feature.value(self, state) for feature in FEATURES]
        return np.clip(np.array(values, dtype=np.float32), 0, 1)

    def reduced(self, state: State) -> float:
        """Share of the dense cost that the decided groups have saved."""
        return 1 - self.space.cost(_with_rest(state, self.space.costs.dense)) / self.dense_cost

    def rest(self, state: State) -> float:
        """Share of the dense cost that this and later groups could still save."""
        dense, low = (self.space.cost(_with_rest(state, counts)) for counts in (self.space.costs.dense, self.space.low))
        return (dense - low) / self.dense_cost

    @staticmethod
    def _describe(group: Group, groups: Groups, scores) -> dict[str, float]:
        by_tensor = {layer.tensor: layer for layer in groups.layers}
        touched = [by_tensor[m.tensor] for m in group.members if m.tensor in by_tensor]
        producer = next((layer for layer in touched if layer.kind != "depthwise"), touched[0])
        shape = groups.shapes[producer.tensor]
        elements = {name: int(np.prod(groups.shapes[name])) for name in groups.parameters}
        mine = sum(elements[name] for name in {m.tensor for m in group.members} & groups.parameters)
        weak = scores.sort().values[: len(scores) // 2].sum() / scores.sum().clamp_min(1e-12)
        return {
            "is_linear": float(producer.kind == "linear"),
            "has_depthwise": float(any(layer.kind == "depthwise" for layer in touched)),
            "n_layers": log2(1 + len({layer.tensor for layer in touched})) / 8,
            "in_channels": log2(1 + shape[1]) / 13,
            "channels": log2(1 + group.channels) / 13,
            "size": log2(1 + max(_sizes(touched))) / 10,
            "stride": max(layer.stride for layer in touched) / 4,
            "kernel": max(groups.shapes[layer.tensor][-1] if layer.kind != "linear" else 1 for layer in touched) / 11,
            "macs_share": group.macs_share,
            "params_share": mine / sum(elements.values()),
            "weak_half": 2 * float(weak),
        }


def _sizes(layers: list[Layer]) -> list[int]:
    return [max(layer.size) for layer in layers]


def _with_rest(state: State, counts: np.ndarray) -> np.ndarray:
    kept = counts.copy()
    kept[: state.index] = state.kept[: state.index]
    return kept


def _static(name: str, meaning: str) -> Feature:
    return Feature(name, meaning, lambda observer, state: observer.static[state.index][name])


FEATURES: tuple[Feature, ...] = (
    Feature("position", "index of the group / number of groups", lambda o, s: s.index / len(o.static)),
    _static("is_linear", "1 if a linear layer produces the channels, 0 for a convolution"),
    _static("has_depthwise", "1 if a depthwise convolution follows the channels"),
    _static("n_layers", "log2(1 + layers that touch the group) / 8"),
    _static("in_channels", "log2(1 + input channels of the producing layer) / 13"),
    _static("channels", "log2(1 + channels of the group) / 13"),
    _static("size", "log2(1 + largest output side in pixels) / 10"),
    _static("stride", "largest stride of the touching layers / 4"),
    _static("kernel", "largest kernel side of the touching layers / 11"),
    _static("macs_share", "share of the network's MACs in layers that touch the group"),
    _static("params_share", "share of the network's parameters in layers that touch the group"),
    _static("weak_half", "importance of the weaker half of the channels, as a share of its value if all were equal"),
    Feature("reduced", "share of the dense cost saved by the groups before", lambda o, s: o.reduced(s)),
    Feature("rest", "share of the dense cost that this and later groups can still save", lambda o, s: o.rest(s)),
    Feature("previous", "executed sparsity of the group before", lambda o, s: s.previous),
    Feature("budget", "target / dense cost", lambda o, s: s.target / o.dense_cost),
    Feature("is_params", "1 if parameters are budgeted, 0 for MACs", lambda o, s: float(o.space.metric == "params")),
    Feature("lowest", "lowest sparsity from which the budget can still be met", lambda o, s: s.bounds[0]),
    Feature("highest", "highest sparsity at which the budget can still be used up", lambda o, s: s.bounds[1]),
    Feature(
        "uniform_to_go", "sparsity that meets the budget if all remaining groups get it", lambda o, s: s.uniform_to_go
    ),
)

OBSERVATION_SPACE = spaces.Box(0.0, 1.0, (len(FEATURES),), np.float32)


def feature_table() -> str:
    """The features as a Markdown table: index, name, bounds, meaning."""
    rows = [f"| {i} | {feature.name} | 0 | 1 | {feature.meaning} |" for i, feature in enumerate(FEATURES)]
    return "\n".join(["| index | name | min | max | meaning |", "| --- | --- | --- | --- | --- |", *rows])
