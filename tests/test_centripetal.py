"""Clusters have the asked sizes, grow together by their closed form, and merge without
loss.
"""

import copy
import math
from dataclasses import replace

import pytest
import torch
from kills import KilledError, kill_after
from nets import NETS, build, images, outputs
from torch import Tensor, nn

from autoprune.config import DataConfig, FinetuneConfig
from autoprune.data.datasets import Images, load
from autoprune.data.networks import conv_bn
from autoprune.errors import UserError
from autoprune.evaluation.evaluate import recalibrate
from autoprune.structure.groups import Groups
from autoprune.tracing.trace import trace
from autoprune.training import centripetal
from autoprune.training.centripetal import (
    CLUSTERINGS,
    VECTOR_PULL,
    Centripetal,
    average_clusters,
    check_mergeable,
    cluster_channels,
    merge,
    mergeable_groups,
)
from autoprune.training.loop import finetune

LR, DECAY, PULL = 0.1, 0.02, 0.3


def traced(name: str) -> tuple[nn.Module, Groups]:
    model = build(name)
    return model, trace(model, images(1, NETS[name].size))


def spread(rows: Tensor, numbers: Tensor) -> Tensor:
    return rows - average_clusters(rows, numbers)


@pytest.mark.parametrize("how", CLUSTERINGS)
@pytest.mark.parametrize("count", [1, 2, 5, 7, 8])
def test_every_group_gets_exactly_the_asked_clusters_the_same_for_a_seed(how, count):
    model, groups = traced("residual")
    numbers = cluster_channels(model, groups, {"stem": count}, how, seed=3)["stem"]
    assert sorted(set(numbers.tolist())) == list(range(count))
    assert len(numbers) == 8
    assert torch.equal(
        numbers, cluster_channels(model, groups, {"stem": count}, how, seed=3)["stem"]
    )


def test_filters_that_are_all_the_same_still_get_the_asked_clusters():
    model, groups = traced("chain")
    with torch.no_grad():
        model.conv1.weight.copy_(model.conv1.weight[:1].expand_as(model.conv1.weight))
    numbers = cluster_channels(model, groups, {"conv1": 4})["conv1"]
    assert sorted(set(numbers.tolist())) == [0, 1, 2, 3]


def test_another_seed_may_find_other_clusters():
    model, groups = traced("residual")
    found = {
        tuple(cluster_channels(model, groups, {"stem": 5}, seed=seed)["stem"].tolist())
        for seed in range(8)
    }
    assert len(found) > 1


def test_kmeans_finds_filters_that_are_alike_in_all_layers_that_a_shortcut_ties():
    model, groups = traced(
        "residual"
    )  # stem and outer produce the same channels: one clustering for both
    alike = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer, scale in ((model.stem, 1.0), (model.outer, 100.0)):
            layer.weight.copy_(
                scale
                * torch.randn(3, *layer.weight.shape[1:], generator=generator)[alike]
            )
            layer.weight.add_(
                scale * 1e-3 * torch.randn(layer.weight.shape, generator=generator)
            )
    numbers = cluster_channels(model, groups, {"stem": 3}, seed=0)["stem"]
    assert len({(int(a), int(b)) for a, b in zip(alike, numbers, strict=True)}) == 3


def test_kmeans_is_not_drowned_by_the_noise_of_a_layer_with_large_weights():
    model, groups = traced("residual")
    alike = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        model.stem.weight.copy_(
            torch.randn(3, *model.stem.weight.shape[1:], generator=generator)[alike]
        )
        model.outer.weight.copy_(
            1000
            * (1 + 0.05 * torch.randn(model.outer.weight.shape, generator=generator))
        )
    numbers = cluster_channels(model, groups, {"stem": 3}, seed=0)["stem"]
    assert len({(int(a), int(b)) for a, b in zip(alike, numbers, strict=True)}) == 3


def test_averaging_is_a_symmetric_projection_whose_rows_sum_to_one():
    numbers = torch.tensor([0, 1, 0, 2, 1, 0])
    matrix = average_clusters(torch.eye(6, dtype=torch.float64), numbers)
    torch.testing.assert_close(matrix @ matrix, matrix)
    torch.testing.assert_close(matrix, matrix.T)
    torch.testing.assert_close(matrix.sum(1), torch.ones(6, dtype=torch.float64))


def steps(
    model: nn.Module, groups: Groups, clusters: dict[str, Tensor], n: int, **options
) -> None:
    """Steps of SGD on gradients that are random, as those of any loss."""
    callback, generator = (
        Centripetal(groups, clusters, PULL),
        torch.Generator().manual_seed(1),
    )
    optimizer = torch.optim.SGD(model.parameters(), LR, weight_decay=DECAY, **options)
    for _ in range(n):
        for parameter in model.parameters():
            parameter.grad = torch.randn(
                parameter.shape, generator=generator, dtype=parameter.dtype
            )
        callback.before_step(model, 0)
        optimizer.step()


def test_the_spread_in_a_cluster_follows_its_geometric_law_whatever_the_loss():
    model, groups = traced("chain")
    model, numbers = model.double(), torch.tensor([0, 0, 1, 1, 1, 2])
    before = copy.deepcopy(model)
    steps(model, groups, {"conv1": numbers}, 25)
    tensors = {
        "conv1.weight": 1.0,
        "conv1.bias": VECTOR_PULL,
        "bn1.weight": VECTOR_PULL,
        "bn1.bias": VECTOR_PULL,
    }
    for name, pull in tensors.items():
        old, new = (
            spread(net.get_parameter(name).detach(), numbers) for net in (before, model)
        )
        torch.testing.assert_close(
            new, old * (1 - LR * (DECAY + PULL * pull)) ** 25, rtol=1e-6, atol=1e-12
        )


@pytest.mark.parametrize(
    ("name", "tied"),
    [
        ("residual", {"stem.weight", "outer.weight"}),
        ("depthwise_multiplier", {"stem.weight", "depthwise.weight"}),
        ("attention", {"stem.weight", "position", "norm.weight"}),
    ],
)
def test_the_law_holds_in_every_tensor_that_shares_a_groups_channels(name, tied):
    model, groups = traced(name)
    model = model.double()
    clusters = {
        group.name: torch.arange(group.channels) * 2 // group.channels
        for group in groups
    }
    before = copy.deepcopy(model)
    steps(model, groups, clusters, 25)
    parameters, seen = dict(model.named_parameters()), set()
    for group in groups:
        for member in (
            m for m in group.members if m.role != "consume" and m.tensor in parameters
        ):
            pull = PULL if parameters[member.tensor].ndim > 1 else PULL * VECTOR_PULL
            rows = [
                n.get_parameter(member.tensor).detach().movedim(member.axis, 0)
                for n in (before, model)
            ]
            old, new = (spread(row[member.index], clusters[group.name]) for row in rows)
            torch.testing.assert_close(
                new, old * (1 - LR * (DECAY + pull)) ** 25, rtol=1e-6, atol=1e-12
            )
            seen.add(member.tensor)
    assert tied <= seen


def test_a_clusters_centre_moves_as_by_the_mean_gradient_and_a_cluster_of_one_as_usual():
    model, groups = traced("chain")
    numbers, plain = torch.tensor([0, 0, 1, 1, 1, 2]), copy.deepcopy(model)
    steps(model, groups, {"conv1": numbers}, 1)
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(plain.parameters(), LR, weight_decay=DECAY)
    for parameter in plain.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    moved, usual = model.conv1.weight.detach(), plain.conv1.weight.detach()
    torch.testing.assert_close(
        average_clusters(moved, numbers), average_clusters(usual, numbers)
    )
    assert torch.equal(moved[5], usual[5])
    assert torch.equal(model.conv2.weight, plain.conv2.weight)
    assert torch.equal(model.head.weight, plain.head.weight)


def made_equal(
    model: nn.Module, groups: Groups, clusters: dict[str, Tensor]
) -> nn.Module:
    """With the same filters, batch norm and statistics in each cluster."""
    equal = copy.deepcopy(model)
    tensors = equal.state_dict()
    for name, numbers in clusters.items():
        for member in groups[name].members:
            if member.role != "consume":
                rows = tensors[member.tensor].movedim(member.axis, 0)
                rows[member.index] = average_clusters(rows[member.index], numbers)
    return equal


@pytest.mark.parametrize(
    "name",
    ["chain", "residual", "depthwise_multiplier", "flatten", "concat", "grouped"],
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)]
)
def test_merging_equal_channels_changes_nothing(name, dtype, tolerance):
    model, groups = traced(name)
    x = images(4, NETS[name].size)
    names = mergeable_groups(model, groups, x)
    assert names
    counts = {group: max(1, groups[group].channels * 2 // 3) for group in names}
    clusters = cluster_channels(model, groups, counts)
    equal = made_equal(model, groups, clusters).to(dtype)
    merged = merge(equal, groups, clusters)
    expected, computed = outputs(equal, x.to(dtype)), outputs(merged, x.to(dtype))
    assert (expected - computed).abs().max() <= tolerance * expected.abs().max()
    smaller = trace(merged.float(), x).channels
    assert {group: smaller[group] for group in names} == counts


def test_deleting_instead_of_merging_would_lose_something():
    model, groups = traced("chain")
    clusters = {"conv1": torch.tensor([0, 0, 1, 1, 1, 2])}
    equal, x = made_equal(model, groups, clusters), images(4, 8)
    merged = merge(equal, groups, clusters)
    with torch.no_grad():
        merged.conv2.weight.copy_(equal.conv2.weight[:, [0, 2, 5]])
    assert (outputs(merged, x) - outputs(equal, x)).abs().max() > 1e-2


def test_statistics_of_equal_filters_become_equal_when_they_are_measured():
    model, groups = traced("chain")
    clusters = {"conv1": torch.tensor([0, 0, 1, 1, 1, 2])}
    equal, x = made_equal(model, groups, clusters), images(16, 8)
    with torch.no_grad():
        equal.bn1.running_mean.normal_()  # as training from unequal filters leaves them
    assert (
        outputs(merge(equal, groups, clusters), x) - outputs(equal, x)
    ).abs().max() > 1e-3
    recalibrate(equal, x)
    torch.testing.assert_close(
        outputs(merge(equal, groups, clusters), x), outputs(equal, x), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("name", ["layer_norm", "attention"])
def test_channels_that_a_norm_reads_are_not_mergeable(name):
    model, groups = traced(name)
    assert len(mergeable_groups(model, groups, images(2, NETS[name].size))) < len(
        groups
    )


class NormInBranch(nn.Module):
    """A norm over channels, in a residual branch that begins small."""

    def __init__(self, scale: float):
        super().__init__()
        self.stem, self.inner, self.outer = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 6, 1),
            nn.Conv2d(6, 8, 1),
        )
        self.norm, self.head = nn.GroupNorm(1, 6), nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.full((8, 1, 1), scale))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(
            (x + self.scale * self.outer(torch.relu(self.norm(self.inner(x))))).mean(
                (2, 3)
            )
        )


@pytest.mark.parametrize("scale", [1.0, 1e-4, 0.0])
def test_a_small_scale_does_not_hide_that_a_norm_reads_the_channels(scale):
    model = NormInBranch(scale).eval()
    before = copy.deepcopy(model.state_dict())
    assert mergeable_groups(model, trace(model, images(1, 8)), images(1, 8)) == ["stem"]
    assert all(
        torch.equal(before[name], tensor) for name, tensor in model.state_dict().items()
    )


def test_dead_channels_do_not_hide_how_the_others_are_read():
    class Energy(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
            self.read, self.head = nn.Conv2d(8, 5, 1), nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.norm(self.body(x)))
            return self.head(
                (self.read(x) * x.square().sum(1, keepdim=True)).mean((2, 3))
            )

    model = Energy().eval()
    with torch.no_grad():
        for vector in (model.norm.weight, model.norm.bias):
            vector[:2] = 0
    assert mergeable_groups(model, trace(model, images(1, 8)), images(1, 8)) == ["read"]


def test_groups_that_can_not_be_merged_are_named_with_the_way_out():
    with pytest.raises(UserError) as error:
        check_mergeable(["a", "b", "c"], ["b"])
    assert "removal.method: the channels of a can't be merged" in str(error.value)
    assert str(error.value).endswith("leave them whole with exclude=a,c")


@pytest.fixture(scope="module")
def digits() -> Images:
    return load(DataConfig(data="digits")).train[:256]


CONFIG = FinetuneConfig(
    epochs=6, batch_size=32, lr=0.1, weight_decay=1e-3, distillation=0.0, bf16="off"
)


def small(seed: int = 0) -> tuple[nn.Module, Groups, dict[str, Tensor]]:
    torch.manual_seed(seed)
    body = (
        conv_bn(3, 12, stride=2),
        conv_bn(12, 12, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    model = nn.Sequential(*body, nn.Linear(12, 10))
    groups = trace(model, torch.zeros(1, 3, 16, 16))
    return (
        model,
        groups,
        cluster_channels(model, groups, dict.fromkeys(groups.channels, 6), "even"),
    )


def test_training_draws_clusters_together_until_merging_is_free(digits):
    model, groups, clusters = small()
    start = [
        spread(model[n][0].weight.detach(), clusters[f"{n}.0"]).norm() for n in (0, 1)
    ]
    # With a momentum m a strong pull swings, and dies out by the root of m a step.
    finetune(
        model,
        digits,
        replace(CONFIG, momentum=0.5),
        callback=Centripetal(groups, clusters, 2.0),
    )
    end = [
        spread(model[n][0].weight.detach(), clusters[f"{n}.0"]).norm() for n in (0, 1)
    ]
    assert all(after < 1e-4 * before for before, after in zip(start, end, strict=True))
    recalibrate(model, digits.inputs)
    merged = merge(model, groups, clusters)
    with torch.no_grad():
        assert torch.equal(
            merged(digits.inputs).argmax(1), model(digits.inputs).argmax(1)
        )
    assert merged[0][0].out_channels == 6


@pytest.mark.parametrize(("epochs", "lr"), [(10, 0.1), (30, 0.01)])
def test_the_usual_pull_draws_as_much_in_a_training_of_any_length_as_in_the_papers(
    digits, epochs, lr, monkeypatch
):
    # 3e-3, at each of three learning rates for 200 epochs of 782 steps, momentum 0.9
    assert (
        pytest.approx(3e-3 * 200 * 782 * (3e-2 + 3e-3 + 3e-4) / (1 - 0.9), rel=0.01)
        == centripetal.PULL
    )
    monkeypatch.setattr(
        centripetal, "PULL", 3.0
    )  # 156 e-folds leave nothing to measure
    model, groups, clusters = small()
    start = [
        spread(model[n][0].weight.detach(), clusters[f"{n}.0"]).norm() for n in (0, 1)
    ]
    config = replace(
        CONFIG, epochs=epochs, lr=lr, momentum=0.0, weight_decay=0.0, batch_size=16
    )
    finetune(model, digits, config, callback=Centripetal(groups, clusters))
    end = [
        spread(model[n][0].weight.detach(), clusters[f"{n}.0"]).norm() for n in (0, 1)
    ]
    assert [
        float(after / before) for before, after in zip(start, end, strict=True)
    ] == pytest.approx([math.exp(-3)] * 2, rel=0.1)


def test_killed_training_goes_on_to_bit_identical_weights(digits, tmp_path):
    model, groups, clusters = small()
    callback = Centripetal(groups, clusters)
    with pytest.raises(KilledError):
        finetune(
            model,
            digits[:64],
            CONFIG,
            checkpoint=tmp_path / "merging.pt",
            on_epoch=kill_after(2),
            callback=callback,
        )
    resumed = finetune(
        small(seed=7)[0],
        digits[:64],
        CONFIG,
        checkpoint=tmp_path / "merging.pt",
        callback=callback,
    )
    whole = finetune(small()[0], digits[:64], CONFIG, callback=callback)
    assert all(
        torch.equal(a, b)
        for a, b in zip(resumed.parameters(), whole.parameters(), strict=True)
    )


@pytest.mark.parametrize("name", ["outer", "stem:input"])
def test_groups_that_are_not_prunable_are_refused(name):
    model, groups = traced("residual")
    with pytest.raises(
        UserError, match=f"counts: '{name}' is no prunable group; known: stem, inner"
    ):
        cluster_channels(model, groups, {name: 2})


@pytest.mark.parametrize("count", [0, 9])
def test_counts_that_can_not_be_are_refused(count):
    model, groups = traced("residual")
    with pytest.raises(
        UserError, match=f"group 'stem' can have 1 to 8 clusters, got {count}"
    ):
        cluster_channels(model, groups, {"stem": count})


def test_an_unknown_clustering_is_refused_with_the_nearest():
    model, groups = traced("residual")
    with pytest.raises(
        UserError, match="unknown clustering 'k-means'; did you mean 'kmeans'"
    ):
        cluster_channels(model, groups, {"stem": 2}, "k-means")
