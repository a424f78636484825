"""The observation: named features with bounds, so that a policy means the same on every
network.

Everything is a share, a rank, or relative to the network's own mean or largest; nothing
names the network.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import log2

import numpy as np
from gymnasium import spaces
from torch import Tensor

from autoprune.costs.allocation import SearchSpace
from autoprune.evaluation.proxy import ProxyAccuracy, half
from autoprune.structure.groups import Group, Groups


@dataclass(frozen=True)
class State:
    """What is known when the sparsity of one group has to be chosen, in several lanes
    at once.

    Attributes:
        index: Position of the group among the prunable groups; the same in all lanes.
        kept: Counts of all groups, `(n_lanes, n_groups)`; those from `index` on are
            still dense.
        targets: The budgets as absolute costs, `(n_lanes,)`.
        bounds: Lowest and highest sparsity from which the budget can still be met,
            `(n_lanes,)` each.
        uniform_to_go: Sparsity that meets the budget if all remaining groups get the
            same, `(n_lanes,)`.
        previous: Executed sparsity of the group before, `(n_lanes,)`; 0 at the start.
    """

    index: int
    kept: np.ndarray
    targets: np.ndarray
    bounds: tuple[np.ndarray, np.ndarray]
    uniform_to_go: np.ndarray
    previous: np.ndarray


@dataclass(frozen=True)
class Feature:
    """One number of the observation, within [0, 1]: the same in all lanes, or
    `(n_lanes,)`.

    Attributes:
        name: What a policy's file calls it.
        meaning: What it says, and in which units.
        value: How it is computed.
        is_static: Whether it is a matter of the group alone, whatever has been decided.
    """

    name: str
    meaning: str
    value: Callable[["Observer", State], float | np.ndarray]
    is_static: bool = False


class Observer:
    """Computes observations of one network.

    Args:
        groups: The network's trace.
        space: Its search space, budgeted metric included.
        proxy: Its importance, whose spread tells how much the weakest channels matter,
            and its sensitivity. The latter has to be measured, so it isn't asked for
            before the first observation.
    """

    def __init__(self, groups: Groups, space: SearchSpace, proxy: ProxyAccuracy):
        self.groups, self.space, self.proxy = groups, space, proxy
        self.dense_cost = space.cost(space.costs.dense)

    def observe(self, state: State) -> np.ndarray:
        """The features, float32 `(n_lanes, n_features)`, clipped to [0, 1]."""
        features = np.empty((len(state.kept), len(FEATURES)), np.float32)
        for column, feature in enumerate(FEATURES):
            features[:, column] = feature.value(self, state)
        return features.clip(0, 1)

    def reduced(self, state: State) -> np.ndarray:
        """Share of the dense cost that the decided groups have saved."""
        return (
            1
            - self.space.cost(_with_rest(state, self.space.costs.dense))
            / self.dense_cost
        )

    def rest(self, state: State) -> np.ndarray:
        """Share of the dense cost that this and later groups could still save."""
        dense, low = (
            self.space.cost(_with_rest(state, counts))
            for counts in (self.space.costs.dense, self.space.low)
        )
        return (dense - low) / self.dense_cost

    @property
    def group_features(self) -> np.ndarray:
        """The features of `STATIC` of each group, `(n_groups, n_static)`: groups alike
        in these are of one kind.
        """
        return np.column_stack([self.static[name] for name in STATIC])

    @cached_property
    def static(self) -> dict[str, np.ndarray]:
        """What never changes: feature to `(n_groups,)`."""
        rows = [
            _describe(group, self.groups, self.proxy.importance[group.name])
            for group in self.groups
        ]
        columns = {
            name: np.array([row[name] for row in rows], float) for name in rows[0]
        }
        damage, dense = self.proxy.sensitivity, self.space.costs.dense
        halves = np.where(np.eye(len(dense), dtype=bool), half(dense), dense)
        saved = self.dense_cost - self.space.cost(halves)
        return columns | {
            "width": dense / dense.max(),
            "resolution": columns["resolution"] / columns["resolution"].max(),
            "macs_share": _relative(columns["macs_share"]),
            "params_share": _relative(columns["params_share"]),
            "sensitivity": _relative(damage),
            "sensitivity_rank": _rank(damage),
            "damage_rank": _rank(damage / np.maximum(saved, 1)),
            "sensitivity_ahead": _relative(damage, _means_ahead(damage)),
        }


def _relative(values: np.ndarray, parts: np.ndarray | None = None) -> np.ndarray:
    """`parts` (by default the values themselves) as x / (1 + x), with x in units of the
    mean: 0.5 is average.
    """
    parts = (values if parts is None else parts) / max(values.mean(), 1e-12)
    return parts / (1 + parts)


def _rank(values: np.ndarray) -> np.ndarray:
    """0 for the smallest, 1 for the largest."""
    return values.argsort(kind="stable").argsort(kind="stable") / max(
        1, len(values) - 1
    )


def _means_ahead(values: np.ndarray) -> np.ndarray:
    """For each group the mean over the groups after it; the last one's own value."""
    return np.array(
        [
            values[min(index + 1, len(values) - 1) :].mean()
            for index in range(len(values))
        ]
    )


def _describe(group: Group, groups: Groups, scores: Tensor) -> dict[str, float]:
    by_tensor = {layer.tensor: layer for layer in groups.layers}
    # Depth and image size have no members: they touch everything.
    touched = [
        by_tensor[m.tensor] for m in group.members if m.tensor in by_tensor
    ] or list(groups.layers)
    producer = next(
        (layer for layer in touched if layer.kind != "depthwise"), touched[0]
    )
    tensors = {
        member.tensor for member in group.members
    } & groups.parameters or groups.parameters
    weak = scores.sort().values[: len(scores) // 2].sum() / scores.sum().clamp_min(
        1e-12
    )
    return {
        "is_linear": producer.kind == "linear",
        "has_depthwise": any(layer.kind == "depthwise" for layer in touched),
        "n_layers": log2(1 + len({layer.tensor for layer in touched})) / 8,
        "resolution": max(max(layer.size) for layer in touched),
        "macs_share": group.macs_share,
        "params_share": sum(int(np.prod(groups.shapes[name])) for name in tensors),
        "weak_half": 2 * float(weak),
    }


def _with_rest(state: State, counts: np.ndarray) -> np.ndarray:
    kept = np.repeat(counts[None], len(state.kept), 0)
    kept[:, : state.index] = state.kept[:, : state.index]
    return kept


def _static(name: str, meaning: str) -> Feature:
    return Feature(
        name,
        meaning,
        lambda observer, state: observer.static[name][state.index],
        is_static=True,
    )


FEATURES: tuple[Feature, ...] = (
    Feature(
        "position",
        "index of the group / number of groups",
        lambda o, s: s.index / len(o.groups),
    ),
    _static(
        "is_linear", "1 if a linear layer produces the channels, 0 for a convolution"
    ),
    _static("has_depthwise", "1 if a depthwise convolution follows the channels"),
    _static("n_layers", "log2(1 + layers that touch the group) / 8"),
    _static("width", "channels of the group / those of the network's widest group"),
    _static(
        "resolution",
        "largest output side of the touching layers / the network's largest",
    ),
    _static(
        "macs_share",
        "MACs in layers that touch the group, x / (1 + x) with x in units of the mean "
        "group",
    ),
    _static("params_share", "parameters of tensors that the group touches, likewise"),
    _static(
        "weak_half",
        "importance of the weaker half of the channels, as a share of its value if all "
        "were equal",
    ),
    _static(
        "sensitivity",
        "damage when the group alone loses half of its channels, x / (1 + x) likewise",
    ),
    _static(
        "sensitivity_rank", "rank of that damage among the groups, 0 for the smallest"
    ),
    _static("damage_rank", "rank of that damage per cost saved, 0 for the cheapest"),
    _static(
        "sensitivity_ahead",
        "mean damage of the groups after this one, x / (1 + x) likewise",
    ),
    Feature(
        "reduced",
        "share of the dense cost saved by the groups before",
        lambda o, s: o.reduced(s),
    ),
    Feature(
        "rest",
        "share of the dense cost that this and later groups can still save",
        lambda o, s: o.rest(s),
    ),
    Feature(
        "previous", "executed sparsity of the group before", lambda o, s: s.previous
    ),
    Feature("budget", "target / dense cost", lambda o, s: s.targets / o.dense_cost),
    Feature(
        "is_params",
        "1 if parameters are budgeted, 0 for MACs",
        lambda o, s: float(o.space.metric == "params"),
    ),
    Feature(
        "lowest",
        "lowest sparsity from which the budget can still be met",
        lambda o, s: s.bounds[0],
    ),
    Feature(
        "highest",
        "highest sparsity at which the budget can still be used up",
        lambda o, s: s.bounds[1],
    ),
    Feature(
        "uniform_to_go",
        "sparsity that meets the budget if all remaining groups get it",
        lambda o, s: s.uniform_to_go,
    ),
)

STATIC = tuple(feature.name for feature in FEATURES if feature.is_static)
"""Features that never change."""
OBSERVATION_SPACE = spaces.Box(0.0, 1.0, (len(FEATURES),), np.float32)


def feature_table() -> str:
    """The features as a Markdown table: index, name, bounds, meaning."""
    rows = [
        f"| {i} | {feature.name} | 0 | 1 | {feature.meaning} |"
        for i, feature in enumerate(FEATURES)
    ]
    return "\n".join(
        [
            "| index | name | min | max | meaning |",
            "| --- | --- | --- | --- | --- |",
            *rows,
        ]
    )
