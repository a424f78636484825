"""What pruning changes in a network besides its tensors, as plain data.

A pruned network differs from the dense one in the shapes of its tensors, in numbers
that its modules keep (`out_channels`, the number of heads), and in the class of its
attention modules. With these as data, and the weights, it can be made again from the
dense network without a trace.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from autoprune.structure.wrappers import unwrap

UNCHANGED = frozenset(vars(nn.Module())) | {"training"}
"""What every module has; no size is kept in it."""
CLASS = "class"
ATTRIBUTES = "attributes"


def find_changes(dense: nn.Module, pruned: nn.Module) -> dict[str, dict[str, Any]]:
    """In which modules of a pruned network class or attributes differ.

    Args:
        dense: The network that it was made from.
        pruned: The pruned one; both are left as found.

    Returns:
        Module to its changes: under "class" the full name of its class if it is another
        one, under "attributes" those attributes that are numbers, text, or lists of
        these. A tuple is written as {"tuple": [...]}. Values for JSON.
    """
    originals = dict(unwrap(dense).named_modules())
    changes = {}
    for name, module in unwrap(pruned).named_modules():
        # What stands for a removed block has no original of its kind.
        original = originals.get(name)
        if original is None or isinstance(module, nn.Identity):
            continue
        change: dict[str, Any] = {}
        kind = type(module)
        if kind is not type(original):
            change[CLASS] = f"{kind.__module__}.{kind.__qualname__}"
        attributes = _changed_attributes(original, module)
        if attributes:
            change[ATTRIBUTES] = attributes
        if change:
            changes[name] = change
    return changes


def _changed_attributes(original: nn.Module, module: nn.Module) -> dict[str, Any]:
    """Attributes of plain values that differ, as values for JSON."""
    before = vars(original)
    changed = {}
    for name, value in vars(module).items():
        if name in UNCHANGED or not _is_plain(value):
            continue
        is_same = name in before and _is_plain(before[name]) and before[name] == value
        if not is_same:
            changed[name] = _to_json(value)
    return changed


def set_attributes(model: nn.Module, changes: Mapping[str, Mapping[str, Any]]) -> None:
    """Gives modules the attributes that they have in a pruned network.

    Args:
        model: The network, changed in place.
        changes: As from `find_changes`.
    """
    for name, change in changes.items():
        module = model.get_submodule(name)
        for attribute, value in change.get(ATTRIBUTES, {}).items():
            setattr(module, attribute, _from_json(value))


def _is_plain(value: object) -> bool:
    """Whether it is a number, text, None, or a list or tuple of such."""
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _to_json(value: Any) -> Any:
    """A plain value, tuples marked, since code may compare them."""
    if isinstance(value, list):
        return [_to_json(item) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [_to_json(item) for item in value]}
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    if isinstance(value, dict):
        return tuple(_from_json(item) for item in value["tuple"])
    return value
