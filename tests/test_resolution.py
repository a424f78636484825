"""A resized network takes the same images, costs what its size says, and is traced and
exported like any other.
"""

import pytest
import torch
from nets import build, counted_macs, images, tensors
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune.deploy.export import export_onnx, onnx_session
from autoprune.errors import UserError
from autoprune.scaling.resolution import Resize, resize_inputs
from autoprune.tracing.trace import trace

SIZE = 8


class Plain(nn.Module):
    """Convolutions that keep the size, so that every MAC is done once a pixel."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).mean((2, 3))


@pytest.mark.parametrize("size", [1, 2, 6, 8, 12])
def test_macs_scale_with_the_area(size):
    full = counted_macs(Plain(), SIZE)
    assert full == SIZE**2 * (3 * 4 * 9 + 4 * 5)
    assert counted_macs(resize_inputs(Plain(), size), SIZE) * SIZE**2 == full * size**2


@pytest.mark.parametrize("name", ["chain", "residual", "squeeze_excitation"])
def test_at_full_size_it_is_the_network_bit_for_bit(name):
    model, x = build(name), images(2, SIZE)
    with torch.no_grad():
        assert torch.equal(resize_inputs(model, SIZE)(x), model(x))


def test_half_the_size_is_a_weighted_mean_of_neighbours():
    """A triangle of four pixels' width: 1, 3, 3, 1 eighths inside, and what is left of
    it at the border.
    """
    weights = torch.zeros(4, 8, dtype=torch.float64)
    for row in range(4):
        for offset, weight in zip(range(-1, 3), (1, 3, 3, 1), strict=True):
            if 0 <= 2 * row + offset < 8:
                weights[row, 2 * row + offset] = weight
    weights /= weights.sum(1, keepdim=True)
    x = images(2, 8, torch.float64)
    seen = resize_inputs(nn.Identity(), 4)(x)
    torch.testing.assert_close(seen, weights @ x @ weights.T, rtol=1e-12, atol=1e-12)


def test_the_network_sees_the_new_size_and_images_of_any_shape_are_taken():
    seen = resize_inputs(nn.Identity(), 5)
    assert seen(torch.ones(2, 3, 9, 7)).shape == (2, 3, 5, 5)
    assert torch.allclose(seen(torch.ones(2, 3, 9, 7)), torch.ones(()))


def test_it_is_a_copy_that_can_be_trained_without_the_original():
    model, x = build("chain"), images(2, SIZE)
    before = [tensor.clone() for tensor in tensors(model)]
    resized = resize_inputs(model, 6).train()
    F.cross_entropy(resized(x), torch.tensor([0, 1])).backward()
    torch.optim.SGD(resized.parameters(), 1.0).step()
    assert not torch.equal(resized.conv1.weight, model.conv1.weight)
    assert all(map(torch.equal, tensors(model), before))
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_that_of_the_network(training):
    assert resize_inputs(build("chain").train(training), 6).training is training


def test_a_resized_network_is_not_nested():
    twice = resize_inputs(resize_inputs(build("chain"), 2), 6)
    assert [
        hook.size
        for hook in twice._forward_pre_hooks.values()
        if isinstance(hook, Resize)
    ] == [6]
    x = images(2, SIZE)
    with torch.no_grad():
        assert torch.equal(twice(x), resize_inputs(build("chain"), 6)(x))


@pytest.mark.parametrize("name", ["chain", "residual"])
def test_the_trace_finds_the_same_groups(name):
    model, x = build(name), images(1, SIZE)
    whole, resized = trace(model, x).all, trace(resize_inputs(model, 5), x).all
    assert [(g.name, g.channels, g.pinned) for g in resized] == [
        (g.name, g.channels, g.pinned) for g in whole
    ]


@pytest.mark.parametrize("size", [5, 11])
def test_onnx_takes_the_original_images_and_answers_the_same(size, tmp_path):
    resized, x = resize_inputs(build("chain"), size), images(3, SIZE)
    assert export_onnx(resized, x[:1], tmp_path / "model.onnx") < 1e-5
    (answers,) = onnx_session(tmp_path / "model.onnx").run(None, {"images": x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(
            torch.from_numpy(answers), resized(x), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("size", [0, -3])
def test_a_size_below_one_is_refused(size):
    with pytest.raises(
        UserError, match=rf"^size: expected at least 1 pixel, got {size}$"
    ):
        resize_inputs(build("chain"), size)
