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
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from autoprune.errors import UserError, missing_package, nearest_names
from autoprune.data.networks import CifarMobileNetV1, CifarMobileNetV2, CifarResNet, CifarVGG16

Factory = Callable[..., nn.Module]
EMBEDDED_WEIGHTS = Path(__file__).parent / "assets" / "resnet20_cifar10.safetensors"
RESNET_DEPTHS = (20, 32, 44, 56, 110)
MODELS: dict[str, Factory] = {
    **{f"resnet{d}": lambda n_classes=10, d=d: CifarResNet(d, n_classes, "A") for d in RESNET_DEPTHS},
    **{f"resnet{d}_b": lambda n_classes=10, d=d: CifarResNet(d, n_classes, "B") for d in RESNET_DEPTHS},
    "vgg16_bn_cifar": CifarVGG16,
    "mobilenet_v1_cifar": CifarMobileNetV1,
    "mobilenet_v2_cifar": CifarMobileNetV2,
}


def model_names() -> list[str]:
    """Every name that `build` knows besides `package.module:factory`: this project's
    and torchvision's classifiers.
    """
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

    Raises:
        UserError: If the name is unknown (the nearest known ones are offered) or the
            factory can't be imported.
    """
    if ":" in name:
        return _call_factory(_import_factory(name), n_classes)
    if name.startswith("timm/"):
        return _build_timm(name.removeprefix("timm/"), n_classes)
    if name in MODELS:
        return MODELS[name](n_classes=n_classes)
    import torchvision.models

    names = model_names()
    if name not in names:
        meant = " or ".join(nearest_names(name, names, 3) or ["resnet20"])
        raise UserError("model", f"unknown model {name!r}; did you mean {meant}? Your own: package.module:factory")
    return torchvision.models.get_model(name, weights=None, num_classes=n_classes, **_quiet_options(name))


def _build_timm(name: str, n_classes: int) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise missing_package("model", f"timm/{name}", "timm") from error
    if not timm.is_model(name):
        meant = " or ".join(f"timm/{near}" for near in nearest_names(name, timm.list_models(), 3) or ["resnet18"])
        raise UserError("model", f"timm has no model {name!r}; did you mean {meant}?")
    return timm.create_model(name, pretrained=False, num_classes=n_classes)


def _quiet_options(name: str) -> dict:
    # These two warn about slow initialisation, and their auxiliary heads only exist for
    # training.
    return {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}


def _import_factory(path: str) -> Factory:
    if os.getcwd() not in sys.path:
        sys.path.append(
            os.getcwd()
        )  # an installed command doesn't look there, and it is where users keep their networks
    module_name, _, attribute = path.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UserError("model", f"can't import {path!r} ({error}); expected package.module:factory") from error
    if not callable(factory):
        raise UserError("model", f"{path!r} is a {type(factory).__name__}, expected a callable that returns a network")
    return factory


def _call_factory(factory: Factory, n_classes: int) -> nn.Module:
    accepted = inspect.signature(factory).parameters
    argument = next((name for name in ("n_classes", "num_classes") if name in accepted), None)
    model = factory(**({argument: n_classes} if argument else {}))
    if not isinstance(model, nn.Module):
        raise UserError("model", f"the factory must return a torch.nn.Module, got {type(model).__name__}")
    return model


def embedded_resnet20() -> nn.Module:
    """The ResNet-20 for CIFAR-10 that this project trained
    (`experiments/train_baseline.py`), in eval mode.
    """
    model = build("resnet20")
    load_weights(model, EMBEDDED_WEIGHTS)
    return model.eval()


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Weights from a `.safetensors` or `torch.save` file, wrapper keys and
    DataParallel's `module.` prefix removed.

    Raises:
        UserError: If the file is missing, is neither format, or would need to execute
            code to load.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError("weights", f"no file {str(path)!r}")
    try:
        loaded = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        advice = "save its state_dict() with torch.save or safetensors"
        raise UserError("weights", f"{str(path)!r} holds objects that execute code when loaded; {advice}") from error
    except Exception as error:  # torch and safetensors raise a dozen types for a damaged file
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError("weights", f"{str(path)!r} is neither safetensors nor torch.save's ({reason})") from error
    for wrapper in ("state_dict", "model_state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UserError("weights", f"{str(path)!r} holds no state dict (name -> tensor)")
    prefix = "module." if all(key.startswith("module.") for key in loaded) else ""
    return {key.removeprefix(prefix): value for key, value in loaded.items()}


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Fills `model` in place with the weights in `path`.

    Raises:
        UserError: If names or shapes don't fit the architecture (what differs is
            listed), or values aren't finite.
    """
    weights, own = read_state_dict(path), model.state_dict()
    missing = [key for key in own if key not in weights and not key.endswith("num_batches_tracked")]
    surplus = [key for key in weights if key not in own]
    misfits = [key for key in weights if key in own and weights[key].shape != own[key].shape]
    if missing or surplus or misfits:
        difference = _head_difference(missing + surplus, misfits, weights, own)
        difference = difference or "is for another architecture: " + _difference(
            missing, surplus, misfits, weights, own
        )
        raise UserError("weights", f"{str(path)!r} {difference}")
    for key, value in weights.items():
        if not torch.isfinite(value).all():
            raise UserError(
                "weights", f"{key} in {str(path)!r} holds NaN or infinite values; the "
                f"network is not usable"
            )
    model.load_state_dict(weights, strict=False)


def _head_difference(absent: list, misfits: list, weights: dict, own: dict) -> str | None:
    """What to say where nothing differs but the number of classes."""
    if absent:
        return None
    head = next(reversed(own)).rpartition(".")[0]
    if any(key.rpartition(".")[0] != head or weights[key].shape[1:] != own[key].shape[1:] for key in misfits):
        return None
    n_given, n_wanted = len(weights[misfits[0]]), len(own[misfits[0]])
    return f"has a head of {n_given} classes ({head}), the data has {n_wanted}; give weights trained on these classes"


def _difference(missing: list, surplus: list, misfits: list, weights: dict, own: dict) -> str:
    parts = []
    if missing:
        parts.append(f"{len(missing)} missing (first: {missing[0]})")
    if surplus:
        parts.append(f"{len(surplus)} unexpected (first: {surplus[0]})")
    if misfits:
        given, wanted = (tuple(tensors[misfits[0]].shape) for tensors in (weights, own))
        parts.append(f"{len(misfits)} of another shape (first: {misfits[0]} is {given}, not {wanted})")
    return "; ".join(parts)


@torch.no_grad()
def check_answers(model: nn.Module, name: str, example: Tensor, n_classes: int) -> None:
    """Raises a `UserError` unless a network answers an image `(1, 3, height, width)`
    with a score for each class.
    """
    try:
        answers = model(example)
    except Exception as error:  # whatever the user's own forward pass raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        shape = tuple(example.shape)
        raise UserError("model", f"{name} can't answer images of shape {shape} ({reason}); see image_size") from error
    found = tuple(answers.shape) if isinstance(answers, Tensor) else type(answers).__name__
    if found != (1, n_classes):
        raise UserError(
            "model", f"{name} answers an image with {found}, the data needs (1, "
            f"{n_classes}), a score for each class"
        )
