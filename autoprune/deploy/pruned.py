"""A pruned network as files: weights and plan, which execute no code when loaded."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from autoprune.data import models
from autoprune.deploy.loader import LOADER, loader_source
from autoprune.errors import UserError
from autoprune.files import (
    DIGEST,
    PLAN,
    WEIGHTS,
    digest_of,
    write_atomically,
    write_json,
    write_text,
)
from autoprune.scaling.depth import remove_blocks
from autoprune.scaling.resolution import resize_inputs
from autoprune.structure.attention import open_attention
from autoprune.structure.changes import find_changes, set_attributes
from autoprune.structure.slicing import fit_shapes
from autoprune.structure.wrappers import unwrap

PRUNED = "pruned"
"""Where a run keeps its pruned network."""
RECOVERY = "autoprune prune RUN"
"""The command that writes a pruned network again."""


def save_pruned(
    model: nn.Module,
    folder: Path,
    plan: Mapping[str, Any],
    dense: nn.Module | None = None,
) -> None:
    """Writes a network to a folder as weights, plan and `load.py`, each atomically.

    `load.py` loads it by PyTorch alone, for programs that do without autoprune.

    The plan comes last and makes the folder valid: it holds the digest of the weights
    that it is for.

    Args:
        model: The pruned network; it is left as found.
        folder: Made if it isn't there.
        plan: JSON values, with at least `model` (a name for
            `autoprune.data.models.build`) and `n_classes`.
        dense: The network that it was made from; None builds that of the plan.

    Raises:
        UserError: If a weight is NaN or infinite, or the folder can't be written;
            nothing is written then.
    """
    plan = dict(plan)
    if dense is None:
        # A factory may draw numbers, which saving mustn't disturb.
        with torch.random.fork_rng(devices=[]):
            dense = models.build(plan["model"], plan["n_classes"])
    # safetensors holds row-major tensors that share no memory. Which were channels last
    # is written beside them, since it decides how PyTorch sums.
    plain = {}
    channels_last = []
    for key, value in saved_tensors(unwrap(model), unwrap(dense)).items():
        plain[key] = value.detach().clone(memory_format=torch.contiguous_format)
        if _is_channels_last(value):
            channels_last.append(key)
    # Before a file is touched: what can't be read again must not replace what can.
    _check_finite(plain, folder / WEIGHTS)
    plan["modules"] = find_changes(dense, model)
    # First, since it goes with the weights before as well as with these.
    write_text(folder / LOADER, loader_source(plan))
    metadata = {"channels_last": " ".join(channels_last)}
    digests: list[str] = []

    def write(partial: Path) -> None:
        save_file(plain, partial, metadata)
        digests.append(digest_of(partial))

    write_atomically(folder / WEIGHTS, write)
    write_json(folder / PLAN, plan | {DIGEST: digests[0]})


def saved_tensors(model: nn.Module, dense: nn.Module) -> dict[str, Tensor]:
    """The state dict, and what pruning changed of the buffers that it leaves out.

    Args:
        model: The pruned network.
        dense: The network that it was made from.

    Returns:
        Name to the tensor itself.
    """
    tensors = dict(model.state_dict())
    shapes = {name: buffer.shape for name, buffer in dense.named_buffers()}
    for name, buffer in model.named_buffers():
        if name not in tensors and buffer.shape != shapes.get(name, buffer.shape):
            tensors[name] = buffer
    return tensors


def _is_channels_last(tensor: Tensor) -> bool:
    """Whether a tensor's memory is in the order that PyTorch calls channels last."""
    if tensor.ndim != 4:
        return False
    # By strides: `is_contiguous` says yes to both layouts where a kernel has one
    # channel or one pixel.
    channels_last = torch.empty_like(tensor, memory_format=torch.channels_last)
    return tensor.stride() == channels_last.stride()


def load_pruned(folder: str | Path) -> nn.Module:
    """The network that `save_pruned` wrote; its outputs are bit-identical.

    Nothing in the files is executed. A plan that names `package.module:factory` has
    that factory imported and called, as `--model` would.

    Args:
        folder: The folder that it was written to, or the run that this belongs to.

    Returns:
        The network, in evaluation mode.

    Raises:
        UserError: If `folder` holds no pruned network, a file is damaged, or weights
            and plan don't belong together.
    """
    folder = _pruned_folder(Path(folder))
    plan = _read_plan(folder / PLAN)
    weights = _read_weights(folder / WEIGHTS)
    # Plans of earlier versions hold no digest.
    if DIGEST in plan and plan[DIGEST] != digest_of(folder / WEIGHTS):
        raise _unrelated(folder, "the plan is of other weights")
    model = unwrap(models.build(plan["model"], plan["n_classes"]))
    # In the order in which pruning did it: each changes the names of what follows.
    if plan.get("removed_blocks"):
        model = remove_blocks(model, plan["removed_blocks"])
    if plan.get("image_size"):
        model = resize_inputs(model, plan["image_size"])
    model = open_attention(model)
    expected = dict(model.state_dict())
    for key, buffer in model.named_buffers():
        # Of those that a state dict leaves out, only some were saved.
        if key in weights:
            expected[key] = buffer
    _check_fit(expected, weights, folder, plan["model"])
    fit_shapes(model, weights)
    # Plans of earlier versions hold none; what setters know is set by now.
    set_attributes(model, plan.get("modules", {}))
    return model.eval()


def _pruned_folder(folder: Path) -> Path:
    """The folder itself, or the one inside of a run."""
    inside = folder / PRUNED
    is_run = inside.is_dir() and not (folder / PLAN).exists()
    return inside if is_run else folder


def _read_plan(path: Path) -> dict[str, Any]:
    """A plan, in which what `load_pruned` can't do without has its type."""
    _check_exists(path)
    try:
        plan = json.loads(path.read_text())
    except ValueError as error:
        raise _damaged(path, error) from error
    for key, kind in (("model", str), ("n_classes", int)):
        if not isinstance(plan, dict) or not isinstance(plan.get(key), kind):
            raise _damaged(path, f"no {key!r} of type {kind.__name__}")
    return plan


def _read_weights(path: Path) -> dict[str, Tensor]:
    """Weights in the layout that they had when they were saved."""
    _check_exists(path)
    weights = {}
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            names = file.keys()
            for key in names:
                weights[key] = file.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error
    _check_finite(weights, path)
    for key in metadata.get("channels_last", "").split():
        if key in weights:
            tensor = weights[key]
            weights[key] = tensor.clone(memory_format=torch.channels_last)
    return weights


def _check_finite(weights: Mapping[str, Tensor], path: Path) -> None:
    """Raises a `UserError` if a weight of a file is NaN or infinite."""
    for key, value in weights.items():
        if not torch.isfinite(value).all():
            raise UserError(
                "run",
                f"{key} in {str(path)!r} holds NaN or infinite values; the "
                f"network is not usable",
            )


def _check_exists(path: Path) -> None:
    """Raises a `UserError` unless a file of a pruned network is there."""
    if not path.is_file():
        raise UserError(
            "run",
            f"{str(path.parent)!r} holds no pruned network (no {path.name}); "
            f"write one with: {RECOVERY}",
        )


def _damaged(path: Path, reason: object) -> UserError:
    """The error for a file of a pruned network that can't be used."""
    return UserError(
        "run", f"{str(path)!r} is damaged ({reason}); write it again with: {RECOVERY}"
    )


def _check_fit(
    full: Mapping[str, Tensor], weights: Mapping[str, Tensor], folder: Path, name: str
) -> None:
    """Raises a `UserError` unless weights are those of a network, or part of them."""
    # What only one of them has comes first, as it says more than a shape.
    misfits = sorted(full.keys() ^ weights.keys())
    for key, tensor in full.items():
        if key in weights and not _is_part(weights[key].shape, tensor.shape):
            misfits.append(key)
    if misfits:
        reason = f"{len(misfits)} tensors don't fit {name}, first: {misfits[0]}"
        raise _unrelated(folder, reason)


def _unrelated(folder: Path, reason: str) -> UserError:
    """The error for weights and a plan that aren't of one network."""
    return UserError(
        "run",
        f"weights and plan in {str(folder)!r} don't belong together ({reason}); write "
        f"them again with: {RECOVERY}",
    )


def _is_part(shape: torch.Size, full: torch.Size) -> bool:
    """Whether slicing a tensor can give another shape: no axis may be longer."""
    if len(shape) != len(full):
        return False
    return all(size <= length for size, length in zip(shape, full, strict=True))
