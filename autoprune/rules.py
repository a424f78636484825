"""How each operation moves labels: a table from ATen operation to a small function.

An operation without an entry that PyTorch tags as pointwise joins the labels that meet; any other pins every channel
that reaches it and says so. `RULES[torch.ops.aten.my_op] = my_rule` teaches the tracer a new operation.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from autoprune.groups import Layer
from autoprune.labels import CONSTANT, along, spread, varying_axes
from autoprune.tracer import Call

aten = torch.ops.aten
Rule = Callable[[Call], None]


def convolution(call: Call) -> None:
    """A convolution hands out labels for its output; depthwise ones keep those of their input.

    Channels of a grouped convolution go at the same positions of every conv group, so that the groups stay equal.
    """
    x, weight, bias, stride, _, _, transposed, _, n_groups = call.args
    tracer, view = call.tracer, call.tracer.parameter(weight)
    inputs = along(tracer.labels(x), 1)
    if view is None or inputs is None or (transposed and n_groups > 1):
        return unknown(call)
    n_out, n_in = call.out.shape[1], x.shape[1]
    outputs = tracer.book.new(n_out)
    out_axis, in_axis = (1, 0) if transposed else (0, 1)
    depthwise = n_groups > 1 and n_groups == n_in
    if depthwise:
        tracer.book.join(outputs, inputs.repeat_interleave(n_out // n_in))
    else:
        _tie_conv_groups(call, inputs, n_groups)
        _tie_conv_groups(call, outputs, n_groups)
        tracer.use(view.name, in_axis, inputs[: n_in // n_groups], "consume")
    tracer.use(view.name, out_axis, outputs, "follow" if depthwise else "produce")
    _use_vector(call, bias, outputs, "follow" if depthwise else "produce")
    size = (1, 1, *call.out.shape[2:])[-2:] if not transposed else (1, 1, *x.shape[2:])[-2:]
    kind = "depthwise" if depthwise else "conv"
    tracer.layers.append(Layer(view.name, kind, size[0] * size[1], tuple(size), stride[0]))
    tracer.label(call.out, spread(outputs, 1, call.out.shape))


def _tie_conv_groups(call: Call, labels: Tensor, n_groups: int) -> None:
    rows = labels.view(n_groups, -1)
    call.tracer.book.join(rows[:1].expand_as(rows), rows)


def _use_vector(call: Call, tensor: Tensor | None, labels: Tensor, role: str) -> None:
    view = call.tracer.parameter(tensor) if tensor is not None else None
    if view is not None:
        call.tracer.use(view.name, 0, labels, role)


def linear(call: Call) -> None:
    """`mm(x, weight)` and `addmm(bias, x, weight)`, the weight being a transposed parameter."""
    bias, x, weight = call.args if len(call.args) == 3 else (None, *call.args)
    tracer, view = call.tracer, call.tracer.parameter(weight)
    inputs = along(tracer.labels(x), 1)
    axes = (None, None) if view is None else (view.axis_at(0), view.axis_at(1))
    if None in axes or inputs is None or call.kwargs:
        return unknown(call)
    outputs = tracer.book.new(call.out.shape[1])
    tracer.use(view.name, axes[0], inputs, "consume")
    tracer.use(view.name, axes[1], outputs, "produce")
    if bias is not None:
        _use_vector(call, bias, outputs, "produce")
    tracer.layers.append(Layer(view.name, "linear", x.shape[0]))
    tracer.label(call.out, spread(outputs, 1, call.out.shape))


def batch_norm(call: Call) -> None:
    """Batch norm follows its channels."""
    x, out = call.args[0], call.out[0]
    channels = along(call.tracer.labels(x), 1)
    if channels is None:
        return unknown(call)
    for tensor in call.args[1:5]:
        _use_vector(call, tensor, channels, "follow")
    call.tracer.label(out, spread(channels, 1, out.shape))


def movement(call: Call) -> None:
    """Operations that only move data are executed on the labels themselves."""
    tracer = call.tracer
    view = tracer.parameter(call.args[0]) if isinstance(call.args[0], Tensor) else None
    move = lambda labels: call.func(*call.replaced(lambda _: labels), **call.kwargs)  # noqa: E731
    if view is not None:
        tracer.see(call.out, view.moved(move))
    else:
        tracer.label(call.out, call.func(*call.replaced(tracer.labels), **call.kwargs))


def reshape(call: Call) -> None:
    """`view` and its kin; labels with zero strides may need a copy, so they are reshaped."""
    tracer, shape = call.tracer, call.out.shape
    view = tracer.parameter(call.args[0])
    if view is not None:
        tracer.see(call.out, view.moved(lambda index: index.reshape(shape)))
    else:
        tracer.label(call.out, tracer.labels(call.args[0]).reshape(shape))


def same(call: Call) -> None:
    """Copies and casts keep their labels."""
    call.tracer.label(call.out, call.tracer.labels(call.args[0]))


def pad(call: Call) -> None:
    """Padding along the channel axis adds constants; along any other it keeps the channel."""
    x, amounts = call.args[:2]
    labels = call.tracer.labels(x)
    varying = varying_axes(labels)
    for position in range(len(amounts) // 2):
        axis = labels.ndim - 1 - position
        before, after = amounts[2 * position], amounts[2 * position + 1]
        if axis in varying:
            labels = torch.constant_pad_nd(labels, [*[0] * (2 * position), before, after], CONSTANT)
        elif before or after:
            shape = list(labels.shape)
            shape[axis] += before + after
            labels = labels.narrow(axis, 0, 1).expand(shape)
    call.tracer.label(call.out, labels)


def pooling(call: Call) -> None:
    """Pooling and resizing over the last two axes keep the channel."""
    out = call.out[0] if isinstance(call.out, tuple) else call.out
    labels = call.tracer.labels(call.args[0])
    if {labels.ndim - 1, labels.ndim - 2} & set(varying_axes(labels)):
        return unknown(call)
    call.tracer.label(out, labels[..., :1, :1].expand(out.shape))


def reduction(call: Call) -> None:
    """A mean or sum over space keeps the channel; over channels it pins them."""
    x, axes = call.args[0], call.args[1] if len(call.args) > 1 else None
    labels = call.tracer.labels(x)
    axes = sorted({axis % labels.ndim for axis in (axes or range(labels.ndim))}, reverse=True)
    if set(axes) & set(varying_axes(labels)):
        return unknown(call, "is reduced over its channels")
    keepdim = call.out.ndim == x.ndim
    for axis in axes:
        labels = labels.narrow(axis, 0, 1) if keepdim else labels.select(axis, 0)
    call.tracer.label(call.out, labels)


def statistics(call: Call) -> None:
    """Layer norm, group norm and softmax over channels: their statistics would change, so the channels are pinned."""
    out = call.out[0] if isinstance(call.out, tuple) else call.out
    labels, name = call.tracer.labels(call.args[0]), call.tracer.place(call.func)
    channel_axes = varying_axes(labels)
    call.tracer.book.pin(labels, f"its statistics are taken over channels by {name}")
    for tensor in call.tensors():
        view = call.tracer.parameter(tensor)
        if view is not None and channel_axes and tensor.ndim == 1 and len(tensor) == labels.shape[channel_axes[-1]]:
            call.tracer.use(view.name, 0, along(labels, channel_axes[-1]), "follow")
    call.tracer.label(out, labels)


def pointwise(call: Call) -> None:
    """Elementwise operations join the labels that meet, those of bare parameters included."""
    tracer, out = call.tracer, call.out
    if not isinstance(out, Tensor):
        return unknown(call)
    operands = [(t, tracer.labels(t)) for t in call.tensors() if t.ndim]
    spreads = [labels.expand(out.shape) for _, labels in operands]
    varying = sorted({axis for labels in spreads for axis in varying_axes(labels)})
    corner = tuple(slice(None) if axis in varying else 0 for axis in range(out.ndim))
    meeting = []
    for (tensor, labels), spreaded in zip(operands, spreads, strict=True):
        size = (1,) * (out.ndim - tensor.ndim) + tuple(tensor.shape)
        if any(size[axis] == 1 and out.shape[axis] > 1 for axis in varying):
            # Gone, it would take the whole product with it: one channel that meets many.
            tracer.book.pin(labels, f"is broadcast over other channels by {tracer.place(call.func)}")
        else:
            meeting.append(spreaded)
    for other in meeting[1:]:
        tracer.book.join(meeting[0][corner], other[corner])
    if meeting:
        tracer.label(out, meeting[0])


def unknown(call: Call, why: str = "has no rule") -> None:
    """No rule: every channel that arrives is pinned, what leaves is constant."""
    reason = f"operation {call.tracer.place(call.func)} {why}"
    for tensor in call.tensors():
        if call.tracer.is_activation(tensor):
            call.tracer.book.pin(call.tracer.labels(tensor), reason)
    call.tracer.unsupported.append(reason)


RULES: dict[Any, Rule] = {
    aten.convolution: convolution,
    aten.addmm: linear,
    aten.mm: linear,
    aten.native_batch_norm: batch_norm,
    aten._native_batch_norm_legit_no_training: batch_norm,
    aten.constant_pad_nd: pad,
    **dict.fromkeys((aten.view, aten._unsafe_view, aten.reshape), reshape),
    **dict.fromkeys((aten.clone, aten._to_copy, aten.detach, aten.alias, aten.lift_fresh, aten.contiguous), same),
    **dict.fromkeys(
        (aten.t, aten.transpose, aten.permute, aten.cat, aten.stack, aten.slice, aten.select, aten.expand, aten.roll,
         aten.unsqueeze, aten.squeeze, aten.flip, aten.unbind, aten.split, aten.split_with_sizes, aten.repeat),
        movement,
    ),
    **dict.fromkeys(
        (aten.max_pool2d_with_indices, aten.avg_pool2d, aten._adaptive_avg_pool2d, aten.adaptive_max_pool2d,
         aten.upsample_nearest2d, aten.upsample_bilinear2d),
        pooling,
    ),
    **dict.fromkeys((aten.mean, aten.sum, aten.amax, aten.amin), reduction),
    **dict.fromkeys((aten.native_layer_norm, aten.native_group_norm, aten._softmax), statistics),
    **dict.fromkeys((aten.hardswish, aten.hardswish_), pointwise),
}  # fmt: skip


def rule_for(func: Any) -> Rule:
    """The rule of an ATen overload: the table, else PyTorch's pointwise tag, else `unknown`."""
    rule = RULES.get(func.overloadpacket)
    if rule is None:
        rule = pointwise if torch.Tag.pointwise in func.tags else unknown
    return rule
