"""Rules of convolutions: kernels that are parameters, or the same for every channel."""

from typing import Any

import torch
from torch import Tensor

from autoprune.structure.groups import Layer, loses_whole_conv_groups
from autoprune.structure.labels import broadcast_labels, varying_axes
from autoprune.tracing.calls import Call
from autoprune.tracing.parameter_views import ParameterView
from autoprune.tracing.rules.contractions import NO_CHANNEL
from autoprune.tracing.tracer import Tracer


def convolution(call: Call) -> str | None:
    """A convolution hands out labels for its output.

    A grouped convolution loses whole conv groups, inputs and outputs together, where it
    has more conv groups than channels in each (a depthwise one always); else the same
    positions of every conv group, so that groups stay equal.
    """
    tracer = call.tracer
    x = call["input"]
    view = tracer.parameter(call["weight"])
    varying = varying_axes(tracer.labels(x))
    if varying == [0] and x.shape[1] == 1:
        return _share_kernel(call, 0)
    if view is None or view.original_axis(0) is None:
        return _convolve_without_parameter(call)
    # A map that a linear layer made has a label for each pixel, which `unify_axis`
    # joins; here there is none for each channel.
    if 1 not in varying and any(axis > 1 for axis in varying):
        _count_fixed_convolution(call)
        return "slides over channels as over space"
    n_in = x.shape[1]
    n_out = call.out.shape[1]
    n_groups = call["groups"]
    inputs = tracer.unify_axis(x, 1)
    outputs = tracer.new_output_labels(view.name, n_out)
    loses_groups = loses_whole_conv_groups(n_in, n_out, n_groups)
    if loses_groups:
        _join_conv_groups(tracer, inputs, outputs, n_groups)
    else:
        # With one conv group, a single line, nothing is joined.
        tracer.book.join_lines(inputs.view(n_groups, -1))
        tracer.book.join_lines(outputs.view(n_groups, -1))
    if not _use_kernel(call, view, inputs, outputs, loses_groups):
        _count_fixed_convolution(call)
        return "reads a part of its weight"
    # Where whole conv groups go, the inputs decide as much as the outputs.
    bias_role = "follow" if loses_groups else "produce"
    tracer.use_vector(call["bias"], outputs, bias_role)
    kind = "conv"
    if loses_groups:
        kind = "depthwise" if n_groups == n_in else "grouped"
    tracer.layers.append(_convolution_layer(call, view.name, kind))
    tracer.label(call.out, broadcast_labels(outputs, 1, call.out.shape))
    return None


def deformable_convolution(call: Call) -> str | None:
    """A convolution that reads at places which another layer has computed.

    Dai et al. 2017, Deformable Convolutional Networks. Offsets and their weights lie on
    channels that mean places of the kernel, so none of those can go.
    """
    tracer = call.tracer
    for name in ("offset", "mask"):
        reason = "tells a deformable convolution its places"
        tracer.book.pin(tracer.labels(call[name]), reason)
    n_groups = call["offset_groups"]
    channels = tracer.unify_axis(call["input"], 1)
    # Each group of channels has places of its own, and stays as large as the others.
    tracer.book.join_lines(channels.view(n_groups, -1))
    return convolution(call)


def _option(call: Call, name: str, default: Any) -> Any:
    """An argument that not every convolution has."""
    try:
        return call[name]
    except KeyError:
        return default


def _convolve_without_parameter(call: Call) -> str | None:
    """A convolution whose kernel is no parameter, or not as a whole.

    One kernel for every channel, as blur pooling repeats it, keeps the channels.
    """
    tracer = call.tracer
    weight = call["weight"]
    is_shared = not tracer.is_activation(weight)
    for view in tracer.views(weight):
        if 0 in view.varying_dims:
            is_shared = False
    n_in = call["input"].shape[1]
    if is_shared and call["groups"] == n_in > 1:
        return _share_kernel(call, 1)
    _count_fixed_convolution(call)
    if tracer.is_activation(weight):
        return "has a weight that isn't made of parameters element by element"
    return "has a weight that isn't a parameter as a whole"


def _share_kernel(call: Call, axis: int) -> None:
    """Convolves every channel with the same kernel, which has none of its own.

    Args:
        call: The convolution.
        axis: Where the channels lie: 1, or 0 where the code has put them on the batch
            axis.
    """
    tracer = call.tracer
    channels = tracer.unify_axis(call["input"], axis)
    n_each = call.out.shape[axis] // len(channels)
    outputs = channels.repeat_interleave(n_each)
    tensor = call["input"] if _option(call, "transposed", False) else call.out
    n_products = tensor.numel() * call["weight"].shape[1:].numel()
    tracer.products.append((outputs, n_products // len(outputs)))
    if axis == 1:
        tracer.use_vector(call["bias"], outputs, "follow")
    tracer.label(call.out, broadcast_labels(outputs, axis, call.out.shape))


def _count_fixed_convolution(call: Call) -> None:
    """Counts the multiply-accumulates of a convolution that stays as it is."""
    # A transposed convolution applies its kernel at every place of the input.
    tensor = call["input"] if _option(call, "transposed", False) else call.out
    n_products = tensor.numel() * call["weight"].shape[1:].numel()
    call.tracer.products.append((NO_CHANNEL, n_products))


def _convolution_layer(call: Call, name: str, kind: str) -> Layer:
    """A convolution as costs see it."""
    x = call["input"]
    size = tuple((x if _option(call, "transposed", False) else call.out).shape[2:])
    # Windows of an image may lie on the batch axis.
    positions = len(x) * torch.Size(size).numel()
    # One row high where there is one spatial axis; of three, the last two.
    height, width = (1, *size)[-2:]
    # A deformable one has a stride for each axis under a name of its own.
    stride = _option(call, "stride_h", None) or call["stride"][0]
    return Layer(name, kind, positions, (height, width), stride)


def _join_conv_groups(
    tracer: Tracer, inputs: Tensor, outputs: Tensor, n_groups: int
) -> None:
    """Joins each conv group's inputs and outputs into one channel."""
    rows = [outputs.view(n_groups, -1), inputs.view(n_groups, -1)]
    together = torch.cat(rows, 1)
    tracer.book.join(together[:, :1].expand_as(together), together)


def _use_kernel(
    call: Call,
    view: ParameterView,
    inputs: Tensor,
    outputs: Tensor,
    loses_groups: bool,
) -> bool:
    """Records which labels meet which axis of a kernel.

    Axis 0 holds all outputs, or all inputs of a transposed convolution. Axis 1 holds
    the other side's channels of one conv group, so it stays where whole groups go.

    Returns:
        Whether the kernel's axes are whole axes of the parameter.
    """
    first = outputs
    second = inputs
    first_role = "produce"
    second_role = "consume"
    if _option(call, "transposed", False):
        first, second = second, first
        first_role, second_role = second_role, first_role
    first_axis = view.original_axis(0)
    assert first_axis is not None, "the caller has looked"
    if loses_groups:
        call.tracer.use(view.name, first_axis, first, "follow")
        return True
    second_axis = view.original_axis(1)
    # The conv groups' channels are joined; the first group's speak for all.
    second = second[: len(second) // call["groups"]]
    if second_axis is None:
        shape = call["weight"].shape
        found = view.axis_along(broadcast_labels(second, 1, shape))
        if found is None or found[0] == first_axis:
            return False
        # The parameter has the kernel's other axes flat, as `(n_out, n_in * k * k)`.
        second_axis, second = found
    call.tracer.use(view.name, first_axis, first, first_role)
    call.tracer.use(view.name, second_axis, second, second_role)
    return True
