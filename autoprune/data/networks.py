"""Networks for small images: CIFAR ResNets, VGG-16, MobileNets."""

from torch import Tensor, nn
from torch.nn import functional as F


def conv_bn(
    n_in: int,
    n_out: int,
    kernel: int = 3,
    stride: int = 1,
    groups: int = 1,
    act: bool = True,
) -> nn.Sequential:
    """A convolution without bias, a batch norm and a ReLU.

    Args:
        n_in: Input channels.
        n_out: Output channels.
        kernel: Height and width of the kernel; padding keeps the size at stride 1.
        stride: Of the convolution.
        groups: Of the convolution; as many as channels make it depthwise.
        act: Whether there is a ReLU.

    Returns:
        The two or three layers in order.
    """
    padding = kernel // 2
    # A bias would be taken out by the batch norm's mean.
    layers: list[nn.Module] = [
        nn.Conv2d(n_in, n_out, kernel, stride, padding, groups=groups, bias=False),
        nn.BatchNorm2d(n_out),
    ]
    if act:
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


class PadShortcut(nn.Module):
    """Option A of He et al. 2016 (section 4.2): a shortcut without weights.

    It strides by slicing, and new channels are zeros on both sides.

    Args:
        n_in: Input channels.
        n_out: Output channels.
        stride: In both directions.
    """

    def __init__(self, n_in: int, n_out: int, stride: int):
        super().__init__()
        self.stride = stride
        self.padding = (n_out - n_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        """From `(n, n_in, height, width)` to `(n, n_out, height, width)` by stride."""
        strided = x[:, :, :: self.stride, :: self.stride]
        return F.pad(strided, (0, 0, 0, 0, self.padding, self.padding))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut.

    Parameter names are as in akamaster's public checkpoints.

    Args:
        n_in: Input channels.
        n_out: Output channels.
        stride: Of the first convolution.
        option: The shortcut where the shape changes, see `CifarResNet`.
    """

    def __init__(self, n_in: int, n_out: int, stride: int, option: str):
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.shortcut = nn.Identity()
        if stride != 1 or n_in != n_out:
            if option == "A":
                self.shortcut = PadShortcut(n_in, n_out, stride)
            else:
                self.shortcut = conv_bn(n_in, n_out, 1, stride, act=False)

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps `(n, n_out, height, width)`."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class CifarResNet(nn.Module):
    """ResNet for 32x32 images (He et al. 2016, section 4.2), with 6n + 2 layers.

    Its three stages are 16, 32 and 64 channels wide.

    Args:
        depth: 20, 32, 44, 56, 110 or any other 6n + 2.
        n_classes: Width of the head.
        option: Shortcut where the width changes: "A" pads with zeros, "B" is a 1x1
            convolution.
    """

    def __init__(self, depth: int, n_classes: int = 10, option: str = "A"):
        super().__init__()
        # Two layers a block in three stages; the stem and the head are the other two.
        n_blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, n_blocks, 1, option)
        self.layer2 = self._stage(16, 32, n_blocks, 2, option)
        self.layer3 = self._stage(32, 64, n_blocks, 2, option)
        self.linear = nn.Linear(64, n_classes)
        self.apply(kaiming)

    @staticmethod
    def _stage(
        n_in: int, n_out: int, n_blocks: int, stride: int, option: str
    ) -> nn.Sequential:
        """Blocks of one width, of which the first changes the shape."""
        blocks = [BasicBlock(n_in, n_out, stride, option)]
        for _ in range(n_blocks - 1):
            blocks.append(BasicBlock(n_out, n_out, 1, option))
        return nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(n, n_classes)`."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))


class CifarVGG16(nn.Module):
    """VGG-16 with batch norm for 32x32 images: 13 convolutions and one linear layer.

    Args:
        n_classes: Width of the head.
    """

    # Widths of the convolutions by stage; each stage ends with a pooling.
    STAGES = (
        (64, 64),
        (128, 128),
        (256, 256, 256),
        (512, 512, 512),
        (512, 512, 512),
    )

    def __init__(self, n_classes: int = 10):
        super().__init__()
        layers: list[nn.Module] = []
        n_in = 3
        for widths in self.STAGES:
            for width in widths:
                layers.append(conv_bn(n_in, width))
                n_in = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(512, n_classes)
        self.apply(kaiming)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(n, n_classes)`."""
        return self.classifier(self.features(x).flatten(1))


class CifarMobileNetV1(nn.Module):
    """MobileNet (Howard et al. 2017) for 32x32 images.

    For the small images, the stem and the first strided block have stride 1.

    Args:
        n_classes: Width of the head.
    """

    # Width and stride of each block.
    BLOCKS = (
        (64, 1),
        (128, 1),
        (128, 1),
        (256, 2),
        (256, 1),
        (512, 2),
        *[(512, 1)] * 5,
        (1024, 2),
        (1024, 1),
    )

    def __init__(self, n_classes: int = 10):
        super().__init__()
        n_in = 32
        # Stride 1, since images of 32 pixels leave little to be halved.
        layers = [conv_bn(3, n_in)]
        for width, stride in self.BLOCKS:
            layers.append(conv_bn(n_in, n_in, 3, stride, groups=n_in))
            layers.append(conv_bn(n_in, width, 1))
            n_in = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(1024, n_classes)
        self.apply(kaiming)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(n, n_classes)`."""
        pooled = F.adaptive_avg_pool2d(self.features(x), 1)
        return self.classifier(pooled.flatten(1))


class InvertedResidual(nn.Module):
    """Expand, depthwise, project (Sandler et al. 2018).

    The result is added to the input where the shape allows.

    Args:
        n_in: Input channels.
        n_out: Output channels.
        stride: Of the depthwise convolution.
        expansion: How many times as many channels there are in between; 1 for no layer
            that expands.
    """

    def __init__(self, n_in: int, n_out: int, stride: int, expansion: int):
        super().__init__()
        hidden = n_in * expansion
        layers = []
        if expansion != 1:
            layers.append(conv_bn(n_in, hidden, 1))
        layers.append(conv_bn(hidden, hidden, 3, stride, groups=hidden))
        layers.append(conv_bn(hidden, n_out, 1, act=False))
        self.body = nn.Sequential(*layers)
        self.is_residual = stride == 1 and n_in == n_out

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps `(n, n_out, height, width)`."""
        # No ReLU behind the sum: the paper keeps narrow layers linear.
        return x + self.body(x) if self.is_residual else self.body(x)


class CifarMobileNetV2(nn.Module):
    """MobileNetV2 (Sandler et al. 2018) for 32x32 images.

    For the small images, the stem and the second stage have stride 1.

    Args:
        n_classes: Width of the head.
    """

    # Expansion, width, blocks and stride of each stage, as in the paper's table 2.
    STAGES = (
        (1, 16, 1, 1),
        (6, 24, 2, 1),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )

    def __init__(self, n_classes: int = 10):
        super().__init__()
        n_in = 32
        layers: list[nn.Module] = [conv_bn(3, n_in)]
        for expansion, width, n_blocks, stride in self.STAGES:
            for index in range(n_blocks):
                # Only the first block of a stage makes the image smaller.
                block_stride = stride if index == 0 else 1
                layers.append(InvertedResidual(n_in, width, block_stride, expansion))
                n_in = width
        self.features = nn.Sequential(*layers, conv_bn(n_in, 1280, 1))
        self.classifier = nn.Linear(1280, n_classes)
        self.apply(kaiming)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(n, n_classes)`."""
        pooled = F.adaptive_avg_pool2d(self.features(x), 1)
        return self.classifier(pooled.flatten(1))


def kaiming(module: nn.Module) -> None:
    """Draws a layer's weight for its own fan-in (He et al. 2015); for `Module.apply`.

    Args:
        module: Any; only convolutions and linear layers are changed.
    """
    # Batch norms begin as the identity, which is right.
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight)
