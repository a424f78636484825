"""The numerical twin of pruning: the dense network, in which nothing reads the removed
channels.

The network runs at full width while its labels are followed anew; whatever reads
channels, sees only those that are left. Convolutions, linear layers and products of
activations get zeros for the others; means, norms and softmax over channels are taken
over what is left. So neither batch norm's shift nor a bias keeps a removed channel
alive, and what the pruned network must compute follows without slicing a single weight.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from autoprune.structure.attention import open_attention
from autoprune.structure.groups import Groups, loses_whole_conv_groups
from autoprune.structure.labels import thin, varying_axes
from autoprune.structure.slicing import KeptIndices
from autoprune.tracing.dispatch import LabelDispatchMode, track_labels
from autoprune.tracing.rules.contractions import (
    attention,
    batched_product,
    convolution,
    linear,
)
from autoprune.tracing.rules.norms import (
    along_axis,
    group_norm,
    layer_norm,
    reduced_axes,
    reduction,
)
from autoprune.tracing.rules.table import rule_for
from autoprune.tracing.tracer import Call, Tracer


def mask(model: nn.Module, groups: Groups, kept: KeptIndices) -> nn.Module:
    """A copy of the dense network whose output is what the pruned network's must be.

    Args:
        model: The dense network that `groups` was traced from.
        groups: Its trace.
        kept: Prunable group to the surviving channels; groups left out keep all.
    """
    return Masked(open_attention(copy.deepcopy(model)), groups, kept)


class Masked(nn.Module):
    """A network with open attention, run at full width without the channels behind some
    labels.

    Args:
        model: The dense network.
        groups: Its trace.
        kept: Prunable group to the surviving channels.
    """

    def __init__(self, model: nn.Module, groups: Groups, kept: KeptIndices):
        super().__init__()
        self.model, self.book, self.gone = model, groups.book, groups.gone(kept)

    @torch.no_grad()
    def forward(self, x: Tensor) -> object:
        """The network's output, gradients aside."""
        tracer = Tracer(self.model, self.book.again())
        with track_labels(tracer, x), _MaskMode(tracer, self.gone):
            return self.model(x)


class _MaskMode(LabelDispatchMode):
    def __init__(self, tracer: Tracer, gone: Tensor):
        super().__init__(tracer)
        self._known = gone

    @property
    def gone(self) -> Tensor:
        """Per label whether its channel is removed; what this run labels beyond the
        trace, stays.

        Another batch size can take other kernels: a bias that is added after the
        product is a bare parameter.
        """
        missing = self.tracer.book.n_labels - len(self._known)
        if missing:
            self._known = torch.cat(
                [self._known, torch.zeros(missing, dtype=torch.bool)]
            )
        return self._known

    def execute(self, func, args: tuple, kwargs: dict) -> object:
        """Runs an operation on what is left of its inputs."""
        run, call = (
            MASKED.get(rule_for(func)),
            Call(self.tracer, func, args, kwargs, None),
        )
        if run is None or not any(map(self.tracer.is_activation, call.tensors())):
            return func(*args, **kwargs)
        return run(call, self.gone)


def _with_zeros(call: Call, gone: Tensor) -> object:
    """What was removed contributes nothing to a sum of products."""

    def left(tensor: Tensor) -> Tensor:
        if not call.tracer.is_activation(tensor):
            return tensor
        return tensor.masked_fill(gone[thin(call.tracer.labels(tensor))], 0)

    return call.func(*call.replaced(left), **call.kwargs)


def _left_along(call: Call, axis: int, gone: Tensor) -> Tensor:
    """Positions along an axis of the first argument that are left, whatever rows of
    cells are removed as a whole.
    """
    removed = (
        gone[thin(call.tracer.labels(call.args[0]))].movedim(axis, -1).flatten(0, -2)
    )
    rows = removed[~removed.all(1)]
    return (
        (~rows.any(0)).nonzero()[:, 0] if len(rows) else torch.arange(removed.shape[1])
    )


def _channel_axes(call: Call, axes: list[int]) -> list[int]:
    varying = varying_axes(call.tracer.labels(call.args[0]))
    return [axis for axis in axes if axis in varying]


def _reduced_over_the_rest(call: Call, gone: Tensor) -> object:
    x = call.args[0]
    for axis in _channel_axes(call, reduced_axes(call)):
        x = x.index_select(axis, _left_along(call, axis, gone))
    return call.func(x, *call.args[1:], **call.kwargs)


def _scanned_over_the_rest(call: Call, gone: Tensor) -> object:
    x = call.args[0]
    axes = _channel_axes(call, [call["dim"] % x.ndim])
    left = [_left_along(call, axis, gone) for axis in axes]
    out = call.func(_selected(x, axes, left), *call.args[1:], **call.kwargs)
    return _back_in_place(out, x.shape, axes, left)


def _layer_norm_over_the_rest(call: Call, gone: Tensor) -> object:
    x, first = call.args[0], call.args[0].ndim - len(call["normalized_shape"])
    axes = _channel_axes(call, list(range(first, x.ndim)))
    left = [_left_along(call, axis, gone) for axis in axes]
    own = [axis - first for axis in axes]
    vectors = [v if v is None else _selected(v, own, left) for v in call.args[2:-1]]
    shape = _selected(x, axes, left).shape[first:]
    out, *statistics = call.func(
        _selected(x, axes, left), list(shape), *vectors, call.args[-1]
    )
    return _back_in_place(out, x.shape, axes, left), *statistics


def _group_norm_over_the_rest(call: Call, gone: Tensor) -> object:
    x, weight, bias, n, n_channels, area, n_groups, eps = call.args
    left = _left_along(call, 1, gone)
    if weight is not None and loses_whole_conv_groups(n_channels, n_channels, n_groups):
        n_groups = len(left) * n_groups // n_channels
    vectors = [v if v is None else v[left] for v in (weight, bias)]
    out, *statistics = call.func(
        x[:, left].contiguous(), *vectors, n, len(left), area, n_groups, eps
    )
    return _back_in_place(out, x.shape, [1], [left]), *statistics


def _selected(x: Tensor, axes: list[int], left: list[Tensor]) -> Tensor:
    for axis, index in zip(axes, left, strict=True):
        x = x.index_select(axis, index)
    return x.contiguous()


def _back_in_place(
    out: Tensor, shape: torch.Size, axes: list[int], left: list[Tensor]
) -> Tensor:
    """Zeros where nothing was computed."""
    for axis, index in reversed(list(zip(axes, left, strict=True))):
        size = list(out.shape)
        size[axis] = shape[axis]
        out = out.new_zeros(size).index_copy_(axis, index, out)
    return out


MASKED: dict[Callable, Callable[[Call, Tensor], object]] = {
    **dict.fromkeys((convolution, linear, batched_product, attention), _with_zeros),
    reduction: _reduced_over_the_rest,
    along_axis: _scanned_over_the_rest,
    layer_norm: _layer_norm_over_the_rest,
    group_norm: _group_norm_over_the_rest,
}
