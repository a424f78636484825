"""Trainings that diverge: they stop at once, lose nothing, say what to change, and the
run goes on with that.
"""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from tiny import network
from torch import nn

from autoprune.cli.main import main
from autoprune.config import DataConfig, FinetuneConfig
from autoprune.data.datasets import Images, load
from autoprune.deploy.pruned import load_pruned
from autoprune.errors import DivergedError
from autoprune.pipeline import stages
from autoprune.runs import RunFolder
from autoprune.training.loop import TrainingCallback, finetune

CONFIG = FinetuneConfig(epochs=3, batch_size=64, lr=0.1, distillation=0.0, bf16="off")
STEPS = 4
"""Of an epoch."""


@pytest.fixture(scope="module")
def images() -> Images:
    return load(DataConfig(data="digits")).train[: 64 * STEPS]


class Fault(TrainingCallback):
    """Spoils a training in one step.

    Args:
        spoil: What is done to the network.
        step: When, after the optimizer.
    """

    def __init__(self, spoil, step: int) -> None:
        self.spoil = spoil
        self.step = step
        self.n_forwards = 0

    def before_forward(self, model: nn.Module, step: int) -> None:
        self.n_forwards += 1

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int) -> None:
        if step == self.step:
            self.spoil(model)


def spoil_weight(model: nn.Module) -> None:
    model[0][0].weight[0, 0, 0, 0] = torch.inf


def spoil_loss(model: nn.Module) -> None:
    model.register_forward_hook(lambda module, inputs, output: output * torch.inf)


def spoil_statistics(model: nn.Module) -> None:
    # Answers are finite then: everything is divided by infinity.
    model[0][1].running_var.fill_(torch.inf)


def spoil_answers(model: nn.Module) -> None:
    model.register_forward_hook(
        lambda module, inputs, output: output if module.training else output * torch.nan
    )


@pytest.mark.parametrize(
    ("spoil", "what", "n_more"),
    [
        (spoil_weight, "the weights are not finite", 0),
        (spoil_loss, "the loss is (nan|inf)", 1),
        # Training reads neither, so no loss shows it.
        (spoil_statistics, "0.1.running_var is not finite", STEPS - 2),
        (spoil_answers, "the network's answers are not finite", STEPS - 2),
    ],
)
def test_a_training_stops_at_the_first_number_that_is_not_finite(
    spoil, what, n_more, images, tmp_path
):
    checkpoint = tmp_path / "training.pt"
    fault = Fault(spoil, STEPS + 1)
    told = []

    def tell(epoch: int, loss: float) -> None:
        told.append(epoch)
        assert checkpoint.exists()

    with pytest.raises(DivergedError, match=f"{what} in epoch 2 of 3") as raised:
        finetune(
            network(),
            images,
            CONFIG,
            checkpoint=checkpoint,
            on_epoch=tell,
            callback=fault,
        )
    assert raised.value.argument == "lr"
    assert raised.value.rate == CONFIG.lr
    assert fault.n_forwards == STEPS + 2 + n_more
    # The epoch that went well was told; nothing is left in the way of another rate.
    assert told == [1]
    assert not checkpoint.exists()


def test_watching_a_training_changes_nothing_in_it(images, monkeypatch):
    watched = finetune(network(), images, CONFIG)
    for name in ("_check_weights", "_check_network"):
        monkeypatch.setattr(f"autoprune.training.loop.{name}", lambda *_: None)
    unwatched = finetune(network(), images, CONFIG).state_dict()
    for name, tensor in watched.state_dict().items():
        assert torch.equal(tensor, unwatched[name])


def test_a_checkpoint_of_other_settings_is_refused_by_name(images, tmp_path):
    checkpoint = tmp_path / "training.pt"
    finetune(network(), images, replace(CONFIG, epochs=1), checkpoint=checkpoint)
    other = replace(CONFIG, epochs=1, lr=0.01)
    with pytest.raises(ValueError, match=r"other settings \(lr 0.1, asked for 0.01\)"):
        finetune(network(), images, other, checkpoint=checkpoint)


RUN = [
    "--model",
    "tests.tiny:network",
    "--weights",
    "none",
    "--data",
    "digits",
    "--agent",
    "uniform",
    "--episodes",
    "1",
    "--proxy.images",
    "40",
    "--finetune.bf16",
    "off",
    "--max_train_images",
    "256",
    "--epochs",
    "1",
]
TRAININGS = {
    "finetune": [],
    "sparse": ["--sparse.method", "l1", "--sparse.epochs", "1"],
    "removal": ["--removal.method", "gradual", "--removal.epochs", "1"],
}


@pytest.fixture(autouse=True)
def _no_export(monkeypatch):
    """Neither ONNX nor latency, which take longer than all else that these runs do."""

    def write(model: nn.Module, example: torch.Tensor, path: Path, *_, **__) -> float:
        path.write_bytes(b"onnx")
        return 0.0

    monkeypatch.setattr(stages, "export_onnx", write)
    monkeypatch.setattr(stages, "measure_latency", lambda *_: [])


def files(folder: Path) -> dict[Path, bytes]:
    """What a run has decided and trained, byte by byte."""
    kept = (".safetensors", ".pt")
    found = {}
    for path in folder.rglob("*"):
        if path.suffix in kept or path.name in ("allocation.json", "plan.json"):
            found[path.relative_to(folder)] = path.read_bytes()
    return found


@pytest.mark.parametrize("stage", TRAININGS)
def test_a_run_whose_training_diverges_goes_on_with_the_rate_that_it_is_told(
    stage, tmp_path, capsys, monkeypatch
):
    # Latencies are none here, which would be asked for again and again.
    monkeypatch.setattr(stages, "latency_stage", lambda *_: None)
    wild, tame = tmp_path / "wild", tmp_path / "tame"
    options = [*RUN, *TRAININGS[stage]]
    rate = f"--{stage}.lr"
    assert main(["run", *options, rate, "1e30", "--out", str(wild)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    refused = [line for line in lines if line.startswith("autoprune: error")]
    assert len(refused) == 1
    assert refused[0].startswith(f"autoprune: error: {rate}: the training diverged: ")
    assert "at a rate of 1e+30; nothing was overwritten" in refused[0]
    # What it says goes on, word by word, with a quieter rate.
    told = re.search(rf"autoprune (run --resume --out \S+ {rate} 0\.01)$", refused[0])
    assert told is not None
    if stage == "finetune":
        assert all(
            p.isfinite().all() for p in load_pruned(wild / "pruned").parameters()
        )
        before = files(wild)
        # The same rate leads to the same end, and does no harm.
        assert main(["run", "--resume", "--out", str(wild)]) == 2
        assert files(wild) == before
    assert main(told[1].split()) == 0
    assert main(["run", *options, rate, "0.01", "--out", str(tame)]) == 0
    assert files(wild) == files(tame)
    config = yaml.safe_load((wild / "config.yaml").read_text())
    assert config[stage]["lr"] == 0.01
    (changed,) = RunFolder(wild).events("changed")
    assert changed["settings"] == {f"{stage}.lr": [1e30, 0.01]}
    # Now that it is over, it stays as it is.
    capsys.readouterr()
    assert main([*told[1].split()[:-1], "0.02"]) == 2
    assert f"{rate}: " in capsys.readouterr().err


@pytest.fixture(scope="module")
def pruned_run(tmp_path_factory) -> Path:
    """A run that is fine-tuned; tests copy it."""
    folder = tmp_path_factory.mktemp("diverging") / "run"
    assert main(["search", *RUN, "--out", str(folder)]) == 0
    assert main(["prune", str(folder)]) == 0
    assert main(["finetune", str(folder)]) == 0
    return folder


def test_finetuning_a_finished_run_anew_keeps_its_network_where_that_diverges(
    pruned_run, tmp_path, capsys
):
    folder = tmp_path / "run"
    shutil.copytree(pruned_run, folder)
    plan = json.loads((folder / "pruned" / "plan.json").read_text())
    assert plan["stage"] == "finetuned"
    before = (folder / "pruned" / "weights.safetensors").read_bytes()
    capsys.readouterr()
    assert main(["finetune", str(folder), "--finetune.lr", "1e30"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert json.loads((folder / "pruned" / "plan.json").read_text()) == plan
    assert (folder / "pruned" / "weights.safetensors").read_bytes() == before
    told = re.search(r"autoprune (finetune \S+ --finetune\.lr 0\.01)$", line)
    assert told is not None
    assert main(told[1].split()) == 0
    assert (folder / "pruned" / "weights.safetensors").read_bytes() != before


def test_a_training_with_finished_epochs_keeps_its_settings(
    pruned_run, tmp_path, capsys
):
    folder = RunFolder(tmp_path / "run")
    shutil.copytree(pruned_run, folder.root)
    assert main(["prune", str(folder.root)]) == 0
    resume = ["run", "--resume", "--out", str(folder.root)]
    # Its checkpoint is there, whose work other settings would throw away.
    for option in (["--finetune.lr", "0.02"], ["--epochs", "3"]):
        capsys.readouterr()
        assert main([*resume, *option]) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith(f"autoprune: error: {option[0]}: ")
    # What the search made use of never changes.
    folder.finetune_checkpoint.unlink()
    assert main([*resume, "--seed", "7"]) == 2


def test_an_allocation_is_pruned_to_after_sparse_training_has_diverged(
    pruned_run, tmp_path, capsys
):
    folder = tmp_path / "run"
    network_options = RUN[: RUN.index("--agent")]
    begin = ["prune", "--allocation", str(pruned_run / "allocation.json")]
    options = [*network_options, *TRAININGS["sparse"], "--sparse.lr", "1e30"]
    assert main([*begin, *options, "--out", str(folder)]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    # `run` would search, as nothing is decided yet.
    told = re.search(r"autoprune (prune --resume --out \S+ --sparse\.lr 0\.01)$", line)
    assert told is not None
    assert main(told[1].split()) == 0
    kept = json.loads((pruned_run / "allocation.json").read_text())["kept"]
    assert json.loads((folder / "allocation.json").read_text())["kept"] == kept
    assert all(p.isfinite().all() for p in load_pruned(folder / "pruned").parameters())
