"""Weights, rows, columns, kernels, filters, or N of M inputs, as masks.

Masks leave the shapes as they are.
"""

import copy
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import nn

from autoprune.costs.budget import parse_budget
from autoprune.errors import UserError
from autoprune.evaluation.evaluate import recalibrate
from autoprune.pipeline.budgeted import budgets_reached
from autoprune.pipeline.context import RunContext
from autoprune.pipeline.methods.base import PruningMethod
from autoprune.runs import RunFolder
from autoprune.training.loop import TrainingCallback
from autoprune.training.masks import (
    KeepMasks,
    Masks,
    n_of_m,
    n_of_m_masks,
    ranked_masks,
)


@dataclass(frozen=True)
class MaskDecision:
    """Which elements of the weights are zero.

    Attributes:
        masks: What is kept.
    """

    masks: Masks

    def save(self, folder: RunFolder) -> None:
        """Writes `masks.safetensors`."""
        self.masks.save(folder.masks)

    def costs(self, context: RunContext) -> dict[str, Any]:
        """What isn't zero counts; layers that N:M leaves whole count in full."""
        groups = context.groups
        kept = self.masks.kept
        layers = []
        for name in groups.positions_per_weight:
            n_weights = prod(groups.shapes[name])
            n_kept = int(kept[name].sum()) if name in kept else n_weights
            layer = name.removesuffix(".weight")
            layers.append({"name": layer, "channels": n_weights, "kept": n_kept})
        dense = context.dense_costs
        results: dict[str, Any] = dict(self.masks.costs(groups))
        results |= dense
        # Zeros take as much room as any other number.
        results["memory_bytes"] = dense["memory_bytes_dense"]
        results["size_bytes"] = dense["size_bytes_dense"]
        results["macs_ratio"] = results["macs"] / dense["macs_dense"]
        results["sparsity"] = self.masks.sparsity
        results["budgets"] = budgets_reached(
            context.settings.search.budget, context.costs, results.__getitem__
        )
        return results | {"groups": layers, "counted": "weights"}

    def plan(self, context: RunContext) -> dict[str, Any]:
        """The granularity; the masks lie beside the pruned network's folder."""
        granularity = context.settings.search.granularity
        return {"granularity": granularity, "sparsity": self.masks.sparsity}


class WeightMasks(PruningMethod[MaskDecision]):
    """Masks the units of least score, or all but N of M everywhere."""

    def check(self, context: RunContext) -> None:
        """Makes the masks, which must meet the budget, and forgets them.

        Another network may be trained before they count.
        """
        _make_masks(context)

    def is_decided(self, folder: RunFolder) -> bool:
        """Whether there are masks."""
        return folder.masks.exists()

    def load(self, context: RunContext, folder: RunFolder) -> MaskDecision:
        """The run's masks.

        Args:
            context: Network that the masks are for.
            folder: The run.
        """
        # Against the network, so that masks of another one are refused.
        return MaskDecision(Masks.load(folder.masks, context.model))

    def decide(
        self, context: RunContext, folder: RunFolder, advance: object
    ) -> tuple[MaskDecision, dict[str, Any]]:
        """Ranks the units and masks the least.

        Args:
            context: Network, groups and settings.
            folder: The run, of which nothing is read.
            advance: Never called: there is no long step.
        """
        return MaskDecision(_make_masks(context)), {}

    def build(self, context: RunContext, decision: MaskDecision) -> nn.Module:
        """The network with zeros for what is masked.

        Args:
            context: Network and images.
            decision: What is masked.
        """
        # A copy, since all stages share the context's network.
        masked = copy.deepcopy(context.model)
        decision.masks.apply(masked)
        # Batch norm has to know what layers with fewer weights give.
        recalibrate(masked, context.splits.calibration.inputs)
        return masked

    def callback(self, decision: MaskDecision) -> TrainingCallback:
        """Fine-tuning under the masks."""
        # Otherwise the first step of the optimiser would fill the zeros again.
        return KeepMasks(decision.masks)


def masks_within(context: RunContext, network: nn.Module, target: int) -> Masks:
    """Masks of the run's granularity that leave a target of what the budget counts.

    Args:
        context: The run's granularity, criterion, agent and seed.
        network: A network of the run's architecture, with whatever weights.
        target: The most that may be left of the budget's metric.

    Raises:
        UserError: If the target can't be reached.
    """
    search = context.settings.search
    return ranked_masks(
        network,
        context.groups,
        search.granularity,
        target,
        parse_budget(search.budget).metric,
        search.criterion,
        search.agent,
        search.seed,
    )


def _make_masks(context: RunContext) -> Masks:
    """What the settings ask for, made anew; refused unless it meets the budget."""
    search = context.settings.search
    budget = parse_budget(search.budget).at_position(0)
    target = budget.target(context.costs)
    pair = n_of_m(search.granularity)
    if pair is None:
        return masks_within(context, context.model, target)
    n, m = pair
    masks, _ = n_of_m_masks(context.model, context.groups, n, m)
    left = masks.costs(context.groups)[budget.metric]
    # N of M is one fixed share, which the budget can allow or not; there is nothing to
    # search for.
    if left > target:
        share = left / context.costs.metrics[budget.metric](context.costs.dense)
        raise UserError(
            "budget",
            f"{search.granularity} leaves {budget.metric}={share:.1%}; allow that, not "
            f"{budget}",
        )
    return masks
