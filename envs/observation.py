"""The observation: named features within [0, 1] that mean the same on every network.

Everything is a share, a rank, or relative to the network's own mean or largest. Nothing
names the network, so that a policy can be carried to another one.
"""

import hashlib
from collections.abc import Callable, Sized
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from gymnasium import spaces

if TYPE_CHECKING:
    # So that the names of the features are known without PyTorch.
    from torch import Tensor, nn

    from autoprune.costs.search_space import SearchSpace
    from autoprune.evaluation.proxy_protocol import Proxy
    from autoprune.structure.groups import Groups


@dataclass(frozen=True)
class State:
    """What is known when the sparsity of one group has to be chosen, in every lane.

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
    """One number of the observation, within [0, 1].

    Attributes:
        name: What a policy's file calls it.
        meaning: What it says, and in which units.
        value: How it is computed: one number for all lanes, or `(n_lanes,)`.
        is_static: Whether it depends on the group alone, whatever has been decided.
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
        model: The network itself, by whose weights it is known again; None where nobody
            will ask.
    """

    def __init__(
        self,
        groups: "Groups",
        space: "SearchSpace",
        proxy: "Proxy",
        model: "nn.Module | None" = None,
    ) -> None:
        self.groups = groups
        self.space = space
        self.proxy = proxy
        self.model = model
        self.dense_cost = space.cost(space.costs.dense)

    def observe(self, state: State) -> np.ndarray:
        """The features, float32 `(n_lanes, n_features)`, clipped to [0, 1]."""
        features = np.empty((len(state.kept), len(FEATURES)), np.float32)
        for column, feature in enumerate(FEATURES):
            features[:, column] = feature.value(self, state)
        # A budget beyond the dense cost says no more than the dense cost.
        return features.clip(0, 1)

    def saved_share(self, state: State) -> np.ndarray:
        """Share of the dense cost that the decided groups have saved, `(n_lanes,)`."""
        cost = self.space.cost(_with_rest(state, self.space.costs.dense))
        return 1 - cost / self.dense_cost

    def open_share(self, state: State) -> np.ndarray:
        """Share of the dense cost that can still be saved, `(n_lanes,)`."""
        most = self.space.cost(_with_rest(state, self.space.costs.dense))
        least = self.space.cost(_with_rest(state, self.space.low))
        return (most - least) / self.dense_cost

    @cached_property
    def network(self) -> str | None:
        """Identifies the network with its weights, as 16 hexadecimal digits.

        Unlike the features it doesn't depend on how candidates are scored, on the
        budget or on what is excluded. None if the network isn't known.
        """
        if self.model is None:
            return None
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            # Counters of batches change without the network.
            if tensor.is_floating_point():
                digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
                digest.update(_bytes_of(tensor))
        return digest.hexdigest()[:16]

    @property
    def group_names(self) -> list[str]:
        """The names of the groups, in order."""
        return [group.name for group in self.groups]

    @property
    def group_features(self) -> np.ndarray:
        """The features of `STATIC` of each group, `(n_groups, n_static)`.

        Groups that are alike in these are of one kind.
        """
        return np.column_stack([self.static[name] for name in STATIC])

    @cached_property
    def static(self) -> dict[str, np.ndarray]:
        """What never changes: feature to `(n_groups,)`."""
        from autoprune.envs.group_features import (
            describe_group,
            latency_shares,
            means_ahead,
            rank,
            relative,
        )
        from autoprune.evaluation.proxy import half

        # Measured on first use: until then nobody pays for the sensitivity.
        rows = [
            describe_group(group, self.groups, self.proxy.importance[group.name])
            for group in self.groups
        ]
        columns = {}
        for name in rows[0]:
            columns[name] = np.array([row[name] for row in rows], float)
        dense = self.space.costs.dense
        damage = self.proxy.sensitivity
        # In row i only the i-th group is halved, as in the sensitivity.
        halves = np.where(np.eye(len(dense), dtype=bool), half(dense), dense)
        saved = self.dense_cost - self.space.cost(halves)
        return columns | {
            "width": dense / dense.max(),
            "resolution": columns["resolution"] / columns["resolution"].max(),
            "macs_share": relative(columns["macs_share"]),
            "params_share": relative(columns["params_share"]),
            "sensitivity": relative(damage),
            "sensitivity_rank": rank(damage),
            "damage_rank": rank(damage / np.maximum(saved, 1)),
            "sensitivity_ahead": relative(damage, means_ahead(damage)),
            "latency_share": latency_shares(self.space),
        }

    @cached_property
    def columns(self) -> np.ndarray:
        """The features that learners see here, by number.

        That is all but those of the latency where the costs know none: they would
        always be 0, and a network with fewer inputs starts from other weights.
        """
        is_seen = [
            feature.name != "latency_share" or "latency" in self.space.costs.metrics
            for feature in FEATURES
        ]
        return np.flatnonzero(is_seen)

    def seen(self, observations: np.ndarray) -> np.ndarray:
        """What learners see of observations.

        Args:
            observations: All features, `(n_lanes, n_features)`.

        Returns:
            Those of `columns`, `(n_lanes, n_columns)`.
        """
        # By `take`, whose rows lie as those of the argument do.
        return observations.take(self.columns, 1)


def _bytes_of(tensor: "Tensor") -> bytes:
    """The numbers of a tensor in a row, however they lie in memory."""
    import torch

    # As bytes, since numpy has no bfloat16.
    row = tensor.detach().cpu().contiguous().view(-1)
    return row.view(torch.uint8).numpy().tobytes()


def _with_rest(state: State, counts: np.ndarray) -> np.ndarray:
    """The decided groups, then `counts`: `(n_lanes, n_groups)`."""
    kept = np.repeat(counts[None], len(state.kept), 0)
    kept[:, : state.index] = state.kept[:, : state.index]
    return kept


def _static(name: str, meaning: str) -> Feature:
    """A feature that is looked up in `Observer.static`."""

    def value(observer: Observer, state: State) -> float:
        return observer.static[name][state.index]

    return Feature(name, meaning, value, is_static=True)


def _position(observer: Observer, state: State) -> float:
    return state.index / len(observer.groups)


def _previous(observer: Observer, state: State) -> np.ndarray:
    return state.previous


def _budget(observer: Observer, state: State) -> np.ndarray:
    return state.targets / observer.dense_cost


def _is_params(observer: Observer, state: State) -> float:
    # A file holds little else than parameters.
    return float(observer.space.metric in ("params", "size"))


def _lowest(observer: Observer, state: State) -> np.ndarray:
    return state.bounds[0]


def _highest(observer: Observer, state: State) -> np.ndarray:
    return state.bounds[1]


def _uniform_to_go(observer: Observer, state: State) -> np.ndarray:
    return state.uniform_to_go


FEATURES: tuple[Feature, ...] = (
    Feature(
        "position",
        "index of the group / number of groups",
        _position,
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
        Observer.saved_share,
    ),
    Feature(
        "rest",
        "share of the dense cost that this and later groups can still save",
        Observer.open_share,
    ),
    Feature("previous", "executed sparsity of the group before", _previous),
    Feature("budget", "target / dense cost", _budget),
    Feature(
        "is_params",
        "1 if parameters or the size of the file are budgeted, else 0",
        _is_params,
    ),
    Feature(
        "lowest",
        "lowest sparsity from which the budget can still be met",
        _lowest,
    ),
    Feature(
        "highest",
        "highest sparsity at which the budget can still be used up",
        _highest,
    ),
    Feature(
        "uniform_to_go",
        "sparsity that meets the budget if all remaining groups get it",
        _uniform_to_go,
    ),
    # Last, since policies are saved with the features that they know, in order.
    _static(
        "latency_share",
        "predicted latency saved when the group alone goes to its least, x / (1 + x) "
        "with x in units of the mean group; 0 where no latency is predicted",
    ),
)

FEATURE_NAMES = [feature.name for feature in FEATURES]
"""Names of the features, in order."""
STATIC = tuple(feature.name for feature in FEATURES if feature.is_static)
"""Features that never change."""


def space_of(features: Sized) -> spaces.Box:
    """The space of some of the features.

    Args:
        features: Which; only how many counts.
    """
    return spaces.Box(0.0, 1.0, (len(features),), np.float32)


OBSERVATION_SPACE = space_of(FEATURES)
"""The space of all."""


def feature_table() -> str:
    """The features as a Markdown table: index, name, bounds, meaning."""
    lines = [
        "| index | name | min | max | meaning |",
        "| --- | --- | --- | --- | --- |",
    ]
    for index, feature in enumerate(FEATURES):
        lines.append(f"| {index} | {feature.name} | 0 | 1 | {feature.meaning} |")
    return "\n".join(lines)
