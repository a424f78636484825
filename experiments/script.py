"""How a script that takes images or networks is run from a shell."""

import sys
from collections.abc import Callable
from pathlib import Path

from autoprune.errors import UserError


def run(main: Callable[[], None]) -> None:
    """Runs a script's `main`; a user's error is one line and exit code 2, like the usage errors of argparse."""
    try:
        main()
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
