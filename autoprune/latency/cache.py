"""Latency models that were fitted before, by network, engine and machine."""

import hashlib
import json
import os
from dataclasses import astuple
from pathlib import Path

from autoprune.costs.search_space import SearchSpace
from autoprune.data.datasets import cache_folder
from autoprune.errors import UserError
from autoprune.files import write_json
from autoprune.latency.engine_protocol import Engine, Setting
from autoprune.latency.kernels import WorkTable
from autoprune.latency.model import LatencyModel
from autoprune.latency.processor import processor_name
from autoprune.structure.groups import Groups

FORMAT = 2
"""Of what is stored; another one is another file."""


class ModelCache:
    """The stored model of one network under one setting, on this machine.

    Args:
        groups: The network's trace.
        space: The allocations that are measured.
        engine: What runs the networks.
        setting: Batch, threads and precision.
    """

    def __init__(
        self, groups: Groups, space: SearchSpace, engine: Engine, setting: Setting
    ) -> None:
        layers = []
        for layer in groups.layers:
            layers.append([layer.tensor, layer.kind, layer.positions, layer.stride])
        levels = [list(map(int, group)) for group in space.levels]
        # All that a time depends on, and which networks were measured.
        known = [
            FORMAT,
            groups.fingerprint,
            {name: list(shape) for name, shape in groups.shapes.items()},
            layers,
            levels,
            engine.version(),
            astuple(setting),
            processor_name(),
            os.cpu_count(),
        ]
        key = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]
        self.path: Path = cache_folder() / "latency" / f"{key}.json"

    def read(self, work: WorkTable) -> LatencyModel | None:
        """The stored model, or None where there is none that can be read.

        Args:
            work: What the network's layers have to do.
        """
        try:
            return LatencyModel.from_json(json.loads(self.path.read_text()), work)
        # Missing or damaged: it is measured again, and written over.
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, model: LatencyModel) -> None:
        """Stores a model; whoever can't write there measures again next time.

        Args:
            model: The fitted model.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, model.to_json())
        except (OSError, UserError):
            pass  # a home that can't be written to costs time alone
