"""Rules of operations that read across channels: norms, means, softmax.

The pruned network takes its statistics over the channels that are left, so nothing has
to stay for them.
"""

import torch
from torch import Tensor

from autoprune.structure.groups import loses_whole_conv_groups, tensors_in
from autoprune.structure.labels import broadcast_labels, compress, varying_axes
from autoprune.tracing.tracer import Call, Tracer


def batch_norm(call: Call) -> str | None:
    """Batch norm scales each channel by itself, so its vectors go with the channels."""
    tracer = call.tracer
    out = call.out[0]
    channels = tracer.unify_axis(call.args[0], 1)
    # Weight, bias, running mean and running variance.
    for tensor in call.args[1:5]:
        tracer.use_vector(tensor, channels, "follow")
    tracer.label(out, broadcast_labels(channels, 1, out.shape))
    return None


def layer_norm(call: Call) -> str | None:
    """Layer norm and RMS norm keep labels; their vectors go with the channels.

    The pruned network's statistics are taken over the channels that are left.
    """
    tracer = call.tracer
    labels = tracer.labels(call.args[0])
    # The normalised axes are the last ones, and the vectors have just these.
    first_normalised = labels.ndim - len(call["normalized_shape"])
    vectors = ["weight"]
    if call.func.overloadpacket is torch.ops.aten.native_layer_norm:
        vectors.append("bias")
    for name in vectors:
        view = tracer.parameter(call[name])
        if view is None:
            continue
        for axis in varying_axes(labels):
            # Channels on other axes share the vector's values and don't meet them.
            if axis >= first_normalised:
                line = row_labels(tracer, labels, [axis]).flatten()
                tracer.use(view.name, axis - first_normalised, line, "follow")
    tracer.label(tensors_in(call.out)[0], labels)
    return None


def group_norm(call: Call) -> str | None:
    """As layer norm, over groups of channels that stay equally large.

    Whole norm groups go, or the same positions of each.
    """
    tracer = call.tracer
    n_groups = call["group"]
    shape = call.args[0].shape
    n_channels = shape[1]
    channels = tracer.unify_axis(call.args[0], 1)
    rows = channels.view(n_groups, -1)
    # Without a weight nothing tells a pruned module how many norm groups are left.
    has_weight = call["weight"] is not None
    loses_groups = has_weight and loses_whole_conv_groups(
        n_channels, n_channels, n_groups
    )
    if loses_groups:
        tracer.book.join(rows[:, :1].expand_as(rows), rows)
    else:
        tracer.book.join_lines(rows)
    for name in ("weight", "bias"):
        tracer.use_vector(call[name], channels, "follow")
    tracer.label(tensors_in(call.out)[0], broadcast_labels(channels, 1, shape))
    # PyTorch refuses to normalise a single value, which one channel of one pixel is.
    if call["HxW"] == 1 and not loses_groups:
        return "normalises single pixels"
    return None


def axis_scan(call: Call) -> str | None:
    """Softmax and running sums keep shape and labels.

    Over channels they see those that are left.
    """
    labels = call.tracer.labels(call.args[0])
    for out in tensors_in(call.out):
        call.tracer.label(out, labels)
    return None


def reduction(call: Call) -> str | None:
    """A mean or sum over space keeps the channel.

    Over channels it reads them, and leaves the rows of cells: the mean over a head's
    width goes when the head does.
    """
    tracer = call.tracer
    x = call.args[0]
    labels = tracer.labels(x)
    axes = reduced_axes(call)
    varying = varying_axes(labels)
    if set(axes) & set(varying):
        tracer.summed_labels.append(labels)
        remaining_axes = [axis for axis in varying if axis not in axes]
        labels = row_labels(tracer, labels, remaining_axes)
    for out in tensors_in(call.out):
        reduced = labels.expand(x.shape)
        # From the last axis to the first, as `select` renumbers those behind.
        for axis in sorted(axes, reverse=True):
            if out.ndim == x.ndim:
                reduced = reduced.narrow(axis, 0, 1)
            else:
                reduced = reduced.select(axis, 0)
        tracer.label(out, reduced)
    return None


def reduced_axes(call: Call) -> list[int]:
    """The axes over which a reduction runs, ascending."""
    n_axes = call.args[0].ndim
    try:
        axes = call["dim"]
    except KeyError:
        axes = None  # an overload that reduces everything
    if isinstance(axes, int):
        axes = [axes]
    return sorted({axis % n_axes for axis in (axes or range(n_axes))})


def row_labels(tracer: Tracer, labels: Tensor, axes: list[int]) -> Tensor:
    """One label for all the cells that share a position on some axes.

    Cells `[[1, 2, 3], [4, 5, 6]]` on axes 1 and 2 of `(1, 2, 3)` have the rows 7, 8 on
    axis 1, as `(1, 2, 1)`.

    Args:
        tracer: The notebook of the run.
        labels: Of an activation.
        axes: Some of those along which the labels vary.

    Returns:
        Labels that vary along `axes` alone, of length 1 on all others.
    """
    if not axes:
        # What is left of all channels is there whichever of them are.
        return torch.zeros([1] * labels.ndim, dtype=torch.int64)
    varying = varying_axes(labels)
    cells = compress(labels)
    # Rows first, then all other axes as the cells of a row.
    order = []
    for axis in [*axes, *(set(varying) - set(axes))]:
        order.append(varying.index(axis))
    cells = cells.permute(order)
    row_shape = cells.shape[: len(axes)]
    rows = tracer.book.factor(cells.reshape(row_shape.numel(), -1))
    shape = []
    for axis in range(labels.ndim):
        shape.append(labels.shape[axis] if axis in axes else 1)
    return rows.view(row_shape).view(shape)
