"""Blocks of images that take turns in judging the batches of a search, so that it can't
adapt to the images of one.
"""

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from autoprune.config import ProxyConfig
from autoprune.data.datasets import Images, Splits
from autoprune.evaluation.evaluate import EvalBatches

MOVES_ON = 40
"""Batches after which other images have their turn."""


class ImageBlocks:
    """Disjoint blocks of proxy images, and for long searches of calibration images.

    After 400 evaluations a search has adapted to all 1,000 proxy images: Dyna's 800 on
    ResNet-20 at half of the MACs ended where its 300 did, with a loss of 1.173 +- 0.017
    on the selection split. With calibration images in every other forty batches they
    end at 1.133 +- 0.016 (five seeds each).

    Args:
        splits: The images.
        config: How many make a block, and of how many blocks they may be.
        is_free: Whether calibration images judge too; not where candidates are measured
            or solved on those.
        prepare: From images to what candidates are asked.
        difficulty: From images to how hard each is, `(n_images,)`.
    """

    def __init__(
        self,
        splits: Splits,
        config: ProxyConfig,
        is_free: bool,
        prepare: Callable[[Images], EvalBatches],
        difficulty: Callable[[Images], Tensor],
    ):
        self._splits, self._size, self._prepare, self._difficulty = (
            splits,
            config.images,
            prepare,
            difficulty,
        )
        self.n_blocks = max(1, min(config.blocks, len(splits.proxy) // self._size))
        """Blocks of proxy images: as many as asked for, fewer where the split is too
        small.
        """
        self.n_further = (
            min(config.blocks, len(splits.calibration) // self._size) if is_free else 0
        )
        """Blocks of calibration images, whose numbers follow."""

    def __getitem__(self, block: int) -> EvalBatches:
        return (
            self._first[block]
            if block < self.n_blocks
            else self._further[block - self.n_blocks]
        )

    def judging(self, batch: int) -> int:
        """Which block judges a batch: those of proxy images in turns, after forty
        batches those of the others.
        """
        if self.n_further and batch // MOVES_ON % 2:
            return self.n_blocks + batch % self.n_further
        return batch % self.n_blocks

    def all(self, batches: int) -> EvalBatches:
        """The images that judge a search of so many batches: the whole proxy split, and
        maybe the calibration split.
        """
        return self._both if self.n_further and batches > MOVES_ON else self._whole

    @cached_property
    def _first(self) -> list[EvalBatches]:
        return self._divided(self._splits.proxy, self.n_blocks)

    @cached_property
    def _further(self) -> list[EvalBatches]:
        return self._divided(self._splits.calibration, self.n_further)

    @cached_property
    def _whole(self) -> EvalBatches:
        return self._prepare(self._splits.proxy)

    @cached_property
    def _both(self) -> EvalBatches:
        parts = self._splits.proxy, self._splits.calibration
        pixels, labels = (
            torch.cat([getattr(part, name) for part in parts])
            for name in ("pixels", "labels")
        )
        return self._prepare(Images(pixels, labels))

    def _divided(self, images: Images, n_blocks: int) -> list[EvalBatches]:
        """Blocks in which one network scores about the same: sorted by difficulty,
        images are dealt out in turns.
        """
        images = images[: self._size * n_blocks]
        if n_blocks == 1:
            return [self._prepare(images)]
        order = self._difficulty(images).argsort()
        return [
            self._prepare(images[order[block::n_blocks]]) for block in range(n_blocks)
        ]
