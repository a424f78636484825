"""The settings of learning agents: those in their files, with what a user changes.

Imports no torch, so that a wrong name or value is refused before a search begins.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from autoprune.errors import UserError, check_known

FOLDER = Path(__file__).parent / "hyperparameters"
"""A file an agent."""
AT_MOST = {"gamma": 1.0, "gae_lambda": 1.0, "tau": 1.0, "last_exploration_std": 2.0}
"""Largest value of those that have one."""
ENTROPY = re.compile(r"auto(_\d+(\.\d+)?)?")
"""How SAC and TQC may be told to tune their entropy coefficient themselves."""


def hyperparameters(
    agent: str, changes: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The settings of an agent.

    `from_a_policy` among them says what differs for a learner that starts from one.

    Args:
        agent: Its name; there is `agents/hyperparameters/NAME.yaml`.
        changes: Settings to values that count instead of the file's, nested as there;
            checked before.
    """
    settings = yaml.safe_load((FOLDER / f"{agent}.yaml").read_text(encoding="utf-8"))
    changes = changes or {}
    merged = _merged(settings, changes)
    # The rate that was asked for is meant for every start.
    differences = merged.get("from_a_policy", {})
    if "learning_rate" in changes and "learning_rate" in differences:
        own = changes.get("from_a_policy", {})
        rate = own.get("learning_rate", changes["learning_rate"])
        merged["from_a_policy"] = differences | {"learning_rate": rate}
    return merged


def _merged(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with changes, group by group."""
    merged = dict(settings)
    for name, value in changes.items():
        if isinstance(value, Mapping):
            value = _merged(settings[name], value)
        merged[name] = value
    return merged


def check_hyperparameters(
    agent: str, changes: Mapping[str, Any], starts_from_policy: bool = False
) -> None:
    """Checks what a user changes of an agent's settings.

    Args:
        agent: Its name.
        changes: As for `hyperparameters`.
        starts_from_policy: Whether it goes on from a policy, whose network it takes
            over.

    Raises:
        UserError: If the agent has no such setting, the nearest is offered; or a value
            isn't of the kind, or out of the range.
    """
    if not changes:
        return
    if not (FOLDER / f"{agent}.yaml").is_file():
        known = ", ".join(sorted(path.stem for path in FOLDER.glob("*.yaml")))
        raise UserError(
            "hyperparameters", f"{agent} has none; those that have some: {known}"
        )
    settings = _flat(hyperparameters(agent))
    for name, value in _flat(changes).items():
        check_known("hyperparameter", name, settings, "hyperparameters")
        _check_value(name, value, settings[name])
    # Dyna lets a policy act, and builds its own network all the same.
    if starts_from_policy and agent != "dyna" and "policy_kwargs" in changes:
        raise UserError(
            "hyperparameters",
            "policy_kwargs are those of the policy that the agent starts from; leave "
            "them or --policy out",
        )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their full names, such as "policy_kwargs.net_arch"."""
    flat = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _check_value(name: str, value: Any, usual: Any) -> None:
    """Checks a value by the one that it replaces."""
    expected = _expectation(name.rpartition(".")[2], value, usual)
    if expected:
        raise UserError(
            "hyperparameters",
            f"{name} must be {expected}, got {value!r}; usual: {usual}",
        )


def _expectation(name: str, value: Any, usual: Any) -> str:
    """What a value has to be; empty if it is that."""
    if isinstance(usual, bool):
        return "" if isinstance(value, bool) else "true or false"
    if isinstance(usual, list):
        is_fit = isinstance(value, list) and value and all(map(_is_count, value))
        return "" if is_fit else "a list of counts of at least 1"
    if isinstance(usual, int):
        # Some counts may be 0, those that are by default.
        least = min(1, usual)
        is_fit = isinstance(value, int) and not isinstance(value, bool)
        return "" if is_fit and value >= least else f"a count of at least {least}"
    if isinstance(usual, str) and isinstance(value, str):
        return "" if ENTROPY.fullmatch(value) else "a number, auto or auto_0.1"
    high = AT_MOST.get(name, math.inf)
    # What may be negative is so by default.
    low = -math.inf if isinstance(usual, float) and usual < 0 else 0.0
    if _is_number(value) and low <= value <= high:
        return ""
    if low < 0:
        return "a number"
    return "a number from 0" if high == math.inf else f"a number from 0 to {high:g}"


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)
