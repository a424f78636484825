"""Datasets by name or folder, the five splits, batches as tensors.

Images stay in memory as uint8 `(n, 3, height, width)`; a batch is augmented and
normalised as one tensor, so no image is touched by Python alone.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import ModuleType
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from autoprune.config import DataConfig
from autoprune.errors import UserError, nearest_names

# The statistics that the public CIFAR-10 ResNets were trained with; ImageNet's, and
# what torchvision's weights expect.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Images:
    """Labelled images of one split.

    Attributes:
        pixels: uint8 `(n, 3, height, width)`.
        labels: int64 `(n,)`.
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index) -> "Images":
        return Images(self.pixels[index], self.labels[index])

    @cached_property
    def inputs(self) -> Tensor:
        """The whole split normalised, float32 `(n, 3, height, width)`, channels last;
        made once.
        """
        return normalize(self.pixels)


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
    """

    train: Images
    calibration: Images
    proxy: Images
    selection: Images
    test: Images
    classes: tuple[str, ...]
    name: str

    @property
    def example(self) -> Tensor:
        """One normalised input, float32 `(1, 3, height, width)`."""
        return normalize(self.train.pixels[:1])


def normalize(pixels: Tensor) -> Tensor:
    """uint8 `(n, 3, height, width)` to float32 with the mean and deviation that the
    networks expect, channels last.
    """
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return ((pixels.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, torch's random numbers on the CPU start from a seed; outside nobody
    notices.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def batches(
    images: Images, batch_size: int, seed: int, epoch: int, flip: bool = True
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of shuffled, augmented batches `(inputs, labels)`; order and crops
    depend on seed and epoch only.

    The last incomplete batch is dropped unless it is the only one. Crops move by up to
    an eighth of the size (4 of 32 pixels) into a black border. With `flip`, every image
    alternates between its two mirror images from epoch to epoch, which converges faster
    than drawing a side at random (Jordan 2024, "94% on CIFAR-10 in 3.29 seconds",
    section 3.6).
    """
    first_side = torch.rand(len(images), generator=torch.Generator().manual_seed(seed)) < 0.5
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    order = torch.randperm(len(images), generator=generator)
    n_batches = max(1, len(images) // batch_size)
    for index in order[: n_batches * batch_size].split(batch_size):
        pixels = _crop(images.pixels[index], generator)
        if flip:
            flipped = first_side[index] ^ bool(epoch % 2)
            pixels = torch.where(flipped.view(-1, 1, 1, 1), pixels.flip(3), pixels)
        yield normalize(pixels), images.labels[index]


def _crop(pixels: Tensor, generator: torch.Generator) -> Tensor:
    n, _, height, width = pixels.shape
    margin = height // 8
    padded = F.pad(pixels, [margin] * 4)
    top, left = torch.randint(0, 2 * margin + 1, (2, n, 1, 1), generator=generator)
    rows = top + torch.arange(height).view(1, -1, 1)
    columns = left + torch.arange(width).view(1, 1, -1)
    samples = torch.arange(n).view(-1, 1, 1)
    return padded.permute(0, 2, 3, 1)[samples, rows, columns].permute(0, 3, 1, 2)


def _shuffled(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


HELD_OUT = {"calibration": 1000, "proxy": 1000, "selection": 3000}


def carve(train: Images, test: Images, classes: tuple[str, ...], name: str, config: DataConfig) -> Splits:
    """Splits the training set by `config.split_seed`: held-out parts first, what
    remains is for training.

    Parts whose size the config leaves open get the sizes of `HELD_OUT`, shrunk together
    to a third of a small dataset.

    Raises:
        UserError: If the held-out parts would leave fewer than half of the images for
            training.
    """
    shrink = min(1, len(train) / (3 * sum(HELD_OUT.values())))
    sizes = _held_out_sizes(config, [max(1, int(size * shrink)) for size in HELD_OUT.values()])
    if sum(sizes) > len(train) // 2:
        wanted = ", ".join(f"{size} {part}" for part, size in zip(HELD_OUT, sizes, strict=True))
        raise UserError(
            "data", f"{name} has {len(train)} training images, too few to hold out "
            f"{sum(sizes)} ({wanted}); at most "
            f"{len(train) // 2} in all: lower calibration_images, proxy_images and "
            f"selection_images or add images"
        )
    order = _shuffled(len(train), config.split_seed)
    calibration, proxy, selection, rest = order.split([*sizes, len(train) - sum(sizes)])
    return Splits(train[rest], train[calibration], train[proxy], train[selection], test, classes, name)


def _held_out_sizes(config: DataConfig, automatic: Sequence[int]) -> list[int]:
    asked = [getattr(config, f"{part}_images") for part in HELD_OUT]
    return [size if wish is None else wish for wish, size in zip(asked, automatic, strict=True)]


def load(config: DataConfig) -> Splits:
    """The dataset that `config.data` names, split.

    Raises:
        UserError: If the name is unknown, the data isn't there (with how to get it) or
            the folder isn't usable.
    """
    loader = DATASETS.get(config.data)
    if loader is None and Path(config.data).is_dir():
        loader = _load_folder
    if loader is None:
        raise UserError("data", f"{unknown_dataset(config.data)}, or a folder with train/ and test/")
    splits = loader(config)
    train, test = splits.train[: config.max_train_images], splits.test[: config.max_test_images]
    return replace(splits, train=train, test=test)


def unknown_dataset(name: str) -> str:
    """What to say about a name that isn't in `DATASETS`."""
    near = nearest_names(name, DATASETS)
    return f"no dataset {name!r}; " + (f"did you mean {near[0]!r}" if near else "known: " + ", ".join(DATASETS))


SAMPLE = Path(__file__).parent / "assets" / "cifar10_sample"
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def _load_sample(config: DataConfig) -> Splits:
    index = json.loads((SAMPLE / "index.json").read_text())
    parts = {part: Images(_read_grid(SAMPLE / f"{part}.webp"), torch.tensor(index[part]["labels"])) for part in index}
    stored = [len(parts[part]) for part in HELD_OUT]
    for part, size in zip(HELD_OUT, _held_out_sizes(config, stored), strict=True):
        if size > len(parts[part]):
            raise UserError(
                f"{part}_images", f"the embedded sample holds {len(parts[part])}, got "
                f"{size}; more are in the dataset cifar10"
            )
        parts[part] = parts[part][:size]
    return Splits(**parts, classes=CIFAR10_CLASSES, name="sample")


def _read_grid(path: Path, side: int = 32) -> Tensor:
    """The images of a grid row by row, uint8 `(n, 3, side, side)`."""
    with Image.open(path) as image:
        grid = np.asarray(image.convert("RGB"))
    height, width, _ = grid.shape
    cells = grid.reshape(height // side, side, width // side, side, 3)
    return torch.from_numpy(cells.transpose(0, 2, 4, 1, 3).reshape(-1, 3, side, side))


def _load_digits(config: DataConfig) -> Splits:
    """scikit-learn's handwritten digits as 16x16 images: 1,437 for training, 360 for
    the test, always the same.
    """
    digits = import_digits().load_digits()
    grey = torch.from_numpy(digits.images * 255 / 16).round().to(torch.uint8)
    pixels = grey.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None].repeat(1, 3, 1, 1)
    images = Images(pixels, torch.from_numpy(digits.target).long())
    test, train = _shuffled(len(images), seed=0).split([360, len(images) - 360])
    return carve(images[train], images[test], tuple("0123456789"), "digits", config)


def import_digits() -> ModuleType:
    try:
        import sklearn.datasets
    except ImportError as error:
        raise UserError("data", "digits come with scikit-learn; install it with: pip install scikit-learn") from error
    return sklearn.datasets


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")


def _load_folder(config: DataConfig) -> Splits:
    """`train/` and `test/` with a folder a class, in memory: 150 kB an image at
    224x224.
    """
    train, test = (_scan(Path(config.data), part) for part in ("train", "test"))
    for name in sorted(train.keys() ^ test.keys()):
        part = "train" if name in train else "test"
        raise UserError(
            "data", f"class {name!r} is only in {config.data}/{part}; train/ and test/ "
            f"need the same classes"
        )
    train_images, test_images = (_read_images(files, config.image_size) for files in (train, test))
    # Read by class, so without a shuffle max_test_images would cut whole classes off.
    test_images = test_images[_shuffled(len(test_images), seed=0)]
    return carve(train_images, test_images, tuple(train), config.data, config)


def _scan(root: Path, part: str) -> dict[str, list[Path]]:
    expected = "expected train/ and test/ with one folder of images a class"
    if not (root / part).is_dir():
        raise UserError("data", f"{str(root)!r} has no {part}/; {expected}")
    folders = sorted(path for path in (root / part).iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise UserError("data", f"no class folders in {str(root / part)!r}; {expected}")
    files = {folder.name: sorted(_image_files(folder)) for folder in folders}
    for name, paths in files.items():
        if not paths:
            raise UserError(
                "data", f"no images in {str(root / part / name)!r}; known endings: "
                f"{', '.join(IMAGE_SUFFIXES)}"
            )
    return files


def _image_files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in IMAGE_SUFFIXES and not is_hidden:
            yield path


def _read_images(files: dict[str, list[Path]], side: int) -> Images:
    paths = [path for of_class in files.values() for path in of_class]
    labels = [label for label, of_class in enumerate(files.values()) for _ in of_class]
    pixels = np.empty((len(paths), 3, side, side), np.uint8)

    def read(index: int) -> None:
        pixels[index] = _read_image(paths[index], side)

    with ThreadPoolExecutor() as pool:
        list(pool.map(read, range(len(paths))))
    return Images(torch.from_numpy(pixels), torch.tensor(labels))


def _read_image(path: Path, side: int) -> np.ndarray:
    try:
        with Image.open(path) as image:
            if image.mode in ("I", "F"):
                raise _unreadable(path, f"mode {image.mode}, whose range isn't known")
            fitted = ImageOps.fit(_eight_bits(image).convert("RGB"), (side, side), Image.Resampling.BILINEAR)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _unreadable(path, type(error).__name__) from error
    return np.asarray(fitted).transpose(2, 0, 1)


def _unreadable(path: Path, reason: str) -> UserError:
    return UserError("data", f"can't read image {str(path)!r} ({reason}); replace or remove it")


def _eight_bits(image: Image.Image) -> Image.Image:
    """16 bits scaled to 8, white stays white; Pillow's own conversion cuts all above
    255 off.
    """
    if not image.mode.startswith("I;16"):
        return image
    return Image.fromarray(((np.asarray(image, np.uint32) + 128) // 257).astype(np.uint8))


def cache_folder() -> Path:
    """Where fetched datasets are kept: `$AUTOPRUNE_CACHE`, else `~/.cache/autoprune`.
    """
    return Path(os.environ.get("AUTOPRUNE_CACHE", Path.home() / ".cache" / "autoprune"))


def _load_cifar10(config: DataConfig) -> Splits:
    path = cache_folder() / "cifar10.npz"
    if not path.exists():
        raise UserError("data", "CIFAR-10 isn't on this machine yet; fetch it with: autoprune data cifar10")
    try:
        # np.load leaves a file open that it can't read.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            train, test = (
                Images(torch.from_numpy(arrays[f"{part}_pixels"]), torch.from_numpy(arrays[f"{part}_labels"]))
                for part in ("train", "test")
            )
    except (ValueError, KeyError, EOFError, BadZipFile) as error:
        again = "delete it and fetch it again with: autoprune data cifar10"
        raise UserError("data", f"{str(path)!r} is damaged ({type(error).__name__}); {again}") from error
    return carve(train, test, CIFAR10_CLASSES, "cifar10", config)


DATASETS: dict[str, Callable[[DataConfig], Splits]] = {
    "sample": _load_sample,
    "cifar10": _load_cifar10,
    "digits": _load_digits,
}
