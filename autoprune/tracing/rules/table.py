"""How each operation moves labels: a table from ATen operation to a small function.

A rule returns None, or the reason why it can't tell what happens to the channels; then
every channel that reaches the operation is pinned. An operation without an entry that
PyTorch tags as pointwise joins the labels that meet, any other has no rule.
`RULES[torch.ops.aten.my_op] = my_rule` teaches the tracer a new operation.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from autoprune.structure.labels import at_origin, varying_axes
from autoprune.tracing.rules.contractions import (
    attention,
    batched_product,
    convolution,
    linear,
)
from autoprune.tracing.rules.movements import (
    blank,
    channel_shuffle,
    concatenation,
    constant,
    cut,
    gated_halves,
    indexed,
    movement,
    pad,
    pixel_shuffle,
    pixel_unshuffle,
    reshape,
    restrided,
    rolled,
    same,
    shaped_alike,
    spatial,
    split,
)
from autoprune.tracing.rules.norms import (
    along_axis,
    batch_norm,
    group_norm,
    layer_norm,
    reduction,
    rows_of,
)
from autoprune.tracing.tracer import Call

aten = torch.ops.aten
Rule = Callable[[Call], str | None]


def apply_rule(call: Call) -> Rule:
    """Applies the operation's rule, or pins what reaches it. Returns the rule."""
    rule = rule_for(call.func)
    failure = rule(call)
    if failure is not None:
        reason = f"operation {call.tracer.place(call.func)} {failure}"
        for tensor in call.tensors():
            if (
                call.tracer.is_activation(tensor)
                or call.tracer.parameter(tensor) is not None
            ):
                call.tracer.book.pin(call.tracer.labels(tensor), reason)
        call.tracer.unsupported.append(reason)
    return rule


def rule_for(func: Any) -> Rule:
    """The rule of an ATen overload: the table, else PyTorch's pointwise tag, else
    `unknown`.
    """
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
        call.refuse()


def pointwise(call: Call) -> str | None:
    """Elementwise operations join the labels that meet, those of bare parameters
    included.
    """
    tracer, out = call.tracer, call.out
    if not isinstance(out, Tensor):
        return "has no rule"
    if not out.ndim and any(map(tracer.is_activation, call.tensors())):
        tracer.label(out, torch.zeros((), dtype=torch.int64))
        return None
    operands = [tensor for tensor in call.tensors() if tensor.ndim]
    if not any(
        tracer.is_activation(t) or tracer.parameter(t) is not None for t in operands
    ):
        return None
    if not any(map(tracer.is_activation, operands)) and len(operands) == 1:
        tracer.label(out, tracer.labels(operands[0]))
        return None
    return _meet(
        call, operands, [tracer.labels(tensor).expand(out.shape) for tensor in operands]
    )


def _meet(call: Call, operands: list[Tensor], spreads: list[Tensor]) -> str | None:
    """All operands meet the one that tells most channels apart."""
    tracer, n_axes = call.tracer, call.out.ndim
    axes = [varying_axes(labels) for labels in spreads]
    main = max(
        range(len(operands)),
        key=lambda i: (tracer.is_activation(operands[i]), len(axes[i])),
    )
    for i in range(len(operands)):
        if i == main:
            continue
        if not axes[i] and tracer.is_activation(operands[i]):
            # Gone, it would take the whole product with it: one channel that meets
            # many.
            tracer.book.pin(
                spreads[i],
                f"is broadcast over other channels by {tracer.place(call.func)}",
            )
            continue
        sizes = (1,) * (n_axes - operands[i].ndim) + tuple(operands[i].shape)
        met = axes[i] or [axis for axis in axes[main] if sizes[axis] > 1]
        if set(axes[main]) <= set(met):
            tracer.book.join(at_origin(spreads[main], met), at_origin(spreads[i], met))
        elif set(met) <= set(axes[main]):
            rows = rows_of(tracer, spreads[main], met).expand(call.out.shape)
            tracer.book.join(at_origin(rows, met), at_origin(spreads[i], met))
        else:
            return "crosses channels with channels"
    tracer.label(call.out, spreads[main])
    return None


def written(call: Call) -> str | None:
    """`copy_` fills a blank buffer with the source's labels; anything else it
    overwrites in place, and joins.
    """
    tracer, (target, source) = call.tracer, call.args[:2]
    labels = tracer.labels(target)
    if labels.untyped_storage().data_ptr() in tracer.blanks and not labels.any():
        labels.copy_(tracer.labels(source).expand(target.shape))
        return None
    return pointwise(call)


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
        (aten.t, aten.transpose, aten.permute, aten.select, aten.expand, aten.unsqueeze,
         aten.squeeze, aten.flip, aten.unbind, aten.repeat, aten.unfold, aten.diagonal),
        movement,
    ),
    aten.slice: cut,
    aten.roll: rolled,
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
