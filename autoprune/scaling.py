"""Depth and image size as two more things to decide, beside the widths of the channel groups.

They enter a search as groups that no tensor holds: `depth`, whose channels are the blocks that can be removed, and one
for the rest of the network; and `resolution`, whose channels are the pixels of the image's side. So an agent, a budget
and an allocation treat them as they treat widths, and costs stay those of the network that really comes out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.constraints import pinned_by_user
from autoprune.cost import CostTable, Kept
from autoprune.data import Images
from autoprune.depth import removable_blocks, remove_blocks, shallower
from autoprune.errors import UserError
from autoprune.groups import Group, Groups
from autoprune.proxy import SENSITIVITY_IMAGES, ProxyAccuracy, half
from autoprune.resolution import at_resolution
from autoprune.scoring import Evaluation, Questions, answer, on_batch_statistics
from autoprune.tracing import trace

DEPTH, RESOLUTION = "depth", "resolution"
NOTHING: Mapping[str, str] = MappingProxyType({})
LEVELS = 8
"""Steps from all blocks to none, at most, and from the image's side to nothing."""
PROXIES = 64
"""Depths and sizes whose networks are kept ready to be scored: all that a search on small images can choose."""
RANKING_IMAGES = 250
"""Images on which the order in which blocks go is measured."""


class Scaling:
    """The depths and image sizes that a network can have.

    Args:
        model: The whole network; left as found.
        traced: Its trace.
        example: One input.
        images: What the damage of a removed block is measured on.
        excluded: Patterns of groups that stay whole, `depth` and `resolution` among them; see `autoprune.constraints`.
        fixed: `depth` or `resolution` to the reason why it must not change.
    """

    def __init__(
        self,
        model: nn.Module,
        traced: Groups,
        example: Tensor,
        images: Images,
        excluded: Sequence[str] = (),
        fixed: Mapping[str, str] = NOTHING,
    ):
        self.model, self.traced, self.example, self.excluded, self.fixed = model, traced, example, excluded, fixed
        self._images = images[:RANKING_IMAGES]
        self._traces: dict[tuple[int, int], Groups] = {}
        self._tables: dict[tuple[int, int], CostTable] = {}

    @cached_property
    def order(self) -> list[str]:
        """The removable blocks in the order in which they go, that of least damage per MAC; see `depth.shallower`."""
        saved = sum(block.macs for block in removable_blocks(self.model, self.example))
        floor = CostTable(self.traced).macs({}) - saved
        return shallower(self.model, self.example, self._images, floor)

    @cached_property
    def groups(self) -> Groups:
        """The trace with `depth` and `resolution` in front, each pinned where the network has no choice."""
        depth, side = self.whole
        reasons = dict(self.fixed)
        if not self.order:
            reasons[DEPTH] = "the network has no block that can be removed"
        unread = next((size for size in self._sizes if not self._reads(size)), None)
        if unread is not None:
            reasons[RESOLUTION] = f"the network doesn't read images of {unread} pixels"
        added = [Group(n, count, (), reasons.get(n), 1.0) for n, count in ((DEPTH, depth), (RESOLUTION, side))]
        taken = {group.name for group in added} & {group.name for group in self.traced.all}
        if taken:
            raise UserError(
                f"--granularity: the network has channels called {min(taken)!r}, as is a dimension; rename them"
            )
        # The labels of a trace count channels through all groups; nobody cuts by these.
        groups = replace(self.traced, all=(*added, *self.traced.all), book=None, units=None)
        return pinned_by_user(groups, self.excluded)

    @property
    def steps(self) -> dict[str, int]:
        """By how many channels `depth` and `resolution` change at a time."""
        sizes = {DEPTH: -(-len(self.order) // LEVELS), RESOLUTION: self.example.shape[-1] // LEVELS}
        return {name: max(1, step) for name, step in sizes.items()}

    @property
    def least(self) -> dict[str, int]:
        """Of how many channels no less is tried: smaller images than half the side say too little."""
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
        return {name: kept[name] for name in (DEPTH, RESOLUTION) if name in kept} | self.widths(kept)

    def widths(self, kept: Mapping[str, int]) -> dict[str, int]:
        """The counts of the groups that there are at the depth of an allocation."""
        return {name: kept[name] for name in self.costs(*self.of(kept)).names if name in kept}

    def network(self, kept: Mapping[str, int]) -> nn.Module:
        """A copy of the network with the depth and image size of an allocation, all widths whole."""
        return scaled(self.model, self.removed(kept), self.of(kept)[1])

    def trace(self, kept: Mapping[str, int], verify: bool = False) -> Groups:
        """The trace of that network; what is pinned in the whole one is pinned in it too.

        Without a proof it is made once.

        Raises:
            UserError: If it has groups that the whole one lacks.
        """
        if not verify and self.of(kept) in self._traces:
            return self._traces[self.of(kept)]
        found, known = trace(self.network(kept), self.example, verify), {g.name: g.pinned for g in self.groups.all}
        strangers = [group.name for group in found if group.name not in known]
        if strangers:
            gone = ", ".join(self.removed(kept))
            raise UserError(
                f"--granularity: without {gone} the network has other groups ({strangers[0]}); exclude depth"
            )
        found = found.with_pins({name: reason for name, reason in known.items() if reason})
        return self._traces.setdefault(self.of(kept), found) if not verify else found

    def costs(self, depth: int, size: int) -> CostTable:
        """Costs of the widths at a depth and an image size."""
        if (depth, size) not in self._tables:
            self._tables[depth, size] = CostTable(self.trace({DEPTH: depth, RESOLUTION: size}))
        return self._tables[depth, size]

    @property
    def _sizes(self) -> list[int]:
        """The smaller image sizes that a search has to choose from if nothing else is asked for."""
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
    """Costs of depth, image size and widths together, those of the network that comes out.

    At any count `continuous` takes the nearest of the depths and sizes that are usual.

    Args:
        scaling: The network's depths and sizes.
    """

    def __init__(self, scaling: Scaling):
        super().__init__(scaling.groups)
        self.scaling = scaling
        self._whole = dict(zip((DEPTH, RESOLUTION), scaling.whole, strict=True))
        self._columns = {name: self.names.index(name) for name in self._whole if name in self.names}

    def memory_bytes(self, kept: Kept) -> int:
        """As in `CostTable`."""
        counts = dict(zip(self.names, self._array(kept).tolist(), strict=True))
        return self.scaling.costs(*self.scaling.of(counts)).memory_bytes(self.scaling.widths(counts))

    def continuous(self, metric: str, kept: np.ndarray) -> np.ndarray:
        """As in `CostTable`, smooth in the widths."""
        snapped = np.array(kept, float)
        for name, column in self._columns.items():
            step, whole = self.scaling.steps[name], self._whole[name]
            snapped[..., column] = np.minimum(np.maximum(1, np.rint(snapped[..., column] / step)) * step, whole)
        return self._values(metric, snapped)

    def _exact(self, metric: str, kept: Kept) -> int | np.ndarray:
        value = np.rint(self._values(metric, self._array(kept))).astype(np.int64)
        return value if value.ndim else int(value)

    def _values(self, metric: str, kept: np.ndarray) -> np.ndarray:
        """Costs `(...)` of counts `(..., n_groups)`, those of each depth and size from its own table."""
        rows = kept.reshape(-1, len(self.names))
        scales = np.empty((len(rows), 2), np.int64)
        for place, (name, whole) in enumerate(self._whole.items()):
            scales[:, place] = rows[:, self._columns[name]] if name in self._columns else whole
        values = np.empty(len(rows))
        for scale in np.unique(scales, axis=0):
            table, alike = self.scaling.costs(*scale.tolist()), (scales == scale).all(1)
            widths = rows[alike][:, [self.names.index(name) for name in table.names]]
            values[alike] = CostTable.continuous(table, metric, widths)
        return values.reshape(kept.shape[:-1])


class ScaledProxy:
    """The proxy accuracy of networks of every depth, image size and width, with the face of `ProxyAccuracy`.

    Args:
        scaling: The network's depths and sizes.
        proxy_of: From an allocation, of which depth and size count, and blocks of proxy images to the proxy of the
            network that has them; blocks are None for the whole network, whose blocks all others share.
        images: What the damage of half the depth, and of half the size, is measured on.
    """

    def __init__(
        self,
        scaling: Scaling,
        proxy_of: Callable[[Mapping[str, int], Sequence[Questions] | None], ProxyAccuracy],
        images: Images,
    ):
        self.scaling, self.groups, self.example = scaling, scaling.groups, scaling.example
        self._images, self._cache, self._whole = images[:SENSITIVITY_IMAGES], {}, proxy_of({}, None)
        whole = self._whole
        self.n_blocks, self.n_workers, self.config = whole.n_blocks, whole.n_workers, whole.config
        added = {name: torch.ones(count) for name, count in self.groups.channels.items() if name in (DEPTH, RESOLUTION)}
        self.importance = added | dict(whole.importance)
        self.evaluations = 0
        """Networks scored so far; what came from the cache isn't counted."""

        @lru_cache(PROXIES)
        def proxy_at(depth: int, size: int) -> ProxyAccuracy:
            is_whole = (depth, size) == scaling.whole
            return whole if is_whole else proxy_of({DEPTH: depth, RESOLUTION: size}, whole.blocks)

        self._proxy_at = proxy_at

    def __call__(self, kept: Mapping[str, int]) -> Evaluation:
        """The proxy score of an allocation."""
        return self.score_all([kept])[0]

    def score_all(self, allocations: Sequence[Mapping[str, int]], block: int = 0) -> list[Evaluation]:
        """As in `ProxyAccuracy`."""
        fresh = {self._key(kept): kept for kept in allocations if self._key(kept) not in self._cache}
        scores = self._each(list(fresh.values()), lambda proxy, group: proxy.score_all(group, block))
        self._cache |= zip(fresh, scores, strict=True)
        self.evaluations += len(fresh)
        return [self._cache[self._key(kept)] for kept in allocations]

    def survey_all(self, allocations: Sequence[Mapping[str, int]]) -> list[Evaluation]:
        """As in `ProxyAccuracy`."""
        return self._each(allocations, lambda proxy, group: proxy.survey_all(group))

    def select_all(self, allocations: Sequence[Mapping[str, int]]) -> list[Evaluation]:
        """As in `ProxyAccuracy`."""
        return self._each(allocations, lambda proxy, group: proxy.select_all(group))

    def restore(self, kept: Mapping[str, int], evaluation: Evaluation) -> None:
        """As in `ProxyAccuracy`."""
        self._cache[self._key(kept)] = evaluation

    @cached_property
    def sensitivity(self) -> np.ndarray:
        """As in `ProxyAccuracy`; of depth and size what the network loses that has half of them."""
        names, damages = list(self._whole.groups.channels), self._whole.sensitivity
        known = dict(zip(names, damages.tolist(), strict=True))
        halves = {name: {name: half(count)} for name, count in self.groups.channels.items() if name not in known}
        questions = Questions(self._images)
        questions.hold_against(self.scaling.model, self.config.bf16)
        for name, kept in halves.items():
            network = self.scaling.network(kept)
            with on_batch_statistics(network):
                known[name] = answer(network, questions, self.config.bf16).loss
        return np.array([known[name] for name in self.groups.channels])

    def _each(self, allocations: Sequence[Mapping[str, int]], score: Callable) -> list[Evaluation]:
        """Scores the allocations of one depth and size together."""
        by_scale: dict[tuple[int, int], list[int]] = {}
        for place, kept in enumerate(allocations):
            by_scale.setdefault(self.scaling.of(kept), []).append(place)
        scores: dict[int, Evaluation] = {}
        for scale, places in by_scale.items():
            proxy = self._proxy_at(*scale)
            scores |= zip(
                places, score(proxy, [self.scaling.widths(allocations[place]) for place in places]), strict=True
            )
        return [scores[place] for place in range(len(allocations))]

    def _key(self, kept: Mapping[str, int]) -> tuple:
        """What tells networks apart: widths in blocks that are gone don't."""
        return self.scaling.of(kept), tuple(sorted(self.scaling.widths(kept).items()))
