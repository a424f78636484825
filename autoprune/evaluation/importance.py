"""How important each channel is: `CRITERIA[name](model, groups, images)` gives one
score per channel of every group.

A group's channels sit in several layers; its scores are the mean over the layers that
produce the channels. Higher is kept. Where a criterion says nothing of layers beside
each other (a filter's norm, a mean activation), each layer's scores are divided by
their mean, so that no layer drowns the others; the scores of the others (`bn_scale`,
`apoz`, `taylor`, `hessian`, `lamp`) can be ranked across the network as they are.
"""

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune.data.datasets import Images, seeded
from autoprune.errors import UserError, check_known
from autoprune.structure.groups import Groups, Member
from autoprune.tracing.channel_statistics import mean_reading

Importance = dict[str, Tensor]
Criterion = Callable[[nn.Module, Groups, Images], Importance]
BATCH, IMAGES = 50, 500
"""Of the criteria that look at data: images of a batch, and of all batches at most."""
PROBES = 4
"""Random directions for each batch in which `hessian` measures curvature."""


def importance(
    name: str, model: nn.Module, groups: Groups, images: Images, seed: int = 0
) -> Importance:
    """Scores `(n_channels,)` per prunable group, with mean 1 over the network; the
    model is left as found.

    Args:
        name: A key of `CRITERIA`.
        model: The dense network.
        groups: Its trace.
        images: Training images, for the criteria that look at data.
        seed: Of the criteria with chance in them, `random` and `hessian`.

    Raises:
        UserError: If the criterion is unknown; the nearest known one is offered. Or if
            it can't tell the network's channels apart.
    """
    check_criterion(name)
    with seeded(seed):
        scores = CRITERIA[name](model, groups, images)
    mean = (
        torch.cat(list(scores.values())).double().mean().clamp_min(1e-300)
        if scores
        else 1.0
    )
    return {group: (score / mean).float() for group, score in scores.items()}


def check_criterion(name: str) -> None:
    """Raises a `UserError` that offers the nearest criterion unless `name` is known."""
    check_known("criterion", name, CRITERIA)


def _weights(model: nn.Module, members: list[Member]) -> list[Tensor]:
    """Per member the weights of each channel, `(n_channels, n_weights)`."""
    tensors = model.state_dict()
    return [
        member.rows(tensors[member.tensor].float()).flatten(1) for member in members
    ]


def _average(scores: list[Tensor]) -> Tensor:
    """The mean over layers, each at mean 1."""
    return torch.stack([_at_mean_one(score) for score in scores]).mean(0)


def _at_mean_one(score: Tensor) -> Tensor:
    return score / score.mean().clamp_min(1e-12)


def _filterwise(score: Callable[[Tensor], Tensor]) -> Criterion:
    def criterion(model: nn.Module, groups: Groups, images: Images) -> Importance:
        return {
            g.name: _average(
                [score(rows) for rows in _weights(model, groups.filters(g))]
            )
            for g in groups
        }

    return criterion


def _geometric_median(rows: Tensor) -> Tensor:
    """FPGM, He et al. 2019, eq. 7: the sum of distances to the layer's other filters."""
    return torch.cdist(rows, rows).sum(1)


def _lamp(model: nn.Module, groups: Groups, images: Images) -> Importance:
    """LAMP, Lee et al. 2021, eq. 6, with a filter's norm in place of a weight.

    The squared norm as a share of what would be left if all weaker filters of the layer
    were gone.
    """
    return {
        g.name: torch.stack(
            [
                lamp_scores(rows.square().sum(1))
                for rows in _weights(model, groups.filters(g))
            ]
        ).mean(0)
        for g in groups
    }


def lamp_scores(squares: Tensor) -> Tensor:
    """Each of the squares `(n,)` as a share of all that aren't smaller."""
    ordered, order = squares.sort(descending=True, stable=True)
    shares = ordered / ordered.cumsum(0).clamp_min(torch.finfo(squares.dtype).tiny)
    return torch.empty_like(shares).index_copy_(0, order, shares)


def _bn_scale(model: nn.Module, groups: Groups, images: Images) -> Importance:
    """Network Slimming, Liu et al. 2017: |gamma|; a group without batch norm falls
    under L1.
    """
    l1 = CRITERIA["l1"](model, groups, images)
    scores = {}
    for group in groups:
        vectors = [
            m
            for m in group.members
            if m.role == "follow" and len(groups.shapes[m.tensor]) == 1
        ]
        scales = _weights(model, [m for m in vectors if m.tensor.endswith("weight")])
        scores[group.name] = (
            torch.stack([g.abs().sum(1) for g in scales]).mean(0)
            if scales
            else l1[group.name]
        )
    return scores


def _activation(model: nn.Module, groups: Groups, images: Images) -> Importance:
    """Mean absolute activation where the channel is read (Molchanov et al. 2017,
    section 2.2).
    """
    means = mean_reading(model, groups, images[:IMAGES].inputs, torch.abs)
    return {name: _at_mean_one(mean) for name, mean in means.items()}


def _apoz(model: nn.Module, groups: Groups, images: Images) -> Importance:
    """Network Trimming, Hu et al. 2016, eq. 1: one minus the average percentage of
    zeros, where the channel is read.
    """
    active = mean_reading(
        model, groups, images[:IMAGES].inputs, lambda x: (x != 0).float()
    )
    if active and all((share == 1).all() for share in active.values()):
        raise UserError(
            "criterion",
            "apoz counts the zeros that ReLU leaves, and this network has "
            "none; use activation",
        )
    return active


def _random(model: nn.Module, groups: Groups, images: Images) -> Importance:
    """The control: scores that depend on nothing but the seed."""
    return {group.name: torch.rand(group.channels) for group in groups}


def _taylor(model: nn.Module, groups: Groups, images: Images) -> Importance:
    """Molchanov et al. 2019, eq. 8: the squared sum of weight times gradient over a
    filter, averaged over batches.

    We use batches of 50 of up to 500 training images in eval mode, so that batch norm
    keeps its trained statistics.
    """
    twin = _twin(model)
    scores = {group.name: torch.zeros(group.channels) for group in groups}
    for loss in _losses(twin, images):
        weights = _filter_weights(twin, groups)
        products = dict(
            zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True)
        )
        products = {
            name: (weight * products[name]).detach() for name, weight in weights.items()
        }
        for group in groups:
            for member in groups.filters(group):
                scores[group.name] += _by_channel(products, member) ** 2
    return scores


def _hessian(model: nn.Module, groups: Groups, images: Images) -> Importance:
    """Optimal Brain Damage, LeCun et al. 1990, eq. 5: |sum over a filter of h w^2 / 2|,
    h the Hessian's diagonal.

    The diagonal is estimated from Hessian-vector products with weights of random signs,
    v = r w, since E[v (H v)] = h w^2 (Hutchinson 1990). In eval mode, on batches as for
    `taylor`. Not all of h is positive in a trained network; what counts is how far the
    loss moves, so a filter's sum is taken without its sign.
    """
    twin = _twin(model)
    scores = {group.name: torch.zeros(group.channels) for group in groups}
    for loss in _losses(twin, images):
        weights = _filter_weights(twin, groups)
        gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        for _ in range(PROBES):
            probes = [w.detach() * _signs(w) for w in weights.values()]
            curved = torch.autograd.grad(
                gradients, list(weights.values()), probes, retain_graph=True
            )
            products = {
                name: v * hv
                for name, v, hv in zip(weights, probes, curved, strict=True)
            }
            for group in groups:
                for member in groups.filters(group):
                    scores[group.name] += _by_channel(products, member) / 2
    return {name: score.abs() for name, score in scores.items()}


def _signs(like: Tensor) -> Tensor:
    return torch.randint(0, 2, like.shape).to(like.dtype) * 2 - 1


def _twin(model: nn.Module) -> nn.Module:
    """A copy of which every weight has a gradient."""
    return copy.deepcopy(model).eval().requires_grad_(True)


def _losses(twin: nn.Module, images: Images) -> Iterator[Tensor]:
    for batch in (
        images[start : start + BATCH]
        for start in range(0, min(len(images), IMAGES), BATCH)
    ):
        yield F.cross_entropy(twin(batch.inputs), batch.labels)


def _filter_weights(twin: nn.Module, groups: Groups) -> dict[str, Tensor]:
    parameters = dict(twin.named_parameters())
    return {
        member.tensor: parameters[member.tensor]
        for group in groups
        for member in groups.filters(group)
    }


def _by_channel(values: dict[str, Tensor], member: Member) -> Tensor:
    """Sums of a weight's values over each channel, `(n_channels,)`."""
    return member.rows(values[member.tensor]).flatten(1).sum(1)


CRITERIA: dict[str, Criterion] = {
    "l1": _filterwise(lambda rows: rows.abs().sum(1)),
    "l2": _filterwise(lambda rows: rows.norm(dim=1)),
    "bn_scale": _bn_scale,
    "fpgm": _filterwise(_geometric_median),
    "activation": _activation,
    "apoz": _apoz,
    "taylor": _taylor,
    "hessian": _hessian,
    "lamp": _lamp,
    "random": _random,
}
