"""The image size as something to prune: the network sees smaller images, callers give those that they always gave."""

import copy

from torch import Tensor, nn
from torch.nn import functional as F

from autoprune.errors import UserError


class Resized(nn.Module):
    """A network behind a resize of its input: it takes the images that the network itself takes.

    Bilinear and antialiased, so that a smaller image is a mean over the larger one's pixels. Images that have the size
    already pass as they are.

    Args:
        network: Any network that reads images of several sizes, such as one that ends in a mean over space.
        size: Height and width of what it sees, in pixels.

    Raises:
        UserError: If `size` is below 1.
    """

    def __init__(self, network: nn.Module, size: int):
        super().__init__()
        if size < 1:
            raise UserError(f"size: expected at least 1 pixel, got {size}")
        self.network, self.size = network, size
        self.training = network.training

    def forward(self, images: Tensor) -> Tensor:
        """From images `(n, 3, height, width)` to what the network answers on them at `size`."""
        size = (self.size, self.size)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
        return self.network(images)


def at_resolution(model: nn.Module, size: int) -> Resized:
    """A copy of `model` that sees its images at `size` x `size`; of a `Resized` the network inside gets the new size.

    Raises:
        UserError: If `size` is below 1.
    """
    network = model.network if isinstance(model, Resized) else model
    return Resized(copy.deepcopy(network), size)
