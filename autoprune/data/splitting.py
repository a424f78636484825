"""The splits of a dataset: parts held out of its training images."""

from collections.abc import Mapping

from autoprune.config import DataConfig
from autoprune.data.images import Images, Splits
from autoprune.data.stratify import stratified_parts
from autoprune.errors import UserError

HELD_OUT = {"calibration": 1000, "proxy": 1000, "selection": 3000}
"""The parts that are held out of the training images, each with its usual size."""
RESERVES = {"test": 2, "calibration": 3, "proxy": 1, "selection": 1}
"""How many images of a class each part leaves, where there are few.

Of three images reward, choice and training get one each; of two, reward and training.
"""


def carve(
    train: Images,
    test: Images,
    classes: tuple[str, ...],
    name: str,
    config: DataConfig,
) -> Splits:
    """Splits a training set by `config.split_seed`: at random, in fair shares by class.

    A rare class is in every held-out part that has room for one of it, as long as one
    stays for training. Parts whose size the config leaves open get the sizes of
    `HELD_OUT`, shrunk together to a third of a small dataset.

    Args:
        train: The training set.
        test: The test set, which stays whole.
        classes: Class names in label order.
        name: What the user asked for.
        config: Seed and sizes.

    Returns:
        The five splits.

    Raises:
        UserError: If the held-out parts would leave fewer than half of the images for
            training.
    """
    # A third of the images at most, so that two thirds are left for training.
    shrink = min(1, len(train) / (3 * sum(HELD_OUT.values())))
    usual = {part: max(1, int(size * shrink)) for part, size in HELD_OUT.items()}
    sizes = held_out_sizes(config, usual)
    n_held_out = sum(sizes.values())
    if n_held_out > len(train) // 2:
        listed = ", ".join(f"{size} {part}" for part, size in sizes.items())
        raise UserError(
            "data",
            f"{name} has {len(train)} training images, too few to hold out "
            f"{n_held_out} ({listed}); at most {len(train) // 2} in all: "
            f"lower calibration_images, proxy_images and selection_images or add "
            f"images",
        )
    parts = stratified_parts(train.labels, sizes, RESERVES, config.split_seed)
    return Splits(
        train=train[parts["rest"]],
        calibration=train[parts["calibration"]],
        proxy=train[parts["proxy"]],
        selection=train[parts["selection"]],
        test=test,
        classes=classes,
        name=name,
    )


def held_out_sizes(config: DataConfig, usual: Mapping[str, int]) -> dict[str, int]:
    """Held-out part to its size: the config's, or the usual one where that is open."""
    sizes = {}
    for part in HELD_OUT:
        size = getattr(config, f"{part}_images")
        sizes[part] = usual[part] if size is None else size
    return sizes
