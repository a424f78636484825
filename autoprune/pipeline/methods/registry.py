"""What is removed as one, from a single weight to a layer: for each granularity how it
is decided and carried out.
"""

import copy
from collections.abc import Callable
from functools import cached_property
from math import prod

from torch import nn

from autoprune.config import SearchConfig, Settings
from autoprune.costs.budget import Budget, BudgetRange, parse_budget
from autoprune.costs.cost import CostTable
from autoprune.errors import UserError, check_known
from autoprune.evaluation.evaluate import recalibrate
from autoprune.pipeline.context import Workspace
from autoprune.pipeline.methods.base import Channels, Removal, Trained
from autoprune.pipeline.methods.dimensions import FITTED, Compound
from autoprune.pipeline.methods.trained import TRAINED_PRUNERS, masks_within
from autoprune.runs import RunFolder, write_json
from autoprune.scaling.depth import Block, removable_blocks, remove_blocks, shallower
from autoprune.tracing.trace import trace
from autoprune.training.loop import TrainingCallback
from autoprune.training.masks import (
    PATTERNS,
    KeepMasks,
    Masks,
    check_mask_options,
    n_of_m,
    n_of_m_masks,
)


class TrainedChannels(Trained, Channels):
    """Whole channels that leave by training."""

    def plan(self) -> dict:
        """The allocation, and how it came about."""
        return {
            "allocation": self.decision.to_json(),
            "removal": self.workspace.settings.removal.method,
        }


class Weights(Removal):
    """Weights, rows, columns, kernels or filters, as masks that leave the shapes as
    they are.
    """

    @property
    def is_decided(self) -> bool:
        """Whether there are masks."""
        return self.folder.masks.exists()

    def check(self) -> None:
        """Makes the masks, and forgets them: another network may be trained first."""
        self.masks()

    def decide(self, advance: Callable[[str], None]) -> tuple[Masks, dict]:
        """Ranks the units and masks the least, or N of M everywhere."""
        return self.masks(), {}

    @cached_property
    def decision(self) -> Masks:
        """The run's masks."""
        return Masks.load(self.folder.masks, self.workspace.model)

    def keep(self, decision: Masks) -> None:
        """Writes the masks."""
        decision.save(self.folder.masks)
        self.decision = decision

    def costs(self, decision: Masks) -> dict:
        """What isn't zero; layers that N:M leaves whole are."""
        groups, dense = self.workspace.groups, self.workspace.dense_costs
        nonzero, sizes = (
            decision.costs(groups),
            {name: prod(groups.shapes[name]) for name in groups.applied},
        )
        layers = [
            {
                "name": name.removesuffix(".weight"),
                "channels": size,
                "kept": int(decision.kept[name].sum())
                if name in decision.kept
                else size,
            }
            for name, size in sizes.items()
        ]
        shares = {
            "macs_ratio": nonzero["macs"] / dense["macs_dense"],
            "sparsity": decision.sparsity,
        }
        same = {"memory_bytes": dense["memory_bytes_dense"]}
        return (
            nonzero | dense | same | shares | {"groups": layers, "counted": "weights"}
        )

    def masks(self) -> Masks:
        """What the settings ask for, made anew.

        Raises:
            UserError: If it doesn't fit the budget.
        """
        search, groups, costs = (
            self.workspace.settings.search,
            self.workspace.groups,
            self.workspace.costs,
        )
        model, budget = self.workspace.model, check_granularity(search)
        target, pair = budget.target(costs), n_of_m(search.granularity)
        if pair is None:
            return masks_within(self.workspace, model, target)
        masks, _ = n_of_m_masks(model, groups, *pair)
        left = masks.costs(groups)[budget.metric]
        if left > target:
            share = left / costs.metrics[budget.metric](costs.dense)
            raise UserError(
                "budget",
                f"{search.granularity} leaves {budget.metric}={share:.1%}; "
                f"allow that, not {budget}",
            )
        return masks

    def network(self) -> nn.Module:
        """The network with zeros for what is masked."""
        masked = copy.deepcopy(self.workspace.model)
        self.decision.apply(masked)
        recalibrate(masked, self.workspace.splits.calibration.inputs)
        return masked

    def plan(self) -> dict:
        """The granularity; the masks lie beside the pruned network's folder."""
        return {
            "granularity": self.workspace.settings.search.granularity,
            "sparsity": self.decision.sparsity,
        }

    def callback(self) -> TrainingCallback:
        """Fine-tuning under the masks."""
        return KeepMasks(self.decision)


class TrainedWeights(Trained, Weights):
    """Masks that grow while the network trains."""


class Blocks(Removal):
    """Residual blocks, in whose place the identity stands."""

    @property
    def is_decided(self) -> bool:
        """Whether the blocks are written down."""
        return self.folder.blocks.exists()

    def check(self) -> None:
        """Looks whether enough of the network is in blocks that can go."""
        saved = sum(block.macs for block in self._all)
        floor = self.workspace.costs.macs({}) - saved
        if self._target < floor:
            share = floor / (floor + saved)
            raise UserError(
                "budget",
                f"{self.workspace.settings.search.budget} is below the "
                f"reachable floor; without its "
                f"{len(self._all)} removable blocks this network has macs={floor} "
                f"({share:.1%})",
            )

    def decide(self, advance: Callable[[str], None]) -> tuple[list[str], dict]:
        """Removes the block of least damage per MAC, again and again, on the proxy
        split.
        """
        splits = self.workspace.splits
        return shallower(
            self.workspace.model, splits.example, splits.proxy, self._target
        ), {}

    @cached_property
    def decision(self) -> list[str]:
        """The names of the removed blocks."""
        return self.folder.read_json(self.folder.blocks)["removed"]

    def keep(self, decision: list[str]) -> None:
        """Writes the names."""
        write_json(self.folder.blocks, {"removed": decision})
        self.decision = decision

    def costs(self, decision: list[str]) -> dict:
        """Those of the shallower network."""
        workspace = self.workspace
        smaller = CostTable(
            trace(remove_blocks(workspace.model, decision), workspace.splits.example)
        )
        results = {
            metric: cost(smaller.dense) for metric, cost in smaller.metrics.items()
        } | workspace.dense_costs
        blocks = [
            {
                "name": block.name,
                "channels": block.macs,
                "kept": 0 if block.name in decision else block.macs,
            }
            for block in self._all
        ]
        return results | {
            "macs_ratio": results["macs"] / results["macs_dense"],
            "groups": blocks,
            "counted": "MACs",
        }

    def network(self) -> nn.Module:
        """The shallower network."""
        smaller = remove_blocks(self.workspace.model, self.decision)
        recalibrate(smaller, self.workspace.splits.calibration.inputs)
        return smaller

    def plan(self) -> dict:
        """The blocks that are gone; whoever loads the weights takes them out again."""
        return {"granularity": "layer", "removed_blocks": self.decision}

    @property
    def _target(self) -> int:
        return check_granularity(self.workspace.settings.search).target(
            self.workspace.costs
        )

    @cached_property
    def _all(self) -> list[Block]:
        return removable_blocks(self.workspace.model, self.workspace.splits.example)


GRANULARITIES: dict[str, type[Removal]] = {
    "channel": Channels,
    "layer": Blocks,
    "dimensions": Compound,
    **dict.fromkeys(PATTERNS, Weights),
}
"""Besides N:M, such as 2:4."""
TRAINED: dict[type[Removal], type[Removal]] = {
    Channels: TrainedChannels,
    Weights: TrainedWeights,
}
"""What stands in where units leave by training."""


def removal(workspace: Workspace, folder: RunFolder) -> Removal:
    """What the run removes, at the granularity of its settings."""
    granularity = workspace.settings.search.granularity
    kind = Weights if n_of_m(granularity) else GRANULARITIES[granularity]
    return (kind if workspace.settings.removal.method == "slice" else TRAINED[kind])(
        workspace, folder
    )


def check_removal(settings: Settings) -> None:
    """Raises a `UserError` unless how units leave is known and goes with the
    granularity and the budget.
    """
    method, search = settings.removal.method, settings.search
    check_known("method", method, ["slice", *TRAINED_PRUNERS], "removal.method")
    budget = check_granularity(search)
    if method == "slice" or search.granularity == "channel":
        if isinstance(budget, BudgetRange) and method == "resrep":
            raise UserError("budget", f"resrep trains for one budget, got {budget}")
    elif method != "gradual" or search.granularity not in PATTERNS:
        raise UserError(
            "removal.method",
            f"{method} is not for granularity {search.granularity}; use slice",
        )


def check_granularity(search: SearchConfig) -> Budget | BudgetRange:
    """The budget of a search, after a look at whether its granularity can be decided
    so.

    Raises:
        UserError: If the granularity is unknown, or criterion, agent or budget don't go
            with it.
    """
    budget, granularity = parse_budget(search.budget), search.granularity
    if not n_of_m(granularity):
        check_known(
            "granularity", granularity, GRANULARITIES, others=", or N:M as in 2:4"
        )
    if search.agent == FITTED and granularity != "dimensions":
        raise UserError(
            "agent", f"{FITTED} is for granularity dimensions, got {granularity}"
        )
    if granularity == "dimensions" and search.agent in ("global", "cost_aware"):
        raise UserError(
            "agent",
            f"{search.agent} ranks channels, and depth and image size have no "
            f"rank; use dyna",
        )
    if granularity == "channel" or (
        granularity == "dimensions" and search.agent != FITTED
    ):
        return budget
    if isinstance(budget, BudgetRange):
        raise UserError(
            "budget",
            f"a range is for agents; {granularity} takes one budget, got {budget}",
        )
    if granularity == "layer" and (budget.metric, search.agent) != ("macs", "global"):
        raise UserError(
            "granularity",
            f"blocks are ranked by damage per MAC; use agent global "
            f"and a budget of macs, "
            f"got {search.agent} and {budget}",
        )
    if granularity in PATTERNS or n_of_m(granularity):
        check_mask_options(granularity, search.criterion, search.agent)
    return budget
