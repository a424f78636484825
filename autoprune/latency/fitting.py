"""How long each amount of work takes: fitted to few measured networks.

All factors are 0 or more, so that what they predict never falls when a count grows, and
budgets in time can be met exactly with respect to the prediction.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from autoprune.latency.kernels import Rounding, Signature, WorkTable

TILES = (1, 2, 4, 8, 16, 32)
"""Channels that an engine may compute at a time, each tried."""
PULLS = (0.03, 0.1, 0.3, 1.0, 3.0)
"""How strongly layers of one kind are held to one speed, each tried."""
BETTER = 0.9
"""Share of its error below which another rounding is better than the engine's own."""
N_FOLDS = 6
"""Parts of the measured networks that are left out in turn to compare fits."""


@dataclass(frozen=True)
class Fit:
    """Times of amounts of work, as shares of the dense network's time.

    Attributes:
        rounding: In how many channels the engine seems to compute.
        constant: What a pass takes beside all work.
        factors: What a unit of each amount takes, `(n_columns,)`, 0 or more.
    """

    rounding: Rounding
    constant: float
    factors: np.ndarray

    def predict(self, work: WorkTable, kept: np.ndarray) -> np.ndarray:
        """Times `(...)` of allocations `(..., n_groups)`."""
        return self.constant + work.amounts(kept, self.rounding) @ self.factors


def fit_times(work: WorkTable, kept: np.ndarray, times: np.ndarray, tile: int) -> Fit:
    """Fits times of amounts of work to measured networks.

    Few networks are measured and there are many amounts, so layers of one kind are held
    to one time per unit: they leave it where the measurements ask for that. How
    strongly they are held is what predicts networks best that were left out. So is how
    channels are rounded up, but for what the engine says: whole tiles of its own are
    left for a clearly better fit only, since widths that weren't measured follow from
    them.

    Args:
        work: The amounts.
        kept: Counts of the measured networks, `(n, n_groups)`.
        times: What they took, as shares of the dense network's time, `(n,)`.
        tile: Channels in which the engine computes, as far as it knows.
    """
    best = _best_pull(work, kept, times, Rounding(tile))
    best_error = best.error * BETTER
    others = [Rounding(tile, is_halved=True)]
    others += [Rounding(other) for other in TILES if other != tile]
    for other in others:
        candidate = _best_pull(work, kept, times, other)
        if candidate.error < best_error:
            best = candidate
            best_error = candidate.error
    amounts = work.amounts(kept, best.rounding)
    constant, factors = _solve(amounts, times, work.labels, best.pull)
    return Fit(best.rounding, constant, factors)


class _Candidate(NamedTuple):
    """How a fit could be made, and its error on networks that were left out."""

    rounding: Rounding
    pull: float
    error: float


def _best_pull(
    work: WorkTable, kept: np.ndarray, times: np.ndarray, rounding: Rounding
) -> _Candidate:
    """The best of `PULLS` with one way to round."""
    amounts = work.amounts(kept, rounding)
    candidates = []
    for pull in PULLS:
        error = _error_of_left_out(amounts, times, work.labels, pull)
        candidates.append(_Candidate(rounding, pull, error))
    return min(candidates, key=lambda candidate: candidate.error)


def _error_of_left_out(
    amounts: np.ndarray,
    times: np.ndarray,
    labels: Sequence[tuple[Signature, str]],
    pull: float,
) -> float:
    """The mean relative error of networks that the fit hasn't seen."""
    folds = np.arange(len(times)) % N_FOLDS
    errors = []
    for fold in range(min(N_FOLDS, len(times))):
        is_left_out = folds == fold
        constant, factors = _solve(
            amounts[~is_left_out], times[~is_left_out], labels, pull
        )
        predicted = constant + amounts[is_left_out] @ factors
        errors.append(np.abs(predicted / times[is_left_out] - 1))
    return float(np.concatenate(errors).mean())


def _solve(
    amounts: np.ndarray,
    times: np.ndarray,
    labels: Sequence[tuple[Signature, str]],
    pull: float,
) -> tuple[float, np.ndarray]:
    """The constant and the factors `(n_columns,)`.

    Unknown are the time that each column takes at its largest amount, the time that all
    columns of one kind take together, and the constant. Errors are relative: a network
    of half of the time counts twice as much.
    """
    # Here, since it takes long to import and most runs fit nothing.
    from scipy.optimize import nnls

    n_columns = amounts.shape[1]
    largest = np.maximum(amounts.max(0), 1e-12)
    kinds: list[tuple[str, str]] = []
    for signature, amount in labels:
        kinds.append((signature.kind, amount))
    distinct = list(dict.fromkeys(kinds))
    is_of_kind = np.zeros((n_columns, len(distinct)))
    for column, kind in enumerate(kinds):
        is_of_kind[column, distinct.index(kind)] = largest[column]
    # Columns of one kind share its time in the proportion of their largest amounts.
    is_of_kind /= is_of_kind.sum(0)
    n_unknown = n_columns + len(distinct) + 1
    measured = np.zeros((len(times), n_unknown))
    measured[:, :n_columns] = amounts / largest / times[:, None]
    measured[:, -1] = 1 / times
    held = np.zeros((n_columns, n_unknown))
    held[:, :n_columns] = np.eye(n_columns)
    held[:, n_columns:-1] = -is_of_kind
    rows = np.concatenate([measured, pull * held])
    goal = np.concatenate([np.ones(len(times)), np.zeros(n_columns)])
    solution, _ = nnls(rows, goal, maxiter=50 * n_unknown)
    return float(solution[-1]), solution[:n_columns] / largest
