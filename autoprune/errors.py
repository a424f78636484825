"""The exceptions that callers are meant to see, and helpers that word them alike.

Messages name arguments as a caller of the library knows them. The command line turns
these names into its flags, see `autoprune.cli.main`.
"""

import difflib
from collections.abc import Callable, Iterable

PACKAGES_OF_RUN = (
    "gymnasium",
    "jinja2",
    "jsonargparse",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "rich",
    "stable_baselines3",
    "tensorboard",
)
"""What the extra `run` installs: the command needs it, tracing and pruning don't."""


class UserError(ValueError):
    """An argument can't be used; the message names it, the reason and the next step.

    The command line prints one line and exits with code 2.

    Args:
        argument: The argument at fault, such as "budget", or "proxy.images" for a field
            of a stage's settings; None where the reason says it all.
        reason: What is wrong: the allowed range, the value received, the next step.

    Attributes:
        argument: See above.
        reason: See above.
    """

    def __init__(self, argument: str | None, reason: str):
        super().__init__(reason if argument is None else f"{argument}: {reason}")
        self.argument = argument
        self.reason = reason


class DivergedError(UserError):
    """A training led to numbers that aren't finite, and was stopped.

    Args:
        what: What isn't finite, and when.
        rate: The highest learning rate of the training.

    Attributes:
        what: See above.
        rate: See above.
    """

    def __init__(self, what: str, rate: float):
        super().__init__(
            "lr", f"the training diverged: {what}; lower the rate, which was {rate:g}"
        )
        self.what = what
        self.rate = rate


class ExportError(RuntimeError):
    """The network can't be exported so that it computes the same.

    Nothing was written.
    """


def missing_package(argument: str, what: str, package: str) -> UserError:
    """The error for something that needs a package which isn't installed.

    Args:
        argument: The argument that asked for it.
        what: What needs the package.
        package: Its name for pip.

    Returns:
        The error, to be raised.
    """
    return UserError(
        argument, f"{what} needs {package}; install it with: pip install {package}"
    )


def nearest_names(name: str, known: Iterable[str], n: int = 1) -> list[str]:
    """Known names that look like a given one.

    Args:
        name: As given.
        known: All known names.
        n: How many to return at most.

    Returns:
        Up to `n` names, the most similar first; empty where none is similar.
    """
    return difflib.get_close_matches(name, known, n=n)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question after the nearest known name, to stand within a message.

    Args:
        name: As given.
        known: All known names.

    Returns:
        " did you mean 'macs'?", or nothing where none is similar.
    """
    return "".join(f" did you mean {near!r}?" for near in nearest_names(name, known))


def check_known(
    kind: str,
    name: str,
    known: Iterable[str],
    argument: str | None = None,
    others: str = "",
) -> None:
    """Checks that a name is known.

    Args:
        kind: What it names, e.g. "criterion".
        name: As given.
        known: Every name, the default first; that is offered where none looks like
            `name`.
        argument: The argument that it came by, where that isn't called like `kind`.
        others: What else the message allows, after the known names.

    Raises:
        UserError: If it isn't; the message offers the nearest name.
    """
    names = list(known)
    if name in names:
        return
    similar = nearest_names(name, names) or names
    listed = ", ".join(names) + others
    raise UserError(
        argument or kind,
        f"unknown {kind} {name!r}; did you mean {similar[0]!r}? Known: {listed}",
    )


def check_share(argument: str, share: float) -> None:
    """Checks that a share is above 0 and at most 1.

    Args:
        argument: The argument that holds it.
        share: Its value.

    Raises:
        UserError: If it isn't.
    """
    if not 0 < share <= 1:
        raise UserError(argument, f"must be above 0 and at most 1, got {share:g}")


def in_one_line(error: UserError | OSError, name_of: Callable[[str], str] = str) -> str:
    """What to tell of something that the user can mend.

    Args:
        error: A user's error, or that a file can't be used.
        name_of: From an argument's name to what this user calls it, such as a flag.

    Returns:
        The message; of a file that can't be used its name and the reason.
    """
    if isinstance(error, UserError):
        if error.argument is None:
            return error.reason
        return f"{name_of(error.argument)}: {error.reason}"
    where = f" {error.filename!r}" if error.filename else ""
    return f"can't read or write{where} ({error.strerror or error})"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, empty where it has none.

    Args:
        error: Whatever a library raised; its message may be a page.
    """
    return (str(error).splitlines() or [""])[0]


def needs_run_extra(package: str) -> str:
    """What to say where a package of the extra `run` is missing.

    Args:
        package: Name of the module that can't be imported.
    """
    return (
        f"the command line needs {package}; install it with: pip install '.[run]' "
        f"in a copy of the repository"
    )
