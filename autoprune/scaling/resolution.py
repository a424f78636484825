"""The image size as something to prune.

The network sees smaller images, while its callers give those that they always gave.
"""

import copy

from torch import Tensor, nn

from autoprune.errors import UserError


class Resize:
    """What a network with resized inputs does first with its images.

    Bilinear and antialiased, so that a smaller image is a mean over the larger one's
    pixels. Images that have the size already pass as they are.

    Attributes:
        size: Height and width, in pixels.
    """

    def __init__(self, size: int):
        self.size = size

    def __call__(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        """Resizes the images of a forward pass.

        Args:
            module: The network; unused, as PyTorch gives it to every such hook.
            args: The images alone, `(batch, channels, height, width)`.

        Returns:
            What the network reads: the images alone, `(batch, channels, size, size)`.
        """
        (images,) = args
        size = (self.size, self.size)
        # The dense network stays exactly what it was, in an exported graph as well.
        if images.shape[-2:] == size:
            return args
        resized = nn.functional.interpolate(
            images, size, mode="bilinear", align_corners=False, antialias=True
        )
        return (resized,)


def resize_inputs(model: nn.Module, size: int) -> nn.Module:
    """A copy of `model` that sees its images at `size` x `size`.

    The resize is a forward hook, so that layers keep their names; it is copied, traced
    and exported with the network. A copy of a network that resizes already gets the new
    size in place of the old one.

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
    # PyTorch has no public list of hooks.
    hooks = resized._forward_pre_hooks
    for key, hook in list(hooks.items()):
        # Two resizes in a row would blur: down to the old size first, then to the new.
        if isinstance(hook, Resize):
            del hooks[key]
    resized.register_forward_pre_hook(Resize(size))
    return resized
