"""How much of a cut should depth, width and input size take?

Wang et al., "Accelerate CNNs from Three Dimensions" (ICML 2021): accuracy is a
polynomial F of the three, cost is `depth x width^2 x resolution^2`, and the network to
prune to is where F is largest at that cost. Here F is fitted to measured networks;
`autoprune.scaling.optimum` looks for its largest value. Numbers only: the network
itself is made by `autoprune.scaling.depth`, `autoprune.structure.slicing` and
`autoprune.scaling.resolution`.
"""

from collections.abc import Collection, Sequence
from dataclasses import astuple, dataclass

import numpy as np

from autoprune.errors import UserError, check_known

EXPONENTS = {"depth": 1, "width": 2, "resolution": 2}
"""Dimension to the power with which it enters the cost of a network of convolutions."""

# Small enough to leave noise-free points fitted to 1e-8; it keeps factors of a product
# from drifting apart.
RIDGE = 1e-12
# A fit rests when a sweep over the dimensions changes no prediction by this much.
CONVERGED = 1e-12
MAX_SWEEPS = 1000


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

    def __post_init__(self) -> None:
        for dimension in EXPONENTS:
            check_share(dimension, getattr(self, dimension))

    @property
    def cost(self) -> float:
        """MACs relative to the dense network, by the paper's rule.

        Half of the layers with half of the channels cost 0.5 x 0.5^2 = 0.125.
        """
        cost = 1.0
        for dimension, power in EXPONENTS.items():
            cost *= getattr(self, dimension) ** power
        return cost


@dataclass(frozen=True)
class Point(Shares):
    """A network of these shares and its accuracy.

    Attributes:
        accuracy: Measured or predicted, in [0, 1].
    """

    accuracy: float


@dataclass(frozen=True, eq=False)
class AccuracyModel:
    """A sum of products of one polynomial for each dimension.

    With one product it is F = p(depth) q(width) r(resolution): a low-rank form of the
    paper's coefficient tensor. With p = 0.5 + 0.4 depth and q = r = 1, a network of
    half the depth has the accuracy 0.7, whatever its width.

    Attributes:
        coefficients: Of the powers 0 to `degree` of each dimension in each product,
            `(rank, 3, degree + 1)`; [[[0.5, 0.4], [1, 0], [1, 0]]] in the example.
    """

    coefficients: np.ndarray

    @classmethod
    def fit(
        cls, points: Sequence[Point], degree: int = 3, rank: int = 1
    ) -> "AccuracyModel":
        """The model with the least squared error on `points`.

        By alternating least squares: with two dimensions fixed, the coefficients of the
        third one are a linear problem; the three are solved in turns until the
        predictions rest. Nothing is drawn at random. We couldn't verify the paper's
        degree, rank, way of fitting and number of points; ours has to be given as many
        points as there are free coefficients.

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
        shares, accuracies = _columns(points)
        powers = [_powers(values, degree) for values in shares]
        coefficients = np.zeros((0, len(EXPONENTS), degree + 1))
        for _ in range(rank):
            # Products that all start at once end in worse fits; so each starts with
            # what those before leave, from polynomials that are 1 everywhere.
            product = np.eye(1, degree + 1)[None].repeat(len(EXPONENTS), 1)
            left = accuracies - _predict(coefficients, powers)
            product = _solve_in_turns(product, powers, left)
            coefficients = np.concatenate([coefficients, product])
            coefficients = _solve_in_turns(coefficients, powers, accuracies)
        return cls(coefficients)

    def __call__(
        self, depth: np.ndarray, width: np.ndarray, resolution: np.ndarray
    ) -> np.ndarray:
        """The predicted accuracy; outside the measured range it means nothing.

        Args:
            depth: Shares, of any shape.
            width: Shares, of the same shape.
            resolution: Shares, of the same shape.

        Returns:
            An array of the arguments' shape.
        """
        # A polynomial of degree 3 has four coefficients.
        degree = self.coefficients.shape[-1] - 1
        powers = [_powers(values, degree) for values in (depth, width, resolution)]
        return _predict(self.coefficients, powers)

    def mean_absolute_error(self, points: Sequence[Point]) -> float:
        """Mean distance between predicted and measured accuracy.

        It is honest for points that `fit` hasn't seen.
        """
        shares, accuracies = _columns(points)
        return float(np.abs(self(*shares) - accuracies).mean())


def _columns(points: Sequence[Point]) -> tuple[list[np.ndarray], np.ndarray]:
    """The points' shares of each dimension and their accuracies, `(n_points,)` each."""
    *shares, accuracies = np.array([astuple(point) for point in points]).T
    return shares, accuracies


def _powers(values: np.ndarray, degree: int) -> np.ndarray:
    """The powers 0 to `degree` of values of any shape, `(..., degree + 1)`."""
    return np.asarray(values, float)[..., None] ** np.arange(degree + 1)


def _factors(
    powers: Sequence[np.ndarray], coefficients: np.ndarray
) -> list[np.ndarray]:
    """For each dimension its polynomial in each product, `(..., rank)`."""
    return [powers[axis] @ coefficients[:, axis].T for axis in range(len(EXPONENTS))]


def _predict(coefficients: np.ndarray, powers: Sequence[np.ndarray]) -> np.ndarray:
    """The sum of the products, `(...)`."""
    return np.prod(_factors(powers, coefficients), axis=0).sum(-1)


def _solve_in_turns(
    coefficients: np.ndarray, powers: Sequence[np.ndarray], target: np.ndarray
) -> np.ndarray:
    """Fits each dimension's coefficients in turn, until the predictions rest.

    Args:
        coefficients: Where the fit starts, `(rank, 3, degree + 1)`.
        powers: Of each dimension, `(n_points, degree + 1)`.
        target: What the sum of products should be, `(n_points,)`.

    Returns:
        The coefficients of the fit.
    """
    coefficients = coefficients.copy()
    predicted_before = np.inf
    for _ in range(MAX_SWEEPS):
        # Each solution uses the ones just found for the dimensions before it.
        for axis in range(len(EXPONENTS)):
            coefficients[:, axis] = _solve_one(coefficients, powers, target, axis)
        predicted = _predict(coefficients, powers)
        if np.abs(predicted - predicted_before).max() < CONVERGED:
            break
        predicted_before = predicted
    return coefficients


def _solve_one(
    coefficients: np.ndarray,
    powers: Sequence[np.ndarray],
    target: np.ndarray,
    axis: int,
) -> np.ndarray:
    """The best coefficients of one dimension while the others stay, `(rank, size)`.

    A point's prediction is linear in them. With width and resolution fixed it is, for
    one product, `q r (p0 + p1 depth + p2 depth^2 + ...)`; so a point's row of the
    linear problem is `q r` times the powers of its depth.
    """
    rank, _, size = coefficients.shape
    factors = _factors(powers, coefficients)
    # Of three axes, those that are one and two before this one are the other two.
    others = factors[axis - 1] * factors[axis - 2]
    design = (others[:, :, None] * powers[axis][:, None]).reshape(len(target), -1)
    # The ridge as further rows that ask for coefficients of zero.
    rows = np.vstack([design, RIDGE**0.5 * np.eye(rank * size)])
    padded = np.append(target, np.zeros(rank * size))
    solution = np.linalg.lstsq(rows, padded, rcond=None)[0]
    return solution.reshape(rank, size)


def shrink_one(dimension: str, cost_share: float) -> Shares:
    """The network of `cost_share` that is cut in one dimension alone.

    At a quarter of the cost half of the width is left.

    Args:
        dimension: "depth", "width" or "resolution".
        cost_share: Cost relative to the dense network, in (0, 1].

    Raises:
        UserError: If the dimension isn't known or the share out of range.
    """
    check_known("dimension", dimension, EXPONENTS)
    return shrink_together((dimension,), cost_share)


def shrink_together(dimensions: Collection[str], cost_share: float) -> Shares:
    """The network of `cost_share` to which some dimensions contribute equally.

    Equally in logarithms of the cost: of a quarter, depth and width each halve it, with
    0.5 of the depth and 0.71 of the width.

    Args:
        dimensions: One or more of "depth", "width" and "resolution".
        cost_share: Cost relative to the dense network, in (0, 1].

    Raises:
        UserError: If the share is out of range.
    """
    check_share("cost_share", cost_share)
    part = cost_share ** (1 / len(dimensions))
    shares = []
    for dimension, power in EXPONENTS.items():
        is_shrunk = dimension in dimensions
        shares.append(part ** (1 / power) if is_shrunk else 1.0)
    return Shares(*shares)


def check_share(name: str, share: float) -> None:
    """Checks that a share is in (0, 1].

    Args:
        name: The argument that holds it, for the message.
        share: Of the dense network.

    Raises:
        UserError: If it is out of range.
    """
    # Not "share <= 0 or share > 1", which NaN would pass.
    if not 0 < share <= 1:
        raise UserError(
            name, f"must be in (0, 1], relative to the dense network, got {share}"
        )


def _check_fit(points: Sequence[Point], degree: int, rank: int) -> None:
    if degree < 1:
        raise UserError(
            "degree", f"must be 1 or more, got {degree}; the usual one is 3"
        )
    if rank < 1:
        raise UserError("rank", f"must be 1 or more, got {rank}; the usual one is 1")
    # Of the 3 (degree + 1) coefficients of a product two aren't free: two of its three
    # polynomials can be scaled at will, if the third makes up for it.
    n_needed = rank * (3 * degree + 1)
    if len(points) < n_needed:
        raise UserError(
            "points",
            f"degree {degree} and rank {rank} need {n_needed} or more, "
            f"got {len(points)}; measure more networks or take a lower degree",
        )
    # As many points on a line as a polynomial has coefficients, or it may be anything
    # between them.
    for dimension in EXPONENTS:
        n_values = len({getattr(point, dimension) for point in points})
        if n_values <= degree:
            raise UserError(
                "points",
                f"degree {degree} needs {degree + 1} or more different values "
                f"of {dimension}, got {n_values}; "
                f"measure networks of other {dimension} or take a lower degree",
            )
