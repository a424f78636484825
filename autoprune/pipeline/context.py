"""What every stage of a run works on: network, images, trace, costs and importance,
made when they are asked for.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from autoprune.config import Settings
from autoprune.costs.budget import parse_budget
from autoprune.costs.constraints import pinned_by_user, search_limits
from autoprune.costs.cost import CostTable
from autoprune.data.datasets import Splits, load
from autoprune.data.models import EMBEDDED_WEIGHTS, build, check_answers, load_weights
from autoprune.deploy.export import load_pruned
from autoprune.errors import UserError
from autoprune.evaluation.image_blocks import ImageBlocks
from autoprune.evaluation.importance import Importance, importance
from autoprune.evaluation.proxy import ProxyAccuracy
from autoprune.evaluation.reconstruction import Reconstruction
from autoprune.runs import RunFolder
from autoprune.scaling.scaled_proxy import ScaledProxy
from autoprune.scaling.scaling import RESOLUTION, ScaledCosts, Scaling
from autoprune.structure.groups import Groups
from autoprune.tracing.trace import trace


@dataclass(frozen=True)
class Workspace:
    """Network, images and trace of one run; made lazily, and none of it is ever
    changed.

    Attributes:
        settings: What the run was started with.
        sparse: Where sparse training left its network; None before it, or without.
        blocks: File of the order in which blocks go, as soon as the run has written it.
    """

    settings: Settings
    sparse: Path | None = None
    blocks: Path | None = None

    @classmethod
    def of_run(cls, folder: RunFolder) -> "Workspace":
        """That of a run that is past its sparse training, if it has any.

        Raises:
            UserError: If it isn't.
        """
        settings = Settings.from_dict(folder.read_config())
        if settings.sparse.method == "none":
            return cls(settings, blocks=folder.blocks)
        folder.read_json(folder.sparse / "plan.json")
        return cls(settings, folder.sparse, folder.blocks)

    def after_sparse_training(self, sparse: Path) -> "Workspace":
        """The workspace whose network is to be pruned, with the images and the dense
        network of this one.
        """
        after = Workspace(self.settings, sparse, self.blocks)
        vars(after).update(
            {
                name: value
                for name, value in vars(self).items()
                if name in ("splits", "dense")
            }
        )
        return after

    @cached_property
    def splits(self) -> Splits:
        """The images."""
        return load(self.settings.data)

    @cached_property
    def dense(self) -> nn.Module:
        """The network with its trained weights, on the CPU in float32, in eval mode.

        Raises:
            UserError: If it can't be built, or doesn't answer images of this size with
                one of these classes.
        """
        network, classes = self.settings.network, self.splits.classes
        model = build(network.model, len(classes))
        path = _weights_file(network.model, network.weights, self.settings.data.data)
        if path is not None:
            load_weights(model, path)
        model = (
            model.eval().to("cpu", torch.float32).to(memory_format=torch.channels_last)
        )
        check_answers(model, network.model, self.splits.example, len(classes))
        return model

    @cached_property
    def model(self) -> nn.Module:
        """The network to prune: the dense one, or what sparse training made of it."""
        return load_pruned(self.sparse) if self.sparse else self.dense

    @cached_property
    def traced(self) -> Groups:
        """The trace, verified."""
        return trace(self.model, self.splits.example)

    @cached_property
    def scaling(self) -> Scaling | None:
        """The depths and image sizes to choose from, if the settings ask for them."""
        if self.settings.search.granularity != "dimensions":
            return None
        search, splits = self.settings.search, self.splits
        is_params = parse_budget(search.budget).metric == "params"
        fixed = {RESOLUTION: "smaller images save no parameters"} if is_params else {}
        scaling = Scaling(
            self.model,
            self.traced,
            splits.example,
            splits.proxy,
            search.excluded,
            fixed,
        )
        if self.blocks and self.blocks.exists():
            scaling.order = RunFolder(self.blocks.parent).read_json(self.blocks)[
                "order"
            ]
        return scaling

    @cached_property
    def groups(self) -> Groups:
        """What can be decided: the trace; what the settings exclude is pinned."""
        return (
            self.scaling.groups
            if self.scaling
            else pinned_by_user(self.traced, self.settings.search.excluded)
        )

    @property
    def widths(self) -> Groups:
        """Those of the groups that channels sit in."""
        return (
            self.traced.with_pins(self.groups.reasons) if self.scaling else self.groups
        )

    @cached_property
    def costs(self) -> CostTable:
        """The cost table."""
        return ScaledCosts(self.scaling) if self.scaling else CostTable(self.groups)

    @property
    def limits(self) -> dict[str, dict[str, int]]:
        """Multiples and least counts of what can be decided; see `search_limits`."""
        own = (self.scaling.steps, self.scaling.least) if self.scaling else ()
        return search_limits(self.groups, self.settings.search, *own)

    @cached_property
    def importance(self) -> Importance:
        """Scores per channel by the configured criterion and seed."""
        search = self.settings.search
        return importance(
            search.criterion, self.model, self.widths, self.splits.train, search.seed
        )

    def at(self, kept: Mapping[str, int], verify: bool = False) -> "Workspace":
        """The workspace of the network with the depth and image size of an allocation,
        whose widths are to be decided.

        Args:
            kept: An allocation in which depth and size take part.
            verify: Prove its groups.
        """
        search = dataclasses.replace(
            self.settings.search, granularity="channel", exclude=""
        )
        scaled = Workspace(
            dataclasses.replace(self.settings, search=search), self.sparse
        )
        groups = self.scaling.trace(kept, verify)
        scores = {name: self.importance[name] for name in groups.channels}
        own = {
            "model": self.scaling.network(kept),
            "groups": groups,
            "importance": scores,
        }
        vars(scaled).update(own | {"splits": self.splits, "dense": self.dense})
        return scaled

    @cached_property
    def reconstruction(self) -> Reconstruction | None:
        """What weights of pruned layers are solved with; None where the settings forbid
        it.
        """
        if self.settings.proxy.reconstruct == "off":
            return None
        return Reconstruction(self.model, self.groups, self.splits.calibration.inputs)

    @property
    def network(self) -> dict:
        """What a plan says of the network that its weights are for."""
        classes = self.splits.classes
        return {
            "model": self.settings.network.model,
            "n_classes": len(classes),
            "classes": list(classes),
        }

    @property
    def dense_costs(self) -> dict:
        """MACs, parameters and memory before anything goes, for results.json."""
        return {
            f"{metric}_dense": cost(self.costs.dense)
            for metric, cost in self.costs.metrics.items()
        }

    def costs_of(self, kept: Mapping[str, int]) -> dict:
        """MACs, parameters and memory before and after, and the table of groups, for
        results.json.
        """
        results = {
            metric: cost(kept) for metric, cost in self.costs.metrics.items()
        } | self.dense_costs
        there = self.scaling.there(kept) if self.scaling else kept
        groups = [
            {"name": g.name, "channels": g.channels, "kept": there.get(g.name, 0)}
            for g in self.groups
        ]
        pinned = [
            {"name": g.name, "channels": g.channels, "reason": g.pinned}
            for g in self.groups.pinned
        ]
        return results | {
            "macs_ratio": results["macs"] / results["macs_dense"],
            "groups": groups,
            "pinned": pinned,
        }

    def proxy(self, blocks: ImageBlocks | None = None) -> ProxyAccuracy | ScaledProxy:
        """A fresh proxy with an empty cache; `blocks` as for `ProxyAccuracy`."""
        if self.scaling:
            return ScaledProxy(
                self.scaling,
                lambda kept, blocks: self.at(kept).proxy(blocks),
                self.splits.proxy,
            )
        config, solve = self.settings.proxy, lambda: self.reconstruction
        return ProxyAccuracy(
            self.model,
            self.groups,
            self.importance,
            self.splits,
            config,
            solve,
            self.dense,
            blocks,
        )


def _weights_file(model: str, weights: str, data: str) -> Path | None:
    if weights != "auto":
        return Path(weights)
    if model == "resnet20" and data in ("sample", "cifar10"):
        return EMBEDDED_WEIGHTS
    if ":" in model:
        return None
    raise UserError(
        "weights",
        f"pruning starts from a trained network; give the trained weights "
        f"of {model} on {data!r}",
    )
