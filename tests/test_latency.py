"""Latency rows: what is in them, and that both networks are measured in turns."""

import pytest
import torch
from fake_engine import FakeEngine
from torch import nn

from autoprune.errors import UserError
from autoprune.latency import engines
from autoprune.latency.engine_protocol import Setting
from autoprune.latency.measuring import (
    Latency,
    measure_latency,
    reported_settings,
)

EXAMPLE = torch.zeros(1, 3, 8, 8)
FAKE = Setting("fake", 1, 1, "float32")


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


def network(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3),
        nn.ReLU(),
        nn.Conv2d(width, 4, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


@pytest.fixture
def fake(monkeypatch) -> FakeEngine:
    engine = FakeEngine()
    monkeypatch.setitem(engines.ENGINES, "fake", engine)
    return engine


def test_a_row_holds_the_exact_times_of_both_networks_in_each_setting(fake):
    settings = [FAKE, Setting("fake", 16, 2, "bfloat16")]
    rows = measure_latency(network(64), network(16), EXAMPLE, settings, seconds=0.01)
    assert [row.setting for row in rows] == settings
    assert fake.loads == [setting for setting in settings for _ in range(2)]
    for row in rows:
        exact = [
            1000 * fake.load(network(width), EXAMPLE, row.setting).exact_seconds
            for width in (64, 16)
        ]
        assert [row.dense_ms, row.pruned_ms] == pytest.approx(exact)
        assert row.speedup == pytest.approx(exact[0] / exact[1])
    assert rows[1].to_json() == {
        "engine": "fake",
        "batch": 16,
        "threads": 2,
        "precision": "bfloat16",
        "dense_ms": rows[1].dense_ms,
        "pruned_ms": rows[1].pruned_ms,
    }


def test_speedup_is_dense_over_pruned():
    assert Latency(FAKE, dense_ms=6.0, pruned_ms=4.0).speedup == 1.5


def test_dense_and_pruned_take_turns_in_evaluation_mode():
    log = []
    dense, pruned = Logging("dense", log), Logging("pruned", log)
    settings = [Setting("torch", batch, 1, "float32") for batch in (1, 3)]
    rows = measure_latency(dense, pruned, EXAMPLE, settings, seconds=0.0)
    assert [row.setting for row in rows] == settings
    # Others find out what the inputs are, and what PyTorch answers.
    passes = [(name, batch) for name, batch, _, inference in log if inference]
    for batch in (1, 3):
        # One whose answer is looked at, one that warms up, and one that counts.
        of_batch = [name for name, length in passes if length == batch]
        assert of_batch == ["dense", "pruned"] * 3
    assert not any(training for *_, training, _ in log)
    assert dense.training
    assert pruned.training


def test_what_was_asked_for_is_reported_first_beside_what_it_is_compared_with():
    asked = Setting("openvino", 8, 1, "bfloat16")
    settings = reported_settings(asked)
    assert asked in settings
    places = [(s.engine, s.precision, s.batch) for s in settings]
    assert places == [
        (engine, precision, batch)
        for engine, precision in (
            ("openvino", "bfloat16"),
            ("onnxruntime", "float32"),
            ("torch", "float32"),
        )
        for batch in (1, 8, 32)
    ]
    assert {s.threads for s in settings} == {1}


def test_nothing_is_reported_twice_nor_in_batches_that_a_network_does_not_take():
    asked = Setting("torch", 1, 2, "float32")
    assert len(set(reported_settings(asked))) == len(reported_settings(asked)) == 4
    assert [s.batch for s in reported_settings(asked, has_batch=False)] == [1, 1]


def test_an_engine_that_answers_otherwise_has_no_rows(fake):
    fake.error = 0.5
    with pytest.raises(UserError, match="fake answers otherwise"):
        measure_latency(network(8), network(4), EXAMPLE, [FAKE])
