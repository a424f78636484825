"""Datasets that are a folder of images: `train/` and the test images."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from autoprune.config import DataConfig
from autoprune.data.image_files import (
    ImageHeader,
    find_images,
    find_test_part,
    read_headers,
    read_images,
)
from autoprune.data.images import Images, Splits
from autoprune.data.preprocessing import Preprocessing, size_text
from autoprune.data.splitting import RESERVES, carve
from autoprune.data.stratify import stratified_order, stratified_parts
from autoprune.errors import UserError

MAX_CARVED_TEST = 10_000
"""Most images for the test where a dataset brings none: a standard error of 0.5 %."""
LARGEST_OWN_SIDE = 512
"""Images of one size are taken as they are up to this side; nobody trains on more."""
USUAL_SIDE = 224
"""Side of the inputs where images have several sizes, or are larger than that."""

Files = Mapping[str, list[Path]]
"""Class to its files."""


@dataclass(frozen=True)
class FolderDataset:
    """A folder with a folder of images for each class.

    Attributes:
        config: Where it is, and how it is split.
        train: The training images.
        test: The test images; None where it brings none.
        test_part: The subfolder that they are in.
    """

    config: DataConfig
    train: Files
    test: Files | None
    test_part: str | None

    @classmethod
    def open(cls, config: DataConfig) -> "FolderDataset":
        """The dataset of a folder, whose images are not read yet.

        Args:
            config: With the folder as `data`.

        Raises:
            UserError: If the folder isn't laid out so.
        """
        root = Path(config.data)
        train = find_images(root, "train")
        part = find_test_part(root)
        if part is None:
            return cls(config, train, None, None)
        test = find_images(root, part)
        for name in sorted(train.keys() ^ test.keys()):
            home = "train" if name in train else part
            raise UserError(
                "data",
                f"class {name!r} is only in {config.data}/{home}; train/ and {part}/ "
                f"need the same classes",
            )
        return cls(config, train, test, part)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in label order."""
        return tuple(self.train)

    def read(self, preprocessing: Preprocessing) -> Splits:
        """The images as a network reads them.

        All are read into memory: 150 kB each at 224x224.

        Args:
            preprocessing: The network's; without a size the images keep their own.

        Raises:
            UserError: If an image can't be read.
        """
        paths: list[Path] = []
        for files in self._parts:
            for files_of_class in files.values():
                paths += files_of_class
        headers = read_headers(paths)
        preprocessing = self._sized(preprocessing, headers)
        is_float = any(header.is_float for header in headers)
        parts = []
        for files in self._parts:
            pixels, labels = read_images(files, preprocessing, is_float)
            parts.append(Images(pixels, labels, preprocessing))
        splits = self._split(*parts)
        sizes = [(header.height, header.width) for header in headers]
        enlarged = enlarged_remark(sizes, preprocessing)
        return replace(splits, remarks=(*splits.remarks, *enlarged))

    @property
    def _parts(self) -> list[Files]:
        return [self.train] if self.test is None else [self.train, self.test]

    def _sized(
        self, preprocessing: Preprocessing, headers: Sequence[ImageHeader]
    ) -> Preprocessing:
        """The preprocessing with a size, the images' own where it has none."""
        sizes = Counter((header.height, header.width) for header in headers)
        if preprocessing.size is None:
            size, reason = _own_size(sizes)
            return preprocessing.with_size(size, reason)
        # A crop is for the size that it came with. Images that have the size that the
        # user asked for would be enlarged, only to lose their borders.
        is_own = set(sizes) == {preprocessing.size}
        if is_own and self.config.image_size is not None and self.config.crop is None:
            return replace(preprocessing, crop=1.0)
        return preprocessing

    def _split(self, train: Images, test: Images | None = None) -> Splits:
        """The five splits, with a remark where the test images aren't from test/."""
        config = self.config
        if test is None:
            return _without_test_part(train, self.classes, config)
        # Read by class; in that order max_test_images would cut whole classes off.
        test = test[stratified_order(test.labels, seed=0)]
        splits = carve(train, test, self.classes, config.data, config)
        if self.test_part == "test":
            return splits
        place = Path(config.data) / str(self.test_part)
        return replace(splits, remarks=(f"the test images are those of {place}",))


def _own_size(sizes: Mapping[tuple[int, int], int]) -> tuple[tuple[int, int], str]:
    """A size at which no image is enlarged, and whose it is.

    Args:
        sizes: Height and width to how many images have them.
    """
    if len(sizes) == 1:
        ((height, width),) = sizes
        if max(height, width) <= LARGEST_OWN_SIDE:
            return (height, width), "the images' own"
    smallest = min(min(size) for size in sizes)
    if smallest >= USUAL_SIDE:
        return (USUAL_SIDE, USUAL_SIDE), "the usual one"
    return (smallest, smallest), "the smallest image's shorter side"


def enlarged_remark(
    sizes: Sequence[tuple[int, int]], preprocessing: Preprocessing
) -> tuple[str, ...]:
    """What to say where images are enlarged; empty where none is.

    Args:
        sizes: Height and width of each image.
        preprocessing: What they are made to fit.
    """
    enlarged = []
    for height, width in sizes:
        scaled_height, scaled_width = preprocessing.scaled_size(height, width)
        if scaled_height > height or scaled_width > width:
            enlarged.append((height, width))
    if not enlarged or preprocessing.size is None:
        return ()
    smallest = min(enlarged, key=lambda size: size[0] * size[1])
    return (
        f"{len(enlarged)} of {len(sizes)} images are enlarged to "
        f"{size_text(preprocessing.size)} pixels (the smallest has "
        f"{size_text(smallest)}), which costs time and shows a network nothing new; "
        f"--image_size gives another size",
    )


def _without_test_part(
    train: Images, classes: tuple[str, ...], config: DataConfig
) -> Splits:
    """The splits of a folder that has training images only."""
    size = min(MAX_CARVED_TEST, len(train) // 5)
    # Always the same ones, so that runs with several split seeds can be compared.
    parts = stratified_parts(train.labels, {"test": size}, RESERVES, seed=0)
    remark = (
        f"{config.data} has neither test/ nor val/: {size} of the {len(train)} "
        f"training images, by class, are kept apart as the test split; the accuracy of "
        f"a network that was trained on them comes out too high"
    )
    splits = carve(
        train[parts["rest"]], train[parts["test"]], classes, config.data, config
    )
    return replace(splits, remarks=(remark,))
