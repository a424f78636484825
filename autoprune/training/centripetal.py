"""Centripetal SGD: filters grow together while training; each cluster becomes one.

Ding et al. 2019 ("Centripetal SGD for Pruning Very Deep Convolutional Networks with
Complicated Structure"), eqs. 3 to 7. Nothing is torn out: of filters that have become
equal one stays, and whoever read the others reads it instead, with the sum of the
weights. Layers tied by a shortcut share one group of channels here, so they share their
clusters too.

Where we differ: how many clusters a layer gets comes from an allocation, not from a
fixed width; clusters are found by k-means or evenly, as in the paper, on all filters
that produce a channel together. Weight decay is the optimizer's own.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.config import FinetuneConfig
from autoprune.errors import UserError, check_known
from autoprune.structure.attention import open_attention
from autoprune.structure.groups import Group, Groups, tensors_in
from autoprune.structure.slicing import prune
from autoprune.tracing.verify import copy_with_random_weights
from autoprune.training.loop import TrainingCallback, constant_pull

Clusters: TypeAlias = Mapping[str, Tensor]
"""Group to the number of each channel's cluster, int64 `(n_channels,)`, from 0 without
gaps.
"""
PULL = 156.0
"""E-folds by which a whole training draws filters to their centres: as in the paper's
600 epochs of ResNet-56.
"""
VECTOR_PULL = 0.1
"""The pull of batch norm and biases beside that of filters, as in the authors' code."""
MAX_ROUNDS = 50
"""Of k-means."""
N_DRAWS = 3
"""Random weights on which merging is tried: a ReLU that happens to be off hides its
channels in one draw.
"""
TOLERANCE = 1e-4
"""The difference that float32 may make, as in `autoprune.tracing.verify`."""


def cluster_channels(
    model: nn.Module,
    groups: Groups,
    counts: Mapping[str, int],
    how: str = "kmeans",
    seed: int = 0,
) -> dict[str, Tensor]:
    """Puts each group's channels into clusters of similar filters.

    Args:
        model: The network; left as found.
        groups: Its trace.
        counts: Group to its exact number of clusters; groups left out aren't clustered.
        how: A key of `CLUSTERINGS`.
        seed: Of k-means' first centres.

    Returns:
        See `Clusters`.

    Raises:
        UserError: If `how` or a group is unknown or pinned, or a count isn't from 1 to
            the number of channels.
    """
    check_known("clustering", how, CLUSTERINGS, "removal.clusters")
    cluster = CLUSTERINGS[how]
    clusters = {}
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
        clusters[name] = cluster(_filters(model, groups, group), count, seed)
    return clusters


def _filters(model: nn.Module, groups: Groups, group: Group) -> Tensor:
    """All weights that produce each channel, side by side, `(n_channels, n)`."""
    tensors = model.state_dict()
    parts = []
    for member in groups.filters(group):
        rows = member.rows(tensors[member.tensor].double()).flatten(1)
        # To a mean square of 1, so that no layer outweighs those tied to it.
        scale = rows.square().mean().sqrt().clamp_min(1e-12)
        parts.append(rows / scale)
    return torch.cat(parts, 1)


def _kmeans(points: Tensor, count: int, seed: int) -> Tensor:
    """Lloyd's algorithm from k-means++ centres.

    Args:
        points: `(n, n_dimensions)`, float64.
        count: How many clusters, none of them empty.
        seed: Of the first centres.

    Returns:
        The number of each point's cluster, int64 `(n,)`.
    """
    centres = _first_centres(points, count, seed)
    # No cluster yet, so that the first round never counts as settled.
    numbers = torch.full((len(points),), -1)
    for _ in range(MAX_ROUNDS):
        distances = torch.cdist(points, centres)
        nearest = distances.min(1)
        new_numbers = _fill_empty(distances.argmin(1), nearest.values, count)
        if torch.equal(new_numbers, numbers):
            break
        numbers = new_numbers
        centres = _means(points, numbers)
    return numbers


def _first_centres(points: Tensor, count: int, seed: int) -> Tensor:
    """k-means++: each centre is a point, drawn by its squared distance to others."""
    generator = torch.Generator().manual_seed(seed)
    centres = points[torch.randint(len(points), (1,), generator=generator)]
    while len(centres) < count:
        weights = torch.cdist(points, centres).min(1).values.square()
        if not weights.sum() > 0:
            # Fewer different points than clusters: any point is as good as another.
            weights = torch.ones_like(weights)
        drawn = torch.multinomial(weights, 1, generator=generator)
        centres = torch.cat([centres, points[drawn]])
    return centres


def _fill_empty(numbers: Tensor, distances: Tensor, count: int) -> Tensor:
    """Moves the point farthest from its centre into each cluster that has run empty.

    Args:
        numbers: The number of each point's cluster, int64 `(n,)`.
        distances: Of each point to its centre, `(n,)`.
        count: How many clusters there are.

    Returns:
        The new numbers.
    """
    numbers = numbers.clone()
    distances = distances.clone()
    for number in range(count):
        if (numbers == number).any():
            continue
        # A point that is alone stays, or its own cluster would be empty.
        sizes = torch.bincount(numbers, minlength=count)
        movable = torch.where(sizes[numbers] > 1, distances, -1.0)
        moved = movable.argmax()
        numbers[moved] = number
        # It mustn't move on into the next empty cluster.
        distances[moved] = -1.0
    return numbers


def _even(points: Tensor, count: int, seed: int) -> Tensor:
    """Neighbours, in clusters of sizes that differ by one at most.

    Of 7 channels 3 clusters are 0 0 0 1 1 2 2.
    """
    return torch.arange(len(points)) * count // len(points)


CLUSTERINGS: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "kmeans": _kmeans,
    "even": _even,
}
"""From points `(n, n_dimensions)`, the number of clusters and a seed to the number of
each point's cluster, int64 `(n,)`.
"""


class Centripetal(TrainingCallback):
    """Gives a cluster's filters the mean of their gradients, and pulls them together.

    Without momentum the distance to the centre shrinks by learning rate times (decay +
    strength) of itself in each step, whatever the loss; the centre moves as by the mean
    gradient. A cluster of one is trained as usual.

    Args:
        groups: The network's trace.
        clusters: See `cluster_channels`.
        strength: The pull. None for as much in the whole training as in the paper's,
            however long this one is; the paper has 3e-3 for 600 epochs.
    """

    def __init__(
        self, groups: Groups, clusters: Clusters, strength: float | None = None
    ) -> None:
        self.strength = strength
        self.clusters = clusters
        # Weights that read the channels are trained as usual: merging adds them up.
        self._members = []
        for name in clusters:
            for member in groups[name].members:
                if member.role != "consume":
                    self._members.append((name, member))

    def begin(self, model: nn.Module, n_steps: int, config: FinetuneConfig) -> None:
        """Spreads the pull over the steps.

        Args:
            model: Not used.
            n_steps: Length of the training.
            config: Its learning rate and momentum.
        """
        # Known only now: it depends on how long the training is.
        if self.strength is None:
            self.strength = constant_pull(PULL, config.momentum, config, n_steps)

    @torch.no_grad()
    def before_step(self, model: nn.Module, step: int) -> None:
        """Averages gradients and adds the pull.

        Args:
            model: The network, whose gradients are those of the loss.
            step: Not used.
        """
        assert self.strength is not None, "begin comes before the first step"
        parameters = dict(model.named_parameters())
        for name, member in self._members:
            parameter = parameters.get(member.tensor)
            if parameter is None or parameter.grad is None:
                continue  # running statistics follow by themselves
            numbers = self.clusters[name]
            strength = self.strength * (1 if parameter.ndim > 1 else VECTOR_PULL)
            weights = member.rows(parameter)
            from_centre = weights - average_clusters(weights, numbers)
            gradients = average_clusters(member.rows(parameter.grad), numbers)
            # Rows are a copy, so they are written back to where they came from.
            channels_first = parameter.grad.movedim(member.axis, 0)
            channels_first[member.index] = gradients + strength * from_centre


def average_clusters(rows: Tensor, numbers: Tensor) -> Tensor:
    """Replaces each row by the mean of its cluster's.

    Rows 1, 5 and 3 in clusters 0, 1 and 0 become 2, 5 and 2.

    Args:
        rows: `(n_channels, ...)`.
        numbers: The number of each row's cluster, int64 `(n_channels,)`.

    Returns:
        The new rows, of the same shape.
    """
    return _means(rows, numbers)[numbers]


def _means(rows: Tensor, numbers: Tensor) -> Tensor:
    """The mean of each cluster's rows, `(n_clusters, ...)`."""
    sizes = torch.bincount(numbers).view(-1, *[1] * (rows.ndim - 1))
    return _sums(rows, numbers) / sizes.to(rows.dtype)


def _sums(rows: Tensor, numbers: Tensor) -> Tensor:
    """The sum of each cluster's rows, `(n_clusters, ...)`."""
    n_clusters = int(numbers.max()) + 1
    zeros = rows.new_zeros(n_clusters, *rows.shape[1:])
    return zeros.index_add_(0, numbers, rows)


def merge(model: nn.Module, groups: Groups, clusters: Clusters) -> nn.Module:
    """Makes a new network with one channel a cluster.

    It is the cluster's mean, read by the sum of the weights that read its channels.
    Exact where the filters, and what follows them, are equal in each cluster;
    statistics of batch norm are only once they have been measured on equal filters.

    Of clusters 0, 1 and 0 the channels 0 and 1 stay: channel 0 with the mean of filters
    0 and 2, and whoever read both by weights 3 and 4 reads it by 7.

    Args:
        model: The dense network; left as found.
        groups: Its trace.
        clusters: See `cluster_channels`.

    Returns:
        The smaller network.
    """
    # Attention's own modules hold their heads in ways that can't be cut.
    dense = open_attention(copy.deepcopy(model))
    tensors = dense.state_dict()
    kept = {}
    for name, numbers in clusters.items():
        # Each cluster is written over its first channel; the others are cut off.
        first = _first_channels(numbers)
        for member in groups[name].members:
            tensor = tensors[member.tensor]
            join = _sums if member.role == "consume" else _means
            channels_first = tensor.movedim(member.axis, 0)
            channels_first[member.index[first]] = join(member.rows(tensor), numbers)
        # In the order of the channels, as everything that prunes has them.
        kept[name] = first.sort().values
    return prune(dense, groups, kept)


def _first_channels(numbers: Tensor) -> Tensor:
    """The first channel of each cluster, int64 `(n_clusters,)`."""
    first = []
    for number in range(int(numbers.max()) + 1):
        first.append((numbers == number).nonzero()[0, 0])
    return torch.stack(first)


def mergeable_groups(model: nn.Module, groups: Groups, example: Tensor) -> list[str]:
    """Finds the groups whose equal channels can be merged, by trying.

    It isn't so where channels are read otherwise than by a weighted sum, as by layer
    norm or a softmax. Weights are random, so that no small scale hides anything.

    Args:
        model: The network; it is left as found.
        groups: Its trace.
        example: An input, for its shape.

    Returns:
        Their names, in the order of the groups.
    """
    # A single channel has no other to merge with.
    names = [group.name for group in groups if group.channels > 1]
    dense = open_attention(copy.deepcopy(model)).eval()
    generator = np.random.Generator(np.random.SFC64(0))
    for _ in range(N_DRAWS):
        twin = copy_with_random_weights(dense, generator, torch.float32)
        values = generator.standard_normal(tuple(example.shape), np.float32)
        x = torch.from_numpy(values)
        # All at once first: mostly all can, and one try is cheaper than one for each.
        if not _can_merge(twin, groups, x, names):
            names = [name for name in names if _can_merge(twin, groups, x, [name])]
    return names


@torch.no_grad()
def _can_merge(twin: nn.Module, groups: Groups, x: Tensor, names: list[str]) -> bool:
    """Whether merging half of the channels, made equal, leaves the output as it is.

    One large cluster among single channels: clusters of one size leave the mean and
    variance over channels as they are.
    """
    clusters = {}
    for name in names:
        n_channels = groups[name].channels
        # Of 6 channels: 0 0 0 0 1 2.
        clusters[name] = (torch.arange(n_channels) - n_channels // 2).clamp_min(0)
    equal = copy.deepcopy(twin)
    tensors = equal.state_dict()
    for name, numbers in clusters.items():
        for member in groups[name].members:
            # Readers stay as they are: merging has to cope with any.
            if member.role == "consume":
                continue
            tensor = tensors[member.tensor]
            rows = average_clusters(member.rows(tensor), numbers)
            tensor.movedim(member.axis, 0)[member.index] = rows
    merged = merge(equal, groups, clusters)
    expected = _flat_output(equal, x)
    difference = (expected - _flat_output(merged, x)).abs().max()
    return bool(difference <= TOLERANCE * expected.abs().max())


def _flat_output(net: nn.Module, x: Tensor) -> Tensor:
    """All values that a network returns, in one row."""
    return torch.cat([tensor.flatten() for tensor in tensors_in(net(x))])


def check_mergeable(names: Iterable[str], mergeable: Iterable[str]) -> None:
    """Checks that the channels of all groups can be merged.

    Args:
        names: The groups.
        mergeable: Those of which `mergeable_groups` found that they can.

    Raises:
        UserError: If some can't; the message tells how to leave them whole.
    """
    others = sorted(set(names) - set(mergeable))
    if others:
        raise UserError(
            "removal.method",
            f"the channels of {others[0]} can't be merged (they are "
            f"not read by a weighted sum); "
            f"leave them whole with exclude={','.join(others)}",
        )
