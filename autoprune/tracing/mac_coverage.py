"""How much of a network's MACs its groups can reach."""

from collections.abc import Callable
from dataclasses import replace

import torch

from autoprune.structure.groups import Groups, Layer


def with_macs_shares(groups: Groups) -> Groups:
    """The same groups, each with its share of the MACs in layers, and products of
    activations, that touch it.
    """
    axes, total = _axes(groups), 0
    touched: dict[str, int] = dict.fromkeys((group.name for group in groups.all), 0)
    parts = [
        (layer_macs(layer, groups), set().union(*axes[layer.tensor]))
        for layer in groups.layers
    ]
    parts += [
        (product.dense, set().union(*product.elements)) for product in groups.products
    ]
    for macs, names in parts:
        total += macs
        for name in names:
            touched[name] += macs
    shared = (
        replace(group, macs_share=touched[group.name] / max(1, total))
        for group in groups.all
    )
    return replace(groups, all=tuple(shared))


def prunable_share(groups: Groups) -> float:
    """Share of the MACs in layers of which a prunable group touches an axis."""
    names = set(groups.channels)
    return _share(groups, lambda axes: bool(names & (axes[0] | axes[1])))


def both_axes_share(groups: Groups) -> float:
    """Share of the MACs in layers that prunable groups shrink on both axes.

    A convolution that loses whole conv groups has one axis for both; a product of
    activations, its channels.
    """
    names = set(groups.channels)
    return _share(groups, lambda axes: bool(names & axes[0]) and bool(names & axes[1]))


def _share(groups: Groups, counts: Callable[[list[set[str]]], bool]) -> float:
    """Share of the MACs of parts, whose two axes' groups `counts` looks at."""
    axes = _axes(groups)
    parts = [
        (layer_macs(layer, groups), _both_ends(layer, axes)) for layer in groups.layers
    ]
    parts += [
        (product.dense, [set().union(*product.elements)] * 2)
        for product in groups.products
    ]
    return sum(macs for macs, ends in parts if counts(ends)) / max(
        1, sum(macs for macs, _ in parts)
    )


def _axes(groups: Groups) -> dict[str, list[set[str]]]:
    """Tensor to the groups on its first and on its second axis."""
    axes: dict[str, list[set[str]]] = {name: [set(), set()] for name in groups.shapes}
    for group in groups.all:
        for member in group.members:
            if member.axis < 2:
                axes[member.tensor][member.axis].add(group.name)
    return axes


def _both_ends(layer: Layer, axes: dict[str, list[set[str]]]) -> list[set[str]]:
    """A convolution that loses whole conv groups has its inputs and outputs on one
    axis.
    """
    ends = axes[layer.tensor]
    return [ends[0], ends[0]] if layer.kind in ("depthwise", "grouped") else ends


def layer_macs(layer: Layer, groups: Groups) -> int:
    """Multiply-accumulates of one use of a weight in the dense network, for one sample."""
    return layer.positions * torch.Size(groups.shapes[layer.tensor]).numel()
