"""The latency of every allocation, from a model fitted to few measured networks."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from autoprune.costs.metrics import Cost, KeptCounts, counts_in_order, whole_costs
from autoprune.latency.engine_protocol import Setting
from autoprune.latency.fitting import Fit
from autoprune.latency.kernels import EXACT, Rounding, WorkTable

NANOSECONDS = 1e9
"""In a second; budgets count them, as whole numbers."""


@dataclass(frozen=True)
class PredictionError:
    """How far predictions were from measured networks that the fit hadn't seen.

    Attributes:
        median: Of the relative errors.
        largest: Their 95th percentile.
        n_networks: How many networks.
    """

    median: float
    largest: float
    n_networks: int

    @classmethod
    def of(cls, predicted: np.ndarray, measured: np.ndarray) -> "PredictionError":
        """The error of predicted times `(n,)` against measured ones."""
        errors = np.abs(predicted / measured - 1)
        return cls(
            float(np.median(errors)), float(np.quantile(errors, 0.95)), len(errors)
        )


@dataclass(frozen=True)
class LatencyModel:
    """A metric: predicted nanoseconds of a forward pass.

    Attributes:
        setting: Engine, batch, threads and precision that it is about.
        work: What the network's layers have to do.
        fit: What that takes, as shares of the dense network's time.
        dense_seconds: What the dense network took.
        error: On networks that the fit hasn't seen.
        n_fitted: Networks that it was fitted to.
    """

    setting: Setting
    work: WorkTable
    fit: Fit
    dense_seconds: float
    error: PredictionError
    n_fitted: int

    def __call__(self, kept: KeptCounts) -> Cost:
        """As in `Metric`: nanoseconds of a pass at the setting's batch size."""
        counts = counts_in_order(kept, self.work.terms.names, self.work.terms.dense)
        return whole_costs(self._nanoseconds(counts, self.fit.rounding))

    def continuous(self, kept: np.ndarray) -> np.ndarray:
        """As in `Metric`; the same at counts that fill whole tiles, below elsewhere."""
        return self._nanoseconds(kept, EXACT)

    def _nanoseconds(self, kept: np.ndarray, rounding: Rounding) -> np.ndarray:
        amounts = self.work.amounts(kept, rounding)
        share = self.fit.constant + amounts @ self.fit.factors
        return NANOSECONDS * self.dense_seconds * share

    def to_json(self) -> dict[str, Any]:
        """Plain data, from which `from_json` makes the same model."""
        return {
            "setting": vars(self.setting),
            "rounding": vars(self.fit.rounding),
            "constant": self.fit.constant,
            "factors": self.fit.factors.tolist(),
            "dense_seconds": self.dense_seconds,
            "error": vars(self.error),
            "n_fitted": self.n_fitted,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any], work: WorkTable) -> "LatencyModel":
        """The model that `to_json` wrote.

        Args:
            data: What it wrote.
            work: Of the same network.

        Raises:
            KeyError: If something is missing.
            TypeError: If something is of another kind.
            ValueError: If it is of another network.
        """
        factors = np.array(data["factors"], float)
        if len(factors) != len(work.labels):
            raise ValueError(f"{len(factors)} factors for {len(work.labels)} amounts")
        fit = Fit(Rounding(**data["rounding"]), data["constant"], factors)
        return cls(
            Setting(**data["setting"]),
            work,
            fit,
            data["dense_seconds"],
            PredictionError(**data["error"]),
            data["n_fitted"],
        )
