"""The exceptions that users are meant to see, and the nearest known name for one that
isn't known.
"""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user gave can't be used; the message is one line that names it and
    the next step.

    The command line prints the message and exits with code 2. Library callers can catch
    it like a `ValueError`.
    """


class ExportError(RuntimeError):
    """The network can't be exported so that it computes the same; nothing was written."""


def in_one_line(error: UserError | OSError) -> str:
    """What to tell of something that the user can mend; of a file that can't be used
    its name and the reason.
    """
    if isinstance(error, UserError):
        return str(error)
    where = f" {error.filename!r}" if error.filename else ""
    return f"can't read or write{where} ({error.strerror or error})"


def missing_package(flag: str, what: str, package: str) -> UserError:
    """For something that needs a package which isn't installed."""
    return UserError(
        f"{flag}: {what} needs {package}; install it with: pip install {package}"
    )


def nearest_names(name: str, known: Iterable[str], n: int = 1) -> list[str]:
    """Up to `n` known names that look like `name`, the most similar first; empty where
    none does.
    """
    return difflib.get_close_matches(name, known, n=n)


def check_known(
    kind: str,
    name: str,
    known: Iterable[str],
    flag: str | None = None,
    others: str = "",
) -> None:
    """Raises a `UserError` that offers the nearest name unless `name` is known.

    Args:
        kind: What it names, e.g. "criterion".
        name: As given.
        known: Every name, the usual one first; that is offered where none looks like
            `name`.
        flag: The option it came by, where that isn't called like `kind`.
        others: What else the message allows, after the known names.
    """
    known = list(known)
    if name not in known:
        near = nearest_names(name, known) or known
        listed = ", ".join(known) + others
        raise UserError(
            f"--{flag or kind}: unknown {kind} {name!r}; did you mean {near[0]!r}? "
            f"Known: {listed}"
        )


def check_share(flag: str, share: float) -> None:
    """Raises a `UserError` unless a share is above 0 and at most 1."""
    if not 0 < share <= 1:
        raise UserError(f"--{flag}: must be above 0 and at most 1, got {share:g}")
