"""Runs under a budget of time, on an engine that has no clock."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from fake_engine import FakeEngine, FakeLoaded
from torch import nn

from autoprune.cli.kept_promise import LARGEST_EXCESS
from autoprune.cli.main import main
from autoprune.latency import engines, profiling
from autoprune.latency.engine_protocol import Setting
from autoprune.latency.profiling import N_FITTED, N_UNSEEN
from autoprune.structure.inputs import Example

OPTIONS = (
    "--model tests.tiny:network --weights none --data digits --agent random "
    "--episodes 6 --baselines none --max_train_images 128 --max_test_images 50 "
    "--proxy.images 40 --round_to 2 --latency.threads 1"
)


@pytest.fixture(autouse=True)
def engine(monkeypatch, tmp_path):
    """What stands in for ONNX Runtime; models that it was fitted to aren't kept."""
    fake = FakeEngine(width=4)
    monkeypatch.setitem(engines.ENGINES, "onnxruntime", fake)
    monkeypatch.setenv("AUTOPRUNE_CACHE", str(tmp_path / "cache"))
    return fake


def search(out: Path, budget: str) -> dict:
    code = main(["search", *OPTIONS.split(), "--budget", budget, "--out", str(out)])
    assert code == 0
    return json.loads((out / "results.json").read_text())


def test_what_a_search_chose_is_measured_within_the_budget(tmp_path):
    results = search(tmp_path / "run", "latency=70%")
    kept = results["latency_kept"]
    assert kept["budget"] == "latency=70%"
    assert kept["measured_share"] <= 0.7 * LARGEST_EXCESS
    assert kept["measured_ms"] < kept["dense_ms"]
    setting = {name: kept[name] for name in ("engine", "batch", "threads", "precision")}
    assert setting == {
        "engine": "onnxruntime",
        "batch": 1,
        "threads": 1,
        "precision": "float32",
    }
    assert results["latency_model"]["networks"] == N_FITTED + N_UNSEEN
    page = (tmp_path / "run" / "report.html").read_text()
    for told in (
        "onnxruntime, batch 1, 1 thread, float32",
        "Latency, predicted",
        "Latency, measured",
        f"{100 * kept['measured_share']:.1f}\N{NO-BREAK SPACE}% of the latency",
    ):
        assert told in page


@dataclass
class Deceiving(FakeEngine):
    """Pruned networks take longer than they did while the model was fitted."""

    n_true: int = 1 + N_FITTED + N_UNSEEN

    def load(
        self, model: nn.Module, example: Example, setting: Setting
    ) -> "FakeLoaded":
        loaded = super().load(model, example, setting)
        if len(self.loads) == 1:
            self.dense_seconds = loaded.exact_seconds
        is_pruned = loaded.exact_seconds < self.dense_seconds
        if is_pruned and len(self.loads) > self.n_true:
            return Slower(loaded.engine, loaded.layers)
        return loaded


class Slower(FakeLoaded):
    @property
    def exact_seconds(self) -> float:
        return 1.15 * super().exact_seconds


def test_a_network_that_is_slower_than_predicted_is_replaced_by_a_smaller_one(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(engines.ENGINES, "onnxruntime", Deceiving(width=4))
    results = search(tmp_path / "run", "latency=70%")
    kept = results["latency_kept"]
    assert kept["corrections"] >= 1
    assert kept["measured_share"] <= 0.7 * LARGEST_EXCESS
    assert kept["measured_share"] > kept["predicted_share"]
    allocation = json.loads((tmp_path / "run" / "allocation.json").read_text())
    assert allocation["source"].endswith("resized")
    # What was chosen is what was measured.
    assert results["finalists"][0]["source"] == allocation["source"]


def test_several_budgets_are_kept_together(tmp_path):
    results = search(tmp_path / "run", "macs=60%,latency=80%,size=70%")
    assert results["latency_kept"]["budget"] == "latency=80%"
    assert results["latency_kept"]["measured_share"] <= 0.8 * LARGEST_EXCESS
    assert results["macs"] <= 0.6 * results["macs_dense"]
    assert results["size_bytes"] <= 0.7 * results["size_bytes_dense"]


def test_of_a_range_the_point_that_the_run_goes_on_with_is_measured(tmp_path):
    results = search(tmp_path / "run", "latency=60%..90%")
    kept = results["latency_kept"]
    allocation = json.loads((tmp_path / "run" / "allocation.json").read_text())
    assert kept["budget"] == allocation["budget"]
    share = float(kept["budget"].removeprefix("latency=").removesuffix("%")) / 100
    assert 0.6 <= share <= 0.9
    assert kept["measured_share"] <= share * LARGEST_EXCESS


def test_a_run_that_goes_on_keeps_the_model_that_it_began_with(tmp_path, engine):
    run = tmp_path / "run"
    search(run, "latency=70%")
    model = (run / "latency_model.json").read_bytes()
    (run / "allocation.json").unlink()
    shutil.rmtree(tmp_path / "cache")
    n_loads = len(engine.loads)
    assert main(["search", "--resume", "--out", str(run)]) == 0
    assert (run / "latency_model.json").read_bytes() == model
    # The dense network and what was chosen, and no network to fit a model to.
    assert len(engine.loads) - n_loads <= 4


@pytest.mark.parametrize("damage", ["factors", "setting", "error"])
def test_a_damaged_model_of_a_run_is_refused_in_one_line(tmp_path, capsys, damage):
    search(tmp_path / "run", "latency=70%")
    path = tmp_path / "run" / "latency_model.json"
    stored = json.loads(path.read_text())
    stored[damage] = [1.0] if damage == "factors" else {}
    path.write_text(json.dumps(stored))
    # As if the search had been interrupted.
    (tmp_path / "run" / "allocation.json").unlink()
    capsys.readouterr()
    code = main(["search", "--resume", "--out", str(tmp_path / "run")])
    message = capsys.readouterr().err
    assert code == 2
    assert "latency_model.json' is damaged" in message
    assert message.count("\n") == 1


def test_a_second_run_of_the_same_network_measures_no_model(tmp_path, engine):
    search(tmp_path / "first", "latency=70%")
    n_loads = len(engine.loads)
    search(tmp_path / "second", "latency=60%")
    assert len(engine.loads) - n_loads < N_FITTED
    models = [
        json.loads((tmp_path / name / "latency_model.json").read_text())
        for name in ("first", "second")
    ]
    assert models[0] == models[1]


@pytest.mark.parametrize(
    ("options", "fault", "message"),
    [
        ("--budget latency=1%", {}, "below the reachable floor"),
        ("--budget latency=60%", {"refuses": "no such operator"}, "no such operator"),
        ("--budget latency=60%", {"error": 0.5}, "answers otherwise than PyTorch"),
        ("--budget latency=60%", {"noise": 0.4}, "two timings of the same network"),
    ],
)
def test_what_can_not_be_budgeted_is_refused_in_one_line(
    options, fault, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(engines.ENGINES, "onnxruntime", FakeEngine(width=4, **fault))
    # Medians of many passes would tell something even then.
    monkeypatch.setattr(profiling, "ROUNDS", 1)
    out = tmp_path / "run"
    code = main(["search", *OPTIONS.split(), *options.split(), "--out", str(out)])
    assert code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1]
    assert not out.exists()


def test_time_shows_in_what_the_agent_observes(tmp_path):
    from autoprune.cli.search_stage import make_env
    from autoprune.pipeline.context import RunContext
    from autoprune.runs import RunFolder

    search(tmp_path / "run", "latency=70%")
    env = make_env(RunContext.of_run(RunFolder(tmp_path / "run")))
    shares = env.observer.static["latency_share"]
    assert (shares > 0).all()
    assert torch.tensor(shares).std() > 0
