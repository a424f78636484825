"""How much a command says, and progress as lines where nobody sees a bar."""

import time
from collections.abc import Callable
from contextvars import ContextVar
from enum import IntEnum

from autoprune.reporting.wording import duration_text

SECONDS_BETWEEN_LINES = 30.0
"""Least time between two lines of progress."""


class Verbosity(IntEnum):
    """How much a command says beside its results and errors."""

    QUIET = 0
    """Nothing."""
    NORMAL = 1
    """Progress, and what is worth knowing."""
    VERBOSE = 2
    """Every step, and every stage with its time."""


verbosity: ContextVar[Verbosity] = ContextVar("verbosity", default=Verbosity.NORMAL)
"""Of the command that is running."""


class ProgressLines:
    """Progress as a line now and then, for logs.

    Args:
        title: What is going on.
        total: Steps until it is done.
        write: Gets each line.
        pause: Least seconds between two lines; 0 writes one for each step.
        clock: Seconds since any moment.
    """

    def __init__(
        self,
        title: str,
        total: int,
        write: Callable[[str], None],
        pause: float = SECONDS_BETWEEN_LINES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.title = title
        self.total = total
        self.write = write
        self.pause = pause
        self.clock = clock
        self.done = 0
        self.note = ""
        self.started = clock()
        self.last_line = self.started

    def advance(self, note: str, steps: int = 1) -> None:
        """Goes on, and writes a line if the last one is long ago.

        Args:
            note: What to say beside the count.
            steps: How many steps are done by now, beyond those before.
        """
        self.done += steps
        self.note = note
        now = self.clock()
        # The last step has a line of its own, see `finish`.
        if self.done >= self.total or now - self.last_line < self.pause:
            return
        self.last_line = now
        parts = [f"{self.done}/{self.total}"]
        if self.done:
            left = (now - self.started) / self.done * (self.total - self.done)
            parts.append(f"{duration_text(left)} left")
        if note:
            parts.append(note)
        self.write(f"{self.title}: {', '.join(parts)}")

    def finish(self) -> None:
        """Writes the last line: how it ended, and how long it took."""
        took = duration_text(self.clock() - self.started)
        ended = f"{self.note} " if self.note else ""
        self.write(f"{self.title}: {ended}({self.done}/{self.total} in {took})")
