"""What looks wrong with a dense network, or with what pruning made of it."""

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from autoprune.data.images import Images, Splits
from autoprune.errors import ExportError, UserError
from autoprune.evaluation.evaluate import EvalBatches, in_eval_mode, recalibrate
from autoprune.latency.measuring import Latency
from autoprune.reporting.wording import percent_text

IMAGES = 500
"""Training images that the dense network is looked at with."""
LARGEST_GAIN = 0.05
"""More accuracy from recalibrated batch norm than that has a reason."""
SMALLEST_SKILL = 0.1
"""Share of the way from chance to certainty that a trained network has behind it."""
NOT_FASTER = "the pruned network is not faster"
"""How the remarks on speed begin."""
NOT_MEASURED = "the latency is not measured"
"""How the remarks on engines begin that can't run the network."""
LOST_ACCURACY = "fine-tuning lost accuracy"
"""How the remark on a training begins that made the network worse."""
LEAST_GAIN = 0.02
"""Share of the dense network's time; a smaller gain can't be told from chance."""


def dense_remarks(dense: nn.Module, splits: Splits) -> list[str]:
    """What to tell of a network that answers its training images badly.

    A network that was trained with other means, deviations or sizes sees other images
    than it knows; batch norm that is measured anew hides that, and whatever is done
    with the network seems to make it better.

    Args:
        dense: The network, in eval mode; it is left as found.
        splits: The images, of which only training images are read.

    Returns:
        None or one remark.
    """
    images = _spread(splits.train)
    is_right = _is_right(dense, images)
    recalibrated = copy.deepcopy(dense)
    recalibrate(recalibrated, images.inputs)
    is_right_then = _is_right(recalibrated, images)
    before = is_right.float().mean().item()
    after = is_right_then.float().mean().item()
    chance = (images.labels.bincount().max() / len(images)).item()
    limit = _limit_of_chance(chance, len(images))
    answered = f"{percent_text(before, 0)} of {len(images)} training images rightly"
    if after > limit and _is_gain(is_right, is_right_then):
        return [
            f"the dense network answers {answered} as given, {percent_text(after, 0)} "
            f"with batch norm recalibrated: does the preprocessing fit? --mean, --std, "
            f"--image_size, --crop and --interpolation set it"
        ]
    if before <= limit:
        return [
            f"the dense network is at chance: it answers {answered}, and "
            f"{percent_text(chance, 0)} are of one class; no weights? Give trained "
            f"ones (--weights), in the order of the classes "
            f"({', '.join(splits.classes[:3])}, ...)"
        ]
    return []


def _spread(images: Images) -> Images:
    """So many of a split, evenly spread over it, in whatever order it is."""
    positions = torch.linspace(0, len(images) - 1, min(IMAGES, len(images)))
    return images[positions.round().long()]


@torch.no_grad()
def _is_right(model: nn.Module, images: Images) -> Tensor:
    """Whether each image is answered rightly, bool `(n_images,)`."""
    parts = []
    with in_eval_mode(model):
        for batch, _ in EvalBatches(images):
            parts.append(model(batch.inputs).argmax(1) == batch.labels)
    return torch.cat(parts)


def _limit_of_chance(chance: float, n_images: int) -> float:
    """Accuracy up to which a network knows nothing that can be measured."""
    error = math.sqrt(chance * (1 - chance) / n_images)
    return chance + max(3 * error, SMALLEST_SKILL * (1 - chance))


def _is_gain(before: Tensor, after: Tensor) -> bool:
    """Whether accuracy rose by more than it may, and not by chance.

    Of images that are answered differently, half would change for the better by chance
    (McNemar's test); three standard errors are asked for.
    """
    n_better = (after & ~before).sum().item()
    n_worse = (before & ~after).sum().item()
    gain = (n_better - n_worse) / len(before)
    is_significant = n_better - n_worse > 3 * math.sqrt(n_better + n_worse)
    return gain > LARGEST_GAIN and is_significant


def finetune_remarks(before: float, after: float, n_images: int) -> list[str]:
    """Whether fine-tuning made the network worse, as too high a rate does.

    A training may diverge without any number that isn't finite: batch norm keeps the
    activations of the wildest weights in bounds.

    Args:
        before: Accuracy of the pruned network.
        after: That of the fine-tuned one.
        n_images: On how many images both were measured.

    Returns:
        None or one remark.
    """
    variance = before * (1 - before) + after * (1 - after)
    by_chance = 3 * math.sqrt(variance / n_images)
    if before - after <= max(LARGEST_GAIN, by_chance):
        return []
    return [
        f"{LOST_ACCURACY}: {percent_text(before)} before it, {percent_text(after)} "
        f"after; did it diverge? `autoprune finetune RUN` tunes the pruned network "
        f"anew, with a lower --finetune.lr"
    ]


def speed_remarks(latencies: Sequence[Latency]) -> list[str]:
    """Where the pruned network isn't faster than the dense one.

    Args:
        latencies: What was measured of both.

    Returns:
        A remark for each setting in which it isn't.
    """
    remarks = []
    for row in latencies:
        if row.pruned_ms > (1 - LEAST_GAIN) * row.dense_ms:
            remarks.append(
                f"{NOT_FASTER} in {row.setting}: "
                f"{row.pruned_ms:.2f} ms, dense {row.dense_ms:.2f} ms"
            )
    return remarks


def refusal_remark(engine: str, error: ExportError | UserError) -> str:
    """That an engine can't run a network, and why.

    Args:
        engine: Its name.
        error: What it says.
    """
    reason = error.reason if isinstance(error, UserError) else str(error)
    return f"{NOT_MEASURED} in {engine}: {reason}"
