"""Structured pruning of PyTorch vision networks; an agent finds how much to cut where.

The names below are imported on first use, so that `import autoprune` stays light.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # What `_HOMES` says at run time, for editors and type checkers.
    from autoprune.costs.allocation import Allocation
    from autoprune.costs.budget import Budget
    from autoprune.costs.cost import CostTable
    from autoprune.deploy.export import export_onnx
    from autoprune.deploy.pruned import load_pruned, save_pruned
    from autoprune.errors import UserError
    from autoprune.evaluation.evaluate import Evaluation
    from autoprune.evaluation.importance import importance
    from autoprune.evaluation.proxy import ProxyAccuracy
    from autoprune.structure.groups import Groups
    from autoprune.structure.slicing import prune, top_channels
    from autoprune.tracing.masking import mask
    from autoprune.tracing.trace import trace

__version__ = "0.2.0"
__all__ = [
    "Allocation",
    "Budget",
    "CostTable",
    "Evaluation",
    "Groups",
    "ProxyAccuracy",
    "UserError",
    "export_onnx",
    "importance",
    "load_pruned",
    "mask",
    "prune",
    "save_pruned",
    "top_channels",
    "trace",
]
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
    "load_pruned": "deploy.pruned",
    "mask": "tracing.masking",
    "prune": "structure.slicing",
    "save_pruned": "deploy.pruned",
    "top_channels": "structure.slicing",
    "trace": "tracing.trace",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'autoprune' has no attribute {name!r}")
    return getattr(importlib.import_module(f"autoprune.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
