"""How important each channel is: one score per channel of every group.

A criterion is a function `criterion(model, groups, images)` that returns a dict from
the name of every prunable group to its scores, a tensor `(n_channels,)` of finite
numbers from 0; higher is kept. `CRITERIA` holds those that are known by name, and its
docstring says how to add one. `importance` is how they are called.

A group's channels sit in several layers; its scores are the mean over the layers that
produce the channels. Where a criterion says nothing of layers beside each other (a
filter's norm, a mean activation), each layer's scores are divided by their mean, so
that no layer drowns the others; the scores of the others (`bn_scale`, `apoz`, `taylor`,
`hessian`, `lamp`) can be ranked across the network as they are.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune.data.datasets import Images, seeded
from autoprune.errors import UserError, check_known
from autoprune.structure.groups import Group, Groups, Member
from autoprune.structure.slicing import own_copy
from autoprune.structure.wrappers import unwrap
from autoprune.tracing.channel_statistics import mean_channel_statistic

Importance = dict[str, Tensor]
"""Prunable group to scores `(n_channels,)`, higher is kept."""
Criterion = Callable[[nn.Module, Groups, Images], Importance]
"""From the dense network, its trace and training images to scores."""

BATCH = 50
"""Images of a batch, of the criteria that look at data."""
IMAGES = 500
"""Images of all batches at most, of the criteria that look at data."""
PROBES = 4
"""Random directions for each batch in which `hessian` measures curvature."""


def importance(
    name: str, model: nn.Module, groups: Groups, images: Images, seed: int = 0
) -> Importance:
    """Scores per prunable group, with mean 1 over the network.

    Args:
        name: A key of `CRITERIA`.
        model: The dense network; left as found.
        groups: Its trace.
        images: Training images, for the criteria that look at data.
        seed: Of the criteria with chance in them, `random` and `hessian`.

    Returns:
        Group to scores `(n_channels,)` in float32, higher is kept.

    Raises:
        UserError: If the criterion is unknown; the nearest known one is offered. Or if
            it can't tell the network's channels apart.
    """
    check_criterion(name)
    model = unwrap(model)
    with seeded(seed):
        scores = CRITERIA[name](model, groups, images)
    if not scores:
        return {}
    # In float64, and never 0: all scores may be 0, which leaves no order to scale.
    mean = torch.cat(list(scores.values())).double().mean().clamp_min(1e-300)
    return {group: (score / mean).float() for group, score in scores.items()}


def check_criterion(name: str) -> None:
    """Raises a `UserError` that offers the nearest criterion unless `name` is known."""
    check_known("criterion", name, CRITERIA)


# Criteria that look at a filter's weights only


def _filterwise(score: Callable[[Tensor], Tensor]) -> Criterion:
    """A criterion that scores each layer by itself.

    Args:
        score: From a layer's filters `(n_channels, n_weights)` to a number for each,
            `(n_channels,)`, higher is kept.
    """

    def criterion(model: nn.Module, groups: Groups, images: Images) -> Importance:
        scores = {}
        for group in groups:
            layers = []
            for rows in _weights(model, groups.filters(group)):
                layers.append(_scaled_to_mean_one(score(rows)))
            scores[group.name] = torch.stack(layers).mean(0)
        return scores

    return criterion


def _l1_norm(rows: Tensor) -> Tensor:
    """Li et al. 2017 ("Pruning Filters for Efficient ConvNets"), section 3.1."""
    return rows.abs().sum(1)


def _l2_norm(rows: Tensor) -> Tensor:
    """Length of each filter, as in He et al. 2018 ("Soft Filter Pruning")."""
    return rows.norm(dim=1)


def _geometric_median(rows: Tensor) -> Tensor:
    """FPGM, He et al. 2019, eq. 7: the sum of distances to the layer's other filters.

    A filter amid the others can be replaced by them, so it scores low. Of filters
    (0, 0), (3, 4) and (6, 8) the scores are 15, 10 and 15.
    """
    return torch.cdist(rows, rows).sum(1)


def _lamp(model: nn.Module, groups: Groups, images: Images) -> Importance:
    """LAMP, Lee et al. 2021, eq. 6, with a filter's norm in place of a weight.

    The squared norm as a share of what would be left if all weaker filters of the layer
    were gone.
    """
    scores = {}
    for group in groups:
        layers = []
        for rows in _weights(model, groups.filters(group)):
            layers.append(lamp_scores(rows.square().sum(1)))
        scores[group.name] = torch.stack(layers).mean(0)
    return scores


def lamp_scores(squares: Tensor) -> Tensor:
    """Each of the squares as a share of all that aren't smaller.

    Of 1, 4 and 5 the shares are 1 / 10, 4 / 9 and 5 / 5: the largest always has 1, so
    that no layer loses its last filter before another's.

    Args:
        squares: Numbers from 0, `(n,)`.

    Returns:
        The shares `(n,)`, in [0, 1]; higher is kept. Of equal squares an earlier one
        counts as larger.
    """
    ordered, order = squares.sort(descending=True, stable=True)
    # Where all squares are 0 their shares are 0, not NaN.
    tiny = torch.finfo(squares.dtype).tiny
    shares = ordered / ordered.cumsum(0).clamp_min(tiny)
    return torch.empty_like(shares).index_copy_(0, order, shares)


def _bn_scale(model: nn.Module, groups: Groups, images: Images) -> Importance:
    """Network Slimming, Liu et al. 2017: |gamma|, the mean over batch norms.

    A group without batch norm falls under L1.
    """
    l1 = CRITERIA["l1"](model, groups, images)
    scores = {}
    for group in groups:
        gammas = _weights(model, _norm_scales(groups, group))
        # A channel may have several positions in a norm; their scales add up.
        if gammas:
            layers = [gamma.abs().sum(1) for gamma in gammas]
            scores[group.name] = torch.stack(layers).mean(0)
        else:
            scores[group.name] = l1[group.name]
    return scores


def _norm_scales(groups: Groups, group: Group) -> list[Member]:
    """The scales of the norms that follow a group's channels."""
    scales = []
    for member in group.members:
        # Depthwise convolutions follow too, but their weights aren't vectors.
        is_vector = len(groups.shapes[member.tensor]) == 1
        is_scale = member.tensor.endswith("weight")
        if member.role == "follow" and is_vector and is_scale:
            scales.append(member)
    return scales


def _weights(model: nn.Module, members: list[Member]) -> list[Tensor]:
    """Per member the weights of each channel, `(n_channels, n_weights)`."""
    tensors = model.state_dict()
    weights = []
    for member in members:
        weights.append(member.rows(tensors[member.tensor].float()).flatten(1))
    return weights


def _scaled_to_mean_one(score: Tensor) -> Tensor:
    """One layer's scores divided by their mean; scores of 0 stay 0."""
    return score / score.mean().clamp_min(1e-12)


# Criteria that look at activations


def _activation(model: nn.Module, groups: Groups, images: Images) -> Importance:
    """Mean absolute activation where the channel is read.

    Molchanov et al. 2017, section 2.2.
    """
    means = mean_channel_statistic(model, groups, images[:IMAGES].inputs, torch.abs)
    return {name: _scaled_to_mean_one(mean) for name, mean in means.items()}


def _apoz(model: nn.Module, groups: Groups, images: Images) -> Importance:
    """Network Trimming, Hu et al. 2016, eq. 1, where the channel is read.

    One minus the average percentage of zeros, so that higher is kept.
    """
    active = mean_channel_statistic(model, groups, images[:IMAGES].inputs, _is_nonzero)
    # Where nothing is ever zero, all channels would score the same.
    if active and all((share == 1).all() for share in active.values()):
        raise UserError(
            "criterion",
            "apoz counts the zeros that ReLU leaves, and this network has "
            "none; use activation",
        )
    return active


def _is_nonzero(activations: Tensor) -> Tensor:
    """1 where an activation isn't zero, else 0; in float32, to be averaged."""
    return (activations != 0).float()


# Criteria that look at the loss


def _taylor(model: nn.Module, groups: Groups, images: Images) -> Importance:
    """Molchanov et al. 2019, eq. 8: squared sums of weight times gradient.

    The sum runs over a filter, its square is averaged over batches. We use batches of
    50 of up to 500 training images in eval mode, so that batch norm keeps its trained
    statistics.
    """
    twin = _trainable_copy(model)
    scores = _zeros(groups)
    for loss in _losses(twin, images):
        weights = _filter_weights(twin, groups)
        gradients = torch.autograd.grad(loss, list(weights.values()))
        products = {}
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
            # Else the scores would keep every batch's graph in memory.
            products[name] = (weight * gradient).detach()
        for group in groups:
            for member in groups.filters(group):
                scores[group.name] += _by_channel(products, member) ** 2
    return scores


def _hessian(model: nn.Module, groups: Groups, images: Images) -> Importance:
    """Optimal Brain Damage, LeCun et al. 1990, eq. 5: |sum over a filter of h w^2 / 2|.

    h is the Hessian's diagonal. It is estimated from Hessian-vector products with
    weights of random signs, v = r w, since E[v (H v)] = h w^2 (Hutchinson 1990). In
    eval mode, on batches as for `taylor`. Not all of h is positive in a trained
    network; what counts is how far the loss moves, so a filter's sum is taken without
    its sign.
    """
    twin = _trainable_copy(model)
    scores = _zeros(groups)
    for loss in _losses(twin, images):
        weights = _filter_weights(twin, groups)
        tensors = list(weights.values())
        # With a graph, so that the gradients can be differentiated once more.
        gradients = torch.autograd.grad(loss, tensors, create_graph=True)
        for _ in range(PROBES):
            probes = [weight.detach() * _signs(weight) for weight in tensors]
            curved = torch.autograd.grad(gradients, tensors, probes, retain_graph=True)
            products = {}
            for name, probe, hessian_probe in zip(weights, probes, curved, strict=True):
                products[name] = probe * hessian_probe
            for group in groups:
                for member in groups.filters(group):
                    scores[group.name] += _by_channel(products, member) / 2
    # Only now without signs: batches and probes are parts of one sum.
    return {name: score.abs() for name, score in scores.items()}


def _signs(like: Tensor) -> Tensor:
    """Random signs, -1 or 1, in the shape and type of a tensor."""
    return torch.randint(0, 2, like.shape).to(like.dtype) * 2 - 1


def _trainable_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode of which every weight has a gradient."""
    # Every one, since filters of frozen layers are scored, too.
    return own_copy(model).eval().requires_grad_(True)


def _zeros(groups: Groups) -> Importance:
    """A score of 0 for each channel, to be added to."""
    return {group.name: torch.zeros(group.channels) for group in groups}


def _losses(twin: nn.Module, images: Images) -> Iterator[Tensor]:
    """The mean cross-entropy of each batch."""
    # One at a time, so that only one batch's graph is in memory.
    for start in range(0, min(len(images), IMAGES), BATCH):
        batch = images[start : start + BATCH]
        yield F.cross_entropy(twin(batch.inputs), batch.labels)


def _filter_weights(twin: nn.Module, groups: Groups) -> dict[str, Tensor]:
    """By name the weights that produce prunable channels, each once."""
    parameters = dict(twin.named_parameters())
    weights = {}
    # By name: one weight may produce the channels of several groups, and gradients
    # are asked for once.
    for group in groups:
        for member in groups.filters(group):
            weights[member.tensor] = parameters[member.tensor]
    return weights


def _by_channel(values: dict[str, Tensor], member: Member) -> Tensor:
    """Sums of a weight's values over each channel, `(n_channels,)`."""
    return member.rows(values[member.tensor]).flatten(1).sum(1)


# The control


def _random(model: nn.Module, groups: Groups, images: Images) -> Importance:
    """Scores that depend on nothing but the seed."""
    return {group.name: torch.rand(group.channels) for group in groups}


CRITERIA: dict[str, Criterion] = {
    "l1": _filterwise(_l1_norm),
    "l2": _filterwise(_l2_norm),
    "bn_scale": _bn_scale,
    "fpgm": _filterwise(_geometric_median),
    "activation": _activation,
    "apoz": _apoz,
    "taylor": _taylor,
    "hessian": _hessian,
    "lamp": _lamp,
    "random": _random,
}
"""The criteria by name; an extension point.

To add one, write a function and enter it here under its name, or from your own code
before a run starts:

    def largest_weight(model, groups, images):
        tensors = model.state_dict()
        scores = {}
        for group in groups:
            layers = []
            for member in groups.filters(group):
                rows = member.rows(tensors[member.tensor])  # (n_channels, k, ...)
                layers.append(rows.flatten(1).abs().amax(1))
            scores[group.name] = torch.stack(layers).mean(0)
        return scores

    CRITERIA["largest_weight"] = largest_weight

- It gets the dense network, its trace and training images (`images.inputs` are
  normalised, float32 `(n_images, 3, height, width)`; `images.labels` are int64
  `(n_images,)`). It leaves all three as they are.
- It returns a score for each channel of every prunable group: a dict from
  `group.name` to a float tensor `(group.channels,)`, for all groups that iterating
  `groups` gives, and no others.
- Higher is kept. Scores are finite and from 0, since sampling takes their logarithm.
- Scale doesn't matter within the network (`importance` divides by the mean over all
  channels), but scores of different groups are compared by some methods: if yours say
  nothing of groups beside each other, give each layer's the mean 1.
- Random numbers come from torch's global generator on the CPU, which `importance`
  seeds.

`autoprune run --criterion NAME` and `tests/test_importance.py` go through this table,
so a new entry is offered and tested under its name.
"""
