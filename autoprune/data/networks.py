"""Networks for small images: CIFAR ResNets, VGG-16, MobileNets."""

from torch import Tensor, nn
from torch.nn import functional as F


def conv_bn(
    n_in: int, n_out: int, kernel: int = 3, stride: int = 1, groups: int = 1, act: bool = True
) -> nn.Sequential:
    """A convolution without bias, batch norm and (unless `act` is false) ReLU; padding
    keeps the size at stride 1.
    """
    layers = [nn.Conv2d(n_in, n_out, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(n_out)]
    return nn.Sequential(*layers, nn.ReLU(inplace=True)) if act else nn.Sequential(*layers)


class PadShortcut(nn.Module):
    """Option A of He et al. 2016 (section 4.2): stride by slicing, new channels are
    zeros on both sides.
    """

    def __init__(self, n_in: int, n_out: int, stride: int):
        super().__init__()
        self.stride = stride
        self.padding = (n_out - n_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, parameter names as in akamaster's public
    checkpoints.
    """

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
    """ResNet for 32x32 images (He et al. 2016, section 4.2): 6n + 2 layers, widths 16,
    32, 64.

    Args:
        depth: 20, 32, 44, 56, 110 or any other 6n + 2.
        n_classes: Width of the head.
        option: Shortcut where the width changes: "A" pads with zeros, "B" is a 1x1
            convolution.
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
    """MobileNet (Howard et al. 2017) for 32x32 images: stride 1 in the stem and in the
    first strided block.
    """

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
    """Expand, depthwise, project; added to the input where the shape allows (Sandler et
    al. 2018).
    """

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
    """MobileNetV2 (Sandler et al. 2018) for 32x32 images: stride 1 in the stem and in
    the second stage.
    """

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
    """He et al. 2015: draws the weight of a convolution or linear layer for its own
    fan-in; for `nn.Module.apply`.
    """
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight)
