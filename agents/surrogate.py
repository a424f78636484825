"""A Gaussian process that predicts the reward of an allocation from those evaluated."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

MAX_POINTS = 600
"""Evaluations that the process is fitted to: the latest ones, and half as many of the
best.
"""
FIT_STEPS = 10
"""Steps of the optimiser in a fit that goes on from the one before."""
FIRST_FIT_STEPS = 60
FIT_RATE = 0.1
SCALE_ALONE = 0.25
"""Length scale of the groups' own kernels, as a share of the octaves allowed."""
SCALE_COST = 0.5
"""Length scale of the joint kernel along the cost, in octaves."""
SCALE_ALIKE = 0.5
"""Length scale of the kernel that groups share, along how far they shrink."""
SCALE_LIKENESS = 1.0
"""Length scale of that kernel along what makes groups alike."""
KNOTS = 17
"""Points between which that kernel is interpolated, so that it is a product of
matrices.
"""
PRIOR_DEVIATIONS = {
    "together": 1.0,
    "alone": 1.0,
    "alike": 2.0,
    "linear": 0.3,
    "block": 0.3,
    "noise": 0.1,
}
"""Where each part's standard deviation starts, and the median of its prior, in units of
the rewards' own.
"""
_PLACE_OF = {name: place for place, name in enumerate(PRIOR_DEVIATIONS)}
"""Where each part's deviation is in the vector that is optimised."""
LEAST_NOISE = 1e-5
"""Least variance of the noise."""
ROUNDING = 1e-6
"""What float32 may take from each group's own kernel, as a share of its variance."""
WINSOR = 3.0
"""Rewards further below the median than this many times the best one's distance from it
count as that: how bad a bad network is tells nothing about the good ones.
"""


class _Inputs(NamedTuple):
    """Allocations as the kernels take them.

    Attributes:
        shrunk: How far each group was shrunk, `(n, n_groups)`.
        cost: The cost in units of its scale, `(n,)`.
        shared: Coordinates in which the kernel that groups share is a scalar product,
            `(n, n_coordinates)`.
    """

    shrunk: Tensor
    cost: Tensor
    shared: Tensor


class _Pairs(NamedTuple):
    """What the kernels need of pairs of allocations, and no hyperparameter changes.

    All but the inputs are `(n, n_others)`, or have that at their end.

    Attributes:
        first: The allocations.
        second: The others.
        costs: Squared distances along the cost.
        alone: The kernel of each group alone, `(n_groups, n, n_others)`; the largest
            arrays of all, hence float32.
        alike: The kernel that groups share.
        linear: Scalar products of how far groups were shrunk.
    """

    first: _Inputs
    second: _Inputs
    costs: Tensor
    alone: Tensor
    alike: Tensor
    linear: Tensor

    @classmethod
    def between(cls, first: _Inputs, second: _Inputs) -> "_Pairs":
        """Every allocation of `first` with every one of `second`."""
        # Centred, so that half shrunk is where the linear part says nothing.
        linear = (first.shrunk - 0.5) @ (second.shrunk - 0.5).T
        return cls(
            first=first,
            second=second,
            costs=(first.cost[:, None] - second.cost).square(),
            alone=_group_kernels(first, second),
            alike=first.shared @ second.shared.T,
            linear=linear,
        )


class Surrogate:
    """Predicts rewards by a sum of kernels, learned anew after every batch.

    Most of the damage of pruning adds up over the groups, and in each it is rugged:
    which channels leave at a count is a matter of that count. Sums of functions of one
    group are learned from a hundred evaluations where a function of all of them isn't
    (Duvenaud et al. 2011, "Additive Gaussian Processes"). The kernels are:

    - "together": Matern-5/2 with a length scale for each group. Length scales have the
      prior of Hvarfner et al. 2024 ("Vanilla Bayesian Optimization Performs Great in
      High Dimensions", section 5), which grows with the number of groups. It has the
      octaves of cost as one more input: allocations for budgets far apart tell less of
      each other than their groups alone suggest.
    - "alone": Matern-5/2 of each group alone, each with its share of the variance.
    - "alike": the functions of single groups are draws from one process over how far a
      group is shrunk and what it is like, so that an evaluation teaches each group what
      it tells about similar ones (intrinsic coregionalization, Alvarez et al. 2012,
      "Kernels for Vector-Valued Functions", section 4.2, with a matrix from features
      instead of a learned one).
    - "linear": linear in how far groups are shrunk.

    Inputs are the octaves by which a group was shrunk, relative to the most that is
    allowed. A group of 32 channels that may keep 2 can shrink by four octaves; with 8
    of them it has shrunk by two, which is 0.5. A block of proxy images adds an unknown
    constant to all rewards that come from it; predictions are free of it. All
    hyperparameters are maximum a posteriori.

    Args:
        dense: Channels of each group, `(n_groups,)`.
        low: Fewest channels of each group.
        cost: Cost `(n,)` of allocations `(n, n_groups)`.
        likeness: What makes groups alike, `(n_groups, n_features)`, each feature within
            [0, 1].
    """

    def __init__(
        self,
        dense: np.ndarray,
        low: np.ndarray,
        cost: Callable[[np.ndarray], np.ndarray],
        likeness: np.ndarray,
    ) -> None:
        n_groups = len(dense)
        self._cost = cost
        self._dense = dense
        # A group that can't shrink has no octaves; it stays at 0 whatever the unit.
        self._octaves = np.maximum(np.log2(dense / low), 1e-6)
        features = torch.from_numpy(likeness).double()
        distances = torch.cdist(features, features)
        by_group = (-0.5 * distances.square() / SCALE_LIKENESS**2).exp() / n_groups
        self._by_group = _kernel_root(by_group)
        knots = torch.linspace(0, 1, KNOTS, dtype=torch.float64)
        gaps = (knots[:, None] - knots).abs()
        self._by_knot = _kernel_root(_matern(gaps * math.sqrt(5) / SCALE_ALIKE))
        self._logs = {
            "scales": torch.full(
                (n_groups,), 0.5 * math.log(n_groups), dtype=torch.float64
            ),
            # Through a softmax: all groups begin with the same share.
            "shares": torch.zeros(n_groups, dtype=torch.float64),
            "deviations": _prior_log_deviations(),
        }
        # Logarithms, so that what has to be positive is.
        for logs in self._logs.values():
            logs.requires_grad_()
        self._optimizer = torch.optim.Adam(self._logs.values(), FIT_RATE)
        self._is_first = True

    def fit(self, kept: np.ndarray, rewards: np.ndarray, blocks: np.ndarray) -> None:
        """Learns from evaluations, in their order.

        Args:
            kept: The allocations, `(n, n_groups)`.
            rewards: What each earned, `(n,)`.
            blocks: Which block of images each was scored on, `(n,)`.
        """
        places = _choose_points(rewards)
        self._x = self._inputs(kept[places])
        y = torch.from_numpy(_winsorise(rewards)[places])
        self._mean = y.mean()
        # One evaluation, or equal ones, have no spread.
        self._scale = y.std(correction=0).clamp_min(1e-9)
        # In standard units, for which the priors are made.
        y = (y - self._mean) / self._scale
        is_same_block = blocks[places][:, None] == blocks[places][None]
        same_block = torch.from_numpy(is_same_block.astype(float))
        pairs = _Pairs.between(self._x, self._x)
        # Later fits start at the hyperparameters of the one before.
        n_steps = FIRST_FIT_STEPS if self._is_first else FIT_STEPS
        for _ in range(n_steps):
            self._optimizer.zero_grad()
            self._negative_log_posterior(y, pairs, same_block).backward()
            self._optimizer.step()
        self._is_first = False
        # What every prediction needs is solved once.
        with torch.no_grad():
            self._root = torch.linalg.cholesky(self._covariance(pairs, same_block))
            self._weights = torch.cholesky_solve(y[:, None], self._root)[:, 0]

    @torch.no_grad()
    def mean(self, kept: np.ndarray) -> np.ndarray:
        """Expected rewards `(n,)` of allocations `(n, n_groups)`."""
        kernel = self._kernel(_Pairs.between(self._inputs(kept), self._x))
        return (self._mean + self._scale * (kernel @ self._weights)).numpy()

    @torch.no_grad()
    def sample(
        self, kept: np.ndarray, n: int, generator: torch.Generator
    ) -> np.ndarray:
        """Draws functions from the posterior, at some allocations.

        Args:
            kept: The allocations, `(n_allocations, n_groups)`.
            n: How many functions.
            generator: Where the draws come from.

        Returns:
            Values `(n, n_allocations)`, in units of the fit: higher is better, but they
            are no rewards.
        """
        x = self._inputs(kept)
        cross = self._kernel(_Pairs.between(x, self._x))
        half = torch.linalg.solve_triangular(self._root, cross.T, upper=False)
        covariance = self._kernel(_Pairs.between(x, x)) - half.T @ half
        # The difference of two matrices needs more than either to stay definite.
        jitter = 10 * self._least_noise()
        identity = torch.eye(len(kept), dtype=torch.float64)
        root = torch.linalg.cholesky(covariance + jitter * identity)
        noise = torch.randn(len(kept), n, dtype=torch.float64, generator=generator)
        mean = (cross @ self._weights)[:, None]
        return (mean + root @ noise).T.numpy()

    def _inputs(self, kept: np.ndarray) -> _Inputs:
        """Allocations `(n, n_groups)` as the kernels take them."""
        shrunk = np.log2(self._dense / kept) / self._octaves
        cost = np.log2(self._cost(kept)) / SCALE_COST
        positions = torch.from_numpy(shrunk).clamp(0, 1) * (KNOTS - 1)
        # Weights of a linear interpolation: 2.25 lies 0.75 on knot 2, 0.25 on knot 3.
        gaps = (positions[..., None] - torch.arange(KNOTS)).abs()
        weights = (1 - gaps).clamp_min(0)
        shared = torch.einsum("gi,ngk->nik", self._by_group, weights @ self._by_knot)
        return _Inputs(
            torch.from_numpy(shrunk), torch.from_numpy(cost), shared.flatten(1)
        )

    def _deviation(self, name: str) -> Tensor:
        """The standard deviation of a part, a key of `PRIOR_DEVIATIONS`."""
        return self._logs["deviations"][_PLACE_OF[name]].exp()

    def _kernel(self, pairs: _Pairs) -> Tensor:
        """The covariance `(n, n_others)` of rewards, free of blocks and of noise."""
        # Gradients are sums whose last bits depend on the order of these lines.
        scales = self._logs["scales"].exp()
        distances = torch.cdist(
            pairs.first.shrunk / scales, pairs.second.shrunk / scales
        )
        squares = distances.square() + pairs.costs
        variance = self._deviation("together") ** 2
        # The root of 0 has no gradient.
        together = variance * _matern((5 * squares + 1e-12).sqrt())
        variances = self._deviation("alone") ** 2 * self._logs["shares"].softmax(0)
        # One product for the sum over groups, in the precision of its large factor.
        sums = variances.float() @ pairs.alone.flatten(1)
        alone = sums.view(together.shape).double()
        linear = self._deviation("linear") ** 2 * pairs.linear
        alike = self._deviation("alike") ** 2 * pairs.alike
        return together + alone + alike + linear

    def _least_noise(self) -> Tensor:
        """What keeps covariances positive definite."""
        return LEAST_NOISE + ROUNDING * self._deviation("alone") ** 2

    def _covariance(self, pairs: _Pairs, same_block: Tensor) -> Tensor:
        """The covariance of measured rewards; `same_block` is 1 where blocks agree."""
        noise = self._deviation("noise") ** 2 + self._least_noise()
        kernel = self._kernel(pairs) + self._deviation("block") ** 2 * same_block
        return kernel + noise * torch.eye(len(kernel), dtype=torch.float64)

    def _negative_log_posterior(
        self, y: Tensor, pairs: _Pairs, same_block: Tensor
    ) -> Tensor:
        """Of the hyperparameters, for each evaluation; without constants."""
        root = torch.linalg.cholesky(self._covariance(pairs, same_block))
        weights = torch.cholesky_solve(y[:, None], root)[:, 0]
        likelihood = -0.5 * y @ weights - root.diagonal().log().sum()
        return -(likelihood + self._log_prior()) / len(y)

    def _log_prior(self) -> Tensor:
        """Of the hyperparameters, all of which are log-normal; without constants."""
        # Hvarfner et al. 2024: distances grow with the root of the number of groups.
        usual_scale = math.sqrt(2) + 0.5 * math.log(len(self._dense))
        scales = _penalty(self._logs["scales"], usual_scale, 3.0)
        shares = _penalty(self._logs["shares"], 0.0, 1.0)
        usual_deviations = _prior_log_deviations()
        deviations = _penalty(self._logs["deviations"], usual_deviations, 1.0)
        return -(scales + shares + deviations)


def _prior_log_deviations() -> Tensor:
    """Logarithms of `PRIOR_DEVIATIONS`, in their order."""
    return torch.tensor(list(PRIOR_DEVIATIONS.values()), dtype=torch.float64).log()


def _penalty(logs: Tensor, centre: float | Tensor, variance: float) -> Tensor:
    """The negative log-density of normal numbers, without its constant."""
    return ((logs - centre) ** 2 / (2 * variance)).sum()


def _matern(distance: Tensor) -> Tensor:
    """Matern-5/2, of distances in units of the length scale over the root of 5."""
    return (1 + distance + distance.square() / 3) * (-distance).exp()


def _kernel_root(kernel: Tensor) -> Tensor:
    """`root` with `root @ root.T` a kernel `(n, n)`.

    Directions in which next to nothing happens are left out.
    """
    # By eigenvalues and not Cholesky, since groups alike make it singular.
    values, vectors = torch.linalg.eigh(kernel)
    matters = values > 1e-6 * values.max()
    return vectors[:, matters] * values[matters].sqrt()


def _group_kernels(first: _Inputs, second: _Inputs) -> Tensor:
    """The kernel of each group alone, float32 `(n_groups, n, n_others)`."""
    factor = math.sqrt(5) / SCALE_ALONE
    rows = first.shrunk.T.float().mul(factor)
    columns = second.shrunk.T.float().mul(factor)
    kernels = torch.empty(len(rows), rows.shape[1], columns.shape[1])
    # Group by group, since one group's matrix fits into a core's cache.
    for kernel, row, column in zip(kernels, rows, columns, strict=True):
        kernel.copy_(_matern((row[:, None] - column).abs()))
    return kernels


def _choose_points(rewards: np.ndarray) -> np.ndarray:
    """Positions of the evaluations to fit to, in their order.

    Worked example, for 3 points instead of `MAX_POINTS`: of the rewards 5, 9, 1, 2 and
    3 the best third is 9, and the latest two others are 2 and 3; so positions 1, 3, 4.
    """
    n = len(rewards)
    if n <= MAX_POINTS:
        return np.arange(n)
    best = np.argsort(-rewards)[: MAX_POINTS // 3]
    others = np.setdiff1d(np.arange(n), best)
    latest = others[-(MAX_POINTS - len(best)) :]
    return np.sort(np.concatenate([best, latest]))


def _winsorise(rewards: np.ndarray) -> np.ndarray:
    """Rewards `(n,)`, none too far below the median; see `WINSOR`.

    Worked example: of 0, -1 and -9 the median is -1 and the best is 1 above it, so that
    nothing counts as less than -1 - 3 x 1; -9 becomes -4.
    """
    median = np.median(rewards)
    return np.maximum(rewards, median - WINSOR * (rewards.max() - median))
