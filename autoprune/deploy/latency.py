"""Milliseconds of a forward pass, of the dense and of the pruned network.

Both are measured alternately, so that whatever else runs slows both.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from autoprune.deploy.export import export_onnx, feed, onnx_session, plain_copy
from autoprune.deploy.signature import Signature, signature_of
from autoprune.structure.inputs import Example, Inputs
from autoprune.structure.slicing import own_copy
from autoprune.structure.wrappers import unwrap

Forward = Callable[[], object]
"""One forward pass on inputs that are fixed."""
Engine = Callable[[Inputs], Forward]
"""From inputs to the forward pass of one network on them."""

WARM_UP = 0.2
"""Share of the time that goes to passes whose milliseconds don't count."""


@dataclass(frozen=True)
class Latency:
    """Median latency of one engine at one batch size.

    Attributes:
        engine: "torch" or "onnxruntime".
        batch: Images in a forward pass.
        threads: Threads that the engine may use.
        dense_ms: Milliseconds of a pass of the dense network.
        pruned_ms: Milliseconds of a pass of the pruned network.
    """

    engine: str
    batch: int
    threads: int
    dense_ms: float
    pruned_ms: float

    @property
    def speedup(self) -> float:
        """How many times faster the pruned network is."""
        return self.dense_ms / self.pruned_ms


def measure_latency(
    dense: nn.Module,
    pruned: nn.Module,
    example: Example,
    onnx: Path | None = None,
    batch_sizes: Sequence[int] = (1, 64),
    seconds: float = 6.0,
) -> list[Latency]:
    """Both networks' latency on random images, in float32 and evaluation mode.

    In PyTorch, network and images are channels last.

    Args:
        dense: The network before pruning; it is left as found.
        pruned: The network after pruning; it is left as found.
        example: One input, `(1, 3, height, width)` for instance; or several, as `trace`
            takes them.
        onnx: The pruned network's ONNX file; the dense network is then exported to a
            temporary one (a few seconds). Without it only PyTorch is measured.
        batch_sizes: Images in a forward pass, one row each and engine; a network that
            takes no batches has one row, as if it were 1.
        seconds: Time for all measurements together, exporting aside. A pair of passes
            that takes longer than its share is still measured once after its warm-up.

    Returns:
        One row for each engine and batch size.
    """
    signature = signature_of(plain_copy(dense), example)
    if not signature.has_batch:
        batch_sizes = (1,)
    engines = {"torch": (_torch_engine(dense), _torch_engine(pruned))}
    if onnx is not None:
        dense_engine = _dense_onnx_engine(dense, example, signature)
        engines["onnxruntime"] = (dense_engine, _onnx_engine(onnx, signature))
    # Every row gets the same time, so slow networks get fewer passes.
    share = seconds / (len(engines) * len(batch_sizes))
    rows = []
    for name, (dense_engine, pruned_engine) in engines.items():
        for batch in batch_sizes:
            # Random, because zeros might be faster; seeded, so that all get the same.
            generator = torch.Generator().manual_seed(0)
            inputs = signature.samples(batch, generator)
            dense_ms, pruned_ms = _alternate(
                dense_engine(inputs), pruned_engine(inputs), share
            )
            n_threads = torch.get_num_threads()
            rows.append(Latency(name, batch, n_threads, dense_ms, pruned_ms))
    return rows


def _torch_engine(model: nn.Module) -> Engine:
    """A network in PyTorch, channels last."""
    # The layout in which PyTorch convolves fastest on the CPU.
    layout = torch.channels_last
    network = own_copy(unwrap(model)).eval().float().to(memory_format=layout)

    def bind(inputs: Inputs) -> Forward:
        inputs = inputs.change(_channels_last)

        # As in use: nothing is kept for a backward pass.
        @torch.inference_mode()
        def forward() -> object:
            return inputs.run(network)

        return forward

    return bind


def _channels_last(tensor: Tensor) -> Tensor:
    """An image in the layout; other tensors as they are."""
    if tensor.ndim != 4:
        return tensor
    return tensor.contiguous(memory_format=torch.channels_last)


def _onnx_engine(path: Path, signature: Signature) -> Engine:
    """A network in ONNX Runtime."""
    session = onnx_session(path)

    def bind(inputs: Inputs) -> Forward:
        arrays = feed(session, signature.input_names, inputs)
        return lambda: session.run(None, arrays)

    return bind


def _dense_onnx_engine(
    dense: nn.Module, example: Example, signature: Signature
) -> Engine:
    """A network in ONNX Runtime that has no file yet."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "dense.onnx"
        export_onnx(dense, example, path)
        # The session reads all of the file, so it may go.
        return _onnx_engine(path, signature)


def _alternate(dense: Forward, pruned: Forward, seconds: float) -> tuple[float, float]:
    """Median milliseconds of both, warm-up included in the seconds."""
    _time_pairs(dense, pruned, seconds * WARM_UP)
    pairs = _time_pairs(dense, pruned, seconds * (1 - WARM_UP))
    # Medians, because now and then a pass is held up by something else.
    dense_ms = median(pair[0] for pair in pairs)
    pruned_ms = median(pair[1] for pair in pairs)
    return dense_ms, pruned_ms


def _time_pairs(
    dense: Forward, pruned: Forward, seconds: float
) -> list[tuple[float, float]]:
    """Milliseconds of both in turns, until the time is over; of one pair at least."""
    pairs = []
    deadline = time.perf_counter() + seconds
    while not pairs or time.perf_counter() < deadline:
        pairs.append((_milliseconds(dense), _milliseconds(pruned)))
    return pairs


def _milliseconds(forward: Forward) -> float:
    """How long one forward pass takes."""
    started = time.perf_counter()
    forward()
    return (time.perf_counter() - started) * 1000
