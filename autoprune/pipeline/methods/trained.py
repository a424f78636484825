"""Units that leave by training.

Channels merge with others, are forgotten and folded away, or go a little at a time;
masks grow. `autoprune.pipeline.methods.registry` names these pruners.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from autoprune.config import Settings
from autoprune.costs.allocation import Allocation
from autoprune.costs.budget import SingleBudget, parse_budget
from autoprune.deploy.pruned import load_pruned, save_pruned
from autoprune.evaluation.evaluate import recalibrate
from autoprune.evaluation.importance import Importance, importance
from autoprune.pipeline.context import RunContext
from autoprune.pipeline.diverging import explained
from autoprune.pipeline.methods.base import Decision, PruningMethod
from autoprune.pipeline.methods.channels import ChannelDecision
from autoprune.pipeline.methods.masks import MaskDecision, masks_within
from autoprune.runs import RunFolder
from autoprune.structure.slicing import prune
from autoprune.training import centripetal
from autoprune.training.gradual import GradualChannels, GradualWeights
from autoprune.training.loop import EpochCallback, TrainingCallback, finetune


@dataclass(frozen=True)
class PrunerTraining:
    """One training after which units can leave.

    Attributes:
        model: What is trained.
        callback: What takes part in it.
        finish: From the trained model to what remains of it, and the decision that this
            amounts to.
    """

    model: nn.Module
    callback: TrainingCallback
    finish: Callable[[nn.Module], tuple[nn.Module, Decision]]


class TrainedPruner(Protocol):
    """A way in which units leave by training."""

    def check(self, context: RunContext) -> None:
        """Raises a `UserError` where the network can't have it."""
        ...

    def prepare(self, context: RunContext, decision: Any) -> PrunerTraining:
        """The training that carries a decision out.

        Args:
            context: Network, images and trace.
            decision: What the pruning method decided.
        """
        ...


@dataclass(frozen=True)
class TrainedDecision:
    """A decision, and the network that the training for it leaves.

    Attributes:
        decision: What goes.
        network: Folder of the trained network; missing before the training.
        pruner: Name of the trained pruner.
    """

    decision: Decision
    network: Path
    pruner: str

    def save(self, folder: RunFolder) -> None:
        """Writes the decision."""
        self.decision.save(folder)

    def costs(self, context: RunContext) -> dict[str, Any]:
        """The costs of the decision."""
        return self.decision.costs(context)

    def plan(self, context: RunContext) -> dict[str, Any]:
        """What the plan says of it.

        Which channels are left isn't told of channels: merged ones are no selection.
        """
        if isinstance(self.decision, ChannelDecision):
            # No list of kept channels, which the plan of sliced ones has.
            allocation = self.decision.allocation.to_json()
            return {"allocation": allocation, "removal": self.pruner}
        return self.decision.plan(context)


class Trained(PruningMethod[TrainedDecision]):
    """A pruning method whose units leave by training; `merged/` holds what remains.

    Args:
        method: Decides what goes.
        pruner: Trains.
        name: The pruner's name.
    """

    def __init__(self, method: PruningMethod[Any], pruner: TrainedPruner, name: str):
        self.method = method
        self.pruner = pruner
        self.name = name

    def check(self, context: RunContext) -> None:
        """Checks also that the network can have that training."""
        self.method.check(context)
        self.pruner.check(context)

    def is_searched(self, settings: Settings) -> bool:
        """As the method says."""
        return self.method.is_searched(settings)

    def is_decided(self, folder: RunFolder) -> bool:
        """As the method says."""
        return self.method.is_decided(folder)

    def load(self, context: RunContext, folder: RunFolder) -> TrainedDecision:
        """The run's decision.

        Args:
            context: Network, images and trace.
            folder: The run.
        """
        decision = self.method.load(context, folder)
        return TrainedDecision(decision, folder.merged, self.name)

    def decide(
        self, context: RunContext, folder: RunFolder, advance: Callable[[str], None]
    ) -> tuple[TrainedDecision, dict[str, Any]]:
        """As the method decides.

        Args:
            context: Network, images and trace.
            folder: The run.
            advance: Handed on to the method.
        """
        decision, results = self.method.decide(context, folder, advance)
        return TrainedDecision(decision, folder.merged, self.name), results

    def n_epochs(self, context: RunContext, folder: RunFolder) -> int:
        """Passes over the training split, none where the training is done.

        Args:
            context: Images and settings.
            folder: The run, which tells whether the training is done.
        """
        if _is_trained(folder):
            # The run was killed between this training and the writing of `pruned/`.
            return 0
        n_images = len(context.splits.train)
        return context.settings.removal_training.epochs_for(n_images)

    def train(
        self, context: RunContext, folder: RunFolder, on_epoch: EpochCallback
    ) -> None:
        """Trains; the run's decision is then what remained.

        Args:
            context: Network, images and settings.
            folder: The run; `merged/` then holds what remained.
            on_epoch: Called after each epoch.
        """
        if _is_trained(folder):
            return
        settings = context.settings
        training = self.pruner.prepare(context, self.method.load(context, folder))
        with explained(folder, "removal", "removal.strength"):
            finetune(
                training.model,
                context.splits.train,
                settings.removal_training,
                settings.search.seed,
                # The teacher is the network before any training of this run.
                context.dense,
                folder.checkpoints / "removal.pt",
                folder.logging("removal epoch", on_epoch),
                training.callback,
            )
        merged, remaining = training.finish(training.model)
        decision = TrainedDecision(remaining, folder.merged, self.name)
        # What the training settled replaces what was planned: an allocation that ResRep
        # found, masks that were ranked on the way.
        decision.save(folder)
        folder.add_results(removal_method=self.name, **decision.costs(context))
        # What was merged, sliced or folded gives other activations than in training.
        recalibrate(merged, context.splits.calibration.inputs)
        # The network comes last: its plan says that the training is done.
        plan = context.network_plan | {"stage": "merged"} | decision.plan(context)
        save_pruned(merged, folder.merged, plan)

    def build(self, context: RunContext, decision: TrainedDecision) -> nn.Module:
        """What remained after the training.

        Args:
            context: Of no use here: the network was built when its training ended.
            decision: Says where it lies.
        """
        return load_pruned(decision.network)

    def callback(self, decision: TrainedDecision) -> TrainingCallback | None:
        """As the method says."""
        return self.method.callback(decision.decision)


def _is_trained(folder: RunFolder) -> bool:
    return folder.holds_network(folder.merged)


class Gradual:
    """Iterative pruning, or AGP: towards the allocation, or the budget of masks."""

    def check(self, context: RunContext) -> None:
        """Every network can have it."""

    def prepare(
        self, context: RunContext, decision: ChannelDecision | MaskDecision
    ) -> PrunerTraining:
        """Masks a little at a time, ranked anew each time.

        Args:
            context: Network, images and settings.
            decision: Where the steps lead: an allocation; of masks the budget alone
                counts, as they are ranked anew.
        """
        if isinstance(decision, MaskDecision):
            return self._prepare_masks(context)
        return self._prepare_channels(context, decision.allocation)

    def _prepare_channels(
        self, context: RunContext, allocation: Allocation
    ) -> PrunerTraining:
        search = context.settings.search
        removal = context.settings.removal
        groups = context.groups
        train = context.splits.train

        def rank(network: nn.Module) -> Importance:
            # Of the network as it is by now: ranking anew is why little goes at a time.
            return importance(search.criterion, network, groups, train, search.seed)

        callback = GradualChannels(
            removal.schedule, removal.prunings, groups, allocation.kept, rank
        )

        def finish(trained: nn.Module) -> tuple[nn.Module, Decision]:
            # By what the callback kept: only these channels learned to do without the
            # rest.
            return prune(trained, groups, callback.kept), ChannelDecision(allocation)

        # A copy, since all stages share the context's network.
        return PrunerTraining(copy.deepcopy(context.model), callback, finish)

    def _prepare_masks(self, context: RunContext) -> PrunerTraining:
        removal = context.settings.removal
        costs = context.costs
        budget = single_budget(context)
        callback = GradualWeights(
            removal.schedule,
            removal.prunings,
            costs.metrics[budget.metric](costs.dense),
            budget.target(costs),
            partial(masks_within, context),
        )

        def finish(trained: nn.Module) -> tuple[nn.Module, Decision]:
            return trained, MaskDecision(callback.masks)

        return PrunerTraining(copy.deepcopy(context.model), callback, finish)


class Centripetal:
    """C-SGD: as many clusters as the allocation keeps channels."""

    def check(self, context: RunContext) -> None:
        """Checks that every group's channels can be merged."""
        mergeable = centripetal.mergeable_groups(
            context.model, context.groups, context.splits.example
        )
        # A single channel has none to merge with.
        asked = [group.name for group in context.groups if group.channels > 1]
        centripetal.check_mergeable(asked, mergeable)

    def prepare(self, context: RunContext, decision: ChannelDecision) -> PrunerTraining:
        """Pulls the channels of each cluster together.

        Args:
            context: Network and settings.
            decision: How many clusters each group gets.
        """
        search = context.settings.search
        removal = context.settings.removal
        groups = context.groups
        model = copy.deepcopy(context.model)
        # Groups that stay whole have nothing to merge.
        counts = {}
        for name, kept in decision.allocation.kept.items():
            if kept < groups[name].channels:
                counts[name] = kept
        clusters = centripetal.cluster_channels(
            model, groups, counts, removal.clusters, search.seed
        )
        callback = centripetal.Centripetal(groups, clusters, removal.strength)

        def finish(trained: nn.Module) -> tuple[nn.Module, Decision]:
            return centripetal.merge(trained, groups, clusters), decision

        return PrunerTraining(model, callback, finish)


def single_budget(context: RunContext) -> SingleBudget:
    """The budget; the registry lets no range get here.

    Args:
        context: The run's settings.
    """
    return parse_budget(context.settings.search.budget).at_position(0)
