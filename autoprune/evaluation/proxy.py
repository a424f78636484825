"""Proxy accuracy: how good a sub-model is before fine-tuning, measured on held-out
training images. The hot path.

A sub-model is drawn, physically sliced into a reused copy of the network and scored
with the batch-norm statistics of the very images that it is scored on, in one pass; or,
if asked, with statistics measured before on other images. Several candidates are scored
at once, each on a core of its own. An allocation that was scored before is looked up.
"""

import copy
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property, partial
from queue import SimpleQueue
from typing import Any

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
from autoprune.structure.groups import Groups
from autoprune.structure.slicing import KeptIndices, Slicer, top_channels

SENSITIVITY_IMAGES = 64


def available_cores() -> int:
    """Cores that this process may use."""
    return (
        len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1
    )


@contextmanager
def one_thread_each(n_workers: int) -> Iterator[ThreadPoolExecutor]:
    """Workers in which PyTorch's operations run on a single thread; outside nothing
    changes.
    """
    n_threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(
            n_workers, initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            yield pool
    finally:
        torch.set_num_threads(
            n_threads
        )  # a thread's own setting is the default of those to come


def half(channels: int | np.ndarray) -> int | np.ndarray:
    """What is left of a group that loses half of its channels, rounded up."""
    return -(-channels // 2)


class ProxyAccuracy:
    """Scores allocations of one network on the proxy split; equal allocations are
    scored once.

    Args:
        model: The dense network; never changed.
        groups: Its trace.
        importance: Scores per group that decide which channels survive.
        splits: Proxy images for the score, calibration images for batch norm.
        config: Numbers of images and of sub-models, what the answers are held against.
        reconstruction: Gives that of the network, where the config wants candidates
            reconstructed; None to measure one on the calibration images.
        reference: The network whose answers the loss "kl" is held against, in eval
            mode; None for `model`.
        blocks: Which images judge; None to divide them by this network's difficulties.
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
        """Sub-models scored so far; what came from the cache isn't counted."""
        self._splits = splits
        self._dense = copy.deepcopy(model).eval().to(memory_format=torch.channels_last)
        self._reference = reference or self._dense
        self._slicers = [
            Slicer(self._dense, groups, borrow=True)
            for _ in range(config.workers or available_cores())
        ]
        self._measured = reconstruction or partial(
            Reconstruction, self._dense, groups, splits.calibration.inputs
        )
        self._reconstruction = self._measured() if config.reconstruct == "on" else None
        self._cache: dict[tuple[int, ...], Evaluation] = {}
        is_free = config.statistics == "batch" and not self.reconstructs
        self.blocks = blocks or ImageBlocks(
            splits, config, is_free, self._eval_batches, self._difficulty
        )

    def __call__(self, kept: Mapping[str, int]) -> Evaluation:
        """The proxy score of an allocation: the mean over its drawn sub-models."""
        return self.score_all([kept])[0]

    def suited_to(self, kept: Mapping[str, int]) -> "ProxyAccuracy":
        """This proxy, or one that reconstructs, where `--proxy.reconstruct auto` is to
        decide and `kept` is beyond it.

        On ResNet-20 at 30 % of its MACs, where uniform pruning leaves a loss of 4.4
        nats and a guess has 2.3, the loss of sliced networks had a Kendall tau of 0.24
        with their accuracy once fine-tuned, that of reconstructed ones 0.52. How
        confident a lost network is tells nothing of what can be made of it.

        Args:
            kept: What uniform pruning to the budget leaves. Scoring it isn't counted.
        """
        if self.config.reconstruct != "auto" or self.reconstructs:
            return self
        images = EvalBatches(self._splits.proxy[: self.config.images])
        (score,) = self._on_all_cores(
            partial(self._proxy_score, images), [self.draw(kept)]
        )
        if score.loss <= math.log(len(self._splits.classes)):
            return self
        own = (
            self._dense,
            self.groups,
            self.importance,
            self._splits,
            replace(self.config, reconstruct="on"),
        )
        return ProxyAccuracy(*own, self._measured, self._reference)

    def score_all(
        self, allocations: Sequence[Mapping[str, int]], block: int = 0
    ) -> list[Evaluation]:
        """The proxy scores of several allocations, which share the cores; equal to
        those of one after the other.

        Args:
            allocations: Group to kept channels.
            block: Which block of images is asked, see `block_of`. An allocation that
                was scored before keeps its score.
        """
        keys = [self.key(kept) for kept in allocations]
        fresh = {
            key: kept
            for key, kept in zip(keys, allocations, strict=True)
            if key not in self._cache
        }
        score = partial(self._proxy_score, self.blocks[block]) if fresh else None
        self._cache |= zip(
            fresh, self._side_by_side(score, list(fresh.values())), strict=True
        )
        self.evaluations += len(fresh)
        return [self._cache[key] for key in keys]

    def survey_all(
        self, allocations: Sequence[Mapping[str, int]], batches: int = 0
    ) -> list[Evaluation]:
        """Scores on all images that judge a search of so many batches, in one pass, for
        those that may be finalists.
        """
        return self._side_by_side(
            partial(self._proxy_score, self.blocks.all(batches)), allocations
        )

    def select_all(self, allocations: Sequence[Mapping[str, int]]) -> list[Evaluation]:
        """Scores on the larger selection split, for the finalists; calibrated on the
        whole calibration split.
        """
        return self._side_by_side(self._selection_score, allocations)

    @property
    def reconstructs(self) -> bool:
        """Whether candidates get weights solved anew."""
        return self._reconstruction is not None

    def block_of(self, batch: int) -> int:
        """Which block of images judges a batch of a search."""
        return self.blocks.judging(batch)

    @property
    def n_workers(self) -> int:
        """Candidates that are scored at once."""
        return len(self._slicers)

    @property
    def example(self) -> Tensor:
        """One normalised input of the network."""
        return self._splits.example

    def draw(self, kept: Mapping[str, int], draw: int = 0) -> KeptIndices:
        """The channels of one sub-model: the most important ones, or, with a
        temperature, a weighted sample.

        A sample is drawn without replacement with probabilities in proportion to
        importance^(1 / temperature) (Gumbel top-k); the same allocation and draw give
        the same channels.
        """
        if self.config.temperature == 0:
            return top_channels(self.importance, kept)
        entropy = [self.config.seed, draw, *self.key(kept)]
        seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)
        generator = torch.Generator().manual_seed(seed)
        logits = {
            name: self.importance[name].clamp_min(1e-12).log() / self.config.temperature
            for name in kept
        }
        noise = {
            name: -torch.rand(len(x), generator=generator)
            .clamp_min(1e-12)
            .log()
            .neg()
            .log()
            for name, x in logits.items()
        }
        return top_channels({name: logits[name] + noise[name] for name in kept}, kept)

    def restore(self, kept: Mapping[str, int], evaluation: Evaluation) -> None:
        """Puts an evaluation of an earlier, interrupted run into the cache."""
        self._cache[self.key(kept)] = evaluation

    def key(self, kept: Mapping[str, int]) -> tuple[int, ...]:
        """What tells networks apart: allocations with the same key are one network,
        scored once.
        """
        return tuple(kept[name] for name in self.groups.channels)

    def _side_by_side(
        self, score: Callable[[Slicer, KeptIndices], Evaluation], allocations: Sequence
    ) -> list[Evaluation]:
        """The mean score over each allocation's drawn sub-models."""
        n_draws = self.config.sub_models if self.config.temperature > 0 else 1
        drawn = [(kept, draw) for kept in allocations for draw in range(n_draws)]
        scores = self._on_all_cores(
            lambda slicer, of: score(slicer, self.draw(*of)), drawn
        )
        return [
            _mean(scores[at : at + n_draws]) for at in range(0, len(scores), n_draws)
        ]

    def _on_all_cores(
        self, score: Callable[[Slicer, Any], Evaluation], candidates: Sequence
    ) -> list[Evaluation]:
        if len(self._slicers) == 1:
            return [score(self._slicers[0], candidate) for candidate in candidates]
        idle: SimpleQueue[Slicer] = SimpleQueue()
        for slicer in self._slicers:
            idle.put(slicer)

        def work(candidate: Any) -> Evaluation:
            slicer = idle.get()
            try:
                return score(slicer, candidate)
            finally:
                idle.put(slicer)

        # One thread a candidate, also for a single one: the order of sums, and so the
        # score, depends on the threads.
        with one_thread_each(len(self._slicers)) as pool:
            return list(pool.map(work, candidates))

    def _proxy_score(
        self, images: EvalBatches, slicer: Slicer, kept: KeptIndices
    ) -> Evaluation:
        calibration = None if self.config.statistics == "batch" else self._calibration
        return self._score(images, calibration, slicer, kept)

    def _selection_score(self, slicer: Slicer, kept: KeptIndices) -> Evaluation:
        return self._score(
            self._selection, self._splits.calibration.inputs, slicer, kept
        )

    def _score(
        self,
        images: EvalBatches,
        calibration: Tensor | None,
        slicer: Slicer,
        kept: KeptIndices,
    ) -> Evaluation:
        """Batch norm takes its statistics from `calibration`, or from the images that
        are scored.
        """
        model, bf16 = slicer.apply(kept), self.config.bf16
        if self._reconstruction is not None:
            self._reconstruction.apply(model, kept)
        if calibration is not None:
            recalibrate(model, calibration, bf16=bf16)
        with on_batch_statistics(model) if calibration is None else in_eval_mode(model):
            return evaluate(model, images, bf16)

    @cached_property
    def sensitivity(self) -> np.ndarray:
        """Damage when each prunable group alone loses half of its channels,
        `(n_groups,)`, 0 or more.

        It is the divergence from the dense network's answers on `SENSITIVITY_IMAGES`
        proxy images, in nats: about a quarter of a usual evaluation for each group,
        measured once.
        """
        eval_batches = EvalBatches(self._splits.proxy[:SENSITIVITY_IMAGES])
        eval_batches.set_soft_targets(self._dense, self.config.bf16)
        halves = [
            top_channels(self.importance, {group.name: half(group.channels)})
            for group in self.groups
        ]
        damaged = self._on_all_cores(partial(self._score, eval_batches, None), halves)
        return np.array([evaluation.loss for evaluation in damaged])

    @cached_property
    def _calibration(self) -> Tensor:
        return self._splits.calibration.inputs[: self.config.recalibration_images]

    def _difficulty(self, images: Images) -> Tensor:
        """The cross-entropy of each image, `(n_images,)`, of the network that keeps
        half of every group.
        """
        model = self._slicers[0].apply(
            self.draw({group.name: half(group.channels) for group in self.groups})
        )
        with torch.no_grad(), on_batch_statistics(model):
            logits = [model(part.inputs) for part, _ in EvalBatches(images)]
        return F.cross_entropy(torch.cat(logits), images.labels, reduction="none")

    @cached_property
    def _selection(self) -> EvalBatches:
        return self._eval_batches(self._splits.selection)

    def _eval_batches(self, images: Images) -> EvalBatches:
        eval_batches = EvalBatches(images)
        if self.config.loss == "kl":
            eval_batches.set_soft_targets(self._reference, self.config.bf16)
        return eval_batches


def _mean(evaluations: list[Evaluation]) -> Evaluation:
    """Of the drawn sub-models of one allocation."""
    results = [asdict(evaluation) for evaluation in evaluations]
    return Evaluation(
        *(
            float(np.mean([result[key] for result in results]))
            for key in ("accuracy", "loss")
        )
    )
