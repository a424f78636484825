"""Importance equals plain loops, follows permutations, and never touches the model."""

import copy

import pytest
import torch
from nets import NETS, Chain, build, images, outputs, randomise
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune.data.datasets import Images
from autoprune.errors import UserError
from autoprune.evaluation.importance import CRITERIA, importance
from autoprune.structure.slicing import prune, top_channels
from autoprune.tracing.trace import trace

GENERATOR = torch.Generator().manual_seed(0)
DATA = Images(
    torch.randint(0, 256, (60, 3, 8, 8), generator=GENERATOR, dtype=torch.uint8),
    torch.randint(0, 5, (60,), generator=GENERATOR),
)


def traced(name: str):
    model = build(name)
    return model, trace(model, images(1, NETS[name].size))


def normalised(scores: list[float]) -> Tensor:
    scores = torch.tensor(scores)
    return scores / scores.mean()


def at_mean_one(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scores that can be compared across groups keep their proportions; the mean over
    all channels is 1.
    """
    mean = torch.cat(list(scores.values())).mean()
    return {name: score / mean for name, score in scores.items()}


def by_loops(name: str, weight: Tensor) -> Tensor:
    """Scores of one layer's filters `(n, ...)`, weight by weight."""
    filters = [[value.item() for value in row.flatten()] for row in weight]
    distance = lambda a, b: sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5  # noqa: E731
    return normalised(
        {
            "l1": lambda: [sum(abs(value) for value in row) for row in filters],
            "l2": lambda: [sum(value**2 for value in row) ** 0.5 for row in filters],
            "fpgm": lambda: [
                sum(distance(row, other) for other in filters) for row in filters
            ],
        }[name]()
    )


@pytest.mark.parametrize("name", ["l1", "l2", "fpgm"])
def test_filter_criteria_equal_loops_over_weights(name):
    model, groups = traced("chain")
    scores = importance(name, model, groups, DATA)
    torch.testing.assert_close(scores["conv1"], by_loops(name, model.conv1.weight))
    torch.testing.assert_close(scores["conv2"], by_loops(name, model.conv2.weight))


@pytest.mark.parametrize("name", ["l1", "l2", "fpgm"])
def test_layers_that_share_channels_are_averaged_each_at_mean_one(name):
    model, groups = traced("residual")
    with torch.no_grad():
        model.outer.weight.mul_(
            1000
        )  # a layer with large weights must not drown the other
    expected = (
        by_loops(name, model.stem.weight) + by_loops(name, model.outer.weight)
    ) / 2
    torch.testing.assert_close(importance(name, model, groups, DATA)["stem"], expected)


def test_channels_of_a_grouped_convolution_are_scored_over_all_conv_groups():
    model, groups = traced("grouped")
    filters = model.grouped.weight.view(2, 6, -1).transpose(0, 1)
    torch.testing.assert_close(
        importance("l1", model, groups, DATA)["grouped"], by_loops("l1", filters)
    )


def test_bn_scale_is_the_absolute_scale_averaged_over_batch_norms():
    model, groups = traced("residual")
    scores = importance("bn_scale", model, groups, DATA)
    with torch.no_grad():
        model.bn.weight.neg_()
    inner, stem, outer = (
        bn.weight.detach().abs() for bn in (model.bn_inner, model.bn, model.bn_outer)
    )
    expected = at_mean_one({"stem": (stem + outer) / 2, "inner": inner})
    again = importance("bn_scale", model, groups, DATA)
    for name, score in expected.items():
        torch.testing.assert_close(scores[name], score)
        torch.testing.assert_close(again[name], score)


def test_bn_scale_sums_over_the_positions_of_a_channel():
    model, groups = traced(
        "depthwise_multiplier"
    )  # each channel of the stem has two positions in the batch norm
    scale = model.bn.weight.detach().view(6, 2).abs().sum(1)
    scores = importance("bn_scale", model, groups, DATA)["stem"]
    torch.testing.assert_close(scores / scores.mean(), scale / scale.mean())


def test_bn_scale_falls_back_to_l1_without_batch_norm():
    model, groups = traced("flatten")
    l1 = importance("l1", model, groups, DATA)
    assert all(
        torch.equal(score, l1[name])
        for name, score in importance("bn_scale", model, groups, DATA).items()
    )


def test_taylor_is_the_squared_sum_of_weight_times_gradient_averaged_over_batches():
    model, groups = traced("residual")
    expected = {"stem": torch.zeros(8), "inner": torch.zeros(6)}
    for batch in (DATA[:50], DATA[50:]):
        twin = copy.deepcopy(model)
        loss = F.cross_entropy(twin(batch.inputs), batch.labels)
        layers = {"stem": [twin.stem, twin.outer], "inner": [twin.inner]}
        for name, producers in layers.items():
            for layer in producers:
                (gradient,) = torch.autograd.grad(loss, layer.weight, retain_graph=True)
                for channel in range(len(layer.weight)):
                    expected[name][channel] += (
                        gradient[channel] * layer.weight[channel]
                    ).sum().item() ** 2
    scores = importance("taylor", model, groups, DATA)
    for name, score in at_mean_one(expected).items():
        torch.testing.assert_close(scores[name], score, rtol=1e-4, atol=1e-6)


def test_hessian_is_half_the_diagonal_times_the_squared_weight_summed_over_a_filter(
    monkeypatch,
):
    monkeypatch.setattr("autoprune.evaluation.importance.PROBES", 1000)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 8), nn.Sigmoid(), nn.Flatten(), nn.Linear(4, 5)
    )
    model = randomise(model, seed=3).eval()
    groups, batch = trace(model, images(1, 8)), DATA[:10]

    def loss(weight: Tensor) -> Tensor:
        filters = F.conv2d(batch.inputs, weight.view_as(model[0].weight), model[0].bias)
        return F.cross_entropy(model[1:](filters), batch.labels)

    weight = model[0].weight.detach().flatten()
    diagonal = torch.autograd.functional.hessian(loss, weight).diagonal()
    expected = (diagonal * weight**2 / 2).view(4, -1).sum(1).abs()
    scores = importance("hessian", model, groups, batch)["0"]
    torch.testing.assert_close(scores, expected / expected.mean(), rtol=0.1, atol=0.05)


def test_lamp_is_the_share_of_what_no_weaker_filter_would_leave():
    model, groups = traced("chain")
    expected = {}
    for name, layer in {"conv1": model.conv1, "conv2": model.conv2}.items():
        squares = [
            sum(value.item() ** 2 for value in row.flatten()) for row in layer.weight
        ]
        expected[name] = torch.tensor(
            [
                square / sum(other for other in squares if other >= square)
                for square in squares
            ]
        )
    scores = importance("lamp", model, groups, DATA)
    for name, score in at_mean_one(expected).items():
        torch.testing.assert_close(scores[name], score)


def read_by(layer: nn.Module, model: nn.Module) -> Tensor:
    """What a layer reads of all images at once, channels first, `(n_channels, n)`."""
    seen = []
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(DATA.inputs)
    handle.remove()
    return seen[0].movedim(1, 0).flatten(1)


def test_activation_criteria_count_what_every_reader_reads():
    model, groups = traced(
        "residual"
    )  # the stream is read by the block and, pooled, by the head
    block, head, inner = (
        read_by(layer, model) for layer in (model.inner, model.head, model.outer)
    )
    stream = torch.cat([block, head], 1)
    active = at_mean_one(
        {"stem": (stream != 0).float().mean(1), "inner": (inner != 0).float().mean(1)}
    )
    for name, score in importance("apoz", model, groups, DATA).items():
        torch.testing.assert_close(score, active[name])
    means = {"stem": stream.abs().mean(1), "inner": inner.abs().mean(1)}
    for name, score in importance("activation", model, groups, DATA).items():
        torch.testing.assert_close(
            score / score.mean(), means[name] / means[name].mean()
        )


def test_apoz_of_a_dead_channel_is_one_and_of_one_that_always_fires_zero():
    model, groups = traced("chain")
    with torch.no_grad():
        model.bn1.weight[:2], model.bn1.bias[0], model.bn1.bias[1] = 0, -1, 1
    scores = importance("apoz", model, groups, DATA)["conv1"]
    assert scores[0] == 0
    assert scores[1] == scores.max() > scores[2:].max()
    kept = {"conv1": torch.arange(1, 6)}
    x = DATA.inputs
    torch.testing.assert_close(
        outputs(prune(model, groups, kept), x), outputs(model, x), rtol=0, atol=1e-6
    )


def test_apoz_ignores_a_positive_rescaling_that_changes_activations():
    model, groups = traced("chain")
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in scaled.bn1.parameters():
            tensor[2] *= 5
    before, after = (
        importance("apoz", net, groups, DATA)["conv1"] for net in (model, scaled)
    )
    torch.testing.assert_close(after / after.mean(), before / before.mean())
    loud, usual = (
        importance("activation", net, groups, DATA)["conv1"] for net in (scaled, model)
    )
    torch.testing.assert_close(loud[2] / loud[0], 5 * usual[2] / usual[0])


@pytest.mark.parametrize("name", ["activation", "apoz"])
def test_activation_criteria_do_not_depend_on_the_size_of_a_batch(name, monkeypatch):
    model, groups = traced("flatten")
    some = data(NETS["flatten"].size)
    whole = importance(name, model, groups, some)
    monkeypatch.setattr("autoprune.tracing.channel_statistics.BATCH", 7)
    for group, score in importance(name, model, groups, some).items():
        torch.testing.assert_close(score, whole[group])


def test_apoz_refuses_a_network_without_zeros():
    model, groups = traced("own_names")
    with pytest.raises(
        UserError,
        match=r"^criterion: apoz counts the zeros .* this network has none; use activation$",
    ):
        importance("apoz", model, groups, DATA)


@pytest.mark.parametrize(
    "name", [name for name in CRITERIA if name not in ("random", "hessian")]
)
def test_permuting_filters_permutes_scores(name):
    model, groups = traced("chain")
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    permuted = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in (
            *permuted.conv1.parameters(),
            *permuted.bn1.parameters(),
            *list(permuted.bn1.buffers())[:2],
        ):
            tensor.copy_(tensor[order].clone())
        permuted.conv2.weight.copy_(permuted.conv2.weight[:, order].clone())
    before, after = (importance(name, net, groups, DATA) for net in (model, permuted))
    torch.testing.assert_close(
        after["conv1"], before["conv1"][order], rtol=1e-3, atol=1e-6
    )
    torch.testing.assert_close(after["conv2"], before["conv2"], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["l1", "l2"])
def test_magnitude_grows_with_a_filters_scale_although_batch_norm_undoes_it(name):
    # papers.md 3.2: magnitude isn't invariant under rescalings that leave the function
    # unchanged.
    model, groups = traced("chain")
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        scaled.conv1.weight[2] *= -3
        scaled.conv1.bias[2] *= -3
        scaled.bn1.running_mean[2] *= -3
        scaled.bn1.weight[2] *= -1
        scaled.bn1.eps, model.bn1.eps = 0.0, 0.0
        scaled.bn1.running_var[2] *= 9
    torch.testing.assert_close(
        outputs(scaled, images(4, 8)), outputs(model, images(4, 8))
    )
    before, after = (
        importance(name, net, groups, DATA)["conv1"] for net in (model, scaled)
    )
    torch.testing.assert_close(after[2] / after[0], 3 * before[2] / before[0])
    torch.testing.assert_close(after[1] / after[0], before[1] / before[0])
    for invariant in ("bn_scale", "taylor"):
        before, after = (
            importance(invariant, net, groups, DATA)["conv1"] for net in (model, scaled)
        )
        torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-5)


def test_l1_and_l2_rank_multiples_of_one_filter_alike():
    model, groups = traced("chain")
    factors = torch.tensor([0.5, -3.0, 1.0, -0.1, 2.0, 0.7])
    with torch.no_grad():
        model.conv1.weight.copy_(model.conv1.weight[:1] * factors.view(-1, 1, 1, 1))
    for name in ("l1", "l2"):
        scores = importance(name, model, groups, DATA)["conv1"]
        torch.testing.assert_close(scores, factors.abs() / factors.abs().mean())


def test_fpgm_finds_the_redundant_filter_that_magnitude_keeps():
    model, groups = traced("chain")
    with torch.no_grad():
        model.conv1.weight[1] = model.conv1.weight[[0, 2, 3, 4, 5]].mean(
            0
        )  # amid the others
        model.conv1.weight.add_(10)  # distances stay, magnitudes all grow alike
    assert importance("fpgm", model, groups, DATA)["conv1"].argmin() == 1


def test_channels_with_zero_scale_and_shift_go_first_and_leave_the_output_as_it_was():
    # papers.md 3.4: with gamma = beta = 0 a channel is removable.
    model, groups = traced("chain")
    with torch.no_grad():
        for tensor in (model.bn1.weight, model.bn1.bias):
            tensor[[1, 4]] = 0
    kept = top_channels(importance("bn_scale", model, groups, DATA), {"conv1": 4})
    assert kept["conv1"].tolist() == [0, 2, 3, 5]
    x = images(4, 8)
    torch.testing.assert_close(
        outputs(prune(model, groups, kept), x), outputs(model, x), rtol=0, atol=1e-6
    )


def test_random_depends_on_the_seed_and_on_no_weight():
    model, groups = traced("chain")
    first = importance("random", model, groups, DATA, seed=3)
    torch.rand(3)
    again = importance(
        "random", randomise(Chain(), seed=9).eval(), groups, DATA, seed=3
    )
    assert all(torch.equal(first[name], again[name]) for name in groups.channels)
    other = importance("random", model, groups, DATA, seed=4)
    assert not any(torch.equal(first[name], other[name]) for name in groups.channels)


def test_a_criterion_with_chance_in_it_leaves_the_random_numbers_of_others_alone():
    model, groups = traced("chain")
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    importance("hessian", model, groups, DATA, seed=1)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("name", CRITERIA)
def test_every_network_gets_a_finite_score_a_channel(name):
    for net in (
        "concat",
        "depthwise_multiplier",
        "grouped",
        "two_names",
        "flatten",
        "squeeze_excitation",
        "own_names",
    ):
        if (net, name) == ("own_names", "apoz"):
            continue  # no ReLU, no zeros
        model, groups = traced(net)
        scores = importance(name, model, groups, data(NETS[net].size))
        assert {group: len(score) for group, score in scores.items()} == groups.channels
        assert all(
            torch.isfinite(score).all() and (score >= 0).all()
            for score in scores.values()
        )


def data(size: int) -> Images:
    return (
        DATA
        if size == 8
        else Images(DATA.pixels.repeat(1, 1, 2, 2)[..., :size, :size], DATA.labels)
    )


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("training", [True, False])
def test_model_is_left_as_found(name, training):
    model, groups = traced("residual")
    model.train(training)
    model.stem.weight.requires_grad_(False)
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    importance(name, model, groups, DATA)
    assert all(
        torch.equal(before[key], value) for key, value in model.state_dict().items()
    )
    assert model.training is training
    assert all(p.grad is None for p in model.parameters())
    assert [key for key, p in model.named_parameters() if not p.requires_grad] == [
        "stem.weight"
    ]
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize(
    ("name", "near"),
    [("l3", "l1"), ("bn_scales", "bn_scale"), ("tailor", "taylor"), ("", "l1")],
)
def test_unknown_criterion_is_refused_with_the_nearest(name, near):
    with pytest.raises(UserError) as error:
        importance(name, nn.Identity(), None, DATA)
    assert str(error.value) == (
        f"criterion: unknown criterion {name!r}; did you mean {near!r}? Known: "
        f"{', '.join(CRITERIA)}"
    )


def test_top_channels_are_the_best_in_ascending_order():
    scores = {"a": torch.tensor([3.0, 9.0, 1.0, 7.0]), "b": torch.tensor([1.0, 2.0])}
    kept = top_channels(scores, {"a": 2})
    assert {name: channels.tolist() for name, channels in kept.items()} == {"a": [1, 3]}
