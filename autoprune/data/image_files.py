"""Images from files: folders with one subfolder a class, and grids in one picture."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from autoprune.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
"""Endings of the files that are read, in lower case; others are left out."""
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


def read_images(files: dict[str, list[Path]], side: int) -> tuple[Tensor, Tensor]:
    """Reads the images of all classes into memory, one class after the other.

    Args:
        files: Class to its files, as from `find_images`.
        side: Height and width; images are scaled and cropped at the centre. An image of
            224 pixels takes 150 kB.

    Returns:
        Pixels, uint8 `(n_images, 3, side, side)`, and labels, int64 `(n_images,)`.

    Raises:
        UserError: If an image can't be read; it is named.
    """
    paths: list[Path] = []
    labels: list[int] = []
    for label, paths_of_class in enumerate(files.values()):
        paths += paths_of_class
        labels += [label] * len(paths_of_class)
    pixels = np.empty((len(paths), 3, side, side), np.uint8)

    def read(index: int) -> None:
        pixels[index] = _read_image(paths[index], side)

    # Threads are enough: Pillow decodes without Python's lock.
    with ThreadPoolExecutor() as pool:
        # As a list, so that the first error is raised here.
        list(pool.map(read, range(len(paths))))
    return torch.from_numpy(pixels), torch.tensor(labels)


def _read_image(path: Path, side: int) -> np.ndarray:
    """One image, uint8 `(3, side, side)`."""
    try:
        with Image.open(path) as image:
            if image.mode in ("I", "F"):
                raise _unreadable(path, f"mode {image.mode}, whose range isn't known")
            colours = _eight_bits(image).convert("RGB")
            fitted = ImageOps.fit(colours, (side, side), Image.Resampling.BILINEAR)
    except UserError:
        # It is a ValueError too, and would lose its reason below.
        raise
    # What Pillow's readers raise for files that are damaged or no images.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _unreadable(path, type(error).__name__) from error
    return np.asarray(fitted).transpose(2, 0, 1)


def _unreadable(path: Path, reason: str) -> UserError:
    """The error for an image that can't be used."""
    return UserError(
        "data", f"can't read image {str(path)!r} ({reason}); replace or remove it"
    )


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scales 16 bits to 8, so that white stays white; other images stay as they are."""
    if not image.mode.startswith("I;16"):
        return image
    # Pillow's own conversion would cut all above 255 off.
    values = (np.asarray(image, np.uint32) + 128) // 257
    return Image.fromarray(values.astype(np.uint8))


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
