"""Images of a dataset in memory: labelled, in splits, as batches of tensors.

They stay in memory as `(n, channels, height, width)`, uint8 or float32; a batch is
augmented and normalised as one tensor, so no image is touched by Python alone.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from autoprune.data.preprocessing import Preprocessing, checked_pixels


@dataclass(frozen=True)
class Images:
    """Labelled images of one split.

    Indexing with a slice, or with a tensor of positions, gives some of them.

    Attributes:
        pixels: `(n, channels, height, width)`: uint8, or float32 in [0, 1], which
            `checked_pixels` makes of other types.
        labels: int64 `(n,)`.
        preprocessing: Of the network that reads them; None for the usual one.
    """

    pixels: Tensor
    labels: Tensor
    preprocessing: Preprocessing | None = None

    def __post_init__(self) -> None:
        # Once, so that everything behind it knows two types of pixels.
        object.__setattr__(self, "pixels", checked_pixels(self.pixels))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: slice | Tensor | Sequence[int]) -> "Images":
        return replace(self, pixels=self.pixels[index], labels=self.labels[index])

    @cached_property
    def inputs(self) -> Tensor:
        """The whole split normalised, channels last.

        float32 `(n, channels, height, width)`; made when first asked for, and kept.
        """
        return normalize(self.pixels, self.preprocessing)


@dataclass(frozen=True)
class Splits:
    """The disjoint parts of a dataset; `test` is read once, for the report.

    Attributes:
        train: Fine-tuning, and first-order importance.
        calibration: Batch-norm statistics of sub-models; the reward of long searches
            too.
        proxy: The reward.
        selection: The choice among finalists.
        test: The report.
        classes: Class names in label order.
        name: What the user asked for.
        remarks: What to tell whoever reads numbers of these splits.
    """

    train: Images
    calibration: Images
    proxy: Images
    selection: Images
    test: Images
    classes: tuple[str, ...]
    name: str
    remarks: tuple[str, ...] = ()

    @property
    def example(self) -> Tensor:
        """One normalised input, float32 `(1, channels, height, width)`."""
        return self.train[:1].inputs

    @property
    def preprocessing(self) -> Preprocessing:
        """How the images become inputs, with their size."""
        pixels = self.train.pixels
        preprocessing = self.train.preprocessing
        if preprocessing is None:
            preprocessing = Preprocessing.usual(pixels.shape[1])
        if preprocessing.size is not None:
            return preprocessing
        height, width = pixels.shape[2:]
        return preprocessing.with_size((height, width), "the images' own")


def normalize(pixels: Tensor, preprocessing: Preprocessing | None = None) -> Tensor:
    """Turns pixels into what a network reads.

    Args:
        pixels: `(n, channels, height, width)`: uint8, or float32 in [0, 1].
        preprocessing: The network's; None for ImageNet's mean and deviation.

    Returns:
        float32 of the same shape with mean and deviation taken out, channels last.
    """
    if preprocessing is None:
        preprocessing = Preprocessing.usual(pixels.shape[1])
    return preprocessing.normalize(pixels)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Starts torch's random numbers on the CPU from a seed, until the end.

    Those of the code around it go on afterwards as if nothing had been drawn.
    """
    with torch.random.fork_rng(devices=[]):
        # Not `torch.manual_seed`, which would also seed other devices.
        torch.default_generator.manual_seed(seed)
        yield


def batches(
    images: Images, batch_size: int, seed: int, epoch: int, flip: bool = True
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of shuffled, augmented batches.

    Order and crops depend on seed and epoch only. Crops move by up to an eighth of the
    size (4 of 32 pixels) into a black border.

    Args:
        images: The training images.
        batch_size: Images a batch. The last incomplete batch is dropped unless it is
            the only one.
        seed: Of the training.
        epoch: Its number, from 0.
        flip: Whether every image alternates between its two mirror images from epoch to
            epoch, which converges faster than drawing a side at random (Jordan 2024,
            "94% on CIFAR-10 in 3.29 seconds", section 3.6).

    Yields:
        Normalised inputs, float32 `(batch_size, channels, height, width)`, and labels.
    """
    # From the seed alone, so that an image has the same first side in every epoch.
    side_generator = torch.Generator().manual_seed(seed)
    is_first_mirrored = torch.rand(len(images), generator=side_generator) < 0.5
    # The factor, a prime, keeps the epochs of one seed apart from those of the next.
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    order = torch.randperm(len(images), generator=generator)
    n_batches = max(1, len(images) // batch_size)
    for index in order[: n_batches * batch_size].split(batch_size):
        pixels = _crop(images.pixels[index], generator)
        if flip:
            is_mirrored = is_first_mirrored[index] ^ bool(epoch % 2)
            is_mirrored = is_mirrored.view(-1, 1, 1, 1)
            pixels = torch.where(is_mirrored, pixels.flip(3), pixels)
        yield normalize(pixels, images.preprocessing), images.labels[index]


def _crop(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Moves each image by a random number of pixels, the same size, in a black border.

    Args:
        pixels: `(n, channels, height, width)`.
        generator: Draws the moves.
    """
    n_images, _, height, width = pixels.shape
    margin = height // 8
    padded = F.pad(pixels, [margin] * 4)
    offsets = torch.randint(0, 2 * margin + 1, (2, n_images, 1, 1), generator=generator)
    top, left = offsets
    # One indexing reads every image's own window: (n, 1, 1), (n, height, 1) and
    # (n, 1, width) broadcast to (n, height, width).
    samples = torch.arange(n_images).view(-1, 1, 1)
    rows = top + torch.arange(height).view(1, -1, 1)
    columns = left + torch.arange(width).view(1, 1, -1)
    windows = padded.permute(0, 2, 3, 1)[samples, rows, columns]
    return windows.permute(0, 3, 1, 2)
