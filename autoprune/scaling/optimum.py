"""The best depth, width and resolution at a cost, after a model of the accuracy.

The second half of Wang et al., "Accelerate CNNs from Three Dimensions" (ICML 2021);
`autoprune.scaling.accuracy_model` is the first.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from autoprune.errors import UserError
from autoprune.scaling.accuracy_model import EXPONENTS, Point, check_share

# Where a round looks, from 0 for the lowest to 1 for the highest value. Each keeps a
# sixteenth of the range; ten leave 1e-12 of it.
STEPS = np.linspace(0, 1, 33)
ROUNDS = 10

# What the product of bounds may miss a cost by, relatively: rounding, not a reason to
# refuse it.
SLACK = 1e-12

Accuracy = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""Depth, width and resolution, arrays of one shape, to what is to be maximised."""
Bounds = Mapping[str, tuple[float, float]]
"""Dimension to its lowest and highest share."""


def measured_bounds(points: Sequence[Point]) -> dict[str, tuple[float, float]]:
    """The range of each dimension in which `points` lie.

    For `optimum`: beyond it a fit says nothing.
    """
    bounds = {}
    for dimension in EXPONENTS:
        shares = [getattr(point, dimension) for point in points]
        bounds[dimension] = (min(shares), max(shares))
    return bounds


def optimum(value: Accuracy, cost_share: float, bounds: Bounds) -> Point:
    """The shares of largest `value` among those that cost exactly `cost_share`.

    The paper's condition `d F_d = w F_w / 2 = r F_r / 2` holds inside the bounds, at a
    bound as an inequality. We don't solve it, since a polynomial may meet it at a
    minimum as well: in logarithms the cost is a plane, so two dimensions are free, and
    for each resolution the best width is found, then the resolution. Both times a grid
    over the whole range counts, then finer ones around its best point. Shares are good
    to about 1e-7, where values no longer differ.

    For `value = -(1 / depth + 2 / width + 2 / resolution)` and half of the cost the
    three shares are equal: 0.5 ** (1 / 5) = 0.871.

    Args:
        value: An `AccuracyModel`, or any function of arrays.
        cost_share: Cost relative to the dense network, in (0, 1]; it is met to 1e-9.
        bounds: For each of "depth", "width" and "resolution", within (0, 1];
            `measured_bounds` gives those of points.

    Returns:
        The shares, with their value as accuracy.

    Raises:
        UserError: If an argument is out of range or `cost_share` can't be reached
            within `bounds`.
    """
    check_share("cost_share", cost_share)
    _check_bounds(bounds)
    lows, highs = np.array([bounds[dimension] for dimension in EXPONENTS]).T
    _check_reachable(cost_share, lows, highs)
    # From here on width, resolution and cost are logarithms, in which
    # cost = depth + 2 (width + resolution).
    low_depth, low_width, low_resolution = np.log(lows)
    high_depth, high_width, high_resolution = np.log(highs)
    cost = math.log(cost_share)

    def shares(width: np.ndarray, resolution: np.ndarray) -> np.ndarray:
        """The three shares themselves, the depth being what the cost leaves."""
        return np.exp(np.stack([cost - 2 * (width + resolution), width, resolution]))

    def best_width(resolution: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The best width at each resolution, and its value."""

        def value_of(width: np.ndarray) -> np.ndarray:
            # The grid of widths has one axis more than the resolutions.
            fixed = np.broadcast_to(resolution[..., None], width.shape)
            return value(*shares(width, fixed))

        # Left for the width at full depth; the depth's own bounds shift that.
        left = cost / 2 - resolution
        low = np.maximum(low_width, left - high_depth / 2)
        high = np.minimum(high_width, left - low_depth / 2)
        return _maximise(value_of, low, high)

    def value_of_best_width(resolution: np.ndarray) -> np.ndarray:
        return best_width(resolution)[1]

    # Only resolutions at which some depth and width within their bounds meet the cost.
    low = max(low_resolution, (cost - high_depth) / 2 - high_width)
    high = min(high_resolution, (cost - low_depth) / 2 - low_width)
    resolution, _ = _maximise(value_of_best_width, np.array(low), np.array(high))
    width, _ = best_width(resolution)
    # A logarithm and back may end a rounding error outside the bounds.
    best = np.clip(shares(width, resolution), lows, highs)
    depth_share, width_share, resolution_share = map(float, best)
    accuracy = float(value(*best))
    return Point(depth_share, width_share, resolution_share, accuracy=accuracy)


def _maximise(
    value: Callable[[np.ndarray], np.ndarray], low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Where each row's function is largest from `low` to `high`.

    Args:
        value: Takes points `(..., n)`, of which each row is for one function.
        low: The lowest point of each row, `(...)`.
        high: The highest point of each row, `(...)`.

    Returns:
        The best points and their values, `(...)` both.
    """
    grid = low[..., None] + (high - low)[..., None] * STEPS
    values = value(grid)
    best = values.argmax(-1)[..., None]
    for _ in range(ROUNDS - 1):
        # The best point of a finer grid lies between the neighbours of this one's.
        low = _pick(grid, np.clip(best - 1, 0, len(STEPS) - 1))
        high = _pick(grid, np.clip(best + 1, 0, len(STEPS) - 1))
        grid = low[..., None] + (high - low)[..., None] * STEPS
        values = value(grid)
        best = values.argmax(-1)[..., None]
    return _pick(grid, best), _pick(values, best)


def _pick(rows: np.ndarray, index: np.ndarray) -> np.ndarray:
    """One entry of each row `(..., n)`, by indices `(..., 1)`."""
    return np.take_along_axis(rows, index, -1)[..., 0]


def _check_bounds(bounds: Bounds) -> None:
    for dimension in EXPONENTS:
        if dimension not in bounds:
            raise UserError(
                "bounds",
                f"no {dimension}; give {', '.join(EXPONENTS)}, "
                f"each as (low, high) in (0, 1]",
            )
        low, high = bounds[dimension]
        if not 0 < low <= high <= 1:
            raise UserError(
                "bounds",
                f"{dimension} must be 0 < low <= high <= 1, "
                f"got {low} to {high}; give other shares",
            )


def _check_reachable(cost_share: float, lows: np.ndarray, highs: np.ndarray) -> None:
    powers = list(EXPONENTS.values())
    least = np.prod(lows**powers)
    most = np.prod(highs**powers)
    if not least * (1 - SLACK) <= cost_share <= most * (1 + SLACK):
        raise UserError(
            "cost_share",
            f"{cost_share:.4g} can't be met within the bounds, "
            f"which allow {least:.4g} to {most:.4g}; widen the bounds",
        )
