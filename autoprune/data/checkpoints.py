"""Weights from the files that training scripts leave; loading them executes no code.

A checkpoint holds more than weights: epochs, optimizers, averaged copies. Its weights
are the one set of tensors whose names and shapes fit the network, wherever in the file
that lies and whatever all of its names begin with.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from autoprune.data.checkpoint_files import TensorSet, read_sets
from autoprune.data.places import split_weights
from autoprune.errors import UserError, nearest_names
from autoprune.structure.wrappers import unwrap

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts that `torch.compile` and others put into names, at any place."""
TOP = "."
"""The key of tensors that lie in a file without a name for all of them."""
COUNTER = "num_batches_tracked"
"""Batch norm's count of batches, which files of old PyTorch versions lack."""


@dataclass(frozen=True)
class _Match:
    """A set of tensors laid beside a network.

    Attributes:
        key: That of the set.
        prefix: What stands in front of the network's names.
        weights: Name to tensor for all that begins so, the prefix removed.
        ignored: Names that don't begin so.
    """

    key: str
    prefix: str
    weights: dict[str, Tensor]
    ignored: list[str]

    @property
    def label(self) -> str:
        """What chooses it in `FILE:KEY`."""
        parts = [self.key, self.prefix.removesuffix(".")]
        return ".".join(part for part in parts if part) or TOP


def load_weights(model: nn.Module, place: str | Path) -> tuple[str, ...]:
    """Fills a network with weights from a file, in the network's own precision.

    Of all tensors in the file those are taken whose names and shapes fit. What stands
    in front of all names is removed: `module.` of DataParallel, `model.` of Lightning,
    `_orig_mod.` of torch.compile, or whatever makes them fit.

    Args:
        model: The network, changed in place; or one in a wrapper, as `unwrap` knows it.
        place: A `.safetensors` or `torch.save` file, or `FILE:KEY` where several sets
            in it fit: `ckpt.pt:ema`, or `ckpt.pt:state_dict.teacher` for those names of
            `state_dict` that begin with `teacher.`.

    Returns:
        What to tell the user: another precision, tensors that were left out.

    Raises:
        UserError: If the file is missing, is neither format, or would need to execute
            code to load; if no set fits (what differs is listed) or several do; or if
            values aren't finite.
    """
    model = unwrap(model)
    path, key = split_weights(place)
    sets = read_sets(path)
    # Names without wrappers, to those that the network goes by.
    names = {_plain(name): name for name in model.state_dict()}
    expected = {_plain(name): value for name, value in model.state_dict().items()}
    match = _choose(path, sets, key, expected)
    weights = {}
    for name, value in match.weights.items():
        weights[names[name]] = _in_precision(path, name, value, expected[name])
    # Not strict: the counters of batches may lack, see `_difference`.
    model.load_state_dict(weights, strict=False)
    return _remarks(path, match, expected)


def read_state_dict(place: str | Path) -> dict[str, Tensor]:
    """Weights from a `.safetensors` or `torch.save` file, whatever network they fit.

    `module.` of DataParallel and `_orig_mod.` of torch.compile are removed.

    Args:
        place: The file, or `FILE:KEY`, as for `load_weights`.

    Returns:
        Names to tensors on the CPU.

    Raises:
        UserError: As `load_weights` for the file; if it holds several sets of weights.
    """
    path, key = split_weights(place)
    sets = read_sets(path)
    if key is not None:
        chosen = [found for found in sets if (found.key or TOP) == key]
        if not chosen:
            raise _unknown_key(path, key, {found.key or TOP for found in sets})
        sets = chosen
    largest = max(len(found.tensors) for found in sets)
    # Beside weights there are few tensors: counters, states of generators.
    rivals = [found for found in sets if 2 * len(found.tensors) >= largest]
    if len(rivals) > 1:
        raise _ambiguous(path, [found.key or TOP for found in rivals])
    tensors = {_plain(name): value for name, value in rivals[0].tensors.items()}
    prefix = "module."
    # Only if all have it: a network may have a submodule of that name.
    while all(name.startswith(prefix) for name in tensors):
        tensors = {name.removeprefix(prefix): t for name, t in tensors.items()}
    return tensors


def _plain(name: str) -> str:
    """The name of a tensor without `WRAPPERS`."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _choose(
    path: Path, sets: list[TensorSet], key: str | None, expected: Mapping[str, Tensor]
) -> _Match:
    """The one set that fits a network."""
    matches = []
    for found in sets:
        matches += _matches(found, expected)
    if key is not None:
        matches = _with_key(path, matches, key)
    fitting = [match for match in matches if not _difference(match.weights, expected)]
    # The same tensors under two names, as one script stores its network twice, leave
    # nothing to choose.
    different = {_addresses(match): match for match in reversed(fitting)}
    if len(different) > 1:
        raise _ambiguous(path, [match.label for match in fitting])
    if fitting:
        return fitting[0]
    # The nearest one says most about what is wrong.
    nearest = max(matches, key=lambda match: len(match.weights.keys() & expected))
    place = repr(str(path))
    if len(sets) > 1 or nearest.label != TOP:
        place += f" ({nearest.label})"
    difference = _difference(nearest.weights, expected)
    raise UserError("weights", f"{place} {difference}")


def _with_key(path: Path, matches: list[_Match], key: str) -> list[_Match]:
    """Those that a key chooses."""
    chosen = [match for match in matches if match.label == key]
    # Or by the set alone, whatever its names begin with.
    chosen = chosen or [match for match in matches if match.key == key]
    if chosen:
        return chosen
    raise _unknown_key(path, key, {match.label for match in matches})


def _unknown_key(path: Path, key: str, labels: set[str]) -> UserError:
    """The error for a key that a file doesn't have."""
    known = sorted(labels)
    similar = nearest_names(key, known)
    question = f" did you mean {similar[0]!r}?" if similar else ""
    return UserError(
        "weights",
        f"{str(path)!r} holds no weights {key!r};{question} It holds: {_listed(known)}",
    )


def _matches(found: TensorSet, expected: Mapping[str, Tensor]) -> list[_Match]:
    """How a set may stand for a network: once for each prefix that serves best."""
    tensors = {_plain(name): tensor for name, tensor in found.tensors.items()}
    # Each name of the network that some name ends with speaks for what is in front.
    votes: Counter[str] = Counter()
    for name in tensors:
        parts = name.split(".")
        for n_front in range(len(parts)):
            if ".".join(parts[n_front:]) in expected:
                votes["".join(f"{part}." for part in parts[:n_front])] += 1
    most = max(votes.values(), default=0)
    prefixes = [prefix for prefix, count in votes.items() if count == most]
    # Names that are just the network's own are not explained otherwise.
    if not prefixes or ("" in prefixes and tensors.keys() == expected.keys()):
        prefixes = [""]
    matches = []
    for prefix in prefixes:
        others = tuple(other for other in prefixes if len(other) > len(prefix))
        weights = {}
        ignored = []
        for name, tensor in tensors.items():
            # Every name begins with nothing; what another prefix explains isn't meant.
            if name.startswith(prefix) and not name.startswith(others):
                weights[name.removeprefix(prefix)] = tensor
            else:
                ignored.append(name)
        matches.append(_Match(found.key, prefix, weights, ignored))
    return matches


def _addresses(match: _Match) -> tuple[tuple[str, int], ...]:
    """Which tensors a match would load."""
    return tuple((name, t.data_ptr()) for name, t in sorted(match.weights.items()))


def _ambiguous(path: Path, labels: list[str]) -> UserError:
    """The error for a file of which several sets could be meant."""
    return UserError(
        "weights",
        f"{str(path)!r} holds several sets of weights: {_listed(labels)}; choose one, "
        f"as in {path}:{labels[0]}",
    )


def _listed(labels: list[str], n: int = 6) -> str:
    more = f" and {len(labels) - n} more" if len(labels) > n else ""
    return ", ".join(labels[:n]) + more


def _in_precision(path: Path, name: str, value: Tensor, like: Tensor) -> Tensor:
    """One tensor of a file in the network's precision."""
    if value.is_floating_point() and not like.is_floating_point():
        whole = _as_integers(value, like)
        if whole is not None:
            return whole
    is_number = not value.is_quantized and value.layout == torch.strided
    if not is_number or value.is_floating_point() != like.is_floating_point():
        raise UserError(
            "weights",
            f"{name} in {str(path)!r} is {value.dtype}, the network's {like.dtype}; "
            f"save the weights before they are quantised",
        )
    converted = value.to(like.dtype)
    # Here, since NaN would otherwise surface as a failed search much later; and of the
    # converted ones, since a narrower type has less range.
    if not torch.isfinite(converted).all():
        raise UserError(
            "weights",
            f"{name} in {str(path)!r} holds NaN or infinite values; the "
            f"network is not usable",
        )
    return converted


def _as_integers(value: Tensor, like: Tensor) -> Tensor | None:
    """An integer buffer of which a file holds floats, since all of it was cast.

    Narrow floats round large integers. So a counter, of which nothing depends, is taken
    from the file, but indices from the network, if they are the same when rounded.

    Args:
        value: What the file holds.
        like: The network's own.

    Returns:
        The integers; None where the file's are others than the network's.
    """
    if like.ndim == 0 and torch.isfinite(value):
        return value.round().to(like.dtype)
    return like.clone() if torch.equal(like.to(value.dtype), value) else None


def _remarks(
    path: Path, match: _Match, expected: Mapping[str, Tensor]
) -> tuple[str, ...]:
    """What to tell of weights that were loaded."""
    remarks = []
    for name, value in match.weights.items():
        precision = expected[name].dtype
        if value.is_floating_point() and value.dtype != precision:
            remarks.append(
                f"{path} holds weights in {_short(value.dtype)}; they are taken as "
                f"{_short(precision)}"
            )
            break
    if match.ignored:
        remarks.append(
            f"of {path} only what begins with {match.prefix!r} was loaded; "
            f"{len(match.ignored)} other tensors are left out (first: "
            f"{match.ignored[0]})"
        )
    return tuple(remarks)


def _short(dtype: torch.dtype) -> str:
    """A type's name without the library's."""
    return str(dtype).removeprefix("torch.")


def _difference(
    weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> str | None:
    """What to say of weights that don't fit a network; None where they fit."""
    missing = []
    for key in expected:
        if key not in weights and not key.endswith(COUNTER):
            missing.append(key)
    surplus = [key for key in weights if key not in expected]
    misfits = []
    for key in weights:
        if key in expected and weights[key].shape != expected[key].shape:
            misfits.append(key)
    if not (missing or surplus or misfits):
        return None
    if not (missing or surplus) and _is_only_head(misfits, weights, expected):
        head = _head_name(expected)
        n_given = len(weights[misfits[0]])
        n_expected = len(expected[misfits[0]])
        return (
            f"has a head of {n_given} classes ({head}), the data has {n_expected}; "
            f"give weights trained on these classes"
        )
    difference = _list_difference(missing, surplus, misfits, weights, expected)
    return f"is for another architecture: {difference}; give the model that it is of"


def _list_difference(
    missing: list[str],
    surplus: list[str],
    misfits: list[str],
    weights: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
) -> str:
    """How many tensors differ in which way, each time with the first of them."""
    parts = []
    if missing:
        parts.append(f"{len(missing)} missing (first: {missing[0]})")
    if surplus:
        parts.append(f"{len(surplus)} unexpected (first: {surplus[0]})")
    if misfits:
        key = misfits[0]
        parts.append(
            f"{len(misfits)} of another shape (first: {key} is "
            f"{tuple(weights[key].shape)}, not {tuple(expected[key].shape)})"
        )
    return "; ".join(parts)


def _head_name(expected: Mapping[str, Tensor]) -> str:
    """The module that makes the logits: the last one, as in every known network."""
    return list(expected)[-1].rpartition(".")[0]


def _is_only_head(
    misfits: list[str], weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> bool:
    """Whether what doesn't fit differs in nothing but the number of classes."""
    head = _head_name(expected)
    for key in misfits:
        is_in_head = key.rpartition(".")[0] == head
        if not is_in_head or weights[key].shape[1:] != expected[key].shape[1:]:
            return False
    return True
