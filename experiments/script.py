"""How a script that takes images or networks is run from a shell."""

import sys
from collections.abc import Callable
from pathlib import Path

from autoprune.errors import UserError, in_one_line


def run(main: Callable[[], None]) -> None:
    """Runs a script's `main`; what a user can mend is one line and exit code 2, like
    the usage errors of argparse.
    """
    try:
        main()
    except (UserError, OSError) as error:
        print(
            f"{Path(sys.argv[0]).name}: error: {in_one_line(error, '--{}'.format)}",
            file=sys.stderr,
        )
        sys.exit(2)
