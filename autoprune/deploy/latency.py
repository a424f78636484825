"""Milliseconds of a forward pass, dense and pruned measured alternately, so that
whatever else runs slows both.
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from autoprune.deploy.export import export_onnx, onnx_session

Forward = Callable[[], object]


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
    example: Tensor,
    onnx: Path | None = None,
    batch_sizes: Sequence[int] = (1, 64),
    seconds: float = 6.0,
) -> list[Latency]:
    """Both networks' latency on random images: float32, evaluation mode, channels last
    in PyTorch.

    Args:
        dense: The network before pruning; it is left as found.
        pruned: The network after pruning; it is left as found.
        example: One input, float32 `(1, 3, height, width)`.
        onnx: The pruned network's ONNX file; the dense network is then exported to a
            temporary one (a few seconds). Without it only PyTorch is measured.
        batch_sizes: Images in a forward pass, one row each and engine.
        seconds: Time for all measurements together, exporting aside. A pair of passes
            that takes longer than its share is still measured once after its warm-up.

    Returns:
        One row for each engine and batch size.
    """
    engines = {"torch": [_torch_engine(dense), _torch_engine(pruned)]}
    if onnx is not None:
        engines["onnxruntime"] = [
            _dense_onnx_engine(dense, example),
            _onnx_engine(onnx),
        ]
    share = seconds / (len(engines) * len(batch_sizes))
    rows = []
    for engine, (dense_on, pruned_on) in engines.items():
        for batch in batch_sizes:
            images = torch.randn(
                batch, *example.shape[1:], generator=torch.Generator().manual_seed(0)
            )
            times = _alternate(dense_on(images), pruned_on(images), share)
            rows.append(Latency(engine, batch, torch.get_num_threads(), *times))
    return rows


def _torch_engine(model: nn.Module) -> Callable[[Tensor], Forward]:
    model = copy.deepcopy(model).eval().float().to(memory_format=torch.channels_last)

    def bind(images: Tensor) -> Forward:
        images = images.contiguous(memory_format=torch.channels_last)
        return torch.inference_mode()(lambda: model(images))

    return bind


def _onnx_engine(path: Path) -> Callable[[Tensor], Forward]:
    session = onnx_session(path)
    return lambda images: lambda: session.run(None, {"images": images.numpy()})


def _dense_onnx_engine(
    dense: nn.Module, example: Tensor
) -> Callable[[Tensor], Forward]:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "dense.onnx"
        export_onnx(dense, example, path)
        return _onnx_engine(path)


def _alternate(dense: Forward, pruned: Forward, seconds: float) -> tuple[float, float]:
    """Median milliseconds of both within `seconds`, a fifth of which is warm-up."""
    _pairs(dense, pruned, seconds / 5)
    dense_ms, pruned_ms = zip(*_pairs(dense, pruned, seconds * 4 / 5), strict=True)
    return median(dense_ms), median(pruned_ms)


def _pairs(
    dense: Forward, pruned: Forward, seconds: float
) -> list[tuple[float, float]]:
    pairs, deadline = [], time.perf_counter() + seconds
    while not pairs or time.perf_counter() < deadline:
        pairs.append((_milliseconds(dense), _milliseconds(pruned)))
    return pairs


def _milliseconds(forward: Forward) -> float:
    started = time.perf_counter()
    forward()
    return (time.perf_counter() - started) * 1000
