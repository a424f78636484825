"""How a script that takes images or networks is run from a shell."""

import sys
from collections.abc import Callable
from pathlib import Path

from autoprune.errors import UserError, in_one_line


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
