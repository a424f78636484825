"""Structured pruning of PyTorch vision networks; an agent finds how much to cut where.

The names below are imported on first use, so that `import autoprune` stays light.
"""

import importlib

_HOMES = {
    "Allocation": "allocation",
    "Budget": "allocation",
    "CostTable": "cost",
    "Evaluation": "scoring",
    "Groups": "groups",
    "ProxyAccuracy": "proxy",
    "UserError": "errors",
    "export_onnx": "export",
    "importance": "criteria",
    "load_pruned": "export",
    "mask": "masking",
    "prune": "pruning",
    "save_pruned": "export",
    "top_channels": "pruning",
    "trace": "tracing",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'autoprune' has no attribute {name!r}")
    return getattr(importlib.import_module(f"autoprune.{_HOMES[name]}"), name)
