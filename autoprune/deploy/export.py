"""What leaves a run: weights and plan that execute no code, and ONNX.

What is exported to ONNX is compared with PyTorch before the file gets its name.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from autoprune.data import models
from autoprune.deploy.loader import LOADER, loader_source
from autoprune.errors import ExportError, UserError
from autoprune.runs import write_atomically, write_json, write_text
from autoprune.scaling.depth import remove_blocks
from autoprune.scaling.resolution import resize_inputs
from autoprune.structure.attention import open_attention
from autoprune.structure.changes import find_changes, set_attributes
from autoprune.structure.groups import tensors_in
from autoprune.structure.slicing import fit_shapes, own_copy
from autoprune.structure.wrappers import unwrap

if TYPE_CHECKING:
    import onnxruntime

MAX_RELATIVE_ERROR = 1e-4
"""How far ONNX may be from PyTorch, as a share of the largest output."""
MAX_ONNX_BYTES = 1_500_000_000
"""Most bytes of weights in one ONNX file.

ONNX is a protobuf message, which ends at 2 GB; networks near that would need a second
file for their weights.
"""
WEIGHTS = "weights.safetensors"
PLAN = "plan.json"
PRUNED = "pruned"
"""Where a run keeps its pruned network."""
RECOVERY = "autoprune prune RUN"
"""The command that writes a pruned network again."""
ONNX_INPUT = "images"
"""Name of the input in an ONNX file."""
ONNX_DEVICES = ("CPUExecutionProvider",)
"""What ONNX Runtime computes on."""


def export_onnx(
    model: nn.Module,
    example: Tensor,
    path: Path,
    metadata: Mapping[str, str] | None = None,
) -> float:
    """Writes a network in evaluation mode as one ONNX file with a free batch size.

    The file is run by ONNX Runtime on random images in batches of 1 and 4 before it
    gets its name.

    Args:
        model: The network; it is left as found.
        example: One input, float32 `(1, 3, height, width)`.
        path: The `.onnx` file to write.
        metadata: What the file says of itself in its `metadata_props`, such as
            `autoprune.data.Preprocessing.metadata` gives.

    Returns:
        The largest difference from PyTorch's outputs in float32, relative to the
        largest output.

    Raises:
        ExportError: If the network can't be expressed, is too large, or differs by more
            than 1e-4. A file that was at `path` before stays there.
    """
    plain = _plain_copy(model)
    example = _two_images(example)
    # Before the export, which takes long for large networks.
    size = sum(tensor.nbytes for tensor in plain.state_dict().values())
    if size > MAX_ONNX_BYTES:
        raise ExportError(
            f"weights of {size:,} bytes don't fit one ONNX file; the limit is "
            f"{MAX_ONNX_BYTES:,}"
        )
    errors: list[float] = []

    def write(partial: Path) -> None:
        _to_onnx(plain, example, partial)
        _add_metadata(partial, metadata or {})
        # Here, so that a file that fails never gets its name.
        errors.append(_relative_error(plain, onnx_session(partial), example))

    write_atomically(path, write)
    return errors[0]


def _to_onnx(model: nn.Module, example: Tensor, path: Path) -> None:
    """Runs PyTorch's exporter, without its warnings."""
    with warnings.catch_warnings():
        # About the exporter's own dependencies and passes; nothing in them concerns the
        # network.
        for category in (DeprecationWarning, FutureWarning, UserWarning):
            warnings.simplefilter("ignore", category)
        try:
            torch.onnx.export(
                model,
                (example,),
                path,
                dynamo=True,
                verbose=False,
                external_data=False,
                input_names=[ONNX_INPUT],
                output_names=_output_names(model, example),
                dynamic_shapes=_free_batch(),
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise ExportError(
                f"ONNX can't express this network ({_root_cause(error)})"
            ) from error


def _add_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Adds entries to an ONNX file's `metadata_props`."""
    if not metadata:
        return
    import onnx

    network = onnx.load(path)
    for key, value in metadata.items():
        network.metadata_props.add(key=key, value=value)
    onnx.save(network, path)


def export_program(model: nn.Module, example: Tensor, path: Path) -> Path:
    """Writes a network as a `torch.export` program with a free batch size.

    Args:
        model: The network; it is left as found.
        example: One input, float32 `(1, 3, height, width)`.
        path: The `.pt2` file to write.

    Returns:
        The path.

    Raises:
        ExportError: If the network can't be expressed; a file that was at `path` before
            stays there.
    """
    plain = _plain_copy(model)
    try:
        program = torch.export.export(
            plain, (_two_images(example),), dynamic_shapes=_free_batch()
        )
    # torch raises a dozen types for what its compiler can't follow.
    except Exception as error:
        raise ExportError(
            f"torch.export can't express this network ({_root_cause(error)})"
        ) from error
    write_atomically(path, lambda partial: torch.export.save(program, partial))
    return path


def _plain_copy(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode, float32, contiguous."""
    plain = own_copy(unwrap(model)).eval().float()
    return plain.to(memory_format=torch.contiguous_format)


def _two_images(example: Tensor) -> Tensor:
    """The example twice, `(2, 3, height, width)`.

    Exporters take the batch size of an example that holds a single image for a
    constant.
    """
    return example.detach().float().contiguous().repeat(2, 1, 1, 1)


def _free_batch() -> tuple[dict[int, Any]]:
    """Tells exporters that the first axis of the one input may have any length."""
    return ({0: torch.export.Dim("batch")},)


@torch.no_grad()
def _output_names(model: nn.Module, example: Tensor) -> list[str]:
    """Names for the outputs of an ONNX file: "logits", or numbers if there are more."""
    n_outputs = len(tensors_in(model(example)))
    if n_outputs == 1:
        return ["logits"]
    return [f"output_{number}" for number in range(n_outputs)]


def _root_cause(error: BaseException) -> str:
    """The first line of the exception that an exporter's error was raised from."""
    # The exporter's own message is a page of advice.
    while error.__cause__ is not None:
        error = error.__cause__
    message, _, _ = str(error).strip().partition("\n")
    return f"{type(error).__name__}: {message}"


@torch.no_grad()
def _relative_error(
    model: nn.Module, session: "onnxruntime.InferenceSession", example: Tensor
) -> float:
    """The largest difference between PyTorch's and ONNX Runtime's outputs.

    Relative to each output's largest value; raises an `ExportError` if it is too large.
    """
    generator = torch.Generator().manual_seed(0)
    errors: list[float] = []
    # One and several images: code may treat a batch of one differently.
    for batch in (1, 4):
        images = torch.randn(batch, *example.shape[1:], generator=generator)
        outputs = tensors_in(model(images))
        for expected, values in zip(outputs, _run(session, images), strict=True):
            # Where all outputs are 0, only 0 is right.
            tiny = torch.finfo(torch.float32).tiny
            scale = expected.abs().max().clamp_min(tiny)
            difference = (expected - torch.from_numpy(values)).abs().max()
            errors.append((difference / scale).item())
    # Not `max(errors) > limit`: a NaN has to fail as well.
    if not all(error <= MAX_RELATIVE_ERROR for error in errors):
        raise ExportError(
            f"the ONNX network differs from PyTorch by {max(errors):.1e}; the limit is "
            f"{MAX_RELATIVE_ERROR:.0e}"
        )
    return max(errors)


def _run(session: "onnxruntime.InferenceSession", images: Tensor) -> Sequence[Any]:
    """The outputs of an ONNX network, numpy arrays."""
    try:
        return session.run(None, {ONNX_INPUT: images.numpy()})
    # ONNX Runtime's errors have no common class.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ExportError(
            f"the ONNX network doesn't run on a batch of {len(images)} ({reason}); "
            f"where the code takes the batch size "
            "from len(x), the export fixes it: write x.shape[0]"
        ) from error


def onnx_session(path: Path) -> "onnxruntime.InferenceSession":
    """An ONNX Runtime session on the CPU that uses as many threads as PyTorch does."""
    # Here, since saving and loading weights needs the core alone.
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Errors only: warnings would go to the terminal.
    options.log_severity_level = 3
    # Idle threads of one session would spin while another is measured.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(path, options, providers=list(ONNX_DEVICES))


def save_pruned(
    model: nn.Module,
    folder: Path,
    plan: Mapping[str, Any],
    dense: nn.Module | None = None,
) -> None:
    """Writes a network to a folder as weights, plan and `load.py`, each atomically.

    `load.py` loads it by PyTorch alone, for programs that do without autoprune.

    The plan comes last and makes the folder valid.

    Args:
        model: The pruned network; it is left as found.
        folder: Made if it isn't there.
        plan: JSON values, with at least `model` (a name for
            `autoprune.data.models.build`) and `n_classes`.
        dense: The network that it was made from; None builds that of the plan.
    """
    # safetensors holds row-major tensors that share no memory. Which were channels last
    # is written beside them, since it decides how PyTorch sums.
    plain = {}
    channels_last = []
    for key, value in unwrap(model).state_dict().items():
        plain[key] = value.detach().clone(memory_format=torch.contiguous_format)
        if _is_channels_last(value):
            channels_last.append(key)
    plan = dict(plan)
    if dense is None:
        # A factory may draw numbers, which saving mustn't disturb.
        with torch.random.fork_rng(devices=[]):
            dense = models.build(plan["model"], plan["n_classes"])
    plan["modules"] = find_changes(dense, model)
    metadata = {"channels_last": " ".join(channels_last)}
    write_atomically(
        folder / WEIGHTS, lambda partial: save_file(plain, partial, metadata)
    )
    write_text(folder / LOADER, loader_source(plan))
    write_json(folder / PLAN, plan)


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
    model = unwrap(models.build(plan["model"], plan["n_classes"]))
    # In the order in which pruning did it: each changes the names of what follows.
    if plan.get("removed_blocks"):
        model = remove_blocks(model, plan["removed_blocks"])
    if plan.get("image_size"):
        model = resize_inputs(model, plan["image_size"])
    model = open_attention(model)
    _check_fit(model.state_dict(), weights, folder, plan["model"])
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
    for key, value in weights.items():
        if not torch.isfinite(value).all():
            raise UserError(
                "run",
                f"{key} in {str(path)!r} holds NaN or infinite values; the "
                f"network is not usable",
            )
    for key in metadata.get("channels_last", "").split():
        if key in weights:
            tensor = weights[key]
            weights[key] = tensor.clone(memory_format=torch.channels_last)
    return weights


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
        raise UserError(
            "run",
            f"weights and plan in {str(folder)!r} don't belong together "
            f"({len(misfits)} tensors don't fit {name}, "
            f"first: {misfits[0]}); write them again with: {RECOVERY}",
        )


def _is_part(shape: torch.Size, full: torch.Size) -> bool:
    """Whether slicing a tensor can give another shape: no axis may be longer."""
    if len(shape) != len(full):
        return False
    return all(size <= length for size, length in zip(shape, full, strict=True))
