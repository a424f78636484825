"""Where a network's preprocessing comes from: options, its own config, its weights.

Every value is taken from the first source that states it: the options; `pretrained_cfg`
or `default_cfg`, as timm's networks have it; the transforms of torchvision's weights,
where these are meant; plain attributes of the network; and else the usual values.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoprune.config import DataConfig, TraceConfig
from autoprune.data.models import MODELS
from autoprune.data.preprocessing import USUAL, Preprocessing
from autoprune.errors import UserError

ATTRIBUTES = ("mean", "std", "image_size", "interpolation", "crop")
"""Attributes of a network that state its preprocessing, called as the options are.

Names, numbers, and tuples and lists of them count, mean and std where both are there. A
tensor is no statement: a network with one normalises by itself.
"""
PRETRAINED_CFG = ("pretrained_cfg", "default_cfg")
"""Attributes in which timm's networks state it."""
TIMMS_DEFAULTS = {"interpolation": "bicubic", "crop_pct": 0.875}
"""What timm takes where the config of one of its networks doesn't say."""
CROP_FIELDS = ("crop", "crop_mode", "shorter_side")
"""What a source says of a crop, all of it or nothing."""
OPTIONS = "the options"
PROBE_SIZE = (64, 64)
"""Height and width of the images that try how many channels a network reads."""
Convolution = nn.modules.conv._ConvNd
"""The base class of PyTorch's convolutions; it has no public name."""
Stated = Mapping[str, Any]
"""Fields of `Preprocessing`, "channels" and "shorter_side", as far as stated."""


def preprocessing_of(
    model: nn.Module | None,
    config: DataConfig | TraceConfig = DataConfig(),  # noqa: B008, frozen
    name: str = "",
    weights: str | Path | None = None,
    n_classes: int | None = None,
) -> Preprocessing:
    """How a network wants its images.

    Args:
        model: The network, left as found; None for what doesn't depend on it.
        config: The options; what they say counts first.
        name: The network's name, such as "resnet18".
        weights: File of its weights. torchvision's files are known by their names.
        n_classes: Classes that it tells apart; 1,000 mean torchvision's weights, too.

    Returns:
        Its preprocessing; without a size where nobody states one.

    Raises:
        UserError: If what is stated doesn't fit together.
    """
    sources: dict[str, Stated] = {OPTIONS: config.preprocessing}
    if model is not None:
        sources |= _of_pretrained_cfg(model)
        sources |= _of_torchvision(name, weights, n_classes)
        sources |= _of_attributes(model)
    values, origins = _first_stated(sources)
    channels = _channels(model, sources)
    return _assembled(values, origins, channels)


def _first_stated(
    sources: Mapping[str, Stated],
) -> tuple[dict[str, Any], dict[str, str]]:
    """What the first source says of each field, and which one that is."""
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for source, stated in sources.items():
        # A crop is stated by several fields, which belong together.
        has_crop = "crop_mode" in values
        for field, value in stated.items():
            if field in values or (has_crop and field in CROP_FIELDS):
                continue
            values[field] = value
            origins[field] = source
    return values, origins


def _assembled(
    values: dict[str, Any], origins: dict[str, str], channels: int
) -> Preprocessing:
    """The preprocessing with what is stated, and the usual values for the rest."""
    usual = Preprocessing.usual(channels)
    for field in ("mean", "std"):
        if field not in values:
            values[field] = getattr(usual, field)
            origins[field] = USUAL
        is_option = origins[field] == OPTIONS
        values[field] = _for_each_channel(field, values[field], channels, is_option)
    if "shorter_side" in values:
        values["crop"] = _crop_of_side(values.get("size"), values["shorter_side"])
        origins["crop"] = origins["crop_mode"]
    fields = ("mean", "std", "size", "interpolation", "crop", "crop_mode")
    stated = {field: values[field] for field in fields if field in values}
    return Preprocessing(**stated, source=_source_text(origins))


def _for_each_channel(
    field: str, values: Sequence[float], channels: int, is_option: bool
) -> tuple[float, ...]:
    """One value for each channel.

    A network that was made for colours may read grey: its values are averaged then,
    unless they are the user's own.
    """
    if len(values) == 1:
        return tuple(values) * channels
    if len(values) == channels:
        return tuple(values)
    if is_option:
        raise UserError(
            field,
            f"expected 1 value or {channels}, one for each channel that the network "
            f"reads, got {len(values)}; channels says how many there are",
        )
    return (round(sum(values) / len(values), 4),) * channels


def _crop_of_side(size: tuple[int, int] | None, shorter_side: float) -> float:
    """The share that a crop keeps of an image whose shorter side has so many pixels."""
    if size is None:
        raise UserError(
            "crop",
            f"{shorter_side:g} pixels before the crop need the size after it; give "
            f"image_size, or a share such as 0.875",
        )
    return crop_share(min(size), shorter_side)


def crop_share(side: int, resized: float) -> float:
    """The share that is left of a side, such that rounding gives the same pixels back.

    Args:
        side: Pixels after the crop.
        resized: Pixels before it.

    Returns:
        `side / resized`, or its neighbour for which `floor(side / share)` is `resized`.

    Raises:
        UserError: If the crop would be larger than the image.
    """
    if resized < side:
        raise UserError(
            "crop",
            f"expected at least the {side} pixels that are cropped, got {resized:g}",
        )
    share = side / resized
    if math.floor(side / share) < int(resized):
        share = math.nextafter(share, 0)
    return share


def _source_text(origins: Mapping[str, str]) -> str:
    """Which values come from where, such as "the options (mean, std); timm"."""
    by_source: dict[str, list[str]] = {}
    names = {"crop_mode": "crop", "shorter_side": "crop"}
    for field, source in origins.items():
        name = names.get(field, field)
        if name not in by_source.setdefault(source, []):
            by_source[source].append(name)
    if len(by_source) == 1:
        return next(iter(by_source))
    parts = [f"{source} ({', '.join(names)})" for source, names in by_source.items()]
    return "; ".join(parts)


def _of_pretrained_cfg(model: nn.Module) -> dict[str, Stated]:
    """What a network's `pretrained_cfg` says, timm's or one in its manner."""
    config: Any = None
    for attribute in PRETRAINED_CFG:
        config = config or getattr(model, attribute, None)
    if config is None:
        return {}
    # timm's networks hold a dict; its own class of configs can become one.
    values = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
    if values.get("input_size"):
        values = TIMMS_DEFAULTS | {
            name: value for name, value in values.items() if value is not None
        }
    stated: dict[str, Any] = {}
    for field in ("mean", "std"):
        if values.get(field) is not None:
            stated[field] = _numbers_of(values[field])
    if values.get("input_size"):
        channels, height, width = values["input_size"]
        stated["channels"] = channels
        stated["size"] = (height, width)
    if values.get("interpolation"):
        stated["interpolation"] = values["interpolation"]
    if values.get("crop_pct"):
        stated["crop"] = float(values["crop_pct"])
        stated["crop_mode"] = values.get("crop_mode") or "center"
    return {"the network's pretrained_cfg": stated}


def _of_torchvision(
    name: str, weights: str | Path | None, n_classes: int | None
) -> dict[str, Stated]:
    """The transforms of torchvision's weights, where these are meant."""
    is_elsewhere = ":" in name or name.startswith("timm/") or name in MODELS
    if not name or is_elsewhere:
        return {}
    # Here, because importing torchvision takes seconds that few commands need.
    import torchvision.models

    if name not in torchvision.models.list_models(module=torchvision.models):
        return {}
    entries = list(torchvision.models.get_model_weights(name))
    # Without the key of one set in it.
    file = "" if weights is None else Path(weights).name.partition(":")[0]
    meant = [entry for entry in entries if Path(entry.url).name == file]
    if not meant and n_classes is not None:
        meant = [e for e in entries if len(e.meta["categories"]) == n_classes]
    if not meant:
        return {}
    # Of several that a renamed file may hold, the first.
    transforms = meant[0].transforms()
    (side,) = transforms.crop_size
    (resized,) = transforms.resize_size
    stated = {
        "mean": tuple(transforms.mean),
        "std": tuple(transforms.std),
        "channels": 3,
        "size": (side, side),
        "interpolation": transforms.interpolation.value,
        "crop": crop_share(side, resized),
        "crop_mode": "center",
    }
    return {f"torchvision's {meant[0]}": stated}


def _of_attributes(model: nn.Module) -> dict[str, Stated]:
    """What plain attributes of a network say; see `ATTRIBUTES`."""
    written: dict[str, Any] = {}
    for attribute in ATTRIBUTES:
        value = getattr(model, attribute, None)
        # torchvision's interpolations are an enumeration of names.
        written[attribute] = _as_option(attribute, getattr(value, "value", value))
    # One without the other is more likely something else, such as a network's noise.
    if written["mean"] is None or written["std"] is None:
        written |= {"mean": None, "std": None}
    stated: dict[str, Any] = {}
    for attribute, value in written.items():
        try:
            stated |= DataConfig(**{attribute: value}).preprocessing
        # Other things are called so too, and what no option could say is none of ours.
        except UserError:
            continue
    return {"the network's attributes": stated} if stated else {}


def _as_option(attribute: str, value: Any) -> int | float | str | None:
    """An attribute as its option says it; None for what can't be one."""
    if isinstance(value, bool):
        return None
    if isinstance(value, tuple | list):
        separator = "x" if attribute == "image_size" else ","
        return separator.join(str(item) for item in value) or None
    if attribute in ("mean", "std") and isinstance(value, int | float):
        return str(value)
    return value if isinstance(value, int | float | str) else None


def _numbers_of(values: Any) -> tuple[float, ...]:
    """One or several numbers as a tuple."""
    if isinstance(values, int | float):
        return (float(values),)
    return tuple(float(value) for value in values)


def _channels(model: nn.Module | None, sources: Mapping[str, Stated]) -> int:
    """How many channels a network reads.

    The options say it, else the network: what its config says and what its first
    convolution reads differ where that isn't what the images go through first.
    """
    options = sources[OPTIONS]
    if "channels" in options:
        return options["channels"]
    candidates = [
        stated["channels"] for stated in sources.values() if "channels" in stated
    ]
    layer = None if model is None else _first_convolution(model)
    if model is None or layer is None:
        n_means = len(options.get("mean", ()))
        return n_means if n_means > 1 else (candidates or [3])[0]
    candidates += [layer.in_channels, 3, 1]
    # Most networks: nothing to be tried.
    is_usual = candidates[0] in (1, 3)
    if is_usual and candidates[0] == layer.in_channels:
        return layer.in_channels
    probe = copy.deepcopy(model).eval()
    for channels in candidates:
        if _reads(probe, channels):
            return channels
    return layer.in_channels


def _first_convolution(model: nn.Module) -> Convolution | None:
    """The convolution that was made first; None without one."""
    for module in model.modules():
        # A lazy one doesn't know its channels yet.
        if isinstance(module, Convolution) and module.in_channels > 0:
            return module
    return None


class _ReachedError(Exception):
    """The first convolution has accepted what it got."""


@torch.no_grad()
def _reads(model: nn.Module, channels: int) -> bool:
    """Whether images of so many channels get past a network's first convolution.

    Further on they might be of the wrong size, which says nothing of channels.
    """
    layer = _first_convolution(model)
    parameter = next(model.parameters())
    images = torch.zeros(1, channels, *PROBE_SIZE)
    images = images.to(parameter.device, parameter.dtype)

    def stop(*_: object) -> None:
        raise _ReachedError

    assert layer is not None, "only networks with a convolution are tried"
    handle = layer.register_forward_hook(stop)
    try:
        model(images)
    except _ReachedError:
        return True
    # Whatever the user's own forward pass raises.
    except Exception:
        return False
    finally:
        handle.remove()
    return True
