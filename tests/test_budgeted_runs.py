"""Budgets of bytes, and several at once, through a whole run: its results, its file, its
table and its page.
"""

import json

import pytest
from test_cli import TINY, failure

from autoprune.cli.main import main
from autoprune.costs.allocation import Allocation
from autoprune.costs.cost import CostTable
from autoprune.files import WEIGHTS
from autoprune.pipeline.budgeted import allocation_reached
from autoprune.pipeline.context import RunContext
from autoprune.reporting.budgets import budget_lines
from autoprune.reporting.console import print_results
from autoprune.reporting.report import write_report
from autoprune.reporting.wording import amount_text
from autoprune.runs import RunFolder

FAST = [
    *TINY,
    "--agent",
    "uniform",
    "--baselines",
    "none",
    "--episodes",
    "1",
    "--proxy.images",
    "40",
    "--proxy.workers",
    "1",
]


@pytest.fixture(scope="module")
def searched(tmp_path_factory) -> RunFolder:
    """A run whose network is pruned, not fine-tuned."""
    place = tmp_path_factory.mktemp("runs") / "several"
    budget = "macs=70%,memory=80%,size=60%"
    assert main(["search", *FAST, "--budget", budget, "--out", str(place)]) == 0
    assert main(["prune", str(place)]) == 0
    return RunFolder(place)


def test_results_hold_the_target_and_the_cost_of_every_budget(searched):
    results = searched.read_results()
    assert results.budget == "macs=70%,memory=80%,size=60%"
    assert list(results.budgets) == ["macs", "memory", "size"]
    for metric, share in {"macs": 0.7, "memory": 0.8, "size": 0.6}.items():
        told = results.budgets[metric]
        assert told["cost"] <= told["target"] <= share * told["dense"]
    assert results.budgets["macs"]["cost"] == results.macs
    assert results.budgets["memory"]["dense"] == results.memory_bytes_dense
    assert results.budgets["size"]["cost"] == results.size_bytes
    # The file that was really written is within the budget of its size.
    written = (searched.pruned / WEIGHTS).stat().st_size
    assert written <= results.size_bytes <= results.budgets["size"]["target"]
    assert written > 0.9 * results.size_bytes


def test_costs_of_the_run_are_those_of_its_allocation_alone(searched):
    context = RunContext.of_run(searched)
    kept = Allocation.read(searched.allocation, context.groups).kept
    costs = CostTable(context.groups)
    results = searched.read_results()
    assert results.size_bytes == costs.size(kept)
    assert results.memory_bytes == costs.memory(kept)
    assert results.params == costs.params(kept)


def test_table_and_page_tell_every_budget_in_readable_units(searched, capsys):
    write_report(searched)
    page = searched.report.read_text()
    print_results(searched.read_results().to_json())
    printed = " ".join(capsys.readouterr().out.split())
    for metric, told in searched.read_results().budgets.items():
        for amount in (told["target"], told["cost"]):
            text = amount_text(metric, amount)
            assert text in page
            assert text.replace("\N{NO-BREAK SPACE}", " ") in printed
    assert "of the memory and" in page
    assert "of the size of the file" in page


def test_an_allocation_that_says_no_budget_has_none(searched):
    costs = CostTable(RunContext.of_run(searched).groups)
    for text in ("", "by hand", "macs=30%..80%"):
        assert allocation_reached(text, costs, {}) is None
    told = allocation_reached("size=1MB,latency=8ms", costs, {})
    dense = costs.size({})
    assert told == {"size": {"target": 10**6, "cost": dense, "dense": dense}}


def test_a_range_of_memory_is_searched_as_a_whole(tmp_path, capsys):
    place = tmp_path / "range"
    arguments = ["search", *FAST, "--budget", "memory=60%..90%", "--out", str(place)]
    assert main(arguments) == 0
    folder = RunFolder(place)
    front = json.loads(folder.pareto.read_text())
    assert front["metric"] == "memory"
    assert front["dense"] == folder.read_results().memory_bytes_dense
    for point in front["uniform"]:
        share = float(point["budget"].removeprefix("memory=").removesuffix("%")) / 100
        assert point["cost"] <= share * front["dense"]
    assert "memory kept" in capsys.readouterr().out
    page = write_report(folder).read_text()
    assert "of the memory; uniform pruning" in page
    assert amount_text("memory", front["uniform"][0]["cost"]) in page


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("macs=0.1%,size=1KB", "below the reachable floor; with"),
        ("size=1KB", "needs size="),
        ("memory=1B", "needs memory="),
    ],
)
def test_what_no_allocation_meets_is_refused_and_leaves_nothing(
    budget, message, tmp_path, capsys
):
    place = tmp_path / "run"
    assert message in failure(
        capsys, "run", *FAST, "--budget", budget, "--out", str(place)
    )
    assert not place.exists()


@pytest.mark.parametrize(
    ("metric", "amount", "text"),
    [
        ("macs", 20_300_000, "20,300,000"),
        ("size", 5_000_000, "5\N{NO-BREAK SPACE}MB"),
        ("memory", 1_234_567, "1.235\N{NO-BREAK SPACE}MB"),
        ("memory", 12, "12\N{NO-BREAK SPACE}bytes"),
        ("latency", 7_950_000, "7.95\N{NO-BREAK SPACE}ms"),
        ("latency", 950, "950\N{NO-BREAK SPACE}ns"),
    ],
)
def test_amounts_read_well(metric, amount, text):
    assert amount_text(metric, amount) == text


def test_latency_is_told_as_predicted_and_as_measured():
    kept = {
        "budget": "latency=60%",
        "budget_ms": 6.0,
        "predicted_ms": 5.8,
        "predicted_share": 0.58,
        "measured_ms": 6.3,
        "measured_share": 0.595,
        "dense_ms": 10.6,
    }
    budgets = {"latency": {"target": 5_900_000, "cost": 5_800_000, "dense": 10**7}}
    predicted, measured = budget_lines(budgets, kept)
    assert predicted.name == "Latency, predicted"
    assert predicted.target == "6\N{NO-BREAK SPACE}ms"
    assert predicted.share_left == pytest.approx(0.58)
    assert measured.target == "6.36\N{NO-BREAK SPACE}ms"
    assert measured.reached == "6.3\N{NO-BREAK SPACE}ms"
    assert measured.share_of_budget == pytest.approx(6.3 / 6.36)
    (alone,) = budget_lines(budgets, None)
    assert (alone.name, alone.target) == ("Latency", "5.9\N{NO-BREAK SPACE}ms")
