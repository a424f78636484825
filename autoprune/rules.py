"""How each operation moves labels: a table from ATen operation to a small function.

A rule returns None, or the reason why it can't tell what happens to the channels; then every channel that reaches the
operation is pinned. An operation without an entry that PyTorch tags as pointwise joins the labels that meet, any other
has no rule. `RULES[torch.ops.aten.my_op] = my_rule` teaches the tracer a new operation.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from autoprune.contractions import attention, batched_product, convolution, linear
from autoprune.errors import UserError
from autoprune.groups import loses_whole_conv_groups, tensors_in
from autoprune.labels import CONSTANT, Constraint, compressed, lines, spread, varying_axes
from autoprune.tracer import Call, Tracer

aten = torch.ops.aten
Rule = Callable[[Call], str | None]


def apply_rule(call: Call) -> Rule:
    """Applies the operation's rule, or pins what reaches it. Returns the rule."""
    rule = rule_for(call.func)
    failure = rule(call)
    if failure is not None:
        reason = f"operation {call.tracer.place(call.func)} {failure}"
        for tensor in call.tensors():
            if call.tracer.is_activation(tensor) or call.tracer.parameter(tensor) is not None:
                call.tracer.book.pin(call.tracer.labels(tensor), reason)
        call.tracer.unsupported.append(reason)
    return rule


def rule_for(func: Any) -> Rule:
    """The rule of an ATen overload: the table, else PyTorch's pointwise tag, else `unknown`."""
    rule = RULES.get(func.overloadpacket)
    if rule is None:
        rule = pointwise if torch.Tag.pointwise in func.tags else unknown
    return rule


def unknown(call: Call) -> str | None:
    """No rule: what leaves is constant."""
    return "has no rule"


def depends_on_values(call: Call) -> str | None:
    """The code reads an activation's values; another input could take another path."""
    if any(call.tracer.is_activation(tensor) for tensor in call.tensors()):
        raise UserError(
            f"model: its forward pass depends on the values of activations ({call.tracer.place(call.func)}), so one "
            "pass can't show what belongs together; trace a network without data-dependent control flow"
        )
    return None


def constant(call: Call) -> str | None:
    """A new tensor, or a constant written in place: labels stay as they are."""


def batch_norm(call: Call) -> str | None:
    """Batch norm follows its channels."""
    out, tracer = call.out[0], call.tracer
    channels = tracer.line(call.args[0], 1)
    for tensor in call.args[1:5]:
        tracer.use_vector(tensor, channels, "follow")
    tracer.label(out, spread(channels, 1, out.shape))


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
        pieces = moved if isinstance(call.out, Tensor) else [parts[position] for parts in moved]
        tracer.see(out, type(view)(view.name, view.shape, tuple(pieces)))


def split(call: Call) -> str | None:
    """Equal parts of the channel axis keep equally many channels; the code is trusted to compute its sizes."""
    movement(call)
    axis, outputs = call["dim"], tensors_in(call.out)
    labels = [call.tracer.labels(out) for out in outputs if call.tracer.is_activation(out)]
    if len(labels) > 1 and len({part.shape for part in labels}) == 1:
        if axis % labels[0].ndim in varying_axes(call.tracer.labels(call.args[0])):
            parts = compressed(torch.stack(labels)).reshape(len(labels), -1)
            call.tracer.book.constraints.append((Constraint.PARTS, parts))


def cut(call: Call) -> str | None:
    """`slice`: where the code cuts a channel axis, the cut has to move with what is left.

    A cut at a quarter needs equally many channels in every quarter, every second channel needs whole pairs. Whether the
    code computes the place from the width, as this takes for granted, the proof decides.
    """
    movement(call)
    tracer, x = call.tracer, call.args[0]
    axis, n = call["dim"] % x.ndim, x.shape[call["dim"]]
    if not tracer.is_activation(x) or call.out.shape == x.shape or axis not in varying_axes(tracer.labels(x)):
        return None
    start, end, _ = slice(call["start"], call["end"]).indices(n)
    step = call["step"]
    if n % step or (step > 1 and start >= step):
        return "cuts channels at uneven places"
    for line in lines(tracer.labels(x), axis):
        if step > 1:
            tracer.book.constraints.append((Constraint.GRID, line.view(-1, step)))
        else:
            tracer.book.constraints.append((Constraint.PARTS, line.view(-1, math.gcd(start, end, n))))
    return None


def reshape(call: Call) -> str | None:
    """`view` and its kin; labels with zero strides may need a copy, so they are reshaped."""
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
    """`as_strided_` to the same shape changes the layout in memory alone, as pooling does for channels-last tensors."""
    tracer, tensor = call.tracer, call.args[0]
    return None if tracer.labels(tensor).shape == call.out.shape else "regroups elements"


def shaped_alike(call: Call) -> str | None:
    """A new tensor of an activation's shape shrinks with it."""
    if call.tracer.is_activation(call.args[0]):
        call.tracer.label(call.out, call.tracer.labels(call.args[0]))


def blank(call: Call) -> str | None:
    """A buffer to be filled: its labels are memory of their own, of which slices are views as the tensor's are."""
    labels = torch.zeros(call.out.shape, dtype=torch.int64)
    call.tracer.blanks[labels.untyped_storage().data_ptr()] = labels
    call.tracer.label(call.out, labels)


def written(call: Call) -> str | None:
    """`copy_` fills a blank buffer with the source's labels; anything else it overwrites in place, and joins."""
    tracer, (target, source) = call.tracer, call.args[:2]
    labels = tracer.labels(target)
    if labels.untyped_storage().data_ptr() in tracer.blanks and not labels.any():
        labels.copy_(tracer.labels(source).expand(target.shape))
        return None
    return pointwise(call)


def indexed(call: Call) -> str | None:
    """Reading at constant positions is executed on the labels."""
    tracer, data = call.tracer, call.args[0]
    positions = [tensor for tensor in call.tensors() if tensor is not data and tracer.is_activation(tensor)]
    if any(tensor.dtype == torch.bool for tensor in positions):
        return depends_on_values(call)
    if positions:
        return "reads at positions that are computed"
    read = (lambda x: x[call.args[1]]) if call.func.overloadpacket is aten.embedding else (
        lambda x: call.func(x, *call.args[1:], **call.kwargs)
    )  # fmt: skip
    view = tracer.parameter(data)
    if view is not None:
        tracer.see(call.out, view.moved(read))
    else:
        tracer.label(call.out, read(tracer.labels(data)))


def concatenation(call: Call) -> str | None:
    """Tensors side by side on an axis without channels, such as tokens, have the same channels on every other axis."""
    tracer, tensors = call.tracer, call.args[0]
    labels = [tracer.labels(tensor) for tensor in tensors]
    if call.func.overloadpacket is aten.stack:
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


def spatial(call: Call) -> str | None:
    """Pooling, resizing and padding of the last axes keep the channel."""
    out = tensors_in(call.out)[0]
    labels = call.tracer.labels(call.args[0])
    n_spatial = (
        1 if "1d" in call.func.overloadpacket.__name__ else 3 if "3d" in call.func.overloadpacket.__name__ else 2
    )
    if set(range(labels.ndim - n_spatial, labels.ndim)) & set(varying_axes(labels)):
        return "works across channels as across space"
    corner = labels[(..., *[slice(0, 1)] * n_spatial)]
    call.tracer.label(out, corner.expand(out.shape))


def pixel_shuffle(call: Call) -> str | None:
    """The channels that become one channel's pixels go together."""
    tracer, shape = call.tracer, call.out.shape
    channels = tracer.line(call.args[0], -3 % len(shape)).view(shape[-3], -1)
    tracer.book.join(channels[:, :1].expand_as(channels), channels)
    tracer.label(call.out, spread(channels[:, 0], len(shape) - 3, shape))


def pixel_unshuffle(call: Call) -> str | None:
    """A channel's pixels become channels that go together."""
    shape = call.out.shape
    channels = call.tracer.line(call.args[0], -3 % len(shape))
    call.tracer.label(call.out, spread(channels.repeat_interleave(call.args[1] ** 2), len(shape) - 3, shape))


def channel_shuffle(call: Call) -> str | None:
    """The same positions go in every shuffled group."""
    channels = call.tracer.line(call.args[0], 1).view(call.args[1], -1)
    call.tracer.book.join_lines(channels)
    call.tracer.label(call.out, spread(channels.T.flatten(), 1, call.out.shape))


def gated_halves(call: Call) -> str | None:
    """`glu`: the first half of an axis times the sigmoid of the second."""
    first, second = call.tracer.labels(call.args[0]).chunk(2, call["dim"])
    call.tracer.book.join(first, second)
    call.tracer.label(call.out, first)


def reduction(call: Call) -> str | None:
    """A mean or sum over space keeps the channel; over channels it reads them, and leaves the rows of cells."""
    tracer, x = call.tracer, call.args[0]
    labels, axes = tracer.labels(x), reduced_axes(call)
    varying = varying_axes(labels)
    summed = [axis for axis in axes if axis in varying]
    if summed:
        tracer.book.pin(labels, _PRODUCT) if call.func.overloadpacket is aten.prod else None
        tracer.contracted.append(labels)
        labels = _rows(tracer, labels, [axis for axis in varying if axis not in axes])
    for out in tensors_in(call.out):
        left = labels.expand(x.shape)
        for axis in sorted(axes, reverse=True):
            left = left.narrow(axis, 0, 1) if out.ndim == x.ndim else left.select(axis, 0)
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


def _rows(tracer: Tracer, labels: Tensor, axes: list[int]) -> Tensor:
    """Labels that vary along `axes` alone: one for all the cells that share a position there."""
    if not axes:
        return torch.zeros([1] * labels.ndim, dtype=torch.int64)
    varying = varying_axes(labels)
    cells = compressed(labels)
    cells = cells.permute([varying.index(axis) for axis in [*axes, *(set(varying) - set(axes))]])
    rows = tracer.book.factor(cells.reshape(cells.shape[: len(axes)].numel(), -1))
    shape = [labels.shape[axis] if axis in axes else 1 for axis in range(labels.ndim)]
    return rows.view(cells.shape[: len(axes)]).view(shape)


def layer_norm(call: Call) -> str | None:
    """Statistics over channels: those of the pruned network are taken over the channels that are left."""
    tracer, labels = call.tracer, call.tracer.labels(call.args[0])
    first = labels.ndim - len(call["normalized_shape"])
    for name in ("weight", "bias") if call.func.overloadpacket is aten.native_layer_norm else ("weight",):
        view = tracer.parameter(call[name])
        for axis in varying_axes(labels) if view is not None else ():
            if axis >= first:
                line = _rows(tracer, labels, [axis]).flatten()
                tracer.use(view.name, axis - first, line, "follow")
    tracer.label(tensors_in(call.out)[0], labels)


def group_norm(call: Call) -> str | None:
    """As layer norm, over groups of channels that stay equal: whole norm groups go, or the same positions of each."""
    tracer, n_groups, shape = call.tracer, call["group"], call.args[0].shape
    channels = tracer.line(call.args[0], 1)
    rows = channels.view(n_groups, -1)
    # Without a weight nothing tells a pruned module how many norm groups are left.
    if call["weight"] is not None and loses_whole_conv_groups(shape[1], shape[1], n_groups):
        tracer.book.join(rows[:, :1].expand_as(rows), rows)
    else:
        tracer.book.join_lines(rows)
    for name in ("weight", "bias"):
        tracer.use_vector(call[name], channels, "follow")
    tracer.label(tensors_in(call.out)[0], spread(channels, 1, shape))


def along_axis(call: Call) -> str | None:
    """Softmax and running sums: shape and labels stay; over channels they see those that are left."""
    labels = call.tracer.labels(call.args[0])
    for out in tensors_in(call.out):
        call.tracer.label(out, labels)


def pointwise(call: Call) -> str | None:
    """Elementwise operations join the labels that meet, those of bare parameters included."""
    tracer, out = call.tracer, call.out
    if not isinstance(out, Tensor):
        return "has no rule"
    if not out.ndim and any(map(tracer.is_activation, call.tensors())):
        tracer.label(out, torch.zeros((), dtype=torch.int64))
        return None
    operands = [tensor for tensor in call.tensors() if tensor.ndim]
    if not any(tracer.is_activation(t) or tracer.parameter(t) is not None for t in operands):
        return None
    if not any(map(tracer.is_activation, operands)) and len(operands) == 1:
        tracer.label(out, tracer.labels(operands[0]))
        return None
    return _meet(call, operands, [tracer.labels(tensor).expand(out.shape) for tensor in operands])


def _meet(call: Call, operands: list[Tensor], spreads: list[Tensor]) -> str | None:
    """All operands meet the one that tells most channels apart."""
    tracer, n_axes = call.tracer, call.out.ndim
    axes = [varying_axes(labels) for labels in spreads]
    main = max(range(len(operands)), key=lambda i: (tracer.is_activation(operands[i]), len(axes[i])))
    for i in range(len(operands)):
        if i == main:
            continue
        if not axes[i] and tracer.is_activation(operands[i]):
            # Gone, it would take the whole product with it: one channel that meets many.
            tracer.book.pin(spreads[i], f"is broadcast over other channels by {tracer.place(call.func)}")
            continue
        sizes = (1,) * (n_axes - operands[i].ndim) + tuple(operands[i].shape)
        met = axes[i] or [axis for axis in axes[main] if sizes[axis] > 1]
        if set(axes[main]) <= set(met):
            _join_at(tracer, spreads[main], spreads[i], met)
        elif set(met) <= set(axes[main]):
            _join_at(tracer, _rows(tracer, spreads[main], met).expand(call.out.shape), spreads[i], met)
        else:
            return "crosses channels with channels"
    tracer.label(call.out, spreads[main])
    return None


def _join_at(tracer: Tracer, a: Tensor, b: Tensor, axes: list[int]) -> None:
    corner = tuple(slice(None) if axis in axes else 0 for axis in range(a.ndim))
    tracer.book.join(a[corner], b[corner])


_PRODUCT = "is multiplied over its channels"
RULES: dict[Any, Rule] = {
    aten.convolution: convolution,
    **dict.fromkeys((aten.addmm, aten.mm), linear),
    **dict.fromkeys((aten.bmm, aten.baddbmm), batched_product),
    aten._scaled_dot_product_flash_attention_for_cpu: attention,
    **dict.fromkeys((aten.native_batch_norm, aten._native_batch_norm_legit_no_training), batch_norm),
    **dict.fromkeys((aten.native_layer_norm, aten._fused_rms_norm), layer_norm),
    aten.native_group_norm: group_norm,
    **dict.fromkeys((aten._softmax, aten._log_softmax, aten.cumsum), along_axis),
    aten.constant_pad_nd: pad,
    **dict.fromkeys((aten.view, aten._unsafe_view, aten.reshape), reshape),
    **dict.fromkeys(
        (aten.clone, aten._to_copy, aten.detach, aten.alias, aten.lift_fresh, aten.contiguous), same
    ),
    **dict.fromkeys((aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like), shaped_alike),
    **dict.fromkeys(
        (aten.t, aten.transpose, aten.permute, aten.select, aten.expand, aten.roll, aten.unsqueeze,
         aten.squeeze, aten.flip, aten.unbind, aten.repeat, aten.unfold, aten.diagonal),
        movement,
    ),
    aten.slice: cut,
    **dict.fromkeys((aten.split, aten.split_with_sizes), split),
    **dict.fromkeys((aten.cat, aten.stack), concatenation),
    **dict.fromkeys((aten.index, aten.index_select, aten.gather, aten.embedding), indexed),
    **dict.fromkeys(
        (aten.max_pool2d_with_indices, aten.avg_pool2d, aten._adaptive_avg_pool2d, aten.adaptive_max_pool2d,
         aten.max_pool3d_with_indices, aten.avg_pool3d, aten._adaptive_avg_pool3d,
         aten.upsample_nearest1d, aten.upsample_linear1d, aten.upsample_nearest2d, aten.upsample_bilinear2d,
         aten.upsample_bicubic2d, aten._upsample_nearest_exact2d, aten._upsample_bilinear2d_aa,
         aten._upsample_bicubic2d_aa, aten.upsample_nearest3d, aten.reflection_pad1d, aten.reflection_pad2d,
         aten.replication_pad2d),
        spatial,
    ),
    aten.as_strided_: restrided,
    aten.pixel_shuffle: pixel_shuffle,
    aten.pixel_unshuffle: pixel_unshuffle,
    **dict.fromkeys((aten.channel_shuffle, aten.native_channel_shuffle), channel_shuffle),
    aten.glu: gated_halves,
    **dict.fromkeys(
        (aten.mean, aten.sum, aten.amax, aten.amin, aten.max, aten.min, aten.var, aten.std, aten.var_mean,
         aten.logsumexp, aten.linalg_vector_norm, aten.norm),
        reduction,
    ),
    **dict.fromkeys((aten.hardswish, aten.hardswish_, aten._prelu_kernel), pointwise),
    aten.new_empty: blank,
    aten.copy_: written,
    **dict.fromkeys((aten.new_zeros, aten.new_ones, aten.new_full, aten.zero_, aten.fill_), constant),
    **dict.fromkeys(
        (aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select,
         aten._unique2),
        depends_on_values,
    ),
}  # fmt: skip
