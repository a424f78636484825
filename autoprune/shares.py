"""How much of a network's MACs its groups can reach."""

from collections.abc import Collection

import torch

from autoprune.groups import Extent, Group, Groups, Layer


def macs_share(group: Group, groups: Groups) -> float:
    """Share of the MACs in layers, and products of activations, that touch a group."""
    return _share(groups, lambda axes: group.name in axes[0] | axes[1])


def prunable_share(groups: Groups) -> float:
    """Share of the MACs in layers of which a prunable group touches an axis."""
    names = set(groups.channels)
    return _share(groups, lambda axes: bool(names & (axes[0] | axes[1])))


def both_axes_share(groups: Groups) -> float:
    """Share of the MACs in layers that prunable groups shrink on both axes.

    A convolution that loses whole conv groups has one axis for both; a product of activations, its channels.
    """
    names = set(groups.channels)
    return _share(groups, lambda axes: bool(names & axes[0]) and bool(names & axes[1]))


def _share(groups: Groups, counts) -> float:
    parts = [(layer_macs(layer, groups), _axes(layer, groups)) for layer in groups.layers]
    parts += [(dense_elements(product, groups), [set().union(*product.kept_by)] * 2) for product in groups.products]
    return sum(macs for macs, axes in parts if counts(axes)) / max(1, sum(macs for macs, _ in parts))


def layer_macs(layer: Layer, groups: Groups) -> int:
    """Multiply-accumulates of one use of a weight in the dense network, for one sample."""
    return layer.positions * torch.Size(groups.shapes[layer.tensor]).numel()


def dense_elements(extent: Extent, groups: Groups) -> int:
    """The elements with every channel kept."""
    channels = {group.name: group.channels for group in groups.all}
    return extent.fixed + sum(
        per_channel * torch.Size([channels[name] for name in names]).numel()
        for names, per_channel in extent.kept_by.items()
    )


def _axes(layer: Layer, groups: Groups) -> list[Collection[str]]:
    """The groups on a weight's first and on its second axis."""
    axes = [set(), set()]
    for group in groups.all:
        for member in group.members:
            if member.tensor == layer.tensor and member.axis < 2:
                axes[member.axis].add(group.name)
    return [axes[0], axes[0]] if layer.kind in ("depthwise", "grouped") else axes
