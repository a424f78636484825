"""Which pruning methods there are, and what goes with each.

The command line's help texts and refusals derive from the entries of `PRUNING_METHODS`
and `TRAINED_PRUNERS`. This module imports no torch, since the
command line's help has to answer at once; an entry imports its method when it is asked
for.

To add a method, write a class with the interface of
`autoprune.pipeline.methods.base.PruningMethod` in a file beside this one, a function
that imports and makes it, and an entry in `PRUNING_METHODS`.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from autoprune.config import SearchConfig, Settings
from autoprune.errors import UserError, check_known

if TYPE_CHECKING:
    from autoprune.pipeline.methods.base import PruningMethod
    from autoprune.pipeline.methods.trained import TrainedPruner

NO_RANK = "ranks channels, and depth and image size have no rank"
ELEMENTS = ("macs", "params")
"""Metrics that go by elements of weights; bytes and times follow from whole tensors."""
N_OF_M = "N:M"
"""Stands for "2:4" and the like in `PRUNING_METHODS`."""


@dataclass(frozen=True)
class MethodEntry:
    """What goes with a pruning method.

    Attributes:
        make: Makes the method.
        removes: What it removes, for the help.
        units: What is ranked, for refusals.
        agents: Names of who may decide; None for every agent and baseline that
            searches channels.
        refused_agents: Of those the ones that can't, each with the reason.
        further_agents: Agents that this method alone has.
        criteria: Names of the criteria that it can rank by; None for all.
        metrics: What budgets may count, one metric at a time; None for any, and for
            several at once.
        takes_ranges: Whether a range of budgets can be searched.
        takes_allocations: Whether a person's allocation can be applied.
    """

    make: "Callable[[], PruningMethod[Any]]"
    removes: str
    units: str = "channels"
    agents: tuple[str, ...] | None = None
    refused_agents: Mapping[str, str] = field(default_factory=dict)
    further_agents: tuple[str, ...] = ()
    criteria: tuple[str, ...] | None = None
    metrics: tuple[str, ...] | None = None
    takes_ranges: bool = False
    takes_allocations: bool = False


@dataclass(frozen=True)
class PrunerEntry:
    """What goes with a trained pruner.

    Attributes:
        make: Makes the pruner.
        how: How units leave, for the help.
        granularities: What it can remove.
        takes_ranges: Whether a range of budgets can be searched.
        takes_allocations: Whether it follows an allocation; else it decides by itself,
            under the budget.
    """

    make: "Callable[[], TrainedPruner]"
    how: str
    granularities: tuple[str, ...]
    takes_ranges: bool = True
    takes_allocations: bool = True


def _channels() -> "PruningMethod[Any]":
    from autoprune.pipeline.methods.channels import Channels

    return Channels()


def _blocks() -> "PruningMethod[Any]":
    from autoprune.pipeline.methods.blocks import Blocks

    return Blocks()


def _dimensions() -> "PruningMethod[Any]":
    from autoprune.pipeline.methods.dimensions import Dimensions

    return Dimensions()


def _masks() -> "PruningMethod[Any]":
    from autoprune.pipeline.methods.masks import WeightMasks

    return WeightMasks()


def _mask_entry(removes: str) -> MethodEntry:
    return MethodEntry(
        _masks,
        removes,
        units="masks",
        agents=("global", "uniform"),
        criteria=("l1", "l2", "lamp", "random"),
        metrics=ELEMENTS,
    )


PRUNING_METHODS: dict[str, MethodEntry] = {
    "channel": MethodEntry(
        _channels, "channels", takes_ranges=True, takes_allocations=True
    ),
    "layer": MethodEntry(
        _blocks,
        "residual blocks",
        units="blocks",
        # One ranking of the blocks decides, so agents have nothing to choose.
        agents=("global",),
        # Blocks are ranked by damage per MAC.
        metrics=("macs",),
    ),
    "dimensions": MethodEntry(
        _dimensions,
        "channels, residual blocks and pixels of the image's side together",
        refused_agents=dict.fromkeys(("global", "cost_aware"), NO_RANK),
        further_agents=("polynomial",),
        # Depth and image size are weighed by what they save of these.
        metrics=ELEMENTS,
        takes_ranges=True,
        takes_allocations=True,
    ),
    "weight": _mask_entry("weights, as masks"),
    "row": _mask_entry("rows of kernels, as masks"),
    "column": _mask_entry("columns of kernels, as masks"),
    "kernel": _mask_entry("kernels, as masks"),
    "filter": _mask_entry("filters, as masks"),
    N_OF_M: MethodEntry(
        _masks,
        "all but N of every M inputs, as in 2:4, as masks",
        units="masks",
        agents=("global", "uniform"),
        # The largest of every M stay; the code that picks them takes no criterion.
        criteria=("l1",),
        metrics=ELEMENTS,
    ),
}
"""Granularity to what goes with it."""


def _gradual() -> "TrainedPruner":
    from autoprune.pipeline.methods.trained import Gradual

    return Gradual()


def _centripetal() -> "TrainedPruner":
    from autoprune.pipeline.methods.trained import Centripetal

    return Centripetal()


def _compactors() -> "TrainedPruner":
    from autoprune.pipeline.methods.compacted import Compactors

    return Compactors()


def _resrep() -> "TrainedPruner":
    from autoprune.pipeline.methods.compacted import ResRep

    return ResRep()


SLICE = "slice"
"""The removal method without training: units leave at once."""
TRAINED_PRUNERS: dict[str, PrunerEntry] = {
    "gradual": PrunerEntry(
        _gradual,
        "a little at a time, ranked anew each time",
        # Without N:M, one fixed share, towards which there are no small steps.
        ("channel", "weight", "row", "column", "kernel", "filter"),
    ),
    "centripetal": PrunerEntry(
        _centripetal, "channels grow together and merge", ("channel",)
    ),
    "compactors": PrunerEntry(
        _compactors, "ResRep, as many as the allocation says", ("channel",)
    ),
    "resrep": PrunerEntry(
        _resrep,
        "ResRep, which also chooses where, under the budget",
        ("channel",),
        # How much goes where is settled by one training, which has one budget.
        takes_ranges=False,
        takes_allocations=False,
    ),
}
"""Removal method to how units leave by training."""


def method_of(settings: Settings) -> "PruningMethod[Any]":
    """The pruning method that settings ask for.

    Args:
        settings: Of which granularity and removal method count; checked before.

    Returns:
        A new method, wrapped in its trained pruner where units leave by training.
    """
    method = entry_of(settings.search.granularity).make()
    if settings.removal.method == SLICE:
        return method
    # Only here, since it imports torch: help texts and refusals do without.
    from autoprune.pipeline.methods.trained import Trained

    pruner = TRAINED_PRUNERS[settings.removal.method].make()
    return Trained(method, pruner, settings.removal.method)


def entry_of(granularity: str) -> MethodEntry:
    """What goes with a granularity.

    Args:
        granularity: A key of `PRUNING_METHODS`, or N:M as in 2:4.

    Raises:
        UserError: If it is unknown; the nearest name is offered.
    """
    if re.fullmatch(r"\d+:\d+", granularity):
        return PRUNING_METHODS[N_OF_M]
    # The key stands for a pattern and is nothing to type.
    names = [name for name in PRUNING_METHODS if name != N_OF_M]
    check_known("granularity", granularity, names, others=", or N:M as in 2:4")
    return PRUNING_METHODS[granularity]


def further_agents() -> list[str]:
    """Agents that single pruning methods have beside those that search channels."""
    names = []
    for entry in PRUNING_METHODS.values():
        names.extend(entry.further_agents)
    return names


def check_methods(settings: Settings) -> None:
    """Checks that the settings ask for things that go together.

    Args:
        settings: Granularity, agent, criterion, budget and removal method.

    Raises:
        UserError: If a name is unknown, or something doesn't go with the pruning method
            or the trained pruner.
    """
    check_known(
        "method", settings.removal.method, [SLICE, *TRAINED_PRUNERS], "removal.method"
    )
    # Names before what goes with what: a refusal that builds on a name nobody knows
    # would send its reader the wrong way.
    entry = entry_of(settings.search.granularity)
    _check_agent(settings.search, entry)
    _check_criterion(settings.search, entry)
    _check_budget(settings, entry)
    if settings.removal.method == SLICE:
        return
    pruner = TRAINED_PRUNERS[settings.removal.method]
    if settings.search.granularity not in pruner.granularities:
        raise UserError(
            "removal.method",
            f"{settings.removal.method} is not for granularity "
            f"{settings.search.granularity}; use {SLICE}",
        )


def _check_agent(search: SearchConfig, entry: MethodEntry) -> None:
    agent = search.agent
    # Before the general refusal, since this one can tell where the agent does belong.
    owners = [
        name for name, other in PRUNING_METHODS.items() if agent in other.further_agents
    ]
    if owners and agent not in entry.further_agents:
        raise UserError(
            "agent",
            f"{agent} is for granularity {_or(owners)}, got {search.granularity}",
        )
    if agent in entry.refused_agents:
        raise UserError(
            "agent",
            f"{agent} {entry.refused_agents[agent]}; use {SearchConfig.agent}",
        )
    if entry.agents is not None and agent not in entry.agents:
        raise UserError(
            "agent",
            f"{entry.units} of granularity {search.granularity} go by "
            f"{_or(entry.agents)}, got {agent!r}",
        )


def _check_criterion(search: SearchConfig, entry: MethodEntry) -> None:
    if entry.criteria is not None and search.criterion not in entry.criteria:
        raise UserError(
            "criterion",
            f"{entry.units} of granularity {search.granularity} go by "
            f"{_or(entry.criteria)}, got {search.criterion!r}",
        )


def _check_budget(settings: Settings, entry: MethodEntry) -> None:
    # Budgets are parsed by a room that imports torch.
    from autoprune.costs.budget import BudgetRange, parse_budget

    search = settings.search
    budget = parse_budget(search.budget)
    if entry.metrics is not None and budget.metric not in entry.metrics:
        known = _or(f"{metric}=50%" for metric in entry.metrics)
        raise UserError(
            "budget",
            f"granularity {search.granularity} counts {_or(entry.metrics)}, one at a "
            f"time, got {budget}; use e.g. {known}, or granularity channel",
        )
    if not isinstance(budget, BudgetRange):
        return
    # An agent of a method's own decides at once and learns nothing that could serve a
    # second budget.
    if not entry.takes_ranges or search.agent in entry.further_agents:
        raise UserError(
            "budget",
            f"a range is for agents; {search.granularity} takes one budget, got "
            f"{budget}",
        )
    pruner = TRAINED_PRUNERS.get(settings.removal.method)
    if pruner is not None and not pruner.takes_ranges:
        raise UserError(
            "budget", f"{settings.removal.method} trains for one budget, got {budget}"
        )


def _or(names: Iterable[str]) -> str:
    return " or ".join(names)
