"""Depth and image size as two more things to decide, beside the widths of the channel
groups.

They enter a search as groups that no tensor holds: `depth`, whose channels are the
blocks that can be removed, and one for the rest of the network; and `resolution`, whose
channels are the pixels of the image's side. So an agent, a budget and an allocation
treat them as they treat widths, and costs stay those of the network that really comes
out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.costs.constraints import pinned_by_user
from autoprune.costs.cost import CostTable, KeptCounts
from autoprune.data.datasets import Images
from autoprune.errors import UserError
from autoprune.evaluation.proxy import half
from autoprune.scaling.depth import removable_blocks, remove_blocks, shallower
from autoprune.scaling.resolution import at_resolution
from autoprune.structure.groups import Group, Groups
from autoprune.tracing.trace import trace

DEPTH, RESOLUTION = "depth", "resolution"
LEVELS = 8
"""Steps from all blocks to none, at most, and from the image's side to nothing."""
RANKING_IMAGES = 250
"""Images on which the order in which blocks go is measured."""


class Scaling:
    """The depths and image sizes that a network can have.

    Args:
        model: The whole network; left as found.
        traced: Its trace.
        example: One input.
        images: What the damage of a removed block is measured on.
        excluded: Patterns of groups that stay whole, `depth` and `resolution` among
            them; see
        `autoprune.costs.constraints`.
        fixed: `depth` or `resolution` to the reason why it must not change.
    """

    def __init__(
        self,
        model: nn.Module,
        traced: Groups,
        example: Tensor,
        images: Images,
        excluded: Sequence[str] = (),
        fixed: Mapping[str, str] = MappingProxyType({}),
    ):
        self.model, self.traced, self.example, self.excluded, self.fixed = (
            model,
            traced,
            example,
            excluded,
            fixed,
        )
        self._images = images[:RANKING_IMAGES]
        self._traces: dict[tuple[int, int], Groups] = {}
        self._tables: dict[tuple[int, int], CostTable] = {}

    @cached_property
    def order(self) -> list[str]:
        """The removable blocks in the order in which they go, that of least damage per
        MAC; see `depth.shallower`.
        """
        saved = sum(block.macs for block in removable_blocks(self.model, self.example))
        floor = CostTable(self.traced).macs({}) - saved
        return shallower(self.model, self.example, self._images, floor)

    @cached_property
    def groups(self) -> Groups:
        """The trace with `depth` and `resolution` in front, each pinned where the
        network has no choice.
        """
        depth, side = self.whole
        reasons = dict(self.fixed)
        if not self.order:
            reasons[DEPTH] = "the network has no block that can be removed"
        unread = next((size for size in self._sizes if not self._reads(size)), None)
        if unread is not None:
            reasons[RESOLUTION] = f"the network doesn't read images of {unread} pixels"
        added = [
            Group(n, count, (), reasons.get(n), 1.0)
            for n, count in ((DEPTH, depth), (RESOLUTION, side))
        ]
        taken = {group.name for group in added} & {
            group.name for group in self.traced.all
        }
        if taken:
            raise UserError(
                "granularity",
                f"the network has channels called {min(taken)!r}, as is "
                f"a dimension; rename them",
            )
        # The labels of a trace count channels through all groups; nobody cuts by these.
        groups = replace(
            self.traced, all=(*added, *self.traced.all), book=None, units=None
        )
        return pinned_by_user(groups, self.excluded)

    @property
    def steps(self) -> dict[str, int]:
        """By how many channels `depth` and `resolution` change at a time."""
        sizes = {
            DEPTH: -(-len(self.order) // LEVELS),
            RESOLUTION: self.example.shape[-1] // LEVELS,
        }
        return {name: max(1, step) for name, step in sizes.items()}

    @property
    def least(self) -> dict[str, int]:
        """Of how many channels no less is tried: smaller images than half the side say
        too little.
        """
        return {RESOLUTION: half(self.example.shape[-1])}

    @property
    def whole(self) -> tuple[int, int]:
        """Depth and image size of the network as it is."""
        return len(self.order) + 1, self.example.shape[-1]

    def of(self, kept: Mapping[str, int]) -> tuple[int, int]:
        """Depth and image size of an allocation; what it doesn't name is whole."""
        return kept.get(DEPTH, self.whole[0]), kept.get(RESOLUTION, self.whole[1])

    def removed(self, kept: Mapping[str, int]) -> list[str]:
        """The blocks that are gone under an allocation."""
        return self.order[: self.whole[0] - self.of(kept)[0]]

    def there(self, kept: Mapping[str, int]) -> dict[str, int]:
        """The counts of an allocation without those of groups in removed blocks."""
        return {
            name: kept[name] for name in (DEPTH, RESOLUTION) if name in kept
        } | self.widths(kept)

    def widths(self, kept: Mapping[str, int]) -> dict[str, int]:
        """The counts of the groups that there are at the depth of an allocation."""
        return {
            name: kept[name]
            for name in self.costs(*self.of(kept)).names
            if name in kept
        }

    def network(self, kept: Mapping[str, int]) -> nn.Module:
        """A copy of the network with the depth and image size of an allocation, all
        widths whole.
        """
        return scaled(self.model, self.removed(kept), self.of(kept)[1])

    def trace(self, kept: Mapping[str, int], verify: bool = False) -> Groups:
        """The trace of that network; what is pinned in the whole one is pinned in it
        too.

        Without a proof it is made once.

        Raises:
            UserError: If it has groups that the whole one lacks.
        """
        if not verify and self.of(kept) in self._traces:
            return self._traces[self.of(kept)]
        found, known = (
            trace(self.network(kept), self.example, verify),
            {g.name: g.pinned for g in self.groups.all},
        )
        strangers = [group.name for group in found if group.name not in known]
        if strangers:
            gone = ", ".join(self.removed(kept))
            raise UserError(
                "granularity",
                f"without {gone} the network has other groups "
                f"({strangers[0]}); exclude depth",
            )
        found = found.with_pins(
            {name: reason for name, reason in known.items() if reason}
        )
        return self._traces.setdefault(self.of(kept), found) if not verify else found

    def costs(self, depth: int, size: int) -> CostTable:
        """Costs of the widths at a depth and an image size."""
        if (depth, size) not in self._tables:
            self._tables[depth, size] = CostTable(
                self.trace({DEPTH: depth, RESOLUTION: size})
            )
        return self._tables[depth, size]

    @property
    def _sizes(self) -> list[int]:
        """The smaller image sizes that a search has to choose from if nothing else is
        asked for.
        """
        step, least = self.steps[RESOLUTION], self.least[RESOLUTION]
        return [least, *range(-(-least // step) * step, self.example.shape[-1], step)]

    def _reads(self, size: int) -> bool:
        try:
            with torch.no_grad():
                at_resolution(self.model, size).eval()(self.example[:1])
        except Exception:  # whatever the user's forward raises
            return False
        return True


def scaled(model: nn.Module, removed: Sequence[str], size: int) -> nn.Module:
    """A copy of `model` without some blocks that sees its images at `size` x `size`."""
    return at_resolution(remove_blocks(model, removed), size)


class ScaledCosts(CostTable):
    """Costs of depth, image size and widths together, those of the network that comes
    out.

    At any count `continuous` takes the nearest of the depths and sizes that are usual.

    Args:
        scaling: The network's depths and sizes.
    """

    def __init__(self, scaling: Scaling):
        super().__init__(scaling.groups)
        self.scaling = scaling
        self._whole = dict(zip((DEPTH, RESOLUTION), scaling.whole, strict=True))
        self._columns = {
            name: self.names.index(name) for name in self._whole if name in self.names
        }

    def memory_bytes(self, kept: KeptCounts) -> int:
        """As in `CostTable`."""
        counts = dict(zip(self.names, self._array(kept).tolist(), strict=True))
        return self.scaling.costs(*self.scaling.of(counts)).memory_bytes(
            self.scaling.widths(counts)
        )

    def continuous(self, metric: str, kept: np.ndarray) -> np.ndarray:
        """As in `CostTable`, smooth in the widths."""
        snapped = np.array(kept, float)
        for name, column in self._columns.items():
            step, whole = self.scaling.steps[name], self._whole[name]
            snapped[..., column] = np.minimum(
                np.maximum(1, np.rint(snapped[..., column] / step)) * step, whole
            )
        return self._values(metric, snapped)

    def _exact(self, metric: str, kept: KeptCounts) -> int | np.ndarray:
        value = np.rint(self._values(metric, self._array(kept))).astype(np.int64)
        return value if value.ndim else int(value)

    def _values(self, metric: str, kept: np.ndarray) -> np.ndarray:
        """Costs `(...)` of counts `(..., n_groups)`, those of each depth and size from
        its own table.
        """
        rows = kept.reshape(-1, len(self.names))
        scales = np.empty((len(rows), 2), np.int64)
        for place, (name, whole) in enumerate(self._whole.items()):
            scales[:, place] = (
                rows[:, self._columns[name]] if name in self._columns else whole
            )
        values = np.empty(len(rows))
        for scale in np.unique(scales, axis=0):
            table, alike = self.scaling.costs(*scale.tolist()), (scales == scale).all(1)
            widths = rows[alike][:, [self.names.index(name) for name in table.names]]
            values[alike] = CostTable.continuous(table, metric, widths)
        return values.reshape(kept.shape[:-1])
