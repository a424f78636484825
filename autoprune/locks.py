"""One process at a time works on a run folder: claims, locks, and who holds them."""

import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

from autoprune.errors import UserError
from autoprune.files import PARTIAL, unwritable

if sys.platform == "win32":
    fcntl = None
else:
    import fcntl

LOCK = ".lock"
"""Name of the file in a run folder that its process locks.

It stays when the process ends: a lock belongs to the open file and not to its name, so
removing the name would let two processes in.
"""


def claim(stem: Path) -> Path:
    """Makes a folder that nobody else has: of this name, or with the next number.

    Args:
        stem: The folder's path; where it is taken, "-2", "-3" and so on follow.

    Returns:
        The new folder, empty.
    """
    for number in count(1):
        root = stem if number == 1 else stem.with_name(f"{stem.name}-{number}")
        try:
            # Making it is the claim: of several processes one succeeds. Looking first
            # would let two find the same name free.
            root.mkdir(parents=True)
        except FileExistsError:
            continue
        return root
    raise AssertionError("count never ends")


@contextmanager
def hold(root: Path, argument: str) -> Iterator[bool]:
    """Keeps other processes out of a run folder until the end of the block.

    What an earlier process was killed at writing is removed. The lock of a process that
    has died is gone with it, however it died.

    Args:
        root: The run folder, which is there.
        argument: The argument that it came by, for messages.

    Yields:
        Whether the folder is locked; False where the system has no locks.

    Raises:
        UserError: If another process holds the folder, or it can't be written.
    """
    path = root / LOCK
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise unwritable(path, error) from error
    is_locked = False
    try:
        is_locked = _lock(descriptor, root, argument)
        if is_locked:
            _introduce(descriptor)
            # Nobody else can be writing here by now.
            for partial in root.rglob(f".*{PARTIAL}*"):
                partial.unlink(missing_ok=True)
        yield is_locked
    finally:
        try:
            if is_locked:
                # So that nobody is told of a process that has ended.
                os.ftruncate(descriptor, 0)
        finally:
            if is_locked:
                _unlock(descriptor)
            os.close(descriptor)


def _lock(descriptor: int, root: Path, argument: str) -> bool:
    """Locks an open file; returns whether that is possible here."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            argument,
            f"{str(root)!r} is in use by {_holder(descriptor)}; wait until that has "
            f"ended, or choose another folder",
        ) from error
    except OSError:
        # Some network file systems have no locks.
        return False
    return True


def _unlock(descriptor: int) -> None:
    # By hand and not only by closing: a forked child may hold the file open longer.
    if fcntl is not None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def _introduce(descriptor: int) -> None:
    """Writes into the locked file who holds it."""
    holder = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now().astimezone().isoformat(" ", "seconds"),
    }
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(holder).encode(), 0)


def _holder(descriptor: int) -> str:
    """Who holds a locked file, in words."""
    try:
        holder: dict[str, Any] = json.loads(os.pread(descriptor, 4096, 0))
        pid, host, since = holder["pid"], holder["host"], holder["since"]
    except (ValueError, KeyError, TypeError):
        # It has the lock and is about to write its name.
        return "another process"
    return f"process {pid} on {host} since {since}"
