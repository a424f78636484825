"""Weights that the code computes from parameters: gains, norms, standardisation, masks.

Each network is stem, body, head; the body's weight is computed. What a pruned one must
compute is written down by hand, from the dense parameters and the kept channels alone.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from nets import counted_macs, difference, images, outputs, random_kept, randomise
from timm.layers import ScaledStdConv2d, StdConv2d
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from autoprune.costs.cost import CostTable
from autoprune.costs.search_space import SearchSpace
from autoprune.structure.slicing import prune
from autoprune.tracing.masking import mask
from autoprune.tracing.trace import trace

N_IN, N_OUT, SIZE = 6, 8, 8
FAN_IN = (1, 2, 3)


class Computed(nn.Module):
    """A convolution whose weight a function makes of a kernel and other parameters."""

    def __init__(self, formula: Callable[..., Tensor], *shapes: tuple[int, ...]):
        super().__init__()
        self.formula = formula
        self.kernel = nn.Parameter(torch.ones(N_OUT, N_IN, 3, 3))
        self.others = nn.ParameterList(
            [nn.Parameter(torch.ones(shape)) for shape in shapes]
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.formula(self.kernel, *self.others), padding=1)


class Masked(nn.Conv2d):
    """A convolution that doesn't see what lies below, as PixelCNN's."""

    def __init__(self):
        super().__init__(N_IN, N_OUT, 3, padding=1)
        below = torch.ones_like(self.weight)
        below[:, :, 2] = 0
        self.register_buffer("below", below)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.below, self.bias, padding=1)


class Flat(nn.Module):
    """A convolution whose parameter has the kernel's axes flat."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.ones(N_OUT, N_IN * 9))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel.view(len(self.kernel), -1, 3, 3), padding=1)


def conv() -> nn.Conv2d:
    """The body as a plain convolution."""
    return nn.Conv2d(N_IN, N_OUT, 3, padding=1)


def normed(weight: Tensor, dims: tuple[int, ...] = FAN_IN) -> Tensor:
    """A weight over its norm."""
    return weight / weight.pow(2).sum(dims, keepdim=True).sqrt()


def standard(weight: Tensor, eps: float, biased: bool = True) -> Tensor:
    """A weight with mean 0 and variance 1 of each filter."""
    mean = weight.mean(FAN_IN, keepdim=True)
    variance = weight.var(FAN_IN, keepdim=True, unbiased=not biased)
    return (weight - mean) / (variance + eps).sqrt()


def by_module(weight: Tensor) -> Tensor:
    """Standardisation as Qiao et al. write it, with operations of their own."""
    weight = weight - weight.mean(1, keepdim=True).mean(2, keepdim=True).mean(
        3, keepdim=True
    )
    std = weight.view(weight.size(0), -1).std(dim=1).view(-1, 1, 1, 1) + 1e-5
    return weight / std.expand_as(weight)


def spectral(body: nn.Module, out: Tensor, into: Tensor) -> Tensor:
    """A weight over its largest singular value, as stored vectors estimate it."""
    (inner,) = body.parametrizations.weight
    weight = body.parametrizations.weight.original[out][:, into]
    right = inner._v.view(N_IN, 9)[into].flatten()
    return weight / (inner._u[out] @ (weight.flatten(1) @ right))


@dataclass(frozen=True)
class Case:
    """A body, and its weight by hand.

    Attributes:
        build: Makes the body.
        by_hand: From body, kept outputs and kept inputs to the weight.
    """

    build: Callable[[], nn.Module]
    by_hand: Callable[[nn.Module, Tensor, Tensor], Tensor]


def of_kernel(formula: Callable[..., Tensor], *shapes: tuple[int, ...]) -> Case:
    """A formula of a kernel and others that lie along its axes."""

    def by_hand(body: nn.Module, out: Tensor, into: Tensor) -> Tensor:
        others = []
        for other in body.others:
            if other.ndim and other.shape[0] == N_OUT:
                other = other[out]
            if other.ndim > 1 and other.shape[1] == N_IN:
                other = other[:, into]
            others.append(other)
        return formula(body.kernel[out][:, into], *others)

    return Case(lambda: Computed(formula, *shapes), by_hand)


CASES = {
    "half": of_kernel(lambda w: w * 0.5),
    "softplus": of_kernel(F.softplus),
    "gain": of_kernel(lambda w, g: w * g.view(-1, 1, 1, 1), (N_OUT,)),
    "gain_of_inputs": of_kernel(lambda w, g: g * w, (1, N_IN, 1, 1)),
    "two_kernels": of_kernel(lambda w, v: w * torch.sigmoid(v), (N_OUT, N_IN, 3, 3)),
    "padded_kernel": of_kernel(lambda w, v: w + F.pad(v, [1] * 4), (N_OUT, N_IN, 1, 1)),
    "binarised": of_kernel(lambda w: w.sign() * w.abs().mean(FAN_IN, keepdim=True)),
    "binarised_as_a_whole": of_kernel(lambda w: w.sign() * w.abs().mean()),
    "normed_by_hand": of_kernel(lambda w: F.normalize(w, dim=1)),
    "demodulated": of_kernel(lambda w: w * (w.pow(2).sum((1, 2, 3)) + 1e-8).rsqrt()[:, None, None, None]),
    "softmax": of_kernel(lambda w: w.flatten(1).softmax(1).view_as(w)),
    "standardised": of_kernel(by_module),
    "clamped": of_kernel(lambda w, a: torch.minimum(w, a) * 2 + w.detach(), (N_OUT, 1, 1, 1)),
    "where": of_kernel(lambda w: torch.where(w.abs() > w.abs().mean((2, 3), keepdim=True), w, 0.0)),
    "layer_norm": of_kernel(lambda w: F.layer_norm(w.flatten(2), (9,)).view_as(w)),
    "weight_norm": Case(
        lambda: parametrizations.weight_norm(conv()),
        lambda body, out, into: (
            body.parametrizations.weight.original0[out]
            * normed(body.parametrizations.weight.original1[out][:, into])
        ),
    ),
    "weight_norm_of_inputs": Case(
        lambda: parametrizations.weight_norm(conv(), dim=1),
        lambda body, out, into: (
            body.parametrizations.weight.original0[:, into]
            * normed(body.parametrizations.weight.original1[out][:, into], (0, 2, 3))
        ),
    ),
    "spectral_norm": Case(lambda: parametrizations.spectral_norm(conv()), spectral),
    "timm_scaled": Case(
        lambda: ScaledStdConv2d(N_IN, N_OUT, 3, padding=1),
        lambda body, out, into: (
            standard(body.weight[out][:, into], body.eps) * body.gain[out] * body.scale
        ),
    ),
    "timm_standard": Case(
        lambda: StdConv2d(N_IN, N_OUT, 3, padding=1),
        lambda body, out, into: standard(body.weight[out][:, into], body.eps),
    ),
    "masked_below": Case(
        Masked,
        lambda body, out, into: (body.weight * body.below)[out][:, into],
    ),
    "flat": Case(
        Flat,
        lambda body, out, into: body.kernel.view(N_OUT, N_IN, 3, 3)[out][:, into],
    ),
}  # fmt: skip


class Network(nn.Module):
    """Stem, body, head."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.stem = nn.Conv2d(3, N_IN, 3, padding=1)
        self.body = body
        self.head = nn.Conv2d(N_OUT, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x).relu()).tanh())


def network(body: nn.Module) -> nn.Module:
    """A network in float64 with random weights."""
    return randomise(Network(body).double()).eval()


@pytest.mark.parametrize("name", CASES)
def test_computed_weights_lose_the_channels_of_the_plain_one(name):
    model = network(CASES[name].build())
    groups = trace(model, images(1, SIZE))
    assert len(groups) == 2, groups.reasons
    widths = {group.channels for group in groups}
    assert widths == {N_IN, N_OUT}
    x = images(2, SIZE, torch.float64)
    for seed in range(2):
        kept = random_kept(groups, seed)
        pruned = prune(model, groups, kept)
        counts = {name: len(channels) for name, channels in kept.items()}
        assert CostTable(groups).macs(counts) == counted_macs(pruned, SIZE)
        assert difference(outputs(pruned, x), outputs(mask(model, groups, kept), x)) < (
            1e-12
        )


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_pruned_weights_are_computed_from_what_is_left(name):
    model = network(CASES[name].build())
    groups = trace(model, images(1, SIZE))
    into, out = torch.tensor([0, 2, 3]), torch.tensor([1, 4, 5, 6, 7])
    widths = {N_IN: into, N_OUT: out}
    pruned = prune(
        model, groups, {group.name: widths[group.channels] for group in groups}
    )
    x = images(2, SIZE, torch.float64)
    read = model.stem(x).relu()[:, into]
    weight = CASES[name].by_hand(model.body, out, into)
    bias = getattr(model.body, "bias", None)
    made = F.conv2d(read, weight, None if bias is None else bias[out], padding=1)
    expected = F.conv2d(made.tanh(), model.head.weight[:, out], model.head.bias)
    assert difference(pruned(x), expected) < 1e-12


PLAIN = {
    "linear": lambda: nn.Linear(N_IN, N_OUT),
    "transposed": lambda: nn.ConvTranspose2d(N_IN, N_OUT, 3),
    "grouped": lambda: nn.Conv2d(N_IN, N_IN * 2, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(N_IN, N_IN, 3, groups=N_IN),
}
WRAPPED = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
}


class OnLast(nn.Module):
    """A linear layer on the channels of a map."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.movedim(1, -1)).movedim(-1, 1)


@pytest.mark.parametrize("wrap", WRAPPED)
@pytest.mark.parametrize("kind", PLAIN)
def test_parametrizations_of_other_layers_have_the_groups_of_the_plain_layer(
    kind, wrap
):
    def build(wrapper) -> nn.Module:
        inner = PLAIN[kind]()
        n_out = getattr(inner, "out_channels", N_OUT)
        body = wrapper(inner)
        model = Network(OnLast(body) if kind == "linear" else body)
        model.head = nn.Conv2d(n_out, 4, 1)
        return randomise(model.double()).eval()

    plain = trace(build(lambda inner: inner), images(1, SIZE))
    model = build(WRAPPED[wrap])
    groups = trace(model, images(1, SIZE))
    assert groups.channels == plain.channels, groups.reasons
    x = images(2, SIZE, torch.float64)
    kept = random_kept(groups, 0)
    pruned = prune(model, groups, kept)
    masked = mask(model, groups, kept)
    assert difference(outputs(pruned, x), outputs(masked, x)) < 1e-12


def test_attributes_of_parametrized_convolutions_follow_their_weights():
    model = network(parametrizations.weight_norm(conv()))
    groups = trace(model, images(1, SIZE))
    kept = {"stem": torch.arange(2), "body": torch.arange(5)}
    pruned = prune(model, groups, kept)
    assert (pruned.body.in_channels, pruned.body.out_channels) == (2, 5)
    assert pruned.body.parametrizations.weight.original0.shape == (5, 1, 1, 1)


class Pointwise(nn.Module):
    """A standardised filter of one weight has no deviation, and PyTorch says so."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.body = ScaledStdConv2d(16, N_OUT, 1)
        self.head = nn.Conv2d(N_OUT, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x).relu()).tanh())


def test_a_layer_that_can_not_run_with_one_channel_is_pruned_down_to_two():
    model = randomise(Pointwise().double()).eval()
    groups = trace(model, images(1, SIZE))
    assert groups.channels == {"stem": 16, "body": N_OUT}
    x = images(2, SIZE, torch.float64)
    kept = {"stem": torch.tensor([1, 3]), "body": torch.tensor([0])}
    pruned = prune(model, groups, kept)
    assert difference(outputs(pruned, x), outputs(mask(model, groups, kept), x)) < 1e-12
    with pytest.raises(ValueError, match="more than 1 value"):
        prune(model, groups, {"stem": torch.tensor([1])})(x)
    # So no search is offered it.
    assert groups["stem"].least == 2
    space = SearchSpace(CostTable(groups), round_to=1, max_sparsity=0.99)
    assert space.low.tolist() == [2, 2]


OUTER = ((N_OUT, N_IN, 3, 2), (N_OUT, N_IN, 2, 3))
UNFOLLOWED = {
    "outer": (lambda w, a, b: (a @ b) * 1.0, OUTER, "isn't a parameter as a whole"),
    "svd": (lambda w: w / torch.linalg.svdvals(w.flatten(1))[0], (), "_linalg_svd in body has no rule"),
    "constant": (lambda w: w * torch.ones(N_OUT, 1, 1, 1), (), "meets a constant"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFOLLOWED)
def test_what_cannot_follow_is_pinned_with_its_reason(name):
    formula, shapes, reason = UNFOLLOWED[name]
    groups = trace(network(Computed(formula, *shapes)), images(1, SIZE))
    assert any(reason in text for text in groups.reasons.values()), groups.reasons


@pytest.mark.parametrize("wrap", WRAPPED)
def test_a_computed_weight_takes_labels_for_its_axes_not_for_its_elements(wrap):
    plain = trace(network(conv()), images(1, SIZE), verify=False)
    computed = trace(network(WRAPPED[wrap](conv())), images(1, SIZE), verify=False)
    n_elements = conv().weight.numel()
    n_more = computed.book.n_labels - plain.book.n_labels
    # Spectral norm's vectors are as long as all inputs' pixels, the longest axis.
    assert n_more < n_elements / 3


def test_shapes_are_read_without_moving_the_vectors_of_spectral_norm():
    model = network(parametrizations.spectral_norm(conv()))
    groups = trace(model, images(1, SIZE))
    model.train()
    (inner,) = model.body.parametrizations.weight
    before = inner._u.clone()
    pruned = prune(model, groups, {})
    (of_pruned,) = pruned.body.parametrizations.weight
    assert torch.equal(inner._u, before)
    assert torch.equal(of_pruned._u, before)
