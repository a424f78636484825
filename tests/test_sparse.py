"""Penalties pull as their closed forms say, GSM trains exactly the most useful weights,
a killed training goes on.
"""

import copy
import math

import pytest
import torch
from kills import KilledError, kill_after
from nets import NETS, build, images
from torch import Tensor, nn

from autoprune.config import DataConfig, FinetuneConfig
from autoprune.data.datasets import Images, load
from autoprune.data.networks import conv_bn
from autoprune.errors import UserError
from autoprune.structure.groups import Groups
from autoprune.tracing.trace import trace
from autoprune.training.loop import TrainingCallback, finetune
from autoprune.training.sparse import (
    L1,
    L2,
    SPARSE,
    GlobalSparseMomentum,
    GroupDecay,
    GroupLasso,
    Penalty,
    Slimming,
    check_sparse,
)

LR = 0.1


def traced(name: str) -> tuple[nn.Module, Groups]:
    model = build(name)
    return model, trace(model, images(1, NETS[name].size))


def step(
    model: nn.Module, callback: TrainingCallback, lr: float = LR, **options
) -> None:
    """One step of plain SGD on a loss of zero."""
    optimizer = torch.optim.SGD(model.parameters(), lr, **options)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    callback.before_step(model, 0)
    optimizer.step()


def gradients(model: nn.Module, callback: TrainingCallback) -> dict[str, Tensor]:
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    callback.before_step(model, 0)
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_l1_moves_every_weight_towards_zero_by_rate_times_strength():
    model, groups = traced("chain")
    before = copy.deepcopy(model)
    step(model, L1(groups, 0.02))
    for layer in ("conv1", "conv2", "head"):
        old, new = (getattr(net, layer).weight for net in (before, model))
        torch.testing.assert_close(
            old.abs() - new.abs(),
            torch.full_like(old, LR * 0.02)[: len(old)],
            atol=2e-3,
            rtol=1,
        )
        torch.testing.assert_close(new, old - LR * 0.02 * old.sign())
    assert torch.equal(model.bn1.weight, before.bn1.weight)
    assert torch.equal(model.conv1.bias, before.conv1.bias)


def test_l2_decays_geometrically_and_adds_to_the_usual_weight_decay():
    model, groups = traced("chain")
    start, strength, decay = model.conv1.weight.detach().clone(), 0.3, 0.2
    for _ in range(20):
        step(model, L2(groups, strength), weight_decay=decay)
    torch.testing.assert_close(
        model.conv1.weight.detach(), start * (1 - LR * (strength + decay)) ** 20
    )


def test_slimming_drives_every_batch_norm_scale_to_zero_in_the_closed_forms_steps():
    # papers.md 3.4: |gamma| reaches lr * s after ceil(|gamma| / (lr * s)) steps and
    # stays there.
    model, groups = traced("residual")
    scales = [
        module.weight
        for module in model.modules()
        if isinstance(module, nn.BatchNorm2d)
    ]
    needed = math.ceil(max(scale.abs().max().item() for scale in scales) / (LR * 0.3))
    convolutions = [
        model.stem.weight.detach().clone(),
        model.inner.weight.detach().clone(),
    ]
    callback = Slimming(groups, 0.3)
    for _ in range(needed):
        step(model, callback)
    for _ in range(10):
        assert all((scale.abs() <= LR * 0.3 + 1e-6).all() for scale in scales)
        step(model, callback)
    assert torch.equal(model.stem.weight, convolutions[0])
    assert torch.equal(model.inner.weight, convolutions[1])


def test_group_lasso_pulls_each_channel_with_constant_force_along_its_own_direction():
    model, groups = traced(
        "residual"
    )  # the stream's channels are produced by stem and outer together
    pulls = gradients(model, GroupLasso(groups, 1.0))
    for channel in range(8):
        both = torch.cat(
            [
                model.stem.weight[channel].flatten(),
                model.outer.weight[channel].flatten(),
            ]
        )
        pull = torch.cat(
            [
                pulls["stem.weight"][channel].flatten(),
                pulls["outer.weight"][channel].flatten(),
            ]
        )
        torch.testing.assert_close(pull, (both / both.norm()).detach())
    torch.testing.assert_close(
        pulls["inner.weight"].flatten(1).norm(dim=1), torch.ones(6)
    )
    assert pulls["head.weight"].abs().sum() == 0
    assert pulls["bn.weight"].abs().sum() == 0


def test_a_group_lasso_step_shortens_a_channel_by_exactly_rate_times_strength():
    model, groups = traced("chain")
    before = model.conv1.weight.detach().flatten(1).norm(dim=1)
    step(model, GroupLasso(groups, 0.5))
    torch.testing.assert_close(
        before - model.conv1.weight.detach().flatten(1).norm(dim=1),
        torch.full((6,), LR * 0.5),
    )


def test_group_decay_is_sixteen_times_as_strong_for_the_smallest_channel_in_everything_that_goes_with_it():
    model, groups = traced("chain")
    with torch.no_grad():
        for tensor in (
            *model.conv1.parameters(),
            *model.bn1.parameters(),
            model.conv2.weight,
        ):
            tensor.normal_()
        for tensor in (*model.conv1.parameters(), *model.bn1.parameters()):
            tensor[4] *= 10
            tensor[2] *= 0.01
        model.conv2.weight[:, 4] *= 10
        model.conv2.weight[:, 2] *= 0.01
    pulls = gradients(model, GroupDecay(groups, 1.0))
    for channel, factor in ((2, 16.0), (4, 1.0)):
        torch.testing.assert_close(
            pulls["conv1.weight"][channel],
            factor * model.conv1.weight[channel].detach(),
        )
        torch.testing.assert_close(
            pulls["bn1.bias"][channel], factor * model.bn1.bias[channel].detach()
        )
    # conv2's weight belongs to both groups: its inputs go with conv1's channels, its
    # outputs are conv2's own.
    own = gradients(model, GroupDecay(groups.with_pins({"conv1": "test"}), 1.0))[
        "conv2.weight"
    ]
    for channel, factor in ((2, 16.0), (4, 1.0)):
        consumed = (pulls["conv2.weight"] - own)[:, channel]
        torch.testing.assert_close(
            consumed,
            factor * model.conv2.weight[:, channel].detach(),
            rtol=1e-4,
            atol=1e-5,
        )


def test_group_decay_turns_the_usual_weight_decay_off_and_the_other_penalties_leave_it():
    model, groups = traced("chain")
    config = FinetuneConfig(weight_decay=0.3)
    assert {
        g["weight_decay"]
        for g in GroupDecay(groups, 1.0).parameter_groups(model, config)
    } == {0.0}
    assert {
        g["weight_decay"]
        for g in GroupLasso(groups, 1.0).parameter_groups(model, config)
    } == {0.3, 0.0}


@pytest.mark.parametrize(
    "name", ["grouped", "depthwise_multiplier", "concat", "own_names", "flatten"]
)
@pytest.mark.parametrize("kind", [L1, L2, GroupLasso, GroupDecay])
def test_pulls_are_finite_on_every_network_and_vanish_nowhere_that_counts(
    name, kind: type[Penalty]
):
    model, groups = traced(name)
    pulls = gradients(model, kind(groups, 1.0))
    assert all(torch.isfinite(pull).all() for pull in pulls.values())
    for group in groups:
        for member in group.members:
            if member.role == "produce" and len(groups.shapes[member.tensor]) > 1:
                assert (
                    pulls[member.tensor]
                    .movedim(member.axis, 0)[member.index]
                    .abs()
                    .sum()
                    > 0
                )


def with_gradients(seed: int = 0) -> tuple[nn.Module, Groups]:
    model, groups = traced("chain")
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return model, groups


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 1.0])
def test_gsm_leaves_exactly_the_gradients_of_the_most_useful_weights(share):
    model, groups = with_gradients()
    weights = [model.conv1.weight, model.conv2.weight, model.head.weight]
    old = [weight.grad.clone() for weight in weights]
    biases = model.conv1.bias.grad.clone(), model.bn1.weight.grad.clone()
    saliency = [
        (weight * gradient).detach().abs()
        for weight, gradient in zip(weights, old, strict=True)
    ]
    ranked = (
        torch.cat([values.flatten() for values in saliency])
        .sort(descending=True)
        .values
    )
    n_kept = round(share * len(ranked))
    GlobalSparseMomentum(groups, 0.1, share).before_step(model, 0)
    assert sum((weight.grad != 0).sum().item() for weight in weights) == n_kept
    for weight, gradient, values in zip(weights, old, saliency, strict=True):
        assert torch.equal(weight.grad, gradient * (values >= ranked[n_kept - 1]))
    assert torch.equal(model.conv1.bias.grad, biases[0])
    assert torch.equal(model.bn1.weight.grad, biases[1])


def run_gsm(decay: float, n_steps: int) -> Tensor:
    """Values of one weight that is never useful, `(n_steps,)`, float64, learning rate
    1e-2.
    """
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    groups = trace(model, torch.randn(1, 3, 8, 8))
    model.double()
    callback = GlobalSparseMomentum(groups, decay, 0.5)
    optimizer = torch.optim.SGD(
        callback.parameter_groups(model, FinetuneConfig()), 1e-2, 0.9, nesterov=True
    )
    values = []
    for _ in range(n_steps):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        model[0].weight.grad[0, 0, 0, 0] = 0
        callback.before_step(model, 0)
        optimizer.step()
        values.append(model[0].weight[0, 0, 0, 0].item())
    return torch.tensor(values, dtype=torch.float64)


def test_gsms_masked_weight_follows_the_recurrence_of_momentum_and_decay():
    decay, n_steps = 5e-3, 300
    values = run_gsm(decay, n_steps)
    z, w, expected = 0.0, values[0].item() / (1 - 1e-2 * decay), []
    for _ in range(n_steps):
        z = 0.98 * z + decay * w
        w -= 1e-2 * z
        expected.append(w)
    torch.testing.assert_close(
        values, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-12
    )


@pytest.mark.parametrize(("ratio", "swings"), [(0.9, False), (3.0, True)])
def test_gsm_decays_monotonically_inside_its_bound_and_swings_through_zero_above(
    ratio, swings
):
    bound = (
        1 - math.sqrt(0.98)
    ) ** 2 / 1e-2  # of the decay, at a learning rate of 1e-2
    values = run_gsm(ratio * bound, 1500)
    assert bool((values.sign() != values[0].sign()).any()) == swings
    assert swings or (values.abs().diff() < 0).all()


def test_gsm_trains_a_weight_again_once_it_is_useful():
    model, groups = with_gradients()
    callback = GlobalSparseMomentum(groups, 0.1, 0.01)
    callback.before_step(model, 0)
    idle = (model.conv1.weight.grad == 0).nonzero()[0]
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    model.conv1.weight.grad[tuple(idle)] = 1e6
    callback.before_step(model, 1)
    assert model.conv1.weight.grad[tuple(idle)] == 1e6


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5])
def test_gsm_refuses_a_share_that_is_none(share):
    with pytest.raises(UserError) as error:
        GlobalSparseMomentum(traced("chain")[1], 0.1, share)
    assert (
        str(error.value)
        == f"sparse.share: must be above 0 and at most 1, got {share:g}"
    )


@pytest.mark.parametrize(
    ("name", "near"),
    [("slim", "slimming"), ("gms", "gsm"), ("group_laso", "group_lasso")],
)
def test_unknown_method_is_refused_with_the_nearest(name, near):
    with pytest.raises(
        UserError,
        match=f"sparse.method: unknown method '{name}'; did you mean '{near}'",
    ):
        check_sparse(name)


@pytest.fixture(scope="module")
def digits() -> Images:
    return load(DataConfig(data="digits")).train[:384]


def small(seed: int = 0) -> tuple[nn.Module, Groups]:
    torch.manual_seed(seed)
    body = (
        conv_bn(3, 8, stride=2),
        conv_bn(8, 12, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    model = nn.Sequential(*body, nn.Linear(12, 10))
    return model, trace(model, torch.zeros(1, 3, 16, 16))


def test_more_slimming_leaves_more_scales_near_zero(digits):
    config = FinetuneConfig(
        epochs=6, batch_size=64, lr=0.1, distillation=0.0, bf16="off"
    )
    near_zero = []
    for strength in (0.0, 0.02, 0.2):
        model, groups = small()
        finetune(model, digits, config, callback=Slimming(groups, strength))
        near_zero.append(
            sum((model[n][1].weight.abs() < 0.1).sum().item() for n in (0, 1))
        )
    assert near_zero == sorted(near_zero)
    assert near_zero[0] < near_zero[-1]


@pytest.mark.parametrize("name", SPARSE)
def test_killed_sparse_training_goes_on_to_bit_identical_weights(
    name, digits, tmp_path
):
    config = FinetuneConfig(
        epochs=3, batch_size=64, lr=0.1, distillation=0.0, bf16="off"
    )

    def train(seed: int, **options) -> nn.Module:
        model, groups = small(seed)
        callback = SPARSE[name].callback(groups, SPARSE[name].strength, 0.3)
        return finetune(model, digits[:128], config, callback=callback, **options)

    with pytest.raises(KilledError):
        train(0, checkpoint=tmp_path / "sparse.pt", on_epoch=kill_after(1))
    resumed, whole = train(9, checkpoint=tmp_path / "sparse.pt"), train(0)
    for (key, one), other in zip(
        resumed.state_dict().items(), whole.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), key
