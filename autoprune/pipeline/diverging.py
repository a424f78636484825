"""What to tell of a training that diverged: the option at fault, and how to go on."""

from collections.abc import Iterator
from contextlib import contextmanager

from autoprune.errors import DivergedError, UserError
from autoprune.runs import RunFolder

MODERATE = 0.01
"""The learning rate to try after one that was far too high."""


@contextmanager
def explained(
    folder: RunFolder, stage: str, others: str = "", command: str | None = None
) -> Iterator[None]:
    """Names the options of a training that diverges in the block.

    Whatever was in the run folder before the training is still there.

    Args:
        folder: The run.
        stage: Stage of the settings that holds the training's rate.
        others: A further option that may be at fault.
        command: What goes on with the run, up to its folder; None for what resumes it.

    Raises:
        UserError: If the training diverged.
    """
    try:
        yield
    except DivergedError as error:
        argument = f"{stage}.lr"
        rate = min(error.rate / 10, MODERATE)
        also = f" (or --{others})" if others else ""
        raise UserError(
            argument,
            f"the training diverged: {error.what} at a rate of {error.rate:g}; nothing "
            f"was overwritten, go on with a lower one{also}: autoprune "
            f"{command or _resuming(folder)} {folder.root} --{argument} {rate:g}",
        ) from error


def _resuming(folder: RunFolder) -> str:
    """The command that resumes a run, up to its folder."""
    options = folder.read_config().get("options", {})
    # `run` would search where an allocation was given that isn't the run's own yet.
    if options.get("allocation") and not folder.allocation.exists():
        return "prune --resume --out"
    return "run --resume --out"
