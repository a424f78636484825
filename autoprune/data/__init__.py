"""Images and their splits; networks by name and their weights.

The names below are imported on first use, so that a module of this room costs no more
than itself.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # What `_HOMES` says at run time, for editors and type checkers.
    from autoprune.data.checkpoints import load_weights, read_state_dict
    from autoprune.data.datasets import (
        Images,
        Splits,
        batches,
        carve,
        load,
        normalize,
    )
    from autoprune.data.models import build, model_names
    from autoprune.data.preprocessing import Preprocessing

__all__ = [
    "Images",
    "Preprocessing",
    "Splits",
    "batches",
    "build",
    "carve",
    "load",
    "load_weights",
    "model_names",
    "normalize",
    "read_state_dict",
]
_HOMES = {
    "Images": "datasets",
    "Preprocessing": "preprocessing",
    "Splits": "datasets",
    "batches": "datasets",
    "build": "models",
    "carve": "datasets",
    "load": "datasets",
    "load_weights": "checkpoints",
    "model_names": "models",
    "normalize": "datasets",
    "read_state_dict": "checkpoints",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'autoprune.data' has no attribute {name!r}")
    return getattr(importlib.import_module(f"autoprune.data.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
