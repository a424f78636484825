"""The command line as people use it: a whole run, its parts, kills at any moment, and
every kind of bad input.
"""

import contextlib
import dataclasses
import errno
import functools
import io
import json
import os
import random
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from fake_engine import FakeEngine
from PIL import Image
from processes import run_python, started_python, wait_for_events
from safetensors.torch import load_file, save_file
from tiny import network
from torch import nn

from autoprune.cli import stages as run_stages_home
from autoprune.cli.main import COMMANDS, build_parser, main
from autoprune.cli.opening import open_run
from autoprune.cli.options import settings_of
from autoprune.cli.parser import options_of
from autoprune.cli.stages import STAGES, Stage, run_stages
from autoprune.config import (
    DimensionsConfig,
    FinetuneConfig,
    NetworkConfig,
    OutputConfig,
    ProxyConfig,
    RemovalConfig,
    SearchConfig,
    Settings,
    SparseConfig,
)
from autoprune.data import models
from autoprune.data.datasets import Images
from autoprune.deploy.pruned import load_pruned
from autoprune.errors import ExportError
from autoprune.evaluation.evaluate import accuracy
from autoprune.latency import engines
from autoprune.latency.engine_protocol import Setting
from autoprune.latency.measuring import Latency
from autoprune.pipeline import stages
from autoprune.runs import RunFolder

TINY = ["--model", "tests.tiny:network", "--weights", "none", "--data", "digits"]
FAST = [
    *TINY,
    "--episodes",
    "8",
    "--epochs",
    "2",
    "--baselines",
    "uniform",
    "--proxy.images",
    "40",
]
ARTEFACTS = [
    "config.yaml",
    "allocation.json",
    "policy",
    "pruned",
    "model.onnx",
    "report.html",
    "log.jsonl",
    "results.json",
]


@pytest.fixture(scope="module", autouse=True)
def _few_passes():
    """Latencies from a few passes instead of seconds of them."""
    with pytest.MonkeyPatch.context() as patch:
        brief = functools.partial(stages.measure_latency, seconds=0.02)
        patch.setattr(stages, "measure_latency", brief)
        yield


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> tuple[Path, str]:
    """One whole run, and what it printed; tests only read it."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["run", *FAST, "--json", "--out", str(folder)]) == 0
    return folder, printed.getvalue()


@pytest.fixture(scope="module")
def finished(finished_run) -> Path:
    """One whole run; tests only read it."""
    return finished_run[0]


@pytest.fixture
def cheap_export(finished, monkeypatch):
    """Skips PyTorch's exporter, which takes longer than all else that a small run does."""

    def copy_onnx(model, example, path, metadata) -> float:
        shutil.copy(finished / "model.onnx", path)
        return 0.0

    monkeypatch.setattr(stages, "export_onnx", copy_onnx)


def failure(capsys, *arguments: str) -> str:
    """The one line that a bad command prints."""
    capsys.readouterr()
    try:
        code = main(list(arguments))
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert code == 2, captured.err
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err, captured.err
    return lines[0]


def test_a_run_writes_every_artefact_of_the_run_folder(finished):
    assert [name for name in ARTEFACTS if not (finished / name).exists()] == []
    assert not list(finished.rglob("*.partial*"))


def test_a_run_ends_within_its_budget_with_costs_that_hold_for_the_saved_network(
    finished,
):
    results = json.loads((finished / "results.json").read_text())
    network = load_pruned(finished / "pruned")
    assert results["macs"] <= 0.5 * results["macs_dense"]
    assert results["params"] == sum(p.numel() for p in network.parameters())


def test_the_exported_onnx_computes_what_the_saved_network_does(finished):
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    (logits,) = onnxruntime.InferenceSession(finished / "model.onnx").run(
        None, {"images": images.numpy()}
    )
    with torch.no_grad():
        expected = load_pruned(finished / "pruned")(images).numpy()
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()


def test_every_stage_of_a_finished_run_is_done_and_has_left_an_artefact(finished):
    job = open_run(str(finished))
    job.output = OutputConfig(baselines="none")
    results = json.loads((finished / "results.json").read_text())
    for stage in STAGES:
        assert stage.is_done(job), stage.name
        left = []
        for artefact in stage.artefacts:
            file, _, key = artefact.partition(": ")
            if (finished / file).exists() and (not key or key in results):
                left.append(artefact)
        # This run budgets no latency and trains nothing sparsely.
        assert left or stage.name in ("profile", "sparse")


@pytest.mark.parametrize("n_done", range(1, 7))
def test_a_run_goes_on_with_the_first_stage_that_is_not_done(n_done, monkeypatch):
    ran = []

    def stage(number: int) -> Stage:
        return Stage(
            str(number), (), lambda job: number < n_done, lambda job: ran.append(number)
        )

    monkeypatch.setattr(run_stages_home, "STAGES", [stage(n) for n in range(7)])
    run_stages(job=None)
    assert ran == list(range(n_done, 7))


def test_the_config_of_a_run_holds_settings_and_provenance(finished):
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["search"]["episodes"] == 8
    assert config["network"]["model"] == "tests.tiny:network"
    assert {"command", "versions", "hardware"} <= config.keys()


def test_json_prints_the_contracted_keys_as_the_last_line(finished_run):
    _, printed = finished_run
    results = json.loads(printed.splitlines()[-1])
    contract = {"run", "model", "budget", "macs", "macs_dense", "macs_ratio"}
    contract |= {"params", "params_dense", "accuracy_dense", "accuracy_pruned"}
    contract |= {"accuracy", "latency_ms", "latency_ms_dense", "episodes"}
    contract |= {"evaluations", "seconds_search", "seconds_total"}
    assert contract - results.keys() == set()


@pytest.fixture
def fake_engine(monkeypatch) -> FakeEngine:
    engine = FakeEngine()
    monkeypatch.setitem(engines.ENGINES, "fake", engine)
    return engine


def test_every_latency_of_a_run_says_what_it_was_measured_in(finished):
    results = RunFolder(finished).read_results()
    threads = torch.get_num_threads()
    places = [(row["engine"], row["batch"]) for row in results.latency]
    assert places == [(e, b) for e in ("onnxruntime", "torch") for b in (1, 32)]
    for row in results.latency:
        assert (row["threads"], row["precision"]) == (threads, "float32")
    first = results.latency[0]
    assert results.latency_setting.items() <= first.items()
    assert results.latency_ms == first["pruned_ms"]
    assert results.latency_ms_dense == first["dense_ms"]


def test_a_run_that_goes_on_is_measured_in_the_setting_that_it_is_asked_for(
    finished, tmp_path, fake_engine
):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    again = ["run", "--resume", "--out", str(run)]
    asked = ["--latency.engine", "fake", "--latency.batch", "3"]
    asked += ["--latency.threads", "1", "--latency.precision", "bfloat16"]
    assert main([*again, *asked]) == 0
    results = RunFolder(run).read_results()
    setting = Setting("fake", 3, 1, "bfloat16")
    assert results.latency_setting == dataclasses.asdict(setting)
    pruned = load_pruned(run / "pruned")
    example = open_run(str(run)).dense.splits.example
    exact = fake_engine.load(pruned, example, setting).exact_seconds
    assert results.latency_ms == pytest.approx(1000 * exact)
    assert results.latency_ms < results.latency_ms_dense
    assert "fake, batch 3, 1 thread, bfloat16" in (run / "report.html").read_text()
    # Nothing is asked for that isn't there now.
    loads = len(fake_engine.loads)
    assert main(again) == 0
    assert len(fake_engine.loads) == loads


def test_an_engine_that_answers_otherwise_is_told_of_after_all_else_is_done(
    finished, tmp_path, fake_engine, capsys
):
    fake_engine.error = 0.5
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    again = ["run", "--resume", "--out", str(run), "--latency.engine", "fake"]
    assert main(again) == 1
    reason = "fake answers otherwise than PyTorch"
    assert reason in capsys.readouterr().err.splitlines()[-1]
    results = RunFolder(run).read_results()
    (remark,) = [text for text in results.remarks if reason in text]
    assert remark.startswith("the latency is not measured in fake: ")
    assert results.latency_setting["engine"] == "onnxruntime"
    assert remark[1:] in (run / "report.html").read_text()


def test_a_run_of_a_version_with_another_option_for_the_batch_goes_on(
    finished, tmp_path
):
    run = RunFolder(tmp_path / "run")
    shutil.copytree(finished, run.root)
    config = run.read_config()
    del config["latency"]
    config["options"]["latency_batch"] = 64
    run.config.write_text(yaml.safe_dump(config))
    rows = [{"engine": "torch", "batch": 64, "threads": 2}]
    rows[0] |= {"dense_ms": 2.0, "pruned_ms": 1.0}
    run.add_results(latency=rows)
    run.forget("latency_setting")
    assert main(["run", "--resume", "--out", str(run.root)]) == 0
    assert run.read_results().latency == rows
    assert "torch, batch 64, 2 threads" in run.report.read_text()
    again = ["search", "--config", str(run.config), "--out", str(tmp_path / "again")]
    assert main([*again, "--agent", "uniform"]) == 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--latency.engine", "openvino"], "pip install openvino"),
        (["--latency.precision", "bfloat16"], "onnxruntime computes in float32"),
        (["--latency.threads", "9999"], "--latency.threads: must be from 1 to"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_a_run_begins(
    options, reason, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "openvino", None)
    out = tmp_path / "run"
    assert reason in failure(capsys, "run", *FAST, *options, "--out", str(out))
    assert not out.exists()


def test_a_quiet_command_prints_its_results_and_nothing_else(
    finished, tmp_path, capsys, monkeypatch
):

    def measure_slow(dense, pruned, example, settings):
        return [Latency(setting, 1.0, 1.5) for setting in settings]

    monkeypatch.setattr(stages, "measure_latency", measure_slow)
    shutil.copytree(finished, tmp_path / "run")
    RunFolder(tmp_path / "run").forget("latency")
    again = ["run", "--resume", "--out", str(tmp_path / "run"), "--json"]
    assert main([*again, "--quiet"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    remark = "the pruned network is not faster in torch, batch 1, "
    assert any(
        remark in line for line in json.loads(printed.out.splitlines()[-1])["remarks"]
    )
    # The page begins it with a capital letter.
    assert remark[1:] in (tmp_path / "run" / "report.html").read_text()
    assert main([*again, "-v"]) == 0
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if line.endswith(": done already")] == [
        f"{stage.name}: done already" for stage in STAGES
    ]
    assert "--quiet: goes with no --verbose" in failure(capsys, *again, "-q", "-v")


def test_trace_json_describes_groups_and_their_reasons(capsys):
    assert main(["trace", "--model", "resnet20", "--json"]) == 0
    description = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert description["macs"] == 40_551_040
    assert description["params"] == 269_722
    assert {"name", "channels", "prunable", "pinned", "members"} <= description[
        "groups"
    ][0].keys()
    assert 0 < description["prunable_macs_share"] <= 1
    pinned = {
        group["name"]: group["pinned"]
        for group in description["groups"]
        if not group["prunable"]
    }
    assert pinned["linear"] == "feeds the network's output"
    assert "zero padding" in pinned["layer2.0.conv2"]


def test_trace_excludes_by_pattern_at_any_image_size(capsys):
    trace = [
        "trace",
        "--model",
        "tests.tiny:network",
        "--image_size",
        "20",
        "--exclude",
        "0.0",
    ]
    assert main([*trace, "--json"]) == 0
    description = json.loads(capsys.readouterr().out.splitlines()[-1])
    groups = {group["name"]: group["pinned"] for group in description["groups"]}
    assert groups["0.0"] == "user asked (exclude 0.0)"
    assert groups["1.0"] is groups["2.0"] is None
    assert (
        description["macs"]
        == 9 * (20 * 20 * 3 * 8 + 10 * 10 * 8 * 12 + 5 * 5 * 12 * 16) + 16 * 10
    )
    assert "--image_size: must be at least 1, got 0" in failure(
        capsys, "trace", "--image_size", "0"
    )
    assert "--n_classes: must be at least 1, got -3" in failure(
        capsys, "trace", "--n_classes", "-3"
    )
    assert "called '9.0'; there are e.g." in failure(capsys, *trace[:-1], "9.0")


def test_replay_reproduces_the_policys_allocation_and_meets_another_budget(
    finished, tmp_path, capsys
):
    own = json.loads((finished / "policy" / "policy.json").read_text())["allocation"]
    assert main(["replay", str(finished), "--out", str(tmp_path / "same.json")]) == 0
    assert json.loads((tmp_path / "same.json").read_text())["kept"] == own
    assert (
        main(
            [
                "replay",
                str(finished),
                "--budget",
                "macs=70%",
                "--json",
                "--out",
                str(tmp_path / "other.json"),
            ]
        )
        == 0
    )
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0.6 < results["macs_ratio"] <= 0.7
    assert results["familiar"] == 1


def test_an_allocation_from_a_file_is_pruned_finetuned_evaluated_and_exported_without_a_search(
    finished, tmp_path, capsys
):
    folder = str(tmp_path / "by_hand")
    allocation = str(finished / "allocation.json")
    assert main(["prune", "--allocation", allocation, *TINY, "--out", folder]) == 0
    page = Path(folder) / "report.html"
    for command, shown in (
        (["finetune", folder, "--epochs", "1"], "Training loss over 1 epoch;"),
        (["evaluate", folder], "Fine-tuned"),
        (["export", folder], "The ONNX file computes"),
    ):
        assert shown not in page.read_text()
        assert main(command) == 0
        assert shown in page.read_text()
    written = page.read_bytes()
    assert main(["report", folder, "--json"]) == 0
    assert page.read_bytes() == written
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"file": str(page)}
    assert main(["export", folder, "--format", "torch", "--json"]) == 0
    assert Path(json.loads(capsys.readouterr().out.splitlines()[-1])["file"]).is_file()
    results = RunFolder(Path(folder)).read_results().to_json()
    assert results["macs_ratio"] <= 0.5
    assert "accuracy" in results
    assert (Path(folder) / "model.onnx").exists()
    assert (Path(folder) / "model.pt2").exists()
    line = failure_after_progress(
        capsys, "finetune", folder, "--epochs", "2", "--resume"
    )
    assert (
        "finetune.pt' is of a training of another length (epochs 1, asked for 2); ask "
        "for 1 again" in line
    )
    assert main(["finetune", folder, "--epochs", "2"]) == 0
    results = RunFolder(Path(folder)).read_results().to_json()
    assert "accuracy" not in results
    assert "onnx_max_relative_error" not in results
    assert "accuracy_pruned" in results
    assert not list(Path(folder).glob("model.*"))
    assert "Fine-tuned</" not in page.read_text()


def test_a_run_evaluated_again_measures_what_can_have_changed(
    finished, tmp_path, monkeypatch
):
    shutil.copytree(finished, tmp_path / "run")
    before, measured = json.loads((finished / "results.json").read_text()), []

    def counted(model: nn.Module, images: Images) -> float:
        measured.append(sum(p.numel() for p in model.parameters()))
        return accuracy(model, images)

    monkeypatch.setattr(stages, "accuracy", counted)
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert measured == [before["params"]] * 2  # pruned and fine-tuned, not dense
    after = json.loads((tmp_path / "run" / "results.json").read_text())
    assert all(
        after[name] == before[name]
        for name in ("accuracy_dense", "accuracy_pruned", "accuracy")
    )


def test_a_finished_run_resumed_does_nothing_again(finished):
    before = {
        path: path.read_bytes()
        for path in finished.rglob("*")
        if path.suffix in (".safetensors", ".onnx", ".jsonl")
    }
    for given in ([], FAST, ["--episodes", "8"]):
        assert main(["run", *given, "--out", str(finished), "--resume"]) == 0
        assert before == {path: path.read_bytes() for path in before}
    # No baselines but those that it was started with.
    assert RunFolder(finished).read_results().baselines.keys() == {"uniform"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--seed", "7"], "--seed: {out!r} was started with 0, got 7; leave it out"),
        (["--epochs", "null"], "--epochs: {out!r} was started with 2, got null;"),
        (["--proxy.images", "41"], "--proxy.images: {out!r} was started with 40, got"),
        (["--method", "l1"], "--method: {out!r} was started with null, got l1;"),
    ],
)
def test_a_run_is_not_resumed_with_an_option_that_differs_from_what_it_was_started_with(
    given, message, finished, capsys
):
    line = failure(capsys, "run", *given, "--out", str(finished), "--resume")
    assert message.format(out=str(finished)) in line


def test_the_config_of_a_run_reruns_it_and_gives_way_to_what_is_typed(
    finished, tmp_path, cheap_export
):
    config = str(finished / "config.yaml")
    again = tmp_path / "again"
    assert main(["run", "--config", config, "--out", str(again)]) == 0
    for name in ("allocation.json", "pruned/weights.safetensors"):
        assert (again / name).read_bytes() == (finished / name).read_bytes()
    other = tmp_path / "other"
    typed = ["--agent", "uniform", "--baselines", "none", "--seed", "3"]
    assert main(["search", *typed, "--config", config, "--out", str(other)]) == 0
    stored = yaml.safe_load((other / "config.yaml").read_text())
    assert stored["search"]["agent"] == "dyna", "what comes last counts"
    other = tmp_path / "third"
    assert main(["search", "--config", config, *typed, "--out", str(other)]) == 0
    stored = yaml.safe_load((other / "config.yaml").read_text())
    assert (stored["search"]["agent"], stored["search"]["seed"]) == ("uniform", 3)
    assert stored["network"]["model"] == "tests.tiny:network"


@pytest.mark.parametrize(
    "settings",
    [
        Settings(),
        Settings(
            network=NetworkConfig("my.module:make", "weights.pt"),
            search=SearchConfig(
                "macs=30%..80%", agent="ppo", seed=7, exclude="a*,b", min_width="*=8"
            ),
            proxy=ProxyConfig(images=12, temperature=0.5, seed=7),
            finetune=FinetuneConfig(epochs=0, lr=1e-3, flip=False),
            sparse=SparseConfig("gsm", share=0.25),
            removal=RemovalConfig("gradual", prunings=3),
            dimensions=DimensionsConfig(degree=3),
        ),
    ],
)
def test_the_options_of_a_runs_config_describe_its_settings_and_nothing_else(settings):
    stored = yaml.safe_load(yaml.safe_dump(settings.to_dict() | {"command": "x"}))
    for verb in ("run", "search", "prune"):
        options = build_parser(verb, options_of(stored)).parse_args([verb])
        assert settings_of(options[verb]) == settings


def test_an_allocation_that_was_killed_goes_on_from_its_folder_alone(
    finished, tmp_path, capsys, monkeypatch
):
    shutil.copy(finished / "allocation.json", tmp_path)
    allocation, folder = tmp_path / "allocation.json", tmp_path / "run"
    begun = ["prune", "--allocation", str(allocation), *TINY, "--out", str(folder)]

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stages, "replace_pruned", killed)
        assert main(begun) == 130
    kept = json.loads((folder / "allocation.json").read_text())["kept"]
    # The run has its own copy.
    allocation.unlink()
    resumed = ["prune", "--resume", "--out", str(folder)]
    line = failure(capsys, *resumed, "--allocation", "other.json")
    assert f"was started with {allocation}, got other.json" in line
    assert main(resumed) == 0
    assert (folder / "pruned" / "plan.json").exists()
    assert json.loads((folder / "allocation.json").read_text())["kept"] == kept


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runn"], "no command runn; did you mean run? See"),
        (["serch", "--agent", "random"], "no command serch; did you mean search? See"),
        (["run", "--budgt", "macs=40%"], "--budgt; did you mean --budget? See"),
        (["run", "--budgt=macs=40%"], "--budgt; did you mean --budget? See"),
        (["run", "--proxy.imags", "9"], "--proxy.imags; did you mean --proxy.images?"),
        (["run", "--image-size", "32"], "did you mean --image_size?"),
        (["prune", "r", "--distillation", "1"], "mean --finetune.distillation?"),
        (["trace", "--modl", "resnet20"], "--modl; did you mean --model?"),
        (["finetune", "r", "--epoxs", "3"], "--epoxs; did you mean --epochs?"),
        (["export", "r", "--fromat", "onnx"], "did you mean --format?"),
        (["--versoin"], "--versoin; did you mean --version?"),
        (["run", "--proxy.loss", "kll"], "got 'kll'; did you mean 'kl'?"),
        (["run", "--budget", "mac=40%"], "'mac'; did you mean 'macs'?"),
        (["run", "--granularity", "chanel"], "did you mean 'channel'?"),
        (["run", "--method", "slimmin"], "did you mean 'slimming'?"),
    ],
)
def test_a_typo_gets_the_nearest_command_option_or_value(arguments, message, capsys):
    assert message in failure(capsys, *arguments)


def test_a_typo_in_a_file_of_options_gets_the_nearest_one(tmp_path, capsys):
    (tmp_path / "options.yaml").write_text("budgt: macs=40%\n")
    line = failure(capsys, "run", "--config", str(tmp_path / "options.yaml"))
    assert "no option budgt of `autoprune run`; did you mean budget?" in line


def test_a_run_killed_at_random_moments_ends_with_the_allocation_and_weights_of_one_left_alone(
    tmp_path, cheap_export
):
    arguments = [*TINY, "--episodes", "20", "--epochs", "6", "--baselines", "none"]
    arguments += ["--proxy.images", "40", "--checkpoint_every", "5"]
    assert main(["run", *arguments, "--out", str(tmp_path / "alone")]) == 0
    killed = tmp_path / "killed"
    log = RunFolder(killed).log
    command = ["-m", "autoprune", "run", *arguments, "--out", str(killed)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    resume: list[str] = []
    generator = random.Random(time.time_ns())
    # Once in the search, once in fine-tuning: wait for that many lines of the log, then
    # a little longer.
    for event, n_lines in (
        ("episode", generator.randrange(3, 16)),
        ("epoch", generator.randrange(1, 5)),
    ):
        with started_python(*command, *resume, environment=environment) as process:
            wait_for_events(process, log, event, n_lines)
            time.sleep(generator.uniform(0, 0.05))
        resume = ["--resume"]
    assert main(["run", "--out", str(killed), "--resume"]) == 0
    for name in (
        "allocation.json",
        "pruned/weights.safetensors",
        "policy/policy.safetensors",
    ):
        assert (killed / name).read_bytes() == (
            tmp_path / "alone" / name
        ).read_bytes(), name
    scores = [
        RunFolder(tmp_path / name).read_results().accuracy
        for name in ("alone", "killed")
    ]
    assert scores[0] == scores[1]


def test_a_missing_argument_is_named_as_the_command_line_does(capsys):
    line = "autoprune: error: finetune: run is missing; see `autoprune finetune --help`"
    assert failure(capsys, "finetune") == line
    assert "replay: policy is missing" in failure(capsys, "replay")
    assert failure(capsys) == "autoprune: error: give a command; see `autoprune --help`"


def test_every_command_has_help_that_names_its_purpose(capsys):
    for name, command in COMMANDS.items():
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert stop.value.code == 0
        assert " ".join(command.run.__doc__.split()).split(".")[0] in text


def test_help_answers_without_importing_torch():
    code = "import sys; from autoprune.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules"
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet21"], "unknown model 'resnet21'; did you mean resnet"),
        (["--model", "tests.tiny:nothing"], "'tests.tiny' has no 'nothing'"),
        (["--data", "cifar11"], "no dataset 'cifar11'; did you mean 'cifar10'"),
        (["--agent", "ppa"], "unknown agent 'ppa'; did you mean 'ppo'"),
        (["--criterion", "l3"], "unknown criterion 'l3'; did you mean 'l1'"),
        (
            ["--reward", "weighted"],
            "unknown reward 'weighted'; did you mean 'weighted_sum'",
        ),
        (
            ["--baselines", "unifrom"],
            "unknown baseline 'unifrom'; did you mean 'uniform'",
        ),
        (["--budget", "macs=0"], "above 0 and at most 100%, got '0'"),
        (["--budget", "macs=120%"], "above 0 and at most 100%, got '120%'"),
        (["--budget", "macs=half"], "'half' is no number"),
        (["--budget", "watts=50%"], "unknown metric 'watts'"),
        (["--budget", "macs=0.1%"], r"below the reachable floor"),
        (["--budget", "macs=0.1%..80%"], r"macs=0.1% is below the reachable floor"),
        (
            ["--budget", "macs=80%..30%"],
            "from a smaller to a larger share, as in macs=30%..80%; got "
            "'macs=80%..30%'",
        ),
        (
            ["--budget", "macs=20k..40k"],
            "a range goes from a smaller to a larger share",
        ),
        (["--budget", "macs=30%..120%"], "above 0 and at most 100%, got '120%'"),
        (
            ["--budget", "macs=30%..80%", "--agent", "tpe"],
            "tpe is for one budget, got the range macs=30%..80%",
        ),
        (
            ["--policy", "nowhere"],
            "--policy: no shipped policy and no folder is called 'nowhere'",
        ),
        (
            ["--policy", "docs"],
            "--policy: 'docs' is neither a run nor a policy's folder",
        ),
        (
            ["--policy", "nowhere", "--agent", "random"],
            "--policy: random learns no policy to start from one",
        ),
        (
            ["--model", "resnet56", "--weights", "auto"],
            "give the trained weights of resnet56",
        ),
        (
            ["--weights", "auto"],
            "--weights: pruning starts from a trained network; give the file of the "
            "trained weights of tests.tiny:network, or none if it returns a network "
            "that is trained",
        ),
        (["--weights", "missing.th"], "no file 'missing.th'"),
        (["--model", "tests.tiny:sick"], "0.0.weight holds NaN"),
        (["--model", "tests.tiny:hopeless"], "nothing can be pruned"),
        (["--exclude", "*"], "nothing can be pruned (0.0: user asked (exclude *)"),
        (
            ["--exclude", "layr*"],
            "--exclude: no group or layer is called 'layr*'; there are e.g. 0.0",
        ),
        (["--min_width", "9.*=8"], "--min_width: no group or layer is called '9.*'"),
        (["--min_width", "0.0"], "--min_width: expected PATTERN=N,PATTERN=N"),
        (["--round_to_for", "0.0=0"], "got '0.0=0'"),
        (["--round_to", "0"], "--round_to: must be auto or a number of at least 1"),
        (["--round_to", "atuo"], "--round_to: must be auto or a number of at least 1"),
        (
            ["--min_width", "*=12", "--round_to", "2", "--budget", "macs=20%"],
            "with max_sparsity 0.9, min_width 12 and round_to 2 ",
        ),
        (["--episodes", "0"], "--episodes: must be at least 1, got 0"),
        (["--episodes", "many"], "many"),
        (["--resume"], "--resume: which run?"),
        (["--nonsense", "1"], "--nonsense"),
        (
            ["--model", "tests.tiny:stubborn"],
            "stubborn answers an image with (1, 5), the data needs (1, 10)",
        ),
        (
            ["--model", "tests.tiny:twofold"],
            "tests.tiny:twofold answers an image with tuple, the data needs (1, 10)",
        ),
        (
            ["--model", "tests.tiny:demanding"],
            "--channels: the network reads 4, the images have 3; take a folder of images",
        ),
        (["--seed", "-1"], "--seed: must be from 0 to 4294967294, got -1"),
        (
            ["--split_seed", "99999999999"],
            "--split_seed: must be from 0 to 4294967294, got 99999999999",
        ),
    ],
)
def test_bad_input_of_a_run_ends_with_code_2_and_one_line_and_leaves_nothing(
    arguments, message, tmp_path, capsys
):
    base = [] if "--resume" in arguments else ["--out", str(tmp_path / "run")]
    line = failure(capsys, "run", *TINY, *base, *arguments)
    assert message in line
    assert not (tmp_path / "run").exists()


def test_an_unreachable_budget_states_the_floor(tmp_path, capsys):
    line = failure(
        capsys, "search", *TINY, "--budget", "params=1%", "--out", str(tmp_path / "run")
    )
    assert "this network needs params=" in line
    assert "%) or more" in line


def test_weights_for_another_architecture_are_explained(tmp_path, capsys):
    save_file(models.build("resnet32").state_dict(), tmp_path / "w.safetensors")
    line = failure(
        capsys,
        "run",
        "--weights",
        str(tmp_path / "w.safetensors"),
        "--out",
        str(tmp_path / "run"),
    )
    assert "another architecture" in line
    assert "unexpected" in line


def test_weights_with_nan_are_refused_by_name(tmp_path, capsys):
    state = models.build("resnet20").state_dict()
    state["layer1.0.conv1.weight"][0] = float("nan")
    save_file(state, tmp_path / "w.safetensors")
    line = failure(
        capsys,
        "run",
        "--weights",
        str(tmp_path / "w.safetensors"),
        "--out",
        str(tmp_path / "run"),
    )
    assert "layer1.0.conv1.weight" in line
    assert "NaN" in line


def test_an_image_folder_with_other_classes_than_the_head_is_refused(tmp_path, capsys):
    for part in ("train", "test"):
        for name in ("cat", "dog", "fox"):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for index in range(20):
                Image.new("RGB", (32, 32), (index, 0, 0)).save(
                    tmp_path / "images" / part / name / f"{index}.png"
                )
    save_file(models.build("resnet20").state_dict(), tmp_path / "w.safetensors")
    arguments = (
        "--data",
        str(tmp_path / "images"),
        "--image_size",
        "32",
        "--weights",
        str(tmp_path / "w.safetensors"),
    )
    line = failure(capsys, "run", *arguments, "--out", str(tmp_path / "run"))
    assert "10 classes" in line
    assert "the data has 3" in line


OF_RUNS = "prune", "finetune", "evaluate", "export", "report"


@pytest.mark.parametrize("command", OF_RUNS)
def test_a_folder_that_is_no_run_is_refused(command, tmp_path, capsys):
    assert "is not a run folder (no config.yaml)" in failure(
        capsys, command, str(tmp_path)
    )
    assert "no folder 'nowhere'" in failure(capsys, command, "nowhere")


def test_replay_without_a_policy_is_refused(tmp_path, capsys):
    assert "POLICY: no shipped policy and no folder is called 'nowhere'" in failure(
        capsys, "replay", "nowhere"
    )
    line = failure(capsys, "replay", str(tmp_path))
    assert (
        "is neither a run nor a policy's folder (no config.yaml, no policy.json)"
        in line
    )


def test_a_damaged_run_folder_is_named(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("network: [")
    assert "config.yaml' is damaged" in failure(capsys, "evaluate", str(tmp_path))
    (tmp_path / "config.yaml").write_text("network: {model: resnet20, colour: red}")
    assert "damaged or of another version" in failure(capsys, "evaluate", str(tmp_path))


def test_a_run_that_has_not_been_pruned_says_what_is_missing(
    finished, tmp_path, capsys
):
    (tmp_path / "config.yaml").write_text((finished / "config.yaml").read_text())
    assert "has no pruned/plan.json yet" in failure(capsys, "evaluate", str(tmp_path))
    assert "no policy" in failure(capsys, "replay", str(tmp_path))


def test_a_run_keeps_to_its_own_exclusions_and_widths_in_every_command(
    tmp_path, capsys
):
    limits = [
        "--exclude",
        "0.*",
        "--min_width",
        "2.0=10",
        "--round_to_for",
        "2.*=5",
        "--budget",
        "macs=90%",
    ]
    own, other = tmp_path / "own", tmp_path / "other.json"
    search = ["search", *FAST, "--baselines", "none", *limits, "--out", str(own)]
    assert main(search) == 0
    assert main([*search, "--resume"]) == 0
    kept = json.loads((own / "allocation.json").read_text())["kept"]
    assert kept.keys() == {"1.0", "2.0"}
    assert kept["1.0"] in (10, 12)
    assert kept["2.0"] in (10, 15, 16)
    assert main(["prune", str(own)]) == 0
    pruned = load_pruned(own / "pruned")
    assert [pruned[i][0].out_channels for i in range(3)] == [
        8,
        kept["1.0"],
        kept["2.0"],
    ]
    assert main(["replay", str(own), "--out", str(other)]) == 0
    assert json.loads(other.read_text())["kept"] == kept
    assert main(["replay", str(own), "--exclude", "", "--out", str(other)]) == 0
    assert json.loads(other.read_text())["kept"].keys() == {"0.0", "1.0", "2.0"}
    by_hand = [
        "prune",
        "--allocation",
        str(own / "allocation.json"),
        *TINY,
        "--out",
        str(tmp_path / "by_hand"),
    ]
    assert "another exclude: group '0.0'" in failure(capsys, *by_hand)
    assert "was started with 0.*, got 0.0" in failure(
        capsys, *search, "--exclude", "0.0", "--resume"
    )


def test_an_existing_run_is_pruned_with_its_own_settings_and_nothing_else(
    finished, tmp_path, capsys
):
    line = failure(capsys, "prune", str(finished), "--criterion", "taylor")
    assert line.startswith(
        "autoprune: error: --criterion: RUN is pruned with the settings that it was "
        "started with;"
    )
    assert "--proxy.images: RUN is" in failure(
        capsys, "prune", str(finished), "--proxy.images", "9"
    )
    (tmp_path / "config.yaml").write_text((finished / "config.yaml").read_text())
    assert "has decided nothing yet; go on with: autoprune run --resume" in failure(
        capsys, "prune", str(tmp_path)
    )
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--removal.method", "resrep"],
            "--removal.method: resrep decides by itself how much goes where",
        ),
        (
            ["--sparse.method", "gsm"],
            "--sparse.share: gsm takes the budget's share, and an allocation has none",
        ),
    ],
)
def test_methods_that_go_by_a_budget_take_no_allocation(
    options, message, finished, tmp_path, capsys
):
    given = [
        "prune",
        "--allocation",
        str(finished / "allocation.json"),
        *TINY,
        "--out",
        str(tmp_path / "run"),
    ]
    assert message in failure(capsys, *given, *options)
    assert not (tmp_path / "run").exists()


def test_a_run_whose_network_has_no_onnx_form_is_reported_all_the_same(
    tmp_path, monkeypatch, capsys
):
    def refuse(*_):
        raise ExportError("ONNX can't express this network (an operation)")

    monkeypatch.setattr(stages, "export_onnx", refuse)
    assert (
        main(
            [
                "run",
                *FAST,
                "--baselines",
                "none",
                "--json",
                "--out",
                str(tmp_path / "run"),
            ]
        )
        == 1
    )
    captured = capsys.readouterr()
    assert (
        captured.err.splitlines()[-1]
        == "autoprune: error: ONNX can't express this network (an operation)"
    )
    results = json.loads(captured.out.splitlines()[-1])
    assert results["accuracy"] > 0
    assert results["latency_ms"] > 0
    assert "onnx_max_relative_error" not in results
    assert (tmp_path / "run" / "report.html").exists()


def test_a_network_in_half_precision_is_pruned_in_float32(tmp_path):
    arguments = [*TINY, "--model", "tests.tiny:halved", "--agent", "uniform"]
    assert main(["search", *arguments, "--out", str(tmp_path / "run")]) == 0


def test_replay_with_weights_of_its_own_leaves_what_the_run_made_of_others(
    tmp_path, capsys
):
    run, weights = tmp_path / "run", tmp_path / "w.safetensors"
    sparse = ["--sparse.method", "l1", "--sparse.epochs", "1", "--baselines", "none"]
    assert main(["search", *FAST, *sparse, "--out", str(run)]) == 0
    save_file(network().state_dict(), weights)

    def loss(policy: Path, *options: str) -> float:
        capsys.readouterr()
        assert (
            main(
                [
                    "replay",
                    str(policy),
                    *options,
                    "--json",
                    "--out",
                    str(tmp_path / "a.json"),
                ]
            )
            == 0
        )
        return json.loads(capsys.readouterr().out.splitlines()[-1])[
            "proxy_loss_uniform"
        ]

    own, others = loss(run), loss(run, "--weights", str(weights))
    elsewhere = loss(
        run / "policy", *TINY, "--weights", str(weights), "--proxy.images", "40"
    )
    assert others == elsewhere != own


@pytest.mark.parametrize("agent", ["dyna", "ppo"])
def test_a_search_from_a_policy_that_knows_other_groups_says_so(
    agent, tmp_path, capsys
):
    own, again = str(tmp_path / "own"), str(tmp_path / "again")
    searching = ["search", *FAST, "--agent", agent, "--baselines", "none"]
    assert main([*searching, "--policy", "resnet20-ppo", "--out", own]) == 0
    said = capsys.readouterr().err
    assert (
        "--policy: 'resnet20-ppo' was trained on groups unlike most of this network's"
        in said
    )
    assert "it acts in the first episodes only, mixed with an allocator" in said
    assert main([*searching, "--policy", own, "--out", again]) == 0
    assert "--policy" not in capsys.readouterr().err


def test_an_allocation_for_another_network_is_refused(finished, tmp_path, capsys):
    allocation = str(finished / "allocation.json")
    line = failure(
        capsys, "prune", "--allocation", allocation, "--out", str(tmp_path / "run")
    )
    assert "another network" in line


def test_a_run_is_not_overwritten(finished, capsys):
    assert "holds a run already" in failure(
        capsys, "run", *FAST, "--out", str(finished)
    )


def test_a_place_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    line = failure(capsys, "run", *FAST, "--out", str(tmp_path / "file" / "run"))
    assert str(tmp_path / "file") in line
    assert "Not a directory" in line


@pytest.mark.parametrize(
    "victim", ["weights.safetensors", "model.onnx", "report.html", "allocation.json"]
)
def test_a_full_disk_leaves_no_half_written_artefact(
    victim, finished, tmp_path, monkeypatch, capsys, request
):
    """The rename is where a full disk is simulated: by then the partial file exists."""
    if victim == "report.html":
        request.getfixturevalue("cheap_export")
    replace = os.replace

    def full(source, target):
        if Path(target).name == victim:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    folder = tmp_path / "run"
    line = failure_after_progress(
        capsys, "run", *FAST, "--baselines", "none", "--out", str(folder)
    )
    assert victim in line
    assert "No space left on device" in line
    assert not list(folder.rglob("*.partial*"))
    assert not list(folder.rglob(victim))


def failure_after_progress(capsys, *arguments: str) -> str:
    """As `failure`, for commands that have reported progress before they fail."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text.strip().splitlines()[-1]


def test_the_policy_files_are_safetensors_and_json(finished):
    assert sorted(path.name for path in (finished / "policy").iterdir()) == [
        "policy.json",
        "policy.safetensors",
    ]
    assert load_file(finished / "policy" / "policy.safetensors")
