"""How good a network is on a split: accuracy, loss, and batch-norm statistics.

`score` judges a network on its stored batch-norm statistics, `recalibrate` measures
these anew, and `on_batch_statistics` does without them.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune.data.datasets import Images
from autoprune.evaluation.precision import autocast

BatchNorm = nn.modules.batchnorm._BatchNorm
"""The base class of PyTorch's batch norms; it has no public name."""

MAX_BATCH = 500
"""Images of a batch at most, unless the caller gives a number."""
MIN_BATCH = 32
"""Images of a batch at least: fewer give poor batch statistics."""
PIXELS_PER_BATCH = 8_000_000
"""Pixels of a batch, so that activations fit into a small machine's memory."""


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


def _default_batch_size(shape: torch.Size) -> int:
    """Images of a batch by their shape `(..., height, width)`: 500 of CIFAR's size."""
    height, width = shape[-2:]
    n_fitting = PIXELS_PER_BATCH // (width * height)
    return max(MIN_BATCH, min(MAX_BATCH, n_fitting))


def _n_batches(shape: torch.Size, batch_size: int | None) -> int:
    """How many batches images of shape `(n_images, 3, height, width)` make."""
    size = batch_size or _default_batch_size(shape)
    return math.ceil(shape[0] / size)


@torch.no_grad()
def score(
    model: nn.Module, images: Images, batch_size: int | None = None, bf16: str = "off"
) -> Evaluation:
    """Accuracy and cross-entropy of a network in eval mode.

    Args:
        model: The network; its training flags are left as found.
        images: The split.
        batch_size: Images a batch; None for what fits a small machine's memory.
        bf16: As in `ProxyConfig`.

    Returns:
        Both numbers.
    """
    with in_eval_mode(model):
        return evaluate(model, EvalBatches(images, batch_size), bf16)


class EvalBatches:
    """Batches of a split, and what a network's answers are compared with.

    Args:
        images: The split.
        batch_size: Images a batch; None for what fits a small machine's memory, 500 of
            CIFAR's size.

    Attributes:
        images: See above.
        soft_targets: For each batch the log-probabilities `(n_images, n_classes)` that
            answers are compared with; None to compare them with the labels.
    """

    def __init__(self, images: Images, batch_size: int | None = None):
        self.images = images
        self.soft_targets: list[Tensor] | None = None
        self._n_batches = _n_batches(images.pixels.shape, batch_size)

    def __len__(self) -> int:
        """How many images there are in all batches together."""
        return len(self.images)

    def __iter__(self) -> Iterator[tuple[Images, Tensor | None]]:
        """Batches of about equal size, each with its soft targets, if there are any."""
        parts = torch.arange(len(self)).tensor_split(self._n_batches)
        for number, part in enumerate(parts):
            # A split caches its normalised inputs, a part of it doesn't. Where one
            # batch is enough, all candidates share the split's.
            images = self.images if self._n_batches == 1 else self.images[part]
            targets = None if self.soft_targets is None else self.soft_targets[number]
            yield images, targets

    @torch.no_grad()
    def set_soft_targets(self, dense: nn.Module, bf16: str) -> None:
        """Compares answers with those of a network from now on, not with the labels.

        Args:
            dense: The network, in eval mode.
            bf16: As in `ProxyConfig`.
        """
        targets = []
        with autocast(bf16):
            for images, _ in self:
                # Logarithms of bfloat16 would be too coarse.
                logits = dense(images.inputs).float()
                targets.append(logits.log_softmax(1))
        # Only now, since the loop above reads them.
        self.soft_targets = targets


@torch.no_grad()
def evaluate(model: nn.Module, eval_batches: EvalBatches, bf16: str) -> Evaluation:
    """Scores a network in the mode that it is in.

    Args:
        model: The network.
        eval_batches: The images, with labels or soft targets.
        bf16: As in `ProxyConfig`.

    Returns:
        Accuracy by the labels, and the loss by what answers are compared with.
    """
    n_correct = 0
    loss = 0.0
    with autocast(bf16):
        for images, targets in eval_batches:
            # A sum of bfloat16 numbers would lose what the last images add.
            logits = model(images.inputs).float()
            is_correct = logits.argmax(1) == images.labels
            n_correct += is_correct.sum().item()
            loss += _summed_loss(logits, images.labels, targets).item()
    n_images = len(eval_batches)
    return Evaluation(n_correct / n_images, loss / n_images)


def _summed_loss(logits: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
    """Cross-entropy with the labels, or KL(targets || model), summed over images."""
    if targets is None:
        return F.cross_entropy(logits, labels, reduction="sum")
    answers = logits.log_softmax(1)
    return F.kl_div(answers, targets, log_target=True, reduction="sum")


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts a network into eval mode; its modules' flags are as found afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        # One by one, since frozen parts may have been in eval mode before.
        for module, is_training in flags:
            module.training = is_training


def accuracy(model: nn.Module, images: Images) -> float:
    """Accuracy of a network in eval mode, in float32.

    Args:
        model: The network; its training flags are left as found.
        images: The split.

    Returns:
        Share of correct answers in [0, 1].
    """
    # Small batches: their activations fit into a core's cache.
    batch_size = max(1, _default_batch_size(images.pixels.shape) // 5)
    return score(model, images, batch_size).accuracy


@torch.no_grad()
def recalibrate(
    model: nn.Module, inputs: Tensor, batch_size: int | None = None, bf16: str = "off"
) -> None:
    """Measures the batch-norm statistics of a network anew, in place.

    They become the mean over batches of each batch's statistics. This is EagleEye's
    adaptive batch norm (Li et al. 2020, section 3.3), but from reset statistics and
    with equal weights, so that neither the dense network's statistics nor the order of
    the batches matters. Everything else runs in eval mode.

    Args:
        model: Any network; without batch norm nothing happens.
        inputs: Normalised calibration images; the mean is taken over whole batches of
            about `batch_size`.
        batch_size: Images a batch; None for what fits a small machine's memory, 500 of
            CIFAR's size.
        bf16: As in `ProxyConfig`.
    """
    layers = _tracking_norms(model)
    if not layers:
        return
    with in_eval_mode(model), _measuring(layers), autocast(bf16):
        # Chunks of about equal size, since each batch's statistics weigh the same.
        for batch in inputs.chunk(_n_batches(inputs.shape, batch_size)):
            model(batch)


def _tracking_norms(model: nn.Module) -> list[BatchNorm]:
    """The batch norms that keep running statistics."""
    return [
        module
        for module in model.modules()
        if isinstance(module, BatchNorm) and module.track_running_stats
    ]


@contextmanager
def _measuring(layers: list[BatchNorm]) -> Iterator[None]:
    """Resets the running statistics of batch norms, and averages those of batches."""
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        # PyTorch's sign for a plain mean instead of an exponential one.
        layer.momentum = None
        layer.train()
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


@contextmanager
def on_batch_statistics(model: nn.Module) -> Iterator[None]:
    """Puts a network into eval mode, but batch norm takes the statistics of each batch.

    Stored statistics are neither read nor written.

    Until the end, plain `nn.BatchNorm2d` layers have a `forward` of their own, set on
    the instance, because PyTorch's kernel is slow for the few channels of a pruned
    layer (see `_normalised`) and this is the search's hot path. So don't enter this in
    a thread while another thread uses the same model: it would see the replaced
    `forward`, and the first to leave would take it from the other. The proxy gives
    each of its threads a copy of the network. Nor use it on a model that
    `torch.compile` has compiled: what was compiled doesn't notice the replacement, or
    is compiled again each time.

    Args:
        model: The network; training flags and `forward` are as found afterwards.
    """
    layers = _tracking_norms(model)
    with in_eval_mode(model):
        for layer in layers:
            layer.training = True
            layer.track_running_stats = False
            # A subclass may compute something else, so its forward stays.
            if type(layer) is nn.BatchNorm2d:
                vars(layer)["forward"] = partial(_normalised, layer)
        try:
            yield
        finally:
            for layer in layers:
                layer.track_running_stats = True
                vars(layer).pop("forward", None)


def _normalised(layer: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Batch norm of `x` with its own statistics, fast for channels_last.

    PyTorch's kernel runs over the channels innermost, and a pruned layer's dozen of
    them don't fill a vector register. So each position within an image's row is a
    channel of its own here, until the statistics are put together: 3 channels in rows
    of 8 pixels are normalised as 24. With p the positions in a row, the mean is
    mean_p(mean) and the variance mean_p(variance) + variance_p(mean).
    """
    is_channels_last = x.is_contiguous(memory_format=torch.channels_last)
    # No gradient flows through statistics that are put together here.
    if layer.weight is None or not is_channels_last or torch.is_grad_enabled():
        return F.batch_norm(
            x, None, None, layer.weight, layer.bias, True, eps=layer.eps
        )
    n_images, n_channels, height, width = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(n_images * height, width * n_channels)
    # Running statistics in float32 make those of bfloat16 inputs float32, too.
    float32 = layer.weight.new_zeros(2, width * n_channels)
    row_mean, row_var = torch.batch_norm_update_stats(
        rows, float32[0], float32[1], momentum=0.0
    )
    row_mean = row_mean.view(width, n_channels)
    row_var = row_var.view(width, n_channels)
    var = row_var.mean(0) + row_mean.var(0, correction=0)
    mean = row_mean.mean(0)
    # Stacked, so that one call repeats all four for the positions of a row.
    affine = torch.stack((mean, var, layer.weight, layer.bias)).repeat(1, width)
    rows = F.batch_norm(rows, affine[0], affine[1], affine[2], affine[3], eps=layer.eps)
    return rows.view(n_images, height, width, n_channels).permute(0, 3, 1, 2)
