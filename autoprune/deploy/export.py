"""What leaves a run: weights and plan that execute no code, and ONNX that is checked
against PyTorch first.
"""

import copy
import json
import warnings
from pathlib import Path

import onnxruntime
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from autoprune.data import models
from autoprune.errors import ExportError, UserError
from autoprune.runs import write_atomically, write_json
from autoprune.scaling.depth import remove_blocks
from autoprune.scaling.resolution import at_resolution
from autoprune.structure.attention import open_attention
from autoprune.structure.groups import tensors_in
from autoprune.structure.slicing import fit_shapes

MAX_RELATIVE_ERROR = 1e-4
# ONNX is a protobuf message, which ends at 2 GB; networks near that would need a second
# file for their weights.
MAX_ONNX_BYTES = 1_500_000_000
WEIGHTS, PLAN = "weights.safetensors", "plan.json"


def export_onnx(model: nn.Module, example: Tensor, path: Path) -> float:
    """Writes `model` in evaluation mode as one ONNX file with a free batch size, after
    checking what it computes.

    The file is run by ONNX Runtime on random images in batches of 1 and 4 before it
    gets its name.

    Args:
        model: The network; it is left as found.
        example: One input, float32 `(1, 3, height, width)`.
        path: The `.onnx` file to write.

    Returns:
        The largest difference from PyTorch's outputs in float32, relative to the
        largest output.

    Raises:
        ExportError: If the network can't be expressed, is too large, or differs by more
            than 1e-4. A file that was at `path` before stays there.
    """
    plain, example = _plain(model), _two(example)
    size = sum(tensor.nbytes for tensor in plain.state_dict().values())
    if size > MAX_ONNX_BYTES:
        raise ExportError(
            f"weights of {size:,} bytes don't fit one ONNX file; the limit is "
            f"{MAX_ONNX_BYTES:,}"
        )
    errors = []

    def write(partial: Path) -> None:
        _to_onnx(plain, example, partial)
        errors.append(_relative_error(plain, onnx_session(partial), example))

    write_atomically(path, write)
    return errors[0]


def _to_onnx(model: nn.Module, example: Tensor, path: Path) -> None:
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
                input_names=["images"],
                output_names=_output_names(model, example),
                dynamic_shapes=_free_batch(),
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise ExportError(
                f"ONNX can't express this network ({_root_cause(error)})"
            ) from error


def export_program(model: nn.Module, example: Tensor, path: Path) -> Path:
    """Writes `model` as a `torch.export` program with a free batch size, and returns
    the path.

    Args:
        model: The network; it is left as found.
        example: One input, float32 `(1, 3, height, width)`.
        path: The `.pt2` file to write.

    Raises:
        ExportError: If the network can't be expressed; a file that was at `path` before
            stays there.
    """
    try:
        program = torch.export.export(
            _plain(model), (_two(example),), dynamic_shapes=_free_batch()
        )
    except (
        Exception
    ) as error:  # torch raises a dozen types for what its compiler can't follow
        raise ExportError(
            f"torch.export can't express this network ({_root_cause(error)})"
        ) from error
    write_atomically(path, lambda partial: torch.export.save(program, partial))
    return path


def _plain(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode, float32, contiguous."""
    return copy.deepcopy(model).eval().float().to(memory_format=torch.contiguous_format)


def _two(example: Tensor) -> Tensor:
    """Two images: exporters take the batch size of an example that holds a single one
    for a constant.
    """
    return example.detach().float().contiguous().repeat(2, 1, 1, 1)


def _free_batch() -> tuple[dict]:
    """The first axis of the one input may have any length."""
    return ({0: torch.export.Dim("batch")},)


@torch.no_grad()
def _output_names(model: nn.Module, example: Tensor) -> list[str]:
    n_outputs = len(tensors_in(model(example)))
    return (
        ["logits"]
        if n_outputs == 1
        else [f"output_{number}" for number in range(n_outputs)]
    )


def _root_cause(error: BaseException) -> str:
    # The exporter's own message is a page of advice; what went wrong is in the
    # exception it was raised from.
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


@torch.no_grad()
def _relative_error(
    model: nn.Module, session: onnxruntime.InferenceSession, example: Tensor
) -> float:
    generator = torch.Generator().manual_seed(0)
    errors = []
    for batch in (1, 4):
        images = torch.randn(batch, *example.shape[1:], generator=generator)
        for torchs, onnxs in zip(
            tensors_in(model(images)), _run(session, images), strict=True
        ):
            scale = torchs.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
            errors.append(
                ((torchs - torch.from_numpy(onnxs)).abs().max() / scale).item()
            )
    # Not `max(errors) > limit`: a NaN has to fail as well.
    if not all(error <= MAX_RELATIVE_ERROR for error in errors):
        raise ExportError(
            f"the ONNX network differs from PyTorch by {max(errors):.1e}; the limit is "
            f"{MAX_RELATIVE_ERROR:.0e}"
        )
    return max(errors)


def _run(session: onnxruntime.InferenceSession, images: Tensor) -> list:
    try:
        return session.run(None, {"images": images.numpy()})
    except Exception as error:  # ONNX Runtime's errors have no common class
        reason = str(error).strip().partition("\n")[0]
        raise ExportError(
            f"the ONNX network doesn't run on a batch of {len(images)} ({reason}); "
            f"where the code takes the batch size "
            "from len(x), the export fixes it: write x.shape[0]"
        ) from error


def onnx_session(path: Path) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on the CPU that uses as many threads as PyTorch does."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    # Idle threads of one session would spin while another is measured: 180 ms instead
    # of 85 for resnet20 at batch 64.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(
        path, options, providers=["CPUExecutionProvider"]
    )


def save_pruned(model: nn.Module, folder: Path, plan: dict) -> None:
    """Writes `model` to `folder` as weights and plan, each atomically; the plan comes
    last and makes the folder valid.

    Args:
        model: The pruned network; it is left as found.
        folder: Made if it isn't there.
        plan: JSON values, with at least `model` (a name for
            `autoprune.data.models.build`) and `n_classes`.
    """
    state = model.state_dict()
    # safetensors holds row-major tensors that share no memory; which were channels last
    # decides how PyTorch sums.
    plain = {
        key: value.detach().clone(memory_format=torch.contiguous_format)
        for key, value in state.items()
    }
    layout = {
        "channels_last": " ".join(
            key for key, value in state.items() if _is_channels_last(value)
        )
    }
    write_atomically(
        folder / WEIGHTS, lambda partial: save_file(plain, partial, layout)
    )
    write_json(folder / PLAN, plan)


def _is_channels_last(tensor: Tensor) -> bool:
    # By strides: `is_contiguous` says yes to both layouts where a kernel has one
    # channel or one pixel.
    return (
        tensor.ndim == 4
        and tensor.stride()
        == torch.empty_like(tensor, memory_format=torch.channels_last).stride()
    )


def load_pruned(folder: Path) -> nn.Module:
    """The network that `save_pruned` wrote, in evaluation mode; its outputs are
    bit-identical.

    Nothing in the files is executed. A plan that names `package.module:factory` has
    that factory imported and called, as `--model` would.

    Raises:
        UserError: If `folder` holds no pruned network, a file is damaged, or weights
            and plan don't belong together.
    """
    plan = _read_plan(folder / PLAN)
    weights = _read_weights(folder / WEIGHTS)
    model = models.build(plan["model"], plan["n_classes"])
    if plan.get("removed_blocks"):
        model = remove_blocks(model, plan["removed_blocks"])
    if plan.get("image_size"):
        model = at_resolution(model, plan["image_size"])
    model = open_attention(model)
    _check_fit(model.state_dict(), weights, folder, plan["model"])
    fit_shapes(model, weights)
    return model.eval()


def _read_plan(path: Path) -> dict:
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
    _check_exists(path)
    try:
        with safe_open(path, "pt") as file:
            channels_last = (file.metadata() or {}).get("channels_last", "").split()
            weights = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error
    for key, value in weights.items():
        if not torch.isfinite(value).all():
            raise UserError(
                "run",
                f"{key} in {str(path)!r} holds NaN or infinite values; the "
                f"network is not usable",
            )
    return weights | {
        key: weights[key].clone(memory_format=torch.channels_last)
        for key in channels_last
        if key in weights
    }


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise UserError(
            "run",
            f"{str(path.parent)!r} holds no pruned network (no {path.name}); "
            f"write one with: autoprune prune RUN",
        )


def _damaged(path: Path, reason: object) -> UserError:
    return UserError(
        "run",
        f"{str(path)!r} is damaged ({reason}); write it again with: autoprune "
        f"prune RUN",
    )


def _check_fit(
    own: dict[str, Tensor], weights: dict[str, Tensor], folder: Path, name: str
) -> None:
    misfits = [
        key
        for key in own
        if key in weights and not _fits_within(weights[key].shape, own[key].shape)
    ]
    misfits = sorted(own.keys() ^ weights.keys()) + misfits
    if misfits:
        raise UserError(
            "run",
            f"weights and plan in {str(folder)!r} don't belong together "
            f"({len(misfits)} tensors don't fit {name}, "
            f"first: {misfits[0]}); write them again with: autoprune prune RUN",
        )


def _fits_within(shape: torch.Size, dense: torch.Size) -> bool:
    return len(shape) == len(dense) and all(
        size <= full for size, full in zip(shape, dense, strict=True)
    )
