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
    compressed,
    lines,
    varying_axes,
)
from autoprune.tracing.tracer import Call, ParameterView

MAX_PARTS = 8


def movement(call: Call) -> str | None:
    """Operations that only move data are executed on the labels themselves."""
    tracer = call.tracer
    view = tracer.parameter(call.args[0]) if isinstance(call.args[0], Tensor) else None
    if view is None:
        tracer.label(call.out, call.func(*call.replaced(tracer.labels), **call.kwargs))
        return
    moved = [call.func(index, *call.args[1:], **call.kwargs) for index in view.index]
    outputs = tensors_in(call.out)
    for position, out in enumerate(outputs):
        pieces = (
            moved
            if isinstance(call.out, Tensor)
            else [parts[position] for parts in moved]
        )
        tracer.see(out, ParameterView(view.name, view.shape, tuple(pieces)))


def split(call: Call) -> str | None:
    """Equal parts of the channel axis keep equally many channels; the code is trusted
    to compute its sizes.
    """
    movement(call)
    axis, outputs = call["dim"], tensors_in(call.out)
    labels = [
        call.tracer.labels(out) for out in outputs if call.tracer.is_activation(out)
    ]
    if len(labels) > 1 and len({part.shape for part in labels}) == 1:
        if axis % labels[0].ndim in varying_axes(call.tracer.labels(call.args[0])):
            parts = compressed(torch.stack(labels)).reshape(len(labels), -1)
            call.tracer.book.constraints.append((Constraint.PARTS, parts))


def cut(call: Call) -> str | None:
    """`slice`: where the code cuts a channel axis, the cut has to move with what is
    left.

    A cut at a quarter needs equally many channels in every quarter, every second
    channel needs whole pairs. Whether the code computes the place from the width, as
    this takes for granted, the proof decides; of a cut at 16 of 27 it doesn't.
    """
    movement(call)
    tracer, x = call.tracer, call.args[0]
    axis, n = call["dim"] % x.ndim, x.shape[call["dim"]]
    if (
        not tracer.is_activation(x)
        or call.out.shape == x.shape
        or axis not in varying_axes(tracer.labels(x))
    ):
        return None
    start, end, _ = slice(call["start"], call["end"]).indices(n)
    step = call["step"]
    if n % step or (step > 1 and start >= step):
        return "cuts channels at uneven places"
    unit = math.gcd(start, end, n)
    for line in lines(tracer.labels(x), axis):
        if step > 1:
            tracer.book.constraints.append((Constraint.GRID, line.view(-1, step)))
        elif n // unit <= MAX_PARTS:
            tracer.book.constraints.append((Constraint.PARTS, line.view(-1, unit)))
    return None


def rolled(call: Call) -> str | None:
    """`roll` by a number of places: of the channel axis that number would have to
    shrink with the channels.
    """
    movement(call)
    tracer, x = call.tracer, call.args[0]
    axes = [axis % x.ndim for axis in call["dims"]] or range(x.ndim)
    moves_channels = tracer.is_activation(x) and set(axes) & set(
        varying_axes(tracer.labels(x))
    )
    return "moves channels by a fixed number of places" if moves_channels else None


def reshape(call: Call) -> str | None:
    """`view` and its kin; labels with zero strides may need a copy, so they are
    reshaped.
    """
    tracer, shape = call.tracer, call.out.shape
    view = tracer.parameter(call.args[0])
    if view is not None:
        tracer.see(call.out, view.moved(lambda index: index.reshape(shape)))
        return
    before = tracer.labels(call.args[0])
    after = before.reshape(shape)
    tracer.label(call.out, after)
    if len(varying_axes(after)) > len(varying_axes(before)):
        tracer.book.constraints.append((Constraint.GRID, compressed(after)))


def same(call: Call) -> str | None:
    """Copies and casts keep their labels, and a copied parameter stays a parameter."""
    view = call.tracer.parameter(call.args[0])
    if view is not None:
        call.tracer.see(call.out, view)
    else:
        call.tracer.label(call.out, call.tracer.labels(call.args[0]))


def restrided(call: Call) -> str | None:
    """`as_strided_` to the same shape changes the layout in memory alone, as pooling
    does for channels-last tensors.
    """
    tracer, tensor = call.tracer, call.args[0]
    return (
        None if tracer.labels(tensor).shape == call.out.shape else "regroups elements"
    )


def shaped_alike(call: Call) -> str | None:
    """A new tensor of an activation's shape shrinks with it."""
    if call.tracer.is_activation(call.args[0]):
        call.tracer.label(call.out, call.tracer.labels(call.args[0]))


def constant(call: Call) -> str | None:
    """A new tensor, or a constant written in place: labels stay as they are."""


def blank(call: Call) -> str | None:
    """A buffer to be filled: its labels are memory of their own, of which slices are
    views as the tensor's are.
    """
    labels = torch.zeros(call.out.shape, dtype=torch.int64)
    call.tracer.blanks[labels.untyped_storage().data_ptr()] = labels
    call.tracer.label(call.out, labels)


def indexed(call: Call) -> str | None:
    """Reading at constant positions is executed on the labels."""
    tracer, data = call.tracer, call.args[0]
    positions = [
        tensor
        for tensor in call.tensors()
        if tensor is not data and tracer.is_activation(tensor)
    ]
    if any(tensor.dtype == torch.bool for tensor in positions):
        call.refuse()
    if positions:
        return "reads at positions that are computed"
    is_embedding = call.func.overloadpacket is torch.ops.aten.embedding

    def read(x):
        return (
            x[call.args[1]]
            if is_embedding
            else call.func(x, *call.args[1:], **call.kwargs)
        )

    view = tracer.parameter(data)
    if view is not None:
        tracer.see(call.out, view.moved(read))
    else:
        tracer.label(call.out, read(tracer.labels(data)))


def concatenation(call: Call) -> str | None:
    """Tensors side by side on an axis without channels, such as tokens, have the same
    channels on every other axis.
    """
    tracer, tensors = call.tracer, call.args[0]
    labels = [tracer.labels(tensor) for tensor in tensors]
    if call.func.overloadpacket is torch.ops.aten.stack:
        labels = [one.unsqueeze(call["dim"]) for one in labels]
    axis = call["dim"] % call.out.ndim
    varying = {other for one in labels for other in varying_axes(one)}
    if axis in varying or not varying:
        tracer.label(call.out, torch.cat(labels, axis))
        return
    first = max(labels, key=lambda one: len(varying_axes(one))).narrow(axis, 0, 1)
    for one in labels:
        tracer.book.join(first, one.narrow(axis, 0, 1))
    tracer.label(call.out, first.expand(call.out.shape))


def pad(call: Call) -> str | None:
    """Padding along the channel axis adds constants; along any other it keeps the
    channel.
    """
    x, amounts = call.args[:2]
    labels = call.tracer.labels(x)
    varying = varying_axes(labels)
    for position in range(len(amounts) // 2):
        axis = labels.ndim - 1 - position
        before, after = amounts[2 * position], amounts[2 * position + 1]
        if axis in varying:
            labels = torch.constant_pad_nd(
                labels, [*[0] * (2 * position), before, after], CONSTANT
            )
        elif before or after:
            shape = list(labels.shape)
            shape[axis] += before + after
            labels = labels.narrow(axis, 0, 1).expand(shape)
    call.tracer.label(call.out, labels)


def spatial(call: Call) -> str | None:
    """Pooling, resizing and padding of the last axes keep the channel."""
    out = tensors_in(call.out)[0]
    labels = call.tracer.labels(call.args[0])
    name = call.func.overloadpacket.__name__
    n_spatial = next((n for n in (1, 3) if f"{n}d" in name), 2)
    if set(range(labels.ndim - n_spatial, labels.ndim)) & set(varying_axes(labels)):
        return "works across channels as across space"
    corner = labels[(..., *[slice(0, 1)] * n_spatial)]
    call.tracer.label(out, corner.expand(out.shape))


def pixel_shuffle(call: Call) -> str | None:
    """The channels that become one channel's pixels go together."""
    tracer, shape = call.tracer, call.out.shape
    channels = tracer.line(call.args[0], -3 % len(shape)).view(shape[-3], -1)
    tracer.book.join(channels[:, :1].expand_as(channels), channels)
    tracer.label(call.out, broadcast_labels(channels[:, 0], len(shape) - 3, shape))


def pixel_unshuffle(call: Call) -> str | None:
    """A channel's pixels become channels that go together."""
    shape = call.out.shape
    channels = call.tracer.line(call.args[0], -3 % len(shape))
    call.tracer.label(
        call.out,
        broadcast_labels(
            channels.repeat_interleave(call.args[1] ** 2), len(shape) - 3, shape
        ),
    )


def channel_shuffle(call: Call) -> str | None:
    """The same positions go in every shuffled group."""
    channels = call.tracer.line(call.args[0], 1).view(call.args[1], -1)
    call.tracer.book.join_lines(channels)
    call.tracer.label(
        call.out, broadcast_labels(channels.T.flatten(), 1, call.out.shape)
    )


def gated_halves(call: Call) -> str | None:
    """`glu`: the first half of an axis times the sigmoid of the second."""
    first, second = call.tracer.labels(call.args[0]).chunk(2, call["dim"])
    call.tracer.book.join(first, second)
    call.tracer.label(call.out, first)
