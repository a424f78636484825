"""Images from files: folders with one subfolder a class, and grids in one picture."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from autoprune.data.image_fitting import fit_array, fit_image
from autoprune.data.preprocessing import Preprocessing, checked_pixels
from autoprune.errors import UserError

ARRAY_SUFFIX = ".npy"
"""Ending of NumPy arrays, `(height, width)` or `(height, width, channels)`."""
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff", ARRAY_SUFFIX,
)  # fmt: skip
"""Endings of the files that are read, in lower case; others are left out."""
MODE_16_BITS = "I;16"
"""What Pillow's modes of 16 bits begin with, all of them grey."""
TEST_PARTS = ("test", "val", "valid", "validation")
"""Subfolders that may hold the test images; the first that has classes counts."""
LAYOUT = (
    "expected train/ with one folder of images a class, and test/ or val/ in the same "
    "way"
)
"""What to say where a folder isn't laid out so."""


def find_test_part(root: Path) -> str | None:
    """The subfolder that holds a dataset's test images.

    Args:
        root: The dataset's folder.

    Returns:
        One of `TEST_PARTS`, or None where there is none of them.
    """
    present = [part for part in TEST_PARTS if (root / part).is_dir()]
    for part in present:
        # Competitions leave the images of test/ unlabelled, beside a labelled val/.
        if _class_folders(root / part):
            return part
    # One without classes is refused when it is read: it may be laid out by mistake.
    return present[0] if present else None


def _class_folders(folder: Path) -> list[Path]:
    """The folders of a part that stand for classes, in the order of their names.

    By name, because labels are numbered in this order.
    """
    classes = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith("."):
            classes.append(path)
    return classes


def find_images(root: Path, part: str) -> dict[str, list[Path]]:
    """The image files of one part of a dataset, by class.

    Hidden files and folders, whose names start with a dot, are left out.

    Args:
        root: The dataset's folder.
        part: The subfolder to look in, such as "train".

    Returns:
        Class to its files; both in the order of their names.

    Raises:
        UserError: If there is no such subfolder, no class in it, or no image of a
            class.
    """
    folder = root / part
    if not folder.is_dir():
        raise UserError("data", f"{str(root)!r} has no {part}/; {LAYOUT}")
    classes = _class_folders(folder)
    if not classes:
        raise UserError("data", f"no class folders in {str(folder)!r}; {LAYOUT}")
    files = {}
    for path in classes:
        files[path.name] = sorted(_image_files(path))
        if not files[path.name]:
            raise UserError(
                "data",
                f"no images in {str(path)!r}; known endings: "
                f"{', '.join(IMAGE_SUFFIXES)}",
            )
    return files


def _image_files(folder: Path) -> Iterator[Path]:
    """The images in a folder and its subfolders, in no particular order."""
    for path in folder.rglob("*"):
        inner_parts = path.relative_to(folder).parts
        is_hidden = any(part.startswith(".") for part in inner_parts)
        if path.suffix.lower() in IMAGE_SUFFIXES and not is_hidden:
            yield path


class ImageHeader(NamedTuple):
    """What is known of an image before it is decoded.

    Attributes:
        height: In pixels.
        width: In pixels.
        is_float: Whether its values need more than 8 bits.
    """

    height: int
    width: int
    is_float: bool


def read_headers(paths: Sequence[Path]) -> list[ImageHeader]:
    """The sizes of images, without decoding them.

    Args:
        paths: The files.

    Raises:
        UserError: If one is no image; it is named.
    """
    with ThreadPoolExecutor() as pool:
        return list(pool.map(_read_header, paths))


def _read_header(path: Path) -> ImageHeader:
    with _naming(path):
        if path.suffix.lower() == ARRAY_SUFFIX:
            # Mapped, so that only the header is read.
            values = np.load(path, mmap_mode="r", allow_pickle=False)
            height, width = _array_shape(path, values)[:2]
            return ImageHeader(height, width, values.dtype != np.uint8)
        with Image.open(path) as image:
            is_float = image.mode.startswith(MODE_16_BITS)
            return ImageHeader(image.height, image.width, is_float)


def read_images(
    files: Mapping[str, list[Path]], preprocessing: Preprocessing, is_float: bool
) -> tuple[Tensor, Tensor]:
    """Reads the images of all classes into memory, one class after the other.

    Args:
        files: Class to its files, as from `find_images`.
        preprocessing: Of the network, with the size to which images are scaled and
            cropped. An image of 224 pixels takes 150 kB.
        is_float: Whether some image needs more than 8 bits; all are kept as floats
            then, which take four times as much.

    Returns:
        Pixels `(n_images, channels, height, width)`, uint8 or float32 in [0, 1], and
        labels, int64 `(n_images,)`.

    Raises:
        UserError: If an image can't be read; it is named.
    """
    paths: list[Path] = []
    labels: list[int] = []
    for label, paths_of_class in enumerate(files.values()):
        paths += paths_of_class
        labels += [label] * len(paths_of_class)
    assert preprocessing.size is not None, "one array holds images of one size"
    shape = (len(paths), preprocessing.channels, *preprocessing.size)
    pixels = np.empty(shape, np.float32 if is_float else np.uint8)

    def read(index: int) -> None:
        image = _read_image(paths[index], preprocessing)
        if is_float and image.dtype == np.uint8:
            image = image.astype(np.float32) / 255
        pixels[index] = image

    # Threads are enough: Pillow decodes without Python's lock.
    with ThreadPoolExecutor() as pool:
        # As a list, so that the first error is raised here.
        list(pool.map(read, range(len(paths))))
    return torch.from_numpy(pixels), torch.tensor(labels)


def _read_image(path: Path, preprocessing: Preprocessing) -> np.ndarray:
    """One image that fits the network, `(channels, height, width)`."""
    channels = preprocessing.channels
    with _naming(path):
        if path.suffix.lower() == ARRAY_SUFFIX:
            values = np.load(path, allow_pickle=False)
            _array_shape(path, values)
            return fit_array(_planes(path, values, channels), preprocessing)
        with Image.open(path) as image:
            if image.mode in ("I", "F"):
                raise _unreadable(path, f"mode {image.mode}, whose range isn't known")
            # Pillow has no colours of 16 bits, and cuts off what is above 255 where it
            # converts grey.
            if image.mode.startswith(MODE_16_BITS):
                values = np.asarray(image, np.uint16)
                return fit_array(_planes(path, values, channels), preprocessing)
            return fit_image(_in_channels(path, image, channels), preprocessing)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turns what readers raise for damaged files into an error that names the file."""
    try:
        yield
    except UserError:
        # It is a ValueError too, and would lose its reason below.
        raise
    # What Pillow's and NumPy's readers raise for files that are damaged or no images.
    except (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        Image.DecompressionBombError,
    ) as error:
        raise _unreadable(path, type(error).__name__) from error


def _array_shape(path: Path, values: np.ndarray) -> tuple[int, ...]:
    """Height, width and, where there are several, channels of an array."""
    if values.ndim not in (2, 3):
        raise _unreadable(
            path, f"shape {values.shape}, expected (height, width, channels)"
        )
    return values.shape


def _planes(path: Path, values: np.ndarray, channels: int) -> np.ndarray:
    """An array's channels, `(channels, height, width)`: uint8, or float32 in [0, 1].

    Grey is repeated for a network that reads colours; anything else must fit.
    """
    planes = values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
    if len(planes) == 1 and channels == 3:
        planes = planes.repeat(3, 0)
    if len(planes) != channels:
        raise _unreadable(path, f"{_count(len(planes))}, the network reads {channels}")
    try:
        # The one rule for values, whoever hands them in.
        return checked_pixels(torch.from_numpy(planes.copy())[None])[0].numpy()
    except (UserError, TypeError) as error:
        reason = error.reason if isinstance(error, UserError) else str(values.dtype)
        raise _unreadable(path, reason) from error


def _in_channels(path: Path, image: Image.Image, channels: int) -> Image.Image:
    """An image of 8 bits with the channels that the network reads."""
    if channels == 1:
        return image.convert("L")
    if channels == 3:
        return image.convert("RGB")
    if len(image.getbands()) == channels:
        return image
    raise _unreadable(
        path,
        f"{_count(len(image.getbands()))}, the network reads {channels}; images of "
        f"several channels may be .npy files, height x width x channels",
    )


def _count(channels: int) -> str:
    return "1 channel" if channels == 1 else f"{channels} channels"


def _unreadable(path: Path, reason: str) -> UserError:
    """The error for an image that can't be used."""
    return UserError(
        "data", f"can't read image {str(path)!r} ({reason}); replace or remove it"
    )


def read_grid(path: Path, side: int = 32) -> Tensor:
    """Reads the images that one picture holds side by side, row by row.

    Args:
        path: The picture.
        side: Height and width of each image.

    Returns:
        Pixels, uint8 `(n_images, 3, side, side)`.
    """
    with Image.open(path) as image:
        grid = np.asarray(image.convert("RGB"))
    height, width, _ = grid.shape
    cells = grid.reshape(height // side, side, width // side, side, 3)
    # To row of the grid, column of the grid, colour, row and column of the image.
    cells = cells.transpose(0, 2, 4, 1, 3)
    return torch.from_numpy(cells.reshape(-1, 3, side, side))
