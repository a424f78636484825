"""Keeping other processes out of a run folder while a command works on it."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from autoprune.cli.stages import Job, open_run
from autoprune.locks import hold
from autoprune.reporting.console import say
from autoprune.runs import RunFolder


@contextmanager
def held(folder: RunFolder, argument: str) -> Iterator[None]:
    """Holds a run until the end of the block, and says so where that can't be.

    Args:
        folder: The run.
        argument: The argument that it came by, for messages.

    Raises:
        UserError: If another process works on it, or it can't be written.
    """
    with hold(folder.root, argument) as is_locked:
        warn_unless(is_locked, folder)
        yield


def warn_unless(is_locked: bool, folder: RunFolder) -> None:
    """Says that a run isn't locked, where it isn't.

    Args:
        is_locked: Whether it is; see `autoprune.locks.hold`.
        folder: The run.
    """
    if not is_locked:
        say(
            f"{folder.root}: this system or its file system has no locks; let no "
            f"second command work on this run"
        )


@contextmanager
def hold_run(run: str) -> Iterator[Job]:
    """An existing run; no other process gets at it in the block.

    Args:
        run: Its folder.

    Yields:
        The run.

    Raises:
        UserError: If it is none, another process works on it, or its sparse training
            isn't done.
    """
    with held(RunFolder.open(run), "run"):
        yield open_run(run)


@contextmanager
def hold_place_of(path: Path) -> Iterator[None]:
    """Holds the run folder that a file is to be written into, if it is one.

    Args:
        path: The file.

    Raises:
        UserError: If another process works on that run.
    """
    folder = RunFolder(path.parent)
    # Other programs call their files config.yaml too.
    is_run = folder.config.is_file() and "search" in folder.read_config()
    with held(folder, "out") if is_run else nullcontext():
        yield
