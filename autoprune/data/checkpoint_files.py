"""Which tensors lie in the files of training scripts; reading them executes no code."""

import argparse
import collections
import pathlib
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from autoprune.errors import UserError


@dataclass(frozen=True)
class TensorSet:
    """A set of tensors in a file.

    Attributes:
        key: The names on the way to it, joined by dots; empty at the top.
        tensors: Name to tensor.
    """

    key: str
    tensors: dict[str, Tensor]


def read_sets(path: Path) -> list[TensorSet]:
    """Every set of tensors in a file, the outermost first; there is at least one.

    Args:
        path: A `.safetensors` or `torch.save` file.

    Raises:
        UserError: If it is neither, would need to execute code, or holds no tensors
            with names.
    """
    sets = list(_find_sets(_read_file(path), []))
    if not sets:
        raise UserError(
            "weights", f"{str(path)!r} holds no state dict (name -> tensor)"
        )
    return sets


def _read_file(path: Path) -> Any:
    """Whatever a `.safetensors` or `torch.save` file holds."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Weights of any device are read onto the CPU.
        with torch.serialization.safe_globals(_harmless_types()):
            return torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            "weights",
            f"{str(path)!r} holds objects that execute code when loaded; "
            f"save its state_dict() with torch.save or safetensors",
        ) from error
    # torch and safetensors raise a dozen types for a damaged file.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if "TorchScript" in reason:
            raise UserError(
                "weights",
                f"{str(path)!r} is TorchScript; load it with torch.jit.load and save "
                f"its state_dict() with torch.save or safetensors",
            ) from error
        raise UserError(
            "weights",
            f"{str(path)!r} is neither safetensors nor torch.save's ({reason})",
        ) from error


def _harmless_types() -> list[Any]:
    """Types of plain data beside weights that PyTorch alone wouldn't read.

    Training scripts store their arguments, paths and NumPy's numbers. Making one of
    these calls no code but Python's and NumPy's own.
    """
    types: list[Any] = [argparse.Namespace, collections.defaultdict]
    types += [pathlib.PosixPath, pathlib.PurePosixPath, np.dtype, np.ndarray]
    types += [type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "u1")]
    # What NumPy's numbers and arrays are read with; files call its module as the
    # version did that wrote them.
    readers = {"scalar": np.float64(0), "_reconstruct": np.zeros(0)}
    for name, value in readers.items():
        for package in ("numpy.core", "numpy._core"):
            types.append((value.__reduce__()[0], f"{package}.multiarray.{name}"))
    return types


def _find_sets(loaded: object, path: list[str]) -> Iterator[TensorSet]:
    """The sets of tensors in what a file holds, the outermost first.

    Lists inside and what is filed under numbers are left out: such are optimizers'
    states.
    """
    if not path and isinstance(loaded, list | tuple):
        # A script saved the weights together with a number of the epoch, say.
        for number, item in enumerate(loaded):
            yield from _find_sets(item, [str(number)])
    if not isinstance(loaded, Mapping):
        return
    named = {key: value for key, value in loaded.items() if isinstance(key, str)}
    tensors = {key: value for key, value in named.items() if isinstance(value, Tensor)}
    if tensors:
        yield TensorSet(".".join(path), tensors)
    for key, value in named.items():
        yield from _find_sets(value, [*path, key])
