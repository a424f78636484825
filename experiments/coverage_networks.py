"""The networks that coverage is measured on.

Builders without weights, and values under which nothing hides.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision import models as torchvision_models

from autoprune.data import models
from experiments import (
    coverage_detection,
    coverage_transformers,
    coverage_weights,
)

SEGMENTATION = (
    "lraspp_mobilenet_v3_large",
    "deeplabv3_mobilenet_v3_large",
    "fcn_resnet50",
    "deeplabv3_resnet50",
    "fcn_resnet101",
    "deeplabv3_resnet101",
)
# Small variants, one or two of each family, small ones first.
TIMM = (
    "lcnet_050",
    "tinynet_e",
    "mnasnet_small",
    "mobilenetv3_small_050",
    "mobilenetv4_conv_small",
    "mobilenetv4_hybrid_medium",
    "ghostnet_050",
    "ghostnetv2_100",
    "repghostnet_050",
    "mobileone_s0",
    "semnasnet_050",
    "hardcorenas_a",
    "rexnet_100",
    "efficientnet_lite0",
    "efficientnet_b0",
    "tf_efficientnetv2_b0",
    "efficientvit_b0",
    "efficientvit_m0",
    "starnet_s1",
    "repvgg_a0",
    "repvit_m0_9",
    "fasternet_t0",
    "fastvit_t8",
    "hgnetv2_b0",
    "hgnet_tiny",
    "edgenext_xx_small",
    "mobilevit_xxs",
    "mobilevitv2_050",
    "mambaout_femto",
    "convnext_atto",
    "convnextv2_atto",
    "inception_next_atto",
    "poolformer_s12",
    "poolformerv2_s12",
    "efficientformer_l1",
    "efficientformerv2_s0",
    "levit_128s",
    "pvt_v2_b0",
    "coat_lite_tiny",
    "coatnet_nano_rw_224",
    "xcit_nano_12_p16_224",
    "crossvit_tiny_240",
    "convit_tiny",
    "pit_ti_224",
    "tnt_s_patch16_224",
    "visformer_tiny",
    "twins_svt_small",
    "nest_tiny",
    "focalnet_tiny_srf",
    "davit_tiny",
    "gcvit_xxtiny",
    "tiny_vit_5m_224",
    "hiera_tiny_224",
    "vit_tiny_patch16_224",
    "deit_tiny_patch16_224",
    "deit3_small_patch16_224",
    "eva02_tiny_patch14_224",
    "cait_xxs24_224",
    "beit_base_patch16_224",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "swinv2_cr_tiny_ns_224",
    "maxvit_nano_rw_256",
    "resmlp_12_224",
    "gmlp_ti16_224",
    "mixer_s32_224",
    "convmixer_768_32",
    "resnet26d",
    "resnet26t",
    "resnetv2_50",
    "resnetv2_50x1_bit",
    "resnest14d",
    "skresnet18",
    "seresnet50",
    "ecaresnet26t",
    "res2net50_14w_8s",
    "cspresnet50",
    "cs3darknet_s",
    "darknet53",
    "cspdarknet53",
    "dla46_c",
    "dla34",
    "hrnet_w18_small",
    "selecsls42b",
    "ese_vovnet19b_dw",
    "regnetx_002",
    "regnety_002",
    "regnetz_b16",
    "vgg11_bn",
    "densenet121",
    "rdnet_tiny",
    "dpn48b",
    "dpn68",
    "legacy_xception",
    "xception41",
    "inception_v3",
    "inception_v4",
    "inception_resnet_v2",
    "nf_resnet50",
    "eca_nfnet_l0",
    "botnet26t_256",
    "halonet26t",
    "lambda_resnet26t",
)
FAMILIES = (
    "torchvision",
    "segmentation",
    "detection",
    "timm",
    "transformers",
    "computed weights",
)
# Smallest legal inputs; 64 pixels elsewhere.
TORCHVISION_SIZES = {"inception_v3": 75, "maxvit": 224, "vit_": 224}


@dataclass(frozen=True)
class Network:
    """One builder of one family."""

    family: str
    name: str

    def build(self) -> nn.Module:
        """The network as a user builds it, freshly initialised, in evaluation mode."""
        return BUILDERS[self.family](self.name).eval()

    def size(self, model: nn.Module) -> int:
        """Height and width of the smallest input that the network takes."""
        if self.family == "timm":
            return _timm_size(model)
        if self.family == "transformers":
            return coverage_transformers.image_size(model)
        for prefix, size in TORCHVISION_SIZES.items():
            if self.name.startswith(prefix):
                return size
        return 64


class FirstTensor(nn.Module):
    """The network with its first output only, for exporters that want one tensor."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """The first tensor among the network's outputs, however nested."""
        output = self.model(x)
        while not isinstance(output, Tensor):
            if isinstance(output, dict):
                output = output.values()
            output = next(iter(output))
        return output


def networks(family: str | None = None, pattern: str = "") -> list[Network]:
    """The networks to measure, small ones of a family first.

    Args:
        family: One of `FAMILIES`; None for all.
        pattern: Regular expression that the name contains.
    """
    chosen = []
    for its_family in FAMILIES:
        if family in (None, its_family):
            for name in NAMES[its_family]():
                if re.search(pattern, name):
                    chosen.append(Network(its_family, name))
    return chosen


def example(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensor:
    """Random images.

    Args:
        shape: `(n, channels, height, width)`.
        dtype: Of the values.
        seed: Of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype)


@torch.no_grad()
def randomise(model: nn.Module, size: int, seed: int = 0) -> nn.Module:
    """Draws every parameter and all statistics of batch norm in place.

    Then layers are scaled to outputs of unit size. Fresh networks hold zeros and ones
    (biases, shifts, layer scales, means) under which wrong surgery looks right; and
    purely random ones explode or fade with depth, which drowns or magnifies rounding.

    Args:
        model: The network.
        size: Height and width of its input.
        seed: Of the draw.

    Returns:
        The network.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            _draw(name, parameter, True, generator)
        for name, buffer in module.named_buffers(recurse=False):
            _draw(name, buffer, False, generator)
    hooks = []
    for module in model.modules():
        hooks.append(module.register_forward_hook(_settler(module, generator)))
    n_images = 32 if size < 100 else 4
    model(example((n_images, 3, size, size), seed=seed))
    for hook in hooks:
        hook.remove()
    return model


def _draw(
    name: str, tensor: Tensor, is_parameter: bool, generator: torch.Generator
) -> None:
    """Draws one tensor in place, by its name, if it is a value that matters."""
    # Of frozen batch norms weight and bias are buffers too.
    is_norm = name in ("weight", "bias", "running_mean", "running_var")
    if not tensor.is_floating_point() or not (is_parameter or is_norm):
        return
    if name.endswith("weight") and tensor.ndim > 1:
        tensor.normal_(0, tensor[0].numel() ** -0.5, generator=generator)
    elif re.search("weight|running_var|gamma|alpha|scale|temperature", name):
        tensor.uniform_(0.5, 1.5, generator=generator)
    else:
        tensor.normal_(0, 0.2, generator=generator)


def _settler(module: nn.Module, generator: torch.Generator) -> Callable:
    """A forward hook that settles one layer when it first runs, and runs it again."""
    pending = []
    for kinds, settle in SETTLERS.items():
        if isinstance(module, kinds):
            pending.append(settle)
            break

    def hook(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
        if not pending:
            return None
        pending.pop()(module, inputs[0], output, generator)
        return module.forward(*inputs)

    return hook


def _to_unit_size(
    module: nn.Module, _: Tensor, output: Tensor, generator: torch.Generator
) -> None:
    """Scales a layer's weights so that its outputs deviate by 1."""
    weight = module.weight
    assert isinstance(weight, Tensor), "convolutions and linear layers have one"
    weight /= output.std().clamp_min(1e-3)


def _near_the_statistics(
    module: nn.Module, x: Tensor, _: Tensor, generator: torch.Generator
) -> None:
    """Draws a batch norm's statistics near those of its input."""
    running_mean = module.running_mean
    running_var = module.running_var
    if not (isinstance(running_mean, Tensor) and isinstance(running_var, Tensor)):
        return
    axes = [axis for axis in range(x.ndim) if axis != 1]
    var, mean = torch.var_mean(x, axes, correction=0)
    # A few images say little: others mustn't explode.
    var = var.clamp_min(var.mean().item() + 1e-3)
    running_mean.normal_(0, 0.2, generator=generator).mul_(var.sqrt()).add_(mean)
    running_var.uniform_(0.5, 1.5, generator=generator).mul_(var)


SETTLERS = {
    (nn.modules.conv._ConvNd, nn.Linear): _to_unit_size,
    nn.modules.batchnorm._BatchNorm: _near_the_statistics,
}


def _torchvision_names() -> list[str]:
    """Torchvision's classifiers by number of parameters."""

    def n_params(name: str) -> int:
        weights: Any = torchvision_models.get_model_weights(name)
        return weights.DEFAULT.meta["num_params"]

    names = torchvision_models.list_models(module=torchvision_models)
    return sorted(names, key=n_params)


def _timm_size(model: nn.Module) -> int:
    """Height and width of the smallest input that a network of timm takes."""
    config = cast(dict[str, Any], model.default_cfg)  # an attribute that timm sets
    usual = config["input_size"][-1]
    smallest = config.get("min_input_size", (0, 0, 0))[-1]
    if config.get("fixed_input_size"):
        return usual
    for size in (64, smallest, usual):
        try:
            with torch.no_grad():
                model(torch.zeros(1, 3, size, size))
            return size
        # Too small, or no multiple of what the network needs.
        except (RuntimeError, AssertionError, ValueError):
            continue
    return usual


NAMES: dict[str, Callable[[], list[str]]] = {
    "torchvision": _torchvision_names,
    "segmentation": lambda: list(SEGMENTATION),
    "detection": coverage_detection.names,
    "timm": lambda: list(TIMM),
    "transformers": coverage_transformers.names,
    "computed weights": coverage_weights.names,
}
BUILDERS: dict[str, Callable[[str], nn.Module]] = {
    "torchvision": lambda name: models.build(name, n_classes=1000),
    "segmentation": lambda name: torchvision_models.get_model(
        name, weights=None, weights_backbone=None
    ),
    "detection": coverage_detection.build,
    "timm": lambda name: models.build(f"timm/{name}", n_classes=1000),
    "transformers": coverage_transformers.build,
    "computed weights": coverage_weights.build,
}
