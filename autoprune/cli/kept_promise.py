"""What a search chose is measured until its latency really is within the budget."""

from collections.abc import Callable

from autoprune.agents.finalists import Finalist
from autoprune.agents.resizing import resize
from autoprune.costs.budget import Budget, JointBudget, SingleBudget, parse_single
from autoprune.costs.metrics import counts_in_order
from autoprune.envs.layer_pruning import LayerPruningEnv
from autoprune.errors import UserError
from autoprune.latency.model import NANOSECONDS
from autoprune.pipeline.context import RunContext
from autoprune.pipeline.latency_budget import METRIC, network_timer
from autoprune.reporting.console import say

LARGEST_EXCESS = 1.02
"""Measured latency over budget that still counts as within it."""
MARGIN = 0.995
"""Of a corrected target, so that the next measurement isn't at the very edge."""
MOST_CORRECTIONS = 4
"""So often a target is corrected before the run says that it can't be met."""
SECONDS = 6.0
"""For measuring one network in turns with the dense one."""

Make = Callable[[SingleBudget], LayerPruningEnv]
"""Makes the environment of the run for another budget."""


def keep_promise(
    context: RunContext,
    make: Make,
    finalists: list[Finalist],
) -> tuple[list[Finalist], dict]:
    """Measures the best finalist, and resizes all of them until it is fast enough.

    Args:
        context: A run with a budget of latency.
        make: As `Make`.
        finalists: Those of one budget, best first.

    Returns:
        The finalists, resized where that was needed, and what was measured of the best,
        as `latency_kept` of the results has it.
    """
    model = context.latency_model
    timer = network_timer(context, model.setting)
    asked = parse_single(finalists[0].allocation.budget)
    part = latency_part(asked)
    costs = context.costs
    target = part.target(costs)
    n_corrections = 0
    while True:
        kept = finalists[0].allocation.kept
        counts = counts_in_order(kept, costs.names, costs.dense)
        measured = timer.measure(counts[None], SECONDS)
        excess = _excess(part, measured.shares[0], measured.dense_seconds)
        if excess <= LARGEST_EXCESS or n_corrections == MOST_CORRECTIONS:
            break
        # What was measured is to what was predicted as the next is to its prediction.
        target = int(target / excess * MARGIN)
        corrected = with_latency(asked, target)
        try:
            finalists = resize(finalists, make(corrected), corrected)
        except UserError:
            # No smaller network is allowed.
            break
        n_corrections += 1
    about = {
        **vars(model.setting),
        "budget": str(part),
        "budget_ms": part.target(costs) / NANOSECONDS * 1e3,
        "predicted_ms": model(kept) / NANOSECONDS * 1e3,
        "measured_ms": 1e3 * measured.dense_seconds * measured.shares[0],
        "dense_ms": 1e3 * measured.dense_seconds,
        "predicted_share": model(kept) / model({}),
        "measured_share": float(measured.shares[0]),
        "corrections": n_corrections,
    }
    if excess > LARGEST_EXCESS:
        say(
            f"latency: {about['measured_ms']:.3g} ms measured, {excess - 1:.0%} above "
            f"{part}; no smaller network that is allowed is fast enough"
        )
    return finalists, about


def latency_part(budget: SingleBudget) -> Budget:
    """The budget of time in a budget.

    Args:
        budget: One that has one.
    """
    return next(part for part in budget.parts if part.metric == METRIC)


def with_latency(budget: SingleBudget, target: int) -> SingleBudget:
    """A budget with another one of time.

    Args:
        budget: One of latency, alone or beside others.
        target: Predicted nanoseconds.
    """
    corrected = Budget(METRIC, amount=target)
    if isinstance(budget, Budget):
        return corrected
    parts = []
    for part in budget.parts:
        parts.append(corrected if part.metric == METRIC else part)
    return JointBudget(tuple(parts))


def _excess(part: Budget, share: float, dense_seconds: float) -> float:
    """Measured latency over budget."""
    if part.share is not None:
        # Of what the dense network takes now, whatever else runs now.
        return share / part.share
    assert part.amount is not None, "a budget has a share or an amount"
    return share * dense_seconds * NANOSECONDS / part.amount
