"""What a pruning method is: how it decides what goes, and how that goes.

A new method is one file beside this one and one entry in
`autoprune.pipeline.methods.registry`.
"""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from torch import nn

from autoprune.config import Settings
from autoprune.pipeline.context import RunContext
from autoprune.runs import RunFolder
from autoprune.training.loop import EpochCallback, TrainingCallback


class Decision(Protocol):
    """What goes, as plain data that a run folder keeps."""

    def save(self, folder: RunFolder) -> None:
        """Writes it into a run, atomically; the file says that it was decided."""
        ...

    def costs(self, context: RunContext) -> dict[str, Any]:
        """What it leaves of the costs, as fields of `autoprune.results.Results`."""
        ...

    def plan(self, context: RunContext) -> dict[str, Any]:
        """What the plan beside the pruned weights says of it, as JSON values."""
        ...


# A method is handed back the decisions that it made itself, so their type is the
# method's own.
D = TypeVar("D", bound=Decision)


class PruningMethod(Protocol[D]):
    """What one run removes, at one granularity.

    Methods keep no state: what was decided is a `Decision`, which they are given back.
    """

    def check(self, context: RunContext) -> None:
        """Checks, before the run has a folder, that it can succeed.

        Args:
            context: Network, images and trace.

        Raises:
            UserError: If the network can't meet the budget so.
        """

    def is_searched(self, settings: Settings) -> bool:
        """Whether a search decides what goes, rather than `decide`."""
        return False

    def is_decided(self, folder: RunFolder) -> bool:
        """Whether the run holds a decision."""
        ...

    def load(self, context: RunContext, folder: RunFolder) -> D:
        """The decision that a run holds.

        Args:
            context: Network, images and trace.
            folder: The run.

        Raises:
            UserError: If there is none, it is damaged, or is for another network.
        """
        ...

    def n_steps(self, context: RunContext) -> int:
        """How many long steps `decide` takes; 0 if it is done at once."""
        return 0

    def decide(
        self, context: RunContext, folder: RunFolder, advance: Callable[[str], None]
    ) -> tuple[D, dict[str, Any]]:
        """Decides what goes; writes no decision.

        Args:
            context: Network, images and trace.
            folder: The run, for a log from which an interrupted call goes on.
            advance: Called after each long step with what it has found.

        Returns:
            The decision, and further fields of `autoprune.results.Results`.
        """
        # No user's error: callers ask `is_searched` first.
        raise RuntimeError(f"{type(self).__name__} leaves this to a search")

    def n_epochs(self, context: RunContext, folder: RunFolder) -> int:
        """Passes over the training split that `train` is yet to make.

        Args:
            context: Network, images and trace.
            folder: The run, in which training may be under way or done.
        """
        return 0

    def train(
        self, context: RunContext, folder: RunFolder, on_epoch: EpochCallback
    ) -> None:
        """Trains what has to be trained before anything can go.

        Resumable after each epoch; a second call does nothing.

        Args:
            context: Network, images and trace.
            folder: The run, which holds the decision.
            on_epoch: Called after each epoch.
        """

    def build(self, context: RunContext, decision: D) -> nn.Module:
        """The pruned network, batch norm recalibrated, not fine-tuned.

        Args:
            context: Network, images and trace.
            decision: What goes.

        Returns:
            A new network.
        """
        ...

    def callback(self, decision: D) -> TrainingCallback | None:
        """What has to take part in fine-tuning for the decision to last."""
        return None
