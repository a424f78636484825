"""How important each channel is: `CRITERIA[name](model, groups, images)` gives one score per channel of every group.

A group's channels sit in several layers. Each layer's scores are divided by their mean, so that no layer drowns the
others, and averaged over the layers that produce the channels. Higher is kept.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune.data import Images
from autoprune.errors import check_known
from autoprune.groups import Group, Groups, Member

Importance = dict[str, Tensor]
Criterion = Callable[[nn.Module, Groups, Images], Importance]
TAYLOR_BATCH, TAYLOR_IMAGES = 50, 500


def importance(name: str, model: nn.Module, groups: Groups, images: Images) -> Importance:
    """Scores `(n_channels,)` per prunable group, higher is kept; the model is left as found.

    Args:
        name: A key of `CRITERIA`.
        model: The dense network.
        groups: Its trace.
        images: Training images, for the criteria that look at data.

    Raises:
        UserError: If the criterion is unknown; the nearest known one is offered.
    """
    check_criterion(name)
    return CRITERIA[name](model, groups, images)


def check_criterion(name: str) -> None:
    """Raises a `UserError` that offers the nearest criterion unless `name` is known."""
    check_known("criterion", name, CRITERIA)


def _weights(model: nn.Module, members: list[Member]) -> list[Tensor]:
    """Per member the weights of each channel, `(n_channels, n_weights)`."""
    tensors = model.state_dict()
    rows = [tensors[member.tensor].float().movedim(member.axis, 0)[member.index] for member in members]
    return [row.flatten(1) for row in rows]


def _filters(groups: Groups, group: Group) -> list[Member]:
    """The weights that produce a group's channels, whatever they are called; biases are left out."""
    return [m for m in group.members if m.role == "produce" and len(groups.shapes[m.tensor]) > 1]


def _average(scores: list[Tensor]) -> Tensor:
    return torch.stack([score / score.mean().clamp_min(1e-12) for score in scores]).mean(0)


def _filterwise(score: Callable[[Tensor], Tensor]) -> Criterion:
    def criterion(model: nn.Module, groups: Groups, images: Images) -> Importance:
        return {g.name: _average([score(rows) for rows in _weights(model, _filters(groups, g))]) for g in groups}

    return criterion


def _geometric_median(rows: Tensor) -> Tensor:
    """FPGM, He et al. 2019, eq. 7: the sum of distances to the layer's other filters."""
    return torch.cdist(rows, rows).sum(1)


def _bn_scale(model: nn.Module, groups: Groups, images: Images) -> Importance:
    """Network Slimming, Liu et al. 2017: |gamma|; a group without batch norm falls under L1."""
    l1 = CRITERIA["l1"](model, groups, images)
    scores = {}
    for group in groups:
        vectors = [m for m in group.members if m.role == "follow" and len(groups.shapes[m.tensor]) == 1]
        scales = _weights(model, [m for m in vectors if m.tensor.endswith("weight")])
        scores[group.name] = _average([gamma.abs().sum(1) for gamma in scales]) if scales else l1[group.name]
    return scores


def _random(model: nn.Module, groups: Groups, images: Images) -> Importance:
    """The control: the same random scores for the same network."""
    generator = torch.Generator().manual_seed(0)
    return {group.name: torch.rand(group.channels, generator=generator) for group in groups}


def _taylor(model: nn.Module, groups: Groups, images: Images) -> Importance:
    """Molchanov et al. 2019, eq. 8: the squared sum of weight times gradient over a filter, averaged over batches.

    We use batches of 50 of up to 500 training images in eval mode, so that batch norm keeps its trained statistics.
    """
    twin = copy.deepcopy(model).eval().requires_grad_(True)
    sums = {group.name: torch.zeros(group.channels) for group in groups}
    parameters = dict(twin.named_parameters())
    for start in range(0, min(len(images), TAYLOR_IMAGES), TAYLOR_BATCH):
        batch = images[start : start + TAYLOR_BATCH]
        twin.zero_grad()
        F.cross_entropy(twin(batch.inputs), batch.labels).backward()
        for group in groups:
            for member in _filters(groups, group):
                weight = parameters[member.tensor]
                product = (weight * weight.grad).detach().movedim(member.axis, 0)
                sums[group.name] += product[member.index].flatten(1).sum(1) ** 2
    return {name: score / score.mean().clamp_min(1e-30) for name, score in sums.items()}


CRITERIA: dict[str, Criterion] = {
    "l1": _filterwise(lambda rows: rows.abs().sum(1)),
    "l2": _filterwise(lambda rows: rows.norm(dim=1)),
    "bn_scale": _bn_scale,
    "fpgm": _filterwise(_geometric_median),
    "taylor": _taylor,
    "random": _random,
}
