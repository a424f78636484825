"""Residual blocks, in whose place the identity stands."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from autoprune.costs.budget import parse_budget
from autoprune.costs.cost import CostTable
from autoprune.errors import UserError
from autoprune.evaluation.evaluate import recalibrate
from autoprune.files import write_json
from autoprune.pipeline.budgeted import budgets_reached
from autoprune.pipeline.context import RunContext
from autoprune.pipeline.methods.base import PruningMethod
from autoprune.results import COST_FIELDS
from autoprune.runs import RunFolder
from autoprune.scaling.depth import (
    removable_blocks,
    remove_blocks,
    select_blocks_to_remove,
)
from autoprune.tracing.trace import trace


@dataclass(frozen=True)
class BlockDecision:
    """Which residual blocks go.

    Attributes:
        removed: Their names.
    """

    removed: list[str]

    def save(self, folder: RunFolder) -> None:
        """Writes `blocks.json`."""
        # Of the granularity dimensions this file holds an "order" instead; no run has
        # both.
        write_json(folder.blocks, {"removed": self.removed})

    def costs(self, context: RunContext) -> dict[str, Any]:
        """The costs of the shallower network, and the MACs of every block."""
        # Without blocks a network may have other groups, so it is traced and priced
        # anew rather than by subtraction.
        shallow = remove_blocks(context.model, self.removed)
        smaller = CostTable(trace(shallow, context.splits.example))
        results: dict[str, Any] = {}
        for metric, field in COST_FIELDS.items():
            results[field] = smaller.metrics[metric](smaller.dense)
        results |= context.dense_costs
        results["macs_ratio"] = results["macs"] / results["macs_dense"]
        rows = []
        for block in removable_blocks(context.model, context.splits.example):
            # Blocks stand for groups and MACs for channels, so that the report draws
            # them as it draws any allocation.
            kept = 0 if block.name in self.removed else block.macs
            rows.append({"name": block.name, "channels": block.macs, "kept": kept})
        results["budgets"] = budgets_reached(
            context.settings.search.budget, context.costs, results.__getitem__
        )
        return results | {"groups": rows, "counted": "MACs"}

    def plan(self, context: RunContext) -> dict[str, Any]:
        """The blocks that are gone; whoever loads the weights takes them out again."""
        return {"granularity": "layer", "removed_blocks": self.removed}


class Blocks(PruningMethod[BlockDecision]):
    """Removes the block of least damage per MAC, until the budget is met."""

    def check(self, context: RunContext) -> None:
        """Checks that enough of the network is in blocks that can go."""
        blocks = removable_blocks(context.model, context.splits.example)
        saved = sum(block.macs for block in blocks)
        # What is in no removable block stays under every budget.
        floor = context.costs.macs({}) - saved
        if _target(context) < floor:
            share = floor / (floor + saved)
            raise UserError(
                "budget",
                f"{context.settings.search.budget} is below the reachable floor; "
                f"without its {len(blocks)} removable blocks this network has "
                f"macs={floor} ({share:.1%})",
            )

    def is_decided(self, folder: RunFolder) -> bool:
        """Whether the blocks are written down."""
        return folder.blocks.exists()

    def load(self, context: RunContext, folder: RunFolder) -> BlockDecision:
        """The run's removed blocks.

        Args:
            context: Of no use here: blocks are known by name.
            folder: The run.
        """
        return BlockDecision(folder.read_json(folder.blocks)["removed"])

    def decide(
        self, context: RunContext, folder: RunFolder, advance: object
    ) -> tuple[BlockDecision, dict[str, Any]]:
        """Ranks the blocks by their damage on the proxy split.

        Args:
            context: Network, images and trace.
            folder: The run, of which nothing is read.
            advance: Never called: there is no long step.
        """
        splits = context.splits
        # By the proxy split, as everything that is decided; test images come after
        # that.
        removed = select_blocks_to_remove(
            context.model, splits.example, splits.proxy, _target(context)
        )
        return BlockDecision(removed), {}

    def build(self, context: RunContext, decision: BlockDecision) -> nn.Module:
        """The shallower network.

        Args:
            context: Network, images and trace.
            decision: The blocks that go.
        """
        smaller = remove_blocks(context.model, decision.removed)
        # Layers behind a removed block read other activations than batch norm knows.
        recalibrate(smaller, context.splits.calibration.inputs)
        return smaller


def _target(context: RunContext) -> int:
    """The budget in MACs."""
    return (
        # The registry refuses ranges here, so every position is the budget itself.
        parse_budget(context.settings.search.budget)
        .at_position(0)
        .target(context.costs)
    )
