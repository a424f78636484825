"""Structured pruning of PyTorch vision networks; an agent finds how much to cut where.

The names below are imported on first use, so that `import autoprune` stays light.
"""

import importlib

_HOMES = {
    "Allocation": "costs.allocation",
    "Budget": "costs.budget",
    "CostTable": "costs.cost",
    "Evaluation": "evaluation.evaluate",
    "Groups": "structure.groups",
    "ProxyAccuracy": "evaluation.proxy",
    "UserError": "errors",
    "export_onnx": "deploy.export",
    "importance": "evaluation.importance",
    "load_pruned": "deploy.export",
    "mask": "tracing.masking",
    "prune": "structure.slicing",
    "save_pruned": "deploy.export",
    "top_channels": "structure.slicing",
    "trace": "tracing.trace",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'autoprune' has no attribute {name!r}")
    return getattr(importlib.import_module(f"autoprune.{_HOMES[name]}"), name)
