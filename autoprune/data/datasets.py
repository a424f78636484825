"""Datasets by name or folder, and their five splits."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol
from zipfile import BadZipFile

import numpy as np
import torch

from autoprune.config import DataConfig
from autoprune.data.folders import FolderDataset, enlarged_remark
from autoprune.data.image_files import read_grid
from autoprune.data.image_fitting import fit_pixels
from autoprune.data.images import Images, Splits, batches, normalize, seeded
from autoprune.data.places import no_dataset
from autoprune.data.preprocessing import Preprocessing
from autoprune.data.preprocessing_sources import preprocessing_of
from autoprune.data.splitting import HELD_OUT, carve, held_out_sizes
from autoprune.data.stratify import shuffled
from autoprune.errors import UserError

__all__ = [
    "CIFAR10_CLASSES",
    "DATASETS",
    "HELD_OUT",
    "SAMPLE",
    "Dataset",
    "Images",
    "Splits",
    "StoredDataset",
    "batches",
    "cache_folder",
    "carve",
    "import_digits",
    "load",
    "normalize",
    "open_dataset",
    "read_dataset",
    "seeded",
    "stored_preprocessing",
]
# Images, splits and batches are found here too, beside the datasets that they are of.

SAMPLE = Path(__file__).parent / "assets" / "cifar10_sample"
"""The folder of the embedded sample."""
CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer",
    "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip


class Dataset(Protocol):
    """A dataset that was found, before its images are made to fit a network.

    Attributes:
        classes: Class names in label order.
    """

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in label order."""
        ...

    def read(self, preprocessing: Preprocessing) -> Splits:
        """The images as a network reads them.

        Args:
            preprocessing: The network's.
        """
        ...


@dataclass(frozen=True)
class StoredDataset:
    """A dataset by name, whose images are all of one size.

    Attributes:
        splits: Its images as they are stored.
        is_resized: Whether the user asked for another size. Without that, images are
            made smaller where a network wants it, but never larger.
    """

    splits: Splits
    is_resized: bool

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in label order."""
        return self.splits.classes

    def read(self, preprocessing: Preprocessing) -> Splits:
        """The images as a network reads them.

        Args:
            preprocessing: The network's.
        """
        height, width = self.splits.train.pixels.shape[2:]
        size = preprocessing.size
        is_larger = size is not None and (size[0] > height or size[1] > width)
        if size is None or (is_larger and not self.is_resized):
            preprocessing = preprocessing.with_size((height, width), "the images' own")
            # It was for another size, and would enlarge these.
            preprocessing = replace(preprocessing, crop=1.0)
        parts = {}
        for part in ("train", "calibration", "proxy", "selection", "test"):
            images = getattr(self.splits, part)
            pixels = fit_pixels(images.pixels, preprocessing)
            parts[part] = Images(pixels, images.labels, preprocessing)
        n_images = sum(len(images) for images in parts.values())
        remarks = enlarged_remark([(height, width)] * n_images, preprocessing)
        return replace(self.splits, **parts, remarks=self.splits.remarks + remarks)


def open_dataset(config: DataConfig) -> Dataset:
    """The dataset that `config.data` names.

    Raises:
        UserError: If the name is unknown, the data isn't there (with how to get it) or
            the folder isn't usable.
    """
    # A folder that is called like a dataset doesn't hide it.
    loader = DATASETS.get(config.data)
    if loader is not None:
        return StoredDataset(loader(config), config.image_size is not None)
    if Path(config.data).is_dir():
        return FolderDataset.open(config)
    raise no_dataset(config.data)


def load(config: DataConfig, preprocessing: Preprocessing | None = None) -> Splits:
    """The dataset that `config.data` names, split.

    Args:
        config: Which dataset, and how it is split.
        preprocessing: Of the network that reads it; None for what the config says, and
            ImageNet's mean and deviation where it says nothing.

    Raises:
        UserError: As `open_dataset`, or if an image can't be read.
    """
    if preprocessing is None:
        preprocessing = preprocessing_of(None, config)
    return read_dataset(open_dataset(config), config, preprocessing)


def read_dataset(
    dataset: Dataset, config: DataConfig, preprocessing: Preprocessing
) -> Splits:
    """The splits of a dataset, as long as the config wants them.

    Args:
        dataset: As `open_dataset` found it.
        config: The same.
        preprocessing: Of the network that reads the images.
    """
    splits = dataset.read(preprocessing)
    # Cut after splitting, so that the held-out parts don't depend on these limits.
    return replace(
        splits,
        train=splits.train[: config.max_train_images],
        test=splits.test[: config.max_test_images],
    )


def stored_preprocessing(config: Mapping[str, Any]) -> Preprocessing:
    """The preprocessing of a run, as it was started.

    Args:
        config: What its config.yaml holds.
    """
    stored = config.get("preprocessing")
    if stored is not None:
        return Preprocessing.from_dict(stored)
    # Runs of earlier versions knew one mean and deviation, and one square size for
    # folders.
    data = config["data"]
    size = None if data["data"] in DATASETS else data["image_size"]
    return preprocessing_of(None, DataConfig(image_size=size))


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
    for part, size in held_out_sizes(config, stored).items():
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
