"""Where a run's numbers come from: its command, versions and hardware."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "gymnasium",
    "stable-baselines3",
    "onnx",
    "onnxruntime",
)
"""Packages whose versions a run's config holds."""


def provenance() -> dict[str, Any]:
    """Command, versions and hardware, for the config of a run."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "command": " ".join(sys.argv),
        "versions": versions,
        "hardware": {
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "system": platform.platform(),
        },
    }
