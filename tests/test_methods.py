"""Every method of the field runs from the command line, keeps its budget, and only sets
defaults.
"""

import json
from pathlib import Path

import pytest
import torch
import yaml
from kills import interrupted_finetune
from torch.utils.flop_counter import FlopCounterMode

from autoprune.cli.main import main
from autoprune.cli.presets import METHODS, methods_table
from autoprune.config import Settings
from autoprune.costs.allocation import Allocation
from autoprune.deploy.pruned import load_pruned
from autoprune.pipeline import stages
from autoprune.pipeline.context import RunContext
from autoprune.pipeline.methods import trained
from autoprune.pipeline.methods.channels import ChannelDecision
from autoprune.pipeline.methods.registry import TRAINED_PRUNERS
from autoprune.training.masks import Masks

TINY = [
    "--model",
    "tests.tiny:network",
    "--weights",
    "none",
    "--data",
    "digits",
    "--baselines",
    "none",
    "--proxy.images",
    "40",
]
FAST = [*TINY, "--episodes", "6", "--epochs", "1", "--sparse.epochs", "1"]


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize(
    "name", [name for name in METHODS if name != "layer"]
)  # this network has no blocks
def test_every_method_searches_within_the_budget_and_says_who_it_is(name, tmp_path):
    network = ["--model", "tests.tiny:residual"] if name == "three_dimensions" else []
    command = ["search", *FAST, *network, "--method", name, "--budget", "macs=75%"]
    assert main([*command, "--out", str(tmp_path / "run")]) == 0
    results = results_of(tmp_path / "run")
    assert results["macs"] <= 0.75 * results["macs_dense"]
    assert results["method"] == name
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    flat = (
        config["network"]
        | config["search"]
        | {f"proxy.{k}": v for k, v in config["proxy"].items()}
    )
    flat |= {
        f"{stage}.{k}": v
        for stage in ("sparse", "removal")
        for k, v in config[stage].items()
    }
    given = {"budget", "epochs"}
    options = {
        option: value
        for option, value in METHODS[name].defaults.items()
        if option not in given
    }
    assert {option: flat[option] for option in options} == options


def test_what_is_given_beside_a_method_counts(tmp_path):
    given = [
        "--method",
        "slimming",
        "--criterion",
        "l1",
        "--agent",
        "uniform",
        "--sparse.strength",
        "0.01",
    ]
    assert main(["search", *FAST, *given, "--out", str(tmp_path / "run")]) == 0
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (config["search"]["criterion"], config["search"]["agent"]) == (
        "l1",
        "uniform",
    )
    assert (config["sparse"]["method"], config["sparse"]["strength"]) == (
        "slimming",
        0.01,
    )


def test_methods_are_listed_with_kind_granularity_and_paper(capsys):
    assert main(["methods", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out.splitlines()[-1])["methods"]
    assert listed == methods_table()
    assert {row["name"] for row in listed} == METHODS.keys()
    assert all(row["kind"] and row["granularity"] and row["paper"] for row in listed)


def test_an_unknown_method_is_refused_with_the_nearest(capsys):
    assert main(["run", "--method", "slimmer"]) == 2
    assert (
        "--method: unknown method 'slimmer'; did you mean 'slimming'? Known: l1, l2"
        in capsys.readouterr().err
    )


def test_sparse_training_is_what_the_search_and_the_pruned_network_start_from(tmp_path):
    run = tmp_path / "run"
    assert (
        main(
            [
                "run",
                *FAST,
                "--method",
                "slimming",
                "--sparse.strength",
                "0.3",
                "--epochs",
                "0",
                "--out",
                str(run),
            ]
        )
        == 0
    )
    sparse, pruned = load_pruned(run / "sparse"), load_pruned(run / "pruned")
    name, weight = next(
        (name, p) for name, p in pruned.named_parameters() if p.ndim == 4
    )
    kept = json.loads((run / "pruned" / "plan.json").read_text())["kept"]
    assert torch.equal(
        weight, sparse.get_parameter(name)[kept[name.removesuffix(".weight")]]
    )
    results = results_of(run)
    assert results["sparse_method"] == "slimming"
    assert results["sparse_strength"] == 0.3
    assert results["seconds"]["sparse"] > 0


def test_a_run_killed_in_its_sparse_training_ends_as_if_it_had_not_been(
    tmp_path, monkeypatch
):
    search = ["search", *FAST, "--method", "slimming", "--sparse.epochs", "3", "--out"]
    assert main([*search, str(tmp_path / "whole")]) == 0

    with monkeypatch.context() as patched:
        patched.setattr(stages, "finetune", interrupted_finetune)
        assert main([*search, str(tmp_path / "killed")]) == 130
    assert main([*search, str(tmp_path / "killed"), "--resume"]) == 0
    whole, again = (
        load_pruned(tmp_path / name / "sparse").state_dict()
        for name in ("whole", "killed")
    )
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    first, second = (
        (tmp_path / name / "allocation.json").read_text()
        for name in ("whole", "killed")
    )
    assert first == second


def test_a_run_without_its_sparse_network_says_how_to_go_on(tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["search", *FAST, "--method", "slimming", "--out", str(run)]) == 0
    (run / "sparse" / "plan.json").unlink()
    assert main(["prune", str(run)]) == 2
    assert (
        f"RUN: {str(run)!r} has no sparse/plan.json yet; go on with: autoprune run "
        f"--resume" in capsys.readouterr().err
    )


@pytest.mark.parametrize("granularity", ["weight", "filter", "2:4"])
def test_masks_last_through_fine_tuning_saving_and_loading_and_their_costs_are_true(
    granularity, tmp_path
):
    run = tmp_path / "run"
    masked = ["--granularity", granularity, "--agent", "global", "--budget", "macs=75%"]
    assert main(["search", *FAST, *masked, "--out", str(run)]) == 0
    assert main(["prune", str(run)]) == 0
    assert main(["finetune", str(run)]) == 0
    assert main(["evaluate", str(run)]) == 0
    results, network = results_of(run), load_pruned(run / "pruned")
    masks = Masks.load(run / "masks.safetensors", network)
    assert all(
        (network.get_parameter(name)[~kept] == 0).all()
        for name, kept in masks.kept.items()
    )
    zeros = sum(int((~kept).sum()) for kept in masks.kept.values())
    assert (
        results["params"] == results["params_dense"] - zeros < results["params_dense"]
    )
    assert results["macs"] <= 0.75 * results["macs_dense"]
    assert "accuracy" in results
    assert results["seconds_search"] == results["seconds"]["search"]
    layers = {row["name"]: (row["channels"], row["kept"]) for row in results["groups"]}
    weights = {name: p for name, p in network.named_parameters() if p.ndim > 1}
    assert layers == {
        n.removesuffix(".weight"): (p.numel(), int(p.count_nonzero()))
        for n, p in weights.items()
    }
    page = (run / "report.html").read_text()
    assert "ranked, not searched" in page
    assert "Weights of each layer" in page
    assert "Against the baselines" not in page


def test_removed_blocks_stay_gone_through_fine_tuning_saving_and_loading_with_true_costs(
    tmp_path,
):
    run = tmp_path / "run"
    depth = [
        "--method",
        "layer",
        "--budget",
        "macs=75%",
        "--data",
        "sample",
        "--model",
        "resnet20",
    ]
    assert main(["search", *depth, "--out", str(run)]) == 0
    assert main(["prune", str(run)]) == 0
    removed = json.loads((run / "blocks.json").read_text())["removed"]
    results, network = results_of(run), load_pruned(run / "pruned")
    assert removed
    assert all(
        isinstance(network.get_submodule(name), torch.nn.Identity) for name in removed
    )
    assert results["params"] == sum(p.numel() for p in network.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, 32, 32))
    assert (
        results["macs"]
        == counter.get_total_flops() // 2
        <= 0.75 * results["macs_dense"]
    )
    assert main(["report", str(run)]) == 0
    assert "MACs of each residual block" in (run / "report.html").read_text()


@pytest.mark.parametrize("method", TRAINED_PRUNERS)
def test_what_leaves_by_training_ends_within_the_budget_with_true_costs_whether_killed_or_not(
    method, tmp_path, monkeypatch
):
    options = [
        "--removal.method",
        method,
        "--removal.epochs",
        "3",
        "--agent",
        "uniform",
        "--budget",
        "macs=60%",
    ]
    for name in ("whole", "killed"):
        assert main(["search", *FAST, *options, "--out", str(tmp_path / name)]) == 0
    assert main(["prune", str(tmp_path / "whole")]) == 0

    with monkeypatch.context() as patched:
        patched.setattr(trained, "finetune", interrupted_finetune)
        assert main(["prune", str(tmp_path / "killed")]) == 130
    assert main(["prune", str(tmp_path / "killed")]) == 0
    whole, again = (
        load_pruned(tmp_path / name / "pruned") for name in ("whole", "killed")
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.parameters(), again.parameters(), strict=True)
    )
    results = results_of(tmp_path / "whole")
    assert results["macs"] <= 0.6 * results["macs_dense"]
    assert results["params"] == sum(p.numel() for p in whole.parameters())
    allocation = json.loads((tmp_path / "whole" / "allocation.json").read_text())
    assert allocation["kept"] == {
        group["name"]: group["kept"] for group in results["groups"]
    }
    assert (allocation["source"] == "resrep") == (method == "resrep")


def test_groups_that_can_have_no_compactors_are_narrow_before_the_training_that_makes_up_for_it():
    space = RunContext(Settings())
    allocation = Allocation(
        {n: c // 2 for n, c in space.groups.channels.items()}, space.groups.fingerprint
    )
    pruner = TRAINED_PRUNERS["compactors"].make()
    training = pruner.prepare(space, ChannelDecision(allocation))
    stream, inner = training.model.conv1, training.model.layer1[0].conv1
    assert (stream.out_channels, inner.out_channels) == (allocation.kept["conv1"], 16)
    training.callback.select(training.model, 1.0)
    network, decision = training.finish(training.model)
    assert decision == ChannelDecision(allocation)
    assert sum(p.numel() for p in network.parameters()) == space.costs.params(
        allocation.kept
    )


def test_masks_that_grow_meet_the_budget_and_last_whether_killed_or_not(
    tmp_path, monkeypatch
):
    options = ["--method", "agp", "--removal.epochs", "3", "--budget", "params=20%"]
    for name in ("whole", "killed"):
        assert main(["search", *FAST, *options, "--out", str(tmp_path / name)]) == 0
    at_once = (tmp_path / "whole" / "masks.safetensors").read_bytes()
    assert main(["prune", str(tmp_path / "whole")]) == 0

    with monkeypatch.context() as patched:
        patched.setattr(trained, "finetune", interrupted_finetune)
        assert main(["prune", str(tmp_path / "killed")]) == 130
    assert main(["prune", str(tmp_path / "killed")]) == 0
    files = [
        (tmp_path / name / "masks.safetensors").read_bytes()
        for name in ("whole", "killed")
    ]
    assert files[0] == files[1] != at_once
    assert main(["finetune", str(tmp_path / "whole"), "--epochs", "1"]) == 0
    results, network = (
        results_of(tmp_path / "whole"),
        load_pruned(tmp_path / "whole" / "pruned"),
    )
    assert results["params"] == sum(
        int(p.count_nonzero()) for p in network.parameters()
    )
    assert results["params"] <= 0.2 * results["params_dense"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--removal.method", "resrap"],
            "--removal.method: unknown method 'resrap'; did you mean 'resrep'?",
        ),
        (
            ["--method", "kernel", "--removal.method", "resrep"],
            "--removal.method: resrep is not for granularity kernel; use slice",
        ),
        (
            ["--method", "resrep", "--budget", "macs=40%..60%"],
            "--budget: resrep trains for one budget, got macs=40%..60%",
        ),
        (
            ["--method", "centripetal", "--removal.clusters", "odd"],
            "--removal.clusters: must be kmeans or even, got 'odd'",
        ),
        (
            ["--method", "centripetal", "--removal.lr", "-1"],
            "--removal.lr: must be at least 0, got -1",
        ),
        (
            ["--method", "2:4", "--removal.method", "gradual"],
            "gradual is not for granularity 2:4; use slice",
        ),
        (
            ["--method", "agp", "--removal.prunings", "0"],
            "--removal.prunings: must be at least 1, got 0",
        ),
        (
            ["--method", "agp", "--removal.schedule", "square"],
            "--removal.schedule: must be cubic or linear, got 'square'",
        ),
    ],
)
def test_a_removal_that_can_not_be_is_refused_before_anything_is_written(
    arguments, message, tmp_path, capsys
):
    assert main(["run", *TINY, *arguments, "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--granularity", "2:4"],
            "--agent: masks of granularity 2:4 go by global or uniform, got 'dyna'",
        ),
        (
            ["--method", "2:4", "--criterion", "lamp"],
            "--criterion: masks of granularity 2:4 go by l1, got 'lamp'",
        ),
        (
            ["--granularity", "wait"],
            "--granularity: unknown granularity 'wait'; did you mean 'weight'?",
        ),
        (
            ["--granularity", "weight"],
            "--agent: masks of granularity weight go by global or uniform, got 'dyna'",
        ),
        (
            ["--method", "kernel", "--criterion", "taylor"],
            "--criterion: masks of granularity kernel go by l1 or l2 or",
        ),
        (
            ["--method", "kernel", "--budget", "macs=30%..50%"],
            "kernel takes one budget, got macs=30%..50%",
        ),
        (
            ["--method", "2:4", "--budget", "macs=30%"],
            "--budget: 2:4 leaves macs=70.0%; allow that, not macs=30%",
        ),
        (
            ["--method", "layer"],
            "--budget: macs=50% is below the reachable floor; without its 0 removable "
            "blocks",
        ),
        (
            ["--method", "layer", "--budget", "params=50%"],
            "--budget: granularity layer counts macs, one at a time, got params=50%; "
            "use e.g. macs=50%, or granularity channel",
        ),
        (
            ["--method", "weight_magnitude", "--budget", "memory=50%"],
            "--budget: granularity weight counts macs or params, one at a time, got "
            "memory=50%",
        ),
        (
            ["--method", "2:4", "--budget", "macs=60%,params=60%"],
            "--budget: granularity 2:4 counts macs or params, one at a time, got "
            "macs=60%,params=60%",
        ),
        (
            ["--granularity", "layer"],
            "--agent: blocks of granularity layer go by global, got 'dyna'",
        ),
        (
            ["--method", "weight_magnitude", "--budget", "params=1%"],
            "masks of this granularity leave at least params=",
        ),
    ],
)
def test_masks_that_can_not_be_are_refused_before_anything_is_written(
    arguments, message, tmp_path, capsys
):
    assert main(["run", *TINY, *arguments, "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        (
            "--sparse.method",
            "slim",
            "--sparse.method: unknown method 'slim'; did you mean 'slimming'",
        ),
        ("--sparse.strength", "-1", "--sparse.strength: must be at least 0, got -1"),
        ("--sparse.share", "0", "--sparse.share: must be above 0 and at most 1, got 0"),
        ("--finetune.lr", "-1", "--finetune.lr: must be at least 0, got -1"),
        (
            "--proxy.loss",
            "hinge",
            "--proxy.loss: must be cross_entropy or kl, got 'hinge'",
        ),
    ],
)
def test_options_out_of_range_are_named_as_they_were_given(
    option, value, message, tmp_path, capsys
):
    assert main(["run", *TINY, option, value, "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
