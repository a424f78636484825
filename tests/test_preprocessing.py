"""Preprocessing belongs to the network: where it comes from, and that images become the
inputs that other people's ten lines make of them, to the last bit.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import torchvision
import yaml
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from autoprune.cli.main import main
from autoprune.config import (
    DataConfig,
    NetworkConfig,
    SearchConfig,
    Settings,
    TraceConfig,
)
from autoprune.data import Images, Preprocessing, Splits, carve, load, normalize
from autoprune.data.datasets import stored_preprocessing
from autoprune.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from autoprune.data.preprocessing_sources import crop_share, preprocessing_of
from autoprune.errors import UserError
from autoprune.latency import measuring
from autoprune.pipeline import context
from autoprune.pipeline.context import RunContext
from autoprune.pipeline.remarks import dense_remarks
from autoprune.reporting.report import write_report
from autoprune.runs import RunFolder

CLASSES = ("blue", "green", "red")
HALF = (0.5, 0.5, 0.5)


def picture(label: int, number: int, mode: str = "RGB") -> Image.Image:
    """An image whose class shows in one colour, more or less; sizes and shapes vary."""
    generator = np.random.default_rng(1000 * label + number)
    height, width = generator.integers(40, 90, 2)
    shade = np.linspace(0, 60, width)[None, :, None]
    values = generator.normal(90, 30, (height, width, 3)) + shade
    values[..., 2 - label] += generator.normal(14, 16)
    return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert(mode)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Photos of several sizes in three classes, 20 to train on and 12 to test each."""
    root = tmp_path_factory.mktemp("photos")
    for part, count in (("train", 20), ("test", 12)):
        for label, name in enumerate(CLASSES):
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                image = picture(label, number + 100 * (part == "test"))
                image.save(folder / f"{number:02}.png")
    return root


def image_folder(root: Path, part: str, transform, mode: str = "RGB"):
    """Inputs and labels as torchvision's folders give them."""

    def opened(path: str) -> Image.Image:
        with Image.open(path) as image:
            return image.convert(mode)

    found = torchvision.datasets.ImageFolder(root / part, transform, loader=opened)
    inputs = torch.stack([image for image, _ in found])
    return inputs, torch.tensor(found.targets)


def sorted_by_content(inputs: torch.Tensor) -> torch.Tensor:
    """Images in an order that depends on nothing but them."""
    return inputs[inputs.double().flatten(1).sum(1).argsort()]


def check_equal(splits: Splits, root: Path, transform, mode: str = "RGB") -> None:
    """Checks that all test images became exactly the inputs of a transform."""
    expected, _ = image_folder(root, "test", transform, mode)
    found = splits.test.inputs
    assert found.shape == expected.shape
    torch.testing.assert_close(
        sorted_by_content(found), sorted_by_content(expected), rtol=0, atol=1e-6
    )


# Scaling and cropping

TIMM = {
    "center": {"input_size": (3, 48, 48), "crop_pct": 0.875},
    "bicubic": {"input_size": (3, 56, 56), "interpolation": "bicubic", "crop_pct": 0.9},
    "odd": {"input_size": (3, 37, 37), "interpolation": "bilinear", "crop_pct": 0.77},
    "whole": {"input_size": (3, 40, 40), "crop_pct": 1.0},
    "oblong": {"input_size": (3, 32, 48), "crop_pct": 0.9},
    "squash": {"input_size": (3, 40, 40), "crop_pct": 0.9, "crop_mode": "squash"},
    "border": {"input_size": (3, 40, 40), "crop_pct": 1.0, "crop_mode": "border"},
    "border and crop": {
        "input_size": (3, 40, 56),
        "crop_pct": 0.8,
        "crop_mode": "border",
    },
    "larger than the image": {"input_size": (3, 40, 40), "crop_pct": 1.15},
    "lanczos": {"input_size": (3, 24, 24), "interpolation": "lanczos"},
    "nearest": {"input_size": (3, 24, 24), "interpolation": "nearest"},
}


class Configured(nn.Module):
    """A network that says how it wants its images, as timm's do."""

    def __init__(self, **config):
        super().__init__()
        self.pretrained_cfg = {"mean": HALF, "std": (0.25, 0.5, 0.75), **config}
        self.stem = nn.Conv2d(3, 4, 3)


@pytest.mark.parametrize("name", TIMM)
def test_images_become_what_timm_makes_of_them(name, photos):
    model = Configured(**TIMM[name])
    transform = create_transform(**resolve_model_data_config(model))
    config = DataConfig(str(photos))
    check_equal(load(config, preprocessing_of(model, config)), photos, transform)


@pytest.mark.parametrize(
    ("model", "weights"),
    [
        ("resnet18", "IMAGENET1K_V1"),
        ("resnet50", "IMAGENET1K_V2"),
        ("efficientnet_b0", "IMAGENET1K_V1"),
        ("inception_v3", "IMAGENET1K_V1"),
        ("swin_t", "IMAGENET1K_V1"),
    ],
)
def test_torchvisions_weights_bring_their_transforms(model, weights, photos):
    meant = torchvision.models.get_model_weights(model)[weights]
    network = nn.Conv2d(3, 4, 3)
    file = f"somewhere/{Path(meant.url).name}"
    config = DataConfig(str(photos), max_test_images=6)
    found = preprocessing_of(network, config, model, file, n_classes=3)
    assert str(meant) in found.source
    check = DataConfig(str(photos))
    check_equal(load(check, found), photos, meant.transforms())


def test_a_thousand_classes_mean_torchvisions_weights_and_three_do_not():
    network = nn.Conv2d(3, 4, 3)
    found = preprocessing_of(network, name="mobilenet_v3_large", n_classes=1000)
    assert found.size == (224, 224)
    other = preprocessing_of(network, name="mobilenet_v3_large", n_classes=3)
    assert other.size is None
    assert "usual" in other.source


RESIZED = transforms.Resize(50, InterpolationMode.BILINEAR)
BY_HAND = {
    "a side": (
        {"image_size": 40},
        [transforms.Resize(40), transforms.CenterCrop(40)],
    ),
    "a share": (
        {"image_size": 40, "crop": 0.8},
        [RESIZED, transforms.CenterCrop(40)],
    ),
    "pixels before the crop": (
        {"image_size": 40, "crop": 50},
        [RESIZED, transforms.CenterCrop(40)],
    ),
    "squashed": (
        {"image_size": "36x60", "crop": "squash"},
        [transforms.Resize((36, 60))],
    ),
    "bicubic": (
        {"image_size": 32, "interpolation": "bicubic"},
        [transforms.Resize(32, InterpolationMode.BICUBIC), transforms.CenterCrop(32)],
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_options_say_what_torchvisions_transforms_say(name, photos):
    options, fitting = BY_HAND[name]
    config = DataConfig(str(photos), mean="0.4,0.5,0.6", std="0.2", **options)
    end = [transforms.ToTensor(), transforms.Normalize((0.4, 0.5, 0.6), (0.2,) * 3)]
    check_equal(load(config), photos, transforms.Compose([*fitting, *end]))


@pytest.mark.parametrize("mean", ["0.1,0.2,0.3", "[0.1, 0.2, 0.3]", [0.1, 0.2, 0.3]])
def test_means_are_read_from_a_command_line_and_from_a_file(mean):
    assert preprocessing_of(Own(3), DataConfig(mean=mean)).mean == (0.1, 0.2, 0.3)


@pytest.mark.parametrize("side", [224, 299, 320, 380, 518])
def test_a_crop_in_pixels_comes_back_to_the_pixel(side):
    for resized in range(side, side + 60):
        assert math.floor(side / crop_share(side, resized)) == resized


# Where it comes from


class Own(nn.Module):
    """A network of the user's own that reads so many channels."""

    def __init__(self, channels: int = 3, **attributes):
        super().__init__()
        self.stem = nn.Conv2d(channels, 4, 3)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.stem(x).mean((2, 3))


def test_the_first_that_states_a_value_counts():
    model = Own(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), image_size=64, crop=0.5)
    model.default_cfg = {"std": HALF, "interpolation": "bicubic"}
    found = preprocessing_of(model, DataConfig(mean="0.9", image_size="20x30"))
    assert found.mean == (0.9,) * 3
    assert found.std == HALF
    assert found.interpolation == "bicubic"
    assert found.size == (20, 30)
    assert found.crop == 0.5
    for source in ("the options", "pretrained_cfg", "attributes"):
        assert source in found.source


@pytest.mark.parametrize(
    ("attribute", "size"), [(40, (40, 40)), ([24, 32], (24, 32)), ((24, 32), (24, 32))]
)
def test_attributes_of_a_network_state_its_size(attribute, size):
    assert preprocessing_of(Own(image_size=attribute)).size == size


def test_what_a_network_uses_by_itself_is_no_statement():
    model = Own(std=0.02, crop=True, interpolation="whatever", image_size="large")
    model.register_buffer("mean", torch.tensor(HALF).view(1, 3, 1, 1))
    found = preprocessing_of(model)
    assert found == Preprocessing()
    assert "usual" in found.source


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_channels_are_what_the_first_convolution_reads(channels):
    found = preprocessing_of(Own(channels))
    assert found.channels == len(found.std) == channels
    average = sum(IMAGENET_MEAN) / 3
    assert np.mean(found.mean) == pytest.approx(average, abs=1e-3)


class Unshuffling(nn.Module):
    """Its first convolution reads four pixels of each channel at once."""

    def __init__(self, channels: int):
        super().__init__()
        self.stem = nn.Conv2d(4 * channels, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.stem(nn.functional.pixel_unshuffle(x, 2)).mean((2, 3))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_convolution_behind_other_operations_is_tried_out(channels):
    assert preprocessing_of(Unshuffling(channels)).channels == channels


def test_a_timm_network_made_for_grey_reads_grey_whatever_its_config_says():
    model = timm.create_model("test_resnet", in_chans=1, num_classes=3)
    assert model.pretrained_cfg["input_size"][0] == 3
    found = preprocessing_of(model)
    assert found.mean == (0.5,)
    assert found.size == (160, 160)


def test_a_network_is_left_as_it_was():
    model = Unshuffling(3).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    preprocessing_of(model)
    assert model.training
    assert not model.stem._forward_hooks
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": "0.5,0.5"}, "mean: expected 1 value or 3, one for each channel"),
        ({"mean": [0.5, math.inf, 0.5]}, "mean: expected numbers in the order"),
        ({"mean": "a"}, "mean: expected numbers in the order of the channels"),
        ({"std": "0.5,0"}, "std: must be above 0, got 0.5,0"),
        ({"image_size": "12by3"}, "image_size: expected a side in pixels, or height"),
        ({"image_size": "0x3"}, "image_size: must be at least 1, got 0x3"),
        ({"interpolation": "cubic"}, "interpolation: must be nearest, bilinear"),
        ({"crop": "-1"}, r"crop: expected a share in \(0, 1\], pixels above 1, or"),
        ({"crop": "nan"}, r"crop: expected a share"),
        ({"crop": 50}, "crop: 50 pixels before the crop need the size after it"),
        ({"crop": 50, "image_size": 60}, "crop: expected at least the 60 pixels"),
        ({"channels": 0}, "channels: must be at least 1, got 0"),
    ],
)
def test_options_that_fit_nothing_are_refused(options, message):
    with pytest.raises(UserError, match=f"^{message}"):
        preprocessing_of(Own(3), DataConfig(**options))


def test_a_trace_takes_size_and_channels_from_the_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = preprocessing_of(Own(1), TraceConfig(image_size="20x24"))
    assert (found.channels, found.size) == (1, (20, 24))


# Sizes that nobody states


def folder_of(root: Path, sizes: list[tuple[int, int]]) -> Path:
    """Plain images of these sizes in every class, in train and test."""
    for part in ("train", "test"):
        for label, name in enumerate(CLASSES):
            (root / part / name).mkdir(parents=True)
            for number, size in enumerate(sizes):
                image = picture(label, number).resize(size[::-1])
                image.save(root / part / name / f"{number}.png")
    return root


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([(32, 32)] * 3, (32, 32)),
        ([(20, 44)] * 3, (20, 44)),
        ([(30, 50), (28, 60), (28, 60)], (28, 28)),
        ([(300, 250), (400, 500), (230, 224)], (224, 224)),
        ([(513, 513)] * 3, (224, 224)),
    ],
)
def test_without_a_size_images_keep_their_own_and_none_is_enlarged(
    sizes, expected, tmp_path
):
    splits = load(DataConfig(str(folder_of(tmp_path, sizes))))
    assert splits.example.shape == (1, 3, *expected)
    assert splits.preprocessing.size == expected
    assert not splits.remarks


def test_images_that_are_enlarged_are_remarked_upon(tmp_path):
    folder = folder_of(tmp_path, [(32, 32)] * 6)
    (remark,) = load(DataConfig(str(folder), image_size=48)).remarks
    assert "36 of 36 images are enlarged to 48x48" in remark
    assert "32x32" in remark


def test_images_of_the_size_that_was_asked_for_are_left_alone(tmp_path):
    folder = folder_of(tmp_path, [(32, 32)] * 6)
    config = DataConfig(str(folder), image_size=32)
    model = Configured(input_size=(3, 224, 224), crop_pct=0.875)
    splits = load(config, preprocessing_of(model, config))
    assert not splits.remarks
    plain = transforms.Normalize(HALF, (0.25, 0.5, 0.75))
    check_equal(splits, folder, transforms.Compose([transforms.ToTensor(), plain]))


def test_images_of_a_dataset_by_name_become_grey_or_smaller_but_not_larger_by_default():
    grey = load(DataConfig("digits"), preprocessing_of(Own(1)))
    assert grey.example.shape == (1, 1, 16, 16)
    colours = load(DataConfig("digits"))
    assert torch.equal(grey.test.pixels[:, 0], colours.test.pixels[:, 0])
    smaller = load(DataConfig("digits", image_size=8))
    assert smaller.example.shape == (1, 3, 8, 8)
    large = preprocessing_of(Configured(input_size=(3, 64, 64), crop_pct=0.9))
    assert load(DataConfig("digits"), large).example.shape == (1, 3, 16, 16)
    asked = DataConfig("digits", image_size=24)
    splits = load(asked)
    assert splits.example.shape == (1, 3, 24, 24)
    assert "enlarged" in splits.remarks[0]


def test_depth_and_size_are_searched_together_on_square_images_only():
    settings = Settings(
        network=NetworkConfig("tests.tiny:network", "none"),
        data=DataConfig("digits", image_size="12x16"),
        search=SearchConfig(granularity="dimensions"),
    )
    with pytest.raises(UserError, match=r"^granularity: .* square images, got 12x16"):
        _ = RunContext(settings).scaling


# Values of pixels


def test_values_are_divided_once_whatever_their_type():
    half = Preprocessing(mean=(0.5,), std=(0.5,))
    eight = torch.tensor([[[[0, 51, 255]]]], dtype=torch.uint8)
    expected = torch.tensor([[[[-1, -0.6, 1]]]])
    for pixels in (
        eight,
        torch.from_numpy(eight.numpy().astype(np.uint16) * 257),
        eight.float() / 255,
        eight.double() / 255,
        (eight.float() / 255).bfloat16(),
    ):
        images = Images(pixels, torch.zeros(1), half)
        torch.testing.assert_close(images.inputs, expected, rtol=0, atol=2e-3)
        torch.testing.assert_close(images[:1].inputs, images.inputs, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (torch.zeros(1, 3, 2, 2, dtype=torch.int64), "the range of int64 isn't known"),
        (torch.zeros(1, 3, 2, 2, dtype=torch.bool), "the range of bool isn't known"),
        (torch.full((1, 3, 2, 2), 255.0), r"floats must lie in \[0, 1\], got 255"),
        (torch.full((1, 3, 2, 2), -0.5), r"floats must lie in \[0, 1\], got -0.5"),
        (torch.full((1, 3, 2, 2), math.nan), r"floats must lie in \[0, 1\], got nan"),
        (torch.zeros(3, 2, 2), r"must be \(n, channels, height, width\)"),
    ],
)
def test_values_whose_range_is_not_known_are_refused(pixels, reason):
    with pytest.raises(UserError, match=f"^pixels: {reason}"):
        Images(pixels, torch.zeros(1))


def test_images_of_other_channels_than_the_preprocessing_are_refused():
    grey = torch.zeros(1, 1, 2, 2, dtype=torch.uint8)
    with pytest.raises(UserError, match=r"^channels: the images have 1, .* for 3"):
        _ = Images(grey, torch.zeros(1), Preprocessing()).inputs


def test_images_keep_their_preprocessing_through_splits_and_batches():
    half = Preprocessing(mean=(0.5,), std=(0.5,))
    pixels = torch.randint(0, 256, (40, 1, 8, 8)).to(torch.uint8)
    images = Images(pixels, torch.arange(40) % 2, half)
    splits = carve(images, images, ("a", "b"), "own", DataConfig())
    assert splits.example.shape == (1, 1, 8, 8)
    for part in (splits.train, splits.proxy, splits.calibration, splits.selection):
        assert part.preprocessing == half
        assert torch.equal(part.inputs, (part.pixels / 255 - 0.5) / 0.5)
    assert splits.preprocessing.size == (8, 8)


def test_the_usual_values_are_imagenets():
    pixels = torch.randint(0, 256, (2, 3, 4, 4)).to(torch.uint8)
    usual = transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)
    assert torch.equal(normalize(pixels), usual(pixels / 255))


def save_arrays(root: Path, array) -> Path:
    """A folder of arrays, `array(label, number)` each."""
    for part in ("train", "test"):
        for label, name in enumerate(CLASSES):
            (root / part / name).mkdir(parents=True)
            for number in range(6):
                np.save(root / part / name / f"{number}.npy", array(label, number))
    return root


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_arrays_of_any_number_of_channels_are_read(channels, tmp_path):
    def array(label: int, number: int) -> np.ndarray:
        generator = np.random.default_rng(10 * label + number)
        return generator.integers(0, 256, (12, 14, channels), np.uint8)

    folder = save_arrays(tmp_path, array)
    splits = load(DataConfig(str(folder)), preprocessing_of(Own(channels)))
    given = {
        array(label, number).tobytes() for label in range(3) for number in range(6)
    }
    read = {image.permute(1, 2, 0).numpy().tobytes() for image in splits.test.pixels}
    assert read == given


def test_twelve_bits_in_sixteen_keep_all_their_shades(tmp_path):
    def array(label: int, number: int) -> np.ndarray:
        values = np.arange(4096, dtype=np.uint16)
        return values.reshape(64, 64)

    folder = save_arrays(tmp_path / "arrays", array)
    splits = load(DataConfig(str(folder)), preprocessing_of(Own(1)))
    assert len(splits.test.pixels[0].unique()) == 4096
    assert splits.test.pixels.max() == torch.tensor(4095 / 65_535)
    for path in (folder / "test").rglob("*.npy"):
        Image.fromarray(np.load(path)).save(path.with_suffix(".png"))
        path.unlink()
    files = load(DataConfig(str(folder)), preprocessing_of(Own(1)))
    assert torch.equal(files.test.pixels, splits.test.pixels)


def test_grey_images_of_16_bits_are_scaled_without_loss(tmp_path):
    """Against torch's own scaling, antialiased, of the whole range."""
    generator = np.random.default_rng(0)
    values = generator.integers(0, 65_536, (40, 40), np.uint16)
    folder = save_arrays(tmp_path, lambda label, number: values)
    config = DataConfig(str(folder), image_size=20)
    splits = load(config, preprocessing_of(Own(1), config))
    whole = torch.from_numpy(values.astype(np.float32) / 65_535)[None, None]
    expected = nn.functional.interpolate(
        whole, (20, 20), mode="bilinear", antialias=True
    )
    torch.testing.assert_close(splits.test.pixels[:1], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("values", "channels", "reason"),
    [
        (np.zeros((4, 4), np.int32), 1, "the range of int32 isn't known"),
        (np.full((4, 4), 2.0), 1, r"floats must lie in \[0, 1\], got 2 to 2"),
        (np.zeros((4, 4, 4), np.uint8), 3, "4 channels, the network reads 3"),
        (np.zeros((2, 4, 4, 4), np.uint8), 3, r"shape \(2, 4, 4, 4\), expected"),
        (np.zeros((4, 4), complex), 1, "the range of complex128 isn't known"),
    ],
)
def test_arrays_that_fit_nothing_are_refused_by_name(
    values, channels, reason, tmp_path
):
    folder = save_arrays(tmp_path, lambda label, number: values)
    with pytest.raises(UserError, match=rf"can't read image '.*0.npy' \({reason}"):
        load(DataConfig(str(folder)), preprocessing_of(Own(channels)))


def test_arrays_that_hold_objects_are_refused(tmp_path):
    folder = save_arrays(tmp_path, lambda label, number: np.zeros((4, 4), np.uint8))
    np.save(folder / "test" / "red" / "0.npy", np.array([print]), allow_pickle=True)
    with pytest.raises(UserError, match=r"can't read image '.*red/0.npy' \(ValueError"):
        load(DataConfig(str(folder)))


def test_pictures_of_four_channels_are_read_or_refused_by_name(tmp_path):
    folder = folder_of(tmp_path, [(16, 16)] * 6)
    with pytest.raises(UserError, match=r"0.png' \(3 channels, the network reads 4"):
        load(DataConfig(str(folder)), preprocessing_of(Own(4)))
    for path in folder.rglob("*.png"):
        with Image.open(path) as image:
            image.convert("RGBA").save(path)
    splits = load(DataConfig(str(folder)), preprocessing_of(Own(4)))
    assert (splits.test.pixels[:, 3] == 255).all()


# What looks wrong


def remarks_of(model: nn.Module, images: Images) -> list[str]:
    splits = carve(images, images, CLASSES, "own", DataConfig())
    return dense_remarks(model.eval(), splits)


class Brightest(nn.Module):
    """Answers with the brightest channel, if it knows the images' mean and deviation."""

    def __init__(self, mean: float, std: float):
        super().__init__()
        self.norm = nn.BatchNorm2d(3, affine=False)
        self.norm.running_mean.fill_(mean)
        self.norm.running_var.fill_(std**2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # All that lies far off is cut, and looks alike.
        return self.norm(x).clamp(-1, 1).mean((2, 3))


@pytest.fixture(scope="module")
def coloured() -> Images:
    """Images whose brightest channel is their class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    pixels = torch.randint(60, 120, (300, 3, 8, 8), generator=generator)
    pixels[torch.arange(300), labels] += 20
    half = Preprocessing(mean=HALF, std=HALF)
    return Images(pixels.to(torch.uint8), labels, half)


def test_a_network_that_knows_its_images_earns_no_remark(coloured):
    inputs = coloured.inputs
    model = Brightest(inputs.mean().item(), inputs.std().item())
    assert remarks_of(model, coloured) == []


def test_batch_norm_that_gains_when_recalibrated_points_at_the_preprocessing(coloured):
    (remark,) = remarks_of(Brightest(5.0, 1.0), coloured)
    assert "does the preprocessing fit?" in remark
    assert "--mean" in remark


def test_a_network_at_chance_is_asked_for_its_weights(coloured):
    (remark,) = remarks_of(Own(3, norm=nn.BatchNorm2d(3)), coloured)
    assert "at chance" in remark
    assert "no weights?" in remark


# Whole runs: script, run, report and ONNX file agree to the image

NETWORKS = """
import timm
import torch
from torch import nn
from torch.nn import functional as F

def resnet(num_classes): return timm.create_model("test_resnet", num_classes=num_classes)

class Grey(nn.Module):
    mean, std, image_size, interpolation = (0.3,), (0.2,), (24, 32), "bicubic"
    def __init__(self, num_classes):
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, 2, 1)
        self.second = nn.Conv2d(8, 12, 3, 2, 1)
        self.head = nn.Linear(12, num_classes)
    def forward_features(self, x): return F.relu(self.second(F.relu(self.first(x))))
    def forward_head(self, x, pre_logits=False):
        x = x.mean((2, 3))
        return x if pre_logits else self.head(x)
    def get_classifier(self): return self.head
    def forward(self, x): return self.forward_head(self.forward_features(x))

def grey(num_classes): return Grey(num_classes)

def squashed(num_classes):
    model = timm.create_model("test_efficientnet", num_classes=num_classes)
    changed = {"input_size": (3, 64, 80), "crop_mode": "squash", "crop_pct": 0.9}
    model.pretrained_cfg = model.pretrained_cfg | changed | {"mean": (0.3, 0.4, 0.5)}
    return model
"""


def timms_transform(model: nn.Module):
    return create_transform(**resolve_model_data_config(model))


def greys_transform(model: nn.Module):
    """Scaled so that it covers 24x32, then cropped: ten lines of an owner's own."""

    def fit(image: Image.Image) -> Image.Image:
        ratio = min(image.height / 24, image.width / 32)
        size = round(image.width / ratio), round(image.height / ratio)
        return image.resize(size, Image.Resampling.BICUBIC)

    steps = [fit, transforms.CenterCrop((24, 32)), transforms.ToTensor()]
    return transforms.Compose([*steps, transforms.Normalize(0.3, 0.2)])


RUNS = {
    "own:resnet": (timms_transform, "RGB"),
    "own:squashed": (timms_transform, "RGB"),
    "timm/test_mambaout": (timms_transform, "RGB"),
    "own:grey": (greys_transform, "L"),
}


@torch.no_grad()
def fit_head(model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> None:
    """Solves the head by least squares, so that accuracy means something."""
    features = model.forward_head(model.forward_features(inputs), pre_logits=True)
    centre, scale = features.mean(0), features.std(0) + 1e-6
    known = torch.cat([(features - centre) / scale, torch.ones(len(labels), 1)], 1)
    targets = nn.functional.one_hot(labels).double()
    ridge = 0.3 * len(labels) * torch.eye(known.shape[1]).double()
    known = known.double()
    solved = torch.linalg.solve(known.T @ known + ridge, known.T @ targets).float()
    head = model.get_classifier()
    weight = solved[:-1] / scale[:, None]
    head.weight.copy_(weight.T)
    head.bias.copy_(solved[-1] - centre @ weight)


@torch.no_grad()
def accuracy_of(answer, inputs: torch.Tensor, labels: torch.Tensor) -> float:
    return (answer(inputs).argmax(1) == labels).float().mean().item()


def transform_of_metadata(values: dict[str, str]):
    """A program that knows nothing of the network but its file's metadata."""
    size, resize = json.loads(values["size"]), json.loads(values["resize"])
    way = InterpolationMode(values["interpolation"])
    mode = {"1": "L", "3": "RGB"}[values["channels"]]

    def fit(image: Image.Image) -> Image.Image:
        image = image.convert(mode)
        if values["crop_mode"] == "squash":
            return transforms.Resize(resize, way)(image)
        if resize[0] == resize[1]:
            return transforms.Resize(resize[0], way)(image)
        ratio = min(image.height / resize[0], image.width / resize[1])
        scaled = round(image.height / ratio), round(image.width / ratio)
        return transforms.Resize(scaled, way)(image)

    normalized = transforms.Normalize(
        json.loads(values["mean"]), json.loads(values["std"])
    )
    steps = [fit, transforms.CenterCrop(size), transforms.ToTensor(), normalized]
    return transforms.Compose(steps)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_its_report_and_its_onnx_file_measure_what_ten_lines_measure(
    name, photos, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    module = f"own_{name.partition(':')[2] or 'timm'}"
    (tmp_path / f"{module}.py").write_text(NETWORKS)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    # Latency isn't what this is about.
    monkeypatch.setattr(measuring.measure_latency, "__defaults__", (0.01,))
    make_transform, mode = RUNS[name]
    torch.manual_seed(0)
    if name.startswith("timm/"):
        model = timm.create_model(name.removeprefix("timm/"), num_classes=3).eval()
    else:
        name = name.replace("own", module)
        model = getattr(__import__(module), name.partition(":")[2])(3).eval()
    transform = make_transform(model)
    fit_head(model, *image_folder(photos, "train", transform, mode))
    inputs, labels = image_folder(photos, "test", transform, mode)
    expected = accuracy_of(model, inputs, labels)
    assert 0.4 < expected < 1, "a test of accuracy needs right and wrong answers"
    torch.save(model.state_dict(), "weights.pt")
    arguments = ["--agent", "uniform", "--baselines", "none", "--epochs", "0"]
    files = ["--weights", "weights.pt", "--data", str(photos), "--out", "run"]
    assert main(["run", "--model", name, *files, *arguments]) == 0
    folder = RunFolder(tmp_path / "run")
    results = folder.read_results()
    assert results.accuracy_dense == pytest.approx(expected, abs=1e-6)
    stored = yaml.safe_load(folder.config.read_text())["preprocessing"]
    plan = json.loads((folder.pruned / "plan.json").read_text())
    assert stored == plan["preprocessing"] == results.preprocessing
    assert f"{100 * expected:.1f}" in folder.report.read_text()
    assert stored["source"].replace("'", "&#39;") in folder.report.read_text()
    assert "preprocessing: mean" in capsys.readouterr().err
    written = {
        entry.key: entry.value for entry in onnx.load(folder.onnx).metadata_props
    }
    assert json.loads(written["classes"]) == list(CLASSES)
    session = onnxruntime.InferenceSession(folder.onnx)
    by_metadata = transform_of_metadata(written)
    inputs, labels = image_folder(photos, "test", by_metadata)

    def answer(images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    assert accuracy_of(answer, inputs, labels) == pytest.approx(
        results.accuracy_pruned, abs=1e-6
    )
    # What the run was started with stays, whatever network and package say later.
    monkeypatch.setattr(context, "preprocessing_of", None)
    reopened = RunContext.of_run(folder).splits
    assert reopened.preprocessing.to_dict() == stored


def test_a_run_of_an_earlier_version_keeps_its_square_size_and_imagenets_values():
    config = {"data": {"data": "photos", "image_size": 64}}
    found = stored_preprocessing(config)
    assert found.size == (64, 64)
    assert (found.mean, found.std) == (IMAGENET_MEAN, IMAGENET_STD)
    # Which said nothing of datasets by name.
    config["data"]["data"] = "sample"
    assert stored_preprocessing(config).size is None


def test_the_report_shows_remarks_first_and_the_preprocessing(tmp_path):
    folder = RunFolder(tmp_path)
    folder.config.write_text(yaml.safe_dump(Settings().to_dict()))
    stored = Preprocessing(size=(24, 32), crop=0.8, source="the options").to_dict()
    folder.add_results(remarks=["it looks wrong"], preprocessing=stored)
    page = write_report(folder).read_text()
    assert page.index("It looks wrong.") < page.index("Cost before and after")
    for text in ("0.485, 0.456, 0.406", "24 x 32", "30 x 40", "the options"):
        assert text in page
