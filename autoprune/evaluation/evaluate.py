"""How good a network is on a split: accuracy, loss, and where batch norm takes its
statistics from.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import repeat

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune.data.datasets import Images
from autoprune.evaluation.precision import autocast

BatchNorm = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class Evaluation:
    """What a sub-model scored.

    Attributes:
        accuracy: Share of correct answers in [0, 1].
        loss: Mean cross-entropy with the labels, or divergence from the dense network's
            answers, in nats; a finer signal than accuracy on few images.
    """

    accuracy: float
    loss: float


def _batch_size(shape: torch.Size) -> int:
    """Images a batch: 500 of CIFAR's size, fewer large ones, so that activations fit
    into a small machine's memory.
    """
    return max(32, min(500, 8_000_000 // (shape[-1] * shape[-2])))


@torch.no_grad()
def score(
    model: nn.Module, images: Images, batch_size: int | None = None, bf16: str = "off"
) -> Evaluation:
    """Accuracy and cross-entropy of `model` in eval mode on a split; its training flags
    are left as found.
    """
    with in_eval_mode(model):
        return evaluate(model, EvalBatches(images, batch_size), bf16)


class EvalBatches:
    """Images to be scored, and what the answers are held against.

    Args:
        images: The split.
        batch_size: Images a batch; None for what fits a small machine's memory, 500 of
            CIFAR's size.
    """

    def __init__(self, images: Images, batch_size: int | None = None):
        self.images = images
        self.soft_targets: list[Tensor] | None = None
        """Log-probabilities of the dense network for each batch; None to use the
        labels.
        """
        self._n_parts = -(
            -len(images) // (batch_size or _batch_size(images.pixels.shape))
        )

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[tuple[Images, Tensor | None]]:
        """Batches of about equal size; images that fit one batch are normalised once
        for all candidates.
        """
        index = torch.arange(len(self)).tensor_split(self._n_parts)
        parts = (
            [self.images]
            if self._n_parts == 1
            else (self.images[part] for part in index)
        )
        return zip(parts, self.soft_targets or repeat(None))  # noqa: B905, repeat has no end

    @torch.no_grad()
    def set_soft_targets(self, dense: nn.Module, bf16: str) -> None:
        """From now on the loss is the divergence from the answers of `dense`, in eval
        mode, instead of the labels.
        """
        with autocast(bf16):
            self.soft_targets = [
                dense(part.inputs).float().log_softmax(1) for part, _ in self
            ]


@torch.no_grad()
def evaluate(model: nn.Module, eval_batches: EvalBatches, bf16: str) -> Evaluation:
    """Scores `model` in the mode that it is in."""
    correct = loss = 0
    with autocast(bf16):
        for part, dense in eval_batches:
            logits = model(part.inputs).float()
            correct += (logits.argmax(1) == part.labels).sum().item()
            loss += _loss(logits, part.labels, dense).item()
    return Evaluation(correct / len(eval_batches), loss / len(eval_batches))


def _loss(logits: Tensor, labels: Tensor, dense: Tensor | None) -> Tensor:
    """Cross-entropy with the labels, or KL(dense || model), summed over the images."""
    if dense is None:
        return F.cross_entropy(logits, labels, reduction="sum")
    return F.kl_div(logits.log_softmax(1), dense, log_target=True, reduction="sum")


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def accuracy(model: nn.Module, images: Images) -> float:
    """Share of correct answers in [0, 1], in float32; in small batches, whose
    activations fit into a core's cache.
    """
    return score(model, images, max(1, _batch_size(images.pixels.shape) // 5)).accuracy


@torch.no_grad()
def recalibrate(
    model: nn.Module, inputs: Tensor, batch_size: int | None = None, bf16: str = "off"
) -> None:
    """Measures the batch-norm statistics of `model` anew, in place: the mean over
    batches of each batch's statistics.

    EagleEye's adaptive batch norm (Li et al. 2020, section 3.3), but from reset
    statistics and with equal weights, so that neither the dense network's statistics
    nor the order of the batches matters. Everything else runs in eval mode.

    Args:
        model: Any network; without batch norm nothing happens.
        inputs: Normalised calibration images; the mean is taken over whole batches of
            about `batch_size`.
        batch_size: Images a batch; None for what fits a small machine's memory, 500 of
            CIFAR's size.
        bf16: As in `ProxyConfig`.
    """
    layers = [
        m for m in model.modules() if isinstance(m, BatchNorm) and m.track_running_stats
    ]
    if not layers:
        return
    with in_eval_mode(model), _measuring(layers), autocast(bf16):
        for batch in inputs.chunk(
            -(-len(inputs) // (batch_size or _batch_size(inputs.shape)))
        ):
            model(batch)


@contextmanager
def on_batch_statistics(model: nn.Module) -> Iterator[None]:
    """Eval mode, but batch norm takes mean and variance of the batch at hand; stored
    statistics aren't touched.
    """
    layers = [
        m for m in model.modules() if isinstance(m, BatchNorm) and m.track_running_stats
    ]
    with in_eval_mode(model):
        for layer in layers:
            layer.training, layer.track_running_stats = True, False
            if type(layer) is nn.BatchNorm2d:
                layer.forward = partial(_normalised, layer)
        try:
            yield
        finally:
            for layer in layers:
                layer.track_running_stats = True
                vars(layer).pop("forward", None)


def _normalised(layer: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Batch norm of `x` with its own statistics, for channels_last several times as
    fast as PyTorch's.

    PyTorch's kernel runs over the channels innermost, and a pruned layer's dozen of
    them don't fill a vector register. So each position within an image's row is a
    channel of its own here, until the statistics are put together.
    """
    fits = layer.weight is not None and x.is_contiguous(
        memory_format=torch.channels_last
    )
    if (
        not fits or torch.is_grad_enabled()
    ):  # no gradient flows through statistics that are put together here
        return F.batch_norm(
            x, None, None, layer.weight, layer.bias, True, eps=layer.eps
        )
    n, channels, height, width = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(n * height, width * channels)
    float32 = layer.weight.new_zeros(
        2, width * channels
    )  # makes the statistics of bf16 float32, too
    mean, var = (
        part.view(width, channels)
        for part in torch.batch_norm_update_stats(rows, *float32, momentum=0.0)
    )
    var, mean = var.mean(0) + mean.var(0, correction=0), mean.mean(0)
    affine = torch.stack((mean, var, layer.weight, layer.bias)).repeat(1, width)
    rows = F.batch_norm(rows, *affine, eps=layer.eps)
    return rows.view(n, height, width, channels).permute(0, 3, 1, 2)


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
