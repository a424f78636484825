"""Proxies on offer: ways to score a pruned network before fine-tuning, for
`proxy_fidelity.py` to judge.

Each slices the network of an allocation, solves its weights anew if it says so, takes
batch-norm statistics from somewhere, and reads `MEASURES` off its answers.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune.costs.allocation import SearchSpace
from autoprune.data.datasets import Images, batches
from autoprune.evaluation.evaluate import in_eval_mode, on_batch_statistics, recalibrate
from autoprune.evaluation.precision import autocast
from autoprune.pipeline.context import Workspace
from autoprune.structure.slicing import Slicer, top_channels

MEASURES = {"accuracy": 1, "cross_entropy": -1, "kl": -1}
"""What is read off a network's answers, and the sign that makes higher better."""
N_SETS, SET_SIZE = 4, 256
BATCH = 512


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
        return Exam(self.inputs[part], self.labels[part], self.dense[part])

    def measure(self, answers: Tensor) -> dict[str, float]:
        """`MEASURES` of logits; `kl` is KL(dense || answers), as both losses the mean
        over images, in nats.
        """
        return {
            "accuracy": (answers.argmax(1) == self.labels).float().mean().item(),
            "cross_entropy": F.cross_entropy(answers, self.labels).item(),
            "kl": F.kl_div(
                answers.log_softmax(1),
                self.dense,
                log_target=True,
                reduction="batchmean",
            ).item(),
        }


def answer(model: nn.Module, inputs: Tensor, bf16: str = "off") -> Tensor:
    """Logits of `model`, in the mode that it is in."""
    with torch.no_grad(), autocast(bf16):
        return torch.cat([model(batch).float() for batch in inputs.split(BATCH)])


@dataclass(frozen=True)
class Network:
    """A dense network with what its sub-models are made of and scored on; made lazily.

    Attributes:
        workspace: Network, images and trace.
    """

    workspace: Workspace

    @property
    def budget(self) -> str:
        """What sub-models must not exceed."""
        return self.workspace.settings.search.budget

    @property
    def cell(self) -> dict[str, str]:
        """What the tables call it."""
        return {"model": self.workspace.settings.network.model, "budget": self.budget}

    @cached_property
    def space(self) -> SearchSpace:
        """The allocations."""
        return SearchSpace(self.workspace.costs)

    @cached_property
    def slicer(self) -> Slicer:
        """The copy in which sub-models are scored."""
        return Slicer(self.workspace.model, self.workspace.groups)

    @cached_property
    def proxy(self) -> Exam:
        """The proxy split; its four sets don't overlap."""
        return self.exam(self.workspace.splits.proxy)

    @cached_property
    def train(self) -> Exam:
        """Training images, for proxies that were published with as many."""
        return self.exam(self.workspace.splits.train[:10_000])

    @cached_property
    def train_batches(self) -> list[Tensor]:
        """EagleEye's calibration: 100 augmented batches of training images."""
        return [
            inputs
            for inputs, _ in islice(
                batches(self.workspace.splits.train, 128, seed=0, epoch=0), 100
            )
        ]

    @cached_property
    def calibration(self) -> Tensor:
        """The calibration split, normalised."""
        return self.workspace.splits.calibration.inputs

    def exam(self, images: Images) -> Exam:
        """Images to be scored."""
        return Exam(
            images.inputs,
            images.labels,
            answer(self.workspace.model, images.inputs).log_softmax(1),
        )

    def lay(self, counts: dict[str, int], reconstructed: bool = False) -> nn.Module:
        """The sub-model of an allocation with the dense network's statistics, valid
        until the next; in eval mode.
        """
        kept = top_channels(self.workspace.importance, counts)
        model = self.slicer.apply(kept).eval()
        if reconstructed:
            self.workspace.reconstruction.apply(model, kept)
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
        return [
            slice(at, at + self.images)
            for at in range(0, n_sets * self.images, self.images)
        ]


def as_pruned(
    network: Network, model: nn.Module, part: slice
) -> AbstractContextManager:
    """The dense network's statistics."""
    return in_eval_mode(model)


def moving_average(
    network: Network, model: nn.Module, part: slice
) -> AbstractContextManager:
    """The dense network's statistics, moved by PyTorch's usual momentum over training
    batches.
    """
    model.train()
    for inputs in network.train_batches:
        answer(model, inputs)
    return in_eval_mode(model)


def recalibrated(
    network: Network, model: nn.Module, part: slice
) -> AbstractContextManager:
    """Statistics measured anew, on as many other images as are scored."""
    recalibrate(model, network.calibration[part], bf16="auto")
    return in_eval_mode(model)


def batch_statistics(
    network: Network, model: nn.Module, part: slice
) -> AbstractContextManager:
    """The statistics of the very images that are scored."""
    return on_batch_statistics(model)


PUBLISHED = {"split": "train", "bf16": "off", "measures": ("accuracy",)}
PROXIES = {
    "amc": Proxy(as_pruned, 5_000, 1, **PUBLISHED),
    "eagleeye": Proxy(moving_average, 10_000, 2, **PUBLISHED),
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
    """`MEASURES` of a sub-model, and the processor seconds from allocation to score."""
    started = time.process_time()
    model = network.lay(kept, proxy.reconstructed)
    with proxy.prepare(network, model, part):
        measured = exam.measure(answer(model, exam.inputs, proxy.bf16))
    return measured, time.process_time() - started
