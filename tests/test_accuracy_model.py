"""The best depth, width and resolution at a cost: closed forms, the paper's optimality
condition, fits that recover.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoprune.errors import UserError
from autoprune.scaling.accuracy_model import (
    EXPONENTS,
    AccuracyModel,
    Point,
    Shares,
    shrink_one,
)
from autoprune.scaling.optimum import measured_bounds, optimum

WIDE = dict.fromkeys(EXPONENTS, (0.02, 1.0))
POWERS = np.array(list(EXPONENTS.values()))
shares = st.floats(0.1, 1.0)
weights = st.floats(0.1, 10.0)


def penalty(a: float, b: float, c: float):
    """The accuracy of papers.md 3.10 whose optimum is known: -(A/d + B/w + C/r)."""
    return lambda depth, width, resolution: -(a / depth + b / width + c / resolution)


def known_optimum(a: float, b: float, c: float, cost: float) -> np.ndarray:
    """A/s, B/2s and C/2s, from d F_d = w F_w / 2 = r F_r / 2 = s."""
    s = (a * b**2 * c**2 / (16 * cost)) ** 0.2
    return np.array([a / s, b / (2 * s), c / (2 * s)])


def sizes(point: Shares) -> np.ndarray:
    return np.array([point.depth, point.width, point.resolution])


def saturating(depth, width, resolution):
    """A product of cubics that rise to 0.93 and flatten, as accuracies do."""
    losses = (
        0.1 * (1 - depth) + 0.2 * (1 - depth) ** 3,
        0.3 * (1 - width) ** 2,
        0.4 * (1 - resolution) ** 3,
    )
    return 0.93 * np.prod([1 - loss for loss in losses], axis=0)


def scattered(n: int, seed: int = 0, truth=saturating) -> list[Point]:
    """Points without noise at random shares."""
    return [
        Point(*size, truth(*size))
        for size in np.random.default_rng(seed).uniform(0.35, 1, (n, 3)).tolist()
    ]


def lines(truth=saturating) -> list[Point]:
    """Points as cutting each dimension alone gives them, and two that are cut in
    several.
    """
    cut = [
        [share if axis == i else 1.0 for i in range(3)]
        for axis in range(3)
        for share in (0.8, 0.6, 0.4)
    ]
    return [
        Point(*size, truth(*size))
        for size in ([1.0, 1.0, 1.0], *cut, [0.7, 0.7, 1.0], [0.5, 0.8, 0.9])
    ]


@pytest.mark.parametrize(
    "case",
    [
        (1, 2, 2, 0.5),
        (0.3, 1, 0.7, 0.1),
        (5, 9, 8, 0.3),
        (2, 3, 2, 0.05),
        (0.01, 0.02, 0.015, 0.2),
    ],
)
def test_the_optimum_is_the_closed_form(case):
    *weight, cost = case
    expected = known_optimum(*weight, cost)
    assert (expected < 1).all(), "the closed form holds inside the bounds"
    found = optimum(penalty(*weight), cost, WIDE)
    np.testing.assert_allclose(sizes(found), expected, rtol=0, atol=1e-6)
    assert found.accuracy == penalty(*weight)(*sizes(found))


@settings(max_examples=40)
@given(
    st.tuples(weights, weights, weights),
    st.tuples(shares, shares, shares),
    st.tuples(shares, shares, shares),
    shares,
)
def test_the_cost_is_met_within_the_bounds_and_no_feasible_change_helps(
    weight, one, other, position
):
    lows, highs = np.minimum(one, other), np.maximum(one, other)
    least, most = np.prod(lows**POWERS), np.prod(highs**POWERS)
    cost = least * (most / least) ** position
    found = sizes(
        optimum(
            penalty(*weight),
            cost,
            dict(zip(EXPONENTS, zip(lows, highs, strict=True), strict=True)),
        )
    )
    assert abs(np.prod(found**POWERS) - cost) < 1e-9
    assert (lows <= found).all()
    assert (found <= highs).all()
    # Growing i and shrinking j at equal cost helps where i's gain a unit of cost is the
    # larger one: KKT forbids it.
    gains = np.array(weight) / found / POWERS
    can_grow, can_shrink = found < highs - 1e-6, found > lows + 1e-6
    for i in range(3):
        for j in range(3):
            if can_grow[i] and can_shrink[j]:
                assert gains[i] <= gains[j] + 1e-4 * gains.max()


def test_at_a_bound_the_condition_is_an_inequality():
    weight, cost = (1.0, 1.0, 3.0), 0.2
    assert known_optimum(*weight, cost)[2] > 1
    found = sizes(optimum(penalty(*weight), cost, WIDE))
    gains = np.array(weight) / found / POWERS
    assert found[2] == 1
    assert gains[2] > gains[0] * 1.01
    assert gains[0] == pytest.approx(gains[1], rel=1e-5)


def test_the_better_of_two_hills_is_found():
    def hills(depth, width, resolution):
        return np.exp(-200 * np.log(width / 0.6) ** 2) + 1.1 * np.exp(
            -200 * np.log(width / 0.9) ** 2
        )

    for high, expected in ((1.0, 0.9), (0.7, 0.6)):
        assert optimum(
            hills, 0.2, WIDE | {"width": (0.3, high)}
        ).width == pytest.approx(expected, abs=1e-6)


def test_with_two_dimensions_held_the_third_is_what_the_cost_leaves():
    bounds = {"depth": (0.1, 1.0), "width": (0.5, 0.5), "resolution": (0.8, 0.8)}
    found = optimum(penalty(1, 1, 1), 0.08, bounds)
    np.testing.assert_allclose(sizes(found), [0.5, 0.5, 0.8], rtol=1e-12)


@pytest.mark.parametrize("extreme", [0, 1])
def test_the_cheapest_and_the_dearest_corner_can_be_asked_for(extreme):
    bounds = {"depth": (0.3, 0.9), "width": (0.4, 0.7), "resolution": (0.6, 1.0)}
    corner = np.array([bounds[dimension][extreme] for dimension in EXPONENTS])
    found = optimum(penalty(1, 2, 3), float(np.prod(corner**POWERS)), bounds)
    np.testing.assert_allclose(sizes(found), corner, rtol=1e-9)


@pytest.mark.parametrize(
    "points", [lines(), scattered(12), scattered(30)], ids=["lines", "12", "30"]
)
def test_a_fit_to_points_without_noise_predicts_the_others(points):
    model = AccuracyModel.fit(points)
    assert model.mean_absolute_error(points) < 1e-8
    assert model.mean_absolute_error(scattered(200, seed=1)) < 1e-6


def test_a_second_product_fits_what_one_cannot():
    def truth(depth, width, resolution):
        return (
            saturating(depth, width, resolution)
            - 0.2 * (1 - depth) * (1 - width) * resolution
        )

    points, others = scattered(40, truth=truth), scattered(200, seed=1, truth=truth)
    one, two = (AccuracyModel.fit(points, rank=rank) for rank in (1, 2))
    assert (
        one.mean_absolute_error(others) > 1e-3 > 100 * two.mean_absolute_error(others)
    )
    noisy = [
        Point(*sizes(p), p.accuracy + 0.01 * (-1) ** i) for i, p in enumerate(points)
    ]
    squares = [
        sum_of_squares(AccuracyModel.fit(noisy, rank=rank), noisy) for rank in (1, 2)
    ]
    assert squares[1] < squares[0]


def sum_of_squares(model: AccuracyModel, points: list[Point]) -> float:
    return sum((float(model(*sizes(point))) - point.accuracy) ** 2 for point in points)


def test_a_noisy_fit_is_where_no_dimension_alone_can_do_better():
    noise = np.random.default_rng(2).normal(0, 0.003, 25)
    points = [
        Point(*sizes(p), p.accuracy + error)
        for p, error in zip(scattered(25), noise, strict=True)
    ]
    coefficients = AccuracyModel.fit(points).coefficients
    x, y = (
        np.array([sizes(point) for point in points]),
        np.array([point.accuracy for point in points]),
    )
    factors = [
        np.polynomial.polynomial.polyval(x[:, axis], coefficients[0, axis])
        for axis in range(3)
    ]
    residual = y - np.prod(factors, axis=0)
    assert 1e-4 < np.abs(residual).mean() < 0.003
    for axis in range(3):
        others = factors[axis - 1] * factors[axis - 2]
        for power in range(4):
            assert abs((residual * others * x[:, axis] ** power).sum()) < 1e-8


def test_a_fit_is_the_same_at_every_call_and_in_every_order_of_points():
    points = scattered(20)
    first, again, turned = (
        AccuracyModel.fit(some).coefficients for some in (points, points, points[::-1])
    )
    assert np.array_equal(first, again)
    np.testing.assert_allclose(turned, first, atol=1e-6)


def test_mean_absolute_error_is_the_mean_distance():
    constant = AccuracyModel(np.array([[[0.5, 0.0], [1.0, 0.0], [1.0, 0.0]]]))
    points = [
        Point(1.0, 1.0, 1.0, 0.9),
        Point(0.5, 1.0, 1.0, 0.4),
        Point(1.0, 0.5, 0.3, 0.5),
    ]
    assert constant.mean_absolute_error(points) == pytest.approx((0.4 + 0.1 + 0) / 3)


@pytest.mark.parametrize("cost", [0.2, 0.35, 0.5, 0.8])
def test_three_dimensions_predict_no_less_than_the_best_of_one(cost):
    model = AccuracyModel.fit(scattered(30))
    best = optimum(model, cost, WIDE)
    alone = [
        float(model(*sizes(shrink_one(dimension, cost)))) for dimension in EXPONENTS
    ]
    assert best.accuracy >= max(alone) - 1e-12
    assert best.accuracy > min(alone) + 1e-3


@given(st.floats(0.001, 1.0), st.sampled_from(list(EXPONENTS)))
def test_one_dimension_alone_pays_the_whole_cut(cost, dimension):
    found = shrink_one(dimension, cost)
    assert found.cost == pytest.approx(cost, rel=1e-12)
    assert [name for name in EXPONENTS if getattr(found, name) != 1] in (
        [dimension],
        [],
    )


def test_bounds_of_points_are_their_extremes():
    points = [
        Point(1.0, 0.4, 0.9, 0.5),
        Point(0.5, 0.8, 0.7, 0.5),
        Point(0.6, 0.6, 1.0, 0.5),
    ]
    assert measured_bounds(points) == {
        "depth": (0.5, 1.0),
        "width": (0.4, 0.8),
        "resolution": (0.7, 1.0),
    }


@pytest.mark.parametrize(
    ("degree", "rank", "needed"), [(3, 1, 10), (2, 1, 7), (3, 2, 20)]
)
def test_too_few_points_are_refused_with_the_number_needed(degree, rank, needed):
    points = scattered(needed)
    AccuracyModel.fit(points, degree, rank)
    message = rf"^points: degree {degree} and rank {rank} need {needed} or more, got {needed - 1}; measure more"
    with pytest.raises(UserError, match=message):
        AccuracyModel.fit(points[1:], degree, rank)


def test_points_that_say_too_little_of_a_dimension_are_refused():
    points = [
        Point(p.depth, p.width, round(p.resolution), p.accuracy)
        for p in scattered(20)
        if p.resolution > 0.5
    ]
    with pytest.raises(
        UserError,
        match=r"^points: degree 3 needs 4 or more different values of resolution, got 1; ",
    ):
        AccuracyModel.fit(points)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: Point(0.0, 1, 1, 0.5),
            r"^depth: must be in \(0, 1\], relative to the dense network, got 0\.0$",
        ),
        (lambda: Shares(1, 1.2, 1), r"^width: must be in \(0, 1\], .* got 1\.2$"),
        (
            lambda: Shares(1, 1, float("nan")),
            r"^resolution: must be in \(0, 1\], .* got nan$",
        ),
        (
            lambda: shrink_one("dept", 0.5),
            r"^dimension: unknown dimension 'dept'; did you mean 'depth'\?",
        ),
        (
            lambda: shrink_one("width", 0),
            r"^cost_share: must be in \(0, 1\], .* got 0$",
        ),
        (
            lambda: AccuracyModel.fit(scattered(30), degree=0),
            r"^degree: must be 1 or more, got 0; ",
        ),
        (
            lambda: AccuracyModel.fit(scattered(30), rank=0),
            r"^rank: must be 1 or more, got 0; ",
        ),
        (
            lambda: optimum(saturating, 1.5, WIDE),
            r"^cost_share: must be in \(0, 1\], .* got 1\.5$",
        ),
        (
            lambda: optimum(saturating, 0.5, {"depth": (0.5, 1)}),
            r"^bounds: no width; give depth, width, resolution",
        ),
        (
            lambda: optimum(saturating, 0.5, WIDE | {"depth": (0.8, 0.5)}),
            r"^bounds: depth must be 0 < low <= high <= 1, got 0\.8 to 0\.5; ",
        ),
        (
            lambda: optimum(saturating, 0.1, dict.fromkeys(EXPONENTS, (0.7, 0.9))),
            r"^cost_share: 0\.1 can't be met within the bounds, which allow 0\.1681 to "
            r"0\.5905; widen",
        ),
    ],
)
def test_what_can_not_be_meant_is_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()
