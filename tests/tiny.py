"""A network of the user's own, as `--model tests.tiny:network` names it; seeded: every
process gets the same.
"""

import torch
from torch import nn

from autoprune.data.networks import conv_bn


def network(n_classes: int = 10) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = conv_bn(3, 8), conv_bn(8, 12, stride=2), conv_bn(12, 16, stride=2)
        return nn.Sequential(
            *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, n_classes)
        )


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.body = nn.Sequential(
            conv_bn(channels, width), conv_bn(width, channels, act=False)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.body(x))


def residual(n_classes: int = 10) -> nn.Module:
    """Four blocks that can be removed, behind a stem."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blocks = nn.Sequential(*(Block(8, width) for width in (6, 8, 10, 12)))
        tail = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, n_classes)
        return nn.Sequential(conv_bn(3, 8, stride=2), blocks, *tail)


def hopeless(n_classes: int = 10) -> nn.Module:
    """Nothing in it can be pruned."""
    return nn.Sequential(
        nn.Conv2d(3, n_classes, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


def sick(n_classes: int = 10) -> nn.Module:
    """A network with NaN in its weights."""
    model = network(n_classes)
    with torch.no_grad():
        model[0][0].weight[0, 0, 0, 0] = float("nan")
    return model


def stubborn(n_classes: int = 10) -> nn.Module:
    """Has five outputs, whatever it is asked for."""
    return network(5)


class Twofold(nn.Module):
    def __init__(self, n_classes: int):
        super().__init__()
        self.body = network(n_classes)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.body(x), self.body(x)


def twofold(n_classes: int = 10) -> nn.Module:
    """Answers with two tensors."""
    return Twofold(n_classes)


def demanding(n_classes: int = 10) -> nn.Module:
    """Takes images of four channels only."""
    return nn.Sequential(
        conv_bn(4, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, n_classes)
    )


def halved(n_classes: int = 10) -> nn.Module:
    """In half precision."""
    return network(n_classes).half()
