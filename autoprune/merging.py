"""Channels that leave by training: they merge with others, or are forgotten and folded away."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from autoprune import centripetal, resrep
from autoprune.allocation import Allocation, parse_budget
from autoprune.finetune import Plug
from autoprune.pruning import prune, top_channels
from autoprune.workspace import Workspace


@dataclass(frozen=True)
class Course:
    """One training after which channels can leave.

    Attributes:
        model: What is trained.
        plug: What takes part.
        finish: From the trained model to the smaller network, and the allocation that it has.
    """

    model: nn.Module
    plug: Plug
    finish: Callable[[nn.Module], tuple[nn.Module, Allocation]]


def _centripetal(workspace: Workspace, allocation: Allocation) -> Course:
    """C-SGD: as many clusters as the allocation keeps channels; none of them is torn out."""
    search, removal = workspace.settings.search, workspace.settings.removal
    model, groups = copy.deepcopy(workspace.model), workspace.groups
    counts = {name: kept for name, kept in allocation.kept.items() if kept < groups[name].channels}
    clusters = centripetal.clusters_of(model, groups, counts, removal.clusters, search.seed)
    strength = centripetal.STRENGTH if removal.strength is None else removal.strength
    plug = centripetal.Centripetal(groups, clusters, strength)
    return Course(model, plug, lambda trained: (centripetal.merge(trained, groups, clusters), allocation))


def _compactors(workspace: Workspace, allocation: Allocation) -> Course:
    """ResRep that forgets as many rows as the allocation says; groups that can't have compactors are sliced."""
    return _resrep_course(workspace, allocation, resrep.Goal(workspace.costs, counts=allocation.kept))


def _resrep(workspace: Workspace, allocation: Allocation | None) -> Course:
    """ResRep as published: rows of all compactors compete until the budget is met; the allocation is what remains."""
    budget = parse_budget(workspace.settings.search.budget)
    goal = resrep.Goal(workspace.costs, budget.metric, budget.target(workspace.costs))
    return _resrep_course(workspace, None, goal)


def _resrep_course(workspace: Workspace, allocation: Allocation | None, goal: resrep.Goal) -> Course:
    groups, strength = workspace.groups, workspace.settings.removal.strength
    pairs = resrep.eligible(workspace.model, groups, workspace.splits.example)
    grown = resrep.insert_compactors(workspace.model, groups, pairs)
    plug = resrep.Compaction(groups, pairs, goal, strength)

    def finish(trained: nn.Module) -> tuple[nn.Module, Allocation]:
        inputs, folded = workspace.splits.calibration.inputs, resrep.fold(trained, pairs)
        resrep.standardise(folded, [norm for _, norm in pairs.values()], inputs)
        kept = _others(workspace, allocation, pairs) | plug.kept
        counts = {group.name: len(kept[group.name]) if group.name in kept else group.channels for group in groups}
        found = allocation or Allocation(counts, groups.fingerprint, workspace.settings.search.budget, "resrep")
        return prune(folded, groups, kept), found

    return Course(grown, plug, finish)


def _others(workspace: Workspace, allocation: Allocation | None, pairs: dict) -> dict[str, Tensor]:
    """The most important channels of the groups without compactors."""
    if allocation is None:
        return {}
    counts = {name: kept for name, kept in allocation.kept.items() if name not in pairs}
    return top_channels(workspace.importance, counts)


def _check_centripetal(workspace: Workspace) -> None:
    names = centripetal.mergeable(workspace.model, workspace.groups, workspace.splits.example)
    centripetal.check_mergeable([group.name for group in workspace.groups if group.channels > 1], names)


def _check_compactors(workspace: Workspace) -> None:
    pairs = resrep.eligible(workspace.model, workspace.groups, workspace.splits.example)
    resrep.insert_compactors(workspace.model, workspace.groups, pairs)


def _check_resrep(workspace: Workspace) -> None:
    _resrep(workspace, None)


@dataclass(frozen=True)
class Merging:
    """A way in which channels leave by training.

    Attributes:
        course: From workspace and allocation to the training.
        check: Raises a `UserError` where the network can't have it.
    """

    course: Callable[[Workspace, Allocation], Course]
    check: Callable[[Workspace], None]


MERGINGS: dict[str, Merging] = {
    "centripetal": Merging(_centripetal, _check_centripetal),
    "compactors": Merging(_compactors, _check_compactors),
    "resrep": Merging(_resrep, _check_resrep),
}
