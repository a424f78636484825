"""A network for use elsewhere: ONNX, or a torch.export program.

What is exported to ONNX is compared with PyTorch before the file gets its name.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from autoprune.deploy.plain_attention import PlainAttention
from autoprune.deploy.signature import Signature, signature_of
from autoprune.errors import ExportError
from autoprune.files import write_atomically
from autoprune.structure.groups import tensors_in
from autoprune.structure.inputs import Example, Inputs
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
ONNX_DEVICES = ("CPUExecutionProvider",)
"""What ONNX Runtime computes on."""


def export_onnx(
    model: nn.Module,
    example: Example,
    path: Path,
    metadata: Mapping[str, str] | None = None,
) -> float:
    """Writes a network in evaluation mode as one ONNX file.

    The first axis is free where the network runs with two lengths of it, as a batch
    does. The one input of an image network is called "images"; others are called like
    the parameters of `forward`. The file is run by ONNX Runtime on random inputs, in
    batches of 1 and 4 where these are free, before it gets its name.

    Args:
        model: The network; it is left as found.
        example: One input, `(1, 3, height, width)` for instance; or several, as `trace`
            takes them.
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
    plain = plain_copy(model)
    signature = signature_of(plain, example)
    # Before the export, which takes long for large networks.
    size = sum(tensor.nbytes for tensor in plain.state_dict().values())
    if size > MAX_ONNX_BYTES:
        raise ExportError(
            f"weights of {size:,} bytes don't fit one ONNX file; the limit is "
            f"{MAX_ONNX_BYTES:,}"
        )
    errors: list[float] = []

    def write(partial: Path) -> None:
        export_named(plain, signature, partial)
        _add_metadata(partial, metadata or {})
        # Here, so that a file that fails never gets its name.
        errors.append(_relative_error(plain, onnx_session(partial), signature))

    write_atomically(path, write)
    return errors[0]


def export_for_timing(
    plain: nn.Module, signature: Signature, inputs: Inputs, path: Path
) -> None:
    """Writes a network as an ONNX file that runs as fast as that of `export_onnx`.

    It takes a fifth of the time: PyTorch's former exporter writes it, for one length of
    the batch, and nothing is checked. The other one writes what that one can't.

    Args:
        plain: The network, from `plain_copy`.
        signature: How it is called.
        inputs: The batch that the file is for.
        path: The `.onnx` file to write.

    Raises:
        ExportError: If neither exporter can express the network.
    """
    with warnings.catch_warnings(), _without_printed_graphs():
        # That it is the former one, and what it guesses of shapes.
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                plain,
                inputs.positional,
                path,
                kwargs=inputs.keywords,
                dynamo=False,
                input_names=signature.input_names,
                output_names=signature.output_names,
            )
        # Its errors are of a dozen types, and a later PyTorch may come without it.
        except Exception:
            export_named(plain, signature, path)


@contextmanager
def _without_printed_graphs() -> Iterator[None]:
    """Keeps the former exporter from printing the graph that it fails on.

    It does so to stdout, whether it is asked to be verbose or not.
    """
    name = "_jit_onnx_log"
    log = getattr(torch._C, name, None)
    # A later PyTorch may come without it.
    if log is None:
        yield
        return
    setattr(torch._C, name, lambda *_: None)
    try:
        yield
    finally:
        setattr(torch._C, name, log)


def export_named(model: nn.Module, signature: Signature, path: Path) -> None:
    """Writes a network as an ONNX file whose nodes know the modules they come from.

    Args:
        model: The network, from `plain_copy`.
        signature: How it is called.
        path: The `.onnx` file to write; nothing is checked.

    Raises:
        ExportError: If ONNX can't express the network.
    """
    with warnings.catch_warnings():
        # About the exporter's own dependencies and passes; nothing in them concerns the
        # network.
        for category in (DeprecationWarning, FutureWarning, UserWarning):
            warnings.simplefilter("ignore", category)
        try:
            _export(model, signature, path)
        except torch.onnx.errors.OnnxExporterError as error:
            try:
                with PlainAttention():
                    _export(model, signature, path)
            except torch.onnx.errors.OnnxExporterError:
                # The first reason is about the network as it is.
                raise ExportError(
                    f"ONNX can't express this network ({_root_cause(error)})"
                ) from error


def _export(model: nn.Module, signature: Signature, path: Path) -> None:
    """One call of PyTorch's exporter."""
    torch.onnx.export(
        model,
        signature.inputs.positional,
        path,
        kwargs=signature.inputs.keywords,
        dynamo=True,
        verbose=False,
        external_data=False,
        input_names=signature.input_names,
        output_names=signature.output_names,
        dynamic_shapes=signature.dynamic_shapes,
    )


def _add_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Adds entries to an ONNX file's `metadata_props`."""
    if not metadata:
        return
    import onnx

    network = onnx.load(path)
    for key, value in metadata.items():
        network.metadata_props.add(key=key, value=value)
    onnx.save(network, path)


def export_program(model: nn.Module, example: Example, path: Path) -> Path:
    """Writes a network as a `torch.export` program, its batch size free.

    Args:
        model: The network; it is left as found.
        example: Its inputs, as for `export_onnx`.
        path: The `.pt2` file to write.

    Returns:
        The path.

    Raises:
        ExportError: If the network can't be expressed; a file that was at `path` before
            stays there.
    """
    plain = plain_copy(model)
    signature = signature_of(plain, example)
    try:
        program = torch.export.export(
            plain,
            signature.inputs.positional,
            signature.inputs.keywords,
            dynamic_shapes=signature.dynamic_shapes,
        )
    # torch raises a dozen types for what its compiler can't follow.
    except Exception as error:
        raise ExportError(
            f"torch.export can't express this network ({_root_cause(error)})"
        ) from error
    write_atomically(path, lambda partial: torch.export.save(program, partial))
    return path


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode on the CPU, float32, contiguous.

    Args:
        model: The network; it is left as found.
    """
    plain = own_copy(unwrap(model)).eval().cpu().float()
    return plain.to(memory_format=torch.contiguous_format)


def _root_cause(error: BaseException) -> str:
    """The first line of the exception that an exporter's error was raised from."""
    # The exporter's own message is a page of advice.
    while error.__cause__ is not None:
        error = error.__cause__
    message, _, _ = str(error).strip().partition("\n")
    return f"{type(error).__name__}: {message}"


@torch.no_grad()
def _relative_error(
    model: nn.Module, session: "onnxruntime.InferenceSession", signature: Signature
) -> float:
    """The largest difference between PyTorch's and ONNX Runtime's outputs.

    Relative to each output's largest value; raises an `ExportError` if it is too large.
    """
    generator = torch.Generator().manual_seed(0)
    errors: list[float] = []
    # One and several images: code may treat a batch of one differently.
    for batch in (1, 4) if signature.has_batch else (1,):
        inputs = signature.samples(batch, generator)
        outputs = tensors_in(inputs.run(model))
        found = _run(session, signature, inputs)
        for expected, values in zip(outputs, found, strict=True):
            if expected.numel():
                errors.append(_difference(expected, torch.from_numpy(values)))
    # Not `max(errors) > limit`: a NaN has to fail as well.
    if not all(error <= MAX_RELATIVE_ERROR for error in errors):
        raise ExportError(
            f"the ONNX network differs from PyTorch by {max(errors):.1e}; the limit is "
            f"{MAX_RELATIVE_ERROR:.0e}"
        )
    # All outputs may be empty.
    return max(errors, default=0.0)


def _difference(expected: Tensor, found: Tensor) -> float:
    """The largest difference of one output, relative to its largest value."""
    if not expected.is_floating_point():
        # Booleans can't be subtracted.
        expected = expected.float()
        found = found.float()
    # Where all outputs are 0, only 0 is right.
    scale = expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return ((expected - found).abs().max() / scale).item()


def _run(
    session: "onnxruntime.InferenceSession", signature: Signature, inputs: Inputs
) -> Sequence[Any]:
    """The outputs of an ONNX network, numpy arrays."""
    try:
        return session.run(None, feed(session, signature.input_names, inputs))
    # ONNX Runtime's errors have no common class.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ExportError(
            f"the ONNX network doesn't run on a batch of {len(inputs.tensors()[0])} "
            f"({reason}); where the code takes the batch size "
            "from len(x), the export fixes it: write x.shape[0]"
        ) from error


def feed(
    session: "onnxruntime.InferenceSession", names: Sequence[str], inputs: Inputs
) -> dict[str, Any]:
    """What ONNX Runtime wants to be given: arrays by the names of inputs.

    Args:
        session: The network.
        names: Of all inputs, in order.
        inputs: The tensors.
    """
    # An input that nothing reads isn't in the file.
    wanted = {item.name for item in session.get_inputs()}
    arrays = {}
    for name, tensor in zip(names, inputs.tensors(), strict=True):
        if name in wanted:
            arrays[name] = tensor.numpy()
    return arrays


def onnx_session(
    path: Path, threads: int = 0, profile: Path | None = None
) -> "onnxruntime.InferenceSession":
    """An ONNX Runtime session on the CPU.

    Args:
        path: The ONNX file.
        threads: Threads that it may use; 0 for as many as PyTorch does.
        profile: What the name of a file begins with into which every run's kernels and
            their times are written; None for none.
    """
    # Here, since saving and loading weights needs the core alone.
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    # Errors only: warnings would go to the terminal.
    options.log_severity_level = 3
    # Idle threads of one session would spin while another is measured.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return onnxruntime.InferenceSession(path, options, providers=list(ONNX_DEVICES))
