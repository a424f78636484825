"""From a decision to a network: what was decided, the network that follows, how it is
trained; the seam of them all.
"""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

from torch import nn

from autoprune.costs.allocation import Allocation
from autoprune.deploy.export import load_pruned, save_pruned
from autoprune.evaluation.evaluate import recalibrate, score
from autoprune.evaluation.reconstruction import Reconstruction
from autoprune.pipeline.context import Workspace
from autoprune.pipeline.methods.trained import TRAINED_PRUNERS
from autoprune.runs import RunFolder, write_json
from autoprune.structure.slicing import prune, top_channels
from autoprune.training.loop import EpochCallback, TrainingCallback, finetune


class Removal:
    """What one run removes, at one granularity.

    Args:
        workspace: Network, images and trace.
        folder: The run.
    """

    def __init__(self, workspace: Workspace, folder: RunFolder):
        self.workspace, self.folder = workspace, folder

    def check(self) -> None:
        """Raises a `UserError` unless the network can meet the budget so; before the
        run has a folder.
        """

    @property
    def is_decided(self) -> bool:
        """Whether it is written down what goes."""
        raise NotImplementedError

    @cached_property
    def decision(self) -> Any:
        """What was decided, as it is written down."""
        raise NotImplementedError

    def keep(self, decision: Any) -> None:
        """Writes down what was decided, and makes it `decision`."""
        raise NotImplementedError

    is_searched = False
    """Whether it is for a search to decide what goes."""
    n_steps = 0
    """Of how many long steps `decide` consists; 0 if it is done at once."""

    def decide(self, advance: Callable[[str], None]) -> tuple[Any, dict]:
        """Decides what goes, and what else results.json shall say of it; writes neither
        down.

        Args:
            advance: Called after each long step with what it has found.
        """
        raise NotImplementedError

    def network(self) -> nn.Module:
        """A new network in which that is gone, batch norm recalibrated; not fine-tuned."""
        raise NotImplementedError

    def plan(self) -> dict:
        """What its plan says of the decision."""
        raise NotImplementedError

    def callback(self) -> TrainingCallback | None:
        """What has to take part in fine-tuning for the decision to last."""
        return None

    def costs(self, decision: Any) -> dict:
        """What a decision leaves of the costs, as results.json tells it."""
        raise NotImplementedError

    @property
    def epochs(self) -> int:
        """Passes over the training split that `prepare` takes."""
        return 0

    def prepare(self, on_epoch: EpochCallback) -> None:
        """Trains what has to be trained before anything can go; resumable, and nothing
        the second time.
        """


class Channels(Removal):
    """Whole channels, by the run's allocation, which a search or a person decides."""

    is_searched = True

    @property
    def is_decided(self) -> bool:
        """Whether there is an allocation."""
        return self.folder.allocation.exists()

    @cached_property
    def decision(self) -> Allocation:
        """The run's allocation."""
        return Allocation.read(self.folder.allocation, self.workspace.groups)

    def keep(self, decision: Allocation) -> None:
        """Writes the allocation."""
        write_json(self.folder.allocation, decision.to_json())
        self.decision = decision

    def costs(self, decision: Allocation) -> dict:
        """Those of the allocation."""
        return self.workspace.costs_of(decision.kept)

    @property
    def widths(self) -> Mapping[str, int]:
        """How many channels each group keeps."""
        return self.decision.kept

    def network(self) -> nn.Module:
        """The sub-model with the most important channels; with reconstructed weights if
        that helps.
        """
        return sliced(self.workspace, self.widths)

    def plan(self) -> dict:
        """The allocation, and which channels it keeps."""
        kept = top_channels(self.workspace.importance, self.widths)
        channels = {name: indices.tolist() for name, indices in kept.items()}
        return {"allocation": self.decision.to_json(), "kept": channels}


def sliced(workspace: Workspace, counts: Mapping[str, int]) -> nn.Module:
    """The network of a workspace with the most important channels of each group, batch
    norm recalibrated.

    Its weights are reconstructed where the settings ask for it and that makes it
    better.
    """
    pruned = recalibrated(workspace, counts)
    if workspace.reconstruction is None:
        return pruned
    solved = recalibrated(workspace, counts, workspace.reconstruction)
    return min(
        solved, pruned, key=lambda model: score(model, workspace.splits.proxy).loss
    )


def recalibrated(
    workspace: Workspace,
    counts: Mapping[str, int],
    reconstruction: Reconstruction | None = None,
) -> nn.Module:
    """As `sliced`, with the weights as they are, or all solved anew by a
    reconstruction.
    """
    kept = top_channels(workspace.importance, counts)
    pruned = prune(workspace.model, workspace.groups, kept)
    if reconstruction is not None:
        reconstruction.apply(pruned, kept)
    recalibrate(pruned, workspace.splits.calibration.inputs)
    return pruned


class Trained(Removal):
    """Mixed into a removal whose units leave by training, see
    `autoprune.pipeline.methods.trained`; `merged/` holds what remains.
    """

    def check(self) -> None:
        """Looks also whether the network can have that training."""
        super().check()
        TRAINED_PRUNERS[self.workspace.settings.removal.method].check(self.workspace)

    @property
    def _is_done(self) -> bool:
        return (self.folder.merged / "plan.json").exists()

    @property
    def epochs(self) -> int:
        """Passes over the training split, none where it is done."""
        if self._is_done:
            return 0
        return self.workspace.settings.removal_training.epochs_for(
            len(self.workspace.splits.train)
        )

    def prepare(self, on_epoch: EpochCallback) -> None:
        """Trains; the decision is then what remained."""
        if self._is_done:
            return
        workspace, settings = self.workspace, self.workspace.settings
        course = TRAINED_PRUNERS[settings.removal.method].course(
            workspace, self.decision
        )
        checkpoint, how = (
            self.folder.checkpoints / "removal.pt",
            settings.removal_training,
        )
        train, seed = workspace.splits.train, settings.search.seed
        log = self.folder.logging("removal epoch", on_epoch)
        finetune(
            course.model,
            train,
            how,
            seed,
            workspace.dense,
            checkpoint,
            log,
            course.callback,
        )
        merged, decision = course.finish(course.model)
        self.keep(decision)
        self.folder.add_results(
            removal_method=settings.removal.method, **self.costs(decision)
        )
        recalibrate(merged, workspace.splits.calibration.inputs)
        # The network comes last: its plan says that the training is done.
        save_pruned(
            merged,
            self.folder.merged,
            workspace.network | {"stage": "merged"} | self.plan(),
        )

    def network(self) -> nn.Module:
        """What remained after the training."""
        return load_pruned(self.folder.merged)
