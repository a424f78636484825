"""Networks by name, and weights from files that execute no code.

`build("resnet56", n_classes=10)` gives a network of `autoprune.data.networks`, any
torchvision classifier, or the result of the user's own `package.module:factory`.
`load_weights` reads safetensors or a `torch.load(weights_only=True)` file.
"""

import importlib
import inspect
import os
import pickle
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from autoprune.data.networks import (
    CifarMobileNetV1,
    CifarMobileNetV2,
    CifarResNet,
    CifarVGG16,
)
from autoprune.errors import UserError, missing_package, nearest_names

Factory = Callable[..., nn.Module]
"""From a number of classes to a freshly initialised network."""

EMBEDDED_WEIGHTS = Path(__file__).parent / "assets" / "resnet20_cifar10.safetensors"
"""Weights of the ResNet-20 that comes with the package."""
RESNET_DEPTHS = (20, 32, 44, 56, 110)
"""Depths of the CIFAR ResNets that have a name."""
MODELS: dict[str, Factory] = {
    **{f"resnet{n}": partial(CifarResNet, n, option="A") for n in RESNET_DEPTHS},
    **{f"resnet{n}_b": partial(CifarResNet, n, option="B") for n in RESNET_DEPTHS},
    "vgg16_bn_cifar": CifarVGG16,
    "mobilenet_v1_cifar": CifarMobileNetV1,
    "mobilenet_v2_cifar": CifarMobileNetV2,
}
"""This project's networks by name; each is called with `n_classes=`."""


def model_names() -> list[str]:
    """Every name that `build` knows without a colon or `timm/`.

    Those are this project's networks and torchvision's classifiers.
    """
    # Here, because importing torchvision takes seconds that few commands need.
    import torchvision.models

    return [*MODELS, *torchvision.models.list_models(module=torchvision.models)]


def build(name: str, n_classes: int = 10) -> nn.Module:
    """A freshly initialised network in training mode.

    Args:
        name: A name of `model_names()`, `timm/NAME` where timm is installed, or
            `package.module:factory` for a callable of your own. The factory is called
            with `n_classes=` if it takes that argument, else with `num_classes=` if it
            takes that, else with nothing.
        n_classes: Width of the classification head.

    Returns:
        The network.

    Raises:
        UserError: If the name is unknown (the nearest known ones are offered) or the
            factory can't be imported.
    """
    if ":" in name:
        return _call_factory(_import_factory(name), n_classes)
    if name.startswith("timm/"):
        return _build_timm(name.removeprefix("timm/"), n_classes)
    # Before torchvision is imported, which takes a while.
    if name in MODELS:
        return MODELS[name](n_classes=n_classes)
    return _build_torchvision(name, n_classes)


def _build_torchvision(name: str, n_classes: int) -> nn.Module:
    """One of torchvision's classifiers, without pretrained weights."""
    import torchvision.models

    names = model_names()
    if name not in names:
        similar = nearest_names(name, names, 3) or ["resnet20"]
        raise UserError(
            "model",
            f"unknown model {name!r}; did you mean {' or '.join(similar)}? "
            f"Your own: package.module:factory",
        )
    options = {}
    if name in ("googlenet", "inception_v3"):
        # These two warn about slow initialisation, and their auxiliary heads only exist
        # for training.
        options = {"aux_logits": False, "init_weights": False}
    return torchvision.models.get_model(
        name, weights=None, num_classes=n_classes, **options
    )


def _build_timm(name: str, n_classes: int) -> nn.Module:
    """One of timm's networks, by its name there, without pretrained weights."""
    try:
        import timm
    except ImportError as error:
        raise missing_package("model", f"timm/{name}", "timm") from error
    if not timm.is_model(name):
        similar = nearest_names(name, timm.list_models(), 3) or ["resnet18"]
        offered = " or ".join(f"timm/{known}" for known in similar)
        raise UserError("model", f"timm has no model {name!r}; did you mean {offered}?")
    return timm.create_model(name, pretrained=False, num_classes=n_classes)


def _import_factory(path: str) -> Callable[..., Any]:
    """The callable that `package.module:factory` names."""
    # An installed command doesn't look in the current folder, and it is where users
    # keep their networks. First, as `python -m` has it: a folder of theirs may be
    # called like an installed package.
    if sys.path[0] not in ("", os.getcwd()):
        sys.path.insert(0, os.getcwd())
    module_name, _, attribute = path.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UserError(
            "model",
            f"can't import {path!r} ({error}); expected package.module:factory",
        ) from error
    if not callable(factory):
        raise UserError(
            "model",
            f"{path!r} is a {type(factory).__name__}, expected a callable that returns "
            f"a network",
        )
    return factory


def _call_factory(factory: Callable[..., Any], n_classes: int) -> nn.Module:
    """The network that a user's own factory makes."""
    accepted = inspect.signature(factory).parameters
    options = {}
    # The first that it takes: a factory with both would mean the same by them.
    for argument in ("n_classes", "num_classes"):
        if argument in accepted:
            options[argument] = n_classes
            break
    model = factory(**options)
    if not isinstance(model, nn.Module):
        raise UserError(
            "model",
            f"the factory must return a torch.nn.Module, got {type(model).__name__}",
        )
    return model


def has_embedded_weights(model: str, data: str) -> bool:
    """Whether autoprune brings trained weights of a network for a dataset.

    Args:
        model: The network's name.
        data: The dataset's name.
    """
    # They were trained on CIFAR-10, which the sample is a part of.
    return model == "resnet20" and data in ("sample", "cifar10")


def prepare_network(
    model: nn.Module, name: str, example: Tensor, n_classes: int
) -> nn.Module:
    """A trained network as every stage takes it: on the CPU, float32, in eval mode.

    Args:
        model: The network; moved in place.
        name: What it is called, for messages.
        example: One image, `(1, channels, height, width)`.
        n_classes: Classes of the data.

    Raises:
        UserError: If it doesn't answer images of this size with one of these classes.
    """
    # A factory may bring a network in training mode, in half precision or on a GPU;
    # proofs and files are for float32 on the CPU.
    model = model.eval().to("cpu", torch.float32)
    # Convolutions on the CPU are fastest where a pixel's channels lie side by side.
    model = model.to(memory_format=torch.channels_last)
    # Here the refusal can still name the network; a trace or a training would fail
    # somewhere inside PyTorch.
    check_answers(model, name, example, n_classes)
    return model


def embedded_resnet20() -> nn.Module:
    """The ResNet-20 for CIFAR-10 that comes with the package, in eval mode.

    This project trained it (`experiments/train_baseline.py`).
    """
    model = build("resnet20")
    load_weights(model, EMBEDDED_WEIGHTS)
    return model.eval()


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Weights from a `.safetensors` or `torch.save` file.

    Wrapper keys and DataParallel's `module.` prefix are removed.

    Args:
        path: The file.

    Returns:
        Names to tensors on the CPU.

    Raises:
        UserError: If the file is missing, is neither format, or would need to execute
            code to load.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError("weights", f"no file {str(path)!r}")
    loaded = _read_file(path)
    # What training scripts put around the weights.
    for wrapper in ("state_dict", "model_state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not _is_state_dict(loaded):
        raise UserError(
            "weights", f"{str(path)!r} holds no state dict (name -> tensor)"
        )
    prefix = ""
    # Only if all have it: a network may have a submodule of that name.
    if all(key.startswith("module.") for key in loaded):
        prefix = "module."
    return {key.removeprefix(prefix): value for key, value in loaded.items()}


def _read_file(path: Path) -> Any:
    """Whatever a `.safetensors` or `torch.save` file holds."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Weights of any device are read onto the CPU.
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
        raise UserError(
            "weights",
            f"{str(path)!r} is neither safetensors nor torch.save's ({reason})",
        ) from error


def _is_state_dict(loaded: object) -> bool:
    """Whether it is a dict whose values are tensors."""
    if not isinstance(loaded, dict):
        return False
    return all(isinstance(value, Tensor) for value in loaded.values())


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Fills a network with weights from a file.

    Args:
        model: The network, changed in place.
        path: The file, as for `read_state_dict`.

    Raises:
        UserError: If names or shapes don't fit the architecture (what differs is
            listed), or values aren't finite.
    """
    weights = read_state_dict(path)
    expected = model.state_dict()
    difference = _difference(weights, expected)
    if difference is not None:
        raise UserError("weights", f"{str(path)!r} {difference}")
    # Here, since NaN would otherwise surface as a failed search much later.
    for key, value in weights.items():
        if not torch.isfinite(value).all():
            raise UserError(
                "weights",
                f"{key} in {str(path)!r} holds NaN or infinite values; the "
                f"network is not usable",
            )
    # Not strict: the counters of batches may lack, see `_difference`.
    model.load_state_dict(weights, strict=False)


def _difference(
    weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> str | None:
    """What to say of weights that don't fit a network; None where they fit."""
    missing = []
    for key in expected:
        # Checkpoints of old PyTorch versions have no counters of batches.
        if key not in weights and not key.endswith("num_batches_tracked"):
            missing.append(key)
    surplus = [key for key in weights if key not in expected]
    misfits = []
    for key in weights:
        if key in expected and weights[key].shape != expected[key].shape:
            misfits.append(key)
    if not (missing or surplus or misfits):
        return None
    if not (missing or surplus) and _is_only_head(misfits, weights, expected):
        head = _head_name(expected)
        n_given = len(weights[misfits[0]])
        n_expected = len(expected[misfits[0]])
        return (
            f"has a head of {n_given} classes ({head}), the data has {n_expected}; "
            f"give weights trained on these classes"
        )
    difference = _list_difference(missing, surplus, misfits, weights, expected)
    return f"is for another architecture: {difference}"


def _list_difference(
    missing: list[str],
    surplus: list[str],
    misfits: list[str],
    weights: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
) -> str:
    """How many tensors differ in which way, each time with the first of them."""
    parts = []
    if missing:
        parts.append(f"{len(missing)} missing (first: {missing[0]})")
    if surplus:
        parts.append(f"{len(surplus)} unexpected (first: {surplus[0]})")
    if misfits:
        key = misfits[0]
        parts.append(
            f"{len(misfits)} of another shape (first: {key} is "
            f"{tuple(weights[key].shape)}, not {tuple(expected[key].shape)})"
        )
    return "; ".join(parts)


def _head_name(expected: Mapping[str, Tensor]) -> str:
    """The module that makes the logits: the last one, as in every known network."""
    return list(expected)[-1].rpartition(".")[0]


def _is_only_head(
    misfits: list[str], weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> bool:
    """Whether what doesn't fit differs in nothing but the number of classes."""
    head = _head_name(expected)
    for key in misfits:
        is_in_head = key.rpartition(".")[0] == head
        if not is_in_head or weights[key].shape[1:] != expected[key].shape[1:]:
            return False
    return True


@torch.no_grad()
def check_answers(model: nn.Module, name: str, example: Tensor, n_classes: int) -> None:
    """Checks that a network answers an image with a score for each class.

    Args:
        model: The network, in eval mode.
        name: What to call it in the message.
        example: One normalised input `(1, 3, height, width)`.
        n_classes: How many classes the data has.

    Raises:
        UserError: If it doesn't.
    """
    try:
        answers = model(example)
    # Whatever the user's own forward pass raises.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        shape = tuple(example.shape)
        raise UserError(
            "model",
            f"{name} can't answer images of shape {shape} ({reason}); see image_size",
        ) from error
    answered = type(answers).__name__
    if isinstance(answers, Tensor):
        answered = tuple(answers.shape)
    if answered != (1, n_classes):
        raise UserError(
            "model",
            f"{name} answers an image with {answered}, the data needs (1, "
            f"{n_classes}), a score for each class",
        )
