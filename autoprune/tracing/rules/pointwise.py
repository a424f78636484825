"""Rules of elementwise operations: the labels that meet are joined."""

from dataclasses import replace

import torch
from torch import Tensor

from autoprune.structure.labels import CONSTANT, take_at_origin, varying_axes
from autoprune.tracing.calls import Call


def pointwise(call: Call) -> str | None:
    """Elementwise operations join the labels that meet, bare parameters' included."""
    tracer = call.tracer
    out = call.out
    if not isinstance(out, Tensor):
        return "has no rule"
    if not out.ndim and any(map(tracer.is_activation, call.tensors())):
        # A single number, computed from a mean for instance, is nobody's channel.
        tracer.label(out, torch.full((), CONSTANT, dtype=torch.int64))
        return None
    # Numbers that the code writes, as scalars, scale all channels alike; so does noise.
    operands = []
    for tensor in call.tensors():
        if tensor.ndim and not tracer.is_noise(tensor):
            operands.append(tensor)
    spreads = []
    for tensor in operands:
        spreads.append(tracer.labels(tensor).expand(out.shape))
    return _join_operands(call, operands, spreads)


def _join_operands(
    call: Call, operands: list[Tensor], spreads: list[Tensor]
) -> str | None:
    """All operands meet the one that tells most channels apart.

    Args:
        call: The operation.
        operands: Its tensors.
        spreads: Their labels, broadcast to the output's shape.
    """
    tracer = call.tracer
    axes = [varying_axes(labels) for labels in spreads]
    main = _main_operand(call, operands, axes)
    for i in range(len(operands)):
        if i == main:
            continue
        if not axes[i] and tracer.is_activation(operands[i]):
            # Gone, it would take the whole product with it: one channel that meets
            # many.
            tracer.book.pin(
                spreads[i],
                f"is broadcast over other channels by {tracer.locate(call.func)}",
            )
            continue
        n_new_axes = call.out.ndim - operands[i].ndim
        sizes = (1,) * n_new_axes + tuple(operands[i].shape)
        # A constant varies on no axis; it meets the channels on those that it spans.
        met_axes = axes[i] or [axis for axis in axes[main] if sizes[axis] > 1]
        labels = take_at_origin(spreads[i], met_axes)
        if set(axes[main]) <= set(met_axes):
            tracer.book.join(take_at_origin(spreads[main], met_axes), labels)
        elif set(met_axes) <= set(axes[main]):
            # A value for each head, say, meets cells of heads and width: their rows.
            rows = tracer.book.row_labels(spreads[main], met_axes).expand(
                call.out.shape
            )
            tracer.book.join(take_at_origin(rows, met_axes), labels)
        elif not tracer.is_activation(operands[i]):
            # A table with a row for each token meets the columns of cells, say; on the
            # axis of the tokens nothing is met.
            shared = sorted(set(met_axes) & set(axes[main]))
            rows = tracer.book.row_labels(spreads[main], shared).expand(call.out.shape)
            if shared:
                tracer.book.join(take_at_origin(rows, met_axes), labels)
        else:
            return "crosses channels with channels"
    tracer.label(call.out, spreads[main])
    return None


def _main_operand(call: Call, operands: list[Tensor], axes: list[list[int]]) -> int:
    """Position of the operand whose labels the output takes.

    Activations come before parameters, then those that vary on more axes; of equal
    ones, the first.

    Args:
        call: The operation.
        operands: Its tensors.
        axes: Per operand those along which its labels vary.
    """

    def rank(i: int) -> tuple[bool, int]:
        return call.tracer.is_activation(operands[i]), len(axes[i])

    return max(range(len(operands)), key=rank)


def pointwise_with_buffer(call: Call) -> str | None:
    """An elementwise operation that returns something for its gradient as well."""
    return pointwise(replace(call, out=call.out[0]))


def in_place_copy(call: Call) -> str | None:
    """`copy_` fills a blank buffer with the source's labels.

    Anything else it overwrites in place, and joins: the code goes on with the labels
    that the target had.
    """
    tracer = call.tracer
    target, source = call.args[:2]
    labels = tracer.labels(target)
    # A slice of a buffer lies in the buffer's memory, and so do its labels.
    is_in_buffer = labels.untyped_storage().data_ptr() in tracer.blank_buffers
    if is_in_buffer and not labels.any():
        labels.copy_(tracer.labels(source).expand(target.shape))
        return None
    return pointwise(call)
