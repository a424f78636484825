"""Compactors begin as nothing, their selected rows only shrink, and folding them is
exact.
"""

import copy
from dataclasses import replace

import pytest
import torch
from kills import KilledError, kill_after
from nets import NETS, build, images, outputs
from torch import Tensor, nn

from autoprune.config import DataConfig, FinetuneConfig
from autoprune.costs.cost import CostTable
from autoprune.data.datasets import Images, load
from autoprune.data.networks import conv_bn
from autoprune.errors import UserError
from autoprune.evaluation.evaluate import recalibrate
from autoprune.structure.groups import Groups
from autoprune.structure.slicing import prune
from autoprune.tracing.trace import trace
from autoprune.training.compactors import (
    eligible_pairs,
    fold,
    insert_compactors,
    standardise,
)
from autoprune.training.loop import TrainingCallback, finetune
from autoprune.training.resrep import Compaction, Goal


def traced(name: str = "chain") -> tuple[nn.Module, Groups, Tensor]:
    model = build(name)
    x = images(4, NETS[name].size)
    return model, trace(model, x[:1]), x


def disturbed(grown: nn.Module, pairs: dict, scale: float = 1.0) -> nn.Module:
    """With random compactors."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, norm in pairs.values():
            weight = grown.get_submodule(norm)[1].weight
            weight.copy_(scale * torch.randn(weight.shape, generator=generator))
    return grown


def merge(
    grown: nn.Module, groups: Groups, pairs: dict, kept: dict[str, Tensor]
) -> nn.Module:
    """The smaller network, without the rows that aren't kept, whatever their length."""
    return prune(fold(grown, pairs), groups, kept)


def test_only_a_convolution_with_its_own_batch_norm_gets_a_compactor():
    found = {
        name: eligible_pairs(*traced(name))
        for name in ("chain", "residual", "depthwise", "flatten")
    }
    assert found["chain"] == {"conv1": ("conv1", "bn1"), "conv2": ("conv2", "bn2")}
    assert found["residual"] == {
        "inner": ("inner", "bn_inner")
    }  # the stream has two producers
    assert not any("depthwise" in conv for conv, _ in found["depthwise"].values())
    assert found["flatten"] == {}


def test_a_batch_norm_behind_a_relu_gets_none():
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3)
    )
    in_place = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3)
    )
    x = torch.randn(2, 3, 8, 8)
    for net in (model.eval(), in_place.eval()):
        assert eligible_pairs(net, trace(net, x[:1]), x) == {}


class ReadTwice(nn.Module):
    """What the convolution makes is read in front of the batch norm as well."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.head = (
            nn.Conv2d(3, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.Conv2d(6, 4, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.head(torch.relu(self.bn(y) + y))


def test_what_is_read_in_front_of_its_batch_norm_or_has_no_statistics_gets_none():
    x, alone = torch.randn(2, 3, 8, 8), nn.BatchNorm2d(6, track_running_stats=False)
    twice = ReadTwice().eval()
    with torch.no_grad():
        twice.bn.running_var.uniform_(0.5, 2), twice.bn.running_mean.normal_()
    for net in (
        twice,
        nn.Sequential(nn.Conv2d(3, 6, 3), alone, nn.ReLU(), nn.Conv2d(6, 4, 3)).eval(),
    ):
        assert eligible_pairs(net, trace(net, x[:1]), x) == {}


def test_inserting_compactors_changes_nothing():
    model, groups, x = traced("residual")
    assert (
        outputs(insert_compactors(model, groups, eligible_pairs(model, groups, x)), x)
        - outputs(model, x)
    ).abs().max() < 1e-6


class Strided(nn.Module):
    """With stride, padding, dilation and a bias in front of a batch norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = (
            nn.Conv2d(3, 7, 3, 2, 1, dilation=2, bias=True),
            nn.BatchNorm2d(7),
        )
        self.head = nn.Conv2d(7, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.bn(self.conv(x))))


@pytest.mark.parametrize("name", ["chain", "residual", "strided"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)]
)
def test_folding_random_compactors_equals_the_three_layers(name, dtype, tolerance):
    if name == "strided":
        torch.manual_seed(0)
        model, x = Strided().eval(), torch.randn(4, 3, 11, 11)
        (
            model.bn.running_mean.normal_(),
            model.bn.running_var.uniform_(0.5, 2),
            model.bn.weight.data.normal_(),
        )
        groups = trace(model, x[:1])
    else:
        model, groups, x = traced(name)
    pairs = eligible_pairs(model, groups, x)
    grown = disturbed(insert_compactors(model, groups, pairs), pairs).to(dtype)
    expected, computed = (
        outputs(grown, x.to(dtype)),
        outputs(fold(grown, pairs), x.to(dtype)),
    )
    assert (expected - computed).abs().max() <= tolerance * expected.abs().max()
    assert fold(grown, pairs).state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("length", [0.0, 1e-4, 1e-2])
def test_rows_that_are_gone_may_go_and_short_ones_change_little(length):
    model, groups, x = traced()
    pairs = eligible_pairs(model, groups, x)
    grown = disturbed(insert_compactors(model, groups, pairs), pairs)
    rows = grown.bn1[1].weight
    with torch.no_grad():
        grown.bn1[0].bias.zero_(), grown.bn1[0].running_mean.zero_()
        rows[[1, 4]] *= length / rows[[1, 4]].flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    merged = merge(grown, groups, pairs, {"conv1": torch.tensor([0, 2, 3, 5])})
    expected = outputs(grown, x)
    assert (outputs(merged, x) - expected).abs().max() <= (
        1e-5 + 10 * length
    ) * expected.abs().max()


def compaction_of(
    model: nn.Module, groups: Groups, x: Tensor, share: float = 0.5, **options
) -> Compaction:
    table = CostTable(groups)
    goal = Goal(table, "macs", int(table.macs({}) * share))
    return Compaction(groups, eligible_pairs(model, groups, x), goal, **options)


def gradients(
    grown: nn.Module, x: Tensor, callback: TrainingCallback
) -> dict[str, Tensor]:
    grown.zero_grad()
    grown(x).square().mean().backward()
    callback.before_step(grown, 0)
    return {name: p.grad.clone() for name, p in grown.named_parameters()}


def test_the_penalty_leaves_all_other_gradients_bit_by_bit_and_selected_rows_none_of_the_loss():
    model, groups, x = traced()
    grown = disturbed(
        insert_compactors(model, groups, eligible_pairs(model, groups, x)),
        eligible_pairs(model, groups, x),
    )
    callback = compaction_of(model, groups, x, strength=0.1)
    callback.selection["conv1"][[1, 4]] = True
    plain, penalised = (
        gradients(grown, x, TrainingCallback()),
        gradients(grown, x, callback),
    )
    for name in plain:
        if name not in ("bn1.1.weight", "bn2.1.weight"):
            assert torch.equal(plain[name], penalised[name]), name
    rows = grown.bn1[1].weight.detach().flatten(1)
    unit = 0.1 * rows / rows.norm(dim=1, keepdim=True)
    got, loss = penalised["bn1.1.weight"].flatten(1), plain["bn1.1.weight"].flatten(1)
    torch.testing.assert_close(got[[1, 4]], unit[[1, 4]])
    torch.testing.assert_close(got[[0, 2, 3, 5]], (loss + unit)[[0, 2, 3, 5]])


def test_however_short_the_training_rows_that_stay_feel_the_papers_pull():
    model, groups, x = traced()
    grown = disturbed(
        insert_compactors(model, groups, eligible_pairs(model, groups, x)),
        eligible_pairs(model, groups, x),
    )
    callback = compaction_of(model, groups, x)
    callback.begin(grown, 40, FinetuneConfig())
    plain, penalised = (
        gradients(grown, x, TrainingCallback()),
        gradients(grown, x, callback),
    )
    mask, rows = callback.selection["conv1"], grown.bn1[1].weight.detach().flatten(1)
    unit = rows / rows.norm(dim=1, keepdim=True)
    loss, got = plain["bn1.1.weight"].flatten(1), penalised["bn1.1.weight"].flatten(1)
    torch.testing.assert_close(got[~mask], (loss + 1e-4 * unit)[~mask])


def test_a_selected_row_keeps_its_direction_and_the_others_turn():
    model, groups, x = traced()
    grown = disturbed(
        insert_compactors(model, groups, eligible_pairs(model, groups, x)),
        eligible_pairs(model, groups, x),
    )
    callback = compaction_of(model, groups, x, strength=1e-2)
    callback.selection["conv1"][[1, 4]] = True
    optimizer = torch.optim.SGD(
        callback.parameter_groups(grown, FinetuneConfig()), 1e-3, 0.9, nesterov=True
    )
    before = grown.bn1[1].weight.detach().clone().flatten(1)
    for step in range(20):
        gradients(grown, x, callback)
        optimizer.step()
        callback.after_step(grown, step)
    after = grown.bn1[1].weight.detach().flatten(1)
    turned = 1 - torch.cosine_similarity(before, after, dim=1)
    assert (turned[[1, 4]] < 1e-6).all()
    assert (turned[[0, 2, 3, 5]] > 1e-5).all()
    assert (after.norm(dim=1) < before.norm(dim=1))[[1, 4]].all()


@pytest.mark.parametrize("metric", ["macs", "params"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_the_shortest_rows_are_selected_until_the_budget_is_met_and_no_further(
    metric, share
):
    model, groups, x = traced()
    pairs, table = eligible_pairs(model, groups, x), CostTable(groups)
    grown, target = (
        disturbed(insert_compactors(model, groups, pairs), pairs),
        int(table.metrics[metric]({}) * share),
    )
    callback = Compaction(groups, pairs, Goal(table, metric, target))
    callback.select(grown, 1.0)
    kept = {name: len(rows) for name, rows in callback.kept.items()}
    assert table.metrics[metric](kept) <= target
    assert min(kept.values()) >= 1
    norms = {
        name: grown.get_submodule(norm)[1].norms for name, (_, norm) in pairs.items()
    }
    longest = max(
        (norms[name][mask].max().item(), name)
        for name, mask in callback.selection.items()
        if mask.any()
    )
    assert table.metrics[metric](kept | {longest[1]: kept[longest[1]] + 1}) > target
    could_go = torch.cat(
        [norms[name][~callback.selection[name]] for name in norms if kept[name] > 1]
    )
    assert could_go.min() >= longest[0]


@pytest.mark.parametrize("n_steps", [1, 2, 7, 1000])
def test_the_goal_is_met_by_the_end_of_the_shortest_training(n_steps):
    model, groups, x = traced()
    grown, callback = (
        insert_compactors(model, groups, eligible_pairs(model, groups, x)),
        compaction_of(model, groups, x),
    )
    callback.begin(grown, n_steps, FinetuneConfig())
    for parameter in grown.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for step in range(n_steps):
        callback.before_step(grown, step)
    table = CostTable(groups)
    assert (
        table.macs({name: len(rows) for name, rows in callback.kept.items()})
        <= table.macs({}) // 2
    )


def test_an_allocations_counts_are_met_group_by_group():
    model, groups, x = traced()
    pairs = eligible_pairs(model, groups, x)
    callback = Compaction(
        groups, pairs, Goal(CostTable(groups), counts={"conv1": 2, "conv2": 7})
    )
    callback.select(disturbed(insert_compactors(model, groups, pairs), pairs), 1.0)
    assert {name: len(rows) for name, rows in callback.kept.items()} == {
        "conv1": 2,
        "conv2": 7,
    }


def test_standardising_changes_statistics_but_not_the_function_and_measuring_again_finds_the_same():
    model, groups, x = traced()
    pairs, x = eligible_pairs(model, groups, x), images(64, 8)
    merged = merge(
        disturbed(insert_compactors(model, groups, pairs), pairs),
        groups,
        pairs,
        {"conv1": torch.arange(4)},
    )
    before = outputs(merged, x)
    standardise(merged, ["bn1", "bn2"], x)
    torch.testing.assert_close(outputs(merged, x), before, rtol=1e-4, atol=1e-4)
    again = copy.deepcopy(merged)
    recalibrate(again, x)
    torch.testing.assert_close(
        again.bn1.running_mean, merged.bn1.running_mean, rtol=1e-3, atol=1e-4
    )
    torch.testing.assert_close(
        again.bn1.running_var, merged.bn1.running_var, rtol=1e-2, atol=1e-4
    )


@pytest.fixture(scope="module")
def digits() -> Images:
    return load(DataConfig(data="digits")).train[:384]


CONFIG = FinetuneConfig(epochs=12, batch_size=16, lr=0.1, distillation=0.0, bf16="off")


def small(seed: int = 0) -> tuple[nn.Module, Groups, Compaction, dict]:
    torch.manual_seed(seed)
    body = (
        conv_bn(3, 10, stride=2),
        conv_bn(10, 12, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    model = nn.Sequential(*body, nn.Linear(12, 10)).eval()
    x = torch.zeros(2, 3, 16, 16)
    groups = trace(model, x[:1])
    pairs = eligible_pairs(model, groups, x)
    table = CostTable(groups)
    callback = Compaction(groups, pairs, Goal(table, "macs", table.macs({}) // 2))
    return (
        insert_compactors(model, groups, eligible_pairs(model, groups, x)),
        groups,
        callback,
        pairs,
    )


def test_training_makes_the_selected_rows_vanish_so_that_merging_is_free(digits):
    grown, groups, callback, pairs = small()
    finetune(grown, digits, CONFIG, callback=callback)
    for name, (_, norm) in pairs.items():
        norms, mask = grown.get_submodule(norm)[1].norms, callback.selection[name]
        assert (norms[mask] == 0).all()
        assert (norms[~mask] > 1e-3).all()
    merged, table = merge(grown, groups, pairs, callback.kept), CostTable(groups)
    with torch.no_grad():
        torch.testing.assert_close(
            merged(digits.inputs), grown(digits.inputs), rtol=1e-4, atol=1e-4
        )
    kept = {name: len(rows) for name, rows in callback.kept.items()}
    assert table.macs(kept) <= table.macs({}) // 2
    assert merged[0][0].out_channels == kept["0.0"]


def test_a_selected_row_stops_at_zero_although_momentum_would_carry_it_through():
    model, groups, x = traced()
    grown = insert_compactors(model, groups, eligible_pairs(model, groups, x))
    callback = compaction_of(model, groups, x, strength=0.3)
    callback.selection["conv1"][2] = True
    optimizer = torch.optim.SGD(
        callback.parameter_groups(grown, FinetuneConfig(lr=1e-3)),
        1e-3,
        0.9,
        nesterov=True,
    )
    norms = []
    for step in range(600):
        gradients(grown, x, callback)
        optimizer.step()
        callback.after_step(grown, step)
        norms.append(grown.bn1[1].norms[2].item())
    assert norms == sorted(norms, reverse=True)
    assert norms[-1] == 0


@pytest.mark.parametrize("epochs", [6, 25])
def test_the_usual_pull_lets_rows_vanish_in_a_training_of_any_length(epochs, digits):
    grown, groups, callback, pairs = small()
    callback = Compaction(groups, pairs, callback.goal)
    finetune(grown, digits, replace(CONFIG, epochs=epochs), callback=callback)
    left = [
        grown.get_submodule(norm)[1].norms[callback.selection[name]]
        for name, (_, norm) in pairs.items()
    ]
    assert torch.cat(left).max() == 0


def test_goals_that_can_not_be_are_refused():
    model, groups, x = traced()
    table, pairs = CostTable(groups), eligible_pairs(model, groups, x)
    with pytest.raises(UserError, match="give a target or counts, not both"):
        Goal(table)
    with pytest.raises(
        UserError, match="every group keeps at least 1 channel, got counts"
    ):
        Goal(table, counts={"conv1": 0})
    with pytest.raises(
        UserError,
        match=r"budget: the target is below the reachable floor.* leave macs=",
    ):
        Compaction(groups, pairs, Goal(table, "macs", 1))


def test_killed_training_goes_on_to_bit_identical_weights_and_rows(digits, tmp_path):
    grown, _, callback, _ = small()
    with pytest.raises(KilledError):
        finetune(
            grown,
            digits[:64],
            CONFIG,
            checkpoint=tmp_path / "rows.pt",
            on_epoch=kill_after(6),
            callback=callback,
        )
    resumed, _, again, _ = small(seed=9)
    finetune(
        resumed, digits[:64], CONFIG, checkpoint=tmp_path / "rows.pt", callback=again
    )
    whole, _, callback, _ = small()
    finetune(whole, digits[:64], CONFIG, callback=callback)
    assert all(
        torch.equal(a, b)
        for a, b in zip(resumed.parameters(), whole.parameters(), strict=True)
    )
    assert all(
        torch.equal(again.selection[name], mask)
        for name, mask in callback.selection.items()
    )


def test_a_network_without_a_fitting_layer_is_refused():
    model, groups, x = traced("flatten")
    with pytest.raises(
        UserError, match="no group is made by one convolution with its batch norm"
    ):
        insert_compactors(model, groups, eligible_pairs(model, groups, x))
