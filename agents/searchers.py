"""Who can search, what each needs and for which budgets; imports no torch.

So a wrong name is refused before anything slow is imported.
"""

from collections.abc import Iterable
from importlib.util import find_spec

from autoprune.costs.budget import AnyBudget, BudgetRange
from autoprune.errors import UserError, check_known, missing_package
from autoprune.names import BASELINES, LEARNERS

OPTIONAL_PACKAGES = {
    "tqc": ("sb3_contrib", "sb3-contrib"),
    "evolution": ("cma", "cma"),
    "tpe": ("optuna", "optuna"),
}
"""Agent or baseline to the module that it imports and the package to install."""
DETERMINISTIC = ("uniform", "sensitivity", "global", "cost_aware")
"""Baselines that decide by what they measure once: without chance and without search.
"""
FOR_RANGES = ("uniform", "random")
"""Baselines that mean something where every episode has another budget."""
DEFAULT_BASELINES = ("uniform", "random", "sensitivity")
"""Baselines that a search is held against unless others are named."""


def check_installed(name: str, argument: str) -> None:
    """Checks that the package of an agent or a baseline can be imported.

    Args:
        name: The agent or baseline; one without a package of its own passes.
        argument: The argument that asked for it, for the message.

    Raises:
        UserError: If the package is missing; the message says how to install it.
    """
    if name not in OPTIONAL_PACKAGES:
        return
    module, package = OPTIONAL_PACKAGES[name]
    if find_spec(module) is None:
        raise missing_package(argument, name, package)


def check_agent(agent: str, budget: AnyBudget, others: Iterable[str] = ()) -> None:
    """Checks that an agent or a baseline can search under a budget here.

    Args:
        agent: Its name; those of `others` are known too.
        budget: Most baselines search for a single one.
        others: Further names.

    Raises:
        UserError: If there is no such agent, it isn't for such a budget, or what it
            needs isn't installed.
    """
    check_installed(agent, "agent")
    check_known("agent", agent, (*LEARNERS.known, *BASELINES.known, *others))
    is_for_ranges = agent not in BASELINES.known or agent in FOR_RANGES
    if isinstance(budget, BudgetRange) and not is_for_ranges:
        known = ", ".join((*LEARNERS.known, *FOR_RANGES))
        raise UserError(
            "agent",
            f"{agent} is for one budget, got the range {budget}; for a range "
            f"take {known}",
        )


def parse_baselines(text: str | None, agent: str) -> list[str]:
    """The names in a list such as "uniform,random".

    Args:
        text: Names with commas between them, "none", or None for the usual ones, which
            an allocator that decides at once doesn't need.
        agent: What they are for.

    Returns:
        The names of baselines, maybe none.

    Raises:
        UserError: If a name is unknown, with the nearest known ones, or what it needs
            isn't installed.
    """
    if text is None:
        return [] if agent in DETERMINISTIC else list(DEFAULT_BASELINES)
    if text == "none":
        return []
    names = [name.strip() for name in text.split(",")]
    for name in names:
        BASELINES.check(name, "baselines", ", or none")
        check_installed(name, "baselines")
    return names
