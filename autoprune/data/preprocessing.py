"""What becomes of an image before a network reads it; it belongs to the network.

The rule for values: integers are divided by their largest value (8 bits by 255, 16 bits
by 65,535), floats have to lie in [0, 1] already; then the mean is taken out and the
rest divided by the deviation, channel by channel, colours as red, green, blue.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autoprune.config import CROP_MODES, INTERPOLATIONS
from autoprune.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Of red, green and blue in [0, 1]; the public CIFAR-10 ResNets were trained with it,
too.
"""
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Its deviation."""
USUAL = "the usual values (ImageNet's)"
"""Where values come from that nobody stated."""
LARGEST_16_BITS = 65_535


@dataclass(frozen=True)
class Preprocessing:
    """How images become the inputs of one network.

    `scaled_size` and `size` say how an image is scaled and cropped, `normalize` what
    becomes of its values.

    Attributes:
        mean: Of each channel, of values in [0, 1].
        std: Deviation of each channel, of values in [0, 1].
        size: Height and width of the inputs in pixels; None for images as they are.
        interpolation: How images are scaled: one of `INTERPOLATIONS`.
        crop: Side of the inputs as a share of the scaled image's, above 0; above 1, as
            some of timm's networks have it, the image gets a black border.
        crop_mode: How an image of another shape is made to fit: one of `CROP_MODES`.
        source: Where the values come from, in words.
    """

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    size: tuple[int, int] | None = None
    interpolation: str = "bilinear"
    crop: float = 1.0
    crop_mode: str = "center"
    source: str = USUAL

    def __post_init__(self) -> None:
        if not self.mean or len(self.mean) != len(self.std):
            raise UserError(
                "std",
                f"mean and std need a value for each channel, got {len(self.mean)} and "
                f"{len(self.std)}",
            )
        if not all(math.isfinite(value) for value in self.mean):
            raise UserError("mean", f"must be finite, got {_listed(self.mean)}")
        if not all(0 < value < math.inf for value in self.std):
            raise UserError("std", f"must be above 0, got {_listed(self.std)}")
        if self.size is not None and min(self.size) < 1:
            raise UserError(
                "image_size", f"must be at least 1, got {size_text(self.size)}"
            )
        if not 0 < self.crop < math.inf:
            raise UserError("crop", f"must be a share above 0, got {self.crop:g}")
        for argument, value, known in (
            ("interpolation", self.interpolation, INTERPOLATIONS),
            ("crop", self.crop_mode, CROP_MODES),
        ):
            if value not in known:
                raise UserError(
                    argument, f"must be one of {', '.join(known)}, got {value!r}"
                )

    @classmethod
    def usual(cls, channels: int = 3) -> "Preprocessing":
        """What is used where nobody said anything: ImageNet's mean and deviation.

        Args:
            channels: Of the images; for all but three of them the averages over
                ImageNet's colours.
        """
        return cls().for_channels(channels)

    @property
    def channels(self) -> int:
        """How many channels the network reads: 1 for grey, 3 for colours."""
        return len(self.mean)

    @property
    def resize(self) -> tuple[int, int] | None:
        """Height and width that an image is scaled to before it is cropped."""
        if self.size is None:
            return None
        height, width = self.size
        return math.floor(height / self.crop), math.floor(width / self.crop)

    def for_channels(self, channels: int) -> "Preprocessing":
        """The same for another number of channels.

        Args:
            channels: One mean and deviation for all of them: the averages.
        """
        if channels == self.channels:
            return self
        mean = sum(self.mean) / self.channels
        std = sum(self.std) / self.channels
        return dataclasses.replace(
            self, mean=(round(mean, 4),) * channels, std=(round(std, 4),) * channels
        )

    def with_size(self, size: tuple[int, int], source: str) -> "Preprocessing":
        """The same for inputs of another size.

        Args:
            size: Height and width in pixels.
            source: Whose size it is.
        """
        source = f"{self.source}; size: {source}"
        return dataclasses.replace(self, size=size, source=source)

    def normalize(self, pixels: Tensor) -> Tensor:
        """Turns pixels into what the network reads.

        Args:
            pixels: `(n, channels, height, width)`, as from `checked_pixels`.

        Returns:
            float32 of the same shape with mean and deviation taken out, channels last.

        Raises:
            UserError: If they have another number of channels.
        """
        if pixels.shape[1] != self.channels:
            raise UserError(
                "channels",
                f"the images have {pixels.shape[1]}, the preprocessing is for "
                f"{self.channels}",
            )
        values = pixels.float()
        # Floats are in [0, 1] already, and nothing is divided twice.
        if pixels.dtype == torch.uint8:
            values = values / 255
        mean = torch.tensor(self.mean).view(1, -1, 1, 1)
        std = torch.tensor(self.std).view(1, -1, 1, 1)
        inputs = (values - mean) / std
        # Convolutions on the CPU are fastest in this layout.
        return inputs.contiguous(memory_format=torch.channels_last)

    def scaled_size(self, height: int, width: int) -> tuple[int, int]:
        """To which height and width an image is scaled before it is cropped.

        As torchvision's `Resize` and timm's transforms do it, to the pixel.

        Args:
            height: Of the image.
            width: Of the image.
        """
        if self.resize is None:
            return height, width
        to_height, to_width = self.resize
        if self.crop_mode == "squash":
            return to_height, to_width
        ratios = (height / to_height, width / to_width)
        if self.crop_mode == "border":
            ratio = max(ratios)
        elif to_height == to_width:
            # torchvision rounds down here where timm, below, rounds to the nearest.
            short, long = sorted((height, width))
            longer = int(to_height * long / short)
            return (to_height, longer) if height <= width else (longer, to_height)
        else:
            ratio = min(ratios)
        return round(height / ratio), round(width / ratio)

    def describe(self) -> str:
        """One line of text."""
        size = "as they are" if self.size is None else size_text(self.size)
        return (
            f"mean {_listed(self.mean)}, std {_listed(self.std)}, "
            f"{_channels_text(self.channels)}, {size}, {self.interpolation}, crop "
            f"{self.crop:.4g} {self.crop_mode}, from {self.source}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON and YAML; `from_dict` reads it."""
        return {
            "mean": list(self.mean),
            "std": list(self.std),
            "channels": self.channels,
            "size": None if self.size is None else list(self.size),
            "interpolation": self.interpolation,
            "crop": self.crop,
            "crop_mode": self.crop_mode,
            "resize": None if self.resize is None else list(self.resize),
            "source": self.source,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Preprocessing":
        """What `to_dict` gave.

        Args:
            values: Plain data.

        Raises:
            UserError: If it isn't that.
        """
        try:
            size = values["size"]
            return cls(
                mean=tuple(values["mean"]),
                std=tuple(values["std"]),
                size=None if size is None else (size[0], size[1]),
                interpolation=values["interpolation"],
                crop=values["crop"],
                crop_mode=values["crop_mode"],
                source=values["source"],
            )
        except (KeyError, TypeError, IndexError) as error:
            raise UserError(
                None, f"a stored preprocessing is damaged ({error!r}); start anew"
            ) from error

    def metadata(self, classes: Sequence[str]) -> dict[str, str]:
        """What a file for other programs says of its inputs and outputs.

        Lists are JSON. A program that knows nothing else can feed the network with it.

        Args:
            classes: Class names in the order of the logits.
        """
        channel_order = "RGB" if self.channels == 3 else "as in the images"
        metadata = {
            "mean": json.dumps(self.mean),
            "std": json.dumps(self.std),
            "channels": str(self.channels),
            "channel_order": channel_order,
            "interpolation": self.interpolation,
            "crop": repr(self.crop),
            "crop_mode": self.crop_mode,
            "value_range": "[0, 1] before mean and std: 8-bit values / 255, 16-bit "
            "values / 65535, floats as they are",
            "preprocessing": self._rule(),
            "classes": json.dumps(list(classes), ensure_ascii=False),
        }
        if self.size is not None:
            metadata["size"] = json.dumps(self.size)
            metadata["resize"] = json.dumps(self.resize)
        return metadata

    def _rule(self) -> str:
        """The way from a file of an image to an input, in words."""
        steps = [*self._fitting_steps(), "divide by 255 (16 bits: by 65535)"]
        steps += ["subtract mean", "divide by std", "channels first"]
        return "; ".join(steps)

    def _fitting_steps(self) -> list[str]:
        """How an image gets its size, in words."""
        if self.size is None or self.resize is None:
            return []
        size = f"(height, width) = {self.size}"
        way = f"with Pillow's {self.interpolation}"
        if self.crop_mode == "squash":
            scaled = f"scale to (height, width) = {self.resize} {way}"
        elif self.crop_mode == "border":
            scaled = f"scale to fit within (height, width) = {self.resize} {way}"
            return [scaled, f"add borders of the mean's colour up to {size}"]
        elif self.resize[0] == self.resize[1]:
            scaled = f"scale the shorter side to {self.resize[0]} {way}"
        else:
            scaled = f"scale to cover (height, width) = {self.resize} {way}"
        return [scaled, f"crop at the centre to {size}"]


def checked_pixels(pixels: Tensor) -> Tensor:
    """Pixels in one of the two forms that images are kept in, or a refusal.

    Args:
        pixels: `(n, channels, height, width)`; uint8, uint16, or floats in [0, 1].

    Returns:
        uint8 as it is, everything else as float32 in [0, 1].

    Raises:
        UserError: If they have another number of axes, are of another type, whose range
            nobody knows, or are floats out of [0, 1].
    """
    if pixels.ndim != 4:
        raise UserError(
            "pixels",
            f"must be (n, channels, height, width), got {tuple(pixels.shape)}",
        )
    if pixels.dtype == torch.uint8:
        return pixels
    if pixels.dtype == torch.uint16:
        return pixels.float() / LARGEST_16_BITS
    if not pixels.is_floating_point():
        raise UserError(
            "pixels",
            f"the range of {_type_name(pixels)} isn't known; give uint8, uint16, or "
            f"floats in [0, 1]",
        )
    if not pixels.numel():
        return pixels.float()
    low = pixels.min().item()
    high = pixels.max().item()
    # Not `low < 0 or high > 1`: NaN has to fail as well.
    if not (low >= 0 and high <= 1):
        raise UserError(
            "pixels",
            f"floats must lie in [0, 1], got {low:g} to {high:g}; mean and std are "
            f"taken out here, so give values as they were before that, and those of "
            f"8 bits as uint8",
        )
    return pixels.float()


def _type_name(pixels: Tensor) -> str:
    return str(pixels.dtype).removeprefix("torch.")


def size_text(size: Sequence[int]) -> str:
    """Height and width as the option `image_size` takes them: "192x256"."""
    height, width = size
    return f"{height}x{width}"


def _listed(values: Sequence[float]) -> str:
    """Values as options take them, one where all are equal."""
    if len(set(values)) == 1:
        return f"{values[0]:g}"
    return ",".join(f"{value:g}" for value in values)


def _channels_text(channels: int) -> str:
    names = {1: "grey", 3: "RGB"}
    return names.get(channels, f"{channels} channels")
