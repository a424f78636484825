"""Images and their splits; networks by name and their weights.

The names below are imported on first use, so that a module of this room costs no more
than itself.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # What `_HOMES` says at run time, for editors and type checkers.
    from autoprune.data.checkpoints import load_weights, read_state_dict
    from autoprune.data.datasets import load
    from autoprune.data.images import Images, Splits, batches, normalize
    from autoprune.data.models import build, model_names
    from autoprune.data.preprocessing import Preprocessing
    from autoprune.data.preprocessing_sources import preprocessing_of
    from autoprune.data.splitting import carve

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
    "preprocessing_of",
    "read_state_dict",
]
_HOMES = {
    "Images": "images",
    "Preprocessing": "preprocessing",
    "Splits": "images",
    "batches": "images",
    "build": "models",
    "carve": "splitting",
    "load": "datasets",
    "load_weights": "checkpoints",
    "model_names": "models",
    "normalize": "images",
    "preprocessing_of": "preprocessing_sources",
    "read_state_dict": "checkpoints",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'autoprune.data' has no attribute {name!r}")
    return getattr(importlib.import_module(f"autoprune.data.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
