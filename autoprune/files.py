"""Files that are whole or not there: atomic writes, and digests of what was written."""

import hashlib
import io
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from autoprune.errors import UserError

PARTIAL = ".partial"
"""What the names of files hold that are still being written."""
WEIGHTS = "weights.safetensors"
"""Name of the file that holds a network's weights."""
PLAN = "plan.json"
"""Name of the file that says what network they are for; written after the weights."""
DIGEST = "weights_sha256"
"""The entry of a plan, or of a policy's description, that says which weights it means.
"""


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a temporary neighbour of a path, then renames it into place.

    Args:
        path: The file to be written; its folder is made where it is missing.
        write: Gets the temporary path, of the same suffix.

    Raises:
        UserError: If the disk is full or the folder can't be written; the temporary
            file is removed.
    """
    # A name that no other writer has: of two at once each renames a whole file.
    writer = f"{os.getpid()}-{secrets.token_hex(4)}"
    partial = path.with_name(f".{path.name}.{writer}{PARTIAL}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        os.replace(partial, path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        if partial.exists():
            partial.unlink()


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint that `torch.load(weights_only=True)` reads, atomically.

    Args:
        path: The file.
        state: Nested plain data and tensors.

    Raises:
        UserError: As `write_atomically`.
    """
    import torch

    # In memory first: on a full disk torch.save itself raises a RuntimeError that names
    # neither file nor reason.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    write_atomically(path, lambda partial: partial.write_bytes(content))


def write_text(path: Path, text: str) -> None:
    """Writes text as UTF-8, atomically.

    Args:
        path: The file.
        text: Its content.

    Raises:
        UserError: As `write_atomically`.
    """
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: object) -> None:
    """Writes plain data as indented JSON, atomically.

    Args:
        path: The file.
        value: What it shall hold.

    Raises:
        UserError: As `write_atomically`.
    """
    write_text(path, json.dumps(value, indent=2) + "\n")


def digest_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal.

    Two files that state one fact can't be replaced at one moment: a kill may come in
    between. So the one that is written last holds the digest of the other, and whoever
    reads them finds out whether they belong together.

    Args:
        path: The file.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unwritable(path: Path, error: OSError) -> UserError:
    """The error for a place that can't be written.

    Args:
        path: The file or folder.
        error: What the system says.

    Returns:
        The error, to be raised.
    """
    reason = error.strerror or str(error)
    return UserError(
        None,
        f"can't write {str(path)!r} ({reason}); choose another folder or free some "
        f"space",
    )
