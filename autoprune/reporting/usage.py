"""How to use a pruned network: code for other programs, right for one run."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autoprune.names import DATASETS
from autoprune.results import Results

MAX_CALIBRATION_IMAGES = 300
"""Images on which ranges are measured for 8 bits."""


@dataclass(frozen=True)
class Snippet:
    """Code for a reader to copy.

    Attributes:
        key: Its name in the page.
        title: What it is for.
        before: What to read first, one sentence or none.
        code: Python, or a command.
    """

    key: str
    title: str
    before: str
    code: str


def usage_snippets(
    results: Results, plan: Mapping[str, Any], has_onnx: bool
) -> list[Snippet]:
    """Ways to use the pruned network of a run.

    Args:
        results: The run's.
        plan: That of its pruned network.
        has_onnx: Whether it was exported.

    Returns:
        The preparation of an image first, which the others import; empty for a run that
        doesn't say how images become inputs.
    """
    stored = results.preprocessing
    if stored is None or results.run is None:
        return []
    run = results.run
    snippets = [
        Snippet(
            "prepare",
            "Prepare an image",
            "Save this as prepare.py; the other pieces import it.",
            _prepare_code(stored, plan.get("classes") or []),
        ),
        Snippet(
            "pytorch",
            "PyTorch",
            "load.py needs PyTorch and the code of your network, and no autoprune.",
            PYTORCH.format(folder=f"{run}/pruned"),
        ),
    ]
    if not has_onnx:
        return snippets
    height, width = stored["size"]
    shape = f"{stored['channels']}x{height}x{width}"
    onnx = f"{run}/model.onnx"
    return [
        *snippets,
        Snippet("onnxruntime", "ONNX Runtime", "", ONNX_RUNTIME.format(onnx=onnx)),
        Snippet("openvino", "OpenVINO", "", OPENVINO.format(onnx=onnx)),
        Snippet(
            "tensorrt",
            "TensorRT",
            "",
            TENSORRT.format(
                onnx=shlex.quote(onnx),
                engine=shlex.quote(f"{run}/model.engine"),
                shape=shape,
            ),
        ),
        Snippet(
            "quantise",
            "Quantise to 8 bits",
            "Ranges are measured on training images. Measure the accuracy again "
            "afterwards.",
            QUANTISE.format(
                onnx=onnx,
                quantised=f"{run}/model.int8.onnx",
                images=_calibration_folder(results.data),
                most=MAX_CALIBRATION_IMAGES,
            ),
        ),
    ]


PYTORCH = """\
import sys

import torch
from prepare import CLASSES, prepare

sys.path.insert(0, {folder!r})
from load import load

network = load()
with torch.no_grad():
    logits = network(torch.from_numpy(prepare("image.png")))
print(CLASSES[int(logits.argmax())])
"""
ONNX_RUNTIME = """\
import onnxruntime
from prepare import CLASSES, prepare

session = onnxruntime.InferenceSession({onnx!r})
(logits,) = session.run(None, {{"images": prepare("image.png")}})
print(CLASSES[int(logits.argmax())])
"""
OPENVINO = """\
import openvino
from prepare import CLASSES, prepare

network = openvino.compile_model({onnx!r}, "CPU")
logits = network(prepare("image.png"))[0]
print(CLASSES[int(logits.argmax())])
"""
TENSORRT = """\
trtexec --onnx={onnx} --saveEngine={engine} --fp16 \\
    --minShapes=images:1x{shape} --optShapes=images:8x{shape} \\
    --maxShapes=images:64x{shape}
"""
QUANTISE = """\
from pathlib import Path

from onnxruntime.quantization import CalibrationDataReader, quantize_static
from prepare import prepare


class Images(CalibrationDataReader):
    def __init__(self, paths):
        self.inputs = ({{"images": prepare(path)}} for path in paths)

    def get_next(self):
        return next(self.inputs, None)


endings = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".npy")
paths = sorted(Path({images!r}).rglob("*"))
paths = [path for path in paths if path.suffix.lower() in endings]
# Evenly over the classes, which lie in folders.
paths = paths[:: max(1, len(paths) // {most})]
quantize_static({onnx!r}, {quantised!r}, Images(paths), per_channel=True)
"""


def _calibration_folder(data: str | None) -> str:
    """Where training images lie; for a dataset by name, where to put some."""
    is_folder = data is not None and data not in DATASETS.known
    return f"{data}/train" if is_folder else "photos/train"


def _prepare_code(stored: Mapping[str, Any], classes: list[str]) -> str:
    """The file that turns an image into an input, to the pixel as the run did."""
    height, width = stored["size"]
    reading = READING_ARRAYS
    if stored["channels"] in MODES:
        mode = MODES[stored["channels"]]
        scaling = "".join(f"    {line}\n" for line in _scaling_lines(stored))
        reading = READING_IMAGES.format(mode=mode, scaling=scaling)
    return PREPARE.format(
        imports="import numpy as np" if reading == READING_ARRAYS else IMAGE_IMPORTS,
        classes=classes,
        mean=", ".join(repr(value) for value in stored["mean"]),
        std=", ".join(repr(value) for value in stored["std"]),
        shape=f"1 x {stored['channels']} x {height} x {width}",
        reading=reading,
    )


MODES = {1: "L", 3: "RGB"}
"""Channels to Pillow's name for such images."""
IMAGE_IMPORTS = """\
import numpy as np
from PIL import Image"""
PREPARE = """\
{imports}

CLASSES = {classes!r}
MEAN = np.array([{mean}], np.float32)
STD = np.array([{std}], np.float32)


def prepare(path):
    # float32, {shape}
{reading}    values = (values - MEAN) / STD
    return np.ascontiguousarray(values.transpose(2, 0, 1)[None])
"""
READING_IMAGES = """\
    image = Image.open(path).convert("{mode}")
{scaling}    # Of 8 bits; those of 16 are divided by 65535.
    values = np.atleast_3d(np.asarray(image, np.float32)) / 255
"""
READING_ARRAYS = """\
    # height x width x channels; 16 bits are divided by 65535, floats not at all.
    values = np.load(path).astype(np.float32) / 255
"""


def _scaling_lines(stored: Mapping[str, Any]) -> list[str]:
    """Lines that give `image` the size of the inputs, as torchvision and timm do."""
    height, width = stored["size"]
    to_height, to_width = stored["resize"]
    way = f"Image.Resampling.{stored['interpolation'].upper()}"
    mode = stored["crop_mode"]
    lines = []
    if mode == "squash":
        size = f"({to_width}, {to_height})"
    elif mode == "center" and to_height == to_width:
        size = f"[int({to_height} * side / min(image.size)) for side in image.size]"
    else:
        # Within the size, with borders, or around it, to be cropped.
        which = "max" if mode == "border" else "min"
        ratios = f"image.width / {to_width}, image.height / {to_height}"
        lines.append(f"ratio = {which}({ratios})")
        size = "[round(side / ratio) for side in image.size]"
    lines.append(f"image = image.resize({size}, {way})")
    if mode == "border":
        colour = [round(255 * value) for value in stored["mean"]]
        # Pillow takes a single number for a single channel.
        shown = str(colour[0]) if len(colour) == 1 else str(tuple(colour))
        lines += [
            f"size = max({width}, image.width), max({height}, image.height)",
            f"canvas = Image.new(image.mode, size, {shown})",
            "left = (canvas.width - image.width) // 2",
            "top = (canvas.height - image.height) // 2",
            "canvas.paste(image, (left, top))",
            "image = canvas",
        ]
    return [
        *lines,
        f"left = round((image.width - {width}) / 2)",
        f"top = round((image.height - {height}) / 2)",
        f"image = image.crop((left, top, left + {width}, top + {height}))",
    ]
