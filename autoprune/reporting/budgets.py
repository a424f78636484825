"""What was asked of a network's costs and what it reached, in readable units."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autoprune.reporting.wording import METRICS, amount_text

PER_MILLISECOND = 1e6
"""Nanoseconds of a millisecond."""


@dataclass(frozen=True)
class BudgetLine:
    """One budgeted metric.

    Attributes:
        name: What is counted.
        target: The most that it may come to.
        reached: What the pruned network costs.
        share_of_budget: What it costs as a share of the target.
        share_left: What it costs as a share of the dense network.
    """

    name: str
    target: str
    reached: str
    share_of_budget: float
    share_left: float


def budget_lines(
    budgets: Mapping[str, Mapping[str, int]] | None,
    latency_kept: Mapping[str, Any] | None,
) -> list[BudgetLine]:
    """A line for every budgeted metric.

    Args:
        budgets: As in the results.
        latency_kept: Likewise: what was measured under a budget of latency. Then that
            has two lines, with what was predicted and with what was measured.
    """
    lines = []
    for metric, told in (budgets or {}).items():
        if metric == "latency" and latency_kept is not None:
            lines += _latency_lines(latency_kept)
            continue
        name = METRICS[metric]
        # "MACs" begins with a capital already, so `capitalize` would spoil it.
        name = name[0].upper() + name[1:]
        lines.append(_line(name, metric, told["target"], told["cost"], told["dense"]))
    return lines


def _latency_lines(kept: Mapping[str, Any]) -> list[BudgetLine]:
    """Predicted and measured latency, each beside what the budget comes to there."""
    measured_budget = kept["budget_ms"]
    target = kept["budget"].partition("=")[2]
    if target.endswith("%"):
        # Of what the dense network took when both were measured.
        measured_budget = float(target[:-1]) / 100 * kept["dense_ms"]
    predicted = kept["predicted_ms"]
    lines = []
    for name, most, reached, dense in (
        (
            "Latency, predicted",
            kept["budget_ms"],
            predicted,
            predicted / kept["predicted_share"],
        ),
        ("Latency, measured", measured_budget, kept["measured_ms"], kept["dense_ms"]),
    ):
        lines.append(
            _line(
                name,
                "latency",
                most * PER_MILLISECOND,
                reached * PER_MILLISECOND,
                dense * PER_MILLISECOND,
            )
        )
    return lines


def _line(
    name: str, metric: str, target: float, reached: float, dense: float
) -> BudgetLine:
    return BudgetLine(
        name,
        amount_text(metric, round(target)),
        amount_text(metric, round(reached)),
        reached / target,
        reached / dense,
    )
