"""Torchvision's detectors: their backbones, parts that run without boxes, the whole."""

from collections.abc import Callable

from torch import Tensor, nn
from torchvision import models
from torchvision.models.detection import backbone_utils

BACKBONES: dict[str, Callable[[], nn.Module]] = {
    "mobilenet_v3_large_fpn": lambda: backbone_utils.mobilenet_backbone(
        backbone_name="mobilenet_v3_large", fpn=True, weights=None
    ),
    "resnet50_fpn": lambda: backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet50", weights=None
    ),
}
# Whole detectors; those in which a head reads all features at once are measured
# without the choice of boxes, too.
DETECTORS = (
    "ssdlite320_mobilenet_v3_large",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "fcos_resnet50_fpn",
    "retinanet_resnet50_fpn",
    "ssd300_vgg16",
    "fasterrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn",
    "keypointrcnn_resnet50_fpn",
)
WITHOUT_BOXES = " without boxes"
HEADS = ("ssdlite320_mobilenet_v3_large", "fcos_resnet50_fpn", "retinanet_resnet50_fpn")


class WithoutBoxes(nn.Module):
    """What a detector computes before it chooses boxes.

    Args:
        detector: One of torchvision's with a backbone and a head.
    """

    def __init__(self, detector: nn.Module):
        super().__init__()
        self.backbone = detector.get_submodule("backbone")
        self.head = detector.get_submodule("head")

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Scores and shapes of all boxes."""
        return self.head(list(self.backbone(x).values()))


def names() -> list[str]:
    """The networks' names, from backbones to whole detectors."""
    return [*BACKBONES, *(name + WITHOUT_BOXES for name in HEADS), *DETECTORS]


def build(name: str) -> nn.Module:
    """A backbone, a detector, or one without the choice of boxes.

    Args:
        name: One of `names`.
    """
    if name in BACKBONES:
        return BACKBONES[name]()
    detector = models.get_model(
        name.removesuffix(WITHOUT_BOXES), weights=None, weights_backbone=None
    )
    return WithoutBoxes(detector) if name.endswith(WITHOUT_BOXES) else detector
