"""The engines by name, and what can be refused of a setting before anything is run.

A further one, on a GPU for instance, is a class with what `Engine` asks for and an
entry in `ENGINES`.
"""

import os

import torch

from autoprune.config import LatencyConfig
from autoprune.errors import UserError
from autoprune.latency.engine_protocol import (
    Engine,
    Kernel,
    Loaded,
    Setting,
    check_answers,
)
from autoprune.latency.onnx_runtime import OnnxRuntime
from autoprune.latency.openvino import OpenVino
from autoprune.latency.pytorch import Compiled, Eager
from autoprune.names import ENGINES as NAMES

__all__ = [
    "ENGINES",
    "Engine",
    "Kernel",
    "Loaded",
    "Setting",
    "check_answers",
    "check_setting",
    "engine_named",
    "setting_of",
]

ENGINES: dict[str, Engine] = {
    "onnxruntime": OnnxRuntime(),
    "torch": Eager(),
    "compiled": Compiled(),
    "openvino": OpenVino(),
}
"""Name to engine, the default first."""


def engine_named(name: str) -> Engine:
    """The engine of a name.

    Args:
        name: One of `ENGINES`.

    Raises:
        UserError: If there is none; the nearest name is offered.
    """
    NAMES.check(name, "latency.engine")
    return ENGINES[name]


def setting_of(config: LatencyConfig) -> Setting:
    """The setting that options stand for.

    Args:
        config: The options.

    Returns:
        The setting, with as many threads as PyTorch uses where none were asked for.
    """
    threads = config.threads or torch.get_num_threads()
    return Setting(config.engine, config.batch, threads, config.precision)


def check_setting(setting: Setting) -> None:
    """Refuses what can't be measured on this machine, whatever the network.

    Args:
        setting: As asked for.

    Raises:
        UserError: If the engine is unknown or isn't installed, doesn't compute in the
            precision, or threads or batch are out of range.
    """
    engine = engine_named(setting.engine)
    # Asked for its refusal.
    engine.version()
    if setting.precision not in engine.precisions:
        raise UserError(
            "latency.precision",
            f"{setting.engine} computes in {' or '.join(engine.precisions)} on this "
            f"machine, got {setting.precision!r}",
        )
    n_cores = os.cpu_count() or 1
    if not 1 <= setting.threads <= n_cores:
        raise UserError(
            "latency.threads",
            f"must be from 1 to {n_cores}, the cores of this machine, or 0 for as many "
            f"as PyTorch uses; got {setting.threads}",
        )
    if setting.batch < 1:
        raise UserError("latency.batch", f"must be at least 1, got {setting.batch}")
