"""Proxy scores are plain evaluations of recalibrated sub-models, cached, and blind to the test split."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from nets import NETS, build, images
from torch import Tensor
from torch.nn import functional as F

from autoprune import proxy
from autoprune.config import ProxyConfig
from autoprune.criteria import importance
from autoprune.data import Images, Splits
from autoprune.proxy import Evaluation, ProxyAccuracy, accuracy, recalibrate, score
from autoprune.pruning import prune, top_channels
from autoprune.tracing import trace

FLOAT32 = ProxyConfig(images=40, recalibration_images=30, bf16="off")
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


SPLITS = Splits(some(20, 0), some(40, 1), some(60, 2), some(90, 3), Untouchable(), tuple("abcde"), "random")


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
        logits = torch.cat([model(images.inputs[i : i + 1]) for i in range(len(images))])
    hits = sum(int(row.argmax() == label) for row, label in zip(logits, images.labels, strict=True))
    losses = [-row.log_softmax(0)[label].item() for row, label in zip(logits, images.labels, strict=True)]
    return Evaluation(hits / len(images), sum(losses) / len(images))


def assert_close(a: Evaluation, b: Evaluation, rtol: float = 1e-5) -> None:
    assert a.accuracy == pytest.approx(b.accuracy)
    assert a.loss == pytest.approx(b.loss, rel=rtol)


@pytest.mark.parametrize("batch_size", [1, 7, 60, 500])
def test_score_equals_an_image_by_image_evaluation_at_any_batch_size(residual, batch_size):
    assert_close(score(residual[0], SPLITS.proxy, batch_size), plain(residual[0], SPLITS.proxy))
    assert accuracy(residual[0], SPLITS.proxy) == plain(residual[0], SPLITS.proxy).accuracy


def test_score_leaves_every_training_flag_as_found_even_when_it_fails(residual):
    model = copy.deepcopy(residual[0]).train()
    model.bn.eval()
    flags = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    score(model, SPLITS.proxy)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(IndexError, match="Target 104 is out of bounds"):
        score(model, Images(SPLITS.proxy.pixels, torch.full_like(SPLITS.proxy.labels, 104)))
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
        normed = F.batch_norm(first, None, None, model.bn1.weight, model.bn1.bias, training=True)
        mean, var = statistics(model.conv2(F.relu(normed)))
        torch.testing.assert_close(model.bn2.running_mean, mean, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.bn2.running_var, var, rtol=1e-4, atol=1e-4)


def test_several_batches_count_equally_in_any_order():
    x = SPLITS.calibration.inputs
    batches = x.split(10)
    models = [build("chain") for _ in range(4)]
    recalibrate(models[0], x, batch_size=10)
    recalibrate(models[1], torch.cat([batches[i] for i in (2, 0, 3, 1)]), batch_size=10)
    recalibrate(models[2], torch.cat([batch.flip(0) for batch in batches]), batch_size=10)
    models[3].bn1.running_mean.fill_(99)  # what was there before doesn't matter
    recalibrate(models[3], x, batch_size=10)
    for other in models[1:]:
        for name, tensor in models[0].state_dict().items():
            torch.testing.assert_close(other.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        mean = torch.stack([statistics(models[0].conv1(batch))[0] for batch in batches]).mean(0)
    torch.testing.assert_close(models[0].bn1.running_mean, mean, rtol=1e-4, atol=1e-5)


def test_recalibration_changes_statistics_only():
    model = build("residual").train()
    model.bn.eval()
    model.bn_inner.momentum = 0.3
    flags, before = [m.training for m in model.modules()], {n: p.clone() for n, p in model.named_parameters()}
    attributes = [set(vars(module)) for module in model.modules()]
    recalibrate(model, SPLITS.calibration.inputs)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert [m.training for m in model.modules()] == flags
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert (model.bn.momentum, model.bn_inner.momentum) == (0.1, 0.3)
    assert all(p.grad is None for p in model.parameters())


def test_network_without_batch_norm_is_not_even_run():
    model = build("flatten")
    recalibrate(model, torch.zeros(1, 99, 1, 1))  # would fail in the first convolution


def test_proxy_score_is_that_of_the_pruned_and_recalibrated_network(residual):
    model, groups, scores = residual
    pruned = prune(model, groups, top_channels(scores, KEPT))
    recalibrate(pruned, SPLITS.calibration.inputs[: FLOAT32.recalibration_images])
    assert_close(build_proxy(residual)(KEPT), plain(pruned, SPLITS.proxy[: FLOAT32.images]))


def test_finalists_are_scored_on_the_selection_split_with_all_calibration_images(residual):
    model, groups, scores = residual
    pruned = prune(model, groups, top_channels(scores, KEPT))
    recalibrate(pruned, SPLITS.calibration.inputs)
    scorer = build_proxy(residual)
    assert_close(scorer.select(KEPT), plain(pruned, SPLITS.selection))
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
    monkeypatch.setattr(proxy, "score", None)  # a second evaluation would fail
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
    scorer.select(KEPT)
    assert scorer.example.shape == (1, 3, 8, 8)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.training is training
    with pytest.raises(AssertionError, match="the test split was read"):
        len(SPLITS.test)


def test_without_temperature_the_most_important_channels_are_drawn(residual):
    scorer = build_proxy(residual)
    drawn, best = scorer.draw(KEPT), top_channels(residual[2], KEPT)
    assert all(torch.equal(drawn[name], best[name]) for name in KEPT)
    for draw in range(3):
        assert all(torch.equal(scorer.draw(KEPT, draw)[name], best[name]) for name in KEPT)


def with_importance(residual, temperature: float, seed: int = 0) -> ProxyAccuracy:
    scores = {"stem": torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8]), "inner": torch.tensor([1.0, 1, 1, 3, 3, 3])}
    return build_proxy(residual, replace(FLOAT32, temperature=temperature, seed=seed), scores)


@pytest.mark.parametrize(("temperature", "power"), [(1.0, 1.0), (0.5, 2.0), (2.0, 0.5)])
def test_a_channel_is_drawn_as_often_as_its_importance_says(residual, temperature, power):
    scorer, n_draws = with_importance(residual, temperature), 2000
    hits = np.zeros(8)
    for draw in range(n_draws):
        hits[scorer.draw({"stem": 1, "inner": 2}, draw)["stem"].item()] += 1
    expected = np.arange(1, 9.0) ** power
    expected *= n_draws / expected.sum()
    assert ((hits - expected) ** 2 / expected).sum() < 24.3  # chi-square with 7 degrees of freedom, p = 0.001


def test_larger_samples_hold_distinct_channels_and_favour_the_important(residual):
    scorer = with_importance(residual, 1.0)
    hits = torch.zeros(6)
    for draw in range(500):
        channels = scorer.draw({"stem": 4, "inner": 3}, draw)["inner"]
        assert len(channels) == 3 and (channels.diff() > 0).all()
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
    assert len({str(drawn(with_importance(residual, 1.0, seed))) for seed in range(20)}) > 15
    assert drawn(scorer, {"stem": 4, "inner": 4})[0] != first[0]


def test_drawing_leaves_the_global_generator_alone(residual):
    state = torch.get_rng_state()
    with_importance(residual, 1.0).draw(KEPT)
    assert torch.equal(torch.get_rng_state(), state)


def test_score_of_several_sub_models_is_their_mean(residual):
    config = replace(FLOAT32, temperature=1.0, sub_models=3)
    model, groups, _ = residual
    scorer, singles = build_proxy(residual, config), []
    for draw in range(3):
        pruned = prune(model, groups, scorer.draw(KEPT, draw))
        recalibrate(pruned, SPLITS.calibration.inputs[: config.recalibration_images])
        singles.append(score(pruned, SPLITS.proxy[: config.images]))
    together = scorer(KEPT)
    assert together.loss == pytest.approx(np.mean([single.loss for single in singles]), rel=1e-5)
    assert together.accuracy == pytest.approx(np.mean([single.accuracy for single in singles]))
    assert len({single.loss for single in singles}) > 1
    assert scorer.evaluations == 1


def test_bfloat16_scores_are_roughly_those_of_float32(residual):
    exact, fast = build_proxy(residual)(KEPT), build_proxy(residual, replace(FLOAT32, bf16="on"))(KEPT)
    assert fast.loss == pytest.approx(exact.loss, rel=0.02)
    assert abs(fast.accuracy - exact.accuracy) <= 2 / FLOAT32.images
    assert fast.loss != exact.loss


def test_more_images_than_there_are_means_all(residual):
    scorer = build_proxy(residual, replace(FLOAT32, images=10_000, recalibration_images=10_000))
    pruned = prune(residual[0], residual[1], top_channels(residual[2], KEPT))
    recalibrate(pruned, SPLITS.calibration.inputs)
    assert_close(scorer(KEPT), plain(pruned, SPLITS.proxy))


def test_every_small_network_can_be_scored():
    for name in ("concat", "grouped", "depthwise_multiplier", "squeeze_excitation", "two_names", "padded_shortcut"):
        model = build(name)
        groups = trace(model, images(1, NETS[name].size))
        scorer = ProxyAccuracy(model, groups, importance("l1", model, groups, SPLITS.train), SPLITS, FLOAT32)
        result = scorer({group.name: max(1, group.channels // 2) for group in groups})
        assert 0 <= result.accuracy <= 1 and np.isfinite(result.loss)
