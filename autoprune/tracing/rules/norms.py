"""Rules of operations that read across channels: norms, means, softmax.

The pruned network takes its statistics over the channels that are left, so nothing has
to stay for them.
"""

import torch
from torch import Tensor

from autoprune.structure.groups import loses_whole_conv_groups, tensors_in
from autoprune.structure.labels import broadcast_labels, compressed, varying_axes
from autoprune.tracing.tracer import Call, Tracer


def batch_norm(call: Call) -> str | None:
    """Batch norm follows its channels."""
    out, tracer = call.out[0], call.tracer
    channels = tracer.line(call.args[0], 1)
    for tensor in call.args[1:5]:
        tracer.use_vector(tensor, channels, "follow")
    tracer.label(out, broadcast_labels(channels, 1, out.shape))


def layer_norm(call: Call) -> str | None:
    """Statistics over channels: those of the pruned network are taken over the channels
    that are left.
    """
    tracer, labels = call.tracer, call.tracer.labels(call.args[0])
    first = labels.ndim - len(call["normalized_shape"])
    for name in (
        ("weight", "bias")
        if call.func.overloadpacket is torch.ops.aten.native_layer_norm
        else ("weight",)
    ):
        view = tracer.parameter(call[name])
        for axis in varying_axes(labels) if view is not None else ():
            if axis >= first:
                line = rows_of(tracer, labels, [axis]).flatten()
                tracer.use(view.name, axis - first, line, "follow")
    tracer.label(tensors_in(call.out)[0], labels)


def group_norm(call: Call) -> str | None:
    """As layer norm, over groups of channels that stay equal: whole norm groups go, or
    the same positions of each.
    """
    tracer, n_groups, shape = call.tracer, call["group"], call.args[0].shape
    channels = tracer.line(call.args[0], 1)
    rows = channels.view(n_groups, -1)
    # Without a weight nothing tells a pruned module how many norm groups are left.
    whole = call["weight"] is not None and loses_whole_conv_groups(
        shape[1], shape[1], n_groups
    )
    if whole:
        tracer.book.join(rows[:, :1].expand_as(rows), rows)
    else:
        tracer.book.join_lines(rows)
    for name in ("weight", "bias"):
        tracer.use_vector(call[name], channels, "follow")
    tracer.label(tensors_in(call.out)[0], broadcast_labels(channels, 1, shape))
    # PyTorch refuses to normalise a single value, which one channel of one pixel is.
    return "normalises single pixels" if call["HxW"] == 1 and not whole else None


def along_axis(call: Call) -> str | None:
    """Softmax and running sums: shape and labels stay; over channels they see those
    that are left.
    """
    labels = call.tracer.labels(call.args[0])
    for out in tensors_in(call.out):
        call.tracer.label(out, labels)


def reduction(call: Call) -> str | None:
    """A mean or sum over space keeps the channel; over channels it reads them, and
    leaves the rows of cells.
    """
    tracer, x = call.tracer, call.args[0]
    labels, axes = tracer.labels(x), reduced_axes(call)
    varying = varying_axes(labels)
    summed = [axis for axis in axes if axis in varying]
    if summed:
        tracer.contracted.append(labels)
        labels = rows_of(tracer, labels, [axis for axis in varying if axis not in axes])
    for out in tensors_in(call.out):
        left = labels.expand(x.shape)
        for axis in sorted(axes, reverse=True):
            left = (
                left.narrow(axis, 0, 1) if out.ndim == x.ndim else left.select(axis, 0)
            )
        tracer.label(out, left)


def reduced_axes(call: Call) -> list[int]:
    """The axes over which a reduction runs."""
    n_axes = call.args[0].ndim
    try:
        axes = call["dim"]
    except KeyError:
        axes = None
    axes = [axes] if isinstance(axes, int) else axes
    return sorted({axis % n_axes for axis in (axes or range(n_axes))})


def rows_of(tracer: Tracer, labels: Tensor, axes: list[int]) -> Tensor:
    """Labels that vary along `axes` alone: one for all the cells that share a position
    there.
    """
    if not axes:
        return torch.zeros([1] * labels.ndim, dtype=torch.int64)
    varying = varying_axes(labels)
    cells = compressed(labels)
    cells = cells.permute(
        [varying.index(axis) for axis in [*axes, *(set(varying) - set(axes))]]
    )
    rows = tracer.book.factor(cells.reshape(cells.shape[: len(axes)].numel(), -1))
    shape = [labels.shape[axis] if axis in axes else 1 for axis in range(labels.ndim)]
    return rows.view(cells.shape[: len(axes)]).view(shape)
