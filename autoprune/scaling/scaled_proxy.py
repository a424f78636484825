"""The proxy accuracy of networks of every depth, image size and width.

Each depth and size has a proxy of its own.
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
from autoprune.evaluation.importance import Importance
from autoprune.evaluation.proxy import SENSITIVITY_IMAGES, ProxyAccuracy, half
from autoprune.scaling.scaling import DEPTH, RESOLUTION, Scaling

PROXIES = 64
"""Depths and sizes whose networks are kept ready to be scored.

That is all that a search on small images can choose.
"""


class ScaledProxy:
    """Scores allocations in which depth and image size take part.

    Args:
        scaling: The network's depths and sizes.
        proxy_of: From an allocation, of which only depth and size count, and blocks of
            images to the proxy of the network that has them. The blocks are None for
            the whole network, whose blocks all others share.
        images: What the damage of half the depth, and of half the size, is measured on.
    """

    def __init__(
        self,
        scaling: Scaling,
        proxy_of: Callable[[Mapping[str, int], ImageBlocks | None], ProxyAccuracy],
        images: Images,
    ):
        whole = proxy_of({}, None)
        self.scaling = scaling
        self.groups = scaling.groups
        self.config = whole.config
        self.evaluations = 0
        self._images = images[:SENSITIVITY_IMAGES]
        self._whole = whole
        self._cache: dict[tuple, Evaluation] = {}

        @lru_cache(PROXIES)
        def proxy_at(depth: int, size: int) -> ProxyAccuracy:
            if (depth, size) == scaling.whole:
                return whole
            return proxy_of({DEPTH: depth, RESOLUTION: size}, whole.blocks)

        self._proxy_at = proxy_at
        # The steps of depth and image size have no rank.
        scores = {}
        for name in (DEPTH, RESOLUTION):
            if name in self.groups.channels:
                scores[name] = torch.ones(self.groups.channels[name])
        self.importance: Importance = scores | dict(whole.importance)

    def __call__(self, kept: Mapping[str, int]) -> Evaluation:
        """The proxy score of an allocation."""
        return self.score_all([kept])[0]

    @property
    def example(self) -> torch.Tensor:
        """One normalised input of the network."""
        return self.scaling.example

    @property
    def n_workers(self) -> int:
        """Candidates that are scored at once."""
        return self._whole.n_workers

    @property
    def reconstructs(self) -> bool:
        """Whether candidates get weights solved anew."""
        return self._whole.reconstructs

    def block_of(self, batch: int) -> int:
        """As in `Proxy`."""
        return self._whole.block_of(batch)

    def suited_to(self, kept: Mapping[str, int]) -> "ScaledProxy":
        """This proxy, whatever uniform pruning leaves.

        Under `proxy.reconstruct` "auto" candidates aren't reconstructed here: each
        depth and size would need moments of its own, which costs more than scoring the
        few candidates that have it.
        """
        return self

    def score_all(
        self, allocations: Sequence[Mapping[str, int]], block: int = 0
    ) -> list[Evaluation]:
        """As in `Proxy`.

        Args:
            allocations: Group to kept channels, depth and image size among them.
            block: Number of the block of images, which all depths and sizes share.
        """
        fresh = {}
        for kept in allocations:
            if self.key(kept) not in self._cache:
                fresh[self.key(kept)] = kept
        scores = self._score_by_scale(
            list(fresh.values()), lambda proxy, group: proxy.score_all(group, block)
        )
        self._cache.update(zip(fresh, scores, strict=True))
        self.evaluations += len(fresh)
        return [self._cache[self.key(kept)] for kept in allocations]

    def survey_all(
        self, allocations: Sequence[Mapping[str, int]], batches: int = 0
    ) -> list[Evaluation]:
        """As in `Proxy`.

        Args:
            allocations: Group to kept channels.
            batches: How many batches the search had.
        """
        return self._score_by_scale(
            allocations, lambda proxy, group: proxy.survey_all(group, batches)
        )

    def select_all(self, allocations: Sequence[Mapping[str, int]]) -> list[Evaluation]:
        """As in `Proxy`."""
        return self._score_by_scale(
            allocations, lambda proxy, group: proxy.select_all(group)
        )

    def restore(self, kept: Mapping[str, int], evaluation: Evaluation) -> None:
        """As in `Proxy`.

        Args:
            kept: Group to kept channels.
            evaluation: What it scored then.
        """
        self._cache[self.key(kept)] = evaluation

    @property
    def sensitivity(self) -> np.ndarray:
        """As in `Proxy`; of depth and size what a network with half of them loses."""
        return self._sensitivity

    @cached_property
    def _sensitivity(self) -> np.ndarray:
        damages = self._whole.sensitivity.tolist()
        known = dict(zip(self._whole.groups.channels, damages, strict=True))
        eval_batches = EvalBatches(self._images)
        eval_batches.set_soft_targets(self.scaling.model, self.config.bf16)
        for name, count in self.groups.channels.items():
            if name in known:
                continue
            network = self.scaling.network({name: half(count)})
            with on_batch_statistics(network):
                known[name] = evaluate(network, eval_batches, self.config.bf16).loss
        return np.array([known[name] for name in self.groups.channels])

    def key(self, kept: Mapping[str, int]) -> tuple:
        """What tells networks apart: widths in blocks that are gone don't."""
        widths = sorted(self.scaling.widths(kept).items())
        return self.scaling.depth_and_size(kept), tuple(widths)

    def _score_by_scale(
        self,
        allocations: Sequence[Mapping[str, int]],
        score: Callable[[ProxyAccuracy, list[dict[str, int]]], list[Evaluation]],
    ) -> list[Evaluation]:
        """Scores the allocations of each depth and size together, side by side."""
        places_of: dict[tuple[int, int], list[int]] = {}
        for place, kept in enumerate(allocations):
            places_of.setdefault(self.scaling.depth_and_size(kept), []).append(place)
        scores: dict[int, Evaluation] = {}
        for (depth, size), places in places_of.items():
            widths = []
            for place in places:
                widths.append(self.scaling.widths(allocations[place]))
            evaluations = score(self._proxy_at(depth, size), widths)
            scores.update(zip(places, evaluations, strict=True))
        return [scores[place] for place in range(len(allocations))]
