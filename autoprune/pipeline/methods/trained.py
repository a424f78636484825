"""Channels that leave by training: they merge with others, are forgotten and folded
away, or go a little at a time.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

from autoprune.costs.allocation import Allocation
from autoprune.costs.budget import parse_budget
from autoprune.costs.cost import CostTable
from autoprune.evaluation.evaluate import recalibrate
from autoprune.evaluation.importance import Importance, importance
from autoprune.pipeline.context import Workspace
from autoprune.structure.groups import Groups
from autoprune.structure.slicing import prune, top_channels
from autoprune.tracing.trace import trace
from autoprune.training import centripetal, compactors, resrep
from autoprune.training.gradual import GradualChannels, GradualWeights
from autoprune.training.loop import TrainingCallback
from autoprune.training.masks import Masks, ranked_masks

Decision = Allocation | Masks


@dataclass(frozen=True)
class Course:
    """One training after which channels can leave.

    Attributes:
        model: What is trained.
        plug: What takes part.
        finish: From the trained model to what remains of it, and the decision that this
            amounts to.
    """

    model: nn.Module
    callback: TrainingCallback
    finish: Callable[[nn.Module], tuple[nn.Module, Decision]]


def masks_within(workspace: Workspace, network: nn.Module, target: int) -> Masks:
    """Masks of the run's granularity by its criterion, agent and seed, so that `target`
    is left of what it counts.

    Args:
        workspace: The run's.
        network: Of the run's architecture, with whatever weights.
        target: The most that may be left of the budget's metric.
    """
    search = workspace.settings.search
    metric = parse_budget(search.budget).metric
    how = metric, search.criterion, search.agent, search.seed
    return ranked_masks(network, workspace.groups, search.granularity, target, *how)


def _gradual(workspace: Workspace, decision: Decision) -> Course:
    """Iterative pruning, or AGP: towards the allocation, or the budget that masks have
    to meet.
    """
    make = _gradual_masks if isinstance(decision, Masks) else _gradual_channels
    return make(
        workspace,
        decision,
        workspace.settings.removal.schedule,
        workspace.settings.removal.prunings,
    )


def _gradual_channels(
    workspace: Workspace, allocation: Allocation, *how: object
) -> Course:
    search, groups, train = (
        workspace.settings.search,
        workspace.groups,
        workspace.splits.train,
    )

    def ranked(network: nn.Module) -> Importance:
        return importance(search.criterion, network, groups, train, search.seed)

    callback = GradualChannels(*how, groups, allocation.kept, ranked)
    return Course(
        copy.deepcopy(workspace.model),
        callback,
        lambda trained: (prune(trained, groups, callback.kept), allocation),
    )


def _gradual_masks(workspace: Workspace, masks: Masks, *how: object) -> Course:
    costs, budget = workspace.costs, parse_budget(workspace.settings.search.budget)
    dense = costs.metrics[budget.metric](costs.dense)
    callback = GradualWeights(
        *how, dense, budget.target(costs), partial(masks_within, workspace)
    )
    return Course(
        copy.deepcopy(workspace.model),
        callback,
        lambda trained: (trained, callback.masks),
    )


def _centripetal(workspace: Workspace, allocation: Allocation) -> Course:
    """C-SGD: as many clusters as the allocation keeps channels; none of them is torn
    out.
    """
    search, removal = workspace.settings.search, workspace.settings.removal
    model, groups = copy.deepcopy(workspace.model), workspace.groups
    counts = {
        name: kept
        for name, kept in allocation.kept.items()
        if kept < groups[name].channels
    }
    clusters = centripetal.clusters_of(
        model, groups, counts, removal.clusters, search.seed
    )
    callback = centripetal.Centripetal(groups, clusters, removal.strength)
    return Course(
        model,
        callback,
        lambda trained: (centripetal.merge(trained, groups, clusters), allocation),
    )


def _compactors(workspace: Workspace, allocation: Allocation) -> Course:
    """ResRep that forgets as many rows as the allocation says.

    Groups that can't have compactors are sliced first, so that the training makes up
    for it.
    """
    groups, splits = workspace.groups, workspace.splits
    pairs = compactors.eligible(workspace.model, groups, splits.example)
    others = {name: kept for name, kept in allocation.kept.items() if name not in pairs}
    sliced = prune(workspace.model, groups, top_channels(workspace.importance, others))
    recalibrate(sliced, splits.calibration.inputs)
    narrower = trace(sliced, splits.example).with_pins(groups.reasons)
    goal = resrep.Goal(CostTable(narrower), counts=allocation.kept)
    return _resrep_course(
        workspace, (sliced, narrower, pairs), goal, lambda counts: allocation
    )


def _resrep(workspace: Workspace, allocation: Allocation | None) -> Course:
    """ResRep as published: rows of all compactors compete until the budget is met; the
    allocation is what remains.
    """
    groups, asked = workspace.groups, workspace.settings.search.budget
    budget = parse_budget(asked)
    goal = resrep.Goal(workspace.costs, budget.metric, budget.target(workspace.costs))
    found = partial(
        Allocation, network=groups.fingerprint, budget=asked, source="resrep"
    )
    pairs = compactors.eligible(workspace.model, groups, workspace.splits.example)
    return _resrep_course(workspace, (workspace.model, groups, pairs), goal, found)


def _resrep_course(
    workspace: Workspace,
    start: tuple[nn.Module, Groups, dict[str, tuple[str, str]]],
    goal: resrep.Goal,
    decision: Callable[[dict[str, int]], Allocation],
) -> Course:
    """From a network, its trace and its eligible groups; `decision` is told how many
    channels each group has left.
    """
    model, groups, pairs = start
    grown = compactors.insert_compactors(model, groups, pairs)
    callback = resrep.Compaction(
        groups, pairs, goal, workspace.settings.removal.strength
    )

    def finish(trained: nn.Module) -> tuple[nn.Module, Allocation]:
        inputs, folded = (
            workspace.splits.calibration.inputs,
            compactors.fold(trained, pairs),
        )
        compactors.standardise(folded, [norm for _, norm in pairs.values()], inputs)
        counts = dict(groups.channels) | {
            name: len(rows) for name, rows in callback.kept.items()
        }
        return prune(folded, groups, callback.kept), decision(counts)

    return Course(grown, callback, finish)


def _check_centripetal(workspace: Workspace) -> None:
    names = centripetal.mergeable(
        workspace.model, workspace.groups, workspace.splits.example
    )
    centripetal.check_mergeable(
        [group.name for group in workspace.groups if group.channels > 1], names
    )


def _check_compactors(workspace: Workspace) -> None:
    pairs = compactors.eligible(
        workspace.model, workspace.groups, workspace.splits.example
    )
    compactors.insert_compactors(workspace.model, workspace.groups, pairs)


def _check_resrep(workspace: Workspace) -> None:
    _resrep(workspace, None)


@dataclass(frozen=True)
class TrainedPruner:
    """A way in which channels, or weights, leave by training.

    Attributes:
        course: From workspace and decision to the training.
        check: Raises a `UserError` where the network can't have it.
    """

    course: Callable[[Workspace, Decision], Course]
    check: Callable[[Workspace], None]


TRAINED_PRUNERS: dict[str, TrainedPruner] = {
    "gradual": TrainedPruner(_gradual, lambda workspace: None),
    "centripetal": TrainedPruner(_centripetal, _check_centripetal),
    "compactors": TrainedPruner(_compactors, _check_compactors),
    "resrep": TrainedPruner(_resrep, _check_resrep),
}
