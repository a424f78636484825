"""What every stage of a run works on: network, images, trace, costs and importance."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from autoprune.config import AUTO, Settings
from autoprune.costs.budget import parse_budget
from autoprune.costs.constraints import pin_excluded, search_limits
from autoprune.costs.cost import CostTable
from autoprune.costs.widths import Tile, finest_needed, tile_of_processor
from autoprune.data.checkpoints import load_weights
from autoprune.data.datasets import (
    Dataset,
    Splits,
    open_dataset,
    read_dataset,
    stored_preprocessing,
)
from autoprune.data.models import build, prepare_network
from autoprune.data.places import weights_named
from autoprune.data.preprocessing import Preprocessing
from autoprune.data.preprocessing_sources import preprocessing_of
from autoprune.deploy.pruned import load_pruned
from autoprune.errors import UserError
from autoprune.evaluation.image_blocks import ImageBlocks
from autoprune.evaluation.importance import Importance, importance
from autoprune.evaluation.proxy import ProxyAccuracy
from autoprune.evaluation.proxy_protocol import Proxy
from autoprune.evaluation.reconstruction import Reconstruction
from autoprune.latency.engines import engine_named
from autoprune.latency.model import LatencyModel
from autoprune.pipeline.latency_budget import (
    METRIC,
    budgets_latency,
    latency_model_of,
)
from autoprune.results import COST_FIELDS
from autoprune.runs import RunFolder
from autoprune.scaling.scaled_proxy import ScaledProxy
from autoprune.scaling.scaling import RESOLUTION, ScaledCosts, Scaling
from autoprune.structure.groups import Groups
from autoprune.tracing.trace import trace


@dataclass(frozen=True)
class Parts:
    """Parts that a context takes over instead of making them; None for those to make.

    Attributes:
        splits: The images.
        preprocessing: How images become inputs, as the run was started with it.
        tile: What its widths were made for, as the run was started with it.
        dense: The network with its trained weights.
        model: The network to prune.
        groups: Its groups, what is excluded pinned.
        importance: Scores per channel.
        latency_model: What latencies are computed with.
    """

    splits: Splits | None = None
    preprocessing: Preprocessing | None = None
    tile: Tile | None = None
    dense: nn.Module | None = None
    model: nn.Module | None = None
    groups: Groups | None = None
    importance: Importance | None = None
    latency_model: LatencyModel | None = None

    @classmethod
    def stored_in(cls, config: Mapping[str, Any]) -> "Parts":
        """What a run keeps to, whatever the machine or package says by now.

        Args:
            config: What its config.yaml holds.
        """
        tile = config.get("tile")
        return cls(
            preprocessing=stored_preprocessing(config),
            tile=Tile(**tile) if tile else None,
        )


@dataclass(frozen=True)
class RunContext:
    """Network, images and trace of one run; each is made when it is first asked for.

    Nothing of it changes afterwards: a stage that leaves another network behind gets a
    context of its own.

    Attributes:
        settings: What the run was started with.
        sparse: Folder in which sparse training left its network; None before it, or
            without.
        blocks: File of the order in which blocks go, as soon as the run has written it.
        latency: File of the latency model, likewise.
        parts: What is taken over from another context.
    """

    settings: Settings
    sparse: Path | None = None
    blocks: Path | None = None
    latency: Path | None = None
    parts: Parts = Parts()

    @classmethod
    def of_run(cls, folder: RunFolder) -> "RunContext":
        """The context of a run that is past its sparse training, if it has any.

        Args:
            folder: The run.

        Raises:
            UserError: If sparse training isn't done.
        """
        # The merged config names every option, so a run isn't touched by defaults that
        # another version changes.
        config = folder.read_config()
        settings = Settings.from_dict(config)
        parts = Parts.stored_in(config)
        if settings.sparse.method == "none":
            return cls(settings, None, folder.blocks, folder.latency_model, parts=parts)
        # Reading the plan refuses a run whose sparse training isn't done.
        folder.read_json(folder.sparse / "plan.json")
        return cls(settings, folder.sparse, folder.blocks, folder.latency_model, parts)

    def after_sparse_training(self, sparse: Path) -> "RunContext":
        """The context whose network is the sparsely trained one.

        Args:
            sparse: Folder that holds it.

        Returns:
            A context with the images and the dense network of this one.
        """
        # The dense network goes along: it stays the teacher of every training, and what
        # accuracy and latency are compared with. Importance doesn't, since it is read
        # from the weights.
        # Sparse training leaves all shapes, and so the latency, as they are.
        latency_model = None
        if budgets_latency(self.settings):
            latency_model = self.latency_model
        parts = Parts(
            splits=self.splits,
            tile=self.tile,
            dense=self.dense,
            latency_model=latency_model,
        )
        return RunContext(self.settings, sparse, self.blocks, self.latency, parts)

    @cached_property
    def _dataset(self) -> Dataset:
        """The images before they are read; their classes are known already."""
        return open_dataset(self.settings.data)

    @cached_property
    def _trained(self) -> tuple[nn.Module, tuple[str, ...]]:
        """The network with its trained weights, and what to tell of these."""
        # First, since it is refused without building anything.
        place = self._place_of_weights
        model = build(self.settings.network.model, len(self._dataset.classes))
        remarks = () if place is None else load_weights(model, place)
        return model, remarks

    @property
    def _place_of_weights(self) -> str | None:
        network = self.settings.network
        return weights_named(network.model, network.weights, self.settings.data.data)

    @cached_property
    def splits(self) -> Splits:
        """The images, made to fit the network."""
        if self.parts.splits is not None:
            return self.parts.splits
        preprocessing = self.parts.preprocessing
        # What a run was started with stays, whatever the network's package says now.
        if preprocessing is None:
            preprocessing = preprocessing_of(
                self._trained[0],
                self.settings.data,
                self.settings.network.model,
                self._place_of_weights,
                len(self._dataset.classes),
            )
        return read_dataset(self._dataset, self.settings.data, preprocessing)

    @cached_property
    def dense(self) -> nn.Module:
        """The network with its trained weights, on the CPU in float32, in eval mode.

        Raises:
            UserError: If it can't be built, or doesn't answer images of this size with
                one of these classes.
        """
        if self.parts.dense is not None:
            return self.parts.dense
        classes = self.splits.classes
        name = self.settings.network.model
        model, _ = self._trained
        return prepare_network(model, name, self.splits.example, len(classes))

    @property
    def facts(self) -> dict[str, Any]:
        """What the config of a run holds beside its settings, see `Parts.stored_in`."""
        facts: dict[str, Any] = {"preprocessing": self.splits.preprocessing.to_dict()}
        if self.tile is not None:
            facts["tile"] = asdict(self.tile)
        return facts

    @property
    def remarks(self) -> tuple[str, ...]:
        """What to tell of how images and weights were read, before a run begins."""
        return (*self.splits.remarks, *self._trained[1])

    @cached_property
    def model(self) -> nn.Module:
        """The network to prune: the dense one, or what sparse training made of it."""
        if self.parts.model is not None:
            return self.parts.model
        # Read from its file, so that a resumed run and the one that trained work on the
        # same weights.
        return load_pruned(self.sparse) if self.sparse else self.dense

    @cached_property
    def traced(self) -> Groups:
        """The trace, verified."""
        return trace(self.model, self.splits.example)

    @cached_property
    def scaling(self) -> Scaling | None:
        """The depths and image sizes to choose from, if the settings ask for them."""
        search = self.settings.search
        if search.granularity != "dimensions":
            return None
        height, width = self.splits.example.shape[2:]
        if height != width:
            raise UserError(
                "granularity",
                f"dimensions needs square images, got {height}x{width}; give "
                f"image_size as one side",
            )
        fixed = {}
        if parse_budget(search.budget).metric == "params":
            fixed[RESOLUTION] = "smaller images save no parameters"
        return Scaling(
            self.model,
            self.traced,
            self.splits.example,
            self.splits.proxy,
            search.excluded,
            fixed,
            self._stored_order(),
        )

    def _stored_order(self) -> list[str] | None:
        """The order in which blocks go, where the run has written it."""
        # An order that was measured anew might break ties otherwise, and the run's
        # allocation would then mean other blocks.
        if self.blocks is None or not self.blocks.exists():
            return None
        return RunFolder(self.blocks.parent).read_json(self.blocks)["order"]

    @cached_property
    def groups(self) -> Groups:
        """What can be decided: the trace; what the settings exclude is pinned."""
        if self.parts.groups is not None:
            return self.parts.groups
        # The scaling puts depth and image size in front, and pins what is excluded
        # itself.
        if self.scaling:
            return self.scaling.groups
        return pin_excluded(self.traced, self.settings.search.excluded)

    @property
    def channel_groups(self) -> Groups:
        """Those of the groups that hold channels: all but depth and image size."""
        if self.scaling:
            # By name: what keeps a group whole among all groups keeps it whole here.
            return self.traced.with_pins(self.groups.reasons)
        return self.groups

    @cached_property
    def costs(self) -> CostTable:
        """The cost table, with the metric of the budget."""
        costs = self._exact_costs
        if budgets_latency(self.settings):
            costs = costs.with_metric(METRIC, self.latency_model)
        return parse_budget(self.settings.search.budget).with_metrics(costs)

    @cached_property
    def tile(self) -> Tile | None:
        """How many channels the engine computes at a time.

        None where the settings say to what widths are rounded.
        """
        if self.settings.search.round_to != AUTO:
            return None
        # A run goes on with the widths that it began with, on whatever machine.
        return self.parts.tile or self._tile_of_engine()

    def _tile_of_engine(self) -> Tile:
        latency = self.settings.latency
        channels = engine_named(latency.engine).tile(latency.precision)
        return replace(tile_of_processor(), channels=channels, engine=latency.engine)

    @cached_property
    def _exact_costs(self) -> CostTable:
        """The cost table without what has to be measured."""
        return ScaledCosts(self.scaling) if self.scaling else CostTable(self.groups)

    @cached_property
    def latency_model(self) -> LatencyModel:
        """What the budgeted latency of an allocation is computed with."""
        if self.parts.latency_model is not None:
            return self.parts.latency_model
        return latency_model_of(self, self._exact_costs)

    @cached_property
    def limits(self) -> dict[str, dict[str, int]]:
        """Multiples and least counts of what can be decided; see `search_limits`."""
        if self.tile is None:
            return self._limits(1)
        widths = self._limits(self.tile.channels)["min_width"]
        search = self.settings.search

        def suited(tile: int) -> dict[str, int]:
            return self._limits(tile)["round_to"]

        multiples = finest_needed(
            suited,
            self.tile.channels,
            self.costs,
            parse_budget(search.budget).at_position(0),
            search.max_sparsity,
            widths,
        )
        return {"round_to": multiples, "min_width": widths}

    @property
    def coarsest_limits(self) -> dict[str, dict[str, int]]:
        """The limits with the engine's whole tile, however tight the budget is."""
        return self._limits(1 if self.tile is None else self.tile.channels)

    def _limits(self, tile: int) -> dict[str, dict[str, int]]:
        search = self.settings.search
        if self.scaling:
            steps = self.scaling.steps
            return search_limits(self.groups, search, steps, self.scaling.least, tile)
        return search_limits(self.groups, search, tile=tile)

    @property
    def widths(self) -> dict[str, Any]:
        """What kept counts are multiples of, as a field of `Results`."""
        about = {} if self.tile is None else asdict(self.tile)
        return about | {"multiples": self.limits["round_to"]}

    @cached_property
    def importance(self) -> Importance:
        """Scores per channel by the configured criterion and seed; higher is kept."""
        if self.parts.importance is not None:
            return self.parts.importance
        search = self.settings.search
        return importance(
            search.criterion,
            self.model,
            # Depth and image size have no channels to rank.
            self.channel_groups,
            # Only training images: the test split has no say in what goes.
            self.splits.train,
            search.seed,
        )

    def scaled(self, kept: Mapping[str, int], verify: bool = False) -> "RunContext":
        """The context of the network with the depth and image size of an allocation.

        Args:
            kept: An allocation in which depth and size take part.
            verify: Prove the groups of that network.

        Returns:
            A context whose widths are still to be decided.
        """
        assert self.scaling is not None, "only --granularity dimensions scales"
        # From here on a network like any other, of which only widths are left to
        # decide. What is excluded is pinned in its trace already.
        search = replace(self.settings.search, granularity="channel", exclude="")
        groups = self.scaling.trace(kept, verify)
        parts = Parts(
            splits=self.splits,
            tile=self.tile,
            dense=self.dense,
            model=self.scaling.network(kept),
            groups=groups,
            # Taken over and not measured anew, so that channels rank alike at every
            # depth and image size.
            importance={name: self.importance[name] for name in groups.channels},
        )
        settings = replace(self.settings, search=search)
        # Without the order of blocks: the depth of this network is decided.
        return RunContext(settings, self.sparse, parts=parts)

    @cached_property
    def reconstruction(self) -> Reconstruction | None:
        """What solves the weights of pruned layers; None where settings forbid it."""
        if self.settings.proxy.reconstruct == "off":
            return None
        # On calibration images: solved weights that are scored on the images that they
        # were solved on would look better than they are.
        return Reconstruction(self.model, self.groups, self.splits.calibration.inputs)

    def _required_reconstruction(self) -> Reconstruction:
        reconstruction = self.reconstruction
        assert reconstruction is not None, "the proxy asks only where settings allow it"
        return reconstruction

    @property
    def network_plan(self) -> dict[str, Any]:
        """What a plan says of the network that its weights are for."""
        classes = list(self.splits.classes)
        return {
            "model": self.settings.network.model,
            "n_classes": len(classes),
            "classes": classes,
            "preprocessing": self.splits.preprocessing.to_dict(),
        }

    @property
    def dense_costs(self) -> dict[str, int]:
        """MACs, parameters and memory before anything goes, as fields of `Results`."""
        costs = {}
        for metric, field in COST_FIELDS.items():
            costs[f"{field}_dense"] = self.costs.metrics[metric](self.costs.dense)
        return costs

    def costs_of(self, kept: Mapping[str, int]) -> dict[str, Any]:
        """What an allocation leaves, as fields of `Results`.

        Args:
            kept: Group to kept channels.

        Returns:
            MACs, parameters and memory before and after, and the table of groups.
        """
        results: dict[str, Any] = {}
        for metric, field in COST_FIELDS.items():
            results[field] = self.costs.metrics[metric](kept)
        results |= self.dense_costs
        results["macs_ratio"] = results["macs"] / results["macs_dense"]
        # Groups in removed blocks are gone, whatever their count in the allocation.
        remaining = self.scaling.remaining(kept) if self.scaling else kept
        results["groups"] = [
            {"name": g.name, "channels": g.channels, "kept": remaining.get(g.name, 0)}
            for g in self.groups
        ]
        results["pinned"] = [
            {"name": g.name, "channels": g.channels, "reason": g.pinned}
            for g in self.groups.pinned
        ]
        return results

    def proxy(self, blocks: ImageBlocks | None = None) -> Proxy:
        """A fresh proxy with an empty cache.

        Args:
            blocks: As for `ProxyAccuracy`.
        """
        if self.scaling:
            return ScaledProxy(self.scaling, self._scaled_proxy, self.splits.proxy)
        return self._channel_proxy(blocks)

    def _scaled_proxy(
        self, kept: Mapping[str, int], blocks: ImageBlocks | None
    ) -> ProxyAccuracy:
        return self.scaled(kept)._channel_proxy(blocks)

    def _channel_proxy(self, blocks: ImageBlocks | None) -> ProxyAccuracy:
        return ProxyAccuracy(
            self.model,
            self.groups,
            self.importance,
            self.splits,
            self.settings.proxy,
            # The function and not what it gives: measuring the layers' inputs is a pass
            # over images that most proxies never need.
            self._required_reconstruction,
            # Soft targets are those of the dense network, also of a network that was
            # trained sparsely or is less deep.
            self.dense,
            blocks,
        )
