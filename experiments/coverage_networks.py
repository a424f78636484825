"""The networks that coverage is measured on: builders without weights, and values under
which nothing hides.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision import models as torchvision_models
from torchvision.models.detection import backbone_utils

from autoprune.data import models

SEGMENTATION = (
    "lraspp_mobilenet_v3_large",
    "deeplabv3_mobilenet_v3_large",
    "fcn_resnet50",
    "deeplabv3_resnet50",
    "fcn_resnet101",
    "deeplabv3_resnet101",
)
BACKBONES: dict[str, Callable[[], nn.Module]] = {
    "mobilenet_v3_large_fpn": lambda: backbone_utils.mobilenet_backbone(
        backbone_name="mobilenet_v3_large", fpn=True, weights=None
    ),
    "resnet50_fpn": lambda: backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet50", weights=None
    ),
}
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
FAMILIES = ("torchvision", "segmentation", "detection", "timm")
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
        return next(
            (
                size
                for prefix, size in TORCHVISION_SIZES.items()
                if self.name.startswith(prefix)
            ),
            64,
        )


class FirstTensor(nn.Module):
    """The network with its first output only, for exporters that want a single tensor."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        output = self.model(x)
        while not isinstance(output, Tensor):
            output = next(iter(output.values() if isinstance(output, dict) else output))
        return output


def networks(family: str | None = None, pattern: str = "") -> list[Network]:
    """The networks of one family, or of all, whose name contains the regular
    expression; small ones first.
    """
    chosen = [
        Network(f, name) for f in FAMILIES if family in (None, f) for name in NAMES[f]()
    ]
    return [network for network in chosen if re.search(pattern, network.name)]


def example(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensor:
    """Random images."""
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=dtype
    )


@torch.no_grad()
def randomise(model: nn.Module, size: int, seed: int = 0) -> nn.Module:
    """Draws every parameter and all statistics of batch norm in place, and scales
    layers to outputs of unit size.

    Fresh networks hold zeros and ones (biases, shifts, layer scales, means) under which
    wrong surgery looks right; and purely random ones explode or fade with depth, which
    drowns or magnifies rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, tensor in (
            *module.named_parameters(recurse=False),
            *module.named_buffers(recurse=False),
        ):
            _draw(name, tensor, isinstance(tensor, nn.Parameter), generator)
    hooks = [
        module.register_forward_hook(_settler(module, generator))
        for module in model.modules()
    ]
    model(example((32 if size < 100 else 4, 3, size, size), seed=seed))
    for hook in hooks:
        hook.remove()
    return model


def _draw(
    name: str, tensor: Tensor, is_parameter: bool, generator: torch.Generator
) -> None:
    is_norm = name in (
        "weight",
        "bias",
        "running_mean",
        "running_var",
    )  # of frozen batch norms these are buffers
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
    settle = next(
        (f for kinds, f in SETTLERS.items() if isinstance(module, kinds)), None
    )
    pending = [settle] if settle else []

    def hook(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
        if not pending:
            return None
        pending.pop()(module, inputs[0], output, generator)
        return module.forward(*inputs)

    return hook


def _to_unit_size(
    module: nn.Module, _: Tensor, output: Tensor, generator: torch.Generator
) -> None:
    module.weight /= output.std().clamp_min(1e-3)


def _near_the_statistics(
    module: nn.Module, x: Tensor, _: Tensor, generator: torch.Generator
) -> None:
    if module.running_var is None:
        return
    axes = [axis for axis in range(x.ndim) if axis != 1]
    var, mean = torch.var_mean(x, axes, correction=0)
    var = var.clamp_min(
        var.mean().item() + 1e-3
    )  # a few images say little: other images mustn't explode
    module.running_mean.normal_(0, 0.2, generator=generator).mul_(var.sqrt()).add_(mean)
    module.running_var.uniform_(0.5, 1.5, generator=generator).mul_(var)


SETTLERS = {
    (nn.modules.conv._ConvNd, nn.Linear): _to_unit_size,
    nn.modules.batchnorm._BatchNorm: _near_the_statistics,
}


def _torchvision_names() -> list[str]:
    def n_params(name: str) -> int:
        return torchvision_models.get_model_weights(name).DEFAULT.meta["num_params"]

    return sorted(
        torchvision_models.list_models(module=torchvision_models), key=n_params
    )


def _timm_size(model: nn.Module) -> int:
    config = model.default_cfg
    usual, smallest = (
        config["input_size"][-1],
        config.get("min_input_size", (0, 0, 0))[-1],
    )
    if config.get("fixed_input_size"):
        return usual
    for size in (64, smallest, usual):
        try:
            with torch.no_grad():
                model(torch.zeros(1, 3, size, size))
            return size
        except (
            RuntimeError,
            AssertionError,
            ValueError,
        ):  # too small, or no multiple of what the network needs
            continue
    return usual


NAMES: dict[str, Callable[[], list[str]]] = {
    "torchvision": _torchvision_names,
    "segmentation": lambda: list(SEGMENTATION),
    "detection": lambda: list(BACKBONES),
    "timm": lambda: list(TIMM),
}
BUILDERS: dict[str, Callable[[str], nn.Module]] = {
    "torchvision": lambda name: models.build(name, n_classes=1000),
    "segmentation": lambda name: torchvision_models.get_model(
        name, weights=None, weights_backbone=None
    ),
    "detection": lambda name: BACKBONES[name](),
    "timm": lambda name: models.build(f"timm/{name}", n_classes=1000),
}
