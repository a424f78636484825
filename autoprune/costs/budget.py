"""Budgets: what a pruned network may cost, or a range of that."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autoprune.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from autoprune.costs.cost import CostTable

METRICS = ("macs", "params")
"""What can be budgeted."""
SUFFIXES = {"k": 1e3, "M": 1e6, "G": 1e9}
"""What may follow an amount, and by how much it multiplies."""


@dataclass(frozen=True)
class Budget:
    """A cost not to exceed, as a share of the dense network or as an amount.

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
        """Reads "macs=50%", "macs=0.5", "params=120000" or "macs=20M".

        Args:
            text: Metric and target. A target of at most 1 is a share. A budget is
                returned as it is.

        Returns:
            The budget.

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
                f"unknown metric {metric!r};{did_you_mean(metric, METRICS)} use one of "
                f"{', '.join(METRICS)}, e.g. macs=50%",
            )
        try:
            value = _number(target)
        except ValueError:
            raise UserError(
                "budget",
                f"{target!r} is no number; write e.g. macs=50%, macs=0.5 or macs=20M",
            ) from None
        is_percentage = target.endswith("%")
        # Written so that nan, which compares as false, is refused too.
        if not 0 < value < math.inf or (is_percentage and value > 1):
            raise UserError(
                "budget",
                f"the target must be above 0 and at most 100%, got "
                f"{target!r}; e.g. macs=50%",
            )
        if is_percentage or value <= 1:
            return cls(metric, share=value)
        # Rounded first, since 1.001M is 1000999.9999999999 in floating point.
        return cls(metric, amount=int(round(value, 3)))

    def at_position(self, position: float) -> "Budget":
        """The budget itself, at every position: as of a range that is a single point.

        Args:
            position: In [0, 1]; see `BudgetRange.at_position`.
        """
        return self

    def target(self, costs: "CostTable") -> int:
        """The largest allowed cost of a network, as an absolute number.

        Args:
            costs: The network's cost table.

        Returns:
            MACs or parameters, rounded down.
        """
        if self.amount is not None:
            return self.amount
        assert self.share is not None, "a budget has a share or an amount"
        dense = costs.metrics[self.metric](costs.dense)
        # The margin keeps shares such as 0.29 of 100, which is 28.999999999999996,
        # from losing one.
        return int(dense * self.share + 1e-9)

    def share_of(self, costs: "CostTable") -> float:
        """The target as a share of the dense network.

        Args:
            costs: The network's cost table.

        Returns:
            A share in (0, 1]; 1 where the budget is an amount that the network doesn't
            reach.
        """
        # More than the dense network costs is no tighter than all of it.
        return min(1.0, self.target(costs) / costs.metrics[self.metric](costs.dense))

    def __str__(self) -> str:
        if self.share is not None:
            return f"{self.metric}={self.share * 100:.8g}%"
        return f"{self.metric}={self.amount}"


@dataclass(frozen=True)
class BudgetRange:
    """Budgets from one share of the dense network to another.

    One policy is trained for all of them.

    Attributes:
        low: The tightest budget; a share.
        high: The widest budget; a share of the same metric.
    """

    low: Budget
    high: Budget

    @property
    def metric(self) -> str:
        """What is budgeted."""
        return self.low.metric

    def at_position(self, position: float) -> Budget:
        """The budget at a position between the ends.

        Args:
            position: In [0, 1]; 0 is the tightest budget, 1 the widest.

        Returns:
            A share, rounded to a hundredth of a percent, but never beyond an end.
        """
        low = self.low.share
        high = self.high.share
        assert low is not None, "a range is one of shares"
        assert high is not None, "a range is one of shares"
        share = round(low + position * (high - low), 4)
        return Budget(self.metric, min(max(share, low), high))

    def __str__(self) -> str:
        assert self.high.share is not None, "a range is one of shares"
        return f"{self.low}..{self.high.share * 100:.8g}%"


def parse_budget(text: str | Budget | BudgetRange) -> Budget | BudgetRange:
    """Reads a budget as `Budget.parse` does, or a range of shares: "macs=30%..80%".

    Args:
        text: The budget or range. One that is parsed already is returned as it is.

    Returns:
        The budget or range.

    Raises:
        UserError: As `Budget.parse`; or if a range isn't one of shares, from the
            smaller to the larger.
    """
    if isinstance(text, BudgetRange):
        return text
    if isinstance(text, Budget) or ".." not in text:
        return Budget.parse(text)
    # The metric is said once, before the first share.
    first, _, last = text.partition("..")
    metric = first.partition("=")[0]
    low = Budget.parse(first)
    high = Budget.parse(f"{metric}={last}")
    if low.share is None or high.share is None or low.share >= high.share:
        raise UserError(
            "budget",
            f"a range goes from a smaller to a larger share, as in "
            f"macs=30%..80%; got {text!r}",
        )
    return BudgetRange(low, high)


def even_budgets(
    budget: Budget | BudgetRange, n: int, offset: float = 0.5
) -> list[Budget]:
    """Budgets that lie evenly over a range, one in each of `n` equal parts of it.

    Args:
        budget: The range; a single budget is returned `n` times.
        n: How many budgets.
        offset: Where in its part each lies, in [0, 1]: 0 is the tighter end.

    Returns:
        The budgets, the tightest first.
    """
    return [budget.at_position((part + offset) / n) for part in range(n)]


def chebyshev_budgets(
    budget: Budget | BudgetRange, n: int, offset: float
) -> list[Budget]:
    """Budgets of a range that lie denser towards its ends, as Chebyshev's points do.

    At an end whoever learns from the budgets has neighbours on one side only, so more
    of them make up for that.

    Args:
        budget: As in `even_budgets`.
        n: How many budgets.
        offset: Where in its part each lies, in [0, 1]; the parts are equal in angle.

    Returns:
        The budgets, the tightest first.
    """
    budgets = []
    for part in range(n):
        angle = math.pi * (part + offset) / n
        budgets.append(budget.at_position((1 - math.cos(angle)) / 2))
    return budgets


def _number(text: str) -> float:
    """Reads "50%" as 0.5 and "20M" as 20 million; ValueError if it's no number."""
    if text.endswith("%"):
        # Rounded, so that 99.9% is 0.999 rather than 0.9990000000000001.
        return round(float(text[:-1]) / 100, 12)
    suffix = text[-1:]
    if suffix in SUFFIXES:
        return float(text[:-1]) * SUFFIXES[suffix]
    return float(text)
