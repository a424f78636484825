"""The numerical twin of pruning: a dense network that doesn't read removed channels.

The network runs at full width while its operations carry labels anew; whatever reads
channels, sees only those that are left. Convolutions, linear layers and products of
activations get zeros for the others; means, norms and softmax over channels are taken
over what is left. So neither batch norm's shift nor a bias keeps a removed channel
alive, and what the pruned network must compute comes out without slicing a weight.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._mode_utils import no_dispatch

from autoprune.structure.attention import open_attention
from autoprune.structure.caches import drop_caches
from autoprune.structure.groups import Groups, loses_whole_conv_groups
from autoprune.structure.inputs import Inputs
from autoprune.structure.labels import thin, varying_axes
from autoprune.structure.slicing import KeptIndices, own_copy
from autoprune.structure.wrappers import run_uncompiled, unwrap
from autoprune.tracing.calls import Call
from autoprune.tracing.dispatch import (
    MULTIPLYING_RULES,
    LabelDispatchMode,
    track_labels,
)
from autoprune.tracing.pruned_sizes import PrunedSizes
from autoprune.tracing.rules.along_axes import distances
from autoprune.tracing.rules.contractions import vector_product, weight_norm
from autoprune.tracing.rules.norms import (
    axis_scan,
    batch_norm,
    group_norm,
    layer_norm,
    reduced_axes,
    reduction,
)
from autoprune.tracing.rules.table import Rule, rule_for
from autoprune.tracing.sizes import sized_attributes
from autoprune.tracing.tracer import Tracer


def mask(model: nn.Module, groups: Groups, kept: KeptIndices) -> nn.Module:
    """A copy of the dense network whose output is what the pruned network's must be.

    Args:
        model: The dense network that `groups` was traced from.
        groups: Its trace.
        kept: Prunable group to the surviving channels; groups left out keep all.
    """
    # Closed attention is one operation, in which heads can't be left out.
    dense = run_uncompiled(own_copy(unwrap(model)))
    return Masked(open_attention(dense), groups, kept)


class Masked(nn.Module):
    """A network with open attention, run at full width without some channels.

    Args:
        model: The dense network.
        groups: Its trace.
        kept: Prunable group to the surviving channels.
    """

    def __init__(self, model: nn.Module, groups: Groups, kept: KeptIndices):
        super().__init__()
        assert groups.book is not None, "groups of a trace come with their labels"
        self.model = model
        self.book = groups.book
        self.is_removed = groups.removed_labels(kept)
        self.attributes = groups.attribute_values(kept)

    @torch.no_grad()
    def forward(self, *positional: Any, **keywords: Any) -> object:
        """The network's output, without gradients."""
        drop_caches(self.model)
        # The book hands out the trace's labels again, so they mean the same channels.
        tracer = Tracer(self.model, self.book.copy_for_rerun())
        # Other objects, since labels are attributes of them.
        inputs = Inputs(positional, keywords).change(Tensor.detach)
        channels = _MaskMode(tracer, self.is_removed)
        sizes = PrunedSizes(tracer, lambda: channels.is_removed, self.attributes)
        with (
            track_labels(tracer, inputs),
            sized_attributes(self.model, sizes),
            channels,
            sizes,
        ):
            return inputs.run(self.model)


class _MaskMode(LabelDispatchMode):
    """Executes operations that read channels on those that are left.

    Args:
        tracer: The notebook of the run.
        is_removed: Per label of the trace whether its channel is removed.
    """

    def __init__(self, tracer: Tracer, is_removed: Tensor):
        super().__init__(tracer)
        self._is_removed = is_removed

    @property
    def is_removed(self) -> Tensor:
        """Per label whether its channel is removed; what the trace lacks, stays.

        Another batch size can take other kernels: a bias that is added after the
        product is a bare parameter.
        """
        n_new = self.tracer.book.n_labels - len(self._is_removed)
        if n_new:
            stays = torch.zeros(n_new, dtype=torch.bool)
            self._is_removed = torch.cat([self._is_removed, stays])
        return self._is_removed

    def execute(
        self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> object:
        """Runs an operation on what is left of its inputs.

        Args:
            func: The ATen overload.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
        """
        tracer = self.tracer
        call = Call(tracer, func, args, kwargs, None)
        is_channelled = any(map(tracer.is_activation, call.tensors()))
        table = MASKED if is_channelled else MASKED_PARAMETERS
        run = table.get(rule_for(func))
        # Constants, such as a mask of positions, have no channels to lose.
        if run is None or not (is_channelled or any(map(tracer.views, call.tensors()))):
            return func(*args, **kwargs)
        return run(call, self.is_removed)


def removed_elements(tracer: Tracer, tensor: Tensor, is_removed: Tensor) -> Tensor:
    """Which elements of a tensor go, bool, of length 1 along axes that don't matter.

    Args:
        tracer: The notebook of the run.
        tensor: An activation, a parameter, or computed from some.
        is_removed: Per label of the trace whether its channel is removed.
    """
    with no_dispatch():
        return _removed_elements(tracer, tensor, is_removed)


def _removed_elements(tracer: Tracer, tensor: Tensor, is_removed: Tensor) -> Tensor:
    """The same, as other modes of dispatch would see it."""
    if tracer.is_activation(tensor):
        # Thin labels have length 1 where they don't vary.
        return is_removed[thin(tracer.labels(tensor))]
    removed = torch.zeros([1] * tensor.ndim, dtype=torch.bool)
    for view in tracer.views(tensor):
        # Those of a parameter that was read as an activation is, like learned queries.
        elements = tracer.known_element_labels(view)
        if elements is not None:
            removed = removed | is_removed[elements]
        for axis, index in view.axes:
            # Those that the trace hasn't labelled met no sum.
            labels = tracer.known_axis_labels(view.name, axis)
            if labels is not None:
                removed = removed | is_removed[labels[thin(index)]]
    return removed


def _multiply_with_zeros(call: Call, is_removed: Tensor) -> object:
    """What was removed contributes nothing to a sum of products."""
    tracer = call.tracer

    def zero_removed(tensor: Tensor) -> Tensor:
        removed = removed_elements(tracer, tensor, is_removed)
        return tensor.masked_fill(removed, 0) if removed.any() else tensor

    return call.func(*call.substitute_tensors(zero_removed), **call.kwargs)


def _remaining_positions(call: Call, axis: int, is_removed: Tensor) -> Tensor:
    """Positions along an axis of the first argument that are left, ascending.

    Rows of cells that are removed as a whole have no say: a head that is gone doesn't
    take the width of the others with it.

    Args:
        call: The operation.
        axis: On which channels lie.
        is_removed: Per label whether its channel is removed.
    """
    x = call.args[0]
    removed = removed_elements(call.tracer, x, is_removed)
    lines = removed.movedim(axis, -1).flatten(0, -2)
    # Of length 1 where it is all the same along the axis.
    lines = lines.expand(-1, x.shape[axis])
    partly_left = lines[~lines.all(1)]
    if not len(partly_left):
        # All is gone; something has to be computed nonetheless, and nobody reads it.
        return torch.arange(lines.shape[1])
    return (~partly_left.any(0)).nonzero()[:, 0]


def _channel_axes(call: Call, axes: list[int]) -> list[int]:
    """Those of some axes of the first argument on which channels lie."""
    x = call.args[0]
    if call.tracer.is_activation(x):
        varying = set(varying_axes(call.tracer.labels(x)))
    else:
        varying = set()
        for view in call.tracer.views(x):
            varying.update(view.varying_dims)
    return [axis for axis in axes if axis in varying]


def _reduce_remaining(call: Call, is_removed: Tensor) -> object:
    """A mean or sum over what is left."""
    x = call.args[0]
    # Positions are looked up in the labels of all of `x`, so the axes don't interfere.
    for axis in _channel_axes(call, reduced_axes(call)):
        x = x.index_select(axis, _remaining_positions(call, axis, is_removed))
    return call.func(x, *call.args[1:], **call.kwargs)


def _scan_remaining(call: Call, is_removed: Tensor) -> object:
    """Softmax or a running sum over what is left."""
    x = call.args[0]
    axes = _channel_axes(call, [call["dim"] % x.ndim])
    remaining = [_remaining_positions(call, axis, is_removed) for axis in axes]
    out = call.func(_select(x, axes, remaining), *call.args[1:], **call.kwargs)
    return _scatter(out, x.shape, axes, remaining)


def _normalise_remaining(call: Call, is_removed: Tensor) -> object:
    """Layer norm with the statistics of what is left."""
    x = call.args[0]
    first_normalised = x.ndim - len(call["normalized_shape"])
    axes = _channel_axes(call, list(range(first_normalised, x.ndim)))
    remaining = [_remaining_positions(call, axis, is_removed) for axis in axes]
    selected = _select(x, axes, remaining)
    # Weight and bias, or the weight alone of an RMS norm, have the normalised axes.
    vector_axes = [axis - first_normalised for axis in axes]
    vectors = []
    for vector in call.args[2:-1]:
        if vector is not None:
            vector = _select(vector, vector_axes, remaining)
        vectors.append(vector)
    normalised_shape = list(selected.shape[first_normalised:])
    eps = call.args[-1]
    out, *statistics = call.func(selected, normalised_shape, *vectors, eps)
    return _scatter(out, x.shape, axes, remaining), *statistics


def _normalise_remaining_groups(call: Call, is_removed: Tensor) -> object:
    """Group norm with as many groups as are left, or with smaller ones."""
    x, weight, bias, n, n_channels, area, n_groups, eps = call.args
    remaining = _remaining_positions(call, 1, is_removed)
    n_left = len(remaining)
    # Whole norm groups go, or each gets smaller; the tracing rule decides likewise.
    if weight is not None and loses_whole_conv_groups(n_channels, n_channels, n_groups):
        n_groups = n_left * n_groups // n_channels
    vectors = []
    for vector in (weight, bias):
        if vector is not None:
            vector = _select(vector, [0], [remaining])
        vectors.append(vector)
    selected = _select(x, [1], [remaining])
    out, *statistics = call.func(selected, *vectors, n, n_left, area, n_groups, eps)
    return _scatter(out, x.shape, [1], [remaining]), *statistics


def _standardise_remaining(call: Call, is_removed: Tensor) -> object:
    """Batch norm of a weight `(1, n, m)`, each row over what is left of it."""
    x = call.args[0]
    others = [axis for axis in range(x.ndim) if axis != 1]
    axes = _channel_axes(call, others)
    remaining = [_remaining_positions(call, axis, is_removed) for axis in axes]
    out, *statistics = call.func(
        _select(x, axes, remaining), *call.args[1:], **call.kwargs
    )
    return _scatter(out, x.shape, axes, remaining), *statistics


def _select(x: Tensor, axes: list[int], remaining: list[Tensor]) -> Tensor:
    """A tensor without the removed positions.

    Args:
        x: The tensor.
        axes: On which channels lie.
        remaining: For each of them the positions that are left.
    """
    for axis, index in zip(axes, remaining, strict=True):
        x = x.index_select(axis, index)
    # As the kernels of norms require.
    return x.contiguous()


def _scatter(
    out: Tensor, shape: torch.Size, axes: list[int], remaining: list[Tensor]
) -> Tensor:
    """What was computed of the remaining positions at full width, zeros elsewhere.

    Args:
        out: The result.
        shape: The full one.
        axes: Along which positions are missing.
        remaining: For each of them the positions that are left.
    """
    for axis, index in reversed(list(zip(axes, remaining, strict=True))):
        size = list(out.shape)
        size[axis] = shape[axis]
        # Nobody reads the zeros, but what isn't filled could be NaN and spread.
        out = out.new_zeros(size).index_copy_(axis, index, out)
    return out


MASKED: dict[Rule, Callable[[Call, Tensor], object]] = {
    **dict.fromkeys(MULTIPLYING_RULES, _multiply_with_zeros),
    distances: _multiply_with_zeros,
    reduction: _reduce_remaining,
    axis_scan: _scan_remaining,
    layer_norm: _normalise_remaining,
    group_norm: _normalise_remaining_groups,
}
"""Rule to how its operations run on what is left; all others run at full width."""

MASKED_PARAMETERS: dict[Rule, Callable[[Call, Tensor], object]] = {
    # A layer may read a parameter, such as learned queries.
    **dict.fromkeys(MULTIPLYING_RULES, _multiply_with_zeros),
    weight_norm: _multiply_with_zeros,
    vector_product: _multiply_with_zeros,
    reduction: _reduce_remaining,
    axis_scan: _scan_remaining,
    layer_norm: _normalise_remaining,
    batch_norm: _standardise_remaining,
}
"""The same for operations on parameters alone, from which the code computes weights."""
