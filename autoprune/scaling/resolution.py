"""The image size as something to prune: the network sees smaller images, callers give
those that they always gave.
"""

import copy

from torch import Tensor, nn
from torch.nn import functional as F

from autoprune.errors import UserError


class Resize:
    """What a network does first with its images once it is `at_resolution`.

    Bilinear and antialiased, so that a smaller image is a mean over the larger one's
    pixels. Images that have the size already pass as they are.

    Attributes:
        size: Height and width, in pixels.
    """

    def __init__(self, size: int):
        self.size = size

    def __call__(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        """From a forward pass's `(images,)` to those that the network reads."""
        (images,), size = args, (self.size, self.size)
        if images.shape[-2:] == size:
            return args
        return (
            F.interpolate(
                images, size, mode="bilinear", align_corners=False, antialias=True
            ),
        )


def at_resolution(model: nn.Module, size: int) -> nn.Module:
    """A copy of `model` that sees its images at `size` x `size`; a copy of one that is
    resized gets the new size.

    The resize is a forward hook, so that layers keep their names; it is copied, traced
    and exported with the network.

    Args:
        model: Any network that reads images of several sizes, such as one that ends in
            a mean over space.
        size: Height and width of what it sees, in pixels.

    Raises:
        UserError: If `size` is below 1.
    """
    if size < 1:
        raise UserError("size", f"expected at least 1 pixel, got {size}")
    resized = copy.deepcopy(model)
    for key, hook in list(resized._forward_pre_hooks.items()):
        if isinstance(hook, Resize):
            del resized._forward_pre_hooks[key]
    resized.register_forward_pre_hook(Resize(size))
    return resized
