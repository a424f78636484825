"""Budgets: what a pruned network may cost, or a range of that."""

import math
from dataclasses import dataclass

from autoprune.costs.cost import CostTable
from autoprune.errors import UserError

METRICS = ("macs", "params")
SUFFIXES = {"k": 1e3, "M": 1e6, "G": 1e9}


@dataclass(frozen=True)
class Budget:
    """A cost not to exceed.

    Attributes:
        metric: "macs" or "params".
        share: Target as a share of the dense network in (0, 1], or None.
        amount: Target as an absolute number, or None.
    """

    metric: str
    share: float | None = None
    amount: int | None = None

    @classmethod
    def parse(cls, text: "str | Budget") -> "Budget":
        """From "macs=50%", "macs=0.5", "params=120000" or "macs=20M".

        Raises:
            UserError: If the metric is unknown or the target isn't in (0, 100 %] or a
                positive number.
        """
        if isinstance(text, Budget):
            return text
        metric, _, target = text.partition("=")
        if metric not in METRICS:
            raise UserError(
                "budget",
                f"unknown metric {metric!r}; use one of "
                f"{', '.join(METRICS)}, e.g. macs=50%",
            )
        try:
            value = _number(target)
        except ValueError:
            raise UserError(
                "budget",
                f"{target!r} is no number; write e.g. macs=50%, macs=0.5 or macs=20M",
            ) from None
        is_share = target.endswith("%") or value <= 1
        if not 0 < value < math.inf or (target.endswith("%") and value > 1):
            raise UserError(
                "budget",
                f"the target must be above 0 and at most 100%, got "
                f"{target!r}; e.g. macs=50%",
            )
        return (
            cls(metric, share=value)
            if is_share
            else cls(metric, amount=int(round(value, 3)))
        )

    def at(self, position: float) -> "Budget":
        """Itself, wherever one looks: the range that is a point."""
        return self

    def target(self, costs: CostTable) -> int:
        """The largest allowed cost of a given network, as an absolute number."""
        dense = costs.metrics[self.metric](costs.dense)
        return (
            self.amount if self.amount is not None else int(dense * self.share + 1e-9)
        )

    def share_of(self, costs: CostTable) -> float:
        """The target as a share of the dense network; 1 where an absolute number is
        beyond it.
        """
        return min(1.0, self.target(costs) / costs.metrics[self.metric](costs.dense))

    def __str__(self) -> str:
        return (
            f"{self.metric}={self.share * 100:.8g}%"
            if self.share is not None
            else f"{self.metric}={self.amount}"
        )


@dataclass(frozen=True)
class BudgetRange:
    """Budgets from one share of the dense network to another, for one policy that
    serves them all.

    Attributes:
        low: The tightest.
        high: The widest; of the same metric.
    """

    low: Budget
    high: Budget

    @property
    def metric(self) -> str:
        """What is budgeted."""
        return self.low.metric

    def at(self, position: float) -> Budget:
        """The budget at a position in [0, 1]; 0 is the tightest."""
        low, high = self.low.share, self.high.share
        return Budget(
            self.metric, min(max(round(low + position * (high - low), 4), low), high)
        )

    def __str__(self) -> str:
        return f"{self.low}..{self.high.share * 100:.8g}%"


def parse_budget(text: str | Budget | BudgetRange) -> Budget | BudgetRange:
    """From what `Budget.parse` takes, or a range of shares: "macs=30%..80%".

    Raises:
        UserError: As `Budget.parse`; or if a range isn't one of shares, from the
            smaller to the larger.
    """
    if not isinstance(text, str) or ".." not in text:
        return text if isinstance(text, BudgetRange) else Budget.parse(text)
    first, _, last = text.partition("..")
    low, high = Budget.parse(first), Budget.parse(f"{first.partition('=')[0]}={last}")
    if low.share is None or high.share is None or low.share >= high.share:
        raise UserError(
            "budget",
            f"a range goes from a smaller to a larger share, as in "
            f"macs=30%..80%; got {text!r}",
        )
    return BudgetRange(low, high)


def evenly_spaced(
    budget: Budget | BudgetRange, n: int, offset: float = 0.5
) -> list[Budget]:
    """`n` budgets evenly over a range, each `offset` in [0, 1] into its part of it; a
    single one `n` times.
    """
    return [budget.at((place + offset) / n) for place in range(n)]


def chebyshev_spaced(
    budget: Budget | BudgetRange, n: int, offset: float
) -> list[Budget]:
    """As `evenly_spaced`, but denser towards the range's ends, as Chebyshev's points:
    there one learns from one side only.
    """
    return [
        budget.at((1 - math.cos(math.pi * (place + offset) / n)) / 2)
        for place in range(n)
    ]


def _number(text: str) -> float:
    if text.endswith("%"):
        return round(
            float(text[:-1]) / 100, 12
        )  # 99.9% is 0.999, not 0.9990000000000001
    scale = SUFFIXES.get(text[-1:], 1)
    return float(text[:-1] if scale != 1 else text) * scale
