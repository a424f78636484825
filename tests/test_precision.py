"""The precision that training computes in: where it differs from plain autocast, and
where it doesn't.
"""

import pytest
import torch
from torch import nn

from autoprune.evaluation.precision import autocast, training_autocast

SLOW = {
    "stride": nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=6),
    "stride one way": nn.Conv2d(6, 6, 3, stride=(1, 2), groups=6, bias=False),
    "large kernel": nn.Conv2d(6, 6, 5, padding=2, groups=6),
    "several outputs a channel": nn.Conv2d(6, 12, 3, stride=2, groups=6),
}
FAST = {
    "depthwise": nn.Conv2d(6, 6, 3, padding=1, groups=6),
    "pointwise": nn.Conv2d(6, 6, 1),
    "grouped": nn.Conv2d(6, 6, 3, stride=2, groups=3),
    "dense": nn.Conv2d(6, 6, 5, stride=2),
}


def through(layer: nn.Conv2d, context) -> tuple[torch.Tensor, torch.Tensor]:
    """Output of a layer and the gradient of its weight."""
    inputs = torch.randn(
        4, layer.in_channels, 8, 8, generator=torch.Generator().manual_seed(0)
    ).bfloat16()
    with context:
        output = layer(inputs)
    layer.zero_grad()
    output.float().square().sum().backward()
    return output.detach(), layer.weight.grad.clone()


@pytest.mark.parametrize("layer", SLOW.values(), ids=SLOW)
def test_depthwise_convolutions_with_a_slow_gradient_take_float32(layer):
    output, gradient = through(layer, training_autocast("on"))
    exact = torch.nn.functional.conv2d(
        *(
            torch.randn(4, 6, 8, 8, generator=torch.Generator().manual_seed(0))
            .bfloat16()
            .float(),
            layer.weight,
        ),
        *(layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups),
    )
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, exact.bfloat16())
    rounded, coarse = through(layer, autocast("on"))
    assert not torch.equal(gradient, coarse), "it is computed as everything else"
    torch.testing.assert_close(output, rounded, rtol=0.05, atol=0.05)
    torch.testing.assert_close(
        gradient, coarse, rtol=0.05, atol=0.05 * coarse.abs().max().item()
    )


@pytest.mark.parametrize("layer", FAST.values(), ids=FAST)
def test_other_convolutions_are_as_under_plain_autocast(layer):
    for one, other in zip(
        through(layer, training_autocast("on")),
        through(layer, autocast("on")),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_images_of_one_channel_are_no_depthwise_convolution():
    layer = nn.Conv2d(1, 6, 3, stride=2)
    assert torch.equal(
        through(layer, training_autocast("on"))[0], through(layer, autocast("on"))[0]
    )


def test_without_bfloat16_everything_is_float32():
    layer = nn.Conv2d(6, 6, 3, stride=2, groups=6)
    inputs = torch.randn(1, 6, 8, 8)
    with training_autocast("off"):
        inside = layer(inputs)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, layer(inputs))


def test_nothing_is_left_behind_when_a_pass_fails():
    layer = nn.Conv2d(6, 6, 3, stride=2, groups=6)
    with pytest.raises(RuntimeError, match="channels"), training_autocast("on"):
        layer(torch.randn(1, 5, 8, 8))
    assert layer(torch.randn(1, 6, 8, 8)).dtype == torch.float32
