"""Whether a network of one's own can be there, told from sources without importing.

Importing a module of networks imports PyTorch, which takes seconds. What can't be told
without that passes, and is refused by `autoprune.data.factories` if it is wrong.
"""

import ast
import os
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules

from autoprune.data.places import factory_file, split_factory
from autoprune.errors import UserError, nearest_names

EXPECTED = "expected package.module:factory or ./file.py:factory"
DYNAMIC = ("globals", "setattr", "exec", "vars", "__getattr__")
"""Names in a module that may enter others which no source shows."""


def check_factory(name: str) -> None:
    """Refuses a factory whose file, module or name isn't there.

    Args:
        name: `package.module:factory` or `./file.py:factory`.

    Raises:
        UserError: If it isn't; the nearest name is offered.
    """
    home, attribute = split_factory(name)
    path = factory_file(home) or _source_of(home)
    known = None if path is None else _names_in(path)
    if known is not None and attribute not in known:
        raise lacks_factory(home, attribute, known)


def lacks_factory(home: str, attribute: str, known: list[str]) -> UserError:
    """The error for a module or file that has no such name.

    Args:
        home: The module or file.
        attribute: The name that was given.
        known: Names that it has.

    Returns:
        The error, to be raised.
    """
    similar = nearest_names(attribute, known)
    next_step = f"did you mean {home}:{similar[0]}?" if similar else EXPECTED
    return UserError("model", f"{home!r} has no {attribute!r}; {next_step}")


def _source_of(module: str) -> Path | None:
    """The source of a module; None where it can't be told.

    Raises:
        UserError: If there is no such module.
    """
    first, *rest = module.split(".")
    # Where networks are kept; the installed command doesn't look there by itself.
    spec = PathFinder.find_spec(first, [os.getcwd()]) or _find(first)
    if spec is None:
        folders = [os.getcwd()]
        raise _no_module(module, first, folders)
    for part in rest:
        folders = list(spec.submodule_search_locations or [])
        inner = PathFinder.find_spec(part, folders)
        if inner is None:
            # A package may look for its modules elsewhere too.
            if spec.origin and "__path__" in Path(spec.origin).read_text("utf-8"):
                return None
            raise _no_module(module, part, folders)
        spec = inner
    is_source = spec.origin is not None and spec.origin.endswith(".py")
    return Path(spec.origin) if is_source and spec.origin else None


def _find(name: str) -> ModuleSpec | None:
    try:
        # Of a module that isn't inside of another this imports nothing.
        return find_spec(name)
    # Of an empty name, and of modules that were made by hand.
    except ValueError:
        return None


def _no_module(module: str, part: str, folders: list[str]) -> UserError:
    """The error for a module that isn't there."""
    siblings = [found.name for found in iter_modules(folders)]
    similar = nearest_names(part, siblings)
    next_step = f"did you mean {similar[0]!r}?" if similar else EXPECTED
    return UserError(
        "model", f"can't import {module!r} (no module {part!r}); {next_step}"
    )


def _names_in(path: Path) -> list[str] | None:
    """Every name that a source defines anywhere; None where it can't be told."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    # What Python can't read either is told where it is imported.
    except (SyntaxError, UnicodeDecodeError):
        return None
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Name):
            names.append(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                names.append(alias.asname or alias.name.partition(".")[0])
    is_open = "*" in names or any(name in names for name in DYNAMIC)
    return None if is_open else names
