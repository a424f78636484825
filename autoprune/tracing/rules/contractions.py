"""Rules of the operations that multiply and sum, but for convolutions.

These are linear layers, products of activations and attention. A weight hands out new
labels for what it produces; a product of two activations joins the channels that it
sums over.
"""

import torch
from torch import Tensor

from autoprune.structure.groups import AxisPart, Layer
from autoprune.structure.labels import (
    CONSTANT,
    broadcast_labels,
    compress,
    varying_axes,
)
from autoprune.tracing.calls import Call
from autoprune.tracing.parameter_views import ParameterView
from autoprune.tracing.rules.movements import indexing
from autoprune.tracing.tracer import Tracer

CROSSED = "multiplies channels with channels"
NO_CHANNEL = torch.tensor([CONSTANT])
"""What is computed whatever is pruned."""


def linear(call: Call) -> str | None:
    """`mm(x, weight)` and `addmm(bias, x, weight)`.

    `nn.Linear` arrives as `addmm` with its weight transposed, `(n_in, n_out)`. Code may
    also put a parameter first, `mm(weight, x)`, which computes the columns of `x`.
    """
    tracer = call.tracer
    bias = call.args[0] if len(call.args) == 3 else None
    first, second = call.args[-2:]
    first_view = tracer.parameter(first)
    second_view = tracer.parameter(second)
    # `addmm` can scale its terms; no layer does.
    if call.kwargs or (bias is not None and second_view is None):
        tracer.products.append((NO_CHANNEL, first.numel() * second.shape[1]))
        return "scales or adds to a product"
    if second_view is not None:
        # (n, n_in) @ (n_in, n_out)
        return _apply_weight(
            call, first, second_view, x_axis=1, in_axis=0, out_axis=1, bias=bias
        )
    if first_view is not None:
        # (n_out, n_in) @ (n_in, n)
        return _apply_weight(
            call, second, first_view, x_axis=0, in_axis=1, out_axis=0, bias=bias
        )
    return _product(call, first.unsqueeze(0), second.unsqueeze(0))


def _apply_weight(
    call: Call,
    x: Tensor,
    weight: ParameterView,
    *,
    x_axis: int,
    in_axis: int,
    out_axis: int,
    bias: Tensor | None = None,
) -> str | None:
    """A linear layer: sums over one axis of an activation and one of a weight.

    Args:
        call: The product.
        x: The activation.
        weight: The parameter behind the other operand.
        x_axis: The axis of `x` that is summed over.
        in_axis: That of the weight, as it enters the product.
        out_axis: The weight's other one; the output's channels lie on the same axis.
        bias: What is added to the product.
    """
    tracer = call.tracer
    consumed = weight.axis_part(in_axis)
    produced = weight.axis_part(out_axis)
    positions = x.numel() // x.shape[x_axis]
    if consumed is None or produced is None or consumed[0] == produced[0]:
        # Every element of the view is used once at each position.
        n_products = x.numel() * call.out.shape[out_axis]
        tracer.products.append((NO_CHANNEL, n_products))
        return "regroups the elements of its weight"
    outputs = tracer.new_output_labels(weight.name, call.out.shape[out_axis])
    inputs = tracer.unify_axis(x, x_axis)
    parts = []
    for (axis, part), labels, role in (
        (consumed, inputs, "consume"),
        (produced, outputs, "produce"),
    ):
        tracer.use(weight.name, axis, labels, role, part)
        if part is not None:
            parts.append(AxisPart(axis, part))
    tracer.use_vector(bias, outputs, "produce")
    layer = Layer(weight.name, "linear", positions, parts=tuple(parts))
    tracer.layers.append(layer)
    tracer.label(call.out, broadcast_labels(outputs, out_axis, call.out.shape))
    return None


def embedding(call: Call) -> str | None:
    """A table whose rows are looked up: its columns are the channels that it makes.

    Which rows are read depends on the example, so they are nobody's channels.
    """
    tracer = call.tracer
    view = tracer.parameter(call["weight"])
    is_computed = tracer.is_activation(call["indices"])
    if is_computed or view is None or view.original_axis(1) != 1:
        return indexing(call)
    outputs = tracer.new_output_labels(view.name, view.shape[1])
    tracer.use(view.name, 1, outputs, "produce")
    tracer.label(call.out, broadcast_labels(outputs, call.out.ndim - 1, call.out.shape))
    return None


def batched_product(call: Call) -> str | None:
    """`bmm(a, b)` and `baddbmm(c, a, b)`."""
    tracer = call.tracer
    a, b = call.args[-2:]
    has_addend = len(call.args) > 2
    a_view = tracer.parameter(a)
    b_view = tracer.parameter(b)
    if a_view is None and b_view is None:
        failure = _product(call, a, b)
        if failure is None and has_addend:
            # A bias that is added to the logits meets the product's channels.
            addend = tracer.labels(call.args[0]).expand(call.out.shape)
            tracer.book.join(addend, tracer.labels(call.out))
        return failure
    if has_addend:
        tracer.products.append((NO_CHANNEL, call.out.numel() * a.shape[2]))
        return "adds to a product with a weight"
    a_view = None if a_view is None else _same_for_all(a_view)
    b_view = None if b_view is None else _same_for_all(b_view)
    if a_view is None and b_view is None:
        return _apply_table(call, a, b)
    if a_view is not None:
        # (batch, n_out, n_in) @ (batch, n_in, n)
        return _apply_weight(call, b, a_view, x_axis=1, in_axis=2, out_axis=1)
    assert b_view is not None, "one of the two is a parameter"
    # (batch, n, n_in) @ (batch, n_in, n_out)
    return _apply_weight(call, a, b_view, x_axis=2, in_axis=1, out_axis=2)


def _same_for_all(view: ParameterView) -> ParameterView | None:
    """One entry's part of a view `(batch, n, m)`, or None where entries differ."""
    if 0 in view.varying_dims:
        return None
    return view.apply(lambda index: index.narrow(0, 0, 1))


def _apply_table(call: Call, a: Tensor, b: Tensor) -> str | None:
    """A parameter with a matrix for each entry of the batch: relative positions, say.

    Queries `(n_rows, n, k)` times a table `(n_rows, k, m)` of a vector for each pair of
    rows: where `k` is the width of a head, the vectors lose the same places; what comes
    out has a value for each head, which goes when the head does.

    Args:
        call: The product.
        a: Its first operand, `(batch, n, k)`.
        b: Its second one, `(batch, k, m)`.
    """
    tracer = call.tracer
    x = tracer.labels(a)
    table = tracer.labels(b)
    is_swapped = tracer.parameter(a) is not None
    if is_swapped:
        if tracer.parameter(b) is not None:
            return "has a weight for each entry of the batch"
        x, table = table.transpose(1, 2), x.transpose(1, 2)
    varying = varying_axes(x)
    met_axes = [axis for axis in varying if axis != 1]
    if met_axes:
        # The activation's axes 0 and 2 are the table's 0 and 1.
        met = tracer.book.row_labels(x, met_axes).expand(x.shape)[:, 0, :, None]
        tracer.book.join(met.expand(table.shape), table)
    if 2 in varying:
        tracer.summed_labels.append(x)
    # What comes out is there for the rows of what was summed over.
    out_axes = [axis for axis in varying if axis != 2]
    shape = (*x.shape[:2], table.shape[2])
    out = tracer.book.row_labels(x, out_axes)[:, :, :1].expand(shape)
    tracer.label(call.out, out.transpose(1, 2) if is_swapped else out)
    cells = compress(x)
    n_products = x.numel() * table.shape[2]
    tracer.products.append((cells, n_products // cells.numel()))
    return None


def _product(call: Call, a: Tensor, b: Tensor) -> str | None:
    """A product of two activations.

    Args:
        call: `mm`, `bmm` or `baddbmm`; its last two arguments are the operands.
        a: The first operand, with a batch axis.
        b: The second one, with a batch axis.
    """
    tracer = call.tracer
    first, second = call.args[-2:]
    a_labels = tracer.labels(first).reshape(a.shape)
    b_labels = tracer.labels(second).reshape(b.shape)
    out = product(tracer, a_labels, b_labels)
    if out is None:
        return CROSSED
    # Two constants make a constant, which carries no labels.
    if tracer.is_activation(first) or tracer.is_activation(second):
        tracer.label(call.out, out.reshape(call.out.shape))
    return None


def product(tracer: Tracer, a: Tensor, b: Tensor) -> Tensor | None:
    """Labels of a batched product of two activations.

    Channels on the summed axis meet; what is left of them is their row, an attention
    head for instance. Channels on `n` or `m` pass; those on the batch axis gate them.

    Queries times keys, for example, with two heads of three channels on the batch axis
    and the summed one: `a` is `(2, n, 3)` with cells `[[1, 2, 3], [4, 5, 6]]` along
    axes 0 and 2; they join the keys' 7 to 12, one by one. The logits `(2, n, m)` carry
    one label for each head, 13 and 14, which go when the whole of a head does. Logits
    times values: label 13 gates the first head's values, 14 the second's, which pass.

    Args:
        tracer: The notebook of the run.
        a: Labels of the first operand, `(batch, n, k)`.
        b: Labels of the second one, `(batch, k, m)`.

    Returns:
        Labels `(batch, n, m)`, or None where none describe the product.
    """
    shape = torch.Size((a.shape[0], a.shape[1], b.shape[2]))
    a_axes = varying_axes(a)
    b_axes = varying_axes(b)
    is_summed = 2 in a_axes or 1 in b_axes
    # Channels on the outer axis, n or m, of either operand.
    a_passes = 1 in a_axes
    b_passes = 2 in b_axes
    out: Tensor | None
    if (is_summed and (a_passes or b_passes)) or (a_passes and b_passes):
        cells = NO_CHANNEL
        out = None
    elif is_summed:
        cells, out = _sum_channels(tracer, a, b, 0 in a_axes, 0 in b_axes)
    elif b_passes:
        cells, out = _pass_channels(
            tracer, b.narrow(1, 0, 1), a[:, 0, 0], 2, 0 in b_axes, 0 in a_axes
        )
    elif a_passes:
        cells, out = _pass_channels(
            tracer, a.narrow(2, 0, 1), b[:, 0, 0], 1, 0 in a_axes, 0 in b_axes
        )
    else:
        # Channels lie on the batch axis, if on any: the operands' are the same.
        cells = a[:, 0, 0]
        gated = b[:, :1, :1]
        tracer.book.join(gated[:, 0, 0], cells)
        out = gated
    n_products = shape.numel() * a.shape[2]
    tracer.products.append((cells, n_products // cells.numel()))
    return None if out is None else out.expand(shape)


def _sum_channels(
    tracer: Tracer, a: Tensor, b: Tensor, is_a_batched: bool, is_b_batched: bool
) -> tuple[Tensor, Tensor]:
    """Channels lie on the summed axis, and on the batch axis at most.

    Args:
        tracer: The notebook of the run.
        a: Labels of the first operand.
        b: Labels of the second one.
        is_a_batched: Whether channels of the first lie on the batch axis too, as heads
            do.
        is_b_batched: Whether channels of the second do.

    Returns:
        The channels that are multiplied, and the product's labels, to be expanded.
    """
    cells = a[:, 0, :]
    others = b[:, :, 0]
    if is_b_batched and not is_a_batched:
        cells, others = others, cells
    tracer.summed_labels.append(cells)
    if not (is_a_batched or is_b_batched):
        tracer.book.join(cells, others)
        # The sum over all channels is there whichever of them are left.
        return cells[0], torch.zeros((1, 1, 1), dtype=torch.int64)
    heads = tracer.book.factor(cells)
    if is_a_batched != is_b_batched:
        # One key for all heads: its channels are the places of each head's width.
        tracer.book.join(tracer.book.factor(cells.T), others[0])
        tracer.summed_labels.append(others[0])
    else:
        tracer.book.join(cells, others)
    return cells, heads[:, None, None]


def _pass_channels(
    tracer: Tracer,
    passing: Tensor,
    gate: Tensor,
    outer_axis: int,
    is_batched: bool,
    is_gate_batched: bool,
) -> tuple[Tensor, Tensor]:
    """Channels of one operand lie on its outer axis, and so on the product's.

    Args:
        tracer: The notebook of the run.
        passing: Labels of that operand, its summed axis of length 1.
        gate: Labels of the other one along the batch axis.
        outer_axis: The axis on which channels lie, 1 or 2.
        is_batched: Whether the passing channels lie on the batch axis too.
        is_gate_batched: Whether the gate's do.

    Returns:
        The channels that are multiplied, and the product's labels.
    """
    cells = passing.squeeze(3 - outer_axis)
    if is_batched:
        # A gate that goes takes its row of cells with it, and the other way round.
        tracer.book.join(tracer.book.factor(cells), gate)
        return cells, passing
    if is_gate_batched:
        # One value for all heads: what comes out has a cell for each head and channel.
        cells = tracer.book.cross(gate, cells[0])
        return cells, cells.unsqueeze(3 - outer_axis)
    return cells[0], passing


def attention(call: Call) -> str | None:
    """Scaled dot-product attention.

    It is the product with the keys, softmax, which keeps labels, and the product with
    the values.
    """
    tracer = call.tracer
    out = call.out[0]
    query = _merge_heads(tracer.labels(call["query"]), out.shape)
    key = _merge_heads(tracer.labels(call["key"]), out.shape)
    value = _merge_heads(tracer.labels(call["value"]), out.shape)
    weights = product(tracer, query, key.transpose(1, 2))
    if weights is None:
        return CROSSED
    mask = call["attn_mask"]
    if mask is not None and varying_axes(tracer.labels(mask)):
        # A learned bias of the logits has a value for each head.
        heads = weights.view(*out.shape[:2], *weights.shape[1:])
        mask_labels = tracer.labels(mask).expand(heads.shape).flatten(2)
        # Pairs of tokens share values; each different one is joined once.
        mask_labels = mask_labels.unique(dim=2)
        tracer.book.join(heads[..., 0, :1].expand(mask_labels.shape), mask_labels)
    labels = product(tracer, weights, value)
    if labels is None:
        return CROSSED
    tracer.label(out, labels.reshape(out.shape))
    return None


def _merge_heads(labels: Tensor, shape: torch.Size) -> Tensor:
    """Labels with heads on the batch axis, `(batch * heads, tokens, width)`.

    Args:
        labels: `(batch, heads, tokens, width)`.
        shape: Of the output, with as many heads as the queries have.
    """
    # A key that all heads share lies on a head axis of length 1.
    spread = labels.expand(*shape[:2], *labels.shape[2:])
    return spread.reshape(-1, *spread.shape[-2:])


def vector_product(call: Call) -> str | None:
    """A matrix or a vector times a vector, as spectral norm multiplies its weight."""
    return "has no rule for activations"


def weight_norm(call: Call) -> str | None:
    """`v * (g / norm(v))` in one operation."""
    return "has no rule for activations"
