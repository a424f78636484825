"""How each operation moves labels: a table from ATen operation to a small function.

A rule returns None, or the reason why it can't tell what happens to the channels; then
every channel that reaches the operation is pinned. An operation without an entry that
PyTorch tags as pointwise joins the labels that meet, any other has no rule.

`RULES` is where a new operation is taught to the tracer; its description, at the end of
this module, says how.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch._ops import OpOverload

from autoprune.tracing.calls import Call
from autoprune.tracing.rules.along_axes import (
    along,
    distances,
    overlapping_windows,
    position_of,
    sampling,
    spatial,
    triangle,
    windows,
    writing,
)
from autoprune.tracing.rules.contractions import (
    attention,
    batched_product,
    embedding,
    linear,
    vector_product,
    weight_norm,
)
from autoprune.tracing.rules.convolutions import convolution, deformable_convolution
from autoprune.tracing.rules.movements import (
    addressing,
    channel_shuffle,
    concatenation,
    constant,
    copy,
    gated_halves,
    indexing,
    movement,
    new_buffer,
    new_like,
    pad,
    pixel_shuffle,
    pixel_unshuffle,
    reshape,
    restride,
    roll,
    slicing,
    split,
)
from autoprune.tracing.rules.norms import (
    axis_scan,
    batch_norm,
    class_loss,
    group_norm,
    layer_norm,
    loss,
    reduction,
)
from autoprune.tracing.rules.parameters import (
    combine,
    contract_vector,
    fill_border,
    normalise_weight,
    rescale,
    standardise,
    summarise,
)
from autoprune.tracing.rules.pointwise import (
    in_place_copy,
    pointwise,
    pointwise_with_buffer,
)
from autoprune.tracing.rules.recurrent import cell, packing, recurrent

aten = torch.ops.aten
Rule: TypeAlias = Callable[[Call], str | None]
"""From an executed operation to None, or to why its channels can't be told."""


def apply_rule(call: Call) -> Rule:
    """Applies the operation's rule, or pins what reaches it; returns the rule."""
    tracer = call.tracer
    rule = rule_for(call.func)
    has_activation = any(map(tracer.is_activation, call.tensors()))
    failure = rule(call) if has_activation else PARAMETER_RULES.get(rule, rule)(call)
    if failure is None:
        return rule
    reason = f"operation {tracer.locate(call.func)} {failure}"
    for tensor in call.tensors():
        if tracer.is_activation(tensor):
            tracer.book.pin(tracer.labels(tensor), reason)
        # By their axes, since a label for each element of a weight takes minutes.
        for labels in tracer.label_axes(tensor):
            tracer.book.pin(labels, reason)
    tracer.unsupported.append(reason)
    return rule


def rule_for(func: OpOverload) -> Rule:
    """The rule of an ATen overload.

    It is the one in the table, else PyTorch's pointwise tag decides, else `unknown`.
    All overloads of an operation have one rule.
    """
    rule = RULES.get(func.overloadpacket) or FOREIGN_RULES.get(func._schema.name)
    if rule is None:
        rule = pointwise if torch.Tag.pointwise in func.tags else unknown
    return rule


def unknown(call: Call) -> str | None:
    """No rule: what leaves is constant."""
    return "has no rule"


def value_read(call: Call) -> str | None:
    """The code reads an activation's values; another input could take another path."""
    if any(call.tracer.is_activation(tensor) for tensor in call.tensors()):
        call.refuse()
    return None


RULES: dict[Any, Rule] = {
    # Products. A weight hands out new labels.
    aten.mv: vector_product,
    aten.dot: vector_product,
    aten.vdot: vector_product,
    aten.convolution: convolution,
    aten.addmm: linear,
    aten.mm: linear,
    aten.bmm: batched_product,
    aten.baddbmm: batched_product,
    aten._scaled_dot_product_flash_attention_for_cpu: attention,
    # Recurrent layers, each as a whole; see `recurrent.WHOLE`.
    **dict.fromkeys((aten.gru, aten.lstm, aten.rnn_tanh, aten.rnn_relu), recurrent),
    aten.gru_cell: cell,
    aten.lstm_cell: cell,
    aten.rnn_tanh_cell: cell,
    aten.rnn_relu_cell: cell,
    aten._pack_padded_sequence: packing,
    aten._pad_packed_sequence: packing,
    # Norms and what else reads along an axis without changing the shape.
    aten.native_batch_norm: batch_norm,
    aten._native_batch_norm_legit_no_training: batch_norm,
    aten._weight_norm_interface: weight_norm,
    aten.native_layer_norm: layer_norm,
    aten._fused_rms_norm: layer_norm,
    aten.native_group_norm: group_norm,
    aten._softmax: axis_scan,
    aten._log_softmax: axis_scan,
    aten._safe_softmax: axis_scan,
    aten.cumsum: axis_scan,
    aten.cumprod: axis_scan,
    aten.logcumsumexp: axis_scan,
    # Movements of data.
    aten.constant_pad_nd: pad,
    aten.view: reshape,
    aten._unsafe_view: reshape,
    aten.reshape: reshape,
    aten.clone: copy,
    aten._to_copy: copy,
    aten.detach: copy,
    aten.alias: copy,
    aten.lift_fresh: copy,
    aten.contiguous: copy,
    # In the shape of an activation, with its labels.
    aten.zeros_like: new_like,
    aten.ones_like: new_like,
    aten.full_like: new_like,
    aten.empty_like: new_like,
    aten.t: movement,
    aten.transpose: movement,
    aten.permute: movement,
    aten.select: movement,
    aten.expand: movement,
    aten.unsqueeze: movement,
    aten.squeeze: movement,
    aten.flip: movement,
    aten.rot90: movement,
    aten.unbind: movement,
    aten.repeat: movement,
    aten.unfold: movement,
    aten.diagonal: movement,
    aten.slice: slicing,
    aten.roll: roll,
    aten.split: split,
    aten.split_with_sizes: split,
    aten.cat: concatenation,
    aten.stack: concatenation,
    aten.index: indexing,
    aten.index_select: indexing,
    aten.gather: indexing,
    aten.embedding: embedding,
    # Operations on the last one to three axes, over which channels may not lie.
    aten.max_pool2d_with_indices: spatial,
    aten.avg_pool2d: spatial,
    aten._adaptive_avg_pool2d: spatial,
    aten.adaptive_max_pool2d: spatial,
    aten.max_pool3d_with_indices: spatial,
    aten.avg_pool3d: spatial,
    aten._adaptive_avg_pool3d: spatial,
    aten.upsample_nearest1d: spatial,
    aten.upsample_linear1d: spatial,
    aten.upsample_nearest2d: spatial,
    aten.upsample_bilinear2d: spatial,
    aten.upsample_bicubic2d: spatial,
    aten._upsample_nearest_exact2d: spatial,
    aten._upsample_bilinear2d_aa: spatial,
    aten._upsample_bicubic2d_aa: spatial,
    aten.upsample_nearest3d: spatial,
    aten.upsample_trilinear3d: spatial,
    aten._upsample_nearest_exact1d: spatial,
    aten._upsample_nearest_exact3d: spatial,
    aten.reflection_pad1d: spatial,
    aten.reflection_pad2d: spatial,
    aten.reflection_pad3d: spatial,
    aten.replication_pad1d: spatial,
    aten.replication_pad2d: spatial,
    aten.replication_pad3d: spatial,
    aten.adaptive_max_pool3d: spatial,
    aten.fractional_max_pool2d: spatial,
    aten.fractional_max_pool3d: spatial,
    aten.max_unpool2d: spatial,
    aten.max_unpool3d: spatial,
    aten.grid_sampler_2d: sampling,
    aten.grid_sampler_3d: sampling,
    # Operations along axes that they name, over which channels may not lie.
    **dict.fromkeys((aten.sort, aten.topk, aten.cummax, aten.cummin), along),
    **dict.fromkeys((aten._fft_r2c, aten._fft_c2c, aten._fft_c2r), along),
    aten.argmax: position_of,
    aten.argmin: position_of,
    aten.tril: triangle,
    aten.triu: triangle,
    aten.scatter: addressing,
    aten.scatter_add: addressing,
    aten.index_add: addressing,
    aten.index_put: writing,
    aten.index_put_: writing,
    aten.im2col: windows,
    aten.col2im: overlapping_windows,
    aten._cdist_forward: distances,
    # `cdist` of more than 25 rows takes this one.
    aten._euclidean_dist: distances,
    # Regroupings between channels and pixels, and of channels.
    aten.as_strided_: restride,
    aten.pixel_shuffle: pixel_shuffle,
    aten.pixel_unshuffle: pixel_unshuffle,
    aten.channel_shuffle: channel_shuffle,
    aten.native_channel_shuffle: channel_shuffle,
    aten.glu: gated_halves,
    # Reductions, whatever they compute of the values they reduce.
    aten.mean: reduction,
    aten.sum: reduction,
    aten.amax: reduction,
    aten.amin: reduction,
    aten.max: reduction,
    aten.min: reduction,
    aten.var: reduction,
    aten.std: reduction,
    aten.var_mean: reduction,
    aten.logsumexp: reduction,
    aten.linalg_vector_norm: reduction,
    aten.norm: reduction,
    aten.std_mean: reduction,
    aten.prod: reduction,
    aten.any: reduction,
    aten.all: reduction,
    aten.aminmax: reduction,
    aten.median: reduction,
    aten.kthvalue: reduction,
    aten.mode: reduction,
    # PyTorch forgot to tag these as pointwise.
    aten.hardswish: pointwise,
    aten.hardswish_: pointwise,
    aten._prelu_kernel: pointwise,
    # Losses, in networks that are given targets.
    aten.nll_loss_forward: class_loss,
    aten.nll_loss2d_forward: class_loss,
    aten.mse_loss: loss,
    aten.smooth_l1_loss: loss,
    aten.huber_loss: loss,
    aten.soft_margin_loss: loss,
    aten.binary_cross_entropy: loss,
    aten.binary_cross_entropy_with_logits: loss,
    aten.log_sigmoid_forward: pointwise_with_buffer,
    # Random numbers, by an activation's shape or its values.
    aten.rand_like: new_like,
    aten.randn_like: new_like,
    aten.randint_like: new_like,
    aten.bernoulli: new_like,
    aten.normal: pointwise,
    aten.poisson: pointwise,
    aten.binomial: pointwise,
    aten._standard_gamma: pointwise,
    aten.rrelu_with_noise: pointwise,
    aten.rrelu_with_noise_: pointwise,
    aten.native_dropout: axis_scan,
    # And those that overwrite what was there.
    aten.bernoulli_: constant,
    aten.cauchy_: constant,
    aten.exponential_: constant,
    aten.geometric_: constant,
    aten.log_normal_: constant,
    aten.normal_: constant,
    aten.random_: constant,
    aten.uniform_: constant,
    # Buffers and constants that the code makes.
    aten.new_empty: new_buffer,
    aten.copy_: in_place_copy,
    aten.new_zeros: constant,
    aten.new_ones: constant,
    aten.new_full: constant,
    aten.zero_: constant,
    aten.fill_: constant,
    # What the code can branch on, or what has as many elements as values say.
    aten._local_scalar_dense: value_read,
    aten.is_nonzero: value_read,
    aten.equal: value_read,
    aten.nonzero: value_read,
    aten.masked_select: value_read,
    aten._unique2: value_read,
}
"""ATen operation to its rule; the one place where an operation is added.

For an operation that PyTorch lists as `aten::renorm`, say:

    from autoprune.tracing.rules.table import RULES


    def channel_by_channel(call):
        call.tracer.label(call.out, call.tracer.labels(call.args[0]))


    RULES[torch.ops.aten.renorm] = channel_by_channel

The key is the operation without its overload, since one rule serves all of them. The
rule gets an `autoprune.tracing.calls.Call`: arguments by position, `call.args[0]`, or
by the schema's names, `call["dim"]`; the result in `call.out`. With `call.tracer` it

- reads the labels of a tensor, `labels`, or those along one axis, `unify_axis`;
- gives every tensor that leaves its labels, of the same shape, `label`;
- joins channels that can only go together, `book.join`.

It returns None, or why it can't tell, as the end of a sentence: "regroups elements". An
entry has to be made before `trace` runs, and holds for the whole process. An existing
rule may fit: `movement` for whatever only moves elements, `spatial`, `along`,
`reduction`, `axis_scan` and `pointwise`.
"""

FOREIGN_RULES: dict[str, Rule] = {
    "torchvision::deform_conv2d": deformable_convolution,
}
"""The same for other libraries' operations, by name, so that none is imported here."""

PARAMETER_RULES: dict[Rule, Rule] = {
    pointwise: combine,
    in_place_copy: combine,
    reduction: summarise,
    axis_scan: rescale,
    layer_norm: rescale,
    batch_norm: standardise,
    weight_norm: normalise_weight,
    vector_product: contract_vector,
    pad: fill_border,
}
"""Rule to what stands in for it where no activation is among its operands."""
