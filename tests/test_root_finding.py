"""Where falling functions cross zero, many at once."""

import numpy as np
import pytest

from autoprune.costs.root_finding import least_roots

TOLERANCE = 2**-20
N = 40
GENERATOR = np.random.default_rng(0)
AT = GENERATOR.uniform(0.02, 0.98, N)
"""Where the functions cross."""
FALLING = {
    "line": lambda x, at: at - x,
    "parabola": lambda x, at: (2.2 - x) ** 2 - (2.2 - at) ** 2,
    "cubic": lambda x, at: (1 - x) ** 3 - (1 - at) ** 3,
    "step": lambda x, at: np.where(x < at, 1.0, -1.0),
    "kinked": lambda x, at: (
        np.where(x < 0.4, 3 * (0.4 - x), 0.4 - x)
        - np.where(at < 0.4, 3 * (0.4 - at), 0.4 - at)
    ),
    "hyperbola": lambda x, at: 1 / (x + 0.1) - 1 / (at + 0.1),
}


class Counted:
    """Functions of one kind, each with a crossing of its own; counts the values that
    are asked for.
    """

    def __init__(self, name: str, at: np.ndarray):
        self.name, self.at, self.values = name, at, 0

    def __call__(self, x: np.ndarray, which: np.ndarray) -> np.ndarray:
        self.values += len(x)
        return FALLING[self.name](x, self.at[which])


@pytest.mark.parametrize("name", FALLING)
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-0.05, 2.0)])
def test_a_root_is_met_and_hardly_anything_below_it_is(name, low, high):
    function, lanes = Counted(name, AT), np.arange(N)
    roots = least_roots(function, np.full(N, low), np.full(N, high))
    assert (function(roots, lanes) <= 0).all()
    assert (function(roots - 1.01 * TOLERANCE * (high - low), lanes) > 0).all()


@pytest.mark.parametrize("name", FALLING)
def test_each_root_is_what_it_would_be_alone(name):
    roots = least_roots(Counted(name, AT), np.zeros(N), np.ones(N))
    alone = [
        least_roots(Counted(name, AT[[n]]), np.zeros(1), np.ones(1))[0]
        for n in range(N)
    ]
    assert roots.tolist() == alone


@pytest.mark.parametrize(
    ("name", "values"), [("line", 5), ("parabola", 5), ("step", 25)]
)
def test_lines_and_parabolas_take_five_values_and_only_what_they_miss_is_bisected(
    name, values
):
    function = Counted(name, AT)
    least_roots(function, np.zeros(N), np.ones(N))
    assert function.values == values * N


@pytest.mark.parametrize("name", FALLING)
def test_where_a_function_is_met_nowhere_the_end_is_returned_and_where_everywhere_the_beginning(
    name,
):
    beyond = least_roots(Counted(name, np.array([1.1])), np.zeros(1), np.ones(1))
    before = least_roots(Counted(name, np.array([0.02])), np.full(1, 0.05), np.ones(1))
    assert beyond == 1
    assert before == pytest.approx(0.05, abs=2 * TOLERANCE)


def test_no_functions_have_no_roots():
    assert least_roots(Counted("line", AT), np.zeros(0), np.zeros(0)).shape == (0,)
