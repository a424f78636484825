"""How long things are after pruning, the sizes that a module's code reads among them.

An attention written by hand says in `num_heads` into how many heads its channels are
split. Tracing sees which axis such an attribute became the length of; from what is left
on that axis follows what the attribute has to be.
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from torch import nn


@dataclass(frozen=True)
class Extent:
    """How many elements of something there are, and with which prunable groups they go.

    Attributes:
        fixed: Elements that no group removes.
        elements: Group to the elements that its channels hold in the dense network, all
            of them together; a pair of groups (rows and columns of cells, such as
            attention's heads and their width) to those of all its cells.
    """

    fixed: int
    elements: dict[tuple[str, ...], int]

    @property
    def dense(self) -> int:
        """All elements of the dense network."""
        return self.fixed + sum(self.elements.values())


@dataclass(frozen=True)
class Formula:
    """A size as it follows from what the groups keep.

    Attributes:
        operation: "add", "sub", "mul" or "floordiv".
        left: The first operand.
        right: The second one.
    """

    operation: str
    left: "Length"
    right: "Length"


Length: TypeAlias = Formula | Extent | int
"""How long something is: computed, what is left of an axis, or a number."""

OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
}
"""The arithmetic with which code computes sizes from sizes; arrays of sizes too."""


def evaluate_length(
    length: Length, dense: Mapping[str, int], kept: Mapping[str, int]
) -> int:
    """How long something is when the groups keep some of their channels.

    Args:
        length: What is asked for.
        dense: Group to its channels in the dense network.
        kept: Group to what it keeps; those left out keep all.
    """
    if isinstance(length, int):
        return length
    if isinstance(length, Formula):
        left = evaluate_length(length.left, dense, kept)
        right = evaluate_length(length.right, dense, kept)
        return OPERATIONS[length.operation](left, right)
    total = length.fixed
    for names, elements in length.elements.items():
        # A pair of groups has a cell for each channel of one with each of the other.
        for name in names:
            elements = elements * kept.get(name, dense[name]) // dense[name]
        total += elements
    return total


class AttributePlace(NamedTuple):
    """Where a module keeps a size for its code.

    Attributes:
        module: Name of the module in the network; empty for the network itself.
        name: The attribute.
        position: Where in a tuple or list it is; None for a plain number.
    """

    module: str
    name: str
    position: int | None

    def write(self, model: nn.Module, value: int) -> None:
        """Gives the attribute a value.

        Args:
            model: The network that has the module.
            value: The size.
        """
        module = model.get_submodule(self.module)
        if self.position is None:
            setattr(module, self.name, value)
            return
        current: Any = getattr(module, self.name)
        items = list(current)
        items[self.position] = value
        # Another object, since modules may share a list.
        setattr(module, self.name, type(current)(items))
