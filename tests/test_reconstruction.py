"""Reconstructed weights are the least-squares ones, never worse than sliced ones, and
nothing else is touched.
"""

import copy
import json
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nets import (
    CLASSES,
    NETS,
    RGB,
    build,
    difference,
    images,
    outputs,
    pooled,
    random_kept,
    randomise,
    tensors,
)
from test_cli import TINY
from test_slicing import TiedParameter
from torch import Tensor, nn
from torch.nn import functional as F
from toys import digits, digits_proxy

from autoprune.cli.main import main
from autoprune.config import ProxyConfig, Settings
from autoprune.costs.allocation import Allocation
from autoprune.envs.layer_pruning import LayerPruningEnv
from autoprune.errors import UserError
from autoprune.evaluation import reconstruction
from autoprune.evaluation.evaluate import Evaluation, recalibrate, score
from autoprune.evaluation.importance import importance
from autoprune.evaluation.proxy import ProxyAccuracy
from autoprune.evaluation.reconstruction import Reconstruction
from autoprune.pipeline.context import RunContext
from autoprune.pipeline.methods import channels
from autoprune.structure.attention import open_attention
from autoprune.structure.slicing import Slicer, prune, top_channels
from autoprune.tracing.trace import trace

ALL = 10_000
"""More patches than any layer here reads."""
N = 12


class Reader(nn.Module):
    """A convolution from 6 channels to 7, and what comes before and after it."""

    def __init__(self, layer: nn.Module, norm: nn.Module):
        super().__init__()
        self.stem, self.layer, self.norm = nn.Conv2d(RGB, 6, 3), layer, norm
        self.head = nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(pooled(F.relu(self.norm(self.layer(F.relu(self.stem(x)))))))


def traced(model: nn.Module | str):
    """A network in float64, its trace and images."""
    model = (
        build(model) if isinstance(model, str) else randomise(model).eval()
    ).double()
    size = (
        12
        if any(
            isinstance(m, nn.Linear) and m.in_features > 100 for m in model.modules()
        )
        else 8
    )
    x = images(N, size, torch.float64)
    return model, trace(model, x[:1]), x


def rebuilt(
    model: nn.Module, groups, x: Tensor, kept: dict[str, Tensor], **options
) -> nn.Module:
    """The pruned network with reconstructed weights."""
    pruned = prune(model, groups, kept)
    Reconstruction(
        model, groups, x, **{"samples_per_image": ALL, "ridge": 0, **options}
    ).apply(pruned, kept)
    return pruned


def reads(model: nn.Module, layer: nn.Module, x: Tensor) -> list[Tensor]:
    """The input of every call of a layer."""
    seen = []
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    outputs(model, x)
    handle.remove()
    return seen


def rows(conv: nn.Conv2d, x: Tensor, channels: Tensor) -> Tensor:
    """All patches of some channels, `(n, n_channels * kernel)`."""
    mode = {"zeros": "constant"}.get(conv.padding_mode, conv.padding_mode)
    padded = F.pad(x, [conv.padding[1]] * 2 + [conv.padding[0]] * 2, mode)[:, channels]
    return (
        F.unfold(padded, conv.kernel_size, conv.dilation, 0, conv.stride)
        .transpose(1, 2)
        .flatten(0, 1)
    )


def values(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """What a convolution makes of these patches, `(n, n_out)`."""
    return conv(x).detach().flatten(2).transpose(1, 2).flatten(0, 1)


def least_squares(
    patches: Tensor, targets: Tensor, intercept: bool
) -> tuple[Tensor, Tensor]:
    """Weights `(n_out, n_inputs)` and bias that come nearest to the targets `(n,
    n_out)`.
    """
    columns = torch.cat(
        [patches, torch.full((len(patches), 1), float(intercept), dtype=patches.dtype)],
        1,
    )
    solution = torch.linalg.lstsq(columns, targets, driver="gelsd").solution.T
    return solution[:, :-1], solution[:, -1]


GEOMETRIES = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "stride": 2},
    {"kernel_size": (3, 2), "stride": (1, 2), "padding": (1, 2), "dilation": (2, 1)},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": 1},
]


NORMS = {
    "none": nn.Identity,
    "batch norm": lambda: nn.BatchNorm2d(7),
    "relu": lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(7)),
    "relu in place": lambda: nn.Sequential(nn.ReLU(inplace=True), nn.BatchNorm2d(7)),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_convolutions_get_the_least_squares_solution_over_unfolded_inputs(
    geometry, bias, norm
):
    model, groups, x = traced(
        Reader(nn.Conv2d(6, 7, bias=bias, **geometry), NORMS[norm]())
    )
    kept = {"stem": torch.tensor([0, 2, 3, 5]), "layer": torch.tensor([1, 2, 6])}
    (features,) = reads(model, model.layer, x)
    targets = values(model.layer, features)[:, kept["layer"]]
    any_mean = bias or norm == "batch norm"
    weight, intercept = least_squares(
        rows(model.layer, features, kept["stem"]), targets, any_mean
    )
    layer = rebuilt(model, groups, x, kept).layer
    torch.testing.assert_close(layer.weight.flatten(1), weight, rtol=1e-6, atol=1e-8)
    if bias:
        torch.testing.assert_close(layer.bias, intercept, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "name", ["chain", "concat", "flatten", "self_concat", "squeeze_excitation"]
)
def test_linear_layers_get_the_least_squares_solution(name):
    model, groups, x = traced(name)
    x = images(600, x.shape[-1], torch.float64)
    kept = random_kept(groups, 1)
    linear = {
        key: layer
        for key, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
    }
    pruned = rebuilt(model, groups, x, kept)
    for key, layer in linear.items():
        (features,) = reads(model, layer, x)
        left = places(model, groups, kept, key)
        weight, bias = least_squares(
            features[:, left[1]], layer(features).detach()[:, left[0]], True
        )
        torch.testing.assert_close(
            pruned.get_submodule(key).weight, weight, rtol=1e-5, atol=1e-7
        )
        torch.testing.assert_close(
            pruned.get_submodule(key).bias, bias, rtol=1e-5, atol=1e-7
        )


def places(
    model: nn.Module, groups, kept: dict[str, Tensor], layer: str
) -> tuple[Tensor, Tensor]:
    """The outputs and inputs of a layer that are left: pruned from a network whose
    weights say where they are.
    """
    left = []
    for axis in (0, 1):
        marked = open_attention(copy.deepcopy(model))
        weight = marked.get_submodule(layer).weight.data
        weight.copy_(
            torch.arange(weight.shape[axis]).view(
                [-1 if a == axis else 1 for a in range(weight.ndim)]
            )
        )
        pruned = (
            prune(marked, groups, kept)
            .get_submodule(layer)
            .weight.movedim(axis, 0)
            .flatten(1)
        )
        left.append(pruned[:, 0].long())
    return left[0], left[1]


@pytest.mark.parametrize("name", ["shared", "two_names"])
def test_a_layer_that_runs_twice_is_solved_over_both_inputs(name):
    model, groups, x = traced(name)
    kept = {"stem": torch.tensor([0, 2, 3, 5])}
    calls = reads(model, model.shared, x)
    assert len(calls) == 2
    patches = torch.cat(
        [rows(model.shared, features, kept["stem"]) for features in calls]
    )
    targets = torch.cat([values(model.shared, features) for features in calls])
    weight, bias = least_squares(patches, targets[:, kept["stem"]], True)
    layer = rebuilt(model, groups, x, kept).shared
    torch.testing.assert_close(layer.weight.flatten(1), weight, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(layer.bias, bias, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("ridge", [0.1, 10.0])
def test_the_ridge_is_that_many_patches_per_input_in_favour_of_the_dense_weights(ridge):
    model, groups, x = traced(Reader(nn.Conv2d(6, 7, 3), nn.Identity()))
    left, lost = torch.tensor([0, 2, 3, 5]), torch.tensor([1, 4])
    (features,) = reads(model, model.layer, x)
    patches = rows(model.layer, features, torch.arange(6))
    centred = (patches - patches.mean(0)).view(len(patches), 6, 9)
    pull = (
        torch.eye(4 * 9, dtype=torch.float64)
        * (ridge * centred.square().sum() / len(patches)) ** 0.5
    )
    missing = (
        centred[:, lost].flatten(1) @ model.layer.weight[:, lost].flatten(1).T.detach()
    )
    known = torch.cat([centred[:, left].flatten(1), pull])
    change, _ = least_squares(known, F.pad(missing, (0, 0, 0, len(pull))), False)
    weight = rebuilt(model, groups, x, {"stem": left}, ridge=ridge).layer.weight
    torch.testing.assert_close(
        weight,
        model.layer.weight[:, left] + change.view(7, 4, 3, 3),
        rtol=1e-6,
        atol=1e-8,
    )


@pytest.mark.parametrize("ridge", [0, 0.1])
@pytest.mark.parametrize("name", [name for name, net in NETS.items() if net.groups])
def test_no_layer_is_further_from_its_old_outputs_than_sliced(name, ridge):
    model, groups, x = traced(name)
    model, x = model.float(), x.float()
    solved = Reconstruction(model, groups, x, ALL, ridge=ridge)
    layers = {
        m.tensor.removesuffix(".weight")
        for g in groups
        for m in g.consumers
        if m.tensor not in solved.skipped
    }
    dense = open_attention(copy.deepcopy(model))
    for seed in range(3):
        kept = random_kept(groups, seed)
        sliced, better = prune(model, groups, kept), prune(model, groups, kept)
        solved.apply(better, kept)
        for layer in layers:
            calls = reads(dense, dense.get_submodule(layer), x)
            left = places(model, groups, kept, layer)
            plain, best = (
                error(net, dense, layer, calls, left) for net in (sliced, better)
            )
            assert best <= plain * (1 + 1e-5) + 1e-10
            if len(left[1]) == dense.get_submodule(layer).weight.shape[1]:
                assert torch.equal(
                    better.get_submodule(layer).weight,
                    sliced.get_submodule(layer).weight,
                )


def error(
    net: nn.Module,
    dense: nn.Module,
    layer: str,
    calls: list[Tensor],
    left: tuple[Tensor, Tensor],
) -> float:
    """Mean squared difference between the outputs of a pruned and a dense layer on the
    dense network's features.
    """
    pruned, whole = (model.get_submodule(layer) for model in (net, dense))
    axis = 1 if isinstance(whole, nn.Conv2d) else -1
    with torch.no_grad():
        pairs = [
            (
                pruned(x.index_select(axis, left[1])),
                whole(x).index_select(axis, left[0]),
            )
            for x in calls
        ]
    return sum((a.double() - b.double()).square().mean().item() for a, b in pairs)


def test_where_nothing_is_removed_nothing_changes():
    model, groups, x = traced("residual")
    for kept in ({}, {group.name: torch.arange(group.channels) for group in groups}):
        pruned = rebuilt(model, groups, x, kept)
        assert all(
            torch.equal(a, b)
            for a, b in zip(tensors(pruned), tensors(model), strict=True)
        )


@pytest.mark.parametrize("norm", ["none", "batch norm"])
@pytest.mark.parametrize(("factor", "offset"), [(2.0, 0.0), (0.0, 1.5)])
def test_a_channel_that_is_another_times_a_factor_or_is_constant_is_made_up_for(
    factor, offset, norm
):
    model, groups, x = traced(
        Reader(nn.Conv2d(6, 7, 3, bias=norm == "none"), NORMS[norm]())
    )
    with torch.no_grad():
        model.stem.weight[3] = factor * model.stem.weight[1]
        model.stem.bias[3] = factor * model.stem.bias[1] + offset
    kept = {"stem": torch.tensor([0, 1, 2, 4, 5])}
    sliced, pruned = (
        prune(model, groups, kept).train(),
        rebuilt(model, groups, x, kept).train(),
    )
    dense = outputs(
        model.train(), x
    )  # batch norm takes its statistics from the images at hand
    assert difference(outputs(pruned, x), dense) < 1e-9
    if factor or norm == "none":
        assert difference(outputs(sliced, x), dense) > 0.01


def test_model_images_and_memory_shared_with_the_dense_network_stay_as_they_are():
    model, groups, x = traced("residual")
    model.train()
    before, pixels, flags = (
        copy.deepcopy(model.state_dict()),
        x.clone(),
        [m.training for m in model.modules()],
    )
    solved, slicer = (
        Reconstruction(model, groups, x),
        Slicer(model, groups, borrow=True),
    )
    for seed in range(3):
        kept = random_kept(groups, seed)
        sub = slicer.apply(kept)
        sub.head.bias.data = model.head.bias.data
        solved.apply(sub, kept)
    assert all(
        torch.equal(before[name], tensor) for name, tensor in model.state_dict().items()
    )
    assert torch.equal(x, pixels)
    assert [m.training for m in model.modules()] == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_threads_may_share_it_and_applying_twice_is_applying_once():
    model, groups, x = traced("concat")
    solved = Reconstruction(model, groups, x)
    allocations = [random_kept(groups, seed) for seed in range(8)]

    def weights(kept: dict[str, Tensor], times: int = 1) -> list[Tensor]:
        pruned = prune(model, groups, kept)
        for _ in range(times):
            solved.apply(pruned, kept)
        return tensors(pruned)

    alone = [weights(kept) for kept in allocations]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(weights, allocations))
    twice = [weights(kept, 2) for kept in allocations]
    for others in zip(alone, together, twice, strict=True):
        assert all(
            torch.equal(a, b) and torch.equal(a, c)
            for a, b, c in zip(*others, strict=True)
        )


def test_places_depend_on_the_seed_only_and_batches_dont_matter_where_all_places_are_taken(
    monkeypatch,
):
    model, groups, x = traced("chain")
    kept = random_kept(groups, 0)
    few = [
        rebuilt(model, groups, x, kept, samples_per_image=2, seed=seed).conv2.weight
        for seed in (0, 0, 1)
    ]
    assert torch.equal(few[0], few[1])
    assert not torch.allclose(few[0], few[2])
    whole = rebuilt(model, groups, x, kept, seed=1).conv2.weight
    monkeypatch.setattr(reconstruction, "BATCH", 5)
    for samples in (ALL, 4 * 4):
        weight = rebuilt(model, groups, x, kept, samples_per_image=samples).conv2.weight
        torch.testing.assert_close(weight, whole)


def test_a_network_in_float32_is_solved_even_if_channels_are_dead_or_alike():
    model, groups, x = traced("chain")
    model, x, kept = model.float(), x.float(), {"conv1": torch.tensor([0, 1, 2])}
    for scale in (torch.tensor([1.0, 1, 1, 1, 1, 1]), torch.zeros(6)):
        with torch.no_grad():
            for tensor in (model.conv1.weight, *tensors(model.bn1)[:4]):
                tensor[:] = tensor[0]
            model.bn1.weight *= scale
        conv = rebuilt(model, groups, x, kept, samples_per_image=1).conv2
        assert torch.isfinite(conv.weight).all()
        assert torch.isfinite(conv.bias).all()


@pytest.mark.parametrize(
    ("name", "options", "skipped"),
    [
        ("grouped", {}, {"grouped.weight": "grouped convolution"}),
        ("conv_groups", {}, {}),
        ("depthwise", {}, {}),
        (
            "up_and_down",
            {},
            {"up.weight": "isn't the weight of a plain Conv2d or Linear"},
        ),
        ("own_names", {}, {"matrix": "isn't the weight of a plain Conv2d or Linear"}),
        (
            "attention",
            {},
            {
                "attention.in_proj_weight": "isn't the weight of a plain Conv2d or Linear"
            },
        ),
        (
            "chain",
            {"max_size": 53},
            {"conv2.weight": "has 54 inputs per output, more than max_size=53"},
        ),
        ("chain", {"max_size": 54}, {}),
    ],
)
def test_what_cannot_be_solved_stays_sliced_with_a_reason(name, options, skipped):
    model, groups, x = traced(name)
    solved = Reconstruction(model, groups, x, **options)
    assert solved.skipped.keys() == skipped.keys()
    assert all(reason in solved.skipped[tensor] for tensor, reason in skipped.items())
    kept = random_kept(groups, 0)
    pruned, sliced = prune(model, groups, kept), prune(model, groups, kept)
    solved.apply(pruned, kept)
    for tensor in skipped:
        assert torch.equal(pruned.state_dict()[tensor], sliced.state_dict()[tensor])


def test_a_weight_of_two_modules_stays_sliced():
    model, groups, x = traced(TiedParameter())
    solved = Reconstruction(model, groups, x)
    assert solved.skipped == {
        "first.weight": "is used elsewhere too, or not by its module"
    }
    kept = {"stem": torch.tensor([0, 3])}
    pruned = prune(model, groups, kept)
    solved.apply(pruned, kept)
    assert pruned.second.weight is pruned.first.weight
    assert torch.equal(
        pruned.first.weight, model.first.weight[kept["stem"]][:, kept["stem"]]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples_per_image": 0}, "samples_per_image: must be at least 1, got 0"),
        ({"ridge": -0.1}, "ridge: must be a finite number from 0, got -0.1"),
        ({"ridge": float("nan")}, "ridge: must be a finite number from 0, got nan"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    model, groups, x = traced("chain")
    with pytest.raises(UserError, match=message):
        Reconstruction(model, groups, x, **options)


def solved_digits(allocation: dict[str, int]):
    """The digits network's pruned copy with solved weights, recalibrated, and the one
    that was only sliced.
    """
    model, groups, splits = digits()
    kept = top_channels(importance("l1", model, groups, splits.train), allocation)
    sliced, solved = prune(model, groups, kept), prune(model, groups, kept)
    Reconstruction(model, groups, splits.calibration.inputs).apply(solved, kept)
    for network in (sliced, solved):
        recalibrate(network, splits.calibration.inputs)
    return sliced, solved, splits


def halves() -> dict[str, int]:
    return {name: channels // 2 for name, channels in digits()[1].channels.items()}


@pytest.mark.parametrize("workers", [1, 2])
def test_the_proxy_scores_reconstructed_networks_if_asked(workers):
    model, groups, splits = digits()
    config = ProxyConfig(
        reconstruct="on", bf16="off", workers=workers, statistics="calibration"
    )
    proxy = ProxyAccuracy(
        model, groups, importance("l1", model, groups, splits.train), splits, config
    )
    _, solved, _ = solved_digits(halves())
    (selection,) = proxy.select_all([halves()])
    assert selection.loss == pytest.approx(
        score(solved, splits.selection).loss, rel=1e-4
    )
    assert proxy(halves()).loss < digits_proxy()(halves()).loss


@pytest.mark.parametrize("helps", [True, False])
def test_the_pruned_network_starts_from_solved_weights_only_where_they_help(
    helps, monkeypatch
):
    sliced, solved, splits = solved_digits(halves())
    model, groups, _ = digits()
    context = SimpleNamespace(model=model, groups=groups, splits=splits)
    context.importance = importance("l1", model, groups, splits.train)
    context.reconstruction = Reconstruction(model, groups, splits.calibration.inputs)
    if not helps:
        monkeypatch.setattr(
            channels,
            "score",
            lambda network, images: Evaluation(0.5, -score(network, images).loss),
        )
    decision = channels.ChannelDecision(Allocation(halves(), groups.fingerprint))
    pruned = channels.Channels().build(context, decision)
    assert score(solved, splits.proxy).loss < score(sliced, splits.proxy).loss
    expected = solved if helps else sliced
    assert all(
        torch.equal(a, b)
        for a, b in zip(pruned.parameters(), expected.parameters(), strict=True)
    )


def auto_proxy(reconstruct: str = "auto", **options) -> ProxyAccuracy:
    model, groups, splits = digits()
    config = ProxyConfig(
        reconstruct=reconstruct, bf16="off", workers=1, images=60, **options
    )
    return ProxyAccuracy(
        model, groups, importance("l1", model, groups, splits.train), splits, config
    )


def twos() -> dict[str, int]:
    """So little that the network is worse than a guess."""
    return dict.fromkeys(digits()[1].channels, 2)


@pytest.mark.parametrize("loss", ["cross_entropy", "kl"])
def test_auto_reconstructs_where_the_budget_leaves_a_network_worse_than_a_guess(loss):
    proxy, always = auto_proxy(loss=loss), auto_proxy("on", loss=loss)
    before = (proxy(twos()), proxy.sensitivity.copy())
    lost = proxy.suited_to(twos())
    assert lost.evaluations == 0
    assert lost.suited_to(twos()) is lost
    assert lost.reconstructs
    assert not proxy.reconstructs
    assert lost(twos()) == always(twos()) != before[0]
    assert np.array_equal(lost.sensitivity, always.sensitivity)
    assert not np.array_equal(lost.sensitivity, before[1])
    assert (proxy(twos()), proxy.evaluations) == (before[0], 1), (
        "what it was asked of stays as it was"
    )
    assert proxy.suited_to(halves()) is proxy, (
        "half of the digits network still knows something"
    )


@pytest.mark.parametrize("reconstruct", ["on", "off"])
def test_a_decided_proxy_suits_every_budget(reconstruct):
    proxy = auto_proxy(reconstruct)
    assert proxy.suited_to(twos()) is proxy


@pytest.mark.parametrize(
    ("budget", "is_lost"),
    [("params=12%", True), ("params=60%", False), ("params=12%..90%", True)],
)
def test_an_environment_judges_by_what_its_tightest_budget_leaves(budget, is_lost):
    model, groups, _ = digits()
    sliced = auto_proxy()
    env = LayerPruningEnv.with_suited_proxy(
        model, groups, auto_proxy(), budget, round_to=2
    )
    plain = LayerPruningEnv(model, groups, sliced, budget, round_to=2)
    assert plain.proxy is sliced, "the constructor keeps the proxy that it gets"
    counts = env.counts(env.space.uniform(env.target))
    assert (env.proxy(counts) != sliced(counts)) == is_lost
    assert env.observer.proxy is env.proxy


@pytest.mark.parametrize(
    ("reconstruct", "has_one"), [("auto", True), ("on", True), ("off", False)]
)
def test_the_settings_say_whether_the_pruned_network_may_start_from_solved_weights(
    reconstruct, has_one
):
    context = RunContext(Settings(proxy=ProxyConfig(reconstruct=reconstruct)))
    assert (context.reconstruction is not None) == has_one


@pytest.mark.parametrize(
    ("wish", "is_told", "is_done"),
    [("auto", True, True), ("on", False, True), ("off", False, False)],
)
def test_a_run_says_that_it_judges_by_solved_weights_where_nobody_asked(
    wish, is_told, is_done, tmp_path, capsys
):
    out, options = (
        tmp_path / "run",
        ["--agent", "random", "--episodes", "2", "--baselines", "none"],
    )
    arguments = [
        *TINY,
        "--budget",
        "params=12%",
        "--proxy.reconstruct",
        wish,
        *options,
        "--out",
        str(out),
    ]
    assert main(["search", *arguments]) == 0
    told = "params=12%: uniform pruning leaves less than a guess; candidates are judged with weights solved anew"
    assert (told in capsys.readouterr().err) == is_told
    assert json.loads((out / "results.json").read_text())["reconstructed"] == is_done
