"""Child processes of the tests; none outlives the block that it runs in.

However a test ends, by an assertion, its time limit or Ctrl-C, its children are killed.
No child has a limit of its own: on a slow or busy machine it takes as long as it takes,
within pytest's limit for the whole test.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO

import torch

ROOT = Path(__file__).parent.parent

FORKS = multiprocessing.get_context("forkserver")
"""Makes processes as copies of one that has imported a lot and computed nothing.

A copy of a process that has computed may wait for ever for what its threads held.
"""
FORKS.set_forkserver_preload(
    ["pytest", "autoprune.cli.main", "autoprune.agents.search", "torch._dynamo", "cma"]
)


@contextmanager
def started_python(
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    output: int | IO = subprocess.DEVNULL,
) -> Iterator[subprocess.Popen]:
    """Python with these arguments, in the repository's root.

    Args:
        *arguments: Of the interpreter, such as "-c" and a program.
        environment: All variables; None for this process's own.
        output: Where stdout and stderr go, as `subprocess` names it.

    Yields:
        The process, which is killed at the end of the block, with all that it started.
    """
    command = [sys.executable, *arguments]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=output,
        stderr=output,
        text=True,
        # Makes it the head of a group, by which its own children are found.
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            # There is no group any more where the process has ended by itself; macOS
            # says so by refusing permission.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)


def run_python(
    *arguments: str, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess:
    """Runs Python in the repository's root to its end.

    Args:
        *arguments: Of the interpreter, such as "-c" and a program.
        environment: All variables; None for this process's own.

    Returns:
        Its exit code, and what it printed.
    """
    with started_python(
        *arguments, environment=environment, output=subprocess.PIPE
    ) as process:
        stdout, stderr = process.communicate()
    return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)


@contextmanager
def forked(target: Callable[..., None], *arguments: object) -> Iterator[BaseProcess]:
    """A process that calls a function of a module, on one thread as all tests do.

    It starts at once, where a fresh interpreter takes seconds to import torch. It has
    nothing of what fixtures change in this process.

    Args:
        target: What is called.
        *arguments: What it is called with; barriers and pipes have to be of `FORKS`.

    Yields:
        The process, which is killed at the end of the block.
    """
    process = FORKS.Process(target=_on_one_thread, args=(target, *arguments))
    process.daemon = True
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def _on_one_thread(target: Callable[..., None], *arguments: object) -> None:
    torch.set_num_threads(1)
    target(*arguments)


def wait_for_events(
    process: subprocess.Popen, log: Path, event: str, n_events: int
) -> None:
    """Waits until a run has logged so many events, or has ended.

    Args:
        process: The run.
        log: Its log, which it may not have begun yet.
        event: The kind of event.
        n_events: How many.
    """
    marker = f'"event": "{event}"'.encode()
    while process.poll() is None:
        # Counted as bytes: whoever parses the log all the time slows the run down.
        if log.exists() and log.read_bytes().count(marker) >= n_events:
            return
        time.sleep(0.005)
