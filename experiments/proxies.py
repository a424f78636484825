"""Proxies on offer: ways to score a pruned network before fine-tuning.

`proxy_fidelity.py` judges them. Each slices the network of an allocation, solves its
weights anew if it says so, takes batch-norm statistics from somewhere, and reads
`MEASURES` off its answers.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional

from autoprune.costs.search_space import SearchSpace
from autoprune.data.datasets import Images, batches
from autoprune.evaluation.evaluate import in_eval_mode, on_batch_statistics, recalibrate
from autoprune.evaluation.precision import autocast
from autoprune.pipeline.context import RunContext
from autoprune.structure.slicing import Slicer, top_channels

MEASURES = {"accuracy": 1, "cross_entropy": -1, "kl": -1}
"""What is read off a network's answers, and the sign that makes higher better."""
N_SETS = 4
"""Disjoint sets of images that a proxy on few images scores."""
SET_SIZE = 256
"""Images of the largest of such sets."""
BATCH = 512
"""Images that pass through a network at once."""


@dataclass(frozen=True)
class Exam:
    """Images to be scored, beside what the dense network says of them.

    Attributes:
        inputs: Normalised images.
        labels: Theirs.
        dense: The dense network's log-probabilities, in float32.
    """

    inputs: Tensor
    labels: Tensor
    dense: Tensor

    def __getitem__(self, part: slice) -> "Exam":
        """A part of the images."""
        return Exam(self.inputs[part], self.labels[part], self.dense[part])

    def measure(self, answers: Tensor) -> dict[str, float]:
        """`MEASURES` of logits `(n_images, n_classes)`.

        `kl` is KL(dense || answers); both losses are means over images, in nats.
        """
        is_right = answers.argmax(1) == self.labels
        kl = functional.kl_div(
            answers.log_softmax(1), self.dense, log_target=True, reduction="batchmean"
        )
        return {
            "accuracy": is_right.float().mean().item(),
            "cross_entropy": functional.cross_entropy(answers, self.labels).item(),
            "kl": kl.item(),
        }


def answer(model: nn.Module, inputs: Tensor, bf16: str = "off") -> Tensor:
    """Logits of a network, in the mode that it is in.

    Args:
        model: The network.
        inputs: Normalised images.
        bf16: As in `ProxyConfig`.
    """
    with torch.no_grad(), autocast(bf16):
        return torch.cat([model(batch).float() for batch in inputs.split(BATCH)])


@dataclass(frozen=True)
class Network:
    """A dense network with what its sub-models are made of and scored on; made lazily.

    Attributes:
        context: Network, images and trace.
    """

    context: RunContext

    @property
    def budget(self) -> str:
        """What sub-models must not exceed."""
        return self.context.settings.search.budget

    @property
    def cell(self) -> dict[str, str]:
        """What the tables call it."""
        return {"model": self.context.settings.network.model, "budget": self.budget}

    @cached_property
    def space(self) -> SearchSpace:
        """The allocations."""
        return SearchSpace(self.context.costs)

    @cached_property
    def slicer(self) -> Slicer:
        """The copy in which sub-models are scored."""
        return Slicer(self.context.model, self.context.groups)

    @cached_property
    def proxy(self) -> Exam:
        """The proxy split; its four sets don't overlap."""
        return self.exam(self.context.splits.proxy)

    @cached_property
    def train(self) -> Exam:
        """Training images, for proxies that were published with as many."""
        return self.exam(self.context.splits.train[:10_000])

    @cached_property
    def train_batches(self) -> list[Tensor]:
        """EagleEye's calibration: 100 augmented batches of training images."""
        drawn = batches(self.context.splits.train, 128, seed=0, epoch=0)
        return [inputs for inputs, _ in islice(drawn, 100)]

    @cached_property
    def calibration(self) -> Tensor:
        """The calibration split, normalised."""
        return self.context.splits.calibration.inputs

    def exam(self, images: Images) -> Exam:
        """Images to be scored."""
        dense = answer(self.context.model, images.inputs).log_softmax(1)
        return Exam(images.inputs, images.labels, dense)

    def sub_model(self, counts: dict[str, int], reconstructed: bool) -> nn.Module:
        """The sub-model of an allocation, valid until the next one; in eval mode.

        It has the dense network's statistics.

        Args:
            counts: Group to kept channels.
            reconstructed: Whether weights are solved anew.
        """
        kept = top_channels(self.context.importance, counts)
        model = self.slicer.apply(kept).eval()
        if reconstructed:
            reconstruction = self.context.reconstruction
            assert reconstruction is not None, "the settings don't switch it off"
            reconstruction.apply(model, kept)
        return model


@dataclass(frozen=True)
class Proxy:
    """A way to score a network before fine-tuning.

    Attributes:
        prepare: `(network, model, part)` settles where batch norm takes its statistics
            from, and gives the context in which `model` is to be scored; `part` is the
            set at hand.
        images: Images that are scored.
        passes: Over images, that of `prepare` included.
        reconstructed: Whether weights are solved anew.
        split: The exam they come from, "proxy" or "train".
        bf16: As in `ProxyConfig`.
        measures: Those of `MEASURES` that are reported.
    """

    prepare: Callable[[Network, nn.Module, slice], AbstractContextManager]
    images: int
    passes: int
    reconstructed: bool = False
    split: str = "proxy"
    bf16: str = "auto"
    measures: tuple[str, ...] = tuple(MEASURES)

    @property
    def sets(self) -> list[slice]:
        """The disjoint sets of images that are scored apart."""
        n_sets = N_SETS if self.images <= SET_SIZE else 1
        starts = range(0, n_sets * self.images, self.images)
        return [slice(start, start + self.images) for start in starts]


def as_pruned(
    network: Network, model: nn.Module, part: slice
) -> AbstractContextManager:
    """The dense network's statistics.

    Args:
        network: The dense network and its images.
        model: The sub-model.
        part: The set at hand.
    """
    return in_eval_mode(model)


def moving_average(
    network: Network, model: nn.Module, part: slice
) -> AbstractContextManager:
    """The dense network's statistics, moved over training batches.

    By PyTorch's usual momentum.

    Args:
        network: The dense network and its images.
        model: The sub-model.
        part: The set at hand.
    """
    model.train()
    for inputs in network.train_batches:
        answer(model, inputs)
    return in_eval_mode(model)


def recalibrated(
    network: Network, model: nn.Module, part: slice
) -> AbstractContextManager:
    """Statistics measured anew, on as many other images as are scored.

    Args:
        network: The dense network and its images.
        model: The sub-model.
        part: The set at hand.
    """
    recalibrate(model, network.calibration[part], bf16="auto")
    return in_eval_mode(model)


def batch_statistics(
    network: Network, model: nn.Module, part: slice
) -> AbstractContextManager:
    """The statistics of the very images that are scored.

    Args:
        network: The dense network and its images.
        model: The sub-model.
        part: The set at hand.
    """
    return on_batch_statistics(model)


PROXIES = {
    "amc": Proxy(
        as_pruned, 5_000, 1, split="train", bf16="off", measures=("accuracy",)
    ),
    "eagleeye": Proxy(
        moving_average, 10_000, 2, split="train", bf16="off", measures=("accuracy",)
    ),
    "recalibrated, 250": Proxy(recalibrated, 250, 2),
    "recalibrated, 1000": Proxy(recalibrated, 1_000, 2),
    "one pass, 128": Proxy(batch_statistics, 128, 1),
    "one pass, 224": Proxy(batch_statistics, 224, 1),
    "one pass, 256": Proxy(batch_statistics, 256, 1),
    "one pass, 512": Proxy(batch_statistics, 512, 1),
    "one pass, 256, float32": Proxy(batch_statistics, 256, 1, bf16="off"),
    "one pass, 224, reconstructed": Proxy(batch_statistics, 224, 1, reconstructed=True),
    "one pass, 512, reconstructed": Proxy(batch_statistics, 512, 1, reconstructed=True),
}


def score(
    network: Network, kept: dict[str, int], proxy: Proxy, part: slice, exam: Exam
) -> tuple[dict, float]:
    """Scores one sub-model on one set.

    Args:
        network: The dense network and its images.
        kept: Group to kept channels.
        proxy: How it is scored.
        part: The set at hand.
        exam: The set's images.

    Returns:
        Its `MEASURES`, and the processor seconds from allocation to score.
    """
    started = time.process_time()
    model = network.sub_model(kept, proxy.reconstructed)
    with proxy.prepare(network, model, part):
        measured = exam.measure(answer(model, exam.inputs, proxy.bf16))
    return measured, time.process_time() - started
