"""Depth and image size are decided like widths: exact costs, true scores, budgets that
hold.
"""

import dataclasses
import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from kills import kill_after
from nets import build, counted_macs, images
from tiny import network, residual
from torch import nn

from autoprune.agents.recorder import Recorder
from autoprune.cli.main import main
from autoprune.config import (
    DataConfig,
    NetworkConfig,
    ProxyConfig,
    SearchConfig,
    Settings,
)
from autoprune.costs.allocation import Allocation
from autoprune.costs.cost import CostTable
from autoprune.data.datasets import Images
from autoprune.deploy.pruned import load_pruned
from autoprune.envs.layer_pruning import LayerPruningEnv
from autoprune.errors import UserError
from autoprune.evaluation.evaluate import (
    EvalBatches,
    Evaluation,
    evaluate,
    on_batch_statistics,
    score,
)
from autoprune.evaluation.proxy import ProxyAccuracy
from autoprune.pipeline.context import RunContext
from autoprune.pipeline.methods import dimensions
from autoprune.pipeline.methods.dimensions import (
    DimensionDecision,
    Dimensions,
    _Choice,
    _most_promising,
)
from autoprune.runs import RunFolder
from autoprune.scaling.accuracy_model import EXPONENTS, AccuracyModel, Point
from autoprune.scaling.depth import remove_blocks
from autoprune.scaling.resolution import resize_inputs
from autoprune.scaling.scaling import DEPTH, RESOLUTION, ScaledCosts, Scaling
from autoprune.structure.slicing import prune, top_channels
from autoprune.tracing.trace import trace
from autoprune.training.loop import finetune

SIDE = 16
PIXELS = torch.randint(
    0,
    256,
    (12, 3, SIDE, SIDE),
    generator=torch.Generator().manual_seed(0),
    dtype=torch.uint8,
)
DATA = Images(PIXELS, torch.arange(12) % 10)
RESIDUAL = [
    "--model",
    "tests.tiny:residual",
    "--weights",
    "none",
    "--data",
    "digits",
    "--granularity",
    "dimensions",
    "--baselines",
    "none",
]
SIZES = ["--round_to_for", "resolution=4"]
FAST = [
    *RESIDUAL,
    *SIZES,
    "--proxy.images",
    "40",
    "--episodes",
    "12",
    "--epochs",
    "1",
    "--max_train_images",
    "200",
]


FITTED = [*FAST, "--round_to_for", "resolution=2", "--agent", "polynomial"]


def scaling(model: nn.Module | None = None, *excluded: str) -> Scaling:
    model = (model or residual()).eval()
    return Scaling(
        model, trace(model, images(1, SIDE)), images(1, SIDE), DATA, excluded
    )


def context(**search: object) -> RunContext:
    settings = Settings(
        NetworkConfig("tests.tiny:residual", "none"),
        DataConfig("digits"),
        SearchConfig(granularity="dimensions", **search),
        ProxyConfig(images=40, workers=1),
    )
    return RunContext(settings)


def some_kept(groups, seed: int) -> dict[str, int]:
    generator = np.random.default_rng(seed)
    return {
        name: int(generator.integers(1, n + 1)) for name, n in groups.channels.items()
    }


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_depth_and_resolution_stand_in_front_with_blocks_and_pixels_as_channels():
    found = scaling()
    names = list(found.groups.channels)
    assert names[:2] == [DEPTH, RESOLUTION]
    assert names[2:] == list(found.traced.channels)
    assert (found.groups.channels[DEPTH], found.groups.channels[RESOLUTION]) == (
        5,
        SIDE,
    )
    assert sorted(found.order) == ["1.0", "1.1", "1.2", "1.3"]
    assert found.groups.fingerprint != found.traced.fingerprint


@pytest.mark.parametrize("seed", range(6))
def test_costs_are_those_of_the_network_that_comes_out(seed):
    found = scaling()
    kept = some_kept(found.groups, seed)
    costs = ScaledCosts(found)
    shallow = remove_blocks(found.model, found.order[: 5 - kept[DEPTH]])
    model = resize_inputs(shallow, kept[RESOLUTION])
    groups = trace(model, images(1, SIDE))
    widths = {name: torch.arange(kept[name]) for name in groups.channels}
    pruned = prune(model, groups, widths)
    assert costs.macs(kept) == counted_macs(pruned, SIDE)
    assert costs.params(kept) == sum(p.numel() for p in pruned.parameters())
    assert costs.memory(kept) == CostTable(groups).memory(
        {n: len(k) for n, k in widths.items()}
    )
    array = np.array(list(kept.values()))
    assert costs.macs(array) == costs.macs(kept)
    assert costs.continuous_cost("macs", array.astype(float)) <= costs.macs(costs.dense)


def test_costs_of_many_allocations_are_those_of_each_and_grow_with_every_count():
    found = scaling()
    costs = ScaledCosts(found)
    kept = np.array(
        [list(some_kept(found.groups, seed).values()) for seed in range(24)]
    ).reshape(4, 6, -1)
    single = [[costs.macs(row) for row in rows] for rows in kept]
    assert costs.macs(kept).tolist() == single
    for column in range(kept.shape[-1]):
        more = kept.copy()
        more[..., column] = np.minimum(more[..., column] + 1, costs.dense[column])
        assert (costs.macs(more) >= costs.macs(kept)).all()


def test_a_network_without_blocks_or_of_one_size_says_why_it_has_no_choice():
    assert (
        scaling(network()).groups.reasons[DEPTH]
        == "the network has no block that can be removed"
    )
    flat = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * SIDE**2, 10),
    )
    assert (
        scaling(flat).groups.reasons[RESOLUTION]
        == "the network doesn't read images of 8 pixels"
    )
    assert RESOLUTION not in scaling(flat).groups.channels


def test_a_network_that_reads_half_the_size_but_not_all_between_has_no_choice():
    stem = nn.PixelUnshuffle(4), nn.Conv2d(48, 8, 3, padding=1), nn.ReLU()
    model = nn.Sequential(
        *stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    )
    assert (
        scaling(model).groups.reasons[RESOLUTION]
        == "the network doesn't read images of 10 pixels"
    )


def test_a_network_with_a_layer_called_like_a_dimension_is_refused():
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    found = scaling(nn.Sequential(OrderedDict(depth=nn.Conv2d(3, 4, 3), head=head)))
    with pytest.raises(
        UserError,
        match=r"^granularity: the network has channels called 'depth', as is a dimension",
    ):
        len(found.groups)


def test_steps_are_an_eighth_of_the_blocks_and_of_the_side_but_never_less_than_one():
    found = scaling()
    assert found.steps == {DEPTH: 1, RESOLUTION: 2}
    found.order, found.example = [""] * 24, images(1, 32)
    assert found.steps == {DEPTH: 3, RESOLUTION: 4}
    found.order, found.example = [], images(1, 7)
    assert found.steps == {DEPTH: 1, RESOLUTION: 1}


def test_groups_that_only_a_shallower_network_has_are_refused():
    model, x = residual().eval(), images(1, SIDE)
    traced = trace(model, x)
    known = tuple(group for group in traced.all if group.name != "0.0")
    found = Scaling(model, dataclasses.replace(traced, all=known), x, DATA)
    with pytest.raises(
        UserError,
        match=rf"without {found.order[0]} the network has other groups \(0.0\); exclude depth$",
    ):
        found.trace({DEPTH: 4})


def test_what_is_excluded_stays_whole_at_every_depth():
    found = scaling(None, DEPTH, "1.1.body.0.0")
    assert DEPTH not in found.groups.channels
    assert "user asked" in found.groups.reasons[DEPTH]
    assert "1.1.body.0.0" not in found.trace({}).channels
    assert ScaledCosts(found).macs(ScaledCosts(found).dense) == counted_macs(
        found.model, SIDE
    )


def test_an_allocation_is_scored_as_its_network_is_and_only_once():
    space = context()
    proxy, found = space.proxy(), space.scaling
    kept = {
        **space.groups.channels,
        DEPTH: 3,
        RESOLUTION: 12,
        "1.0.body.0.0": 4,
        "1.3.body.0.0": 4,
    }
    model = resize_inputs(remove_blocks(space.model, found.order[:2]), 12)
    groups = trace(model, space.splits.example)
    importance = {name: space.importance[name] for name in groups.channels}
    widths = {name: kept[name] for name in groups.channels}
    blocks = space.scaled({}).proxy().blocks
    alone = ProxyAccuracy(
        model, groups, importance, space.splits, space.settings.proxy, blocks=blocks
    )
    assert proxy(kept) == alone(widths)
    assert proxy.evaluations == 1
    gone = {
        name: kept[name] - 1
        for name in space.groups.channels
        if name not in {DEPTH, RESOLUTION, *groups.channels}
    }
    assert gone
    assert proxy(kept | gone) == proxy(kept)
    assert proxy.evaluations == 1
    whole = dict(space.groups.channels)
    assert proxy.survey_all([whole, kept])[1] == alone.survey_all([widths])[0]
    assert proxy.select_all([kept, whole])[0] == alone.select_all([widths])[0]
    dense = ProxyAccuracy(
        space.model, space.traced, space.importance, space.splits, space.settings.proxy
    )
    assert proxy(whole) == dense(space.traced.channels)


def test_scores_come_in_the_order_of_the_allocations_and_restored_ones_cost_nothing():
    space = context()
    proxy = space.proxy()
    asked = [
        {RESOLUTION: 12},
        {DEPTH: 2},
        {},
        {RESOLUTION: 12},
        {DEPTH: 2, RESOLUTION: 12},
    ]
    asked = [dict(space.groups.channels) | kept for kept in asked]
    together = proxy.score_all(asked)
    assert together == [space.proxy()(kept) for kept in asked]
    assert proxy.evaluations == 4
    again = space.proxy()
    for kept, evaluation in zip(asked, together, strict=True):
        again.restore(kept, dataclasses.replace(evaluation, loss=7.0))
    assert {e.loss for e in again.score_all(asked)} == {7.0}
    assert again.evaluations == 0


def test_a_continued_search_counts_a_network_once_whatever_its_removed_blocks_would_have_been(
    tmp_path,
):
    space, folder = context(budget="macs=40%"), RunFolder(tmp_path)
    env = LayerPruningEnv(
        space.model,
        space.groups,
        space.proxy(),
        "macs=40%",
        costs=space.costs,
        **space.limits,
    )
    whole = dict(space.groups.channels) | {DEPTH: 1}
    gone = next(
        name
        for name in space.groups.channels
        if name not in space.scaling.remaining(whole)
    )
    for number, kept in enumerate(
        [whole, whole | {gone: 2}, whole | {RESOLUTION: 12}], 1
    ):
        score = dataclasses.asdict(Evaluation(0.5, float(number)))
        folder.append(
            "episode",
            episode=number,
            reward=-1.0,
            macs=1,
            budget="macs=40%",
            kept=kept,
            **score,
        )
    recorder = Recorder(env, SearchConfig(episodes=3), folder)
    recorder.resume_at(3)
    assert recorder.n_restored == 2
    assert recorder.is_first.tolist() == [
        True,
        False,
        True,
    ]


def test_networks_of_every_depth_and_size_are_asked_the_same():
    proxy = context().proxy()
    own = [
        proxy._proxy_at(depth, size).blocks
        for depth, size in ((5, 16), (3, 16), (5, 12), (2, 8))
    ]
    assert own[0].n_blocks > 1
    assert all(blocks is own[0] for blocks in own)


def test_answers_are_held_against_the_whole_network():
    space = context()
    proxy = ProxyConfig(images=40, workers=1, loss="kl", bf16="off")
    space = RunContext(dataclasses.replace(space.settings, proxy=proxy))
    kept = dict(space.groups.channels) | {DEPTH: 1}
    at, eval_batches = space.scaled(kept), EvalBatches(space.splits.proxy)
    with on_batch_statistics(at.model):
        eval_batches.set_soft_targets(space.model, "off")
        expected = evaluate(at.model, eval_batches, "off")
        eval_batches.set_soft_targets(at.model, "off")
        own = evaluate(at.model, eval_batches, "off")
    (scored,) = space.proxy().survey_all([kept])
    assert scored.loss == pytest.approx(expected.loss, rel=1e-4)
    assert abs(own.loss - expected.loss) > 1e-3


def test_sensitivity_of_depth_and_size_is_what_half_of_them_loses():
    space = context()
    sensitivity = dict(
        zip(space.groups.channels, space.proxy().sensitivity.tolist(), strict=True)
    )
    assert sensitivity[DEPTH] > 0
    assert sensitivity[RESOLUTION] > 0
    own = space.scaled({}).proxy().sensitivity
    assert [
        sensitivity[name] for name in space.scaled({}).groups.channels
    ] == pytest.approx(own.tolist(), rel=1e-4)


@pytest.mark.parametrize("budget", ["macs=35%", "macs=80%", "params=50%"])
def test_every_episode_meets_its_budget_and_none_of_its_steps_still_fits(budget):
    space = context(budget=budget)
    env = LayerPruningEnv(
        space.model,
        space.groups,
        space.proxy(),
        budget,
        costs=space.costs,
        **space.limits,
    )
    generator = np.random.default_rng(0)
    for _ in range(3):
        observation, _ = env.reset()
        over = False
        while not over:
            assert env.observation_space.contains(observation)
            observation, _, over, _, info = env.step(
                generator.uniform(-1, 1, 1).astype(np.float32)
            )
        kept = info["allocation"].kept
        assert info["cost"] <= env.target
        assert kept[DEPTH] <= 5
        # Smaller images save no parameters.
        assert (
            (RESOLUTION not in kept)
            if budget.startswith("params")
            else 8 <= kept[RESOLUTION] <= SIDE
        )
        row = np.array(list(kept.values()))
        for index, levels in enumerate(env.space.levels):
            for level in levels[levels > row[index]][:1]:
                grown = np.where(np.arange(len(row)) == index, level, row)
                assert env.space.cost(grown) > env.target or env.space.cost(
                    grown
                ) == env.space.cost(row)


@pytest.mark.parametrize("agent", ["dyna", "sensitivity"])
def test_every_kind_of_agent_decides_depth_and_size_too(agent, tmp_path):
    run = tmp_path / "run"
    assert (
        main(
            [
                "search",
                *FAST,
                "--agent",
                agent,
                "--budget",
                "macs=40%",
                "--out",
                str(run),
            ]
        )
        == 0
    )
    assert main(["prune", str(run)]) == 0
    assert main(["finetune", str(run)]) == 0
    assert main(["evaluate", str(run)]) == 0
    results, network = results_of(run), load_pruned(run / "pruned")
    kept = json.loads((run / "allocation.json").read_text())["kept"]
    assert {DEPTH, RESOLUTION} <= kept.keys()
    assert results["macs"] == counted_macs(network, SIDE) <= 0.4 * results["macs_dense"]
    assert results["params"] == sum(p.numel() for p in network.parameters())
    assert {
        row["name"]: row["kept"] for row in results["groups"] if row["kept"]
    }.items() <= kept.items()
    assert main(["export", str(run)]) == 0


def test_the_pruned_network_is_the_masked_one_and_carries_what_the_plan_says(tmp_path):
    space = context(agent="uniform")
    kept = dict(space.groups.channels) | {DEPTH: 3, RESOLUTION: 12, "1.3.body.0.0": 6}
    at = space.scaled(kept, verify=True)
    widths = space.scaling.widths(kept)
    pruned = prune(at.model, at.groups, top_channels(at.importance, widths))
    by_hand = resize_inputs(remove_blocks(space.model, space.scaling.removed(kept)), 12)
    assert score(at.model, space.splits.proxy) == score(by_hand, space.splits.proxy)
    assert not at.groups.reasons.keys() - space.groups.reasons.keys()
    assert counted_macs(pruned, SIDE) == space.costs.macs(kept)


def test_the_fit_measures_every_network_of_its_plan_and_takes_one_within_the_budget(
    tmp_path,
):
    run = tmp_path / "run"
    fitted = [*FITTED, "--dimensions.epochs", "1", "--budget", "macs=50%"]
    assert main(["search", *fitted, "--out", str(run)]) == 0
    results = results_of(run)
    found = results["dimensions"]
    assert 0.5 * results["macs_dense"] >= results["macs"]
    sizes = [tuple(point[name] for name in EXPONENTS) for point in found["points"]]
    assert sizes[0] == (1, 1, 1)
    assert 10 <= len(sizes) == len(set(sizes)) <= 14
    assert all(0 <= point["accuracy"] <= 1 for point in found["points"])
    for name in ("depth", "width", "resolution"):
        cut = [
            p
            for p in found["points"]
            if all(
                p[other] == 1
                for other in ("depth", "width", "resolution")
                if other != name
            )
        ]
        assert len({p[name] for p in cut}) >= 3
    shares = found["optimum"]
    assert shares["depth"] * shares["width"] ** 2 * shares[
        "resolution"
    ] ** 2 == pytest.approx(0.5, rel=1e-3)
    assert main(["prune", str(run)]) == 0
    assert results_of(run)["macs"] == counted_macs(load_pruned(run / "pruned"), SIDE)


def test_shares_are_those_of_the_blocks_that_are_left():
    space = context(agent="polynomial")
    choice, scaled_to = _Choice(space), {DEPTH: 2, RESOLUTION: 12}
    kept = dict(space.groups.channels) | scaled_to | {"0.0": 4}
    there = {DEPTH, RESOLUTION, *space.scaling.widths(kept)}
    narrow = {name: count if name in there else 1 for name, count in kept.items()}
    assert narrow != kept
    assert choice.shares(narrow) == choice.shares(kept)
    macs, shares = space.costs.macs, choice.shares(kept)
    assert shares.depth == macs({DEPTH: 2}) / macs({})
    assert shares.resolution**2 == pytest.approx(12**2 / SIDE**2, 1e-2)
    assert shares.width**2 == pytest.approx(macs(kept) / macs(scaled_to))


@pytest.mark.parametrize(("widest", "size"), [(1.0, SIDE), (0.8, 12)])
def test_the_most_promising_network_within_what_was_measured_is_taken_and_uses_the_budget_up(
    widest, size
):
    space = context(agent="polynomial", budget="macs=20%")
    choice = _Choice(space)
    by_size = AccuracyModel(np.array([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]]))
    measured = [Point(0.1, 0.1, 0.1, 0.0), Point(1.0, 1.0, widest, 0.0)]
    kept, promised = _most_promising(choice, by_size, measured)
    assert kept[RESOLUTION] == size
    assert promised.accuracy == promised.resolution == pytest.approx(size / SIDE, 1e-3)
    row, target = np.array(list(kept.values())), int(0.2 * space.costs.macs({}))
    assert space.costs.macs(kept) <= target
    assert (choice.space.fill(row, target) == row).all()


def test_of_groups_in_removed_blocks_nothing_is_kept():
    space = context(agent="polynomial")
    kept = dict(space.groups.channels) | {DEPTH: 3}
    decision = DimensionDecision(Allocation(kept, space.groups.fingerprint))
    gone = {f"{name}.body.0.0" for name in space.scaling.removed(kept)}
    rows = decision.costs(space)["groups"]
    assert {row["name"]: row["kept"] for row in rows} == kept | dict.fromkeys(gone, 0)


def test_a_fit_has_an_optimum_under_an_absolute_budget_beyond_the_network():
    assert Dimensions().check(context(agent="polynomial", budget="macs=10M")) is None


def test_a_fit_killed_between_its_networks_measures_none_of_them_again(
    tmp_path, monkeypatch
):
    fitted = ["search", *FITTED, "--dimensions.epochs", "1", "--out"]
    assert main([*fitted, str(tmp_path / "whole")]) == 0
    trained = []

    def counting(model, images, config, seed, teacher, checkpoint):
        trained.append(checkpoint.name)
        dies = (
            kill_after(1, KeyboardInterrupt)
            if len(trained) == 5
            else lambda epoch, loss: None
        )
        return finetune(model, images, config, seed, teacher, checkpoint, dies)

    monkeypatch.setattr(dimensions, "finetune", counting)
    assert main([*fitted, str(tmp_path / "killed")]) == 130
    assert main([*fitted, str(tmp_path / "killed"), "--resume"]) == 0
    whole, again = (
        results_of(tmp_path / name)["dimensions"] for name in ("whole", "killed")
    )
    assert trained == [
        f"point-{n}.pt" for n in (*range(5), *range(4, len(whole["points"])))
    ]
    assert whole == again
    assert (tmp_path / "whole/allocation.json").read_text() == (
        tmp_path / "killed/allocation.json"
    ).read_text()


def test_a_decision_that_was_not_written_down_is_made_again(tmp_path, monkeypatch):
    run = tmp_path / "run"
    fitted = ["search", *FITTED, "--dimensions.epochs", "0", "--out", str(run)]

    def die(self, folder) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(DimensionDecision, "save", die)
        assert main(fitted) == 130
    assert main([*fitted, "--resume"]) == 0
    assert results_of(run)["dimensions"]["points"]
    assert (run / "allocation.json").exists()


def test_blocks_go_in_the_order_that_the_run_wrote_down(tmp_path):
    run = tmp_path / "run"
    assert (
        main(
            [
                "search",
                *FAST,
                "--agent",
                "uniform",
                "--budget",
                "macs=30%",
                "--out",
                str(run),
            ]
        )
        == 0
    )
    order = json.loads((run / "blocks.json").read_text())["order"]
    n_gone = 5 - json.loads((run / "allocation.json").read_text())["kept"][DEPTH]
    (run / "blocks.json").write_text(json.dumps({"order": order[::-1]}))
    assert main(["prune", str(run)]) == 0
    gone = json.loads((run / "pruned" / "plan.json").read_text())["removed_blocks"]
    assert n_gone
    assert gone == order[::-1][:n_gone] != order[:n_gone]


def test_a_policys_allocation_for_another_budget_can_be_pruned_to(
    tmp_path, monkeypatch
):
    run, file, again = tmp_path / "run", tmp_path / "other.json", tmp_path / "again"
    assert (
        main(
            [
                "search",
                *FAST,
                "--agent",
                "ppo",
                "--budget",
                "macs=60%",
                "--out",
                str(run),
            ]
        )
        == 0
    )
    with monkeypatch.context() as patched:
        patched.delattr(
            "autoprune.scaling.scaling.select_blocks_to_remove"
        )  # the run knows the order in which its blocks go
        assert (
            main(["replay", str(run), "--budget", "macs=40%", "--out", str(file)]) == 0
        )
    assert main(["prune", *FAST, "--allocation", str(file), "--out", str(again)]) == 0
    results = results_of(again)
    assert (
        results["macs"]
        == counted_macs(load_pruned(again / "pruned"), SIDE)
        <= 0.4 * results["macs_dense"]
    )


@pytest.mark.parametrize("method", ["group_lasso", "drop_out"])
def test_a_sparsely_trained_network_can_be_cut_in_depth_and_size(method, tmp_path):
    sparse = ["--sparse.method", method, "--sparse.epochs", "1", "--agent", "uniform"]
    assert main(["search", *FAST, *sparse, "--out", str(tmp_path / "run")]) == 0
    assert (
        DEPTH in json.loads((tmp_path / "run" / "allocation.json").read_text())["kept"]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--agent", "global"],
            "--agent: global ranks channels, and depth and image size have no rank; "
            "use dyna",
        ),
        (
            ["--agent", "polynomail"],
            "--agent: unknown agent 'polynomail'; did you mean 'polynomial'? Known: "
            "dyna, ",
        ),
        (
            ["--agent", "polynomial", "--budget", "params=50%"],
            "resolution is fixed (smaller images save no parameters)",
        ),
        (
            ["--agent", "polynomial", "--granularity", "channel"],
            "--agent: polynomial is for granularity dimensions, got",
        ),
        (
            ["--agent", "polynomial", "--budget", "macs=30%..50%"],
            "a range is for agents; dimensions takes one budget",
        ),
        (
            ["--agent", "polynomial", "--exclude", "depth"],
            "and depth is fixed (user asked (exclude depth))",
        ),
        (
            ["--agent", "polynomial", "--exclude", "[!dr]*"],
            "--agent: polynomial weighs depth, width and image size, and no",
        ),
        (
            ["--agent", "polynomial", "--dimensions.degree", "3"],
            "--dimensions.degree: degree 3 needs 4 or more different",
        ),
        (
            ["--agent", "polynomial", "--dimensions.degree", "4"],
            "--dimensions.degree: must be from 1 to 3, got 4",
        ),
        (
            ["--agent", "polynomial", "--budget", "macs=0.1%"],
            "--budget: macs=0.1% is below the reachable floor",
        ),
        (["--budget", "macs=0.1%"], "--budget: macs=0.1% is below the reachable floor"),
        (
            ["--removal.method", "gradual"],
            "--removal.method: gradual is not for granularity dimensions; use slice",
        ),
    ],
)
def test_what_can_not_be_is_refused_before_anything_is_written(
    arguments, message, tmp_path, capsys
):
    assert main(["run", *FAST, *arguments, "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_other_networks_are_told_what_they_lack(tmp_path, capsys):
    tiny = [
        "--model",
        "tests.tiny:network",
        "--agent",
        "polynomial",
        "--out",
        str(tmp_path / "run"),
    ]
    assert main(["search", *FAST, *tiny]) == 2
    assert (
        "and depth is fixed (the network has no block that can be removed)"
        in capsys.readouterr().err
    )


def test_a_search_decides_one_dimension_alone_if_the_others_are_excluded():
    space = context(exclude="depth,[!r]*", budget="macs=50%")
    assert list(space.groups.channels) == [RESOLUTION]
    method = Dimensions()
    assert method.is_searched(space.settings)
    assert method.check(space) is None
    with pytest.raises(UserError, match="below the reachable floor"):
        method.check(context(exclude="depth,[!r]*", budget="macs=5%"))


def test_the_network_is_left_as_found():
    model = build("residual")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = Scaling(
        model,
        trace(model, images(1, 8)),
        images(1, 8),
        Images(PIXELS[..., :8, :8], DATA.labels),
    )
    found.network({RESOLUTION: 4})
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()
    )
    assert not model._forward_pre_hooks
