"""From a decision to a network, at every granularity: what was decided, the network that follows, how it is trained."""

import copy
from functools import cached_property

from torch import nn

from autoprune.allocation import Allocation, Budget, BudgetRange, parse_budget
from autoprune.config import SearchConfig, Settings
from autoprune.cost import CostTable
from autoprune.depth import Block, removable_blocks, remove_blocks, shallower
from autoprune.errors import UserError, check_known
from autoprune.export import load_pruned, save_pruned
from autoprune.finetune import EpochCallback, Plug, finetune
from autoprune.granularity import PATTERNS, KeepMasks, Masks, check_mask_options, n_of_m, n_of_m_masks, ranked_masks
from autoprune.merging import MERGINGS
from autoprune.pruning import prune, top_channels
from autoprune.runs import RunFolder, write_json
from autoprune.scoring import recalibrate, score
from autoprune.tracing import trace
from autoprune.workspace import Workspace


class Removal:
    """What one run removes, at one granularity.

    Args:
        workspace: Network, images and trace.
        folder: The run.
    """

    def __init__(self, workspace: Workspace, folder: RunFolder):
        self.workspace, self.folder = workspace, folder

    @property
    def is_decided(self) -> bool:
        """Whether it is written down what goes."""
        raise NotImplementedError

    def check(self) -> None:
        """Raises a `UserError` unless the network can meet the budget so; before the run has a folder."""

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


class Channels(Removal):
    """Whole channels, by the run's allocation, which a search or a person decides."""

    @property
    def is_decided(self) -> bool:
        """Whether there is an allocation."""
        return self.folder.allocation.exists()

    @cached_property
    def allocation(self) -> Allocation:
        """The run's own."""
        return Allocation.read(self.folder.allocation, self.workspace.groups)

    def network(self) -> nn.Module:
        """The sub-model with the most important channels; with reconstructed weights if that helps."""
        workspace = self.workspace
        kept = top_channels(workspace.importance, self.allocation.kept)
        pruned, inputs = prune(workspace.model, workspace.groups, kept), workspace.splits.calibration.inputs
        recalibrate(pruned, inputs)
        if workspace.reconstruction is None:
            return pruned
        solved = prune(workspace.model, workspace.groups, kept)
        workspace.reconstruction.apply(solved, kept)
        recalibrate(solved, inputs)
        return min(solved, pruned, key=lambda model: score(model, workspace.splits.proxy).loss)

    def plan(self) -> dict:
        """The allocation, and which channels it keeps."""
        kept = top_channels(self.workspace.importance, self.allocation.kept)
        channels = {name: indices.tolist() for name, indices in kept.items()}
        return {"allocation": self.allocation.to_json(), "kept": channels}


class Merged(Channels):
    """Channels that leave by training, see `autoprune.merging`; `merged/` holds the network that remains."""

    def check(self) -> None:
        """Looks whether the network can have that training."""
        MERGINGS[self.workspace.settings.removal.method].check(self.workspace)

    @property
    def epochs(self) -> int:
        """Passes over the training split, none where it is done."""
        if (self.folder.merged / "plan.json").exists():
            return 0
        return self.workspace.settings.removal_training.epochs_for(len(self.workspace.splits.train))

    def prepare(self, on_epoch: EpochCallback) -> None:
        """Trains and merges; the allocation is then what remained."""
        if (self.folder.merged / "plan.json").exists():
            return
        workspace, settings = self.workspace, self.workspace.settings
        course = MERGINGS[settings.removal.method].course(workspace, self.allocation)
        checkpoint, how = self.folder.checkpoints / "removal.pt", settings.removal_training
        train, seed = workspace.splits.train, settings.search.seed
        log = self.folder.logging("removal epoch", on_epoch)
        finetune(course.model, train, how, seed, workspace.dense, checkpoint, log, course.plug)
        merged, self.allocation = course.finish(course.model)
        recalibrate(merged, workspace.splits.calibration.inputs)
        # The network comes last: its plan says that the training is done.
        write_json(self.folder.allocation, self.allocation.to_json())
        save_pruned(merged, self.folder.merged, workspace.network | {"stage": "merged"} | self.plan())

    def costs(self) -> dict:
        """Those of the allocation, which `prepare` may have made."""
        return self.workspace.costs_of(self.allocation.kept)

    def network(self) -> nn.Module:
        """What remained after the training."""
        return load_pruned(self.folder.merged)

    def plan(self) -> dict:
        """The allocation, and how it came about."""
        return {"allocation": self.allocation.to_json(), "removal": self.workspace.settings.removal.method}


class Weights(Removal):
    """Weights, rows, columns, kernels or filters, as masks that leave the shapes as they are."""

    @property
    def is_decided(self) -> bool:
        """Whether there are masks."""
        return self.folder.masks.exists()

    def check(self) -> None:
        """Makes the masks, and forgets them: another network may be trained first."""
        self.masks()

    def decide(self) -> dict:
        """Ranks the units and masks the least, or N of M everywhere; the masks come last and end the decision."""
        masks = self.masks()
        masks.save(self.folder.masks)
        dense, nonzero = self.workspace.dense_costs, masks.costs(self.workspace.groups)
        layers = [
            {"name": name.removesuffix(".weight"), "channels": kept.numel(), "kept": int(kept.sum())}
            for name, kept in masks.kept.items()
        ]
        shares = {"macs_ratio": nonzero["macs"] / dense["macs_dense"], "sparsity": masks.sparsity}
        same = {"memory_bytes": dense["memory_bytes_dense"]}
        return nonzero | dense | same | shares | {"groups": layers, "counted": "weights"}

    def masks(self) -> Masks:
        """What the settings ask for, made anew.

        Raises:
            UserError: If it doesn't fit the budget.
        """
        search, groups, costs = self.workspace.settings.search, self.workspace.groups, self.workspace.costs
        model, budget = self.workspace.model, check_granularity(search)
        target, pair = budget.target(costs), n_of_m(search.granularity)
        if pair is None:
            how = budget.metric, search.criterion, search.agent
            return ranked_masks(model, groups, search.granularity, target, *how)
        masks, _ = n_of_m_masks(model, groups, *pair)
        left = masks.costs(groups)[budget.metric]
        if left > target:
            share = left / costs.metrics[budget.metric](costs.dense)
            raise UserError(
                f"--budget: {search.granularity} leaves {budget.metric}={share:.1%}; allow that, not {budget}"
            )
        return masks

    def network(self) -> nn.Module:
        """The network with zeros for what is masked."""
        masked = copy.deepcopy(self.workspace.model)
        self._stored.apply(masked)
        recalibrate(masked, self.workspace.splits.calibration.inputs)
        return masked

    def plan(self) -> dict:
        """The granularity; the masks lie beside the pruned network's folder."""
        return {"granularity": self.workspace.settings.search.granularity, "sparsity": self._stored.sparsity}

    def plug(self) -> Plug:
        """Fine-tuning under the masks."""
        return KeepMasks(self._stored)

    @cached_property
    def _stored(self) -> Masks:
        return Masks.load(self.folder.masks, self.workspace.model)


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
                f"--budget: {self.workspace.settings.search.budget} is below the reachable floor; without its "
                f"{len(self._all)} removable blocks this network has macs={floor} ({share:.1%})"
            )

    def decide(self) -> dict:
        """Removes the block of least damage per MAC, again and again, on the proxy split."""
        workspace = self.workspace
        removed = shallower(workspace.model, workspace.splits.example, workspace.splits.proxy, self._target)
        write_json(self.folder.blocks, {"removed": removed})
        smaller = CostTable(trace(remove_blocks(workspace.model, removed), workspace.splits.example))
        results = {metric: cost(smaller.dense) for metric, cost in smaller.metrics.items()} | workspace.dense_costs
        blocks = [
            {"name": block.name, "channels": block.macs, "kept": 0 if block.name in removed else block.macs}
            for block in self._all
        ]
        return results | {"macs_ratio": results["macs"] / results["macs_dense"], "groups": blocks, "counted": "MACs"}

    def network(self) -> nn.Module:
        """The shallower network."""
        smaller = remove_blocks(self.workspace.model, self._removed)
        recalibrate(smaller, self.workspace.splits.calibration.inputs)
        return smaller

    def plan(self) -> dict:
        """The blocks that are gone; whoever loads the weights takes them out again."""
        return {"granularity": "layer", "removed_blocks": self._removed}

    @property
    def _target(self) -> int:
        return check_granularity(self.workspace.settings.search).target(self.workspace.costs)

    @cached_property
    def _all(self) -> list[Block]:
        return removable_blocks(self.workspace.model, self.workspace.splits.example)

    @property
    def _removed(self) -> list[str]:
        return self.folder.read_json(self.folder.blocks)["removed"]


GRANULARITIES: dict[str, type[Removal]] = {"channel": Channels, "layer": Blocks, **dict.fromkeys(PATTERNS, Weights)}
"""Besides N:M, such as 2:4."""


def removal(workspace: Workspace, folder: RunFolder) -> Removal:
    """What the run removes, at the granularity of its settings."""
    granularity = workspace.settings.search.granularity
    kind = Weights if n_of_m(granularity) else GRANULARITIES[granularity]
    is_merged = kind is Channels and workspace.settings.removal.method != "slice"
    return (Merged if is_merged else kind)(workspace, folder)


def check_removal(settings: Settings) -> None:
    """Raises a `UserError` unless how channels leave is known and goes with the granularity and the budget."""
    method, search = settings.removal.method, settings.search
    check_known("method", method, ["slice", *MERGINGS], "removal.method")
    budget = check_granularity(search)
    if method == "slice":
        return
    if search.granularity != "channel":
        raise UserError(f"--removal.method: {method} is for channels, not for {search.granularity}; use slice")
    if isinstance(budget, BudgetRange) and method == "resrep":
        raise UserError(f"--budget: resrep trains for one budget, got {budget}")


def check_granularity(search: SearchConfig) -> Budget | BudgetRange:
    """The budget of a search, after a look at whether its granularity can be decided so.

    Raises:
        UserError: If the granularity is unknown, or criterion, agent or budget don't go with it.
    """
    budget, granularity = parse_budget(search.budget), search.granularity
    if not n_of_m(granularity):
        check_known("granularity", granularity, GRANULARITIES, others=", or N:M as in 2:4")
    if granularity == "channel":
        return budget
    if isinstance(budget, BudgetRange):
        raise UserError(f"--budget: a range is for channels; granularity {granularity} takes one budget, got {budget}")
    if granularity == "layer" and (budget.metric, search.agent) != ("macs", "global"):
        raise UserError(
            f"--granularity: blocks are ranked by damage per MAC; use --agent global and a budget of macs, "
            f"got {search.agent} and {budget}"
        )
    if granularity != "layer" and not n_of_m(granularity):
        check_mask_options(granularity, search.criterion, search.agent)
    return budget
