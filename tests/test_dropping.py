"""Dropped weights come back bit by bit, only candidates are dropped, and the statistics
are Bernoulli's.
"""

import pytest
import torch
from nets import NETS, build, images, outputs
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune.config import DataConfig, FinetuneConfig
from autoprune.costs.cost import CostTable
from autoprune.data.datasets import Images, load
from autoprune.errors import UserError
from autoprune.structure.groups import Groups
from autoprune.tracing.masking import mask
from autoprune.tracing.trace import trace
from autoprune.training.dropping import DropConnect, DropOut, Dropping
from autoprune.training.loop import finetune
from autoprune.training.masks import ranked_masks

KINDS = (DropConnect, DropOut)


def traced(name: str = "chain") -> tuple[nn.Module, Groups]:
    model = build(name)
    return model, trace(model, images(1, NETS[name].size))


def test_drop_connects_preactivation_has_bernoullis_mean_and_variance():
    # papers.md 3.1: mean p W x, variance p (1 - p) sum W^2 x^2.
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5, bias=False))
    groups, x = trace(model, torch.randn(1, 3, 2, 2)), torch.randn(1, 3, 2, 2)
    weight, n, keep = model[1].weight.detach().clone(), 10_000, 0.7
    callback, draws = DropConnect(groups, 1 - keep, 1.0), []
    torch.manual_seed(0)
    with torch.no_grad():
        for _ in range(n):
            callback.before_forward(model, 0)
            draws.append(model(x)[0])
            callback.before_step(model, 0)
    draws, flat = torch.stack(draws).double(), x.flatten()
    variance = (keep * (1 - keep) * (weight**2 @ flat**2)).double()
    assert (
        (draws.mean(0) - keep * (weight @ flat)).abs() < 3.5 * (variance / n).sqrt()
    ).all()
    torch.testing.assert_close(draws.var(0), variance, rtol=0.1, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["chain", "residual", "concat", "grouped", "flatten"])
def test_weights_come_back_bit_by_bit_and_the_dropped_have_no_gradient(
    kind: type[Dropping], name
):
    model, groups = traced(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    callback = kind(groups, 0.5, 1.0)
    torch.manual_seed(1)
    callback.before_forward(model, 0)
    dropped = {
        key: (p == 0) & (before[key] != 0) for key, p in model.named_parameters()
    }
    model(images(4, NETS[name].size)).sum().backward()
    callback.before_step(model, 0)
    assert any(mark.any() for mark in dropped.values())
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, before[key]), key
        assert (parameter.grad[dropped[key]] == 0).all(), key


@pytest.mark.parametrize("kind", KINDS)
def test_what_an_earlier_step_dropped_has_a_gradient_again(kind: type[Dropping]):
    model, groups = traced("residual")
    callback, x, weight = kind(groups, 0.5, 1.0), images(4, 8), model.outer.weight
    torch.manual_seed(1)
    dropped = []
    for step in range(2):
        callback.before_forward(model, step)
        dropped.append((weight == 0).clone())
        model.zero_grad()
        model(x).square().sum().backward()
        callback.before_step(model, step)
    again = dropped[0] & ~dropped[1]
    assert again.any()
    assert (weight.grad[again] != 0).any()
    assert (weight.grad[dropped[1]] == 0).all()


class Noting(DropOut):
    """Remembers what it dropped."""

    def _kept(self, sizes: Tensor) -> Tensor:
        self.noted.append(super()._kept(sizes))
        return self.noted[-1]


@pytest.mark.parametrize(
    "name",
    [
        "chain",
        "residual",
        "concat",
        "depthwise_multiplier",
        "grouped",
        "shared",
        "flatten",
    ],
)
def test_a_dropped_channel_is_a_pruned_one(name):
    model, groups = traced(name)
    x, callback, compared = images(4, NETS[name].size), Noting(groups, 0.4, 1.0), 0
    for seed in range(6):
        callback.noted = []
        torch.manual_seed(seed)
        callback.before_forward(model, 0)
        dropped = outputs(model, x)
        callback.before_step(model, 0)
        kept = {
            group.name: marks.nonzero()[:, 0]
            for group, marks in zip(groups, callback.noted, strict=True)
        }
        if all(
            map(len, kept.values())
        ):  # a network without a single channel of a group can't be built
            torch.testing.assert_close(
                dropped, outputs(mask(model, groups, kept), x), rtol=0, atol=1e-5
            )
            compared += any(len(kept[group.name]) < group.channels for group in groups)
    assert compared >= 2


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_only_the_least_share_of_each_layer_is_ever_dropped(share):
    model, groups = traced()
    weight, callback = (
        model.conv2.weight.detach().clone(),
        DropConnect(groups, 0.9, share),
    )
    n_candidates = round(share * weight.numel())
    least = weight.abs() <= weight.abs().flatten().sort().values[n_candidates - 1]
    ever = torch.zeros_like(least)
    for _ in range(30):
        callback.before_forward(model, 0)
        ever |= model.conv2.weight.detach() == 0
        callback.before_step(model, 0)
    assert torch.equal(ever, least)


def test_only_channels_with_the_smallest_filters_of_all_their_layers_are_dropped():
    model, groups = traced("residual")
    with torch.no_grad():
        model.stem.weight.mul_(0.01)  # L2 over both layers: 0 to 3 are the least
        model.stem.weight[0] = 0.2  # alone, this layer would keep it
        model.outer.weight.fill_(0.1)
        model.outer.weight[4:] = 0
        model.outer.weight[4:, 0, 0, 0] = 4.0  # a small sum of |w|, and a large norm
    callback, ever = DropOut(groups, 0.9, 0.5), torch.zeros(8, dtype=torch.bool)
    for _ in range(30):
        callback.before_forward(model, 0)
        ever |= model.inner.weight.detach().abs().sum((0, 2, 3)) == 0
        callback.before_step(model, 0)
    assert ever.nonzero()[:, 0].tolist() == [0, 1, 2, 3]


@pytest.fixture(scope="module")
def digits() -> Images:
    return load(DataConfig(data="digits")).train[:512]


def trained(digits: Images, make_callback, seed: int = 0) -> tuple[nn.Module, Groups]:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, 2),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12 * 49, 10),
    )
    groups = trace(model, torch.zeros(1, 3, 16, 16))
    config = FinetuneConfig(
        epochs=8, batch_size=64, lr=0.1, distillation=0.0, bf16="off"
    )
    return finetune(model, digits, config, seed, callback=make_callback(groups)), groups


def test_targeted_training_makes_magnitude_pruning_cost_less(digits):
    damages = []
    for make_callback in (
        lambda groups: None,
        lambda groups: DropConnect(groups, 0.66, 0.75),
    ):
        damage = 0.0
        for seed in (0, 1):
            model, groups = trained(digits, make_callback, seed)
            with torch.no_grad():
                whole = F.cross_entropy(model(digits.inputs), digits.labels)
                target = CostTable(groups).params({}) // 10
                ranked_masks(
                    model, groups, "weight", target, "params", agent="uniform"
                ).apply(model)
                damage += (
                    F.cross_entropy(model(digits.inputs), digits.labels) - whole
                ).item()
        damages.append(damage)
    assert (
        damages[1] < 0.9 * damages[0]
    )  # over ten seeds, taken by two, the ratio is 0.55 to 0.75


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_drops_the_same(kind: type[Dropping], digits):
    first, again, other = (
        trained(digits[:128], lambda groups: kind(groups, 0.5, 0.5), seed)[0]
        for seed in (1, 1, 2)
    )
    assert torch.equal(first[0].weight, again[0].weight)
    assert not torch.equal(first[0].weight, other[0].weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rate", "share", "message"),
    [
        (
            1.0,
            0.5,
            "sparse.strength: of dropping it is a probability, from 0 to below 1; "
            "got 1",
        ),
        (
            -0.1,
            0.5,
            "sparse.strength: of dropping it is a probability, from 0 to below 1; "
            "got -0.1",
        ),
        (0.5, 0.0, "sparse.share: must be above 0 and at most 1, got 0"),
        (0.5, 1.5, "sparse.share: must be above 0 and at most 1, got 1.5"),
    ],
)
def test_numbers_out_of_range_are_refused(kind: type[Dropping], rate, share, message):
    with pytest.raises(UserError) as error:
        kind(traced()[1], rate, share)
    assert str(error.value) == message
