"""How a script that takes images or networks is run, and where it keeps its runs."""

import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from autoprune.errors import UserError, in_one_line
from autoprune.runs import RunFolder, file_stem


def run_folder(root: Path, values: Iterable[object]) -> RunFolder:
    """The folder of one cell of a table; it needn't be there.

    Args:
        root: The folder of all of them.
        values: What tells the cell from the others.
    """
    return RunFolder(root / file_stem(*map(str, values)))


def finished_run(folder: RunFolder, options: Mapping[str, object]) -> RunFolder:
    """A run of the command line, as a user would start it.

    One that is there already is gone on with: a finished one changes nothing.

    Args:
        folder: Where it is kept.
        options: Of `autoprune run`, without the dashes.

    Returns:
        The folder.

    Raises:
        UserError: If the run fails; what it printed has been shown.
    """
    arguments = ["run", "--out", str(folder.root)]
    if folder.config.exists():
        arguments.append("--resume")
    for name, value in options.items():
        arguments.append(f"--{name}={value}")
    folder.root.parent.mkdir(parents=True, exist_ok=True)
    autoprune(*arguments)
    return folder


def autoprune(*arguments: str) -> None:
    """Runs the command line in a process of its own.

    Args:
        *arguments: Of the command `autoprune`.

    Raises:
        UserError: If it fails; what it printed has been shown.
    """
    command = [sys.executable, "-m", "autoprune", *arguments]
    if subprocess.run(command).returncode:
        raise UserError(None, f"failed: {' '.join(command)}")


def run(main: Callable[[], None]) -> None:
    """Runs a script's `main`.

    What a user can mend is one line on stderr and exit code 2, like the usage errors of
    argparse.
    """
    try:
        main()
    except (UserError, OSError) as error:
        script = Path(sys.argv[0]).name
        message = in_one_line(error, "--{}".format)
        print(f"{script}: error: {message}", file=sys.stderr)
        sys.exit(2)
