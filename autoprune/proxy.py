"""Proxy accuracy: how good a sub-model is before fine-tuning, measured on held-out training images. The hot path.

A sub-model is drawn, physically sliced into one reused copy of the network, its batch-norm statistics are measured anew
and it is scored. An allocation that was scored before is looked up.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune.config import ProxyConfig
from autoprune.criteria import Importance
from autoprune.data import Images, Splits
from autoprune.finetune import autocast
from autoprune.groups import Groups
from autoprune.pruning import Kept, Slicer, top_channels

BatchNorm = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class Evaluation:
    """What a sub-model scored.

    Attributes:
        accuracy: Share of correct answers in [0, 1].
        loss: Mean cross-entropy in nats; a finer signal than accuracy on few images.
    """

    accuracy: float
    loss: float


def _batch_size(shape: torch.Size) -> int:
    """Images a batch: 500 of CIFAR's size, fewer large ones, so that activations fit into a small machine's memory."""
    return max(32, min(500, 8_000_000 // (shape[-1] * shape[-2])))


@torch.no_grad()
def score(model: nn.Module, images: Images, batch_size: int | None = None, bf16: str = "off") -> Evaluation:
    """Accuracy and loss of `model` in eval mode on a split; its training flags are left as found."""
    correct, loss, size = 0, 0.0, batch_size or _batch_size(images.pixels.shape)
    # A split that fits one batch is normalised once for all candidates; larger ones would fill the memory as floats.
    parts = [images] if len(images) <= size else [images[at : at + size] for at in range(0, len(images), size)]
    with _in_eval_mode(model), autocast(bf16):
        for part in parts:
            logits = model(part.inputs).float()
            correct += (logits.argmax(1) == part.labels).sum().item()
            loss += F.cross_entropy(logits, part.labels, reduction="sum").item()
    return Evaluation(correct / len(images), loss / len(images))


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def accuracy(model: nn.Module, images: Images) -> float:
    """Share of correct answers in [0, 1], in float32."""
    return score(model, images).accuracy


@torch.no_grad()
def recalibrate(model: nn.Module, inputs: Tensor, batch_size: int | None = None, bf16: str = "off") -> None:
    """Measures the batch-norm statistics of `model` anew, in place: the mean over batches of each batch's statistics.

    EagleEye's adaptive batch norm (Li et al. 2020, section 3.3), but from reset statistics and with equal weights, so
    that neither the dense network's statistics nor the order of the batches matters. Everything else runs in eval mode.

    Args:
        model: Any network; without batch norm nothing happens.
        inputs: Normalised calibration images; the mean is taken over whole batches of about `batch_size`.
        batch_size: Images a batch; None for what fits a small machine's memory, 500 of CIFAR's size.
        bf16: As in `ProxyConfig`.
    """
    layers = [m for m in model.modules() if isinstance(m, BatchNorm) and m.track_running_stats]
    if not layers:
        return
    with _in_eval_mode(model), _measuring(layers), autocast(bf16):
        for batch in inputs.chunk(-(-len(inputs) // (batch_size or _batch_size(inputs.shape)))):
            model(batch)


@contextmanager
def _measuring(layers: list[BatchNorm]) -> Iterator[None]:
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # PyTorch's cumulative average
        layer.train()
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


class ProxyAccuracy:
    """Scores allocations of one network on the proxy split; equal allocations are scored once.

    Args:
        model: The dense network; never changed.
        groups: Its trace.
        importance: Scores per group that decide which channels survive.
        splits: Calibration images for batch norm, proxy images for the score.
        config: Numbers of images and of sub-models.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Groups,
        importance: Importance,
        splits: Splits,
        config: ProxyConfig = ProxyConfig(),  # noqa: B008, frozen
    ):
        self.groups = groups
        self.importance = importance
        self.config = config
        self.evaluations = 0
        """Sub-models scored so far; what came from the cache isn't counted."""
        self._splits = splits
        self._slicer = Slicer(model, groups)
        self._slicer.model.eval().to(memory_format=torch.channels_last)
        self._proxy = splits.proxy[: config.images]
        self._calibration = splits.calibration.inputs[: config.recalibration_images]
        self._cache: dict[tuple[int, ...], Evaluation] = {}

    def __call__(self, kept: Mapping[str, int]) -> Evaluation:
        """The proxy score of an allocation: the mean over its drawn sub-models."""
        key = tuple(kept[name] for name in self.groups.channels)
        if key not in self._cache:
            self._cache[key] = self._mean(kept, self._proxy, self._calibration)
            self.evaluations += 1
        return self._cache[key]

    def select(self, kept: Mapping[str, int]) -> Evaluation:
        """The score on the larger selection split, for the finalists; calibrated on the whole calibration split."""
        return self._mean(kept, self._splits.selection, self._splits.calibration.inputs)

    @property
    def example(self) -> Tensor:
        """One normalised input of the network."""
        return self._splits.example

    def draw(self, kept: Mapping[str, int], draw: int = 0) -> Kept:
        """The channels of one sub-model: the most important ones, or, with a temperature, a weighted sample.

        A sample is drawn without replacement with probabilities in proportion to importance^(1 / temperature)
        (Gumbel top-k); the same allocation and draw give the same channels.
        """
        if self.config.temperature == 0:
            return top_channels(self.importance, kept)
        entropy = [self.config.seed, draw, *(kept[name] for name in self.groups.channels)]
        seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)
        generator = torch.Generator().manual_seed(seed)
        logits = {name: self.importance[name].clamp_min(1e-12).log() / self.config.temperature for name in kept}
        noise = {
            name: -torch.rand(len(x), generator=generator).clamp_min(1e-12).log().neg().log()
            for name, x in logits.items()
        }
        return top_channels({name: logits[name] + noise[name] for name in kept}, kept)

    def restore(self, kept: Mapping[str, int], evaluation: Evaluation) -> None:
        """Puts an evaluation of an earlier, interrupted run into the cache."""
        self._cache[tuple(kept[name] for name in self.groups.channels)] = evaluation

    def _mean(self, kept: Mapping[str, int], images: Images, calibration: Tensor) -> Evaluation:
        draws = range(self.config.sub_models if self.config.temperature > 0 else 1)
        results = [asdict(self._score(self.draw(kept, draw), images, calibration)) for draw in draws]
        return Evaluation(*(float(np.mean([result[key] for result in results])) for key in ("accuracy", "loss")))

    def _score(self, kept: Kept, images: Images, calibration: Tensor) -> Evaluation:
        model = self._slicer.apply(kept)
        recalibrate(model, calibration, bf16=self.config.bf16)
        return score(model, images, bf16=self.config.bf16)
