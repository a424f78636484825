"""Proxy scores are plain evaluations of sliced networks, cached, the same side by side,
and blind to the test split.
"""

import copy
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from nets import NETS, Residual, build, images
from torch import Tensor, nn
from torch.nn import functional as F
from toys import digits

from autoprune.config import ProxyConfig
from autoprune.data.datasets import Images, Splits
from autoprune.evaluation.evaluate import (
    EvalBatches,
    Evaluation,
    accuracy,
    evaluate,
    on_batch_statistics,
    recalibrate,
    score,
)
from autoprune.evaluation.importance import importance
from autoprune.evaluation.proxy import SENSITIVITY_IMAGES, ProxyAccuracy
from autoprune.structure.slicing import prune, top_channels
from autoprune.tracing.trace import trace

FLOAT32 = ProxyConfig(images=40, recalibration_images=30, bf16="off")
CALIBRATED = replace(FLOAT32, statistics="calibration")
KEPT = {"stem": 5, "inner": 3}


class Untouchable:
    """Stands for the test split: whoever looks at it fails."""

    def __getattribute__(self, name):
        raise AssertionError(f"the test split was read ({name})")

    def __getitem__(self, index):
        raise AssertionError("the test split was read")

    def __len__(self):
        raise AssertionError("the test split was read")


def some(n: int, seed: int) -> Images:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (n, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.randint(0, 5, (n,), generator=generator))


SPLITS = Splits(
    some(20, 0),
    some(40, 1),
    some(60, 2),
    some(90, 3),
    Untouchable(),
    tuple("abcde"),
    "random",
)


@pytest.fixture(scope="module")
def residual():
    model = build("residual")
    groups = trace(model, images(1, 8))
    return model, groups, importance("l1", model, groups, SPLITS.train)


def build_proxy(residual, config: ProxyConfig = FLOAT32, scores=None) -> ProxyAccuracy:
    model, groups, l1 = residual
    return ProxyAccuracy(model, groups, scores or l1, SPLITS, config)


def plain(model, images: Images) -> Evaluation:
    """Image by image, with no batching."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        logits = torch.cat(
            [model(images.inputs[i : i + 1]) for i in range(len(images))]
        )
    hits = sum(
        int(row.argmax() == label)
        for row, label in zip(logits, images.labels, strict=True)
    )
    losses = [
        -row.log_softmax(0)[label].item()
        for row, label in zip(logits, images.labels, strict=True)
    ]
    return Evaluation(hits / len(images), sum(losses) / len(images))


def assert_close(a: Evaluation, b: Evaluation, rtol: float = 1e-5) -> None:
    assert a.accuracy == pytest.approx(b.accuracy)
    assert a.loss == pytest.approx(b.loss, rel=rtol)


@pytest.mark.parametrize("batch_size", [1, 7, 60, 500])
def test_score_equals_an_image_by_image_evaluation_at_any_batch_size(
    residual, batch_size
):
    assert_close(
        score(residual[0], SPLITS.proxy, batch_size), plain(residual[0], SPLITS.proxy)
    )
    assert (
        accuracy(residual[0], SPLITS.proxy) == plain(residual[0], SPLITS.proxy).accuracy
    )


def test_score_leaves_every_training_flag_as_found_even_when_it_fails(residual):
    model = copy.deepcopy(residual[0]).train()
    model.bn.eval()
    flags = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    score(model, SPLITS.proxy)
    assert [module.training for module in model.modules()] == flags
    assert all(
        torch.equal(before[name], tensor) for name, tensor in model.state_dict().items()
    )
    with pytest.raises(IndexError, match="Target 104 is out of bounds"):
        score(
            model,
            Images(SPLITS.proxy.pixels, torch.full_like(SPLITS.proxy.labels, 104)),
        )
    assert [module.training for module in model.modules()] == flags


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean((0, 2, 3)), x.var((0, 2, 3))


def test_recalibrated_statistics_are_those_of_what_reaches_each_batch_norm():
    model = build("chain")
    x = SPLITS.calibration.inputs
    recalibrate(model, x)
    with torch.no_grad():
        first = model.conv1(x)
        mean, var = statistics(first)
        torch.testing.assert_close(model.bn1.running_mean, mean, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.bn1.running_var, var, rtol=1e-4, atol=1e-4)
        normed = F.batch_norm(
            first, None, None, model.bn1.weight, model.bn1.bias, training=True
        )
        mean, var = statistics(model.conv2(F.relu(normed)))
        torch.testing.assert_close(model.bn2.running_mean, mean, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.bn2.running_var, var, rtol=1e-4, atol=1e-4)


def test_several_batches_count_equally_in_any_order():
    x = SPLITS.calibration.inputs
    batches = x.split(10)
    models = [build("chain") for _ in range(4)]
    recalibrate(models[0], x, batch_size=10)
    recalibrate(models[1], torch.cat([batches[i] for i in (2, 0, 3, 1)]), batch_size=10)
    recalibrate(
        models[2], torch.cat([batch.flip(0) for batch in batches]), batch_size=10
    )
    models[3].bn1.running_mean.fill_(99)  # what was there before doesn't matter
    recalibrate(models[3], x, batch_size=10)
    for other in models[1:]:
        for name, tensor in models[0].state_dict().items():
            torch.testing.assert_close(
                other.state_dict()[name], tensor, rtol=1e-5, atol=1e-6
            )
    with torch.no_grad():
        mean = torch.stack(
            [statistics(models[0].conv1(batch))[0] for batch in batches]
        ).mean(0)
    torch.testing.assert_close(models[0].bn1.running_mean, mean, rtol=1e-4, atol=1e-5)


def test_recalibration_changes_statistics_only():
    model = build("residual").train()
    model.bn.eval()
    model.bn_inner.momentum = 0.3
    flags, before = (
        [m.training for m in model.modules()],
        {n: p.clone() for n, p in model.named_parameters()},
    )
    attributes = [set(vars(module)) for module in model.modules()]
    recalibrate(model, SPLITS.calibration.inputs)
    assert all(
        torch.equal(before[name], parameter)
        for name, parameter in model.named_parameters()
    )
    assert [m.training for m in model.modules()] == flags
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert (model.bn.momentum, model.bn_inner.momentum) == (0.1, 0.3)
    assert all(p.grad is None for p in model.parameters())


def test_network_without_batch_norm_is_not_even_run():
    model = build("flatten")
    recalibrate(model, torch.zeros(1, 99, 1, 1))  # would fail in the first convolution


def test_score_with_statistics_of_other_images_is_that_of_the_pruned_and_recalibrated_network(
    residual,
):
    model, groups, scores = residual
    pruned = prune(model, groups, top_channels(scores, KEPT))
    recalibrate(pruned, SPLITS.calibration.inputs[: CALIBRATED.recalibration_images])
    assert_close(
        build_proxy(residual, CALIBRATED)(KEPT),
        plain(pruned, SPLITS.proxy[: FLOAT32.images]),
    )


def on_their_own_statistics(model: Residual, x: Tensor) -> Tensor:
    """The logits of a residual network whose batch norms see one batch, written out in
    functions.
    """

    def norm(x: Tensor, layer: nn.BatchNorm2d) -> Tensor:
        mean, var = (
            x.mean((0, 2, 3), keepdim=True),
            x.var((0, 2, 3), correction=0, keepdim=True),
        )
        return (x - mean) / (var + layer.eps).sqrt() * layer.weight[
            :, None, None
        ] + layer.bias[:, None, None]

    def conv(x: Tensor, layer: nn.Conv2d) -> Tensor:
        return F.conv2d(x, layer.weight, layer.bias, padding=1)

    with torch.no_grad():
        stream = F.relu(norm(conv(x, model.stem), model.bn))
        inner = F.relu(norm(conv(stream, model.inner), model.bn_inner))
        stream = stream + norm(conv(inner, model.outer), model.bn_outer)
        return F.relu(stream).mean((2, 3)) @ model.head.weight.T + model.head.bias


def by_hand(logits: Tensor, labels: Tensor) -> Evaluation:
    losses = -logits.log_softmax(1)[torch.arange(len(labels)), labels]
    return Evaluation(
        (logits.argmax(1) == labels).double().mean().item(), losses.mean().item()
    )


def test_score_in_one_pass_takes_batch_norm_from_the_images_that_are_scored(residual):
    model, groups, scores = residual
    pruned, x = (
        prune(model, groups, top_channels(scores, KEPT)),
        SPLITS.proxy[: FLOAT32.images],
    )
    expected = by_hand(on_their_own_statistics(pruned, x.inputs), x.labels)
    assert_close(build_proxy(residual)(KEPT), expected)
    assert abs(plain(pruned, x).loss - expected.loss) > 0.01


def test_blocks_are_disjoint_of_equal_difficulty_and_asked_in_turn():
    model, groups, splits = digits()
    l1 = importance("l1", model, groups, splits.train)
    scorer = ProxyAccuracy(
        model, groups, l1, splits, replace(FLOAT32, images=30, blocks=3)
    )
    blocks = [scorer.blocks[block].images for block in range(3)]
    seen = torch.cat([block.pixels for block in blocks]).flatten(1)
    assert [len(block) for block in blocks] == [30] * 3
    assert len(seen.unique(dim=0)) == 90
    half = {group.name: group.channels // 2 for group in groups}
    pruned = prune(model, groups, top_channels(l1, half))
    with on_batch_statistics(pruned):
        expected = [evaluate(pruned, EvalBatches(block), "off") for block in blocks]
    asked = [scorer.block_of(batch) for batch in range(4)]
    first = [
        ProxyAccuracy(model, groups, l1, splits, scorer.config).score_all(
            [half], block
        )[0]
        for block in asked
    ]
    for found, evaluation in zip(first, [*expected, expected[0]], strict=True):
        assert_close(found, evaluation)
    losses = [evaluation.loss for evaluation in expected]
    assert np.ptp(losses) < 0.2 * np.mean(losses)
    assert len(set(losses)) == 3


def test_an_allocation_that_was_scored_keeps_its_score_in_every_block():
    model, groups, splits = digits()
    scorer = ProxyAccuracy(
        model, groups, importance("l1", model, groups, splits.train), splits, FLOAT32
    )
    half = {group.name: group.channels // 2 for group in groups}
    assert scorer.score_all([half], 1) == scorer.score_all([half], 2) == [scorer(half)]
    assert scorer.evaluations == 1


def test_survey_scores_the_whole_proxy_split_in_one_pass_and_counts_as_no_evaluation(
    residual,
):
    model, groups, scores = residual
    pruned, scorer = (
        prune(model, groups, top_channels(scores, KEPT)),
        build_proxy(residual),
    )
    scorer(KEPT)
    expected = by_hand(
        on_their_own_statistics(pruned, SPLITS.proxy.inputs), SPLITS.proxy.labels
    )
    assert_close(scorer.survey_all([KEPT])[0], expected)
    assert scorer.evaluations == 1
    assert scorer(KEPT) != expected


@pytest.mark.parametrize("batch_size", [10, 20, 60])
def test_in_several_batches_each_has_its_own_statistics(residual, batch_size):
    model, eval_batches = residual[0], EvalBatches(SPLITS.proxy, batch_size)
    parts = [
        on_their_own_statistics(model, x) for x in SPLITS.proxy.inputs.split(batch_size)
    ]
    with on_batch_statistics(model):
        assert_close(
            evaluate(model, eval_batches, "off"),
            by_hand(torch.cat(parts), SPLITS.proxy.labels),
        )


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 3e-5), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("shape", [(12, 11, 7, 5), (64, 3, 1, 1), (1, 40, 4, 6)])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_statistics_are_those_of_float64(shape, dtype, tolerance, layout, affine):
    generator = torch.Generator().manual_seed(0)
    x = (
        torch.randn(shape, generator=generator) * 3
        + torch.arange(shape[1])[:, None, None] % 4
    ).to(dtype)
    layer = nn.BatchNorm2d(shape[1], affine=affine)
    if affine:
        nn.init.uniform_(layer.weight, generator=generator)
        nn.init.uniform_(layer.bias, generator=generator)
    var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0, keepdim=True)
    expected = (x.double() - mean) / (var + layer.eps).sqrt()
    if affine:
        expected = expected * layer.weight[:, None, None] + layer.bias[:, None, None]
    with torch.no_grad(), on_batch_statistics(layer):
        found = layer(x.to(memory_format=layout))
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=layout)
    torch.testing.assert_close(
        found.double(), expected.double(), rtol=tolerance, atol=tolerance
    )
    assert "forward" not in vars(layer)
    assert layer.running_mean.eq(0).all()


def test_gradients_flow_through_batch_statistics():
    x, layer = SPLITS.proxy.inputs.requires_grad_(), nn.BatchNorm2d(3)
    with on_batch_statistics(layer):
        found = torch.autograd.grad(layer(x).square().sum(), [x, layer.weight])
    plain = F.batch_norm(x, None, None, layer.weight, layer.bias, True)
    torch.testing.assert_close(
        found, torch.autograd.grad(plain.square().sum(), [x, layer.weight])
    )


def test_batch_norm_of_ones_own_keeps_its_forward_on_batch_statistics():
    class Doubling(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    x, layer = SPLITS.proxy.inputs, Doubling(3)
    with torch.no_grad(), on_batch_statistics(layer):
        torch.testing.assert_close(
            layer(x), 2 * F.batch_norm(x, None, None, training=True)
        )


def test_batch_statistics_leave_everything_as_found_even_after_a_failure():
    model = build("residual").train()
    model.bn.eval()
    before = copy.deepcopy(model.state_dict())
    flags = [
        (m.training, getattr(m, "track_running_stats", None)) for m in model.modules()
    ]
    with on_batch_statistics(model):
        model(SPLITS.proxy.inputs)
    with (
        pytest.raises(RuntimeError, match="expected input"),
        on_batch_statistics(model),
    ):
        model(torch.zeros(1, 99, 1, 1))
    assert [
        (m.training, getattr(m, "track_running_stats", None)) for m in model.modules()
    ] == flags
    assert all(
        torch.equal(before[name], tensor) for name, tensor in model.state_dict().items()
    )


def test_only_batch_norm_leaves_eval_mode_for_batch_statistics():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5)
    ).train()
    with on_batch_statistics(model):
        assert [module.training for module in model] == [False, True, False]


@pytest.mark.parametrize("config", [FLOAT32, CALIBRATED])
def test_kl_loss_is_the_divergence_from_the_dense_networks_answers(residual, config):
    model, groups, scores = residual
    scorer = build_proxy(residual, replace(config, loss="kl"))
    found, x = scorer(KEPT), SPLITS.proxy[: config.images]
    pruned = prune(model, groups, top_channels(scores, KEPT))
    if config is CALIBRATED:
        recalibrate(pruned, SPLITS.calibration.inputs[: config.recalibration_images])
    with torch.no_grad():
        theirs = model(x.inputs).double().softmax(1)
        ours = (
            on_their_own_statistics(pruned, x.inputs)
            if config is FLOAT32
            else pruned.eval()(x.inputs)
        )
    divergence = (
        (theirs * (theirs.log() - ours.double().log_softmax(1))).sum(1).mean().item()
    )
    assert found.loss == pytest.approx(divergence, rel=1e-4)
    assert divergence > 0
    assert found.accuracy == pytest.approx(by_hand(ours, x.labels).accuracy)


def test_the_dense_network_does_not_diverge_from_itself(residual):
    scorer = build_proxy(residual, replace(CALIBRATED, loss="kl"))
    recalibrate(
        scorer._dense, SPLITS.calibration.inputs[: CALIBRATED.recalibration_images]
    )
    scorer = ProxyAccuracy(
        scorer._dense, residual[1], residual[2], SPLITS, scorer.config
    )
    assert scorer({"stem": 8, "inner": 6}).loss == pytest.approx(0, abs=1e-6)


def test_sensitivity_is_the_divergence_when_each_group_alone_loses_half(residual):
    model, groups, scores = residual
    scorer, x = build_proxy(residual), SPLITS.proxy[:SENSITIVITY_IMAGES].inputs
    with torch.no_grad():
        theirs = model(x).double().softmax(1)
    for group, damage in zip(groups, scorer.sensitivity, strict=True):
        best = (
            scores[group.name]
            .argsort(descending=True)[: -(-group.channels // 2)]
            .sort()
            .values
        )
        ours = on_their_own_statistics(
            prune(model, groups, {group.name: best}), x
        ).double()
        divergence = (
            (theirs * (theirs.log() - ours.log_softmax(1))).sum(1).mean().item()
        )
        assert damage == pytest.approx(divergence, rel=1e-4)
    assert scorer.sensitivity.shape == (2,)
    assert (scorer.sensitivity > 0).all()
    assert scorer.evaluations == 0


def allocations(groups, n: int) -> list[dict[str, int]]:
    generator = np.random.default_rng(0)
    return [
        {group.name: int(generator.integers(1, group.channels + 1)) for group in groups}
        for _ in range(n)
    ]


@pytest.mark.parametrize(
    "config", [FLOAT32, CALIBRATED, replace(FLOAT32, temperature=1.0, sub_models=2)]
)
def test_scores_side_by_side_are_those_of_one_after_the_other_in_order(config):
    model, groups, splits = digits()
    config, l1 = (
        replace(config, images=100),
        importance("l1", model, groups, splits.train),
    )
    one_by_one = ProxyAccuracy(model, groups, l1, splits, replace(config, workers=1))
    asked = allocations(groups, 7)
    expected = [one_by_one(kept) for kept in asked]
    assert len({evaluation.loss for evaluation in expected}) == 7
    for workers in (1, 2, 3):
        scorer = ProxyAccuracy(
            model, groups, l1, splits, replace(config, workers=workers)
        )
        assert scorer.score_all(asked) == expected
        assert scorer.score_all(asked[::-1]) == expected[::-1]
        assert scorer.evaluations == 7
        finalists = scorer.select_all(asked[:3])
        assert (
            finalists
            == one_by_one.select_all(asked[:3])
            == [one_by_one.select_all([kept])[0] for kept in asked[:3]]
        )
        assert scorer.survey_all(asked[:3]) == one_by_one.survey_all(asked[:3])
        assert np.array_equal(scorer.sensitivity, one_by_one.sensitivity)


def test_the_same_allocation_twice_in_a_batch_is_scored_once(residual, monkeypatch):
    scorer, scored = build_proxy(residual), []
    inner = scorer._proxy_score
    monkeypatch.setattr(
        scorer, "_proxy_score", lambda *parts: scored.append(parts) or inner(*parts)
    )
    other = {"stem": 2, "inner": 6}
    first, second, third = scorer.score_all([KEPT, other, dict(reversed(KEPT.items()))])
    assert first is third
    assert first != second
    assert len(scored) == scorer.evaluations == 2
    assert scorer.score_all([other, KEPT]) == [second, first]
    assert len(scored) == 2
    assert scorer.score_all([]) == []


def threads_seen() -> tuple[int, int]:
    """Of this thread, and of one that starts now."""
    with ThreadPoolExecutor(1) as pool:
        return torch.get_num_threads(), pool.submit(torch.get_num_threads).result()


@pytest.mark.parametrize("fails", [False, True])
def test_scoring_leaves_the_number_of_threads_as_found(residual, fails, monkeypatch):
    scorer = build_proxy(residual, replace(FLOAT32, workers=2))
    inside = []

    def score(images, slicer, kept):
        inside.append(torch.get_num_threads())
        assert not fails
        return Evaluation(0.5, 1.0)

    monkeypatch.setattr(scorer, "_proxy_score", score)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(AssertionError) if fails else nullcontext():
            scorer.score_all(allocations(residual[1], 4))
        assert threads_seen() == (3, 3)
        assert set(inside) == {1}
    finally:
        torch.set_num_threads(before)


def test_a_failed_score_takes_no_worker_away(residual, monkeypatch):
    scorer = build_proxy(residual, replace(FLOAT32, workers=2))
    with monkeypatch.context() as context:
        context.setattr(
            scorer, "_proxy_score", lambda images, slicer, kept: kept.anything
        )
        with pytest.raises(AttributeError):
            scorer.score_all(allocations(residual[1], 4))
    assert scorer(KEPT) == build_proxy(residual, replace(FLOAT32, workers=2))(KEPT)


def test_finalists_are_scored_on_the_selection_split_with_all_calibration_images(
    residual,
):
    model, groups, scores = residual
    pruned = prune(model, groups, top_channels(scores, KEPT))
    recalibrate(pruned, SPLITS.calibration.inputs)
    scorer = build_proxy(residual)
    assert_close(scorer.select_all([KEPT])[0], plain(pruned, SPLITS.selection))
    assert scorer.evaluations == 0


def test_scores_do_not_depend_on_what_was_scored_before(residual):
    others = [{"stem": 1, "inner": 1}, {"stem": 8, "inner": 6}, {"stem": 2, "inner": 6}]
    fresh, used = build_proxy(residual), build_proxy(residual)
    for kept in others:
        used(kept)
    assert used(KEPT) == fresh(KEPT)


def test_second_call_is_looked_up(residual, monkeypatch):
    scorer = build_proxy(residual)
    first = scorer(KEPT)
    monkeypatch.setattr(scorer, "_proxy_score", None)  # a second evaluation would fail
    assert scorer(dict(reversed(KEPT.items()))) is first
    assert scorer.evaluations == 1


def test_evaluations_of_an_interrupted_run_are_looked_up_too(residual):
    scorer = build_proxy(residual)
    scorer.restore(KEPT, Evaluation(0.5, 1.5))
    assert scorer(KEPT) == Evaluation(0.5, 1.5)
    assert scorer.evaluations == 0


def test_test_split_is_never_read_and_the_dense_model_never_changed(residual):
    model = residual[0]
    before, training = copy.deepcopy(model.state_dict()), model.training
    scorer = build_proxy(residual, replace(FLOAT32, temperature=0.5, sub_models=2))
    scorer(KEPT)
    scorer.select_all([KEPT])
    scorer.survey_all([KEPT])
    assert scorer.sensitivity.shape == (2,)
    assert scorer.example.shape == (1, 3, 8, 8)
    assert all(
        torch.equal(before[name], tensor) for name, tensor in model.state_dict().items()
    )
    assert model.training is training
    with pytest.raises(AssertionError, match="the test split was read"):
        len(SPLITS.test)


def test_without_temperature_the_most_important_channels_are_drawn(residual):
    scorer = build_proxy(residual)
    drawn, best = scorer.draw(KEPT), top_channels(residual[2], KEPT)
    assert all(torch.equal(drawn[name], best[name]) for name in KEPT)
    for draw in range(3):
        assert all(
            torch.equal(scorer.draw(KEPT, draw)[name], best[name]) for name in KEPT
        )


def with_importance(residual, temperature: float, seed: int = 0) -> ProxyAccuracy:
    scores = {
        "stem": torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8]),
        "inner": torch.tensor([1.0, 1, 1, 3, 3, 3]),
    }
    return build_proxy(
        residual, replace(FLOAT32, temperature=temperature, seed=seed), scores
    )


@pytest.mark.parametrize(("temperature", "power"), [(1.0, 1.0), (0.5, 2.0), (2.0, 0.5)])
def test_a_channel_is_drawn_as_often_as_its_importance_says(
    residual, temperature, power
):
    scorer, n_draws = with_importance(residual, temperature), 2000
    hits = np.zeros(8)
    for draw in range(n_draws):
        hits[scorer.draw({"stem": 1, "inner": 2}, draw)["stem"].item()] += 1
    expected = np.arange(1, 9.0) ** power
    expected *= n_draws / expected.sum()
    assert (
        (hits - expected) ** 2 / expected
    ).sum() < 24.3  # chi-square with 7 degrees of freedom, p = 0.001


def test_larger_samples_hold_distinct_channels_and_favour_the_important(residual):
    scorer = with_importance(residual, 1.0)
    hits = torch.zeros(6)
    for draw in range(500):
        channels = scorer.draw({"stem": 4, "inner": 3}, draw)["inner"]
        assert len(channels) == 3
        assert (channels.diff() > 0).all()
        hits[channels] += 1
    assert hits[3:].min() > 1.3 * hits[:3].max()


def test_draws_are_reproducible_and_differ_by_draw_seed_and_allocation(residual):
    kept = {"stem": 4, "inner": 3}

    def drawn(scorer: ProxyAccuracy, kept=kept, draw: int = 0) -> list:
        return [channels.tolist() for channels in scorer.draw(kept, draw).values()]

    scorer = with_importance(residual, 1.0)
    first = drawn(scorer)
    torch.rand(5)
    assert drawn(scorer) == first == drawn(with_importance(residual, 1.0))
    assert len({str(drawn(scorer, draw=draw)) for draw in range(20)}) > 15
    assert (
        len({str(drawn(with_importance(residual, 1.0, seed))) for seed in range(20)})
        > 15
    )
    assert drawn(scorer, {"stem": 4, "inner": 4})[0] != first[0]


def test_drawing_leaves_the_global_generator_alone(residual):
    state = torch.get_rng_state()
    with_importance(residual, 1.0).draw(KEPT)
    assert torch.equal(torch.get_rng_state(), state)


def test_score_of_several_sub_models_is_their_mean(residual):
    config = replace(CALIBRATED, temperature=1.0, sub_models=3)
    model, groups, _ = residual
    scorer, singles = build_proxy(residual, config), []
    for draw in range(3):
        pruned = prune(model, groups, scorer.draw(KEPT, draw))
        recalibrate(pruned, SPLITS.calibration.inputs[: config.recalibration_images])
        singles.append(score(pruned, SPLITS.proxy[: config.images]))
    together = scorer(KEPT)
    assert together.loss == pytest.approx(
        np.mean([single.loss for single in singles]), rel=1e-5
    )
    assert together.accuracy == pytest.approx(
        np.mean([single.accuracy for single in singles])
    )
    assert len({single.loss for single in singles}) > 1
    assert scorer.evaluations == 1


def test_bfloat16_scores_are_roughly_those_of_float32(residual):
    exact, fast = (
        build_proxy(residual, replace(FLOAT32, bf16=bf16))(KEPT)
        for bf16 in ("off", "on")
    )
    assert fast.loss == pytest.approx(exact.loss, rel=0.02)
    assert abs(fast.accuracy - exact.accuracy) <= 2 / FLOAT32.images
    assert fast.loss != exact.loss


def test_more_images_than_there_are_means_all(residual):
    scorer = build_proxy(
        residual, replace(CALIBRATED, images=10_000, recalibration_images=10_000)
    )
    pruned = prune(residual[0], residual[1], top_channels(residual[2], KEPT))
    recalibrate(pruned, SPLITS.calibration.inputs)
    assert_close(scorer(KEPT), plain(pruned, SPLITS.proxy))


def test_every_small_network_can_be_scored():
    for name in (
        "concat",
        "grouped",
        "depthwise_multiplier",
        "squeeze_excitation",
        "two_names",
        "padded_shortcut",
    ):
        model = build(name)
        groups = trace(model, images(1, NETS[name].size))
        scorer = ProxyAccuracy(
            model,
            groups,
            importance("l1", model, groups, SPLITS.train),
            SPLITS,
            FLOAT32,
        )
        result = scorer({group.name: max(1, group.channels // 2) for group in groups})
        assert 0 <= result.accuracy <= 1
        assert np.isfinite(result.loss)
        assert (scorer.sensitivity >= 0).all()
