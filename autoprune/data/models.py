"""Networks by name.

`build("resnet56", n_classes=10)` gives a network of `autoprune.data.networks`, any
torchvision classifier, or the result of a factory of the user's own.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.data.checkpoints import load_weights
from autoprune.data.factories import build_own
from autoprune.data.known_models import unknown_model, unknown_timm_model
from autoprune.data.networks import (
    CifarMobileNetV1,
    CifarMobileNetV2,
    CifarResNet,
    CifarVGG16,
)
from autoprune.data.places import EMBEDDED_WEIGHTS
from autoprune.errors import UserError, missing_package

Factory = Callable[..., nn.Module]
"""From a number of classes to a freshly initialised network."""

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
            `package.module:factory` or `./file.py:factory` for a callable of your own.
            The factory is called with `n_classes=` if it takes that argument, else with
            `num_classes=` if it takes that, else with nothing.
        n_classes: Width of the classification head.

    Returns:
        The network.

    Raises:
        UserError: If the name is unknown (the nearest known ones are offered) or the
            factory can't be imported.
    """
    if ":" in name:
        return build_own(name, n_classes)
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
        raise unknown_model(name, names)
    options = torchvision_options(name, n_classes)
    return torchvision.models.get_model(name, **options)


def torchvision_options(name: str, n_classes: int) -> dict[str, Any]:
    """What torchvision's `get_model` is called with, for an untrained classifier.

    Args:
        name: The classifier's name there.
        n_classes: Width of its head.
    """
    options: dict[str, Any] = {"weights": None, "num_classes": n_classes}
    if name in ("googlenet", "inception_v3"):
        # These two warn about slow initialisation, and their auxiliary heads only exist
        # for training.
        options |= {"aux_logits": False, "init_weights": False}
    return options


def _build_timm(name: str, n_classes: int) -> nn.Module:
    """One of timm's networks, by its name there, without pretrained weights."""
    try:
        import timm
    except ImportError as error:
        raise missing_package("model", f"timm/{name}", "timm") from error
    if not timm.is_model(name):
        raise unknown_timm_model(name, timm.list_models())
    return timm.create_model(name, pretrained=False, num_classes=n_classes)


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
            f"{name} can't answer images of shape {shape} ({reason}); see image_size "
            f"and channels",
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
