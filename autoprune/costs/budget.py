"""Budgets: what a pruned network may cost, a range of that, or several at once.

The metrics, and what each counts of one sample:

- `macs`: multiply-accumulates, exact.
- `params`: trainable values, exact.
- `memory`: bytes of all parameters and buffers and of the largest activations that are
  alive at once, in float32.
- `size`: bytes of the file of the pruned network's weights, never less than the real
  file has.
- `latency`: nanoseconds that a latency model predicts.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from autoprune.costs.units import (
    UNITS,
    amount_text,
    out_of_range,
    read_number,
    scaled_down,
)
from autoprune.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from autoprune.costs.cost import CostTable

METRICS = tuple(UNITS)
"""What can be budgeted."""


@dataclass(frozen=True)
class Budget:
    """A cost not to exceed, as a share of the dense network or as an amount.

    Attributes:
        metric: One of `METRICS`.
        share: Target as a share of the dense network in (0, 1], or None.
        amount: Target in the metric's own unit, or None.
    """

    metric: str
    share: float | None = None
    amount: int | None = None

    @classmethod
    def parse(cls, text: "str | Budget") -> "Budget":
        """Reads "macs=50%", "macs=0.5", "params=120000", "size=5MB" or "latency=8ms".

        Args:
            text: Metric and target. A target of at most 1 without a unit is a share. A
                budget is returned as it is.

        Returns:
            The budget.

        Raises:
            UserError: If the metric is unknown or the target isn't in (0, 100 %] or a
                positive amount.
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
        unit = UNITS[metric]
        if target.endswith("%"):
            # Rounded, so that 99.9% is 0.999 rather than 0.9990000000000001.
            share = round(float(read_number(target[:-1], target, unit)) / 100, 12)
            if not 0 < share <= 1:
                raise out_of_range(target)
            return cls(metric, share=share)
        digits, factor = unit.split(target)
        number = read_number(digits, target, unit)
        if not number > 0:
            raise out_of_range(target)
        if factor is None and not unit.takes_bare_amounts:
            raise UserError(
                "budget",
                f"{target!r} has no unit; write e.g. {unit.examples}",
            )
        if factor is None and number <= 1:
            return cls(metric, share=float(number))
        amount = scaled_down(number, factor or 1)
        if amount < 1:
            raise out_of_range(target)
        return cls(metric, amount=amount)

    @property
    def parts(self) -> "tuple[Budget, ...]":
        """The budgets of single metrics that it is made of: itself."""
        return (self,)

    def with_metrics(self, costs: "CostTable") -> "CostTable":
        """The costs under which it can be searched: those given.

        Args:
            costs: The network's cost table.

        Raises:
            UserError: If they don't know the metric.
        """
        _check_metric(self.metric, costs)
        return costs

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
            A cost in the metric's own unit, rounded down.
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
        assert self.amount is not None, "a budget has a share or an amount"
        return f"{self.metric}={amount_text(self.metric, self.amount)}"


@dataclass(frozen=True)
class JointBudget:
    """Several budgets of different metrics, of which all are to be met.

    It is one budget of one more metric, the joint one: the largest of the costs, each
    in units of its target; see `autoprune.costs.joint`.

    Attributes:
        parts: The budgets, each of another metric.
    """

    parts: tuple[Budget, ...]

    @property
    def metric(self) -> str:
        """The name of the joint metric, which holds the targets."""
        return str(self)

    def at_position(self, position: float) -> "JointBudget":
        """The budget itself, as `Budget.at_position`."""
        return self

    def with_metrics(self, costs: "CostTable") -> "CostTable":
        """The costs with the joint metric added.

        Args:
            costs: The network's cost table.

        Raises:
            UserError: If they don't know one of the metrics.
        """
        # Here, since budgets are parsed before anything slow is imported.
        from autoprune.costs.joint import JointMetric

        metrics = {}
        targets = {}
        for part in self.parts:
            _check_metric(part.metric, costs)
            metrics[part.metric] = costs.metrics[part.metric]
            targets[part.metric] = part.target(costs)
        return costs.with_metric(self.metric, JointMetric(metrics, targets))

    def target(self, costs: "CostTable") -> int:
        """The largest allowed joint cost, the same for every network.

        Args:
            costs: Of no use here.
        """
        from autoprune.costs.joint import JOINT_TARGET

        return JOINT_TARGET

    def share_of(self, costs: "CostTable") -> float:
        """The smallest of the shares, as `Budget.share_of`.

        Args:
            costs: The network's cost table.
        """
        return min(part.share_of(costs) for part in self.parts)

    def __str__(self) -> str:
        return ",".join(map(str, self.parts))


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

    def with_metrics(self, costs: "CostTable") -> "CostTable":
        """As `Budget.with_metrics`.

        Args:
            costs: The network's cost table.
        """
        return self.low.with_metrics(costs)

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


SingleBudget: TypeAlias = Budget | JointBudget
"""What one network is pruned for."""
AnyBudget: TypeAlias = Budget | JointBudget | BudgetRange
"""What a search is for."""


def parse_budget(text: str | AnyBudget) -> AnyBudget:
    """Reads a budget, a range of shares, or budgets of several metrics.

    Args:
        text: As for `Budget.parse`; or "macs=30%..80%"; or "macs=50%,size=5MB". What
            is parsed already is returned as it is.

    Returns:
        The budget, range or joint budget.

    Raises:
        UserError: As `Budget.parse`; or if a range isn't one of shares, from the
            smaller to the larger, or budgets that hold together are of one metric.
    """
    if not isinstance(text, str):
        return text
    if "," in text:
        return _parse_joint(text)
    if ".." not in text:
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


def parse_single(text: str | SingleBudget) -> SingleBudget:
    """Reads what one network is pruned for: no range.

    Args:
        text: As for `parse_budget`.

    Raises:
        UserError: As `parse_budget`; or if it is a range.
    """
    if not isinstance(text, str):
        return text
    if "," in text:
        return _parse_joint(text)
    return Budget.parse(text)


def _parse_joint(text: str) -> JointBudget:
    """Reads "macs=50%,size=5MB"."""
    parts = []
    for part in text.split(","):
        if ".." in part:
            raise UserError(
                "budget",
                f"a range is of one metric alone, since its budgets lie on one line; "
                f"got {part.strip()!r} beside others",
            )
        parts.append(Budget.parse(part.strip()))
    metrics = [part.metric for part in parts]
    for metric in metrics:
        if metrics.count(metric) > 1:
            raise UserError(
                "budget", f"{metric} is budgeted twice; give each metric once"
            )
    return JointBudget(tuple(parts))


def has_metric(budget: AnyBudget, metric: str) -> bool:
    """Whether a budget is one of a metric, alone or beside others.

    Args:
        budget: The budget or range.
        metric: Its name.
    """
    return any(part.metric == metric for part in budget.at_position(0).parts)


def even_budgets(budget: AnyBudget, n: int, offset: float = 0.5) -> list[SingleBudget]:
    """Budgets that lie evenly over a range, one in each of `n` equal parts of it.

    Args:
        budget: The range; a single budget is returned `n` times.
        n: How many budgets.
        offset: Where in its part each lies, in [0, 1]: 0 is the tighter end.

    Returns:
        The budgets, the tightest first.
    """
    return [budget.at_position((part + offset) / n) for part in range(n)]


def chebyshev_budgets(budget: AnyBudget, n: int, offset: float) -> list[SingleBudget]:
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
    budgets: list[SingleBudget] = []
    for part in range(n):
        angle = math.pi * (part + offset) / n
        budgets.append(budget.at_position((1 - math.cos(angle)) / 2))
    return budgets


def _check_metric(metric: str, costs: "CostTable") -> None:
    """Raises a `UserError` if costs don't know a metric."""
    if metric in costs.metrics:
        return
    remedy = f"budget {', '.join(costs.metrics)}"
    if metric == "latency":
        remedy += ", or give costs that know it (CostTable.with_metric)"
    raise UserError(
        "budget", f"nothing tells the {metric} of this network here; {remedy}"
    )
