"""Rules of operations that read or write along some axes, on which no channels may lie.

Pooling, resizing and padding, sorting, scans for a maximum, Fourier transforms, writing
at places, windows.
"""

import torch
from torch import Tensor

from autoprune.structure.groups import tensors_in
from autoprune.structure.labels import broadcast_labels, varying_axes
from autoprune.tracing.calls import Call
from autoprune.tracing.rules.movements import ORDERED
from autoprune.tracing.rules.norms import reduced_axes, reduction


def spatial(call: Call) -> str | None:
    """Pooling, resizing and padding of the last axes keep the channel."""
    out = tensors_in(call.out)[0]
    labels = call.tracer.labels(call.args[0])
    name = call.func.overloadpacket.__name__
    # ATen's names say over how many axes an operation goes.
    n_spatial = 2
    for n in (1, 3):
        if f"{n}d" in name:
            n_spatial = n
    spatial_axes = set(range(labels.ndim - n_spatial, labels.ndim))
    varying = set(varying_axes(labels))
    # One pixel's labels are every pixel's, however many there are afterwards.
    corner = labels[(..., *[slice(0, 1)] * n_spatial)]
    if spatial_axes & varying:
        if not varying - spatial_axes:
            return "works across channels as across space"
        # A linear layer made the map: the pixels of a channel go together.
        call.tracer.book.join(corner.expand(labels.shape), labels)
    call.tracer.label(out, corner.expand(out.shape))
    return None


def along(call: Call) -> str | None:
    """Sorting, running maxima, Fourier transforms: what is read lies along `dim`."""
    tracer = call.tracer
    labels = tracer.labels(call.args[0])
    axes = reduced_axes(call)
    if set(axes) & set(varying_axes(labels)):
        return ORDERED
    for axis in axes:
        labels = labels.narrow(axis, 0, 1)
    for out in tensors_in(call.out):
        # `topk` and real Fourier transforms change the length.
        tracer.label(out, labels.expand(out.shape))
    return None


def position_of(call: Call) -> str | None:
    """`argmax` and its kin: over space they keep the channel."""
    labels = call.tracer.labels(call.args[0])
    if set(reduced_axes(call)) & set(varying_axes(labels)):
        return "tells the number of a channel"
    return reduction(call)


def triangle(call: Call) -> str | None:
    """`tril` and `triu` write zeros along the last two axes."""
    tracer = call.tracer
    x = call.args[0]
    labels = tracer.labels(x)
    if set(varying_axes(labels)) & {x.ndim - 2, x.ndim - 1}:
        return ORDERED
    tracer.label(call.out, labels)
    return None


def writing(call: Call) -> str | None:
    """`x[places] = values` at constant places, or where a mask of its shape says."""
    tracer = call.tracer
    x, places, values = call.args[:3]
    labels = tracer.labels(x).clone()
    value_labels = tracer.labels(values)
    computed = [
        place for place in places if place is not None and tracer.is_activation(place)
    ]
    if computed:
        # A mask of another shape would take another number of values.
        if [place.shape for place in places] != [x.shape] or values.ndim:
            call.refuse()
        tracer.book.join(tracer.labels(computed[0]), labels)
        tracer.label(call.out, labels)
        return None
    written = torch.ops.aten.index.Tensor(labels, places)
    indexed = {axis for axis, place in enumerate(places) if place is not None}
    # A number that is written at places of space is the same for every channel.
    if values.ndim or indexed & set(varying_axes(labels)):
        tracer.book.join(value_labels.expand(written.shape), written)
    tracer.label(call.out, labels)
    return None


def sampling(call: Call) -> str | None:
    """`grid_sample` reads at places that are the same for all channels."""
    if varying_axes(call.tracer.labels(call["grid"])):
        return "samples at places that are channels"
    return spatial(call)


def windows(call: Call) -> str | None:
    """`unfold`: a channel's window becomes channels that go together."""
    tracer = call.tracer
    axis = call.out.ndim - 2
    channels = tracer.unify_axis(call.args[0], axis)
    spread = channels.repeat_interleave(call.out.shape[axis] // len(channels))
    tracer.label(call.out, broadcast_labels(spread, axis, call.out.shape))
    return None


def overlapping_windows(call: Call) -> str | None:
    """`fold`: the channels that become one channel's window go together."""
    tracer = call.tracer
    axis = call.args[0].ndim - 2
    rows = tracer.unify_axis(call.args[0], axis).view(call.out.shape[axis], -1)
    tracer.book.join(rows[:, :1].expand_as(rows), rows)
    tracer.label(call.out, broadcast_labels(rows[:, 0], axis, call.out.shape))
    return None


def distances(call: Call) -> str | None:
    """Distances between the rows of two matrices: every channel is summed over."""
    tracer = call.tracer
    joined: Tensor | None = None
    for x in call.args[:2]:
        axis = x.ndim - 1
        if set(varying_axes(tracer.labels(x))) - {axis}:
            return "compares channels with channels"
        channels = tracer.unify_axis(x, axis)
        if joined is not None:
            tracer.book.join(joined, channels)
        joined = channels
        tracer.summed_labels.append(channels)
    nothing = torch.zeros((), dtype=torch.int64)
    tracer.label(call.out, nothing.expand(call.out.shape))
    return None
