"""How good networks of every depth, image size and width are before fine-tuning: a
proxy for each depth and size.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache

import numpy as np
import torch

from autoprune.data.datasets import Images
from autoprune.evaluation.evaluate import (
    EvalBatches,
    Evaluation,
    evaluate,
    on_batch_statistics,
)
from autoprune.evaluation.image_blocks import ImageBlocks
from autoprune.evaluation.proxy import SENSITIVITY_IMAGES, ProxyAccuracy, half
from autoprune.scaling.scaling import DEPTH, RESOLUTION, Scaling

PROXIES = 64
"""Depths and sizes whose networks are kept ready to be scored: all that a search on
small images can choose.
"""


class ScaledProxy:
    """The proxy accuracy of networks of every depth, image size and width, with the
    face of `ProxyAccuracy`.

    Args:
        scaling: The network's depths and sizes.
        proxy_of: From an allocation, of which depth and size count, and blocks of
            images to the proxy of the network that has them; blocks are None for the
            whole network, whose blocks all others share.
        images: What the damage of half the depth, and of half the size, is measured on.
    """

    def __init__(
        self,
        scaling: Scaling,
        proxy_of: Callable[[Mapping[str, int], ImageBlocks | None], ProxyAccuracy],
        images: Images,
    ):
        self.scaling, self.groups, self.example = (
            scaling,
            scaling.groups,
            scaling.example,
        )
        self._images, self._cache, self._whole = (
            images[:SENSITIVITY_IMAGES],
            {},
            proxy_of({}, None),
        )
        whole = self._whole
        self.block_of, self.n_workers, self.config = (
            whole.block_of,
            whole.n_workers,
            whole.config,
        )
        self.reconstructs = whole.reconstructs
        added = {
            name: torch.ones(count)
            for name, count in self.groups.channels.items()
            if name in (DEPTH, RESOLUTION)
        }
        self.importance = added | dict(whole.importance)
        self.evaluations = 0
        """Networks scored so far; what came from the cache isn't counted."""

        @lru_cache(PROXIES)
        def proxy_at(depth: int, size: int) -> ProxyAccuracy:
            is_whole = (depth, size) == scaling.whole
            return (
                whole
                if is_whole
                else proxy_of({DEPTH: depth, RESOLUTION: size}, whole.blocks)
            )

        self._proxy_at = proxy_at

    def __call__(self, kept: Mapping[str, int]) -> Evaluation:
        """The proxy score of an allocation."""
        return self.score_all([kept])[0]

    def suited_to(self, kept: Mapping[str, int]) -> "ScaledProxy":
        """This proxy. Under `--proxy.reconstruct auto` candidates aren't reconstructed
        here: each depth and size would need moments of its own, which costs more than
        scoring the few candidates that have it.
        """
        return self

    def score_all(
        self, allocations: Sequence[Mapping[str, int]], block: int = 0
    ) -> list[Evaluation]:
        """As in `ProxyAccuracy`."""
        fresh = {
            self.key(kept): kept
            for kept in allocations
            if self.key(kept) not in self._cache
        }
        scores = self._each(
            list(fresh.values()), lambda proxy, group: proxy.score_all(group, block)
        )
        self._cache |= zip(fresh, scores, strict=True)
        self.evaluations += len(fresh)
        return [self._cache[self.key(kept)] for kept in allocations]

    def survey_all(
        self, allocations: Sequence[Mapping[str, int]], batches: int = 0
    ) -> list[Evaluation]:
        """As in `ProxyAccuracy`."""
        return self._each(
            allocations, lambda proxy, group: proxy.survey_all(group, batches)
        )

    def select_all(self, allocations: Sequence[Mapping[str, int]]) -> list[Evaluation]:
        """As in `ProxyAccuracy`."""
        return self._each(allocations, lambda proxy, group: proxy.select_all(group))

    def restore(self, kept: Mapping[str, int], evaluation: Evaluation) -> None:
        """As in `ProxyAccuracy`."""
        self._cache[self.key(kept)] = evaluation

    @cached_property
    def sensitivity(self) -> np.ndarray:
        """As in `ProxyAccuracy`; of depth and size what the network loses that has half
        of them.
        """
        names, damages = list(self._whole.groups.channels), self._whole.sensitivity
        known = dict(zip(names, damages.tolist(), strict=True))
        halves = {
            name: {name: half(count)}
            for name, count in self.groups.channels.items()
            if name not in known
        }
        eval_batches = EvalBatches(self._images)
        eval_batches.set_soft_targets(self.scaling.model, self.config.bf16)
        for name, kept in halves.items():
            network = self.scaling.network(kept)
            with on_batch_statistics(network):
                known[name] = evaluate(network, eval_batches, self.config.bf16).loss
        return np.array([known[name] for name in self.groups.channels])

    def _each(
        self, allocations: Sequence[Mapping[str, int]], score: Callable
    ) -> list[Evaluation]:
        """Scores the allocations of one depth and size together."""
        by_scale: dict[tuple[int, int], list[int]] = {}
        for place, kept in enumerate(allocations):
            by_scale.setdefault(self.scaling.of(kept), []).append(place)
        scores: dict[int, Evaluation] = {}
        for scale, places in by_scale.items():
            widths = [self.scaling.widths(allocations[place]) for place in places]
            scores |= zip(places, score(self._proxy_at(*scale), widths), strict=True)
        return [scores[place] for place in range(len(allocations))]

    def key(self, kept: Mapping[str, int]) -> tuple:
        """What tells networks apart: widths in blocks that are gone don't."""
        return self.scaling.of(kept), tuple(sorted(self.scaling.widths(kept).items()))
