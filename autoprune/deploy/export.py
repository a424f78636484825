"""A network for use elsewhere: ONNX, or a torch.export program.

What is exported to ONNX is compared with PyTorch before the file gets its name.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from autoprune.errors import ExportError
from autoprune.files import write_atomically
from autoprune.structure.groups import tensors_in
from autoprune.structure.slicing import own_copy
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
