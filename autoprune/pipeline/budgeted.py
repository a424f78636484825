"""What was asked of a network's costs, and what it reached, for a run's results."""

from collections.abc import Callable

from autoprune.costs.budget import parse_single
from autoprune.costs.cost import CostTable
from autoprune.errors import UserError


def budgets_reached(
    budget: str, costs: CostTable, cost_of: Callable[[str], int]
) -> dict[str, dict[str, int]] | None:
    """Every budgeted metric with its target and what the pruned network costs.

    Args:
        budget: What was asked for. An allocation from a file may say anything or
            nothing there; then nothing was asked for.
        costs: The dense network's cost table.
        cost_of: Metric to the cost of the pruned network.

    Returns:
        Metric to `target`, `cost` and `dense`, in the metric's own unit; None where
        nothing was asked for.
    """
    try:
        asked = parse_single(budget)
    except UserError:
        return None
    reached = {}
    for part in asked.parts:
        # The file may have been made where more was known of the network.
        if part.metric in costs.metrics:
            reached[part.metric] = {
                "target": part.target(costs),
                "cost": cost_of(part.metric),
                "dense": costs.metrics[part.metric](costs.dense),
            }
    return reached or None


def allocation_reached(
    budget: str, costs: CostTable, kept: dict[str, int]
) -> dict[str, dict[str, int]] | None:
    """As `budgets_reached`, of an allocation.

    Args:
        budget: What was asked for.
        costs: The network's cost table.
        kept: Group to kept channels.
    """

    def cost_of(metric: str) -> int:
        return costs.metrics[metric](kept)

    return budgets_reached(budget, costs, cost_of)
