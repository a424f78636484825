"""`python -m autoprune` is the `autoprune` command."""

import sys

from autoprune.errors import PACKAGES_OF_RUN, needs_run_extra


def main() -> int:
    """Runs the command line, or says what it lacks; returns the exit code."""
    try:
        from autoprune.cli.main import main as run_command
    except ModuleNotFoundError as error:
        if error.name not in PACKAGES_OF_RUN:
            raise
        print(f"autoprune: error: {needs_run_extra(error.name)}", file=sys.stderr)
        return 2
    return run_command()


if __name__ == "__main__":
    sys.exit(main())
