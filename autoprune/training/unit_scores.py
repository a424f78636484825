"""How much the units of a weight matter, where units are what masks keep or remove.

A unit is a single weight, a row or column of a kernel, a kernel or a filter; see
`autoprune.training.masks.PATTERNS`. To add a criterion, write a function from a weight
and the axes along which its units lie to scores, and give it a line in `UNIT_SCORES`.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from autoprune.evaluation.importance import lamp_scores

Axes: TypeAlias = tuple[int, ...]
"""Axes of a weight, counted from 0."""


def _l1(weight: Tensor, axes: Axes) -> Tensor:
    """Mean |w| of each unit: a mean, so that units of different size compare."""
    # torch takes "no axes" for all of them.
    if not axes:
        return weight.abs()
    return weight.abs().mean(axes, keepdim=True)


def _l2(weight: Tensor, axes: Axes) -> Tensor:
    """Root of the mean square of each unit."""
    # Of single weights that is |w|, without the rounding of a square and its root.
    if not axes:
        return weight.abs()
    return weight.square().mean(axes, keepdim=True).sqrt()


def _lamp(weight: Tensor, axes: Axes) -> Tensor:
    """A unit's square as a share of all squares in its layer that aren't smaller.

    Lee et al. 2021, eq. 6; in the paper units are single weights.
    """
    squares = _l2(weight, axes).square()
    # In float64, since all squares of a layer are added up one after the other.
    return lamp_scores(squares.flatten().double()).view_as(squares)


def _random(weight: Tensor, axes: Axes) -> Tensor:
    """Scores that depend on nothing but the seed: the control."""
    # Only the shape of the other scores is used.
    return torch.rand_like(_l1(weight, axes))


UNIT_SCORES: dict[str, Callable[[Tensor, Axes], Tensor]] = {
    "l1": _l1,
    "l2": _l2,
    "lamp": _lamp,
    "random": _random,
}
"""Criterion to scores of a weight's units, whose axes have length 1; higher is kept."""


def _unchanged(scores: Tensor) -> Tensor:
    """The scores themselves."""
    return scores


def _rank_in_layer(scores: Tensor) -> Tensor:
    """A unit's rank in its layer, in (0, 1), in place of its score.

    One threshold then takes the same share of every layer. Scores of 0.5, 9 and 2
    become 1/6, 5/6 and 3/6.
    """
    # The order of the order is the rank. Stable sorts, so that ties fall alike on every
    # machine.
    ranks = scores.flatten().argsort(stable=True).argsort(stable=True)
    return ((ranks.double() + 0.5) / ranks.numel()).view_as(scores)


SCORE_TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "global": _unchanged,
    "uniform": _rank_in_layer,
}
"""Agent to what makes scores of different layers comparable: nothing, or their rank in
the layer.
"""
