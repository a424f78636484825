"""Proxy accuracy: how good a sub-model is before fine-tuning. The hot path.

A sub-model is drawn, physically sliced into a reused copy of the network and scored on
held-out training images, with the batch-norm statistics of the very images that it is
scored on, in one pass; or, if asked, with statistics measured before on other images.
Several candidates are scored at once, each on a core of its own. An allocation that was
scored before is looked up.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from queue import SimpleQueue
from typing import TypeVar, overload

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune.config import ProxyConfig
from autoprune.data.datasets import Images, Splits
from autoprune.evaluation.evaluate import (
    EvalBatches,
    Evaluation,
    evaluate,
    in_eval_mode,
    on_batch_statistics,
    recalibrate,
)
from autoprune.evaluation.image_blocks import ImageBlocks
from autoprune.evaluation.importance import Importance
from autoprune.evaluation.reconstruction import Reconstruction
from autoprune.evaluation.workers import available_cores, one_thread_each
from autoprune.structure.groups import Groups
from autoprune.structure.slicing import KeptIndices, Slicer, own_copy, top_channels
from autoprune.structure.wrappers import unwrap

SENSITIVITY_IMAGES = 64
"""Images on which the damage of half a group is measured."""
Candidate = TypeVar("Candidate")


@overload
def half(channels: int) -> int: ...
@overload
def half(channels: np.ndarray) -> np.ndarray: ...
def half(channels: int | np.ndarray) -> int | np.ndarray:
    """What is left of a group that loses half of its channels, rounded up.

    Args:
        channels: How many it has; or several groups' counts.
    """
    return -(-channels // 2)


class ProxyAccuracy:
    """Scores allocations of one network on the proxy split; equal ones are scored once.

    Args:
        model: The dense network; never changed.
        groups: Its trace.
        importance: Scores per group that decide which channels survive.
        splits: Proxy images for the score, calibration images for batch norm.
        config: Numbers of images and of sub-models, and the kind of loss.
        reconstruction: Gives that of the network, where the config wants candidates
            reconstructed; None to measure one on the calibration images.
        reference: The network whose outputs are the soft targets of the loss "kl", in
            eval mode; None for `model`.
        blocks: Which images score; None to divide them by this network's difficulties.

    Attributes:
        evaluations: Sub-models scored so far; what came from the cache isn't counted.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Groups,
        importance: Importance,
        splits: Splits,
        config: ProxyConfig = ProxyConfig(),  # noqa: B008, frozen
        reconstruction: Callable[[], Reconstruction] | None = None,
        reference: nn.Module | None = None,
        blocks: ImageBlocks | None = None,
    ):
        self.groups = groups
        self.importance = importance
        self.config = config
        self.evaluations = 0
        self._splits = splits
        dense = own_copy(unwrap(model)).eval()
        self._dense = dense.to(memory_format=torch.channels_last)
        self._reference = self._dense if reference is None else reference
        # One reused copy for each worker; unpruned tensors are shared by all.
        n_workers = config.workers or available_cores()
        self._slicers = [
            Slicer(self._dense, groups, borrow=True) for _ in range(n_workers)
        ]
        if reconstruction is None:
            inputs = splits.calibration.inputs
            reconstruction = partial(Reconstruction, self._dense, groups, inputs)
        self._make_reconstruction = reconstruction
        self._reconstruction = reconstruction() if config.reconstruct == "on" else None
        self._cache: dict[tuple[int, ...], Evaluation] = {}
        # Calibration images may score too, unless something is measured on them.
        is_free = config.statistics == "batch" and not self.reconstructs
        self.blocks = blocks or ImageBlocks(
            splits, config, is_free, self._eval_batches, self._difficulty
        )

    def __call__(self, kept: Mapping[str, int]) -> Evaluation:
        """The proxy score of an allocation: the mean over its drawn sub-models."""
        return self.score_all([kept])[0]

    def suited_to(self, kept: Mapping[str, int]) -> "ProxyAccuracy":
        """This proxy, or one that reconstructs where sliced candidates tell nothing.

        Under `proxy.reconstruct` "auto" candidates are reconstructed where uniform
        pruning to the budget leaves a loss above that of a guess, ln(classes): how
        confident a lost network is tells nothing of what can be made of it.

        Args:
            kept: What uniform pruning to the budget leaves. Scoring it isn't counted.

        Returns:
            A proxy of the same network and images.
        """
        if self.config.reconstruct != "auto" or self.reconstructs:
            return self
        images = EvalBatches(self._splits.proxy[: self.config.images])
        score = partial(self._proxy_score, images)
        (evaluation,) = self._on_all_cores(score, [self.draw(kept)])
        if evaluation.loss <= math.log(len(self._splits.classes)):
            return self
        return ProxyAccuracy(
            self._dense,
            self.groups,
            self.importance,
            self._splits,
            replace(self.config, reconstruct="on"),
            self._make_reconstruction,
            self._reference,
        )

    def score_all(
        self, allocations: Sequence[Mapping[str, int]], block: int = 0
    ) -> list[Evaluation]:
        """The proxy scores of several allocations, which share the cores.

        They equal those of one after the other.

        Args:
            allocations: Group to kept channels.
            block: Which block of images scores them, see `block_of`. An allocation that
                was scored before keeps its score.
        """
        keys = [self.key(kept) for kept in allocations]
        fresh = {}
        for key, kept in zip(keys, allocations, strict=True):
            if key not in self._cache:
                fresh[key] = kept
        if fresh:
            # Only now, since the first use of a block may have to divide the images.
            score = partial(self._proxy_score, self.blocks[block])
            scores = self._mean_scores(score, list(fresh.values()))
            self._cache.update(zip(fresh, scores, strict=True))
            self.evaluations += len(fresh)
        return [self._cache[key] for key in keys]

    def survey_all(
        self, allocations: Sequence[Mapping[str, int]], batches: int = 0
    ) -> list[Evaluation]:
        """Scores on all images that score a search, in one pass.

        For those that may be finalists.

        Args:
            allocations: Group to kept channels.
            batches: How many batches the search had.
        """
        score = partial(self._proxy_score, self.blocks.all_images(batches))
        return self._mean_scores(score, allocations)

    def select_all(self, allocations: Sequence[Mapping[str, int]]) -> list[Evaluation]:
        """Scores on the larger selection split, for the finalists.

        Batch norm is calibrated on the whole calibration split.
        """
        return self._mean_scores(self._selection_score, allocations)

    @property
    def reconstructs(self) -> bool:
        """Whether candidates get weights solved anew."""
        return self._reconstruction is not None

    def block_of(self, batch: int) -> int:
        """Which block of images scores a batch of a search."""
        return self.blocks.block_of(batch)

    @property
    def n_workers(self) -> int:
        """Candidates that are scored at once."""
        return len(self._slicers)

    @property
    def example(self) -> Tensor:
        """One normalised input of the network."""
        return self._splits.example

    def draw(self, kept: Mapping[str, int], draw: int = 0) -> KeptIndices:
        """The channels of one sub-model.

        The most important ones; or, with a temperature, a sample without replacement
        with probabilities in proportion to importance^(1 / temperature) (Gumbel top-k).
        The same allocation and draw give the same channels.

        Args:
            kept: Group to kept channels.
            draw: Number of the sub-model.

        Returns:
            Group to the indices of its kept channels.
        """
        if self.config.temperature == 0:
            return top_channels(self.importance, kept)
        entropy = [self.config.seed, draw, *self.key(kept)]
        sequence = np.random.SeedSequence(entropy)
        # torch takes seeds of 63 bits.
        seed = int(sequence.generate_state(1, np.uint64)[0] >> 1)
        generator = torch.Generator().manual_seed(seed)
        scores = {}
        for name in kept:
            importance = self.importance[name].clamp_min(1e-12)
            logits = importance.log() / self.config.temperature
            uniform = torch.rand(len(logits), generator=generator).clamp_min(1e-12)
            scores[name] = logits - uniform.log().neg().log()
        return top_channels(scores, kept)

    def restore(self, kept: Mapping[str, int], evaluation: Evaluation) -> None:
        """Takes over an evaluation of an earlier, interrupted search.

        Args:
            kept: Group to kept channels.
            evaluation: What it scored.
        """
        self._cache[self.key(kept)] = evaluation

    def key(self, kept: Mapping[str, int]) -> tuple[int, ...]:
        """What tells networks apart: allocations of one key are one network."""
        return tuple(kept[name] for name in self.groups.channels)

    @property
    def sensitivity(self) -> np.ndarray:
        """Damage when each prunable group alone loses half of its channels.

        `(n_groups,)`, 0 or more: the divergence from the dense network's outputs on
        `SENSITIVITY_IMAGES` proxy images, in nats. Measured once, in about a quarter of
        a usual evaluation for each group.
        """
        return self._sensitivity

    @cached_property
    def _sensitivity(self) -> np.ndarray:
        eval_batches = EvalBatches(self._splits.proxy[:SENSITIVITY_IMAGES])
        eval_batches.set_soft_targets(self._dense, self.config.bf16)
        halves = []
        for group in self.groups:
            counts = {group.name: half(group.channels)}
            halves.append(top_channels(self.importance, counts))
        score = partial(self._score, eval_batches, None)
        damaged = self._on_all_cores(score, halves)
        return np.array([evaluation.loss for evaluation in damaged])

    def _mean_scores(
        self,
        score: Callable[[Slicer, KeptIndices], Evaluation],
        allocations: Sequence[Mapping[str, int]],
    ) -> list[Evaluation]:
        """The mean score over each allocation's drawn sub-models."""
        n_draws = self.config.sub_models if self.config.temperature > 0 else 1
        drawn = [(kept, draw) for kept in allocations for draw in range(n_draws)]

        def draw_and_score(
            slicer: Slicer, candidate: tuple[Mapping[str, int], int]
        ) -> Evaluation:
            kept, draw = candidate
            return score(slicer, self.draw(kept, draw))

        scores = self._on_all_cores(draw_and_score, drawn)
        means = []
        for first in range(0, len(scores), n_draws):
            means.append(_mean(scores[first : first + n_draws]))
        return means

    def _on_all_cores(
        self,
        score: Callable[[Slicer, Candidate], Evaluation],
        candidates: Sequence[Candidate],
    ) -> list[Evaluation]:
        """The score of each candidate, each on a core and in a slicer of its own."""
        if len(self._slicers) == 1:
            return [score(self._slicers[0], candidate) for candidate in candidates]
        idle: SimpleQueue[Slicer] = SimpleQueue()
        for slicer in self._slicers:
            idle.put(slicer)

        def work(candidate: Candidate) -> Evaluation:
            slicer = idle.get()
            try:
                return score(slicer, candidate)
            finally:
                idle.put(slicer)

        # One thread a candidate, also for a single one: the order of sums, and so the
        # score, depends on the number of threads.
        with one_thread_each(len(self._slicers)) as pool:
            return list(pool.map(work, candidates))

    def _proxy_score(
        self, images: EvalBatches, slicer: Slicer, kept: KeptIndices
    ) -> Evaluation:
        calibration = None
        if self.config.statistics != "batch":
            calibration = self._calibration
        return self._score(images, calibration, slicer, kept)

    def _selection_score(self, slicer: Slicer, kept: KeptIndices) -> Evaluation:
        inputs = self._splits.calibration.inputs
        return self._score(self._selection, inputs, slicer, kept)

    def _score(
        self,
        images: EvalBatches,
        calibration: Tensor | None,
        slicer: Slicer,
        kept: KeptIndices,
    ) -> Evaluation:
        """The score of a sub-model.

        Batch norm takes its statistics from `calibration`, or from the images that are
        scored.
        """
        model = slicer.apply(kept)
        bf16 = self.config.bf16
        if self._reconstruction is not None:
            self._reconstruction.apply(model, kept)
        if calibration is None:
            with on_batch_statistics(model):
                return evaluate(model, images, bf16)
        recalibrate(model, calibration, bf16=bf16)
        with in_eval_mode(model):
            return evaluate(model, images, bf16)

    @cached_property
    def _calibration(self) -> Tensor:
        return self._splits.calibration.inputs[: self.config.recalibration_images]

    def _difficulty(self, images: Images) -> Tensor:
        """The cross-entropy of each image, `(n_images,)`, with half of every group."""
        halves = {group.name: half(group.channels) for group in self.groups}
        model = self._slicers[0].apply(self.draw(halves))
        with torch.no_grad(), on_batch_statistics(model):
            logits = [model(part.inputs) for part, _ in EvalBatches(images)]
        return F.cross_entropy(torch.cat(logits), images.labels, reduction="none")

    @cached_property
    def _selection(self) -> EvalBatches:
        return self._eval_batches(self._splits.selection)

    def _eval_batches(self, images: Images) -> EvalBatches:
        """Batches of images, with soft targets where the loss wants them."""
        eval_batches = EvalBatches(images)
        if self.config.loss == "kl":
            eval_batches.set_soft_targets(self._reference, self.config.bf16)
        return eval_batches


def _mean(evaluations: list[Evaluation]) -> Evaluation:
    """Of the drawn sub-models of one allocation."""
    accuracies = [evaluation.accuracy for evaluation in evaluations]
    losses = [evaluation.loss for evaluation in evaluations]
    return Evaluation(float(np.mean(accuracies)), float(np.mean(losses)))
