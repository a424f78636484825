"""What the layers of a network read: sums over the activations of each channel.

The network runs once more while its operations carry labels along, so a channel is
found wherever it is read: behind a flatten, in a slice of a concatenation, as a head of
an attention module.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload

from autoprune.structure.attention import open_attention
from autoprune.structure.groups import Groups
from autoprune.structure.inputs import Inputs
from autoprune.structure.labels import thin
from autoprune.structure.slicing import shared_copy
from autoprune.structure.wrappers import run_uncompiled, unwrap
from autoprune.tracing.calls import Call
from autoprune.tracing.dispatch import (
    MULTIPLYING_RULES,
    LabelDispatchMode,
    track_labels,
)
from autoprune.tracing.rules.table import rule_for
from autoprune.tracing.tracer import Tracer

BATCH = 100
"""Images of one forward pass; the mean doesn't depend on it."""


@torch.no_grad()
def mean_channel_statistic(
    model: nn.Module,
    groups: Groups,
    inputs: Tensor,
    statistic: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """Mean of a statistic over everything that is read of each channel.

    What counts is what enters convolutions, linear layers and products of activations,
    behind batch norm and ReLU. A channel that several layers read counts once for each.

    Args:
        model: The network that `groups` was traced from; left as found.
        groups: Its trace.
        inputs: Normalised images `(n, 3, height, width)`.
        statistic: From activations to numbers of the same shape.

    Returns:
        Prunable group to its channels' means, `(n_channels,)`.
    """
    assert groups.book is not None, "groups of a trace come with their labels"
    assert groups.units is not None, "groups of a trace say which labels are theirs"
    network = open_attention(run_uncompiled(shared_copy(unwrap(model)))).eval()
    n_channels = [group.channels for group in groups.all]
    # One entry more, the last, for what belongs to no group.
    n_entries = sum(n_channels) + 1
    totals = torch.zeros(2, n_entries, dtype=torch.float64)
    # Label to entry; -1, for no channel, is the last.
    row_entries, column_entries = groups.units.T % n_entries
    for batch in inputs.split(BATCH):
        tracer = Tracer(network, groups.book.copy_for_rerun())
        reader = _Reader(tracer, statistic)
        with track_labels(tracer, Inputs((batch,))), reader:
            network(batch)
        # A cell counts for its row and for its column.
        for entries in (row_entries, column_entries):
            totals.index_add_(1, entries, reader.totals[:, : len(entries)])
    sums, counts = totals[:, :-1]
    # What nothing reads has the mean 0.
    means = (sums / counts.clamp_min(1)).float().split(n_channels)
    prunable = {}
    for group, mean in zip(groups.all, means, strict=True):
        if group.pinned is None:
            prunable[group.name] = mean
    return prunable


class _Reader(LabelDispatchMode):
    """Adds up, per label, the statistic and the number of values that are read.

    Args:
        tracer: The notebook of the run.
        statistic: From activations to numbers of the same shape.

    Attributes:
        totals: Sums and counts, `(2, n_labels)`.
    """

    def __init__(self, tracer: Tracer, statistic: Callable[[Tensor], Tensor]):
        super().__init__(tracer)
        self.statistic = statistic
        self.totals = torch.zeros(2, tracer.book.n_labels, dtype=torch.float64)

    def execute(
        self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> object:
        """Runs an operation; if it multiplies, its inputs are added up first.

        Args:
            func: The ATen overload.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
        """
        # Norms and activation functions pass channels on; what multiplies reads them.
        if rule_for(func) in MULTIPLYING_RULES:
            for tensor in Call(self.tracer, func, args, kwargs, None).tensors():
                if self.tracer.is_activation(tensor):
                    self._add(tensor)
        return func(*args, **kwargs)

    def _add(self, tensor: Tensor) -> None:
        """Adds what an operation reads to the totals of its labels."""
        labels = thin(self.tracer.labels(tensor))
        # Labels are the same along these axes, so one sum serves all positions.
        constant_axes = []
        for axis, length in enumerate(labels.shape):
            if length == 1:
                constant_axes.append(axis)
        sums = self.statistic(tensor)
        if constant_axes:
            sums = sums.sum(constant_axes, keepdim=True)
        sums = sums.flatten().double()
        labels = labels.flatten()
        counts = torch.full_like(sums, tensor.numel() / len(labels))
        # A run with another batch size may label what the trace didn't.
        is_known = labels < self.totals.shape[1]
        added = torch.stack([sums, counts])[:, is_known]
        self.totals.index_add_(1, labels[is_known], added)
