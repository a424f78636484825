"""What the layers of a network read: sums over the activations of each channel,
whatever the network looks like.

The network runs once more while labels follow its operations, so a channel is found
wherever it is read: behind a flatten, in a slice of a concatenation, as a head of an
attention module.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from autoprune.structure.attention import open_attention
from autoprune.structure.groups import Groups
from autoprune.structure.labels import thin
from autoprune.structure.slicing import shared_copy
from autoprune.tracing.dispatch import COUNTED, LabelDispatchMode, track_labels
from autoprune.tracing.rules.table import rule_for
from autoprune.tracing.tracer import Call, Tracer

BATCH = 100
"""Images of one forward pass; the mean doesn't depend on it."""


@torch.no_grad()
def mean_reading(
    model: nn.Module,
    groups: Groups,
    inputs: Tensor,
    statistic: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """Mean of a statistic over everything that is read of each channel, `(n_channels,)`
    per prunable group.

    What counts is what enters convolutions, linear layers and products of activations,
    behind batch norm and ReLU. A channel that several layers read counts once for each.

    Args:
        model: The network that `groups` was traced from; left as found.
        groups: Its trace.
        inputs: Normalised images `(n, 3, height, width)`.
        statistic: From activations to numbers of the same shape.
    """
    network = open_attention(shared_copy(model)).eval()
    n_channels = [group.channels for group in groups.all]
    totals = torch.zeros(
        2, sum(n_channels) + 1, dtype=torch.float64
    )  # the last for what belongs to no group
    for batch in inputs.split(BATCH):
        tracer = Tracer(network, groups.book.again())
        reader = _Reader(tracer, statistic)
        with track_labels(tracer, batch), reader:
            network(batch)
        for channels in groups.units.T % totals.shape[1]:  # -1, for none, is the last
            totals.index_add_(1, channels, reader.totals[:, : len(channels)])
    sums, counts = totals[:, :-1]
    means = (sums / counts.clamp_min(1)).float().split(n_channels)
    return {
        group.name: mean
        for group, mean in zip(groups.all, means, strict=True)
        if group.pinned is None
    }


class _Reader(LabelDispatchMode):
    """Adds up, per label, the statistic and the number of values that are read.

    Attributes:
        totals: `(2, n_labels)`.
    """

    def __init__(self, tracer: Tracer, statistic: Callable[[Tensor], Tensor]):
        super().__init__(tracer)
        self.statistic = statistic
        self.totals = torch.zeros(2, tracer.book.n_labels, dtype=torch.float64)

    def execute(self, func, args: tuple, kwargs: dict) -> object:
        """Runs an operation; if it multiplies, its inputs are added up first."""
        if rule_for(func) in COUNTED:
            for tensor in Call(self.tracer, func, args, kwargs, None).tensors():
                if self.tracer.is_activation(tensor):
                    self._add(tensor)
        return func(*args, **kwargs)

    def _add(self, tensor: Tensor) -> None:
        labels = thin(self.tracer.labels(tensor))
        rest = [axis for axis, length in enumerate(labels.shape) if length == 1]
        values = self.statistic(tensor)
        sums = (values.sum(rest, keepdim=True) if rest else values).flatten().double()
        labels = labels.flatten()
        # A run with another batch size may label what the trace didn't.
        known = labels < self.totals.shape[1]
        counts = torch.full_like(sums, tensor.numel() / len(labels))
        self.totals.index_add_(1, labels[known], torch.stack([sums, counts])[:, known])
