"""Networks of one's own: from `package.module:factory` or `./file.py:factory`."""

import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from autoprune.data.factory_sources import EXPECTED, lacks_factory
from autoprune.data.places import factory_file, split_factory
from autoprune.errors import UserError


@dataclass(frozen=True)
class OwnFactory:
    """A factory of the user's, as other programs can call it.

    Attributes:
        folder: Where its module or package lies.
        module: The module's name, once that folder is on the import path.
        attribute: The factory's name there.
        options: What it is called with.
    """

    folder: Path
    module: str
    attribute: str
    options: dict[str, int]


def find_own(name: str, n_classes: int) -> OwnFactory:
    """Where a factory lies.

    Args:
        name: `package.module:factory` or `./file.py:factory`.
        n_classes: Classes of the data.

    Raises:
        UserError: As for `build_own`.
    """
    factory = _import_factory(name)
    home, attribute = split_factory(name)
    path = factory_file(home)
    if path is None:
        folder, module = _folder_of(home), home
    else:
        folder, module = _package_of(path.resolve())
    return OwnFactory(folder, module, attribute, _options(factory, n_classes))


def build_own(name: str, n_classes: int) -> nn.Module:
    """The network that a factory of the user's makes.

    The factory is called with `n_classes=` if it takes that argument, else with
    `num_classes=` if it takes that, else with nothing.

    Args:
        name: `package.module:factory` or `./file.py:factory`.
        n_classes: Classes of the data.

    Raises:
        UserError: If the module or file can't be imported, has no such name, or that is
            not a callable which returns a network.
    """
    factory = _import_factory(name)
    try:
        model = factory(**_options(factory, n_classes))
    except UserError:
        raise
    # Whatever the user's own code raises.
    except Exception as error:
        raise UserError("model", f"{name} failed ({_in_short(error)})") from error
    if not isinstance(model, nn.Module):
        raise UserError(
            "model",
            f"{name} must return a torch.nn.Module, got {type(model).__name__}",
        )
    return model


def _options(factory: Callable[..., Any], n_classes: int) -> dict[str, int]:
    """What a factory is called with."""
    try:
        accepted = inspect.signature(factory).parameters
    # Some of what is written in C doesn't tell what it takes.
    except ValueError:
        return {}
    # The first that it takes: a factory with both would mean the same by them.
    for argument in ("n_classes", "num_classes"):
        if argument in accepted:
            return {argument: n_classes}
    return {}


def _import_factory(name: str) -> Callable[..., Any]:
    """The callable that a name means."""
    home, attribute = split_factory(name)
    module = _import_home(name, home)
    if not hasattr(module, attribute):
        raise lacks_factory(home, attribute, _callables(module))
    factory = getattr(module, attribute)
    if isinstance(factory, nn.Module):
        raise UserError(
            "model",
            f"{name} is one network; expected a callable that returns a new one, such "
            f"as its class",
        )
    if not callable(factory):
        raise UserError(
            "model",
            f"{name!r} is a {type(factory).__name__}, expected a callable that returns "
            f"a network",
        )
    return factory


def _callables(module: ModuleType) -> list[str]:
    """Names in a module that may be meant for a factory."""
    return [name for name, value in vars(module).items() if callable(value)]


def _import_home(name: str, home: str) -> ModuleType:
    """The module that a factory lies in, imported."""
    path = factory_file(home)
    try:
        if path is not None:
            return _import_file(path)
        # An installed command doesn't look in the current folder, and it is where users
        # keep their networks. First, as `python -m` has it: a folder of theirs may be
        # called like an installed package.
        _look_first_in(os.getcwd())
        return importlib.import_module(home)
    # A module's own code may raise anything while it is imported.
    except Exception as error:
        raise UserError(
            "model", f"can't import {name!r} ({_in_short(error)}); {EXPECTED}"
        ) from error


def _look_first_in(folder: str) -> None:
    """Puts a folder in front of the import path, unless it is there."""
    if sys.path[0] != folder and not (sys.path[0] == "" and folder == os.getcwd()):
        sys.path.insert(0, folder)


def _import_file(path: Path) -> ModuleType:
    """The module in a file; modules beside it can be imported by it."""
    path = path.resolve()
    folder, name = _package_of(path)
    _look_first_in(str(folder))
    if "." in name:
        module = importlib.import_module(name)
        if _lies_in(module, path):
            return module
    elif name in sys.modules and _lies_in(sys.modules[name], path):
        return sys.modules[name]
    # Another module of that name is imported already, and stays what it is.
    if name in sys.modules:
        name = f"{name} of {folder}"
        if name in sys.modules:
            return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, "it ends in .py"
    assert spec.loader is not None, "as every file that ends so has one"
    module = importlib.util.module_from_spec(spec)
    # Before it is executed, since dataclasses look their module up.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _folder_of(home: str) -> Path:
    """The folder from which an imported module can be imported by its name."""
    file = sys.modules[home].__file__
    # What Python itself brings has no file, and is found from everywhere.
    if file is None:
        return Path.cwd()
    path = Path(file).resolve()
    n_above = home.count(".") + (path.name == "__init__.py")
    return path.parents[n_above]


def _package_of(path: Path) -> tuple[Path, str]:
    """The folder to import a file from, and its module's name there.

    Inside of a package it is that package's module, so that its relative imports work.
    """
    folder = path.parent
    parts = [] if path.name == "__init__.py" else [path.stem]
    while (folder / "__init__.py").is_file():
        parts.insert(0, folder.name)
        folder = folder.parent
    return folder, ".".join(parts)


def _lies_in(module: ModuleType, path: Path) -> bool:
    """Whether a module was imported from a file."""
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).resolve() == path


def _in_short(error: Exception) -> str:
    """An exception of the user's own code, and where it came from, in one line."""
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    # Not the innermost frame, which often lies in PyTorch or in Python itself.
    foreign = ("<", sys.prefix, sys.base_prefix, __file__)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(foreign):
            return f"{text}, {Path(frame.filename).name} line {frame.lineno}"
    return text
