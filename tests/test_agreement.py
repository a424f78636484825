"""What the study of proxies computes of its tables."""

from itertools import combinations

import numpy as np
import pytest

from experiments.agreement import agreement, kendall_tau


def counted_tau(x: list[int], y: list[int]) -> float:
    """Kendall's tau-b, pair by pair."""
    signs = [
        (np.sign(x[i] - x[j]), np.sign(y[i] - y[j]))
        for i, j in combinations(range(len(x)), 2)
    ]
    untied_x, untied_y = (sum(pair[side] != 0 for pair in signs) for side in (0, 1))
    return sum(a * b for a, b in signs) / (untied_x * untied_y) ** 0.5


@pytest.mark.parametrize("seed", range(5))
def test_kendall_tau_counts_pairs_and_leaves_out_ties(seed):
    x, y = np.random.default_rng(seed).integers(0, 6, (2, 12))
    assert kendall_tau(x, y) == pytest.approx(counted_tau(x.tolist(), y.tolist()))


def run(budget: str, number: int, accuracy: float, seed: int = 0) -> dict:
    study = {"model": "net", "budget": budget, "training": "short"}
    return study | {"number": str(number), "seed": str(seed), "accuracy": str(accuracy)}


def scored(budget: str, number: int, accuracy: float) -> dict:
    return {
        **{
            "model": "net",
            "budget": budget,
            "proxy": "amc",
            "number": str(number),
            "set": "0",
        },
        **{"accuracy": str(accuracy), "seconds": "1"},
    }


def test_each_budget_is_judged_by_its_own_networks_and_seeds_are_averaged():
    right, wrong = [0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]
    runs = [run("macs=50%", n, 0.5 + value) for n, value in enumerate(right)]
    runs += [run("macs=30%", n, 0.5 + value) for n, value in enumerate(right)]
    runs += [
        run("macs=30%", n, 0.5 - 3 * value, seed=1) for n, value in enumerate(right)
    ]  # outweighs seed 0
    scores = [
        scored(budget, n, value)
        for budget in ("macs=50%", "macs=30%")
        for n, value in enumerate(right)
    ]
    assert {row["budget"]: row["tau"] for row in agreement(runs, scores)} == {
        "macs=50%": 1,
        "macs=30%": -1,
    }
    scores = [scored("macs=50%", n, value) for n, value in enumerate(wrong)]
    assert [
        (row["budget"], row["tau"], row["tau_better_half"])
        for row in agreement(runs, scores)
    ] == [("macs=50%", -1, -1)]
