"""What reward is usual at a cost, so that rewards of all budgets can be compared."""

import numpy as np


class CostBaseline:
    """What reward is usual at a cost, and how far rewards there lie apart.

    Under a range of budgets rewards differ by more between tight and loose ones than
    within either, and where they are low they lie far apart. Measured from the usual in
    units of its spread all budgets count alike.

    Args:
        costs: Of allocations, `(n,)`.
        rewards: What each earned, `(n,)`.
    """

    def __init__(self, costs: np.ndarray, rewards: np.ndarray) -> None:
        octaves = np.log2(costs)
        # Four more costs for each degree, so that a handful doesn't bend the curve.
        degree = min(2, (len(np.unique(costs)) - 1) // 4)
        self._middle = octaves.mean()
        # Where all costs are equal any unit will do.
        self._unit = max(octaves.std(), 1e-9)
        self._centre = np.polyfit(self._positions(costs), rewards, degree)
        distances = np.abs(rewards - self.centre(costs))
        # A reward that hits the curve exactly must not pull the logarithm down.
        logs = np.log(distances + 0.1 * distances.mean() + 1e-9)
        self._spread = np.polyfit(self._positions(costs), logs, min(1, degree))

    def centre(self, costs: np.ndarray) -> np.ndarray:
        """The usual reward `(n,)`, a parabola in the octaves of cost."""
        return np.polyval(self._centre, self._positions(costs))

    def scale(self, costs: np.ndarray) -> np.ndarray:
        """A typical distance from it `(n,)`, a line in octaves of both."""
        return np.exp(np.polyval(self._spread, self._positions(costs)))

    def to_relative(self, rewards: np.ndarray, costs: np.ndarray) -> np.ndarray:
        """How far above the usual rewards are, in units of the spread.

        Args:
            rewards: Of allocations, `(n,)`.
            costs: Of the same, `(n,)`.
        """
        return (rewards - self.centre(costs)) / self.scale(costs)

    def to_absolute(self, relative: np.ndarray, costs: np.ndarray) -> np.ndarray:
        """The inverse of `to_relative`.

        Args:
            relative: Of allocations, `(n,)`.
            costs: Of the same, `(n,)`.
        """
        return self.centre(costs) + self.scale(costs) * relative

    def _positions(self, costs: np.ndarray) -> np.ndarray:
        """Octaves of cost in standard units, where polynomials are well-conditioned."""
        return (np.log2(costs) - self._middle) / self._unit
