"""Channels that leave through compactors: ResRep, with or without an allocation.

`autoprune.training.compactors` and `autoprune.training.resrep` hold the method; here it
becomes a trained pruner.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

from autoprune.costs.allocation import Allocation
from autoprune.costs.cost import CostTable
from autoprune.evaluation.evaluate import recalibrate
from autoprune.pipeline.context import RunContext
from autoprune.pipeline.methods.base import Decision
from autoprune.pipeline.methods.channels import ChannelDecision
from autoprune.pipeline.methods.trained import PrunerTraining, single_budget
from autoprune.structure.groups import Groups
from autoprune.structure.slicing import prune, top_channels
from autoprune.tracing.trace import trace
from autoprune.training import compactors, resrep


class Compactors:
    """ResRep that forgets as many rows as the allocation says.

    Groups that can't have compactors are sliced first, so that the training makes up
    for it.
    """

    def check(self, context: RunContext) -> None:
        """Checks that some group can have a compactor."""
        groups = context.groups
        pairs = compactors.eligible_pairs(context.model, groups, context.splits.example)
        # For its refusal alone; the network that it makes is dropped.
        compactors.insert_compactors(context.model, groups, pairs)

    def prepare(self, context: RunContext, decision: ChannelDecision) -> PrunerTraining:
        """Slices what has no compactor, then trains the others.

        Args:
            context: Network, images and importance.
            decision: How many channels each group keeps.
        """
        groups = context.groups
        splits = context.splits
        allocation = decision.allocation
        pairs = compactors.eligible_pairs(context.model, groups, splits.example)
        others = {}
        for name, kept in allocation.kept.items():
            if name not in pairs:
                others[name] = kept
        sliced = prune(context.model, groups, top_channels(context.importance, others))
        recalibrate(sliced, splits.calibration.inputs)
        # The sliced network has other counts, and its pins don't carry over by
        # themselves.
        narrower = trace(sliced, splits.example).with_pins(groups.reasons)
        goal = resrep.Goal(CostTable(narrower), counts=allocation.kept)
        start = _CompactorStart(sliced, narrower, pairs)
        # As many rows are forgotten as the allocation says, so it stays the decision.
        return _compactor_training(context, start, goal, lambda counts: allocation)


class ResRep:
    """ResRep as published: the rows of all compactors compete until the budget is met.

    The run's allocation is what remains.
    """

    def check(self, context: RunContext) -> None:
        """Checks that the groups with compactors can meet the budget."""
        # Whatever there is to refuse comes up while a training is prepared, which costs
        # little as long as nobody trains.
        self.prepare(context, None)

    def prepare(
        self, context: RunContext, decision: ChannelDecision | None
    ) -> PrunerTraining:
        """Trains compactors on all groups that can have one.

        Args:
            context: Network, images and budget.
            decision: Of no use here: what remains is decided by the training.
        """
        groups = context.groups
        budget = single_budget(context)
        target = budget.target(context.costs)
        goal = resrep.Goal(context.costs, budget.metric, target)
        allocate = partial(
            Allocation,
            network=groups.fingerprint,
            budget=context.settings.search.budget,
            source="resrep",
        )
        pairs = compactors.eligible_pairs(context.model, groups, context.splits.example)
        start = _CompactorStart(context.model, groups, pairs)
        return _compactor_training(context, start, goal, allocate)


@dataclass(frozen=True)
class _CompactorStart:
    """Where a training of compactors starts.

    Attributes:
        model: The network without them.
        groups: Its trace.
        pairs: Group that can have a compactor to its convolution and batch norm.
    """

    model: nn.Module
    groups: Groups
    pairs: dict[str, tuple[str, str]]


def _compactor_training(
    context: RunContext,
    start: _CompactorStart,
    goal: resrep.Goal,
    allocate: Callable[[dict[str, int]], Allocation],
) -> PrunerTraining:
    """The training of compactors.

    Args:
        context: Images and settings.
        start: Where it starts.
        goal: How much shall be left.
        allocate: From how many channels each group has left to the allocation.
    """
    groups = start.groups
    grown = compactors.insert_compactors(start.model, groups, start.pairs)
    strength = context.settings.removal.strength
    callback = resrep.Compaction(groups, start.pairs, goal, strength)

    def finish(trained: nn.Module) -> tuple[nn.Module, Decision]:
        folded = compactors.fold(trained, start.pairs)
        norms = [norm for _, norm in start.pairs.values()]
        inputs = context.splits.calibration.inputs
        compactors.standardise(folded, norms, inputs)
        # Groups without a compactor keep all that they have.
        counts = dict(groups.channels)
        for name, rows in callback.kept.items():
            counts[name] = len(rows)
        pruned = prune(folded, groups, callback.kept)
        return pruned, ChannelDecision(allocate(counts))

    return PrunerTraining(grown, callback, finish)
