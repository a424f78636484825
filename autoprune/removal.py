"""From a decision to a network: what was decided, the network that follows, how it is trained; the seam of them all."""

from functools import cached_property
from typing import Any

from torch import nn

from autoprune.export import load_pruned, save_pruned
from autoprune.finetune import EpochCallback, Plug, finetune
from autoprune.merging import MERGINGS
from autoprune.runs import RunFolder
from autoprune.scoring import recalibrate
from autoprune.workspace import Workspace


class Removal:
    """What one run removes, at one granularity.

    Args:
        workspace: Network, images and trace.
        folder: The run.
    """

    def __init__(self, workspace: Workspace, folder: RunFolder):
        self.workspace, self.folder = workspace, folder

    def check(self) -> None:
        """Raises a `UserError` unless the network can meet the budget so; before the run has a folder."""

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

    def decide(self) -> dict:
        """Decides what goes and writes it down; returns costs and shares for results.json."""
        raise NotImplementedError

    def network(self) -> nn.Module:
        """A new network in which that is gone, batch norm recalibrated; not fine-tuned."""
        raise NotImplementedError

    def plan(self) -> dict:
        """What its plan says of the decision."""
        raise NotImplementedError

    def plug(self) -> Plug | None:
        """What has to take part in fine-tuning for the decision to last."""
        return None

    def costs(self) -> dict:
        """What is left of the costs, for results.json, where `prepare` may have changed it."""
        return {}

    @property
    def epochs(self) -> int:
        """Passes over the training split that `prepare` takes."""
        return 0

    def prepare(self, on_epoch: EpochCallback) -> None:
        """Trains what has to be trained before anything can go; resumable, and nothing the second time."""


class Trained(Removal):
    """Mixed into a removal whose units leave by training, see `autoprune.merging`; `merged/` holds what remains."""

    def check(self) -> None:
        """Looks also whether the network can have that training."""
        super().check()
        MERGINGS[self.workspace.settings.removal.method].check(self.workspace)

    @property
    def _is_done(self) -> bool:
        return (self.folder.merged / "plan.json").exists()

    @property
    def epochs(self) -> int:
        """Passes over the training split, none where it is done."""
        return (
            0
            if self._is_done
            else self.workspace.settings.removal_training.epochs_for(len(self.workspace.splits.train))
        )

    def prepare(self, on_epoch: EpochCallback) -> None:
        """Trains; the decision is then what remained."""
        if self._is_done:
            return
        workspace, settings = self.workspace, self.workspace.settings
        course = MERGINGS[settings.removal.method].course(workspace, self.decision)
        checkpoint, how = self.folder.checkpoints / "removal.pt", settings.removal_training
        train, seed = workspace.splits.train, settings.search.seed
        log = self.folder.logging("removal epoch", on_epoch)
        finetune(course.model, train, how, seed, workspace.dense, checkpoint, log, course.plug)
        merged, decision = course.finish(course.model)
        self.keep(decision)
        recalibrate(merged, workspace.splits.calibration.inputs)
        # The network comes last: its plan says that the training is done.
        save_pruned(merged, self.folder.merged, workspace.network | {"stage": "merged"} | self.plan())

    def network(self) -> nn.Module:
        """What remained after the training."""
        return load_pruned(self.folder.merged)
