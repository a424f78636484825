"""Rules of operations that read across channels: norms, means, softmax.

The pruned network takes its statistics over the channels that are left, so nothing has
to stay for them.
"""

import torch

from autoprune.structure.groups import loses_whole_conv_groups, tensors_in
from autoprune.structure.labels import broadcast_labels, varying_axes
from autoprune.tracing.calls import Call


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
                line = tracer.book.row_labels(labels, [axis]).flatten()
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
        labels = tracer.book.row_labels(labels, remaining_axes)
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


def loss(call: Call) -> str | None:
    """A loss compares predictions with targets, channel by channel.

    Networks that are given targets compute it themselves.
    """
    tracer = call.tracer
    prediction, target = call.args[:2]
    labels = tracer.labels(prediction)
    tracer.book.join(labels, tracer.labels(target).expand(labels.shape))
    if call.out.shape != prediction.shape:
        labels = torch.zeros((), dtype=torch.int64).expand(call.out.shape)
    tracer.label(call.out, labels)
    return None


def class_loss(call: Call) -> str | None:
    """A loss in which targets are numbers of classes, so that all classes stay."""
    tracer = call.tracer
    tracer.book.pin(tracer.labels(call.args[0]), "is compared with classes by number")
    for out in tensors_in(call.out):
        labels = torch.zeros((), dtype=torch.int64).expand(out.shape)
        tracer.label(out, labels)
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
