"""How much of a cut depth, width and input size should take: accuracy fitted to
measured points, and its best point.

Wang et al., "Accelerate CNNs from Three Dimensions" (ICML 2021): accuracy is a
polynomial F of the three, cost is `depth x width^2 x resolution^2`, and the network to
prune to is where F is largest at the cost wanted. Numbers only;
`autoprune.scaling.depth`, pruning and `autoprune.scaling.resolution` make the network.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import astuple, dataclass

import numpy as np

from autoprune.errors import UserError, check_known

EXPONENTS = {"depth": 1, "width": 2, "resolution": 2}
"""Dimension to the power with which it enters the cost of a network of convolutions."""
# Small enough to leave noise-free points fitted to 1e-8; it keeps factors of a product
# from drifting apart.
RIDGE = 1e-12
MAX_SWEEPS, CONVERGED = 1000, 1e-12
# Each round keeps a sixteenth of the range; ten leave 1e-12 of it.
STEPS, ROUNDS = np.linspace(0, 1, 33), 10

Accuracy = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""Depth, width and resolution, arrays of one shape, to what is to be maximised."""
Bounds = Mapping[str, tuple[float, float]]
"""Dimension to its lowest and highest share."""


@dataclass(frozen=True)
class Shares:
    """The size of a network relative to the dense one, each in (0, 1].

    Attributes:
        depth: Share of the layers.
        width: Share of each layer's channels.
        resolution: Share of the input's height, and of its width.

    Raises:
        UserError: If a share is outside (0, 1].
    """

    depth: float
    width: float
    resolution: float

    def __post_init__(self):
        for dimension in EXPONENTS:
            _check_share(dimension, getattr(self, dimension))

    @property
    def cost(self) -> float:
        """MACs relative to the dense network, after the paper's rule: depth x width^2 x
        resolution^2.
        """
        return math.prod(
            getattr(self, dimension) ** power for dimension, power in EXPONENTS.items()
        )


@dataclass(frozen=True)
class Point(Shares):
    """A network of these shares and its accuracy, measured or predicted."""

    accuracy: float


@dataclass(frozen=True, eq=False)
class AccuracyModel:
    """A sum of products of one polynomial for each dimension: a low-rank form of the
    paper's coefficient tensor.

    Attributes:
        coefficients: Of the powers 0 to `degree` of each dimension in each product,
            `(rank, 3, degree + 1)`.
    """

    coefficients: np.ndarray

    @classmethod
    def fit(
        cls, points: Sequence[Point], degree: int = 3, rank: int = 1
    ) -> "AccuracyModel":
        """The model with the least squared error on `points`, by alternating least
        squares.

        With two dimensions fixed the coefficients of the third one are a linear
        problem; the three are solved in turns until the predictions rest. Nothing is
        drawn at random. We couldn't verify the paper's degree, rank, way of fitting and
        number of points; ours has to be given as many points as there are free
        coefficients.

        Args:
            points: Measured networks.
            degree: Of each polynomial, 1 or more.
            rank: How many products are summed, 1 or more.

        Raises:
            UserError: If `degree` or `rank` is out of range, or `points` are fewer than
                the free coefficients or have fewer different values in a dimension than
                a polynomial has coefficients.
        """
        _check_fit(points, degree, rank)
        *shares, accuracy = np.array([astuple(point) for point in points]).T
        powers = [_powers(values, degree) for values in shares]
        coefficients = np.zeros((0, len(EXPONENTS), degree + 1))
        for _ in range(rank):
            # Products that all start at once end in worse fits; so each starts with
            # what those before leave.
            product = np.eye(1, degree + 1)[None].repeat(len(EXPONENTS), 1)
            product = _settled(
                product, powers, accuracy - _predicted(coefficients, powers)
            )
            coefficients = _settled(
                np.concatenate([coefficients, product]), powers, accuracy
            )
        return cls(coefficients)

    def __call__(
        self, depth: np.ndarray, width: np.ndarray, resolution: np.ndarray
    ) -> np.ndarray:
        """The predicted accuracy, of the arguments' shape; outside the measured range
        it means nothing.
        """
        degree = self.coefficients.shape[-1] - 1
        powers = [_powers(values, degree) for values in (depth, width, resolution)]
        return _predicted(self.coefficients, powers)

    def mean_absolute_error(self, points: Sequence[Point]) -> float:
        """Mean distance between predicted and measured accuracy; honest for points that
        `fit` hasn't seen.
        """
        *shares, accuracy = np.array([astuple(point) for point in points]).T
        return float(np.abs(self(*shares) - accuracy).mean())


def _powers(values: np.ndarray, degree: int) -> np.ndarray:
    return np.asarray(values, float)[..., None] ** np.arange(degree + 1)


def _factors(
    powers: Sequence[np.ndarray], coefficients: np.ndarray
) -> list[np.ndarray]:
    """For each dimension its polynomial in each product, `(..., rank)`."""
    return [powers[axis] @ coefficients[:, axis].T for axis in range(len(EXPONENTS))]


def _predicted(coefficients: np.ndarray, powers: Sequence[np.ndarray]) -> np.ndarray:
    return np.prod(_factors(powers, coefficients), axis=0).sum(-1)


def _settled(
    coefficients: np.ndarray, powers: Sequence[np.ndarray], target: np.ndarray
) -> np.ndarray:
    """Coefficients that fit the target, from where they are: each dimension's in turn,
    until the predictions rest.
    """
    rank, n_axes, size = coefficients.shape
    coefficients, before = coefficients.copy(), np.inf
    padded = np.append(target, np.zeros(rank * size))
    for _ in range(MAX_SWEEPS):
        for axis in range(n_axes):
            factors = _factors(powers, coefficients)
            others = factors[axis - 1] * factors[axis - 2]
            design = (others[:, :, None] * powers[axis][:, None]).reshape(
                len(target), -1
            )
            rows = np.vstack([design, RIDGE**0.5 * np.eye(rank * size)])
            coefficients[:, axis] = np.linalg.lstsq(rows, padded, rcond=None)[
                0
            ].reshape(rank, size)
        predicted = _predicted(coefficients, powers)
        if np.abs(predicted - before).max() < CONVERGED:
            break
        before = predicted
    return coefficients


def _check_fit(points: Sequence[Point], degree: int, rank: int) -> None:
    if degree < 1:
        raise UserError(
            "degree", f"must be 1 or more, got {degree}; the usual one is 3"
        )
    if rank < 1:
        raise UserError("rank", f"must be 1 or more, got {rank}; the usual one is 1")
    needed = rank * (
        3 * degree + 1
    )  # two of the three polynomials of a product can be scaled freely
    if len(points) < needed:
        raise UserError(
            "points",
            f"degree {degree} and rank {rank} need {needed} or more, got "
            f"{len(points)}; "
            "measure more networks or take a lower degree",
        )
    for dimension in EXPONENTS:
        n_values = len({getattr(point, dimension) for point in points})
        if n_values <= degree:
            raise UserError(
                "points",
                f"degree {degree} needs {degree + 1} or more different values "
                f"of {dimension}, got {n_values}; "
                f"measure networks of other {dimension} or take a lower degree",
            )


def measured_bounds(points: Sequence[Point]) -> dict[str, tuple[float, float]]:
    """The range of each dimension in which `points` lie, for `optimum`: beyond it a fit
    says nothing.
    """
    values = {
        dimension: [getattr(point, dimension) for point in points]
        for dimension in EXPONENTS
    }
    return {
        dimension: (min(shares), max(shares)) for dimension, shares in values.items()
    }


def optimum(value: Accuracy, cost_share: float, bounds: Bounds) -> Point:
    """The shares of largest `value` among those that cost exactly `cost_share`, with
    that value as `accuracy`.

    The paper's condition `d F_d = w F_w / 2 = r F_r / 2` holds inside the bounds, at a
    bound as an inequality. We don't solve it, since a polynomial may meet it at a
    minimum as well: in logarithms the cost is a plane, so two dimensions are free, and
    for each resolution the best width is found, then the resolution. Both times a grid
    over the whole range counts, then finer ones around its best point. Shares are good
    to about 1e-7, where values no longer differ.

    Args:
        value: An `AccuracyModel`, or any function of arrays.
        cost_share: Cost relative to the dense network, in (0, 1]; it is met to 1e-9.
        bounds: For each of "depth", "width" and "resolution", within (0, 1];
            `measured_bounds` gives those of points.

    Raises:
        UserError: If an argument is out of range or `cost_share` can't be reached
            within `bounds`.
    """
    _check_share("cost_share", cost_share)
    _check_bounds(bounds)
    lows, highs = np.array([bounds[dimension] for dimension in EXPONENTS]).T
    _check_reachable(cost_share, lows, highs)
    (low_d, low_w, low_r), (high_d, high_w, high_r), total = (
        np.log(lows),
        np.log(highs),
        math.log(cost_share),
    )

    def shares(width: np.ndarray, resolution: np.ndarray) -> np.ndarray:
        """From logarithms to the three shares, the depth being what the cost leaves."""
        return np.exp(np.stack([total - 2 * (width + resolution), width, resolution]))

    def best_width(resolution: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        left = total / 2 - resolution
        low, high = (
            np.maximum(low_w, left - high_d / 2),
            np.minimum(high_w, left - low_d / 2),
        )
        return _maximum(
            lambda w: value(
                *shares(w, np.broadcast_to(resolution[..., None], w.shape))
            ),
            low,
            high,
        )

    low, high = (
        max(low_r, (total - high_d) / 2 - high_w),
        min(high_r, (total - low_d) / 2 - low_w),
    )
    resolution, _ = _maximum(lambda r: best_width(r)[1], np.array(low), np.array(high))
    width, _ = best_width(resolution)
    # A logarithm and back may end a rounding error outside the bounds.
    found = np.clip(shares(width, resolution), lows, highs)
    return Point(*map(float, found), accuracy=float(value(*found)))


def _maximum(
    value: Callable[[np.ndarray], np.ndarray], low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Where each row's function is largest from `low` to `high`, and its value there;
    `value` takes `(..., n)`.
    """
    for _ in range(ROUNDS):
        grid = low[..., None] + (high - low)[..., None] * STEPS
        values = value(grid)
        best = values.argmax(-1)[..., None]
        before, after = (np.clip(best + step, 0, len(STEPS) - 1) for step in (-1, 1))
        low, high = (
            np.take_along_axis(grid, index, -1)[..., 0] for index in (before, after)
        )
    return np.take_along_axis(grid, best, -1)[..., 0], np.take_along_axis(
        values, best, -1
    )[..., 0]


def along(dimension: str, cost_share: float) -> Shares:
    """The network of `cost_share` that is cut in one dimension alone.

    Args:
        dimension: "depth", "width" or "resolution".
        cost_share: Cost relative to the dense network, in (0, 1].

    Raises:
        UserError: If the dimension isn't known or the share out of range.
    """
    check_known("dimension", dimension, EXPONENTS)
    return together((dimension,), cost_share)


def together(dimensions: Collection[str], cost_share: float) -> Shares:
    """The network of `cost_share` to which some dimensions contribute equally, in
    logarithms of the cost.

    Args:
        dimensions: One or more of "depth", "width" and "resolution".
        cost_share: Cost relative to the dense network, in (0, 1].

    Raises:
        UserError: If the share is out of range.
    """
    _check_share("cost_share", cost_share)
    part = cost_share ** (1 / len(dimensions))
    return Shares(
        *(
            part ** (1 / power) if name in dimensions else 1.0
            for name, power in EXPONENTS.items()
        )
    )


def _check_share(name: str, share: float) -> None:
    if not 0 < share <= 1:
        raise UserError(
            name, f"must be in (0, 1], relative to the dense network, got {share}"
        )


def _check_bounds(bounds: Bounds) -> None:
    for dimension in EXPONENTS:
        if dimension not in bounds:
            raise UserError(
                "bounds",
                f"no {dimension}; give {', '.join(EXPONENTS)}, each as (low, "
                f"high) in (0, 1]",
            )
        low, high = bounds[dimension]
        if not 0 < low <= high <= 1:
            raise UserError(
                "bounds",
                f"{dimension} must be 0 < low <= high <= 1, got {low} to "
                f"{high}; give other shares",
            )


def _check_reachable(cost_share: float, lows: np.ndarray, highs: np.ndarray) -> None:
    powers = list(EXPONENTS.values())
    least, most = np.prod(lows**powers), np.prod(highs**powers)
    if not least * (1 - 1e-12) <= cost_share <= most * (1 + 1e-12):
        raise UserError(
            "cost_share",
            f"{cost_share:.4g} can't be met within the bounds, which allow "
            f"{least:.4g} to {most:.4g}; "
            "widen the bounds",
        )
