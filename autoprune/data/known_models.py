"""Names of networks, known without importing the packages that define them.

torchvision and timm enter their networks into a registry with a decorator,
`register_model`. Importing them takes seconds; reading their sources doesn't.
"""

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from autoprune.data.factory_sources import check_factory
from autoprune.errors import UserError, missing_package, nearest_names
from autoprune.names import MODELS

REGISTERED = re.compile(
    r"^@register_model\b[^\n]*\n(?:(?!def )[^\n]*\n)*?def (\w+)", re.MULTILINE
)
"""A function that makes a network, other decorators between the two lines."""


def check_model(name: str) -> None:
    """Refuses a network that nobody knows, or that can't be there.

    Args:
        name: As `NetworkConfig.model`.

    Raises:
        UserError: If it is unknown, the nearest names are offered; or timm is missing.
    """
    if name in MODELS.known:
        return
    if ":" in name:
        check_factory(name)
        return
    if name.startswith("timm/"):
        _check_timm(name.removeprefix("timm/"))
        return
    classifiers = registered_models("torchvision")
    # Without sources to read only an import can tell.
    if classifiers and name not in classifiers:
        raise unknown_model(name, [*MODELS.known, *classifiers])


def unknown_model(name: str, known: list[str]) -> UserError:
    """The error for a network that is neither autoprune's nor torchvision's.

    Args:
        name: As given.
        known: All known names.

    Returns:
        The error, to be raised.
    """
    if name.endswith(".py"):
        path = name if "/" in name else f"./{name}"
        return UserError(
            "model",
            f"{name!r} says no function or class that makes the network; give it "
            f"behind a colon, as in {path}:make",
        )
    similar = nearest_names(name, known, 3) or ["resnet20"]
    return UserError(
        "model",
        f"unknown model {name!r}; did you mean {' or '.join(similar)}? "
        f"Your own: package.module:factory or ./file.py:factory",
    )


def unknown_timm_model(name: str, known: list[str]) -> UserError:
    """The error for a network that timm doesn't have.

    Args:
        name: As given, without `timm/`.
        known: All names of timm.

    Returns:
        The error, to be raised.
    """
    similar = nearest_names(name, known, 3) or ["resnet18"]
    offered = " or ".join(f"timm/{near}" for near in similar)
    return UserError("model", f"timm has no model {name!r}; did you mean {offered}?")


def _check_timm(name: str) -> None:
    if find_spec("timm") is None:
        raise missing_package("model", f"timm/{name}", "timm")
    # A tag behind a dot says how weights were trained.
    architecture = name.partition(".")[0]
    known = registered_models("timm")
    if not known or architecture in known:
        return
    # Names of old stand in quotes, in tables of what replaces them.
    of_old = re.compile(f"['\"]{re.escape(architecture)}['\"]")
    if architecture and any(of_old.search(source) for source in _sources("timm")):
        return
    raise unknown_timm_model(name, known)


@cache
def registered_models(package: str) -> list[str]:
    """The networks of torchvision or timm, read from the sources.

    Args:
        package: "torchvision", whose classifiers these are, or "timm".

    Returns:
        Their names in alphabetical order; empty where the package is missing or comes
        without sources.
    """
    names = []
    for source in _sources(package):
        names.extend(REGISTERED.findall(source))
    return sorted(names)


@cache
def _sources(package: str) -> list[str]:
    """The text of the modules in which a package defines its networks."""
    # Finding a package doesn't import it.
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        return []
    # Not below: torchvision keeps detectors and the like in folders of their own.
    paths = sorted((Path(spec.origin).parent / "models").glob("*.py"))
    return [path.read_text(encoding="utf-8") for path in paths]
