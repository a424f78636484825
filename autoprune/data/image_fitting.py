"""Images of any size made to fit a network: scaled, then cropped at the centre.

To the pixel what torchvision's and timm's transforms do, with Pillow alone.
"""

import numpy as np
from PIL import Image
from torch import Tensor, from_numpy

from autoprune.data.preprocessing import Preprocessing
from autoprune.errors import UserError


def fit_image(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """Fits one image.

    Args:
        image: Of 8 bits a channel.
        preprocessing: Of the network, with or without a size.

    Returns:
        uint8 `(channels, height, width)`.
    """
    # Borders get the colour that becomes zero.
    border = [round(255 * value) for value in preprocessing.mean]
    # Pillow takes a single number for a single channel.
    colour = border[0] if len(border) == 1 else tuple(border)
    fitted = _fit(image, preprocessing, colour)
    values = np.asarray(fitted)
    return values[None] if values.ndim == 2 else values.transpose(2, 0, 1)


def fit_array(values: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """Fits one image that Pillow has no mode for, channel by channel.

    Args:
        values: uint8, or float32 in [0, 1], `(channels, height, width)`.
        preprocessing: Of the network, with or without a size.

    Returns:
        The same type, `(channels, height, width)` of the network.
    """
    is_float = values.dtype == np.float32
    channels = []
    for plane, mean in zip(values, preprocessing.mean, strict=True):
        border = mean if is_float else round(255 * mean)
        image = Image.fromarray(np.ascontiguousarray(plane))
        fitted = np.asarray(_fit(image, preprocessing, border))
        # Bicubic scaling overshoots at edges; with 8 bits Pillow clips by itself.
        channels.append(fitted.clip(0, 1) if is_float else fitted)
    return np.stack(channels)


def _fit(
    image: Image.Image,
    preprocessing: Preprocessing,
    border: float | tuple[int, ...],
) -> Image.Image:
    """The image with the size of the network's inputs, in its own mode."""
    if preprocessing.size is None:
        return image
    height, width = preprocessing.scaled_size(image.height, image.width)
    way = Image.Resampling[preprocessing.interpolation.upper()]
    scaled = image.resize((width, height), way)
    if preprocessing.crop_mode != "border":
        # What torchvision's crop adds where an image is too small for it.
        border = 0 if len(scaled.getbands()) == 1 else (0,) * len(scaled.getbands())
    return _cropped(_bordered(scaled, preprocessing.size, border), preprocessing.size)


def _cropped(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The centre of an image that is at least as large, rounded as torchvision does."""
    height, width = size
    top = round((image.height - height) / 2)
    left = round((image.width - width) / 2)
    return image.crop((left, top, left + width, top + height))


def _bordered(
    image: Image.Image, size: tuple[int, int], border: float | tuple[int, ...]
) -> Image.Image:
    """An image in the middle of borders, where it is smaller than a size."""
    height = max(size[0], image.height)
    width = max(size[1], image.width)
    if (width, height) == image.size:
        return image
    canvas = Image.new(image.mode, (width, height), border)
    canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return canvas


def fit_pixels(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Fits images of one size that are in memory, in colours or grey.

    Args:
        pixels: uint8 `(n, channels, height, width)`, of 1 or 3 channels.
        preprocessing: Of the network, with or without a size.

    Returns:
        uint8 `(n, channels, height, width)` of the network; the same tensor where
        nothing is to be done.

    Raises:
        UserError: If the network reads another number of channels than 1 or 3.
    """
    is_sized = preprocessing.size in (None, tuple(pixels.shape[2:]))
    # Without a crop, an image that has the size stays what it is.
    is_same = is_sized and preprocessing.crop == 1
    if is_same and pixels.shape[1] == preprocessing.channels:
        return pixels
    if preprocessing.channels not in (1, 3):
        raise UserError(
            "channels",
            f"the network reads {preprocessing.channels}, the images have "
            f"{pixels.shape[1]}; take a folder of images with as many",
        )
    mode = "L" if preprocessing.channels == 1 else "RGB"
    fitted = []
    for image in pixels.numpy():
        values = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
        picture = Image.fromarray(np.ascontiguousarray(values)).convert(mode)
        fitted.append(fit_image(picture, preprocessing))
    return from_numpy(np.stack(fitted))
