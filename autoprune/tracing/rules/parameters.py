"""Rules of operations on parameters alone: weights that the code computes from others.

Weight norm, weight standardisation, gains and the like. No channels have been met yet,
so the result shows the parameters' elements (`ParameterView`), until a layer reads it.
Norms and means are taken over what is left, as layer norm's are.
"""

import torch
from torch import Tensor

from autoprune.structure.groups import tensors_in
from autoprune.tracing.calls import Call
from autoprune.tracing.parameter_views import ParameterView
from autoprune.tracing.rules.norms import reduced_axes
from autoprune.tracing.tracer import Tracer


def spread_views(
    tracer: Tracer, tensor: Tensor, shape: torch.Size
) -> list[ParameterView]:
    """The views of a tensor's parameters, broadcast to a shape.

    Args:
        tracer: The notebook of the run.
        tensor: A parameter, or computed from some.
        shape: With which its own broadcasts.
    """
    return [
        view.apply(lambda index: index.expand(shape)) for view in tracer.views(tensor)
    ]


def combine(call: Call) -> str | None:
    """Elementwise operations: the result shows what all operands show."""
    tracer = call.tracer
    for out in tensors_in(call.out):
        views = []
        for tensor in call.tensors():
            views += spread_views(tracer, tensor, out.shape)
        tracer.mark_parameter(out, *views)
        for tensor in call.tensors():
            if not (tracer.views(tensor) or tracer.is_noise(tensor)):
                _meet_constant(tracer, out, tensor)
    return None


def _meet_constant(tracer: Tracer, out: Tensor, constant: Tensor) -> None:
    """Forbids pruning the axes along which a constant would keep its length.

    Args:
        tracer: The notebook of the run.
        out: What was computed with it.
        constant: What no parameter shows.
    """
    n_new_axes = out.ndim - constant.ndim
    spanned = []
    for dim, length in enumerate(constant.shape):
        if length > 1:
            spanned.append(dim + n_new_axes)
    for labels in tracer.label_axes(out, spanned):
        tracer.book.join(labels, torch.zeros_like(labels))


def summarise(call: Call) -> str | None:
    """A mean, a norm or another reduction over some axes."""
    tracer = call.tracer
    x = call.args[0]
    axes = reduced_axes(call)
    tracer.label_axes(x, axes)
    for out in tensors_in(call.out):
        is_flat = out.ndim < x.ndim

        def reduce(index: Tensor, is_flat: bool = is_flat) -> Tensor:
            # From the last axis to the first, as `select` renumbers those behind.
            for axis in sorted(axes, reverse=True):
                index = index.select(axis, 0) if is_flat else index.narrow(axis, 0, 1)
            return index

        views = [view.forget(axes).apply(reduce) for view in tracer.views(x)]
        tracer.mark_parameter(out, *views)
    return None


def rescale(call: Call) -> str | None:
    """Softmax, running sums and norms keep the shape, and read along axes of it."""
    tracer = call.tracer
    x, *vectors = call.tensors()
    tracer.label_axes(x)
    views = list(tracer.views(x))
    # Those of layer norm lie along its last axes.
    for vector in vectors:
        views += spread_views(tracer, vector, x.shape)
    for out in tensors_in(call.out):
        # Beside the result, norms return statistics, which nobody reads.
        if out.shape == x.shape:
            tracer.mark_parameter(out, *views)
    return None


def standardise(call: Call) -> str | None:
    """Batch norm of a weight `(1, n, m)`: the statistics are those of its rows.

    So does timm standardise weights (Qiao et al. 2019, Weight Standardization). Scale
    and shift have an entry for each row.
    """
    tracer = call.tracer
    x = call.args[0]
    tracer.label_axes(x)
    views = list(tracer.views(x))
    of_rows = [1, -1] + [1] * (x.ndim - 2)
    for vector in call.args[1:5]:
        for view in tracer.views(vector):
            views.append(view.apply(lambda index: index.view(of_rows).expand(x.shape)))
    tracer.mark_parameter(call.out[0], *views)
    return None


def normalise_weight(call: Call) -> str | None:
    """`v * (g / norm(v))`, as weight norm's own operation computes it."""
    tracer = call.tracer
    direction = call["v"]
    gain = call["g"]
    tracer.label_axes(direction)
    views = [
        *tracer.views(direction),
        *spread_views(tracer, gain, direction.shape),
    ]
    tracer.mark_parameter(call.out[0], *views)
    return None


def contract_vector(call: Call) -> str | None:
    """A matrix or a vector times a vector: the products, summed over the last axis."""
    tracer = call.tracer
    a, b = call.args
    views = [*tracer.views(a), *spread_views(tracer, b, a.shape)]
    tracer.label_axes(a)
    tracer.label_axes(b)
    last = a.ndim - 1
    summed = []
    for view in tracer.tie(views):
        summed.append(view.forget([last]).apply(lambda index: index.select(last, 0)))
    tracer.mark_parameter(call.out, *summed)
    return None


def fill_border(call: Call) -> str | None:
    """Padding: the code writes constants beside the parameter's elements."""
    tracer = call.tracer
    x, amounts = call.args[:2]
    padded = []
    # Amounts go from the last axis to the first, two for each.
    for position in range(len(amounts) // 2):
        if any(amounts[2 * position : 2 * position + 2]):
            padded.append(x.ndim - 1 - position)

    def stretch(index: Tensor) -> Tensor:
        for axis in padded:
            index = index.narrow(axis, 0, 1)
        return index.expand(call.out.shape)

    views = [view.forget(padded).apply(stretch) for view in tracer.views(x)]
    tracer.mark_parameter(call.out, *views)
    return None
