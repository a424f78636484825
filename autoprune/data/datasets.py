"""Datasets by name or folder, the five splits, batches as tensors.

Images stay in memory as `(n, channels, height, width)`, uint8 or float32; a batch is
augmented and normalised as one tensor, so no image is touched by Python alone.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import ModuleType
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from autoprune.config import DataConfig
from autoprune.data.image_files import (
    find_images,
    find_test_part,
    read_grid,
    read_images,
)
from autoprune.data.preprocessing import Preprocessing, checked_pixels
from autoprune.data.stratify import shuffled, stratified_order, stratified_parts
from autoprune.errors import UserError, nearest_names

HELD_OUT = {"calibration": 1000, "proxy": 1000, "selection": 3000}
"""The parts that are held out of the training images, each with its usual size."""
RESERVES = {"test": 2, "calibration": 3, "proxy": 1, "selection": 1}
"""How many images of a class each part leaves, where there are few.

Of three images reward, choice and training get one each; of two, reward and training.
"""
MAX_CARVED_TEST = 10_000
"""Most images for the test where a dataset brings none: a standard error of 0.5 %."""

SAMPLE = Path(__file__).parent / "assets" / "cifar10_sample"
"""The folder of the embedded sample."""
CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer",
    "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip


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


def carve(
    train: Images,
    test: Images,
    classes: tuple[str, ...],
    name: str,
    config: DataConfig,
) -> Splits:
    """Splits a training set by `config.split_seed`: at random, in fair shares by class.

    A rare class is in every held-out part that has room for one of it, as long as one
    stays for training. Parts whose size the config leaves open get the sizes of
    `HELD_OUT`, shrunk together to a third of a small dataset.

    Args:
        train: The training set.
        test: The test set, which stays whole.
        classes: Class names in label order.
        name: What the user asked for.
        config: Seed and sizes.

    Returns:
        The five splits.

    Raises:
        UserError: If the held-out parts would leave fewer than half of the images for
            training.
    """
    # A third of the images at most, so that two thirds are left for training.
    shrink = min(1, len(train) / (3 * sum(HELD_OUT.values())))
    usual = {part: max(1, int(size * shrink)) for part, size in HELD_OUT.items()}
    sizes = _held_out_sizes(config, usual)
    n_held_out = sum(sizes.values())
    if n_held_out > len(train) // 2:
        listed = ", ".join(f"{size} {part}" for part, size in sizes.items())
        raise UserError(
            "data",
            f"{name} has {len(train)} training images, too few to hold out "
            f"{n_held_out} ({listed}); at most {len(train) // 2} in all: "
            f"lower calibration_images, proxy_images and selection_images or add "
            f"images",
        )
    parts = stratified_parts(train.labels, sizes, RESERVES, config.split_seed)
    return Splits(
        train=train[parts["rest"]],
        calibration=train[parts["calibration"]],
        proxy=train[parts["proxy"]],
        selection=train[parts["selection"]],
        test=test,
        classes=classes,
        name=name,
    )


def _held_out_sizes(config: DataConfig, usual: Mapping[str, int]) -> dict[str, int]:
    """Held-out part to its size: the config's, or the usual one where that is open."""
    sizes = {}
    for part in HELD_OUT:
        size = getattr(config, f"{part}_images")
        sizes[part] = usual[part] if size is None else size
    return sizes


def load(config: DataConfig) -> Splits:
    """The dataset that `config.data` names, split.

    Raises:
        UserError: If the name is unknown, the data isn't there (with how to get it) or
            the folder isn't usable.
    """
    # A folder that is called like a dataset doesn't hide it.
    loader = DATASETS.get(config.data)
    if loader is None and Path(config.data).is_dir():
        loader = _load_folder
    if loader is None:
        reason = unknown_dataset_reason(config.data)
        raise UserError("data", f"{reason}, or a folder with train/")
    splits = loader(config)
    # Cut after splitting, so that the held-out parts don't depend on these limits.
    return replace(
        splits,
        train=splits.train[: config.max_train_images],
        test=splits.test[: config.max_test_images],
    )


def unknown_dataset_reason(name: str) -> str:
    """What to say about a name that isn't in `DATASETS`."""
    similar = nearest_names(name, DATASETS)
    if similar:
        return f"no dataset {name!r}; did you mean {similar[0]!r}"
    return f"no dataset {name!r}; known: {', '.join(DATASETS)}"


def cache_folder() -> Path:
    """Where fetched datasets are kept.

    The environment variable AUTOPRUNE_CACHE, else `~/.cache/autoprune`.
    """
    return Path(os.environ.get("AUTOPRUNE_CACHE", Path.home() / ".cache" / "autoprune"))


def _load_sample(config: DataConfig) -> Splits:
    """The part of CIFAR-10 that comes with the package; its splits are fixed."""
    index = json.loads((SAMPLE / "index.json").read_text())
    parts = {}
    for part, entry in index.items():
        pixels = read_grid(SAMPLE / f"{part}.webp")
        parts[part] = Images(pixels, torch.tensor(entry["labels"]))
    stored = {part: len(parts[part]) for part in HELD_OUT}
    # The first of each part: every start of the stored parts is balanced by class.
    for part, size in _held_out_sizes(config, stored).items():
        if size > stored[part]:
            raise UserError(
                f"{part}_images",
                f"the embedded sample holds {stored[part]}, got "
                f"{size}; more are in the dataset cifar10",
            )
        parts[part] = parts[part][:size]
    return Splits(**parts, classes=CIFAR10_CLASSES, name="sample")


def _load_digits(config: DataConfig) -> Splits:
    """scikit-learn's handwritten digits as 16x16 images.

    1,437 are for training, 360 for the test, always the same.
    """
    digits = import_digits().load_digits()
    # Shades go from 0 to 16.
    grey = torch.from_numpy(digits.images * 255 / 16).round().to(torch.uint8)
    # From 8x8 to 16x16 pixels, and from grey to three equal colours.
    enlarged = grey.repeat_interleave(2, 1).repeat_interleave(2, 2)
    pixels = enlarged[:, None].repeat(1, 3, 1, 1)
    images = Images(pixels, torch.from_numpy(digits.target).long())
    order = shuffled(len(images), seed=0)
    test, train = order.split([360, len(images) - 360])
    return carve(images[train], images[test], tuple("0123456789"), "digits", config)


def import_digits() -> ModuleType:
    """scikit-learn's module of datasets.

    Raises:
        UserError: If scikit-learn isn't installed.
    """
    try:
        import sklearn.datasets
    except ImportError as error:
        raise UserError(
            "data",
            "digits come with scikit-learn; install it with: pip install scikit-learn",
        ) from error
    return sklearn.datasets


def _load_folder(config: DataConfig) -> Splits:
    """The user's folder: `train/` and the test images, a folder of images a class.

    All images are read into memory: 150 kB each at 224x224.
    """
    root = Path(config.data)
    train_files = find_images(root, "train")
    part = find_test_part(root)
    if part is None:
        train = Images(*read_images(train_files, config.image_size))
        return _without_test_part(train, tuple(train_files), config)
    test_files = find_images(root, part)
    for name in sorted(train_files.keys() ^ test_files.keys()):
        home = "train" if name in train_files else part
        raise UserError(
            "data",
            f"class {name!r} is only in {config.data}/{home}; train/ and {part}/ "
            f"need the same classes",
        )
    train = Images(*read_images(train_files, config.image_size))
    test = Images(*read_images(test_files, config.image_size))
    # Read by class; in that order max_test_images would cut whole classes off.
    test = test[stratified_order(test.labels, seed=0)]
    splits = carve(train, test, tuple(train_files), config.data, config)
    if part == "test":
        return splits
    return replace(splits, remarks=(f"the test images are those of {root / part}",))


def _without_test_part(
    train: Images, classes: tuple[str, ...], config: DataConfig
) -> Splits:
    """The splits of a folder that has training images only."""
    size = min(MAX_CARVED_TEST, len(train) // 5)
    # Always the same ones, so that runs with several split seeds can be compared.
    parts = stratified_parts(train.labels, {"test": size}, RESERVES, seed=0)
    remark = (
        f"{config.data} has neither test/ nor val/: {size} of the {len(train)} "
        f"training images, by class, are kept apart as the test split; the accuracy of "
        f"a network that was trained on them comes out too high"
    )
    splits = carve(
        train[parts["rest"]], train[parts["test"]], classes, config.data, config
    )
    return replace(splits, remarks=(remark,))


def _load_cifar10(config: DataConfig) -> Splits:
    """CIFAR-10 as `autoprune.data.fetching` stored it."""
    path = cache_folder() / "cifar10.npz"
    if not path.exists():
        raise UserError(
            "data",
            "CIFAR-10 isn't on this machine yet; fetch it with: autoprune data cifar10",
        )
    parts = {}
    try:
        # np.load leaves a file open that it can't read.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            for part in ("train", "test"):
                pixels = torch.from_numpy(arrays[f"{part}_pixels"])
                labels = torch.from_numpy(arrays[f"{part}_labels"])
                parts[part] = Images(pixels, labels)
    except (ValueError, KeyError, EOFError, BadZipFile) as error:
        again = "delete it and fetch it again with: autoprune data cifar10"
        raise UserError(
            "data", f"{str(path)!r} is damaged ({type(error).__name__}); {again}"
        ) from error
    return carve(parts["train"], parts["test"], CIFAR10_CLASSES, "cifar10", config)


DATASETS: dict[str, Callable[[DataConfig], Splits]] = {
    "sample": _load_sample,
    "cifar10": _load_cifar10,
    "digits": _load_digits,
}
"""The datasets by name: each a function from the settings to the five splits."""
