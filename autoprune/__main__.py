"""`python -m autoprune` is the `autoprune` command."""

import sys

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


def needs_run_extra(package: str) -> str:
    """What to say where a package of the extra `run` is missing.

    Args:
        package: Name of the module that can't be imported.
    """
    return (
        f"the command line needs {package}; install it with: "
        f"pip install 'autoprune[run]'"
    )


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
