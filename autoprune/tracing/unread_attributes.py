"""Widths that modules keep for code which no forward pass runs.

A block that fuses its branches after training says in `in_channels` how many channels
come in, and only `fuse` reads that. No demand tells what such a number means, so its
name does: `in_channels` is the width of what enters the module, where that has as many
channels in the dense network.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from autoprune.structure.groups import loses_whole_conv_groups, tensors_in
from autoprune.structure.labels import thin, varying_axes
from autoprune.structure.lengths import AttributePlace
from autoprune.tracing.size_solver import Values
from autoprune.tracing.sizes import AxisSize, ComputedSize, Source, has_setter
from autoprune.tracing.tracer import Tracer
from autoprune.tracing.training_mode import AttributeReads
from autoprune.tracing.units import axis_units


class Meaning(Enum):
    """What an attribute counts, after its name."""

    ENTERS = "channels that enter the module"
    LEAVES = "channels that leave it"
    BOTH = "channels that enter it and leave it"
    INSIDE = "channels between its layers"
    CONV_GROUPS = "groups of its convolutions"


NAMES: dict[Meaning, str] = {
    Meaning.ENTERS: (
        "in_channels in_chs in_ch in_features in_planes inplanes in_dim in_dims "
        "input_channels input_dim input_features dim_in c_in ch_in inp nin"
    ),
    Meaning.LEAVES: (
        "out_channels out_chs out_ch out_features out_planes outplanes out_dim "
        "out_dims output_channels output_dim dim_out c_out ch_out oup nout "
        "embedding_dim"
    ),
    Meaning.BOTH: (
        "dim channels chs num_channels n_channels num_features n_features features "
        "num_feats planes width embed_dim d_model hidden_dim hidden_size"
    ),
    Meaning.INSIDE: (
        "mid_channels mid_chs mid_planes mid_dim hidden_channels hidden_chs "
        "hidden_features inner_dim inner_channels bottleneck_channels expand_channels "
        "exp_channels"
    ),
    Meaning.CONV_GROUPS: "groups num_groups n_groups cardinality",
}
"""What such attributes are called."""


def meaning_of(name: str) -> Meaning | None:
    """What an attribute counts, or None if its name says nothing of it.

    Args:
        name: Of the attribute.
    """
    for meaning, names in NAMES.items():
        if name in names.split():
            return meaning
    return None


@dataclass
class Boundaries:
    """What enters and leaves the modules that keep a width.

    Attributes:
        widths: Module to its attributes that may be widths, and their values.
        entering: Module to the channel axes of what entered it.
        leaving: Module to those of what left it.
    """

    widths: dict[str, dict[str, int]]
    entering: dict[str, list[AxisSize]] = field(
        default_factory=lambda: defaultdict(list)
    )
    leaving: dict[str, list[AxisSize]] = field(
        default_factory=lambda: defaultdict(list)
    )


@contextmanager
def note_boundaries(tracer: Tracer) -> Iterator[Boundaries]:
    """Notes the channels at the boundaries of modules inside the `with` block.

    Args:
        tracer: The notebook of the pass that runs there.
    """
    boundaries = Boundaries(_widths(tracer.model))
    names = {id(module): name for name, module in tracer.model.named_modules()}

    def note(module: nn.Module, values: object, axes: dict[str, list]) -> None:
        name = names.get(id(module))
        if name in boundaries.widths:
            for tensor in tensors_in(values):
                axes[name] += _channel_axes(tracer, tensor)

    def enter(module: nn.Module, inputs: object) -> None:
        note(module, inputs, boundaries.entering)

    def leave(module: nn.Module, inputs: object, output: object) -> None:
        note(module, output, boundaries.leaving)

    hooks = (
        nn.modules.module.register_module_forward_pre_hook(enter),
        nn.modules.module.register_module_forward_hook(leave),
    )
    try:
        yield boundaries
    finally:
        for hook in hooks:
            hook.remove()


def _widths(model: nn.Module) -> dict[str, dict[str, int]]:
    """Module to its attributes that may be widths, where nothing keeps these true."""
    widths: dict[str, dict[str, int]] = {}
    for path, module in model.named_modules():
        if has_setter(module):
            continue
        for name, value in vars(module).items():
            # A bool is an int too; a width of 1 can't shrink.
            if type(value) is int and value > 1 and meaning_of(name):
                widths.setdefault(path, {})[name] = value
    return widths


def _channel_axes(tracer: Tracer, tensor: Tensor) -> list[AxisSize]:
    """The axes of an activation on which channels lie."""
    if not tracer.is_activation(tensor):
        return []
    labels = thin(tracer.labels(tensor))
    axes = []
    for axis in varying_axes(labels):
        axes.append(AxisSize(labels, axis, int(labels.shape[axis])))
    return axes


def follow_unread(
    tracer: Tracer, boundaries: Boundaries, reads: AttributeReads, units: np.ndarray
) -> Values:
    """The attributes that no pass has read, each with the size that it has to follow.

    What several sizes could mean stays as it is.

    Args:
        tracer: The notebook of the forward pass.
        boundaries: What entered and left its modules.
        reads: The attributes that a pass has read.
        units: Those of every label, `(n_labels, 2)`.
    """
    values: Values = {}
    for module, attributes in boundaries.widths.items():
        for name, width in attributes.items():
            if (module, name) in reads:
                continue
            sources: dict[tuple, Source] = {}
            for source in _sources(tracer, boundaries, module, name, width):
                sources[_key(source, units)] = source
            if len(sources) == 1:
                (source,) = sources.values()
                values[AttributePlace(module, name, None)] = source
    return values


def _sources(
    tracer: Tracer, boundaries: Boundaries, module: str, name: str, width: int
) -> list[Source]:
    """The sizes that an attribute can mean.

    Args:
        tracer: The notebook of the forward pass.
        boundaries: What entered and left its modules.
        module: Which module has the attribute.
        name: Of the attribute.
        width: Its value.
    """
    meaning = meaning_of(name)
    if meaning is Meaning.CONV_GROUPS:
        sources = _conv_groups(tracer, module, width)
        if sources:
            return sources
        # A convolution that is yet to be made, depthwise: a group for each channel.
        meaning = Meaning.BOTH
    axes: list[AxisSize] = []
    if meaning in (Meaning.ENTERS, Meaning.BOTH):
        axes += boundaries.entering[module]
    if meaning in (Meaning.LEAVES, Meaning.BOTH):
        axes += boundaries.leaving[module]
    fitting: list[Source] = [axis for axis in axes if axis.dense == width]
    return fitting or _inner_axes(tracer, module, meaning, width)


def _inner_axes(
    tracer: Tracer, module: str, meaning: Meaning | None, width: int
) -> list[Source]:
    """The axes of a module's tensors that are as long as an attribute says."""
    prefix = f"{module}." if module else ""
    roles = {"produce", "consume", "follow"}
    if meaning is Meaning.ENTERS:
        roles.remove("produce")
    if meaning is Meaning.LEAVES:
        roles.remove("consume")
    axes: list[Source] = []
    for (tensor, _), (labels, role) in tracer.uses.items():
        is_inside = tensor.startswith(prefix) and role in roles
        if is_inside and len(labels) == width:
            axes.append(_parameter_axis(labels))
    return axes


def _conv_groups(tracer: Tracer, module: str, n_groups: int) -> list[Source]:
    """The numbers of conv groups inside a module that an attribute can mean."""
    sources: list[Source] = []
    for name, conv in tracer.model.named_modules():
        is_inside = not module or name.startswith(f"{module}.")
        if not (is_inside and isinstance(conv, _ConvNd) and conv.groups == n_groups):
            continue
        use = tracer.uses.get((f"{name}.weight", 0))
        n_in = conv.in_channels
        n_out = conv.out_channels
        if use is None or not loses_whole_conv_groups(n_in, n_out, n_groups):
            sources.append(n_groups)
            continue
        n_first = len(use[0])
        per_group = n_first // n_groups
        axis = _parameter_axis(use[0])
        sources.append(ComputedSize("floordiv", axis, per_group, (n_first, per_group)))
    return sources


def _parameter_axis(labels: Tensor) -> AxisSize:
    """The axis of a parameter, by the labels that meet it, `(n,)`."""
    return AxisSize(labels.unsqueeze(0), 1, len(labels))


def _key(source: Source, units: np.ndarray) -> tuple:
    """Equal for sizes that are equal whatever is pruned."""
    if isinstance(source, ComputedSize):
        return (source.operation, _key(source.left, units), _key(source.right, units))
    if not isinstance(source, AxisSize):
        return (source,)
    own = np.sort(axis_units(source.labels, source.axis, units), axis=1)
    return (own[np.lexsort(own.T)].tobytes(),)
