"""Where functions that fall cross zero, many at once."""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

Functions: TypeAlias = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Many functions of one number each, of which any can be evaluated at once.

Called with x `(m,)` and with the numbers of the functions to evaluate there, `(m,)`, it
answers with values `(m,)`.
"""


def least_roots(
    functions: Functions, low: np.ndarray, high: np.ndarray, tolerance: float = 2**-20
) -> np.ndarray:
    """Finds for each of n falling functions the least x at which it is 0 or less.

    A parabola through three points guesses, two more values tell whether it was right,
    and where it wasn't, bisection finds the place. So functions that are parabolas near
    their root take 5 values instead of 20.

    Args:
        functions: The functions; they fall over their brackets.
        low: Where each bracket begins, `(n,)`.
        high: Where it ends, `(n,)`.
        tolerance: How much larger than the least x an answer may be, as a share of the
            bracket.

    Returns:
        The x `(n,)`, within [low, high]; `high` where a function is above 0 everywhere.
    """
    margin = tolerance * (high - low) / 2
    guess = _guess_by_parabola(functions, low, high)
    # The guess is right if the function is still above 0 just before it and no longer
    # just after; the point after it is the answer, since there the budget is met.
    before = np.clip(guess - margin, low, high)
    after = np.clip(guess + margin, low, high)
    values_before, values_after = _evaluate_at(functions, before, after)
    is_wrong = (values_before <= 0) | (values_after > 0)
    missed = np.flatnonzero(is_wrong)

    def evaluate_missed(x: np.ndarray) -> np.ndarray:
        return functions(x, missed)

    roots = after
    roots[missed] = _bisect(evaluate_missed, low[missed], high[missed], tolerance)
    return roots


def _guess_by_parabola(
    functions: Functions, low: np.ndarray, high: np.ndarray
) -> np.ndarray:
    """The roots of parabolas through three points of each bracket, `(n,)`.

    The points are a bracket's beginning, a quarter and a half of it. They lie in the
    half where the functions fall steeply; costs over sparsities do so in the first.
    """
    quarter = (high - low) / 4
    first, second, third = _evaluate_at(
        functions, low, low + quarter, low + 2 * quarter
    )
    # In quarters t from `low`: bend * t^2 + slope * t + first.
    bend = (third - 2 * second + first) / 2
    slope = second - first - bend
    # The form without cancellation where a parabola is nearly a line: 2c / (-b + sqrt(b
    # ^2 - 4ac)). The functions fall, so `slope` is below 0 and both summands are above.
    # Where the parabola has no root, the maximum takes its lowest point instead.
    depth = np.sqrt(np.maximum(slope**2 - 4 * bend * first, 0)) - slope
    # A function that is flat gives no guess; its bracket's beginning does as well.
    is_falling = depth > 0
    divisor = np.where(is_falling, depth, 1)
    return low + quarter * np.where(is_falling, 2 * first / divisor, 0)


def _evaluate_at(functions: Functions, *points: np.ndarray) -> np.ndarray:
    """The values of all functions at several x each, in one call.

    Args:
        functions: The functions.
        points: One x for each function, `(n,)`, any number of times.

    Returns:
        Values `(n_points, n)`.
    """
    numbers = np.tile(np.arange(len(points[0])), len(points))
    values = functions(np.concatenate(points), numbers)
    return values.reshape(len(points), -1)


def _bisect(
    function: Callable[[np.ndarray], np.ndarray],
    low: np.ndarray,
    high: np.ndarray,
    tolerance: float,
) -> np.ndarray:
    """Halves brackets until each is as short as the tolerance; returns their ends."""
    # Calling a function for no points at all would be wasted time.
    n_halvings = int(np.ceil(-np.log2(tolerance))) if len(low) else 0
    for _ in range(n_halvings):
        middle = (low + high) / 2
        is_above = function(middle) > 0
        low = np.where(is_above, middle, low)
        high = np.where(is_above, high, middle)
    return high
