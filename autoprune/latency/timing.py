"""Networks timed in turns, so that whatever else runs slows all of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autoprune.latency.engine_protocol import Loaded

SECONDS = 1.5
"""Time for all networks of one measurement together."""
WARM_UP = 0.2
"""Share of the time that goes to passes whose seconds don't count."""
MOST_ROUNDS = 1000
"""Passes of each network that are enough however short they are."""


@dataclass(frozen=True)
class Turns:
    """Passes of several networks, taken in turns.

    Attributes:
        seconds: Of each pass, `(n_rounds, n_networks)`.
    """

    seconds: np.ndarray

    @property
    def medians(self) -> np.ndarray:
        """Seconds of a pass, `(n_networks,)`.

        Medians, because now and then a pass is held up by something else.
        """
        return np.median(self.seconds, axis=0)

    @property
    def ratios(self) -> np.ndarray:
        """Time as a share of the first network's in the same round, `(n_networks,)`.

        The median of them: what slows a whole round cancels out.
        """
        return np.median(self.seconds / self.seconds[:, :1], axis=0)


def time_in_turns(loaded: Sequence[Loaded], seconds: float = SECONDS) -> Turns:
    """Times networks in turns until their passes add up to a time.

    Args:
        loaded: The networks, that with which they are compared first.
        seconds: What the passes may take together, warm-up included. A round that takes
            longer than its share is still measured once after one that warms up.

    Returns:
        The rounds after the warm-up, at least one and at most `MOST_ROUNDS`.
    """
    _rounds(loaded, seconds * WARM_UP)
    return Turns(np.array(_rounds(loaded, seconds * (1 - WARM_UP))))


def _rounds(loaded: Sequence[Loaded], seconds: float) -> list[list[float]]:
    """Passes of each network in turns, until they add up to a time."""
    rounds = []
    spent = 0.0
    # Engines' own clocks and no other, since there are engines without one.
    while not rounds or (spent < seconds and len(rounds) < MOST_ROUNDS):
        row = [network.seconds() for network in loaded]
        rounds.append(row)
        spent += sum(row)
    return rounds
