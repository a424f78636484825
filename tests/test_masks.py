"""Masks are constant on their units, meet targets exactly, stay zero through training,
and survive saving.
"""

import itertools

import pytest
import torch
from kills import KilledError, kill_after
from nets import NETS, build, counted_macs, images, outputs, randomise
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune.config import DataConfig, FinetuneConfig
from autoprune.costs.cost import CostTable
from autoprune.data.datasets import Images, load
from autoprune.errors import UserError
from autoprune.structure.groups import Groups
from autoprune.structure.slicing import prune
from autoprune.tracing.trace import trace
from autoprune.training.loop import finetune
from autoprune.training.masks import (
    PATTERNS,
    KeepMasks,
    Masks,
    n_of_m,
    n_of_m_masks,
    ranked_masks,
)

WEIGHTS = ("conv1", "conv2", "head")


def traced(name: str = "chain") -> tuple[nn.Module, Groups]:
    model = build(name)
    return model, trace(model, images(1, NETS[name].size))


def units_of(pattern: str, shape: torch.Size) -> list[tuple]:
    """Index of every unit of a weight, by loops."""
    axes = [range(n) for n in shape]
    for axis in PATTERNS[pattern]:
        if axis < len(shape):
            axes[axis] = [slice(None)]
    return list(itertools.product(*axes))


def by_hand(
    model: nn.Module, pattern: str, metric: str, target: int, groups: Groups
) -> list[tuple[str, tuple]]:
    """The units that go under L1 and one threshold for all layers: the least first,
    until the target is met.
    """
    positions = {layer.tensor: layer.positions for layer in groups.layers}
    table = []
    for name in WEIGHTS:
        weight = model.get_parameter(f"{name}.weight").detach()
        rows = [
            (weight[unit].abs().mean().item(), name, unit, weight[unit].numel())
            for unit in units_of(pattern, weight.shape)
        ]
        table += sorted(rows, key=lambda row: row[0])[:-1]  # the best one stays
    left, gone = CostTable(groups).metrics[metric]({}), []
    for _, name, unit, n_elements in sorted(table, key=lambda row: row[0]):
        if left <= target:
            break
        left -= n_elements * (positions[f"{name}.weight"] if metric == "macs" else 1)
        gone.append((name, unit))
    return gone


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("metric", ["macs", "params"])
def test_the_least_units_of_the_network_go_until_the_target_is_met(pattern, metric):
    model, groups = traced()
    target = CostTable(groups).metrics[metric]({}) * 6 // 10
    masks = ranked_masks(model, groups, pattern, target, metric)
    gone = by_hand(model, pattern, metric, target, groups)
    expected = {
        f"{name}.weight": torch.ones_like(
            model.get_parameter(f"{name}.weight"), dtype=torch.bool
        )
        for name in WEIGHTS
    }
    for name, unit in gone:
        expected[f"{name}.weight"][unit] = False
    assert all(torch.equal(masks.kept[name], kept) for name, kept in expected.items())
    assert gone
    assert masks.costs(groups)[metric] <= target


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("criterion", ["l1", "l2", "lamp", "random"])
@pytest.mark.parametrize("agent", ["global", "uniform"])
def test_masks_are_constant_on_units_and_leave_each_layer_something(
    pattern, criterion, agent
):
    model, groups = traced("residual")
    target = CostTable(groups).macs({}) // 2
    masks = ranked_masks(model, groups, pattern, target, "macs", criterion, agent)
    assert masks.costs(groups)["macs"] <= target
    for name, kept in masks.kept.items():
        assert all(
            kept[unit].all() or not kept[unit].any()
            for unit in units_of(pattern, kept.shape)
        ), name
        assert kept.any()


def test_uniform_ranking_takes_the_same_share_of_every_layer():
    model, groups = traced()
    with torch.no_grad():
        model.conv1.weight.mul_(
            1e-3
        )  # one threshold for all layers would take this one whole
    masks = ranked_masks(
        model,
        groups,
        "weight",
        CostTable(groups).params({}) // 2,
        "params",
        agent="uniform",
    )
    shares = [kept.float().mean().item() for kept in masks.kept.values()]
    assert max(shares) - min(shares) < 0.02


def test_lamp_is_each_square_over_those_of_its_layer_that_are_not_smaller():
    model, groups = traced()
    masks = ranked_masks(
        model, groups, "weight", CostTable(groups).params({}) // 2, "params", "lamp"
    )
    shares, kept = [], []
    for name in WEIGHTS:  # within a layer plain magnitude would pass: one threshold has to hold for all of them
        squares = model.get_parameter(f"{name}.weight").detach().flatten().double() ** 2
        shares += [square / squares[squares >= square].sum() for square in squares]
        kept.append(masks.kept[f"{name}.weight"].flatten())
    shares, kept = torch.stack(shares), torch.cat(kept)
    assert shares[kept].min() >= shares[~kept].max()
    assert 0 < kept.sum() < len(kept)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_l2_ranks_units_by_their_mean_square(pattern):
    model, groups = traced()
    masks = ranked_masks(
        model, groups, pattern, CostTable(groups).params({}) * 6 // 10, "params", "l2"
    )
    scores, kept = [], []
    for name in WEIGHTS:
        weight, mask = (
            model.get_parameter(f"{name}.weight").detach(),
            masks.kept[f"{name}.weight"],
        )
        rows = [
            (weight[u].square().mean().item(), bool(mask[u].all()))
            for u in units_of(pattern, weight.shape)
        ]
        rows.remove(max(rows))  # the best of a layer stays whatever the others are
        scores += [score for score, _ in rows]
        kept += [stays for _, stays in rows]
    scores, kept = torch.tensor(scores), torch.tensor(kept)
    assert scores[kept].min() >= scores[~kept].max()


def test_random_masks_do_not_depend_on_the_weights():
    (model, groups), other = traced(), build("chain")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(parameter.flatten().flip(0).view_as(parameter))
    target = CostTable(groups).params({}) // 2
    first, second = (
        ranked_masks(net, groups, "weight", target, "params", "random", seed=3)
        for net in (model, other)
    )
    assert all(
        torch.equal(kept, second.kept[name]) for name, kept in first.kept.items()
    )


def test_random_masks_differ_between_seeds_and_between_layers_of_one_shape():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)
    )
    groups = trace(model, images(1, 8))
    target = CostTable(groups).params({}) // 2
    first, second = (
        ranked_masks(model, groups, "weight", target, "params", "random", seed=seed)
        for seed in (0, 1)
    )
    assert not torch.equal(first.kept["2.weight"], second.kept["2.weight"])
    assert not torch.equal(first.kept["2.weight"], first.kept["4.weight"])


class InputsFirst(nn.Module):
    """Weights `(n_in, n_out, ...)`: a transposed convolution and a product with a
    matrix.
    """

    def __init__(self):
        super().__init__()
        self.up, self.matrix = (
            nn.ConvTranspose2d(3, 8, 2, 2),
            nn.Parameter(torch.empty(8, 4)),
        )
        self.down = nn.ConvTranspose2d(8, 8, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu()).mean((2, 3)) @ self.matrix


def test_units_of_weights_with_inputs_first_are_those_of_their_outputs():
    model = randomise(InputsFirst())
    groups = trace(model, images(1, 8))
    masks = ranked_masks(
        model,
        groups,
        "filter",
        CostTable(groups).params({}) * 6 // 10,
        "params",
        agent="uniform",
    )
    for name in ("up.weight", "down.weight", "matrix"):
        filters = masks.kept[name].movedim(1, 0).flatten(1)
        assert masks.kept[name].shape == groups.shapes[name]
        assert torch.equal(filters.all(1), filters.any(1)), name
    assert not masks.kept["down.weight"].all()
    assert not masks.kept["matrix"].all()
    paired, whole = n_of_m_masks(model, groups, 2, 4)
    assert whole == ["up.weight"]
    for name in ("down.weight", "matrix"):
        assert (paired.kept[name].unflatten(0, (-1, 4)).sum(1) == 2).all(), name


def test_permuting_filters_permutes_masks():
    model, groups = traced()
    order, twin = torch.tensor([3, 0, 5, 1, 4, 2]), build("chain")
    with torch.no_grad():
        twin.conv1.weight.copy_(model.conv1.weight[order])
    target = CostTable(groups).macs({}) // 2
    first, second = (
        ranked_masks(net, groups, "kernel", target).kept["conv1.weight"]
        for net in (model, twin)
    )
    assert torch.equal(second, first[order])


@pytest.mark.parametrize(
    "name",
    [
        "chain",
        "residual",
        "grouped",
        "depthwise_multiplier",
        "shared",
        "attention",
        "up_and_down",
        "own_names",
    ],
)
def test_costs_count_what_is_left_of_every_use_of_a_weight(name):
    model, groups = traced(name)
    table = CostTable(groups)
    everything = Masks(
        {
            layer.tensor: torch.ones(groups.shapes[layer.tensor], dtype=torch.bool)
            for layer in groups.layers
        }
    )
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert everything.costs(groups) == {
        "macs": counted_macs(model, NETS[name].size),
        "params": n_parameters,
    }
    masks = ranked_masks(model, groups, "weight", table.macs({}) // 2)
    by_layer = sum(
        int(masks.kept[layer.tensor].sum()) * layer.positions for layer in groups.layers
    )
    dense = sum(
        masks.kept[layer.tensor].numel() * layer.positions for layer in groups.layers
    )
    assert masks.costs(groups)["macs"] == table.macs({}) - dense + by_layer


def test_a_network_with_masked_filters_and_readers_computes_what_the_pruned_one_does():
    model, groups = traced()
    x, kept = images(4, 8), torch.tensor([0, 2, 3, 5])
    masks = {
        f"{name}.weight": torch.ones_like(getattr(model, name).weight, dtype=torch.bool)
        for name in WEIGHTS
    }
    masks["conv1.weight"][[1, 4]] = False
    masks["conv2.weight"][:, [1, 4]] = (
        False  # batch norm's shift keeps a masked filter alive unless nothing reads it
    )
    smaller = prune(model, groups, {"conv1": kept})
    Masks(masks).apply(model)
    torch.testing.assert_close(
        outputs(model, x), outputs(smaller, x), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2), (1, 4)])
def test_n_of_m_keeps_exactly_the_n_largest_of_every_m_inputs(n, m):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3), nn.Flatten(), nn.Linear(12 * 16, 4)
    )
    groups = trace(model, torch.randn(1, 3, 8, 8))
    masks, whole = n_of_m_masks(model, groups, n, m)
    assert whole == ["0.weight"]
    assert masks.kept.keys() == {"1.weight", "3.weight"}
    for name, kept in masks.kept.items():
        weight = model.get_parameter(name).detach()
        rows = (
            weight.abs().flatten(2).permute(0, 2, 1).reshape(-1, m)
            if weight.ndim == 4
            else weight.abs().view(-1, m)
        )
        marks = (
            kept.flatten(2).permute(0, 2, 1).reshape(-1, m)
            if weight.ndim == 4
            else kept.view(-1, m)
        )
        assert (marks.sum(1) == n).all()
        assert (
            torch.where(marks, rows, torch.inf).min(1).values
            >= torch.where(marks, 0, rows).max(1).values
        ).all()


def test_n_of_m_is_recognised_by_its_form():
    assert n_of_m("2:4") == (2, 4)
    assert n_of_m("weight") is None
    assert n_of_m("2:4:8") is None


@pytest.fixture(scope="module")
def digits() -> Images:
    return load(DataConfig(data="digits")).train[:256]


def train(model: nn.Module, digits: Images, masks: Masks, **options) -> nn.Module:
    config = FinetuneConfig(
        epochs=3, batch_size=64, lr=0.1, weight_decay=0.01, distillation=0.0, bf16="off"
    )
    return finetune(model, digits, config, callback=KeepMasks(masks), **options)


def small(seed: int = 0) -> tuple[nn.Module, Masks]:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 49, 10)
    )
    groups = trace(model, torch.zeros(1, 3, 16, 16))
    return model, ranked_masks(
        model, groups, "kernel", CostTable(groups).params({}) // 3, "params"
    )


def test_masked_weights_stay_exactly_zero_through_momentum_and_decay_and_the_others_learn(
    digits,
):
    model, masks = small()
    before = model[0].weight.detach().clone()
    train(model, digits, masks)
    for name, kept in masks.kept.items():
        weight = model.get_parameter(name)
        assert (weight[~kept] == 0).all()
        assert (weight[kept] != 0).all()
    assert not torch.equal(
        model[0].weight[masks.kept["0.weight"]], before[masks.kept["0.weight"]]
    )


def test_masked_weights_are_zero_before_the_first_step():
    model, masks = small()
    KeepMasks(masks).begin(model, 1, FinetuneConfig())
    assert all(
        (model.get_parameter(name)[~kept] == 0).all()
        for name, kept in masks.kept.items()
    )


def test_killed_training_under_masks_goes_on_to_bit_identical_weights(digits, tmp_path):
    model, masks = small()
    with pytest.raises(KilledError):
        train(
            model,
            digits,
            masks,
            checkpoint=tmp_path / "masked.pt",
            on_epoch=kill_after(2),
        )
    resumed = train(small(seed=5)[0], digits, masks, checkpoint=tmp_path / "masked.pt")
    whole = train(small()[0], digits, masks)
    assert all(
        torch.equal(a, b)
        for a, b in zip(resumed.parameters(), whole.parameters(), strict=True)
    )


def test_saved_masks_come_back_bit_by_bit_and_only_for_their_network(tmp_path):
    model, groups = traced()
    masks = ranked_masks(model, groups, "weight", CostTable(groups).macs({}) // 2)
    masks.save(tmp_path / "masks.safetensors")
    again = Masks.load(tmp_path / "masks.safetensors", model)
    assert again.kept.keys() == masks.kept.keys()
    assert all(
        torch.equal(kept, masks.kept[name]) and kept.dtype == torch.bool
        for name, kept in again.kept.items()
    )
    with pytest.raises(
        UserError, match=r"is for another network \(conv1.weight doesn't fit\)"
    ):
        Masks.load(tmp_path / "masks.safetensors", build("residual"))
    (tmp_path / "masks.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="is damaged"):
        Masks.load(tmp_path / "masks.safetensors", model)
    with pytest.raises(UserError, match="no masks"):
        Masks.load(tmp_path / "nowhere", model)


def test_everything_stays_where_everything_fits_and_the_model_is_left_as_found():
    model, groups = traced()
    before: Tensor = model.conv1.weight.detach().clone()
    masks = ranked_masks(model, groups, "filter", CostTable(groups).macs({}))
    assert masks.sparsity == 0
    assert torch.equal(model.conv1.weight, before)
    assert F.conv2d(images(1, 8), model.conv1.weight).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"pattern": "rows"},
            "granularity: unknown granularity 'rows'; did you mean 'row'",
        ),
        (
            {"pattern": "row", "criterion": "taylor"},
            "criterion: masks of granularity row go by l1 or l2 or lamp or random",
        ),
        (
            {"pattern": "row", "agent": "dyna"},
            "agent: masks of granularity row go by global or uniform, got 'dyna'",
        ),
        (
            {"pattern": "row", "metric": "memory"},
            "budget: unknown metric 'memory'; did you mean",
        ),
        (
            {"pattern": "filter", "target": 10},
            "budget: masks of this granularity leave at least macs=",
        ),
    ],
)
def test_what_can_not_be_masked_is_refused(options, message):
    model, groups = traced()
    with pytest.raises(UserError) as error:
        ranked_masks(model, groups, **({"target": 30_000} | options))
    assert message in str(error.value)


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 4), (5, 4)])
def test_n_of_m_refuses_other_numbers(n, m):
    model, groups = traced()
    with pytest.raises(UserError, match=f"N:M needs 1 <= N < M, got {n}:{m}"):
        n_of_m_masks(model, groups, n, m)
