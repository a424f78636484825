"""Whole channels, by an allocation that a search or a person made."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from autoprune.config import Settings
from autoprune.costs.allocation import Allocation
from autoprune.evaluation.evaluate import recalibrate, score
from autoprune.evaluation.reconstruction import Reconstruction
from autoprune.files import write_json
from autoprune.pipeline.budgeted import allocation_reached
from autoprune.pipeline.context import RunContext
from autoprune.pipeline.methods.base import PruningMethod
from autoprune.runs import RunFolder
from autoprune.structure.slicing import prune, top_channels


@dataclass(frozen=True)
class ChannelDecision:
    """How many channels each group keeps.

    Attributes:
        allocation: The allocation.
    """

    allocation: Allocation

    def save(self, folder: RunFolder) -> None:
        """Writes `allocation.json`."""
        write_json(folder.allocation, self.allocation.to_json())

    def costs(self, context: RunContext) -> dict[str, Any]:
        """The costs of the allocation, and the targets of those that were budgeted."""
        kept = self.allocation.kept
        reached = allocation_reached(self.allocation.budget, context.costs, kept)
        return context.costs_of(kept) | {"budgets": reached}

    def plan(self, context: RunContext) -> dict[str, Any]:
        """The allocation, and which channels it keeps."""
        # The indices too, though they follow from the criterion: with them the plan
        # alone says which channels of the dense network are left.
        kept = top_channels(context.importance, self.allocation.kept)
        channels = {name: indices.tolist() for name, indices in kept.items()}
        return {"allocation": self.allocation.to_json(), "kept": channels}


class Channels(PruningMethod[ChannelDecision]):
    """Slices the least important channels of every group off."""

    def is_searched(self, settings: Settings) -> bool:
        """Always: agents and baselines decide alike."""
        return True

    def is_decided(self, folder: RunFolder) -> bool:
        """Whether there is an allocation."""
        return folder.allocation.exists()

    def load(self, context: RunContext, folder: RunFolder) -> ChannelDecision:
        """The run's allocation.

        Args:
            context: Trace that the allocation has to be for.
            folder: The run.
        """
        return ChannelDecision(Allocation.read(folder.allocation, context.groups))

    def build(self, context: RunContext, decision: ChannelDecision) -> nn.Module:
        """The sliced network; with solved weights where that makes it better.

        Args:
            context: Network, images and importance.
            decision: How many channels each group keeps.
        """
        return sliced(context, decision.allocation.kept)


def sliced(context: RunContext, counts: Mapping[str, int]) -> nn.Module:
    """The network with the most important channels of each group.

    Its batch norm is recalibrated; its weights are solved anew where the settings ask
    for it and that makes it better on the proxy split.

    Args:
        context: Network, images and importance.
        counts: Group to kept channels.

    Returns:
        A new network.
    """
    pruned = recalibrated(context, counts)
    if context.reconstruction is None:
        return pruned
    # Solved weights give back what layers gave before; that needn't mean a lower loss,
    # so both networks are scored.
    solved = recalibrated(context, counts, context.reconstruction)
    # This is one more choice, so test images have no part in it.
    images = context.splits.proxy
    # With equal losses the solved one counts, as it is scored first.
    return min(solved, pruned, key=lambda model: score(model, images).loss)


def recalibrated(
    context: RunContext,
    counts: Mapping[str, int],
    reconstruction: Reconstruction | None = None,
) -> nn.Module:
    """As `sliced`, with the weights as they are, or all solved by a reconstruction.

    Args:
        context: Network, images and importance.
        counts: Group to kept channels.
        reconstruction: What solves them; None to leave weights alone.

    Returns:
        A new network.
    """
    kept = top_channels(context.importance, counts)
    pruned = prune(context.model, context.groups, kept)
    if reconstruction is not None:
        # Before batch norm, which is to know what the solved layers give.
        reconstruction.apply(pruned, kept)
    recalibrate(pruned, context.splits.calibration.inputs)
    return pruned
