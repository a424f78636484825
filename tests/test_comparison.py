"""Finished runs beside each other: the same numbers in the table, the JSON and the
page, and a refusal by name of what can't be compared.
"""

import json

import pytest
import yaml
from test_cli import failure

from autoprune.cli.main import main
from autoprune.config import FinetuneConfig, SearchConfig, Settings
from autoprune.runs import RunFolder

DONE = {
    "model": "net",
    "data": "digits",
    "budget": "macs=50%",
    "agent": "dyna",
    "macs": 500,
    "macs_dense": 1000,
    "params": 60,
    "params_dense": 80,
    "accuracy_dense": 0.92,
    "accuracy_pruned": 0.7,
    "accuracy": 0.905,
    "finetune_epochs": 3,
    "latency_setting": {
        "engine": "torch",
        "batch": 8,
        "threads": 1,
        "precision": "float32",
    },
    "latency_ms": 1.0,
    "latency_ms_dense": 4.0,
}

USUAL = Settings()


@pytest.fixture
def write_run(tmp_path, monkeypatch):
    """Writes a run's config and results, as much as a comparison reads."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, settings: Settings = USUAL, **results) -> str:
        folder = RunFolder(tmp_path / name)
        folder.root.mkdir(parents=True)
        config = settings.to_dict() | {"options": {}}
        folder.config.write_text(yaml.safe_dump(config))
        folder.add_results(**(DONE | results))
        return name

    return write


@pytest.fixture
def runs(write_run):
    other = Settings(
        search=SearchConfig("macs=40%", agent="random"),
        finetune=FinetuneConfig(epochs=0),
    )
    return [
        write_run("runs/first"),
        write_run(
            "runs/second",
            other,
            agent="random",
            budget="macs=40%",
            macs=400,
            accuracy=0.7,
            finetune_epochs=0,
        ),
    ]


def test_runs_are_compared_by_the_same_numbers_in_table_json_and_page(
    runs, tmp_path, capsys
):
    assert main(["compare", *runs, "--json"]) == 0
    printed = capsys.readouterr().out
    summary = json.loads(printed.splitlines()[-1])
    first, second = summary["runs"]
    assert first["macs_ratio"] == 0.5
    assert first["params_ratio"] == 0.75
    assert first["latency_ratio"] == 0.25
    assert first["latency_setting"]["batch"] == 8
    assert second["macs_ratio"] == 0.4
    assert summary["differences"] == {
        "budget": ["macs=50%", "macs=40%"],
        "agent": ["dyna", "random"],
        "epochs": [None, 0],
    }
    assert summary["page"] == "runs/comparison.html"
    page = (tmp_path / "runs" / "comparison.html").read_text()
    for shown in (
        "runs/first",
        "90.50\u00a0%",
        "50.0\u00a0%",
        "\u22121.50",
        "3 epochs",
        "torch, batch 8",
    ):
        assert shown in printed
        assert shown in page
    # What wasn't fine-tuned isn't called so.
    assert "<td>no</td>" in page
    assert "budget: macs=50%, macs=40%" in printed
    assert '<th scope="row">epochs</th>' in page
    assert page.count("<svg") == 1
    assert "http" not in page.replace("http://www.w3.org", ""), "it has to work offline"


def test_a_page_goes_where_it_is_asked_to(runs, tmp_path):
    assert main(["compare", *runs, "--out", "pages/mine.html"]) == 0
    assert (tmp_path / "pages" / "mine.html").is_file()
    assert not (tmp_path / "runs" / "comparison.html").exists()


def test_what_is_no_finished_run_is_refused_by_name(runs, write_run, tmp_path, capsys):
    searched = write_run("runs/searched", accuracy=None)
    (tmp_path / "photos").mkdir()
    for wrong, reason in (
        ("runs/nothing", "no folder 'runs/nothing'"),
        ("photos", "'photos' is not a run folder"),
        (searched, f"{searched!r} is not finished; go on with: autoprune run --resume"),
        (runs[0] + "/", "'runs/first' is given twice"),
    ):
        assert reason in failure(capsys, "compare", *runs, wrong)
    assert "two or more are compared" in failure(capsys, "compare", runs[0])
    assert not (tmp_path / "runs" / "comparison.html").exists()


def test_runs_whose_budgets_all_count_parameters_are_drawn_by_them(write_run, tmp_path):
    names = [write_run(name, budget="params=75%") for name in ("a", "b")]
    assert main(["compare", *names, "--out", "page.html"]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "share of parameters left" in page
    # Dots on one spot share a label.
    assert ">1, 2<" in page
