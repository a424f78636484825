"""How a script that takes images or networks is run from a shell."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from autoprune.errors import UserError, unusable_file


def run(main: Callable[[], None]) -> None:
    """Runs a script's `main`; what a user can mend is one line and exit code 2, like the usage errors of argparse."""
    try:
        main()
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        _fail(unusable_file(error))


def _fail(message: str) -> NoReturn:
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(2)
