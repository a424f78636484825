"""Latency rows: what is in them, and that both networks are measured in turns."""

import pytest
import torch
from torch import nn

from autoprune.deploy.export import export_onnx
from autoprune.deploy.latency import Latency, measure_latency

EXAMPLE = torch.zeros(1, 3, 8, 8)


class Logging(nn.Module):
    """Notes its name and the batch size at every call."""

    def __init__(self, name: str, log: list):
        super().__init__()
        self.name = name
        self.log = log

    def __deepcopy__(self, memo) -> "Logging":
        return Logging(self.name, self.log).train(self.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.log.append(
            (self.name, len(x), self.training, torch.is_inference_mode_enabled())
        )
        return x


def measured(log: list) -> list:
    """A log without the passes at its beginning that find out what the inputs are."""
    while len(log) > 1 and log[1][0] == "dense":
        log.pop(0)
    return log


def network(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3),
        nn.ReLU(),
        nn.Conv2d(width, 4, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def test_every_engine_and_batch_size_has_a_row(tmp_path):
    pruned = network(8)
    export_onnx(pruned, EXAMPLE, tmp_path / "pruned.onnx")
    rows = measure_latency(
        network(256), pruned, EXAMPLE, tmp_path / "pruned.onnx", (1, 16), seconds=0.8
    )
    assert [(row.engine, row.batch) for row in rows] == [
        (e, b) for e in ("torch", "onnxruntime") for b in (1, 16)
    ]
    assert all(row.threads == torch.get_num_threads() for row in rows)
    assert all(row.dense_ms > 0 and row.pruned_ms > 0 for row in rows)
    assert all(row.speedup > 1 for row in rows if row.batch == 16)


def test_speedup_is_dense_over_pruned():
    assert Latency("torch", 1, 2, dense_ms=6.0, pruned_ms=4.0).speedup == 1.5


def test_dense_and_pruned_take_turns_in_evaluation_mode():
    log = []
    dense, pruned = Logging("dense", log), Logging("pruned", log)
    rows = measure_latency(dense, pruned, EXAMPLE, batch_sizes=(1, 3), seconds=0.05)
    assert [row.engine for row in rows] == ["torch", "torch"]
    log = measured(log)
    assert [name for name, *_ in log] == ["dense", "pruned"] * (len(log) // 2)
    assert {batch for _, batch, *_ in log} == {1, 3}
    assert not any(training for *_, training, _ in log)
    assert all(inference for *_, inference in log)
    assert dense.training
    assert pruned.training


@pytest.mark.parametrize("seconds", [0.0, 0.3])
def test_the_time_is_bounded(seconds):
    log = []
    measure_latency(
        Logging("dense", log),
        Logging("pruned", log),
        EXAMPLE,
        batch_sizes=(1,),
        seconds=seconds,
    )
    log = measured(log)
    assert len(log) == 4 if seconds == 0 else len(log) > 4
