"""How much of a network's MACs its groups can reach."""

from dataclasses import dataclass, replace

from autoprune.structure.groups import Groups, Layer


@dataclass(frozen=True)
class _Part:
    """A layer, or a product of two activations.

    Attributes:
        macs: Its multiply-accumulates, for one sample.
        first: Names of the groups that shrink its first axis.
        second: Names of those that shrink its second one.
    """

    macs: int
    first: set[str]
    second: set[str]


def with_macs_shares(groups: Groups) -> Groups:
    """The same groups, each with its share of the MACs.

    That is the share spent in layers, and products of activations, that touch it.
    """
    axes = _groups_by_axis(groups)
    # All of a layer's axes count here, also where only one of them can shrink.
    parts = []
    for layer in groups.layers:
        names = set().union(*axes[layer.tensor])
        parts.append((layer_macs(layer, groups), names))
    for product in groups.products:
        parts.append((product.dense, set().union(*product.elements)))

    total = 0
    touched: dict[str, int] = dict.fromkeys((group.name for group in groups.all), 0)
    for macs, names in parts:
        total += macs
        for name in names:
            touched[name] += macs
    shared = []
    for group in groups.all:
        # A network may have no layer that multiplies.
        share = touched[group.name] / max(1, total)
        shared.append(replace(group, macs_share=share))
    return replace(groups, all=tuple(shared))


def prunable_share(groups: Groups) -> float:
    """Share of the MACs in layers of which a prunable group touches an axis."""
    prunable = set(groups.channels)
    total = 0
    reached = 0
    for part in _parts(groups):
        total += part.macs
        if prunable & (part.first | part.second):
            reached += part.macs
    return reached / max(1, total)


def both_axes_share(groups: Groups) -> float:
    """Share of the MACs in layers that prunable groups shrink on both axes.

    A convolution that loses whole conv groups has one axis for both; a product of
    activations, its channels.
    """
    prunable = set(groups.channels)
    total = 0
    reached = 0
    for part in _parts(groups):
        total += part.macs
        if prunable & part.first and prunable & part.second:
            reached += part.macs
    return reached / max(1, total)


def _parts(groups: Groups) -> list[_Part]:
    """All that costs MACs."""
    axes = _groups_by_axis(groups)
    parts = []
    for layer in groups.layers:
        first, second = axes[layer.tensor]
        # A convolution that loses whole conv groups has its inputs and its outputs on
        # one axis.
        if layer.kind in ("depthwise", "grouped"):
            second = first
        parts.append(_Part(layer_macs(layer, groups), first, second))
    for product in groups.products:
        # Which operand a channel comes from makes no difference: both have it.
        names = set().union(*product.elements)
        parts.append(_Part(product.dense, names, names))
    return parts


def _groups_by_axis(groups: Groups) -> dict[str, tuple[set[str], set[str]]]:
    """Tensor to the groups on its first and on its second axis."""
    axes: dict[str, tuple[set[str], set[str]]] = {}
    for name in groups.shapes:
        axes[name] = (set(), set())
    for group in groups.all:
        for member in group.members:
            # Kernels have further axes, for space.
            if member.axis < 2:
                axes[member.tensor][member.axis].add(group.name)
    return axes


def layer_macs(layer: Layer, groups: Groups) -> int:
    """Multiply-accumulates of one use of a weight in the dense network, for one sample.

    Args:
        layer: The use.
        groups: Its network's trace, for the shape of the weight.
    """
    return layer.positions * layer.n_elements(groups.shapes[layer.tensor])
