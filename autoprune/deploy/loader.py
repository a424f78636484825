"""`load.py` beside a pruned network: it needs PyTorch and the network's own code."""

import functools
from collections.abc import Mapping
from typing import Any

from autoprune.data.factories import find_own
from autoprune.data.models import MODELS, torchvision_options
from autoprune.deploy import standalone
from autoprune.deploy.bundle import OWN, Bundle
from autoprune.structure.changes import CLASS

LOADER = "load.py"
HEADER = '''"""Loads the pruned network that lies beside this file, by PyTorch alone.

Written by autoprune for {model}. From any folder:

    import sys

    sys.path.insert(0, "the folder of this file")
    from load import load

    network = load()

Where `build` below doesn't find the network's code, make the dense network as in
training and call `load(network)`.
"""
'''


def loader_source(plan: Mapping[str, Any]) -> str:
    """A file of Python that loads the network of a plan without autoprune.

    Args:
        plan: What stands beside the weights; with "modules" as from
            `autoprune.structure.changes.find_changes`.

    Returns:
        The file's text.
    """
    bundle = Bundle()
    bundle.add(standalone.__name__, "load")
    classes = []
    for name in _needed_classes(plan):
        home, _, kind = name.rpartition(".")
        if home.partition(".")[0] == OWN:
            bundle.add(home, kind)
        else:
            bundle.import_from(home, kind)
        classes.append(f"    {name!r}: {kind},\n")
    bundle.redefine("build", _build_source(plan["model"], plan["n_classes"], bundle))
    bundle.redefine("CLASSES", f"CLASSES = {{\n{''.join(classes)}}}")
    return f"{HEADER.format(model=plan['model'])}\n{bundle.text()}\n"


def _needed_classes(plan: Mapping[str, Any]) -> list[str]:
    """Full names of the classes that pruning brought into a network."""
    names = {change[CLASS] for change in plan["modules"].values() if CLASS in change}
    if plan.get("image_size"):
        names.add(standalone.RESIZE)
    return sorted(names)


def _build_source(model: str, n_classes: int, bundle: Bundle) -> str:
    """The function that makes the dense network, as `autoprune.data.models.build`.

    Args:
        model: The network's name.
        n_classes: Width of its head.
        bundle: Gets the classes of this project's own networks.
    """
    if ":" in model:
        factory = find_own(model, n_classes)
        bundle.import_module("sys")
        bundle.import_module("importlib")
        lines = [
            "# Behind all else, for a program that runs in another folder.",
            f"sys.path.append({str(factory.folder)!r})",
            f"module = importlib.import_module({factory.module!r})",
            f"return module.{factory.attribute}({_arguments(factory.options)})",
        ]
    elif model.startswith("timm/"):
        bundle.import_module("timm")
        options = {"pretrained": False, "num_classes": n_classes}
        name = model.removeprefix("timm/")
        lines = [f"return timm.create_model({name!r}, {_arguments(options)})"]
    elif model in MODELS:
        lines = [f"return {_own_network(model, n_classes, bundle)}"]
    else:
        bundle.import_module("torchvision")
        options = _arguments(torchvision_options(model, n_classes))
        lines = [f"return torchvision.models.get_model({model!r}, {options})"]
    body = "".join(f"    {line}\n" for line in lines).rstrip()
    return f'def build() -> nn.Module:\n    """The dense network."""\n{body}'


def _own_network(model: str, n_classes: int, bundle: Bundle) -> str:
    """The call that makes one of this project's networks, whose class is copied."""
    factory = MODELS[model]
    given: list[str] = []
    if isinstance(factory, functools.partial):
        given = [repr(value) for value in factory.args]
        given.append(_arguments(factory.keywords))
        factory = factory.func
    kind = getattr(factory, "__name__", "")
    bundle.add(factory.__module__, kind)
    return f"{kind}({', '.join([*given, _arguments({'n_classes': n_classes})])})"


def _arguments(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())
