"""Networks by name, and weights from files that execute no code.

`build("resnet56", n_classes=10)` gives a CIFAR network of this module, any torchvision classifier, or the result of
the user's own `package.module:factory`. `load_weights` reads safetensors or a `torch.load(weights_only=True)` file.
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
from torch.nn import functional as F

from autoprune.errors import UserError, missing_package, nearest_names


def conv_bn(
    n_in: int, n_out: int, kernel: int = 3, stride: int = 1, groups: int = 1, act: bool = True
) -> nn.Sequential:
    """A convolution without bias, batch norm and (unless `act` is false) ReLU; padding keeps the size at stride 1."""
    layers = [nn.Conv2d(n_in, n_out, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(n_out)]
    return nn.Sequential(*layers, nn.ReLU(inplace=True)) if act else nn.Sequential(*layers)


class PadShortcut(nn.Module):
    """Option A of He et al. 2016 (section 4.2): stride by slicing, new channels are zeros on both sides."""

    def __init__(self, n_in: int, n_out: int, stride: int):
        super().__init__()
        self.stride = stride
        self.padding = (n_out - n_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, parameter names as in akamaster's public checkpoints."""

    def __init__(self, n_in: int, n_out: int, stride: int, option: str):
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.shortcut = nn.Identity()
        if stride != 1 or n_in != n_out:
            padded = option == "A"
            self.shortcut = PadShortcut(n_in, n_out, stride) if padded else conv_bn(n_in, n_out, 1, stride, act=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class CifarResNet(nn.Module):
    """ResNet for 32x32 images (He et al. 2016, section 4.2): 6n + 2 layers, widths 16, 32, 64.

    Args:
        depth: 20, 32, 44, 56, 110 or any other 6n + 2.
        n_classes: Width of the head.
        option: Shortcut where the width changes: "A" pads with zeros, "B" is a 1x1 convolution.
    """

    def __init__(self, depth: int, n_classes: int = 10, option: str = "A"):
        super().__init__()
        n_blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, n_blocks, 1, option)
        self.layer2 = self._stage(16, 32, n_blocks, 2, option)
        self.layer3 = self._stage(32, 64, n_blocks, 2, option)
        self.linear = nn.Linear(64, n_classes)
        self.apply(kaiming)

    @staticmethod
    def _stage(n_in: int, n_out: int, n_blocks: int, stride: int, option: str) -> nn.Sequential:
        first = BasicBlock(n_in, n_out, stride, option)
        return nn.Sequential(first, *(BasicBlock(n_out, n_out, 1, option) for _ in range(n_blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))


class CifarVGG16(nn.Module):
    """VGG-16 with batch norm for 32x32 images: 13 convolutions and one linear layer."""

    WIDTHS = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")

    def __init__(self, n_classes: int = 10):
        super().__init__()
        layers, n_in = [], 3
        for width in self.WIDTHS:
            layers.append(nn.MaxPool2d(2) if width == "M" else conv_bn(n_in, width))
            n_in = n_in if width == "M" else width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(512, n_classes)
        self.apply(kaiming)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


class CifarMobileNetV1(nn.Module):
    """MobileNet (Howard et al. 2017) for 32x32 images: stride 1 in the stem and in the first strided block."""

    BLOCKS = ((64, 1), (128, 1), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))

    def __init__(self, n_classes: int = 10):
        super().__init__()
        layers, n_in = [conv_bn(3, 32)], 32
        for width, stride in self.BLOCKS:
            layers += [conv_bn(n_in, n_in, 3, stride, groups=n_in), conv_bn(n_in, width, 1)]
            n_in = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(1024, n_classes)
        self.apply(kaiming)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


class InvertedResidual(nn.Module):
    """Expand, depthwise, project; added to the input where the shape allows (Sandler et al. 2018)."""

    def __init__(self, n_in: int, n_out: int, stride: int, expansion: int):
        super().__init__()
        hidden = n_in * expansion
        expand = [conv_bn(n_in, hidden, 1)] if expansion != 1 else []
        depthwise, project = conv_bn(hidden, hidden, 3, stride, groups=hidden), conv_bn(hidden, n_out, 1, act=False)
        self.body = nn.Sequential(*expand, depthwise, project)
        self.is_residual = stride == 1 and n_in == n_out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.is_residual else self.body(x)


class CifarMobileNetV2(nn.Module):
    """MobileNetV2 (Sandler et al. 2018) for 32x32 images: stride 1 in the stem and in the second stage."""

    STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self, n_classes: int = 10):
        super().__init__()
        layers, n_in = [conv_bn(3, 32)], 32
        for expansion, width, n_blocks, stride in self.STAGES:
            for index in range(n_blocks):
                layers.append(InvertedResidual(n_in, width, stride if index == 0 else 1, expansion))
                n_in = width
        self.features = nn.Sequential(*layers, conv_bn(n_in, 1280, 1))
        self.classifier = nn.Linear(1280, n_classes)
        self.apply(kaiming)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


def kaiming(module: nn.Module) -> None:
    """He et al. 2015: draws the weight of a convolution or linear layer for its own fan-in; for `nn.Module.apply`."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight)


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
    """Every name that `build` knows besides `package.module:factory`: this module's and torchvision's classifiers."""
    import torchvision.models

    return [*MODELS, *torchvision.models.list_models(module=torchvision.models)]


def build(name: str, n_classes: int = 10) -> nn.Module:
    """A freshly initialised network in training mode.

    Args:
        name: A name of `model_names()`, `timm/NAME` where timm is installed, or `package.module:factory` for a callable
            of your own. The factory is called with `n_classes=` if it takes that argument, else with `num_classes=` if
            it takes that, else with nothing.
        n_classes: Width of the classification head.

    Raises:
        UserError: If the name is unknown (the nearest known ones are offered) or the factory can't be imported.
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
        raise UserError(f"--model: unknown model {name!r}; did you mean {meant}? Your own: package.module:factory")
    return torchvision.models.get_model(name, weights=None, num_classes=n_classes, **_quiet_options(name))


def _build_timm(name: str, n_classes: int) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise missing_package("--model", f"timm/{name}", "timm") from error
    if not timm.is_model(name):
        meant = " or ".join(f"timm/{near}" for near in nearest_names(name, timm.list_models(), 3) or ["resnet18"])
        raise UserError(f"--model: timm has no model {name!r}; did you mean {meant}?")
    return timm.create_model(name, pretrained=False, num_classes=n_classes)


def _quiet_options(name: str) -> dict:
    # These two warn about slow initialisation, and their auxiliary heads only exist for training.
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
        raise UserError(f"--model: can't import {path!r} ({error}); expected package.module:factory") from error
    if not callable(factory):
        raise UserError(f"--model: {path!r} is a {type(factory).__name__}, expected a callable that returns a network")
    return factory


def _call_factory(factory: Factory, n_classes: int) -> nn.Module:
    accepted = inspect.signature(factory).parameters
    argument = next((name for name in ("n_classes", "num_classes") if name in accepted), None)
    model = factory(**({argument: n_classes} if argument else {}))
    if not isinstance(model, nn.Module):
        raise UserError(f"--model: the factory must return a torch.nn.Module, got {type(model).__name__}")
    return model


def embedded_resnet20() -> nn.Module:
    """The ResNet-20 for CIFAR-10 that this project trained (`experiments/train_baseline.py`), in eval mode."""
    model = build("resnet20")
    load_weights(model, EMBEDDED_WEIGHTS)
    return model.eval()


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Weights from a `.safetensors` or `torch.save` file, wrapper keys and DataParallel's `module.` prefix removed.

    Raises:
        UserError: If the file is missing, is neither format, or would need to execute code to load.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"--weights: no file {str(path)!r}")
    try:
        loaded = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        advice = "save its state_dict() with torch.save or safetensors"
        raise UserError(f"--weights: {str(path)!r} holds objects that execute code when loaded; {advice}") from error
    except Exception as error:  # torch and safetensors raise a dozen types for a damaged file
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"--weights: {str(path)!r} is neither safetensors nor torch.save's ({reason})") from error
    for wrapper in ("state_dict", "model_state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UserError(f"--weights: {str(path)!r} holds no state dict (name -> tensor)")
    prefix = "module." if all(key.startswith("module.") for key in loaded) else ""
    return {key.removeprefix(prefix): value for key, value in loaded.items()}


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Fills `model` in place with the weights in `path`.

    Raises:
        UserError: If names or shapes don't fit the architecture (what differs is listed), or values aren't finite.
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
        raise UserError(f"--weights: {str(path)!r} {difference}")
    for key, value in weights.items():
        if not torch.isfinite(value).all():
            raise UserError(
                f"--weights: {key} in {str(path)!r} holds NaN or infinite values; the network is not usable"
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
