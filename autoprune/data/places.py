"""Where networks, weights and images come from, as users name them; without torch.

A network of one's own is `package.module:factory` or `./file.py:factory`. Weights are
`FILE`, `FILE:KEY` for one of several sets in a file, "auto" or "none".
"""

from pathlib import Path

from autoprune.errors import UserError, nearest_names
from autoprune.names import DATASETS

EMBEDDED_WEIGHTS = Path(__file__).parent / "assets" / "resnet20_cifar10.safetensors"
"""Weights of the ResNet-20 that comes with the package."""
AUTO = "auto"
"""Weights that autoprune brings along, where it has some."""
NONE = "none"
"""No weights: the network is taken as it is built."""


def no_dataset(name: str) -> UserError:
    """The error for images that are neither a dataset nor a folder.

    Args:
        name: As `DataConfig.data`.
    """
    return UserError("data", f"{unknown_dataset_reason(name)}, or a folder with train/")


def unknown_dataset_reason(name: str) -> str:
    """What to say about a name that is no dataset's; the nearest one is offered.

    Args:
        name: As given.
    """
    similar = nearest_names(name, DATASETS.known)
    if similar:
        return f"no dataset {name!r}; did you mean {similar[0]!r}"
    return f"no dataset {name!r}; known: {', '.join(DATASETS.known)}"


def has_embedded_weights(model: str, data: str) -> bool:
    """Whether autoprune brings trained weights of a network for a dataset.

    Args:
        model: The network's name.
        data: The dataset's name.
    """
    # They were trained on CIFAR-10, which the sample is a part of.
    return model == "resnet20" and data in ("sample", "cifar10")


def weights_named(model: str, weights: str, data: str) -> str | None:
    """The trained weights that a network starts from.

    Args:
        model: The network's name.
        weights: Their place, "auto" or "none".
        data: The dataset's name.

    Returns:
        A place for `autoprune.data.checkpoints.load_weights`; None for none.

    Raises:
        UserError: If none are named and none come along, or the file isn't there.
    """
    if weights == NONE:
        return None
    if weights != AUTO:
        split_weights(weights)
        return weights
    if has_embedded_weights(model, data):
        return str(EMBEDDED_WEIGHTS)
    # No weights at random instead: every stage would run through and mean nothing.
    if ":" in model:
        raise UserError(
            "weights",
            f"pruning starts from a trained network; give the file of the trained "
            f"weights of {model}, or none if it returns a network that is trained",
        )
    raise UserError(
        "weights",
        f"pruning starts from a trained network; give the trained weights of {model} "
        f"on {data!r}",
    )


def split_weights(place: str | Path) -> tuple[Path, str | None]:
    """File and key of weights that are named `FILE` or `FILE:KEY`.

    Args:
        place: As named.

    Returns:
        The file, which exists; and the key, or None.

    Raises:
        UserError: If there is no such file; a similar one beside it is offered.
    """
    whole = Path(place)
    if whole.is_file():
        return whole, None
    name, colon, key = str(place).rpartition(":")
    if colon and Path(name).is_file():
        return Path(name), key
    raise UserError("weights", f"no file {str(place)!r}{_similar_file(whole)}")


def split_factory(name: str) -> tuple[str, str]:
    """Module or file, and attribute, of a network of one's own.

    Args:
        name: `package.module:factory` or `./file.py:factory`.

    Returns:
        Both sides of the last colon.
    """
    home, _, attribute = name.rpartition(":")
    return home, attribute


def factory_file(home: str) -> Path | None:
    """The file in which a factory lies; None if a module is named.

    Args:
        home: What stands before the colon.

    Raises:
        UserError: If a file is named that isn't there, or isn't one of Python.
    """
    # A module's name holds neither.
    if not home.endswith(".py") and "/" not in home:
        return None
    path = Path(home)
    if not path.is_file():
        raise UserError("model", f"no file {home!r}{_similar_file(path)}")
    if path.suffix != ".py":
        raise UserError("model", f"{home!r} must be a file that ends in .py")
    return path


def _similar_file(path: Path) -> str:
    """A question after the file nearest to one that isn't there; empty if none is."""
    if not path.parent.is_dir():
        return ""
    names = [entry.name for entry in path.parent.iterdir() if entry.is_file()]
    similar = nearest_names(path.name, names)
    if not similar:
        return ""
    # As the user wrote the folder; only the last part is another.
    return f"; did you mean {str(path.parent / similar[0])!r}?"
