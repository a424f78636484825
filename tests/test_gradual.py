"""Gradual pruning: on schedule, never back, on the weights as they are, and in the end
really gone.
"""

from itertools import pairwise

import pytest
import torch
from kills import KilledError, kill_after
from nets import NETS, build, difference, images, outputs, random_kept, randomise
from torch import nn

from autoprune.config import FinetuneConfig
from autoprune.costs.cost import CostTable
from autoprune.data.datasets import Images
from autoprune.evaluation.importance import importance
from autoprune.structure.groups import Groups
from autoprune.structure.slicing import prune
from autoprune.tracing.trace import trace
from autoprune.training.gradual import (
    SHAPES,
    Gradual,
    GradualChannels,
    GradualWeights,
    channel_masks,
)
from autoprune.training.loop import finetune
from autoprune.training.masks import Masks, ranked_masks

CONFIG = FinetuneConfig(epochs=6, batch_size=16, flip=False)
GOAL = {"conv1": 2, "conv2": 3}
N_STEPS = 6 * 3


def traced(name: str = "chain") -> tuple[nn.Module, Groups]:
    model = build(name)
    return model, trace(model, images(1, NETS[name].size))


def data(n: int = 48) -> Images:
    pixels = images(n, NETS["chain"].size).sigmoid()
    return Images(pixels, torch.arange(n) % 5)


def channels(
    model: nn.Module, groups: Groups, shape: str = "linear", n_prunings: int = 4
) -> GradualChannels:
    return GradualChannels(
        shape,
        n_prunings,
        groups,
        GOAL,
        lambda net: importance("l1", net, groups, data()),
    )


class Watched:
    """Mixed into a callback: remembers share, masks and network of every pruning."""

    def grow_masks(self, model: nn.Module, share: float) -> Masks:
        masks = super().grow_masks(model, share)
        seen = {name: p.detach().clone() for name, p in model.named_parameters()}
        vars(self).setdefault("prunings", []).append((share, masks, seen))
        return masks


class WatchedChannels(Watched, GradualChannels):
    pass


class WatchedWeights(Watched, GradualWeights):
    pass


def test_the_cubic_schedule_is_equation_1_of_agp():
    for progress in (0.0, 0.1, 0.5, 1.0):
        assert SHAPES["cubic"](progress) == pytest.approx(
            1 + (0 - 1) * (1 - progress) ** 3
        )
        assert SHAPES["linear"](progress) == progress


class Schedule(Gradual):
    """Masks nothing, and remembers when it was asked to."""

    asked: list

    def grow_masks(self, model: nn.Module, share: float) -> Masks:
        self.asked.append((self.step, share))
        return Masks({})


@pytest.mark.parametrize(
    ("n_prunings", "n_steps", "moments"),
    [(1, 9, [0]), (4, 60, [0, 10, 20, 30]), (6, 6, [0, 1, 2, 3])],
)
def test_prunings_are_spread_over_the_first_two_thirds_and_the_last_reaches_the_goal(
    n_prunings, n_steps, moments
):
    callback = Schedule("linear", n_prunings)
    callback.asked = []
    callback.begin(nn.Identity(), n_steps, FinetuneConfig())
    for callback.step in range(n_steps):
        callback.before_forward(nn.Identity(), callback.step)
    assert [step for step, _ in callback.asked] == moments
    shares = [share for _, share in callback.asked]
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_weights_go_on_schedule_never_come_back_and_stay_zero():
    model, groups = traced()
    dense, target = CostTable(groups).params({}), 90
    callback = WatchedWeights(
        "cubic",
        5,
        dense,
        target,
        lambda net, left: ranked_masks(net, groups, "weight", left, "params"),
    )
    finetune(model, data(), CONFIG, callback=callback)
    before = {name: torch.ones_like(kept) for name, kept in callback.masks.kept.items()}
    for share, masks, seen in callback.prunings:
        due = round(dense - share * (dense - target))
        left = masks.costs(groups)["params"]
        assert due - 1 <= left <= due  # a unit is one weight
        assert all((kept <= before[name]).all() for name, kept in masks.kept.items())
        # Ranked on what training had made of the weights: none that goes was larger
        # than one that stays.
        gone = torch.cat([seen[n][~k & before[n]].abs() for n, k in masks.kept.items()])
        stay = torch.cat([seen[n][k].abs() for n, k in masks.kept.items()])
        assert len(gone)
        assert gone.max() <= stay.max()
        before = masks.kept
    assert len(callback.prunings) == 5
    assert callback.masks.costs(groups)["params"] == target
    assert all(
        (model.get_parameter(name)[~kept] == 0).all()
        for name, kept in callback.masks.kept.items()
    )


def test_channels_go_on_schedule_never_come_back_and_are_ranked_on_the_weights_of_the_moment():
    model, groups = traced()
    callback = WatchedChannels(
        "linear", 4, groups, GOAL, lambda net: importance("l1", net, groups, data())
    )
    finetune(model, data(), CONFIG, callback=callback)
    rows = {name: torch.ones(groups[name].channels, dtype=torch.bool) for name in GOAL}
    for share, masks, seen in callback.prunings:
        for name, goal in GOAL.items():
            norms = seen[f"{name}.weight"].flatten(1).abs().sum(1)
            n_kept = round(len(norms) - share * (len(norms) - goal))
            expected = norms.masked_fill(~rows[name], -1).topk(n_kept).indices
            kept = (
                masks.kept[f"{name}.weight"].flatten(1).any(1)
                if f"{name}.weight" in masks.kept
                else norms >= 0
            )
            assert sorted(kept.nonzero()[:, 0].tolist()) == sorted(expected.tolist())
            rows[name] = kept
    assert {name: len(kept) for name, kept in callback.kept.items()} == GOAL


def test_filters_that_saved_more_than_was_due_stay_gone():
    model, groups = traced()
    dense = CostTable(groups).macs({})
    callback = WatchedWeights(
        "cubic",
        10,
        dense,
        dense // 2,
        lambda net, left: ranked_masks(net, groups, "filter", left),
    )
    finetune(model, data(), CONFIG, callback=callback)
    masks = [masks.kept for _, masks, _ in callback.prunings]
    assert all(
        (after[n] <= kept).all()
        for before, after in pairwise(masks)
        for n, kept in before.items()
    )
    assert callback.masks.costs(groups)["macs"] <= dense // 2


def test_channels_that_are_gone_stay_gone_whatever_is_said_of_them_later():
    model, groups = traced()
    said = iter([1, -1])

    def importance_of(network: nn.Module) -> dict[str, torch.Tensor]:
        sign = next(said)
        return {
            name: sign * torch.arange(1.0, groups[name].channels + 1) for name in GOAL
        }

    callback = GradualChannels("linear", 2, groups, GOAL, importance_of)
    callback.grow_masks(model, 0.5)
    left = callback.kept
    callback.grow_masks(model, 1.0)
    assert {name: kept.tolist() for name, kept in callback.kept.items()} == {
        n: left[n][: GOAL[n]].tolist() for n in GOAL
    }


def test_what_goes_is_gone_before_the_next_batch_is_answered():
    model, groups = traced()
    callback = channels(model, groups)
    callback.begin(model, N_STEPS, FinetuneConfig())
    callback.before_forward(model, 0)
    assert callback.masks.kept
    assert all(
        (model.get_parameter(name)[~kept] == 0).all()
        for name, kept in callback.masks.kept.items()
    )


@pytest.mark.parametrize(
    "name", ["chain", "residual", "depthwise", "concat", "flatten", "grouped"]
)
def test_what_is_masked_in_all_its_weights_can_be_cut_off_without_a_change(name):
    model, groups = traced(name)
    randomise(model)
    kept, x = random_kept(groups, seed=1), images(4, NETS[name].size)
    channel_masks(groups, kept).apply(model)
    assert difference(outputs(prune(model, groups, kept), x), outputs(model, x)) < 1e-5


@pytest.mark.parametrize("name", ["residual", "flatten"])
def test_masked_is_exactly_what_pruning_takes_from_every_parameter(name):
    model, groups = traced(name)
    assert channel_masks(groups, {}).kept == {}
    kept = random_kept(groups, seed=1)
    left = {
        name: int(mask.sum()) for name, mask in channel_masks(groups, kept).kept.items()
    }
    pruned = {
        name: p.numel() for name, p in prune(model, groups, kept).named_parameters()
    }
    assert left == {
        name: n for name, n in pruned.items() if n < model.get_parameter(name).numel()
    }


@pytest.mark.parametrize("epoch", [3, 5])
@pytest.mark.parametrize("kind", ["channels", "weights"])
def test_a_killed_training_goes_on_with_its_masks_and_ends_the_same(
    kind, epoch, tmp_path
):
    def trained(checkpoint, on_epoch=lambda epoch, loss: None):
        model, groups = traced()
        if kind == "channels":
            callback = channels(model, groups, "cubic")
        else:
            ranked = lambda net, left: ranked_masks(net, groups, "kernel", left)  # noqa: E731
            callback = GradualWeights(
                "linear", 4, CostTable(groups).macs({}), 6_000, ranked
            )
        finetune(
            model,
            data(),
            CONFIG,
            checkpoint=checkpoint,
            on_epoch=on_epoch,
            callback=callback,
        )
        return model, callback

    whole, masks = trained(None)
    with pytest.raises(KilledError):
        trained(tmp_path / "half.pt", kill_after(epoch))
    again, resumed = trained(tmp_path / "half.pt")
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.parameters(), again.parameters(), strict=True)
    )
    assert masks.masks.kept.keys() == resumed.masks.kept.keys()
    assert all(
        torch.equal(kept, resumed.masks.kept[name])
        for name, kept in masks.masks.kept.items()
    )
