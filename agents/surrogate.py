"""A Gaussian process that predicts the reward of an allocation from those that were evaluated."""

import math

import numpy as np
import torch
from torch import Tensor

MAX_POINTS = 400
"""Evaluations that the process is fitted to: the latest ones, and half as many of the best."""
FIT_STEPS, FIRST_FIT_STEPS, FIT_RATE = 10, 60, 0.1
WINSOR = 3.0
"""Rewards further below the median than this many times the best one's distance from it count as that: how bad a bad
network is tells nothing about the good ones."""


class Surrogate:
    """Matern-5/2 kernel with a length scale for each group, plus a linear kernel.

    Length scales have the prior of Hvarfner et al. 2024 ("Vanilla Bayesian Optimization Performs Great in High
    Dimensions", section 5), which grows with the number of groups; all hyperparameters are maximum a posteriori. Inputs
    are the octaves by which a group was shrunk, relative to the most that is allowed.

    Args:
        dense: Channels of each group, `(n_groups,)`.
        low: Fewest channels of each group.
    """

    def __init__(self, dense: np.ndarray, low: np.ndarray):
        self._dense, self._octaves = dense, np.maximum(np.log2(dense / low), 1e-6)
        n_groups = len(dense)
        # Log of: length scale of each group, deviation of the kernel, of the linear part's weights, of the noise.
        start = [0.5 * math.log(n_groups)] * n_groups + [0.0, math.log(0.3), math.log(0.1)]
        self._logs = torch.tensor(start, dtype=torch.float64, requires_grad=True)
        self._optimizer = torch.optim.Adam([self._logs], FIT_RATE)
        self._is_first = True

    def fit(self, kept: np.ndarray, rewards: np.ndarray) -> None:
        """Learns from evaluated allocations `(n, n_groups)` in the order of evaluation, and their rewards `(n,)`."""
        chosen = _chosen(rewards)
        self._x, y = self._inputs(kept[chosen]), torch.from_numpy(_winsorised(rewards)[chosen])
        self._mean, self._scale = y.mean(), y.std(correction=0).clamp_min(1e-9)
        y = (y - self._mean) / self._scale
        for _ in range(FIRST_FIT_STEPS if self._is_first else FIT_STEPS):
            self._optimizer.zero_grad()
            self._negative_log_posterior(y).backward()
            self._optimizer.step()
        self._is_first = False
        with torch.no_grad():
            self._root = torch.linalg.cholesky(self._covariance())
            self._weights = torch.cholesky_solve(y[:, None], self._root)[:, 0]

    @torch.no_grad()
    def mean(self, kept: np.ndarray) -> np.ndarray:
        """Expected rewards `(n,)` of allocations `(n, n_groups)`."""
        return (self._mean + self._scale * (self._kernel(self._inputs(kept), self._x) @ self._weights)).numpy()

    @torch.no_grad()
    def samples(self, kept: np.ndarray, n: int, generator: torch.Generator) -> np.ndarray:
        """`n` functions drawn from the posterior, at some allocations: `(n, n_allocations)`, in units of the fit."""
        x = self._inputs(kept)
        cross = self._kernel(x, self._x)
        half = torch.linalg.solve_triangular(self._root, cross.T, upper=False)
        covariance = self._kernel(x, x) - half.T @ half
        root = torch.linalg.cholesky(covariance + 1e-4 * torch.eye(len(x), dtype=torch.float64))
        noise = torch.randn(len(x), n, dtype=torch.float64, generator=generator)
        return ((cross @ self._weights)[:, None] + root @ noise).T.numpy()

    def _inputs(self, kept: np.ndarray) -> Tensor:
        return torch.from_numpy(np.log2(self._dense / kept) / self._octaves)

    def _kernel(self, first: Tensor, second: Tensor) -> Tensor:
        scales, deviation, linear = self._logs[:-3].exp(), self._logs[-3].exp(), self._logs[-2].exp()
        squares = ((first / scales)[:, None] - (second / scales)[None]).square().sum(-1)
        distance = (5 * squares + 1e-12).sqrt()
        matern = (1 + distance + distance.square() / 3) * (-distance).exp()
        return deviation**2 * matern + linear**2 * ((first - 0.5) @ (second - 0.5).T)

    def _covariance(self) -> Tensor:
        noise = (2 * self._logs[-1]).exp() + 1e-5
        return self._kernel(self._x, self._x) + noise * torch.eye(len(self._x), dtype=torch.float64)

    def _negative_log_posterior(self, y: Tensor) -> Tensor:
        root = torch.linalg.cholesky(self._covariance())
        weights = torch.cholesky_solve(y[:, None], root)[:, 0]
        likelihood = -0.5 * y @ weights - root.diagonal().log().sum()
        centre = math.sqrt(2) + 0.5 * math.log(len(self._dense))
        scales = -((self._logs[:-3] - centre) ** 2 / (2 * 3)).sum()
        others = -((self._logs[-3:] - torch.tensor([0.0, -1.2, -3.0])) ** 2 / 2).sum()
        return -(likelihood + scales + others) / len(y)


def _chosen(rewards: np.ndarray) -> np.ndarray:
    """The evaluations to fit to, in their order."""
    if len(rewards) <= MAX_POINTS:
        return np.arange(len(rewards))
    best = np.argsort(-rewards)[: MAX_POINTS // 3]
    latest = np.setdiff1d(np.arange(len(rewards)), best)[-(MAX_POINTS - len(best)) :]
    return np.sort(np.concatenate([best, latest]))


def _winsorised(rewards: np.ndarray) -> np.ndarray:
    median = np.median(rewards)
    return np.maximum(rewards, median - WINSOR * (rewards.max() - median))
