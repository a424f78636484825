"""The six networks whose latency is predicted and kept, as factories for `--model`.

Their weights are random, which makes no difference to the time. Those of timm and
torchvision read images of 224 x 224 pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoprune.data.models import build


class UNet(nn.Module):
    """A small U-Net: four widths down, three up, with skips.

    Args:
        n_out: Channels of the answer at every pixel.
        width: Channels of the first level; each further level has twice as many.
    """

    def __init__(self, n_out: int = 10, width: int = 32):
        super().__init__()
        self.down = nn.ModuleList()
        n_in = 3
        for level in range(4):
            self.down.append(_double(n_in, width << level))
            n_in = width << level
        self.up = nn.ModuleList()
        self.joined = nn.ModuleList()
        for level in reversed(range(3)):
            n_out_of_level = width << level
            self.up.append(nn.ConvTranspose2d(2 * n_out_of_level, n_out_of_level, 2, 2))
            self.joined.append(_double(2 * n_out_of_level, n_out_of_level))
        self.head = nn.Conv2d(width, n_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of every pixel, `(batch, n_out, height, width)`."""
        skips = []
        for level, block in enumerate(self.down):
            if level:
                x = nn.functional.max_pool2d(x, 2)
            x = block(x)
            skips.append(x)
        skips.pop()
        for up, block in zip(self.up, self.joined, strict=True):
            x = block(torch.cat([skips.pop(), up(x)], 1))
        return self.head(x)


class UNetClassifier(UNet):
    """The same network with one answer an image, so that a run can score it."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(batch, n_out)`."""
        return super().forward(x).mean((2, 3))


def _double(n_in: int, n_out: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (n_in, n_out):
        layers.append(nn.Conv2d(width, n_out, 3, padding=1, bias=False))
        layers.append(nn.BatchNorm2d(n_out))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def resnet56(n_classes: int = 10) -> nn.Module:
    """A CIFAR ResNet."""
    return build("resnet56", n_classes)


def resnet50(n_classes: int = 1000) -> nn.Module:
    """The one of torchvision."""
    return build("resnet50", n_classes)


def mobilenet_v2(n_classes: int = 1000) -> nn.Module:
    """The one of torchvision."""
    return build("mobilenet_v2", n_classes)


def efficientnet_b0(n_classes: int = 1000) -> nn.Module:
    """The one of torchvision."""
    return build("efficientnet_b0", n_classes)


def vit_small(n_classes: int = 1000) -> nn.Module:
    """The ViT-S of timm, with patches of 16 x 16 pixels."""
    return build("timm/vit_small_patch16_224", n_classes)


def unet(n_classes: int = 10) -> nn.Module:
    """`UNetClassifier`."""
    return UNetClassifier(n_classes)


@dataclass(frozen=True)
class TimedNetwork:
    """A network and the images that it is timed with.

    Attributes:
        make: Makes it, freshly initialised.
        side: Of the images, in pixels.
    """

    make: Callable[[], nn.Module]
    side: int


NETWORKS = {
    "resnet56": TimedNetwork(resnet56, 32),
    "resnet50": TimedNetwork(resnet50, 224),
    "mobilenet_v2": TimedNetwork(mobilenet_v2, 224),
    "efficientnet_b0": TimedNetwork(efficientnet_b0, 224),
    "vit_small": TimedNetwork(vit_small, 224),
    "unet": TimedNetwork(UNet, 128),
}
"""Networks by name; `experiments.latency_networks:NAME` is each one's factory."""
