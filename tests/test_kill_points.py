"""`prune RUN` and `finetune RUN` killed at every write, then gone on with: the run ends
as one that was left alone.

A kill is an exception from the interpreter's own audit of what touches the disk. From
then on nothing reaches the disk, so that what `finally` would tidy up stays as it was.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import Namespace
from torch import nn

from autoprune.agents.replay import Policy
from autoprune.cli import commands, opening
from autoprune.cli import stages as stages_of_commands
from autoprune.cli.main import main
from autoprune.errors import UserError
from autoprune.pipeline import stages
from autoprune.pipeline.context import RunContext
from autoprune.runs import RunFolder

OPTIONS = (
    "--model tests.tiny:network --weights none --data digits --agent uniform "
    "--episodes 1 --epochs 2 --finetune.bf16 off --max_train_images 128 "
    "--max_test_images 50 --proxy.images 40"
)
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}
"""Events of the interpreter's audit that change what a folder holds."""


class KillError(BaseException):
    """The end of a process, as far as the disk is concerned."""


class Disk:
    """Counts the writes into a folder, and lets none through from some point on."""

    def __init__(self) -> None:
        self.folder = ""
        self.n_writes = 0
        self.n_allowed: int | None = None

    def audit(self, event: str, arguments: tuple) -> None:
        if not self.folder or not self.is_write(event, arguments):
            return
        if self.n_writes == self.n_allowed:
            raise KillError
        self.n_writes += 1

    def is_write(self, event: str, arguments: tuple) -> bool:
        if event == "os.truncate":
            # Of a lock, which is named by its descriptor.
            return True
        if not arguments or not str(arguments[0]).startswith(self.folder):
            return False
        if event != "open":
            return event in CHANGES
        _, mode, flags = arguments
        return bool(set(mode or "") & set("wax+")) or bool(flags & 0b11)

    @contextmanager
    def watched(self, folder: Path, n_allowed: int | None = None) -> Iterator[None]:
        self.n_writes = 0
        self.n_allowed = n_allowed
        self.folder = str(folder)
        try:
            yield
        finally:
            self.folder = ""


DISK = Disk()
# Once for all tests, as an audit can't be ended.
sys.addaudithook(DISK.audit)


def digest_of(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module", autouse=True)
def _cheap():
    """What these commands write, without what takes seconds."""

    def export(model: nn.Module, example: Any, path: Path, *_: Any, **__: Any) -> float:
        # Tells of which network it is.
        path.write_text(digest_of(model))
        return 0.5

    def measure(context: RunContext, folder: RunFolder) -> None:
        folder.add_results(latency=[], latency_ms=1.0, latency_ms_dense=2.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "export_onnx", export)
        patch.setattr(stages, "latency_stage", measure)
        patch.setattr(stages_of_commands, "finish", lambda job, as_json: None)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """A run as it is after each command; tests copy them."""
    root = tmp_path_factory.mktemp("kills")
    run = root / "run"
    copies = {}
    for name, command in (
        ("decided", ["search", *OPTIONS.split(), "--out", str(run)]),
        ("pruned", ["prune", str(run)]),
        ("finished", ["run", "--resume", "--out", str(run)]),
    ):
        assert main(command) == 0
        copies[name] = root / name
        shutil.copytree(run, copies[name])
    return copies


@pytest.fixture(scope="module", autouse=True)
def _one_context(runs):
    """Network, images and trace once for all: hundreds of commands begin with them."""
    context = RunContext.of_run(RunFolder(runs["finished"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunContext, "of_run", lambda folder: context)
        yield


def prune(folder: Path) -> None:
    with opening.hold_run(str(folder)) as job:
        stages_of_commands.prune(job)


def finetune(folder: Path, epochs: int | None = None, resume: bool = False) -> None:
    commands.finetune(
        Namespace(
            run=str(folder),
            epochs=epochs,
            finetune=Namespace(lr=None),
            resume=resume,
            json=False,
        )
    )


def finetune_on(folder: Path) -> None:
    finetune(folder, resume=True)


def resume_run(folder: Path) -> None:
    with opening.hold_run(str(folder)) as job:
        stages_of_commands.run_stages(job)


def state(folder: Path) -> dict[str, object]:
    """All that a run states, but for what depends on the clock."""
    run = RunFolder(folder)
    results = run.read_results().to_json()
    for name in ("run", "seconds", "seconds_total", "seconds_search"):
        results.pop(name, None)
    # As the report reads them: an epoch that was trained again counts once.
    losses = {event["epoch"]: event["loss"] for event in run.events("epoch")}
    found: dict[str, object] = {"results": results, "losses": losses}
    for path in folder.rglob("*"):
        if path.suffix in (".safetensors", ".onnx") or path.name == "plan.json":
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def ends(
    start: Path,
    command: Callable[[Path], None],
    *go_on: Callable[[Path], None],
    folder: Path,
) -> Iterator[dict[str, object]]:
    """The states of runs killed at each write of a command and gone on with; first that
    of one that wasn't.
    """
    shutil.copytree(start, folder)
    with DISK.watched(folder):
        command(folder)
    n_writes = DISK.n_writes
    for step in go_on:
        step(folder)
    yield state(folder)
    for n_allowed in range(n_writes):
        shutil.rmtree(folder)
        shutil.copytree(start, folder)
        with DISK.watched(folder, n_allowed), pytest.raises(KillError):
            command(folder)
        for step in go_on:
            step(folder)
        assert not list(folder.rglob("*.partial*"))
        yield state(folder)


@pytest.mark.parametrize(
    ("start", "command", "go_on", "least"),
    [
        ("decided", prune, (resume_run,), 8),
        ("finished", prune, (resume_run,), 10),
        ("finished", prune, (prune, resume_run), 10),
        ("pruned", finetune, (finetune_on, resume_run), 15),
        ("finished", finetune, (finetune_on, resume_run), 20),
    ],
)
def test_killed_at_any_write_a_run_ends_as_one_left_alone(
    start, command, go_on, least, runs, tmp_path
):
    alone, *killed = ends(runs[start], command, *go_on, folder=tmp_path / "run")
    assert len(killed) >= least
    for number, end in enumerate(killed):
        assert end == alone, f"killed at write {number} of {len(killed)}"


def test_whatever_network_a_killed_finetuning_leaves_is_told_of_rightly(runs, tmp_path):
    """Gone on with as a run, which had a network of two epochs, and gets that of one."""

    def shorter(folder: Path) -> None:
        finetune(folder, epochs=1)

    ended = list(ends(runs["finished"], shorter, resume_run, folder=tmp_path / "run"))
    by_epochs = {}
    for end in ended:
        plan = json.loads(end["pruned/plan.json"])
        results = end["results"]
        assert results["finetune_epochs"] == plan["epochs"]
        end.pop("losses")
        # Of one network there is one state, however it was reached.
        assert by_epochs.setdefault(plan["epochs"], end) == end
    assert set(by_epochs) == {1, 2}


def test_a_policy_killed_between_its_files_is_not_taken_for_another(tmp_path):
    policies = Path("agents/policies")
    first = Policy.load(policies / "resnet20-ppo")
    second = Policy.load(policies / "resnet20-sac")
    folder = tmp_path / "policy"
    first.save(folder)
    with DISK.watched(folder):
        second.save(folder)
    outcomes = []
    for n_allowed in range(DISK.n_writes):
        first.save(folder)
        with DISK.watched(folder, n_allowed), pytest.raises(KillError):
            second.save(folder)
        outcomes.append(policy_in(folder))
    # The one before, until its weights are replaced.
    n_before = outcomes.count(digest_of(first.network))
    assert 0 < n_before < len(outcomes)
    reason = "policy.json is of other weights"
    assert all(reason in outcome for outcome in outcomes[n_before:])


def policy_in(folder: Path) -> str:
    """The digest of a folder's policy, or why there is none."""
    try:
        return digest_of(Policy.load(folder).network)
    except UserError as error:
        return error.reason
