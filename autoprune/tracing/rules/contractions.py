"""Rules of the operations that multiply and sum: convolutions, linear layers, products
of activations, attention.

A weight hands out new labels for what it produces; a product of two activations joins
the channels that it sums over.
"""

import torch
from torch import Tensor

from autoprune.structure.groups import Layer, loses_whole_conv_groups
from autoprune.structure.labels import CONSTANT, broadcast_labels, varying_axes
from autoprune.tracing.tracer import Call, Tracer

CROSSED = "multiplies channels with channels"
NO_CHANNEL = torch.tensor([CONSTANT])
"""What is computed whatever is pruned."""


def convolution(call: Call) -> str | None:
    """A convolution hands out labels for its output.

    A grouped convolution loses whole conv groups, inputs and outputs together, where it
    has more conv groups than channels in each (a depthwise one always); else the same
    positions of every conv group, so that groups stay equal.
    """
    x, weight, n_groups, transposed = (
        call["input"],
        call["weight"],
        call["groups"],
        call["transposed"],
    )
    tracer, view = call.tracer, call.tracer.parameter(weight)
    computed = view is None or (view.axis_at(0), view.axis_at(1)) != (0, 1)
    if computed or set(varying_axes(tracer.labels(x))) - {0, 1}:
        places = x.numel() if transposed else call.out.numel()
        tracer.products.append((NO_CHANNEL, places * weight.shape[1:].numel()))
        return (
            "has a weight that is computed from others"
            if computed
            else "slides over channels as over space"
        )
    n_out, n_in = call.out.shape[1], x.shape[1]
    inputs, outputs = tracer.line(x, 1), tracer.produced(view.name, n_out)
    whole = loses_whole_conv_groups(n_in, n_out, n_groups)
    if whole:
        _join_conv_groups(tracer, inputs, outputs, n_groups)
    else:
        tracer.book.join_lines(inputs.view(n_groups, -1))
        tracer.book.join_lines(outputs.view(n_groups, -1))
    _use_kernel(tracer, view.name, (inputs, outputs), (n_groups, whole, transposed))
    tracer.use_vector(call["bias"], outputs, "follow" if whole else "produce")
    size = tuple((x if transposed else call.out).shape[2:])
    kind = "conv" if not whole else "depthwise" if n_groups == n_in else "grouped"
    # Windows of an image may lie on the batch axis.
    positions = len(x) * torch.Size(size).numel()
    tracer.layers.append(
        Layer(view.name, kind, positions, (1, *size)[-2:], call["stride"][0])
    )
    tracer.label(call.out, broadcast_labels(outputs, 1, call.out.shape))
    return None


def _join_conv_groups(
    tracer: Tracer, inputs: Tensor, outputs: Tensor, n_groups: int
) -> None:
    together = torch.cat([outputs.view(n_groups, -1), inputs.view(n_groups, -1)], 1)
    tracer.book.join(together[:, :1].expand_as(together), together)


def _use_kernel(
    tracer: Tracer, name: str, ends: tuple[Tensor, Tensor], how: tuple[int, bool, bool]
) -> None:
    """Axis 0 is the outputs', or the inputs' of a transposed convolution; axis 1 the
    other's within a conv group.
    """
    n_groups, whole, transposed = how
    first, second = ends if transposed else ends[::-1]
    roles = ("consume", "produce") if transposed else ("produce", "consume")
    tracer.use(name, 0, first, "follow" if whole else roles[0])
    if not whole:
        tracer.use(name, 1, second[: len(second) // n_groups], roles[1])


def linear(call: Call) -> str | None:
    """`mm(x, weight)` and `addmm(bias, x, weight)`, the weight being a transposed
    parameter.
    """
    bias, x, weight = call.args if len(call.args) == 3 else (None, *call.args)
    weighted, swapped = (
        call.tracer.parameter(operand) is not None for operand in (weight, x)
    )
    if call.kwargs or (bias is not None and not weighted):
        call.tracer.products.append((NO_CHANNEL, x.numel() * weight.shape[1]))
        return "scales or adds to a product"
    if not weighted and not swapped:
        return _product(call, x.unsqueeze(0), weight.unsqueeze(0))
    return _apply_weight(
        call, *((x, weight, (1, 0, 1)) if weighted else (weight, x, (0, 1, 0))), bias
    )


def _apply_weight(
    call: Call,
    x: Tensor,
    weight: Tensor,
    axes: tuple[int, int, int],
    bias: Tensor | None = None,
):
    """A linear layer: `axes` are the summed axis of `x`, that of `weight`, and the
    weight's other one.
    """
    tracer, view = call.tracer, call.tracer.parameter(weight)
    summed, weight_in, weight_out = axes
    ends = view.axis_at(weight_in), view.axis_at(weight_out)
    positions = x.numel() // x.shape[summed]
    if None in ends:
        tracer.products.append((NO_CHANNEL, positions * weight.numel()))
        return "reads a part of its weight"
    outputs = tracer.produced(view.name, call.out.shape[weight_out])
    tracer.use(view.name, ends[0], tracer.line(x, summed), "consume")
    tracer.use(view.name, ends[1], outputs, "produce")
    tracer.use_vector(bias, outputs, "produce")
    tracer.layers.append(Layer(view.name, "linear", positions))
    tracer.label(call.out, broadcast_labels(outputs, weight_out, call.out.shape))
    return None


def batched_product(call: Call) -> str | None:
    """`bmm(a, b)` and `baddbmm(c, a, b)`."""
    a, b = call.args[-2:]
    tracer = call.tracer
    if tracer.parameter(a) is not None or tracer.parameter(b) is not None:
        if len(call.args) > 2 or len(a) > 1:
            tracer.products.append((NO_CHANNEL, call.out.numel() * a.shape[2]))
            return "has a weight for each entry of the batch"
        first = tracer.parameter(a) is not None
        return (
            _apply_weight(call, b, a, (1, 2, 1))
            if first
            else _apply_weight(call, a, b, (2, 1, 2))
        )
    failure = _product(call, a, b)
    if failure is None and len(call.args) > 2:
        tracer.book.join(
            tracer.labels(call.args[0]).expand(call.out.shape), tracer.labels(call.out)
        )
    return failure


def _product(call: Call, a: Tensor, b: Tensor) -> str | None:
    tracer, operands = call.tracer, call.args[-2:]
    labels = [
        tracer.labels(t).reshape(s.shape) for t, s in zip(operands, (a, b), strict=True)
    ]
    out = product(tracer, *labels)
    if out is None:
        return CROSSED
    if any(map(tracer.is_activation, operands)):
        tracer.label(call.out, out.reshape(call.out.shape))
    return None


def product(tracer: Tracer, a: Tensor, b: Tensor) -> Tensor | None:
    """Labels of the batched product of `a` `(batch, n, k)` and `b` `(batch, k, m)`, or
    None where none describe it.

    Channels on the summed axis meet; what is left of them is their row, an attention
    head for instance. Channels on `n` or `m` pass; those on the batch axis gate them.
    """
    shape = torch.Size((a.shape[0], a.shape[1], b.shape[2]))
    varies = {"a": varying_axes(a), "b": varying_axes(b)}
    summed, outer = (
        2 in varies["a"] or 1 in varies["b"],
        [1 in varies["a"], 2 in varies["b"]],
    )
    if (summed and any(outer)) or all(outer):
        cells, out = NO_CHANNEL, None
    elif summed:
        cells, out = _summed(tracer, a, b, 0 in [*varies["a"], *varies["b"]])
    else:
        cells, out = _passed(tracer, (a, b), varies, outer)
    tracer.products.append((cells, shape.numel() * a.shape[2] // cells.numel()))
    return None if out is None else out.expand(shape)


def _summed(
    tracer: Tracer, a: Tensor, b: Tensor, batched: bool
) -> tuple[Tensor, Tensor]:
    cells = a[:, 0, :]
    tracer.book.join(cells, b[:, :, 0])
    tracer.contracted.append(cells)
    if not batched:
        return cells[0], torch.zeros((1, 1, 1), dtype=torch.int64)
    return cells, tracer.book.factor(cells)[:, None, None]


def _passed(
    tracer: Tracer, operands: tuple[Tensor, Tensor], varies: dict, outer: list[bool]
):
    """Channels lie on the batch axis and on one outer axis at most; the operand without
    the outer axis is the gate.
    """
    side = 0 if outer[0] else 1
    passing, gate = operands[side].narrow(2 - side, 0, 1), operands[1 - side][:, 0, 0]
    if not any(outer):
        tracer.book.join(passing[:, 0, 0], gate)
        return gate, passing[:, :1, :1]
    cells = passing.squeeze(2 - side)
    if 0 in varies["ab"[side]]:
        tracer.book.join(tracer.book.factor(cells), gate)
        return cells, passing
    return cells[0], None if 0 in varies["ba"[side]] else passing


def attention(call: Call) -> str | None:
    """Scaled dot-product attention: the product with the keys, softmax, the product
    with the values.
    """
    tracer = call.tracer
    out = call.out[0]
    # A key that all heads share lies on a head axis of length 1.
    spreads = [tracer.labels(call[name]) for name in ("query", "key", "value")]
    query, key, value = (
        _merged(x.expand(*out.shape[:2], *x.shape[2:])) for x in spreads
    )
    weights = product(tracer, query, key.transpose(1, 2))
    if weights is None:
        return CROSSED
    mask = call["attn_mask"]
    if mask is not None and varying_axes(tracer.labels(mask)):
        heads = weights.view(*out.shape[:2], *weights.shape[1:])
        tracer.book.join(
            heads[..., 0, 0], tracer.labels(mask).expand(heads.shape)[..., 0, 0]
        )
    labels = product(tracer, weights, value)
    if labels is None:
        return CROSSED
    tracer.label(out, labels.reshape(out.shape))
    return None


def _merged(labels: Tensor) -> Tensor:
    return labels.reshape(-1, *labels.shape[-2:])
