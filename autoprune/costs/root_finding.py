"""Where functions that fall cross zero, many at once."""

from collections.abc import Callable

import numpy as np

Function = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Values `(n,)` of some of the functions at x `(n,)`: the x, and the numbers of the
functions, `(n,)`.
"""


def least_roots(
    function: Function, low: np.ndarray, high: np.ndarray, tolerance: float = 2**-20
) -> np.ndarray:
    """The least x `(n,)` within [low, high] at which falling functions are 0 or less;
    `high` where they are nowhere.

    A parabola through three points guesses, two more values tell whether it was right,
    and where it wasn't, bisection finds the place. So functions that are parabolas near
    their root take 5 values instead of 20.

    Args:
        function: The functions.
        low: Where each bracket begins, `(n,)`.
        high: Where it ends, `(n,)`.
        tolerance: How much larger than the least x an answer may be, as a share of the
            bracket.
    """
    margin, guess = tolerance * (high - low) / 2, _by_parabola(function, low, high)
    left, right = (np.clip(guess + by, low, high) for by in (-margin, margin))
    at_left, at_right = _at_once(function, left, right)
    missed = np.flatnonzero((at_left <= 0) | (at_right > 0))
    right[missed] = _by_bisection(
        lambda x: function(x, missed), low[missed], high[missed], tolerance
    )
    return right


def _by_parabola(function: Function, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Roots of the parabolas through the values at a bracket's beginning, a quarter and
    a half of it.
    """
    quarter = (high - low) / 4
    first, second, third = _at_once(function, low, low + quarter, low + 2 * quarter)
    bend = (third - 2 * second + first) / 2
    slope = second - first - bend
    # The form without cancellation where a parabola is nearly a line; the functions
    # fall, so `slope` is below 0.
    depth = np.sqrt(np.maximum(slope**2 - 4 * bend * first, 0)) - slope
    return low + quarter * np.where(
        depth > 0, 2 * first / np.where(depth > 0, depth, 1), 0
    )


def _at_once(function: Function, *points: np.ndarray) -> np.ndarray:
    """The values `(n_points, n)` of all functions at several x each."""
    values = function(
        np.concatenate(points), np.tile(np.arange(len(points[0])), len(points))
    )
    return values.reshape(len(points), -1)


def _by_bisection(
    function: Callable[[np.ndarray], np.ndarray],
    low: np.ndarray,
    high: np.ndarray,
    tolerance: float,
) -> np.ndarray:
    for _ in range(int(np.ceil(-np.log2(tolerance))) if len(low) else 0):
        middle = (low + high) / 2
        is_above = function(middle) > 0
        low, high = np.where(is_above, middle, low), np.where(is_above, high, middle)
    return high
