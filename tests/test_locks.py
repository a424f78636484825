"""A run folder belongs to one process at a time, however many begin at once."""

import json
import os
from contextlib import ExitStack
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
import yaml
from processes import FORKS, forked

from autoprune import locks
from autoprune.cli.main import main
from autoprune.config import SearchConfig, Settings
from autoprune.errors import UserError
from autoprune.files import write_atomically, write_text
from autoprune.locks import LOCK, claim, hold
from autoprune.runs import new_run

MANY = 36
WRITERS = "writers"
"""File in which every process that began a run leaves its seed."""


def begin_run(barrier: Barrier, out: str | None, seed: int) -> None:
    settings = Settings(search=SearchConfig(seed=seed))
    barrier.wait()
    try:
        with new_run(settings, out) as (folder, is_locked):
            assert is_locked
            with (folder.root / WRITERS).open("a") as file:
                file.write(f"{seed}\n")
    except UserError:
        # Only a folder that is given can be taken.
        assert out is not None


def begin_runs(out: str | None, seeds: list[int]) -> None:
    """Begins a run with each seed in a process of its own, all at one moment."""
    barrier = FORKS.Barrier(len(seeds))
    with ExitStack() as stack:
        processes = [
            stack.enter_context(forked(begin_run, barrier, out, seed)) for seed in seeds
        ]
        for process in processes:
            process.join()
            assert process.exitcode == 0


def seeds_in(folder: Path) -> list[int]:
    """Those that wrote into a run folder; its config has to be of the same run."""
    seeds = [int(line) for line in (folder / WRITERS).read_text().split()]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert seeds == [config["search"]["seed"]]
    return seeds


@pytest.mark.parametrize("n_seeds", [1, MANY])
def test_as_many_folders_as_runs_begun_at_one_moment_and_none_mixed(
    n_seeds, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    seeds = [number % n_seeds for number in range(MANY)]
    begin_runs(None, seeds)
    folders = list((tmp_path / "runs").iterdir())
    assert len(folders) == MANY
    found = []
    for folder in folders:
        found += seeds_in(folder)
        assert f"seed{found[-1]}" in folder.name
        assert not list(folder.glob("*.partial*"))
    assert sorted(found) == sorted(seeds)


@pytest.mark.parametrize("is_there", [False, True])
def test_of_runs_that_are_given_one_folder_at_one_moment_one_gets_it(
    is_there, tmp_path
):
    folder = tmp_path / "mine"
    if is_there:
        folder.mkdir()
    begin_runs(str(folder), list(range(MANY)))
    assert len(seeds_in(folder)) == 1


def test_claims_are_numbered_and_pass_over_what_is_there(tmp_path):
    (tmp_path / "run-2").write_text("a file counts too")
    names = [claim(tmp_path / "run").name for _ in range(3)]
    assert names == ["run", "run-3", "run-4"]


def hold_for_good(barrier: Barrier, folder: Path) -> None:
    with hold(folder, "run"):
        barrier.wait()
        # Until it is killed.
        barrier.wait()


def test_a_second_process_is_told_who_holds_a_run_until_that_one_is_dead(tmp_path):
    barrier = FORKS.Barrier(2)
    with forked(hold_for_good, barrier, tmp_path) as holder:
        barrier.wait()
        told = json.loads((tmp_path / LOCK).read_text())
        with (
            pytest.raises(UserError, match=f"in use by process {holder.pid} on ") as no,
            hold(tmp_path, "run"),
        ):
            pass
        assert f"{told['host']} since {told['since']}" in str(no.value)
        assert told["pid"] == holder.pid
        holder.kill()
        holder.join()
        # What the dead one had said of itself is still in the file.
        assert json.loads((tmp_path / LOCK).read_text()) == told
        with hold(tmp_path, "run") as is_locked:
            assert is_locked
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert (tmp_path / LOCK).read_bytes() == b""


@pytest.fixture(scope="module")
def started(tmp_path_factory) -> Path:
    """A run that has got no further than its config."""
    folder = tmp_path_factory.mktemp("locks") / "run"
    with new_run(Settings(), str(folder)):
        pass
    return folder


@pytest.mark.parametrize(
    "command",
    [
        ["run", "--resume", "--out", "RUN"],
        ["search", "--resume", "--out", "RUN"],
        ["prune", "RUN"],
        ["finetune", "RUN"],
        ["evaluate", "RUN"],
        ["export", "RUN"],
        ["report", "RUN"],
        ["replay", "resnet20-ppo", "--out", "RUN/allocation.json"],
    ],
    ids=lambda command: command[0],
)
def test_every_command_that_writes_into_a_run_is_refused_while_another_does(
    command, started, capsys
):
    before = {path: path.read_bytes() for path in started.iterdir()}
    arguments = [word.replace("RUN", str(started)) for word in command]
    with hold(started, "run"):
        assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert "is in use by process" in lines[-1]
    assert before == {path: path.read_bytes() for path in started.iterdir()}


def test_what_a_killed_writer_left_goes_when_the_run_is_held_again(tmp_path):
    inner = tmp_path / "pruned"
    inner.mkdir()
    (inner / ".plan.json.123-abc.partial.json").write_text("{")
    (inner / "plan.json").write_text("{}")
    with hold(tmp_path, "run"):
        pass
    assert [path.name for path in inner.iterdir()] == ["plan.json"]


def test_two_writers_of_one_file_each_write_a_whole_one(tmp_path):
    path = tmp_path / "file.txt"
    partials = []

    def write_as_another_does_too(partial: Path) -> None:
        partials.append(partial)
        partial.write_text("first")
        write_text(path, "second")
        assert partial.read_text() == "first"

    write_atomically(path, write_as_another_does_too)
    assert path.read_text() == "first"
    assert partials[0].suffix == ".txt"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("fault", ["no module", "no locks here"])
def test_without_locks_a_run_goes_on_and_says_so(fault, tmp_path, monkeypatch, capsys):
    if fault == "no module":
        monkeypatch.setattr(locks, "fcntl", None)
    else:

        def refuse(*_: int) -> None:
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr(locks.fcntl, "flock", refuse)
    with new_run(Settings(), str(tmp_path / "run")):
        pass
    # It gets as far as finding that there is nothing to report yet.
    assert main(["report", str(tmp_path / "run")]) == 2
    said, refused = capsys.readouterr().err.strip().splitlines()
    assert "has no locks; let no second command work on this run" in said
    assert "has no results.json yet" in refused


def test_a_folder_that_can_hold_no_config_is_not_left_behind(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with (
        pytest.raises(UserError, match="No space left"),
        new_run(Settings(), str(tmp_path / "run")),
    ):
        pass
    assert not (tmp_path / "run").exists()
