"""A small, representative part of `experiments/coverage.py`: the same checks on tiny
members of many families.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import transformers
from torch import nn
from torchvision.models import (
    convnext,
    densenet,
    maxvit,
    regnet,
    resnet,
    swin_transformer,
    vision_transformer,
)

from autoprune.data import models
from experiments.coverage_checks import CHECKS, Case, check_onnx, make_case
from experiments.coverage_networks import Network


def tiny_convnext() -> nn.Module:
    setting = [convnext.CNBlockConfig(16, 24, 2), convnext.CNBlockConfig(24, None, 1)]
    return convnext.ConvNeXt(setting, num_classes=10)


def tiny_swin(
    block: Callable = swin_transformer.SwinTransformerBlock, **options
) -> nn.Module:
    return swin_transformer.SwinTransformer(
        [4, 4],
        24,
        [2, 2],
        [2, 4],
        [4, 4],
        stochastic_depth_prob=0.0,
        num_classes=10,
        block=block,
        **options,
    )


def tiny_swin_v2() -> nn.Module:
    merging = swin_transformer.PatchMergingV2
    return tiny_swin(swin_transformer.SwinTransformerBlockV2, downsample_layer=merging)


def tiny_maxvit() -> nn.Module:
    return maxvit.MaxVit(
        (32, 32), 16, 4, [16, 32], [1, 1], 8, stochastic_depth_prob=0.0, num_classes=10
    )


def tiny_regnet() -> nn.Module:
    parameters = regnet.BlockParams.from_init_params(
        3, 16, 20.0, 2.0, group_width=8, se_ratio=0.25
    )
    return regnet.RegNet(parameters, num_classes=10)


def tiny_hugging_face_vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
    )
    return transformers.ViTForImageClassification(config)


# Name to how it is built and the size of its input.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnext": (
        lambda: resnet.ResNet(
            resnet.Bottleneck, [1, 1, 1, 1], 10, groups=4, width_per_group=8
        ),
        32,
    ),
    "densenet": (lambda: densenet.DenseNet(8, (2, 2, 2), 16, num_classes=10), 32),
    "regnet_y": (tiny_regnet, 32),
    "googlenet": (lambda: models.build("googlenet"), 32),
    "squeezenet1_1": (lambda: models.build("squeezenet1_1"), 32),
    "shufflenet_v2_x0_5": (lambda: models.build("shufflenet_v2_x0_5"), 32),
    "mobilenet_v3_small": (lambda: models.build("mobilenet_v3_small"), 32),
    "efficientnet_b0": (lambda: models.build("efficientnet_b0"), 32),
    "convnext": (tiny_convnext, 32),
    "swin": (tiny_swin, 32),
    "swin_v2": (tiny_swin_v2, 32),
    "vit": (
        lambda: vision_transformer.VisionTransformer(
            32, 8, 2, 4, 32, 48, num_classes=10
        ),
        32,
    ),
    "maxvit": (tiny_maxvit, 32),
    "hugging_face_vit": (tiny_hugging_face_vit, 32),
}


@dataclass(frozen=True)
class Tiny(Network):
    """One of `NETWORKS`."""

    def build(self) -> nn.Module:
        return NETWORKS[self.name][0]().eval()

    def size(self, model: nn.Module) -> int:
        return NETWORKS[self.name][1]


@pytest.fixture(scope="module", params=NETWORKS)
def case(request) -> Case:
    torch.manual_seed(0)
    case = make_case(Tiny("tiny", request.param))
    CHECKS["proof"](case)
    return case


@pytest.mark.parametrize("check", ["equivalence", "zeroed", "costs", "reload", "step"])
def test_network_is_pruned_right(case, check):
    assert CHECKS[check](case)


def test_only_what_cannot_shrink_is_pinned(case):
    reasons = {group.pinned for group in case.groups.pinned}
    wanted = {"is the network's input", "feeds the network's output"}
    assert (
        wanted
        <= reasons
        <= wanted | {"is a single channel", "no layer of the network produces it"}
    )


@pytest.mark.parametrize("name", ["regnet_y", "swin", "vit"])
def test_pruned_network_runs_in_onnx_runtime(name):
    case = make_case(Tiny("tiny", name))
    CHECKS["trace"](case)
    assert check_onnx(case)
