"""Rules of operations that move data: they are executed on the labels themselves.

What the code's cuts and regroupings demand of the channels that are left goes to the
label book as a constraint.
"""

import math

import torch
from torch import Tensor

from autoprune.structure.groups import tensors_in
from autoprune.structure.labels import (
    CONSTANT,
    Constraint,
    broadcast_labels,
    compress,
    lines,
    varying_axes,
)
from autoprune.tracing.calls import Call
from autoprune.tracing.parameter_views import ParameterView, reshaped
from autoprune.tracing.tracer import Tracer

MAX_PARTS = 8
"""Into how many parts a cut can divide a channel axis. A cut into more, such as one
channel of many, is hardly computed from the width."""


ORDERED = "depends on the order of channels"
"""Why channels stay over which an operation runs."""


def movement(call: Call) -> str | None:
    """Operations that only move data are executed on the labels themselves."""
    tracer = call.tracer
    moved = call.args[0]
    # A user's own operation with this rule may take a list.
    views = tracer.views(moved) if isinstance(moved, Tensor) else ()
    if not views:
        arguments = call.substitute_tensors(tracer.labels)
        tracer.label(call.out, call.func(*arguments, **call.kwargs))
        return None
    # The view of a parameter stays one, so that a layer may read it transposed. Of
    # several outputs, each index makes as many.
    moved_views: list[list[ParameterView]] = [[] for _ in tensors_in(call.out)]
    for view in views:
        moved_index = []
        for index in view.index:
            if index is None:
                moved_index.append([None] * len(moved_views))
            else:
                moved_index.append(
                    tensors_in(call.func(index, *call.args[1:], **call.kwargs))
                )
        for position, of_output in enumerate(moved_views):
            piece = tuple(pieces[position] for pieces in moved_index)
            of_output.append(ParameterView(view.name, view.shape, piece))
    for out, of_output in zip(tensors_in(call.out), moved_views, strict=True):
        tracer.mark_parameter(out, *of_output)
    return None


def split(call: Call) -> str | None:
    """Equal parts of the channel axis keep equally many channels.

    The code is trusted to compute its sizes.
    """
    movement(call)
    tracer = call.tracer
    whole = call.args[0]
    view = tracer.parameter(whole)
    if view is not None:
        sizes = [out.shape[call["dim"]] for out in tensors_in(call.out)]
        if len(set(sizes)) == 1:
            _balance_parameter(tracer, view, call["dim"] % whole.ndim, sizes[0])
        return None
    parts = []
    for out in tensors_in(call.out):
        if tracer.is_activation(out):
            parts.append(tracer.labels(out))
    # What unequal parts keep is the code's own choice, which only the proof can test.
    if len(parts) < 2 or len({part.shape for part in parts}) > 1:
        return None
    # Sizes in attributes follow what is left of each part.
    if tracer.is_cut_by_attribute:
        return None
    axis = call["dim"] % parts[0].ndim
    if axis in varying_axes(tracer.labels(call.args[0])):
        rows = compress(torch.stack(parts)).reshape(len(parts), -1)
        tracer.book.constraints.append((Constraint.PARTS, rows))
    return None


def slicing(call: Call) -> str | None:
    """`slice`: a cut through a channel axis has to move with what is left.

    A cut at a quarter needs equally many channels in every quarter, every second
    channel needs whole pairs. Whether the code computes the place from the width, as
    this takes for granted, the proof decides; of a cut at 16 of 27 it doesn't.
    """
    movement(call)
    tracer = call.tracer
    x = call.args[0]
    axis = call["dim"] % x.ndim
    n = x.shape[axis]
    # `x[:]` cuts nothing off.
    if call.out.shape == x.shape:
        return None
    start, end, _ = slice(call["start"], call["end"]).indices(n)
    step = call["step"]
    view = tracer.parameter(x)
    if view is not None and step == 1:
        _balance_parameter(tracer, view, axis, math.gcd(start, end, n))
    if not tracer.is_activation(x):
        return None
    labels = tracer.labels(x)
    if axis not in varying_axes(labels):
        return None
    # Only whole pairs, counted from the beginning of the axis, can go.
    if n % step or (step > 1 and start >= step):
        return "cuts channels at uneven places"
    # Parts of this length have the cut at their borders: 6 to 9 of 12 is the third of
    # four parts of 3.
    unit = math.gcd(start, end, n)
    for line in lines(labels, axis):
        if step > 1:
            constraint = (Constraint.GRID, line.view(-1, step))
            tracer.book.constraints.append(constraint)
        elif n // unit <= MAX_PARTS and not tracer.is_cut_by_attribute:
            constraint = (Constraint.PARTS, line.view(-1, unit))
            tracer.book.constraints.append(constraint)
    return None


def _balance_parameter(
    tracer: Tracer, view: ParameterView, dim: int, unit: int
) -> None:
    """Equal parts of a parameter's axis keep equally many positions.

    Args:
        tracer: The notebook of the run.
        view: The parameter, before it was cut.
        dim: The axis of the view that was cut.
        unit: The length of a part.
    """
    axis = view.original_axis(dim)
    # Vectors and tables that only meet activations say by that what belongs together.
    if axis is None or view.shape[axis] // unit > MAX_PARTS:
        return
    labels = tracer.label_axis(view.name, axis)
    tracer.book.constraints.append((Constraint.PARTS, labels.view(-1, unit)))


def roll(call: Call) -> str | None:
    """`roll` by a number of places keeps labels, unless it moves channels.

    Of the channel axis that number would have to shrink with the channels.
    """
    movement(call)
    tracer = call.tracer
    x = call.args[0]
    if not tracer.is_activation(x):
        return None
    # Without axes the tensor is rolled as if it were flat.
    axes = {axis % x.ndim for axis in call["dims"]} or set(range(x.ndim))
    if axes & set(varying_axes(tracer.labels(x))):
        return "moves channels by a fixed number of places"
    return None


def reshape(call: Call) -> str | None:
    """`view` and its kin.

    Labels with zero strides may need a copy where the data needs none, so they are
    reshaped rather than viewed.
    """
    tracer = call.tracer
    shape = call.out.shape
    views = tracer.views(call.args[0])
    if views:
        moved = [view.apply(lambda index: reshaped(index, shape)) for view in views]
        tracer.mark_parameter(call.out, *moved)
        return None
    before = tracer.labels(call.args[0])
    after = before.reshape(shape)
    tracer.label(call.out, after)
    # A channel axis that was split has to stay a product of its parts.
    if len(varying_axes(after)) > len(varying_axes(before)):
        tracer.book.constraints.append((Constraint.GRID, compress(after)))
    return None


def copy(call: Call) -> str | None:
    """Copies and casts keep their labels, and a copied parameter stays a parameter."""
    tracer = call.tracer
    views = tracer.views(call.args[0])
    if views:
        tracer.mark_parameter(call.out, *views)
    else:
        tracer.label(call.out, tracer.labels(call.args[0]))
    return None


def restride(call: Call) -> str | None:
    """`as_strided_` to the same shape changes the layout in memory alone.

    Pooling does so for channels-last tensors.
    """
    labels = call.tracer.labels(call.args[0])
    return None if labels.shape == call.out.shape else "regroups elements"


def new_like(call: Call) -> str | None:
    """A new tensor of an activation's shape shrinks with it."""
    tracer = call.tracer
    if tracer.is_activation(call.args[0]):
        tracer.label(call.out, tracer.labels(call.args[0]))
    elif tracer.views(call.args[0]):
        tracer.mark_parameter(call.out, *tracer.views(call.args[0]))
    return None


def constant(call: Call) -> str | None:
    """A new tensor, or a constant written in place: labels stay as they are."""
    return None


def new_buffer(call: Call) -> str | None:
    """A buffer to be filled.

    Its labels are memory of their own, of which slices are views as the tensor's are;
    so what is written into a slice shows in the whole.
    """
    labels = torch.zeros(call.out.shape, dtype=torch.int64)
    call.tracer.blank_buffers[labels.untyped_storage().data_ptr()] = labels
    call.tracer.label(call.out, labels)
    return None


def indexing(call: Call) -> str | None:
    """Reading at constant positions is executed on the labels."""
    tracer = call.tracer
    data = call.args[0]
    positions = []
    for tensor in call.tensors():
        if tensor is not data and tracer.is_activation(tensor):
            positions.append(tensor)
    # A mask of booleans decides by its values how many elements there are.
    if any(tensor.dtype == torch.bool for tensor in positions):
        call.refuse()
    if positions and call.func.overloadpacket is torch.ops.aten.gather:
        return addressing(call)
    if positions:
        return "reads at positions that are computed"
    is_embedding = call.func.overloadpacket is torch.ops.aten.embedding

    def read(x: Tensor) -> Tensor:
        # An embedding takes floats alone, and labels are integers.
        if is_embedding:
            return x[call.args[1]]
        return call.func(x, *call.args[1:], **call.kwargs)

    views = tracer.views(data)
    if views:
        tracer.mark_parameter(call.out, *[view.apply(read) for view in views])
    else:
        tracer.label(call.out, read(tracer.labels(data)))
    return None


def addressing(call: Call) -> str | None:
    """Reading and writing at positions along one axis: `gather`, `scatter`.

    Positions and values are as many as the channels, so all go together.
    """
    tracer = call.tracer
    x = call.args[0]
    axis = call["dim"] % x.ndim
    main = tracer.labels(x)
    for tensor in call.tensors():
        labels = tracer.labels(tensor)
        if axis in varying_axes(labels) and tensor.ndim == x.ndim:
            return ORDERED
    # `index_add` has one list of positions for all.
    others = [tensor for tensor in list(call.tensors())[1:] if tensor.ndim == x.ndim]
    first = main.narrow(axis, 0, 1)
    for tensor in others:
        labels = tracer.labels(tensor).narrow(axis, 0, 1)
        is_known = tracer.is_activation(tensor) or labels.any()
        for other in varying_axes(first):
            if labels.shape[other] != first.shape[other]:
                return "writes into a part of the channels"
        if is_known or tensor.is_floating_point():
            met = [axis for axis in varying_axes(first) if labels.shape[axis] > 1]
            if met:
                tracer.book.join(labels.expand(first.shape), first)
    tracer.label(call.out, first.expand(call.out.shape))
    return None


def concatenation(call: Call) -> str | None:
    """Tensors side by side.

    Along the channel axis their labels stand side by side too. On an axis without
    channels, such as tokens, they have the same channels on every other axis.
    """
    tracer = call.tracer
    labels = [tracer.labels(tensor) for tensor in call.args[0]]
    if call.func.overloadpacket is torch.ops.aten.stack:
        labels = [item.unsqueeze(call["dim"]) for item in labels]
    axis = call["dim"] % call.out.ndim
    varying: set[int] = set()
    for item in labels:
        varying.update(varying_axes(item))
    if axis in varying or not varying:
        tracer.label(call.out, torch.cat(labels, axis))
        return None
    # A class token, say, is a bare parameter: the image's tokens tell more apart.
    main = max(labels, key=lambda item: len(varying_axes(item)))
    first = main.narrow(axis, 0, 1)
    for item in labels:
        tracer.book.join(first, item.narrow(axis, 0, 1))
    tracer.label(call.out, first.expand(call.out.shape))
    return None


def pad(call: Call) -> str | None:
    """Padding along the channel axis adds constants; along others it keeps channels."""
    x, amounts = call.args[:2]
    labels = call.tracer.labels(x)
    varying = varying_axes(labels)
    # Amounts go from the last axis to the first, two for each.
    for position in range(len(amounts) // 2):
        axis = labels.ndim - 1 - position
        before, after = amounts[2 * position : 2 * position + 2]
        if axis in varying:
            later_axes = [0] * (2 * position)
            labels = torch.constant_pad_nd(
                labels, [*later_axes, before, after], CONSTANT
            )
        elif before or after:
            shape = list(labels.shape)
            shape[axis] += before + after
            labels = labels.narrow(axis, 0, 1).expand(shape)
    call.tracer.label(call.out, labels)
    return None


def pixel_shuffle(call: Call) -> str | None:
    """The channels that become one channel's pixels go together."""
    tracer = call.tracer
    shape = call.out.shape
    channel_axis = len(shape) - 3
    channels = tracer.unify_axis(call.args[0], channel_axis)
    pixels = channels.view(shape[channel_axis], -1)
    tracer.book.join(pixels[:, :1].expand_as(pixels), pixels)
    tracer.label(call.out, broadcast_labels(pixels[:, 0], channel_axis, shape))
    return None


def pixel_unshuffle(call: Call) -> str | None:
    """A channel's pixels become channels that go together."""
    tracer = call.tracer
    x, factor = call.args
    channel_axis = call.out.ndim - 3
    channels = tracer.unify_axis(x, channel_axis)
    pixels = channels.repeat_interleave(factor**2)
    tracer.label(call.out, broadcast_labels(pixels, channel_axis, call.out.shape))
    return None


def channel_shuffle(call: Call) -> str | None:
    """The same positions go in every shuffled group."""
    tracer = call.tracer
    x, n_groups = call.args
    # Pruned, the groups have to be equally large again to be shuffled.
    channels = tracer.unify_axis(x, 1).view(n_groups, -1)
    tracer.book.join_lines(channels)
    shuffled = channels.T.flatten()
    tracer.label(call.out, broadcast_labels(shuffled, 1, call.out.shape))
    return None


def gated_halves(call: Call) -> str | None:
    """`glu`: the first half of an axis times the sigmoid of the second."""
    tracer = call.tracer
    # A value without its gate is nothing, nor is a gate without its value.
    first, second = tracer.labels(call.args[0]).chunk(2, call["dim"])
    tracer.book.join(first, second)
    tracer.label(call.out, first)
    return None
