"""Centripetal SGD: filters of a cluster grow together while the network trains; then
each cluster becomes one filter.

Ding et al. 2019 ("Centripetal SGD for Pruning Very Deep Convolutional Networks with
Complicated Structure"), eqs. 3 to
7. Nothing is torn out: of filters that have become equal one stays, and whoever read
   the others reads it instead, with the sum of the weights. Layers tied by a shortcut
   share one group of channels here, so they share their clusters too.

Where we differ: how many clusters a layer gets comes from an allocation, not from a
fixed width; clusters are found by k-means or evenly, as in the paper, on all filters
that produce a channel together. Weight decay is the optimizer's own.
"""

import copy
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.config import FinetuneConfig
from autoprune.errors import UserError, check_known
from autoprune.structure.attention import open_attention
from autoprune.structure.groups import Group, Groups, tensors_in
from autoprune.structure.slicing import prune
from autoprune.tracing.verify import randomised
from autoprune.training.loop import TrainingCallback, pull_for

Clusters = Mapping[str, Tensor]
"""Group to the number of each channel's cluster, int64 `(n_channels,)`, from 0 without
gaps.
"""
PULL = 156.0
"""E-folds by which a whole training draws filters to their centres: as in the paper's
600 epochs of ResNet-56.
"""
VECTORS = 0.1
"""The pull of batch norm and biases beside that of filters, as in the authors' code."""
ROUNDS = 50
"""Of k-means, at most."""
DRAWS, TOLERANCE = 3, 1e-4
"""Random weights on which merging is tried, and the difference that float32 may make,
as in `autoprune.tracing.verify`.
"""


def clusters_of(
    model: nn.Module,
    groups: Groups,
    counts: Mapping[str, int],
    how: str = "kmeans",
    seed: int = 0,
) -> dict[str, Tensor]:
    """The channels of each group in exactly `counts` clusters, by likeness of the
    filters that produce them.

    Args:
        model: The network.
        groups: Its trace.
        counts: Group to its number of clusters; groups left out aren't clustered.
        how: A key of `CLUSTERINGS`.
        seed: Of k-means' first centres.

    Raises:
        UserError: If `how` or a group is unknown or pinned, or a count isn't from 1 to
            the number of channels.
    """
    check_known("clustering", how, CLUSTERINGS, "removal.clusters")
    found = {}
    for name, count in counts.items():
        if name not in groups.channels:
            raise UserError(
                "counts",
                f"{name!r} is no prunable group; known: {', '.join(groups.channels)}",
            )
        group = groups[name]
        if not 1 <= count <= group.channels:
            raise UserError(
                "counts",
                f"group {name!r} can have 1 to {group.channels} clusters, got {count}",
            )
        found[name] = CLUSTERINGS[how](_filters(model, groups, group), count, seed)
    return found


def _filters(model: nn.Module, groups: Groups, group: Group) -> Tensor:
    """All weights that produce each channel, `(n_channels, n)`, each layer's at a mean
    square of 1.
    """
    tensors = model.state_dict()
    rows = [
        m.rows(tensors[m.tensor].double()).flatten(1) for m in groups.filters(group)
    ]
    return torch.cat(
        [row / row.square().mean().sqrt().clamp_min(1e-12) for row in rows], 1
    )


def _kmeans(points: Tensor, count: int, seed: int) -> Tensor:
    """Lloyd's algorithm from k-means++ centres; a cluster that runs empty takes the
    point farthest from its own.
    """
    generator = torch.Generator().manual_seed(seed)
    centres = points[torch.randint(len(points), (1,), generator=generator)]
    while len(centres) < count:
        nearest = torch.cdist(points, centres).min(1).values.square()
        weights = nearest if nearest.sum() > 0 else torch.ones_like(nearest)
        centres = torch.cat(
            [centres, points[torch.multinomial(weights, 1, generator=generator)]]
        )
    numbers = torch.full((len(points),), -1)
    for _ in range(ROUNDS):
        distances = torch.cdist(points, centres)
        following = _none_empty(distances.argmin(1), distances.min(1).values, count)
        if torch.equal(following, numbers):
            break
        numbers = following
        centres = _means(points, numbers)
    return numbers


def _none_empty(numbers: Tensor, distances: Tensor, count: int) -> Tensor:
    numbers, distances = numbers.clone(), distances.clone()
    for number in range(count):
        if not (numbers == number).any():
            sizes = torch.bincount(numbers, minlength=count)
            movable = torch.where(sizes[numbers] > 1, distances, -1.0)
            taken = movable.argmax()
            numbers[taken], distances[taken] = number, -1.0
    return numbers


def _even(points: Tensor, count: int, seed: int) -> Tensor:
    """Neighbours, in clusters of sizes that differ by one at most."""
    return torch.arange(len(points)) * count // len(points)


CLUSTERINGS: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "kmeans": _kmeans,
    "even": _even,
}


class Centripetal(TrainingCallback):
    """Filters of a cluster get the mean of their gradients, and a pull to the cluster's
    centre.

    Without momentum the distance to the centre shrinks by learning rate times (decay +
    strength) of itself in each step, whatever the loss; the centre moves as by the mean
    gradient. A cluster of one is trained as usual.

    Args:
        groups: The network's trace.
        clusters: See `clusters_of`.
        strength: The pull. None for as much in the whole training as in the paper's,
            however long this one is; the paper has 3e-3 for 600 epochs.
    """

    def __init__(
        self, groups: Groups, clusters: Clusters, strength: float | None = None
    ):
        self.strength, self.clusters = strength, clusters
        self._members = [
            (name, member)
            for name in clusters
            for member in groups[name].members
            if member.role != "consume"
        ]

    def begin(self, model: nn.Module, n_steps: int, config: FinetuneConfig) -> None:
        """Spreads the pull over the steps."""
        if self.strength is None:
            self.strength = pull_for(PULL, config.momentum, config, n_steps)

    @torch.no_grad()
    def before_step(self, model: nn.Module, step: int) -> None:
        """Averages gradients and adds the pull."""
        parameters = dict(model.named_parameters())
        for name, member in self._members:
            parameter = parameters.get(member.tensor)
            if parameter is None or parameter.grad is None:
                continue  # running statistics follow by themselves
            numbers, strength = (
                self.clusters[name],
                self.strength * (1 if parameter.ndim > 1 else VECTORS),
            )
            weights, gradients = member.rows(parameter), member.rows(parameter.grad)
            pulled = weights - averaged(weights, numbers)
            parameter.grad.movedim(member.axis, 0)[member.index] = (
                averaged(gradients, numbers) + strength * pulled
            )


def averaged(rows: Tensor, numbers: Tensor) -> Tensor:
    """Each row replaced by the mean of its cluster's, `(n_channels, ...)`."""
    return _means(rows, numbers)[numbers]


def _means(rows: Tensor, numbers: Tensor) -> Tensor:
    sums = _sums(rows, numbers)
    return sums / torch.bincount(numbers).view(-1, *[1] * (rows.ndim - 1)).to(
        rows.dtype
    )


def _sums(rows: Tensor, numbers: Tensor) -> Tensor:
    return rows.new_zeros(int(numbers.max()) + 1, *rows.shape[1:]).index_add_(
        0, numbers, rows
    )


def merge(model: nn.Module, groups: Groups, clusters: Clusters) -> nn.Module:
    """A new network with one channel a cluster: its mean, read by the sum of the
    weights that read its channels.

    Exact where the filters, and what follows them, are equal in each cluster;
    statistics of batch norm are only once they have been measured on equal filters.

    Args:
        model: The dense network.
        groups: Its trace.
        clusters: See `clusters_of`.
    """
    dense = open_attention(copy.deepcopy(model))
    tensors = dense.state_dict()
    kept = {}
    for name, numbers in clusters.items():
        first = torch.stack(
            [
                (numbers == number).nonzero()[0, 0]
                for number in range(int(numbers.max()) + 1)
            ]
        )
        for member in groups[name].members:
            tensor = tensors[member.tensor]
            joined = (_sums if member.role == "consume" else _means)(
                member.rows(tensor), numbers
            )
            tensor.movedim(member.axis, 0)[member.index[first]] = joined
        # In the order of the channels, as everything that prunes has them.
        kept[name] = first.sort().values
    return prune(dense, groups, kept)


def mergeable(model: nn.Module, groups: Groups, example: Tensor) -> list[str]:
    """The groups whose equal channels can be merged: tried on random weights, where no
    small scale hides anything.

    It isn't so where channels are read otherwise than by a weighted sum, as by layer
    norm or a softmax.

    Args:
        model: The network; it is left as found.
        groups: Its trace.
        example: An input, for its shape.
    """
    names = [group.name for group in groups if group.channels > 1]
    dense, random = (
        open_attention(copy.deepcopy(model)).eval(),
        np.random.Generator(np.random.SFC64(0)),
    )
    for _ in range(
        DRAWS
    ):  # a ReLU that happens to be off hides its channels in one draw
        twin = randomised(dense, random, torch.float32)
        x = torch.from_numpy(random.standard_normal(tuple(example.shape), np.float32))
        if not _merges(twin, groups, x, names):
            names = [name for name in names if _merges(twin, groups, x, [name])]
    return names


@torch.no_grad()
def _merges(twin: nn.Module, groups: Groups, x: Tensor, names: list[str]) -> bool:
    """Whether merging half of the channels, made equal, leaves the output as it is.

    One large cluster among single channels: clusters of one size leave the mean and
    variance over channels as they are.
    """
    halves = {name: groups[name].channels // 2 for name in names}
    clusters = {
        name: (torch.arange(groups[name].channels) - half).clamp_min(0)
        for name, half in halves.items()
    }
    equal = copy.deepcopy(twin)
    tensors = equal.state_dict()
    for name, numbers in clusters.items():
        for member in groups[name].members:
            if member.role != "consume":
                rows = member.rows(tensors[member.tensor])
                tensors[member.tensor].movedim(member.axis, 0)[member.index] = averaged(
                    rows, numbers
                )
    merged = merge(equal, groups, clusters)
    expected, computed = (
        torch.cat([t.flatten() for t in tensors_in(net(x))]) for net in (equal, merged)
    )
    return bool((expected - computed).abs().max() <= TOLERANCE * expected.abs().max())


def check_mergeable(names: Iterable[str], mergeable_names: Iterable[str]) -> None:
    """Raises a `UserError` unless all groups can be merged."""
    others = sorted(set(names) - set(mergeable_names))
    if others:
        raise UserError(
            "removal.method",
            f"the channels of {others[0]} can't be merged (they are "
            f"not read by a weighted sum); "
            f"leave them whole with exclude={','.join(others)}",
        )
