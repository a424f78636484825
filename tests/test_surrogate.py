"""The surrogate is a textbook Gaussian process: its mean and draws equal those of a
plain solve in NumPy.
"""

import numpy as np
import pytest
import torch

from autoprune.agents import surrogate
from autoprune.agents.cost_baseline import CostBaseline
from autoprune.agents.surrogate import MAX_POINTS, WINSOR, Surrogate

DENSE, LOW = np.array([16, 40, 24]), np.array([2, 4, 4])
LIKENESS = np.array([[0.1, 0.9], [0.2, 0.8], [1.0, 0.0]])


def cost(kept: np.ndarray) -> np.ndarray:
    """Neighbours multiply, as in a chain of layers."""
    return kept[:, 0] * kept[:, 1] + kept[:, 1] * kept[:, 2]


def allocations(n: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return np.column_stack(
        [
            generator.integers(low, high + 1, n)
            for low, high in zip(LOW, DENSE, strict=True)
        ]
    )


def smooth(kept: np.ndarray) -> np.ndarray:
    """Curved, with an interaction, and so even that nothing is winsorised."""
    octaves = np.log2(DENSE / kept)
    return -octaves @ np.array([0.5, 0.2, 0.3]) - 0.3 * np.sin(
        octaves[:, 0] * octaves[:, 1]
    )


def blocks(n: int) -> np.ndarray:
    """Three blocks of images, in turns."""
    return np.arange(n) // 2 % 3


def fitted(n: int = 40, rewards=smooth) -> Surrogate:
    model, kept = Surrogate(DENSE, LOW, cost, LIKENESS), allocations(n)
    model.fit(kept, rewards(kept), blocks(n))
    return model


def matern(distance: np.ndarray) -> np.ndarray:
    """Matern-5/2 of distances in units of the length scale."""
    r = np.sqrt(5) * distance
    return (1 + r + r**2 / 3) * np.exp(-r)


def shared(one: np.ndarray, other: np.ndarray) -> float:
    """The kernel that groups share, pair of groups by pair of groups, interpolated
    between its values at the knots.
    """
    knots, total = np.linspace(0, 1, surrogate.KNOTS), 0.0
    for like, x in zip(LIKENESS, one, strict=True):
        for other_like, z in zip(LIKENESS, other, strict=True):
            along = [
                np.interp(
                    z, knots, matern(np.abs(knot - knots) / surrogate.SCALE_ALIKE)
                )
                for knot in knots
            ]
            alike = np.exp(
                -((like - other_like) ** 2).sum() / 2 / surrogate.SCALE_LIKENESS**2
            )
            total += alike * np.interp(x, knots, along)
    return total / len(LIKENESS)


class Textbook:
    """Rasmussen & Williams 2006, chapter 2, with the hyperparameters that the surrogate
    has found.
    """

    def __init__(self, model: Surrogate, kept: np.ndarray, rewards: np.ndarray):
        assert rewards.min() > np.median(rewards) - WINSOR * np.ptp(
            rewards[rewards >= np.median(rewards)]
        )
        logs = {name: values.detach().numpy() for name, values in model._logs.items()}
        together, alone, self.alike, self.linear, block, noise = np.exp(
            logs["deviations"]
        )
        self.scales, self.together = np.exp(logs["scales"]), together
        self.alone = alone**2 * np.exp(logs["shares"]) / np.exp(logs["shares"]).sum()
        self.kept, self.mean, self.std = kept, rewards.mean(), rewards.std()
        same = blocks(len(kept))[:, None] == blocks(len(kept))
        self.least_noise = surrogate.LEAST_NOISE + surrogate.ROUNDING * alone**2
        self.noisy = (
            self.kernel(kept, kept)
            + block**2 * same
            + (noise**2 + self.least_noise) * np.eye(len(kept))
        )
        self.y = (rewards - self.mean) / self.std

    def kernel(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        covariance = np.empty((len(first), len(second)))
        x, z = (
            np.log2(DENSE / kept) / np.log2(DENSE / LOW) for kept in (first, second)
        )
        octaves = np.log2(cost(first))[:, None] - np.log2(cost(second))
        for i, one in enumerate(x):
            for j, other in enumerate(z):
                squares = (((one - other) / self.scales) ** 2).sum() + (
                    octaves[i, j] / surrogate.SCALE_COST
                ) ** 2
                jointly = self.together**2 * matern(np.sqrt(squares))
                alone = (
                    self.alone * matern(np.abs(one - other) / surrogate.SCALE_ALONE)
                ).sum()
                linear = self.linear**2 * ((one - 0.5) * (other - 0.5)).sum()
                covariance[i, j] = (
                    jointly + alone + self.alike**2 * shared(one, other) + linear
                )
        return covariance

    def posterior(self, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and covariance in units of the fit."""
        cross, inverse = self.kernel(at, self.kept), np.linalg.inv(self.noisy)
        return cross @ inverse @ self.y, self.kernel(at, at) - cross @ inverse @ cross.T


def test_mean_is_that_of_a_textbook_solve():
    model, kept, at = fitted(), allocations(40), allocations(25, seed=1)
    book = Textbook(model, kept, smooth(kept))
    assert model.mean(at) == pytest.approx(
        book.mean + book.std * book.posterior(at)[0], rel=1e-4, abs=1e-6
    )


def test_draws_have_the_textbooks_mean_and_covariance():
    model, kept, at = fitted(), allocations(40), allocations(6, seed=2)
    book = Textbook(model, kept, smooth(kept))
    mean, covariance = book.posterior(at)
    n = 20_000
    draws = model.sample(at, n, torch.Generator().manual_seed(0))
    assert draws.shape == (n, 6)
    deviations = np.sqrt(covariance.diagonal() + 10 * book.least_noise)
    assert np.abs(draws.mean(0) - mean).max() < 5 * deviations.max() / np.sqrt(n)
    expected = covariance + 10 * book.least_noise * np.eye(6)
    spread = np.outer(deviations, deviations)
    assert (np.abs(np.cov(draws.T) - expected) < 5 * 1.5 * spread / np.sqrt(n)).all()


def test_draws_are_reproducible_by_seed():
    model, at = fitted(), allocations(5, seed=3)
    first, again, other = (
        model.sample(at, 4, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_evaluated_allocations_are_predicted_within_the_noise():
    model, kept = fitted(), allocations(40)
    noise = float(model._deviation("noise").detach()) * smooth(kept).std()
    assert np.abs(model.mean(kept) - smooth(kept)).max() < 3 * noise + 1e-3
    uncertain = model.sample(kept, 500, torch.Generator().manual_seed(0)).std(0)
    far = model.sample(
        allocations(40, seed=9), 500, torch.Generator().manual_seed(0)
    ).std(0)
    assert uncertain.mean() < far.mean()


def test_a_smooth_reward_is_learned_from_few_evaluations():
    model, at = fitted(60), allocations(300, seed=5)
    error = model.mean(at) - smooth(at)
    assert np.sqrt((error**2).mean()) < 0.25 * smooth(at).std()


def test_the_group_that_matters_gets_the_largest_share():
    for group in range(3):
        model = fitted(
            60, lambda kept, group=group: -(np.log2(DENSE[group] / kept[:, group]) ** 2)
        )
        assert model._logs["shares"].argmax() == group


def test_what_a_block_adds_to_all_its_rewards_does_not_matter():
    offsets, at = np.array([-1.0, 0.0, 1.0]), allocations(300, seed=5)
    blind, seeing = (
        Surrogate(DENSE, LOW, cost, LIKENESS),
        Surrogate(DENSE, LOW, cost, LIKENESS),
    )
    kept = allocations(60)
    rewards = smooth(kept) + offsets[blocks(60)]
    seeing.fit(kept, rewards, blocks(60))
    blind.fit(kept, rewards, np.zeros(60))

    def error(model: Surrogate) -> float:
        return (model.mean(at) - smooth(at)).std() / smooth(at).std()

    assert error(seeing) < 0.3 < 2 * error(seeing) < error(blind)


def test_damage_that_adds_up_over_groups_is_learned_though_it_is_rugged():
    n_groups = 8
    dense, low = np.full(n_groups, 32), np.full(n_groups, 4)
    rugged = np.random.default_rng(0).normal(size=(n_groups, 33)).cumsum(1)

    def reward(kept: np.ndarray) -> np.ndarray:
        return sum(rugged[group, kept[:, group]] for group in range(n_groups))

    kept, at = (
        np.random.default_rng(seed).integers(4, 33, (200, n_groups)) for seed in (1, 2)
    )
    model = Surrogate(
        dense,
        low,
        lambda kept: kept.sum(1),
        np.random.default_rng(3).random((n_groups, 2)),
    )
    model.fit(kept, reward(kept), np.zeros(200))
    assert np.corrcoef(model.mean(at), reward(at))[0, 1] > 0.8


def test_groups_that_are_alike_learn_from_each_other():
    """Two kinds of groups, of which one minds and one doesn't, and not twice as many
    evaluations as groups.
    """
    n_groups, minds = 24, np.arange(24) % 2
    dense, low = np.full(n_groups, 32), np.full(n_groups, 2)

    def reward(kept: np.ndarray) -> np.ndarray:
        return -(np.log2(32 / kept) ** 2) @ minds

    def error(likeness: np.ndarray) -> float:
        kept, at = (
            2 ** np.random.default_rng(seed).uniform(1, 5, (40, n_groups))
            for seed in (1, 2)
        )
        model = Surrogate(dense, low, lambda kept: kept.sum(1), likeness)
        model.fit(kept, reward(kept), np.zeros(40))
        return (model.mean(at) - reward(at)).std() / reward(at).std()

    told, untold = (
        error(4.0 * minds[:, None]),
        error(4.0 * np.arange(n_groups)[:, None]),
    )
    assert told < 0.1 < untold


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_few_evaluations_are_enough_and_equal_ones_too(n):
    for rewards in (smooth, lambda kept: np.full(len(kept), -3.0)):
        model = fitted(n, rewards)
        at = allocations(10, seed=1)
        assert np.isfinite(model.mean(at)).all()
        assert np.isfinite(model.sample(at, 3, torch.Generator().manual_seed(0))).all()
    assert model.mean(at) == pytest.approx(-3.0)


def test_the_unit_and_the_origin_of_rewards_do_not_matter():
    at = allocations(20, seed=1)
    plain, scaled = (
        fitted().mean(at),
        fitted(rewards=lambda kept: 1000 * smooth(kept) + 7).mean(at),
    )
    assert scaled == pytest.approx(1000 * plain + 7, rel=1e-6)


def test_how_bad_the_bad_ones_are_does_not_matter():
    def with_outliers(factor: float):
        def rewards(kept: np.ndarray) -> np.ndarray:
            values = smooth(kept)
            return np.where(
                np.arange(len(kept)) % 7 == 3, factor * values.min(), values
            )

        return rewards

    at = allocations(20, seed=1)
    bad, worse = (
        fitted(rewards=with_outliers(factor)).mean(at) for factor in (100, 10_000)
    )
    assert np.array_equal(bad, worse)


def test_winsorised_rewards_keep_the_good_half_and_their_order():
    rewards = np.random.default_rng(0).normal(size=101) ** 3
    cut, median, best = (
        surrogate._winsorise(rewards),
        np.median(rewards),
        rewards.max(),
    )
    assert (cut[rewards >= median] == rewards[rewards >= median]).all()
    assert cut.min() >= median - WINSOR * (best - median) - 1e-12
    order = np.argsort(rewards)
    assert (np.diff(cut[order]) >= 0).all()


def test_of_many_evaluations_the_best_and_the_latest_are_fitted_in_their_order():
    rewards = np.random.default_rng(0).normal(size=3 * MAX_POINTS)
    chosen = surrogate._choose_points(rewards)
    assert len(chosen) == len(set(chosen)) == MAX_POINTS
    assert (np.diff(chosen) > 0).all()
    best = set(np.argsort(-rewards)[: MAX_POINTS // 3])
    assert best <= set(chosen)
    others = sorted(set(chosen) - best)
    assert others == sorted(set(range(len(rewards))) - best)[-len(others) :]
    few = surrogate._choose_points(rewards[:MAX_POINTS])
    assert few.tolist() == list(range(MAX_POINTS))


def test_a_group_that_cannot_shrink_is_no_obstacle():
    model = Surrogate(
        np.array([16, 8]), np.array([2, 8]), lambda kept: kept[:, 0], np.zeros((2, 1))
    )
    kept = np.column_stack([np.arange(2, 17), np.full(15, 8)])
    model.fit(kept, -np.log2(16 / kept[:, 0]), np.zeros(15))
    assert np.abs(model.mean(kept) + np.log2(16 / kept[:, 0])).max() < 0.2


@pytest.mark.parametrize("deviation", [1e-2, 1.0, 1e2])
def test_the_rounding_of_the_groups_own_kernels_does_not_make_it_indefinite(deviation):
    """Their deviation has no upper bound, and they alone are in float32."""
    model, kept = fitted(300), allocations(300)
    names = list(surrogate.PRIOR_DEVIATIONS)
    with torch.no_grad():
        model._logs["deviations"][names.index("alone")] = np.log(deviation)
        model._logs["deviations"][names.index("noise")] = -20
    model.fit(kept, smooth(kept), np.zeros(300))
    assert np.isfinite(
        model.sample(allocations(300, seed=1), 2, torch.Generator().manual_seed(0))
    ).all()


def heap(n: int = 400) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Costs, rewards and how far each reward lies from the usual: the cheaper, the
    lower and the farther apart.
    """
    generator = np.random.default_rng(0)
    costs, deviations = generator.uniform(3e5, 8e5, n), generator.normal(0, 1, n)
    octaves = np.log2(costs / 8e5)
    return costs, -(octaves**2) + 0.5 * 4**-octaves * 0.1 * deviations, deviations


def test_relative_to_the_usual_at_their_cost_rewards_of_all_budgets_count_alike():
    costs, rewards, deviations = heap()
    cost_baseline = CostBaseline(costs, rewards)
    relative = (rewards - cost_baseline.centre(costs)) / cost_baseline.scale(costs)
    cheap, dear = costs < np.quantile(costs, 0.25), costs > np.quantile(costs, 0.75)
    assert np.std(rewards[cheap]) > 5 * np.std(rewards[dear])
    assert 1 / 1.5 < np.std(relative[cheap]) / np.std(relative[dear]) < 1.5
    assert np.corrcoef(relative, deviations)[0, 1] > 0.97


@pytest.mark.parametrize("n", [1, 2, 3, 5, 10])
def test_the_usual_of_few_or_equal_costs_is_finite(n):
    costs, rewards, _ = heap(n)
    for some in (costs, np.full(n, costs[0])):
        cost_baseline = CostBaseline(some, rewards)
        assert np.isfinite(cost_baseline.centre(costs)).all()
        assert (cost_baseline.scale(costs) > 0).all()
