"""Blocks of images that take turns in scoring the batches of a search.

A search that is scored by the same images all the time adapts to them; taking turns, it
can't adapt to the images of one block.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from autoprune.config import ProxyConfig
from autoprune.data.datasets import Images, Splits
from autoprune.evaluation.evaluate import EvalBatches

BATCHES_PER_TURN = 40
"""Batches of a search after which the other split's images have their turn."""


class ImageBlocks:
    """Disjoint blocks of proxy images, and for long searches of calibration images.

    Blocks are numbered: first those of proxy images, then those of calibration images.
    Indexing with a block's number gives its images. With two blocks of each, the first
    forty batches of a search are scored by the blocks 0, 1, 0, 1, ..., the next forty
    by 2, 3, 2, 3, ..., the next by 0, 1, ... again.

    Args:
        splits: The images.
        config: How many make a block, and of how many blocks they may be.
        is_calibration_free: Whether calibration images may score too. They may not
            where candidates are measured or solved on them: such a candidate would look
            better than it is.
        prepare: From images to what candidates are evaluated on.
        difficulty: From images to how hard each is, `(n_images,)`, higher is harder.

    Attributes:
        n_blocks: Blocks of proxy images: as many as asked for, fewer where the split is
            too small.
        n_calibration_blocks: Blocks of calibration images.
    """

    def __init__(
        self,
        splits: Splits,
        config: ProxyConfig,
        is_calibration_free: bool,
        prepare: Callable[[Images], EvalBatches],
        difficulty: Callable[[Images], Tensor],
    ):
        self._splits = splits
        self._size = config.images
        self._prepare = prepare
        self._difficulty = difficulty
        n_fitting = len(splits.proxy) // self._size
        # A split smaller than a block still makes one: something has to score.
        self.n_blocks = max(1, min(config.blocks, n_fitting))
        self.n_calibration_blocks = 0
        if is_calibration_free:
            n_fitting = len(splits.calibration) // self._size
            self.n_calibration_blocks = min(config.blocks, n_fitting)

    def __getitem__(self, block: int) -> EvalBatches:
        if block < self.n_blocks:
            return self._proxy_blocks[block]
        return self._calibration_blocks[block - self.n_blocks]

    def block_of(self, batch: int) -> int:
        """The number of the block that scores a batch of a search, counted from 0."""
        is_second_turn = batch // BATCHES_PER_TURN % 2 == 1
        if self.n_calibration_blocks and is_second_turn:
            return self.n_blocks + batch % self.n_calibration_blocks
        return batch % self.n_blocks

    def all_images(self, n_batches: int) -> EvalBatches:
        """All images of the splits whose blocks score a search of so many batches.

        The whole proxy split, and the whole calibration split where it had a turn.
        """
        if self.n_calibration_blocks and n_batches > BATCHES_PER_TURN:
            return self._both_splits
        return self._proxy_split

    # Prepared when first used, since that may cost a pass of the dense network; and
    # kept, since the normalised images are kept with them.
    @cached_property
    def _proxy_blocks(self) -> list[EvalBatches]:
        return self._divided(self._splits.proxy, self.n_blocks)

    @cached_property
    def _calibration_blocks(self) -> list[EvalBatches]:
        return self._divided(self._splits.calibration, self.n_calibration_blocks)

    @cached_property
    def _proxy_split(self) -> EvalBatches:
        return self._prepare(self._splits.proxy)

    @cached_property
    def _both_splits(self) -> EvalBatches:
        proxy = self._splits.proxy
        calibration = self._splits.calibration
        pixels = torch.cat([proxy.pixels, calibration.pixels])
        labels = torch.cat([proxy.labels, calibration.labels])
        # Of the same preprocessing, which both have.
        return self._prepare(replace(proxy, pixels=pixels, labels=labels))

    def _divided(self, images: Images, n_blocks: int) -> list[EvalBatches]:
        """Blocks in which one network scores about the same.

        Sorted by difficulty, images are dealt out in turns. Six of them, from the
        easiest to the hardest a b c d e f, make the two blocks a c e and b d f.
        """
        images = images[: self._size * n_blocks]
        # Nothing to be dealt out; the order of the images stays.
        if n_blocks == 1:
            return [self._prepare(images)]
        order = self._difficulty(images).argsort()
        blocks = []
        for block in range(n_blocks):
            blocks.append(self._prepare(images[order[block::n_blocks]]))
        return blocks
