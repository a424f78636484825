"""Depth and image size as two more things to decide, beside the widths of groups.

They enter a search as groups that no tensor holds: `depth`, whose channels are the
blocks that can be removed, and one for the rest of the network; and `resolution`, whose
channels are the pixels of the image's side. So an agent, a budget and an allocation
treat them as they treat widths, and costs stay those of the network that comes out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.costs.constraints import pin_excluded
from autoprune.costs.cost import CostTable
from autoprune.costs.metrics import (
    Cost,
    KeptCounts,
    Metric,
    counts_in_order,
    whole_costs,
)
from autoprune.data.datasets import Images
from autoprune.errors import UserError
from autoprune.evaluation.proxy import half
from autoprune.scaling.depth import (
    removable_blocks,
    remove_blocks,
    select_blocks_to_remove,
)
from autoprune.scaling.resolution import resize_inputs
from autoprune.structure.groups import Group, Groups
from autoprune.tracing.trace import trace

DEPTH = "depth"
RESOLUTION = "resolution"
LEVELS = 8
"""Steps from all blocks to none, at most, and from the image's side to nothing."""
RANKING_IMAGES = 250
"""Images on which the order in which blocks go is measured."""


class Scaling:
    """The depths and image sizes that a network can have.

    Args:
        model: The whole network; left as found.
        traced: Its trace.
        example: One input, `(1, channels, height, width)`.
        images: What the damage of a removed block is measured on.
        excluded: Patterns of groups that stay whole, `depth` and `resolution` among
            them; see `autoprune.costs.constraints`.
        fixed: `depth` or `resolution` to the reason why it must not change.
        order: The removable blocks in the order in which they go; None to measure it.
    """

    def __init__(
        self,
        model: nn.Module,
        traced: Groups,
        example: Tensor,
        images: Images,
        excluded: Sequence[str] = (),
        fixed: Mapping[str, str] = MappingProxyType({}),
        order: list[str] | None = None,
    ):
        self.model = model
        self.traced = traced
        self.example = example
        self.excluded = excluded
        self.fixed = fixed
        self._images = images[:RANKING_IMAGES]
        self._stored_order = order
        self._traces: dict[tuple[int, int], Groups] = {}
        self._tables: dict[tuple[int, int], CostTable] = {}

    @cached_property
    def order(self) -> list[str]:
        """The removable blocks in the order in which they go.

        The block of least damage per MAC goes first; see
        `autoprune.scaling.depth.select_blocks_to_remove`.
        """
        if self._stored_order is not None:
            return self._stored_order
        # The floor is the network without any of them, so that every block gets a place
        # in the order and one order serves all depths.
        floor = CostTable(self.traced).macs({})
        for block in removable_blocks(self.model, self.example):
            floor -= block.macs
        return select_blocks_to_remove(self.model, self.example, self._images, floor)

    @cached_property
    def groups(self) -> Groups:
        """The trace with `depth` and `resolution` in front.

        Each is pinned where the network has no choice.

        Raises:
            UserError: If the network has groups of these names already.
        """
        depth, side = self.whole
        reasons = dict(self.fixed)
        if not self.order:
            reasons[DEPTH] = "the network has no block that can be removed"
        for size in self._smaller_sizes():
            if not self._accepts(size):
                reasons[RESOLUTION] = (
                    f"the network doesn't read images of {size} pixels"
                )
                break
        taken = {group.name for group in self.traced.all} & {DEPTH, RESOLUTION}
        if taken:
            raise UserError(
                "granularity",
                f"the network has channels called {min(taken)!r}, as is a dimension; "
                f"rename them",
            )
        added = (
            Group(DEPTH, depth, (), reasons.get(DEPTH), 1.0),
            Group(RESOLUTION, side, (), reasons.get(RESOLUTION), 1.0),
        )
        # The labels of a trace count channels through all groups; nobody cuts by these.
        groups = replace(
            self.traced, all=(*added, *self.traced.all), book=None, units=None
        )
        return pin_excluded(groups, self.excluded)

    @property
    def steps(self) -> dict[str, int]:
        """By how many channels `depth` and `resolution` change at a time."""
        depth_step = -(-len(self.order) // LEVELS)
        size_step = self.example.shape[-1] // LEVELS
        return {DEPTH: max(1, depth_step), RESOLUTION: max(1, size_step)}

    @property
    def least(self) -> dict[str, int]:
        """The least count of `resolution`: half of the image's side."""
        # Images smaller than that say too little.
        return {RESOLUTION: half(self.example.shape[-1])}

    @property
    def whole(self) -> tuple[int, int]:
        """Depth and image size of the network as it is."""
        return len(self.order) + 1, self.example.shape[-1]

    def depth_and_size(self, kept: Mapping[str, int]) -> tuple[int, int]:
        """Depth and image size of an allocation.

        Args:
            kept: Group to kept channels; what it doesn't name is whole.
        """
        depth, size = self.whole
        return kept.get(DEPTH, depth), kept.get(RESOLUTION, size)

    def removed(self, kept: Mapping[str, int]) -> list[str]:
        """The blocks that are gone under an allocation.

        Args:
            kept: Group to kept channels.
        """
        depth, _ = self.depth_and_size(kept)
        n_removed = self.whole[0] - depth
        return self.order[:n_removed]

    def remaining(self, kept: Mapping[str, int]) -> dict[str, int]:
        """An allocation without the groups that lie in removed blocks.

        Args:
            kept: Group to kept channels.
        """
        remaining = {}
        for name in (DEPTH, RESOLUTION):
            if name in kept:
                remaining[name] = kept[name]
        return remaining | self.widths(kept)

    def widths(self, kept: Mapping[str, int]) -> dict[str, int]:
        """The counts of the channel groups that exist at the depth of an allocation.

        Args:
            kept: Group to kept channels.
        """
        depth, size = self.depth_and_size(kept)
        widths = {}
        for name in self.costs(depth, size).names:
            if name in kept:
                widths[name] = kept[name]
        return widths

    def network(self, kept: Mapping[str, int]) -> nn.Module:
        """A copy of the network with the depth and image size of an allocation.

        Args:
            kept: Group to kept channels; all widths stay whole.
        """
        _, size = self.depth_and_size(kept)
        return resize_inputs(remove_blocks(self.model, self.removed(kept)), size)

    def trace(self, kept: Mapping[str, int], verify: bool = False) -> Groups:
        """The trace of the network with the depth and image size of an allocation.

        What is pinned in the whole network is pinned in it too.

        Args:
            kept: Group to kept channels.
            verify: Prove its groups. Without a proof each trace is made once.

        Raises:
            UserError: If it has groups that the whole network lacks.
        """
        scale = self.depth_and_size(kept)
        if not verify and scale in self._traces:
            return self._traces[scale]
        groups = trace(self.network(kept), self.example, verify)
        known = {group.name for group in self.groups.all}
        for group in groups:
            if group.name in known:
                continue
            # An allocation of the whole network has no count for it.
            gone = ", ".join(self.removed(kept))
            raise UserError(
                "granularity",
                f"without {gone} the network has other groups ({group.name}); exclude "
                f"depth",
            )
        groups = groups.with_pins(self.groups.reasons)
        if not verify:
            self._traces[scale] = groups
        return groups

    def costs(self, depth: int, size: int) -> CostTable:
        """Costs of the widths at a depth and an image size.

        Args:
            depth: Remaining blocks, and one for the rest of the network.
            size: Side of the image in pixels.
        """
        if (depth, size) not in self._tables:
            groups = self.trace({DEPTH: depth, RESOLUTION: size})
            self._tables[depth, size] = CostTable(groups)
        return self._tables[depth, size]

    def _smaller_sizes(self) -> list[int]:
        """The smaller image sizes that a search has to choose from by default."""
        step = self.steps[RESOLUTION]
        least = self.least[RESOLUTION]
        first_multiple = -(-least // step) * step
        return [least, *range(first_multiple, self.example.shape[-1], step)]

    def _accepts(self, size: int) -> bool:
        """Whether the network reads images of a size."""
        try:
            with torch.no_grad():
                resize_inputs(self.model, size).eval()(self.example[:1])
        except Exception:  # whatever the user's forward raises
            return False
        return True


class ScaledCosts(CostTable):
    """Costs of depth, image size and widths together, as in the network that comes out.

    Args:
        scaling: The network's depths and sizes.
    """

    def __init__(self, scaling: Scaling):
        super().__init__(scaling.groups)
        self.metrics: dict[str, Metric] = {
            name: ScaledMetric(scaling, name) for name in self.metrics
        }


class ScaledMetric:
    """A metric of depth, image size and widths: that of the widths in their network.

    Args:
        scaling: The network's depths and sizes.
        name: What is counted.
    """

    def __init__(self, scaling: Scaling, name: str):
        self.scaling = scaling
        self.name = name
        self._dense = np.array([group.channels for group in scaling.groups], np.int64)
        self._names = [group.name for group in scaling.groups]
        depth, size = scaling.whole
        self._whole = {DEPTH: depth, RESOLUTION: size}
        # A dimension that is pinned has no column: it is whole in every allocation.
        self._columns: dict[str, int] = {}
        for dimension in self._whole:
            if dimension in self._names:
                self._columns[dimension] = self._names.index(dimension)

    def __call__(self, kept: KeptCounts) -> Cost:
        """As in `Metric`."""
        counts = counts_in_order(kept, self._names, self._dense)

        def exact(table: CostTable, widths: np.ndarray) -> np.ndarray:
            return table.metrics[self.name](widths)

        # Whole numbers up to 2^53 are exact as floats.
        return whole_costs(self._values(counts, exact))

    def continuous(self, kept: np.ndarray) -> np.ndarray:
        """As in `Metric`, smooth in the widths.

        At any count it takes the nearest of the depths and sizes that a search has by
        default.

        Args:
            kept: Counts `(..., n_groups)`, in fractions too.
        """
        snapped = np.array(kept, float)
        for name, column in self._columns.items():
            step = self.scaling.steps[name]
            multiples = np.maximum(1, np.rint(snapped[..., column] / step))
            snapped[..., column] = np.minimum(multiples * step, self._whole[name])

        def smooth(table: CostTable, widths: np.ndarray) -> np.ndarray:
            return table.continuous_cost(self.name, widths)

        return self._values(snapped, smooth)

    def _values(
        self, kept: np.ndarray, cost: Callable[[CostTable, np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """Costs of allocations, those of each depth and size from its own table.

        Args:
            kept: Counts `(..., n_groups)`.
            cost: From the table of a depth and size, and widths, to costs.

        Returns:
            Costs `(...)`.
        """
        rows = kept.reshape(-1, len(self._names))
        scales = np.empty((len(rows), 2), np.int64)
        for place, (name, whole) in enumerate(self._whole.items()):
            column = self._columns.get(name)
            scales[:, place] = whole if column is None else rows[:, column]
        values = np.empty(len(rows))
        # Few scales, many widths: a table answers all allocations of its scale at once.
        for scale in np.unique(scales, axis=0):
            table = self.scaling.costs(*scale.tolist())
            is_alike = (scales == scale).all(1)
            columns = [self._names.index(name) for name in table.names]
            widths = rows[is_alike][:, columns]
            values[is_alike] = cost(table, widths)
        return values.reshape(kept.shape[:-1])
