"""Milliseconds of a forward pass, of the dense and of the pruned network."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from autoprune.latency.engine_protocol import Setting
from autoprune.latency.engines import engine_named
from autoprune.latency.timing import time_in_turns
from autoprune.structure.inputs import Example

BATCHES = (1, 32)
"""Batches that are reported beside the one that was asked for."""
ENGINES_BESIDE = ("onnxruntime", "torch")
"""Engines that are reported beside the one that was asked for."""


@dataclass(frozen=True)
class Latency:
    """Median latency of both networks in one setting.

    Attributes:
        setting: Engine, batch, threads and precision.
        dense_ms: Milliseconds of a pass of the dense network.
        pruned_ms: Milliseconds of a pass of the pruned network.
    """

    setting: Setting
    dense_ms: float
    pruned_ms: float

    @property
    def speedup(self) -> float:
        """How many times faster the pruned network is."""
        return self.dense_ms / self.pruned_ms

    def to_json(self) -> dict[str, Any]:
        """One flat row: the setting's fields, then both times."""
        times = {"dense_ms": self.dense_ms, "pruned_ms": self.pruned_ms}
        return asdict(self.setting) | times


def reported_settings(asked: Setting, has_batch: bool = True) -> list[Setting]:
    """What a run measures: what was asked for, and what it may be compared with.

    Args:
        asked: Its precision counts for its engine alone.
        has_batch: Whether the network takes batches of any length.

    Returns:
        The asked setting's engine first; of each engine the smallest batch first.
    """
    batches = sorted({asked.batch, *BATCHES}) if has_batch else [1]
    engines = [(asked.engine, asked.precision)]
    for name in ENGINES_BESIDE:
        if (name, "float32") not in engines:
            engines.append((name, "float32"))
    settings = []
    for engine, precision in engines:
        for batch in batches:
            settings.append(Setting(engine, batch, asked.threads, precision))
    return settings


def measure_latency(
    dense: nn.Module,
    pruned: nn.Module,
    example: Example,
    settings: Sequence[Setting],
    seconds: float = 1.5,
) -> list[Latency]:
    """Both networks' latency on random inputs, in evaluation mode, taken in turns.

    Args:
        dense: The network before pruning; it is left as found.
        pruned: The network after pruning; it is left as found.
        example: One input, `(1, 3, height, width)` for instance; or several, as `trace`
            takes them.
        settings: Engine, batch, threads and precision of each measurement.
        seconds: Time for the passes of each of them, see `time_in_turns`.

    Returns:
        One row for each setting.

    Raises:
        ExportError: If an engine can't express one of the networks.
        UserError: If it can't run it, or gives other answers.
    """
    rows = []
    for setting in settings:
        engine = engine_named(setting.engine)
        loaded = [engine.load(model, example, setting) for model in (dense, pruned)]
        dense_seconds, pruned_seconds = time_in_turns(loaded, seconds).medians.tolist()
        rows.append(Latency(setting, 1000 * dense_seconds, 1000 * pruned_seconds))
    return rows
