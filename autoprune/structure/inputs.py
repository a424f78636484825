"""What a network is called with: one tensor, or several by position and by name."""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from autoprune.errors import UserError
from autoprune.structure.groups import tensors_in

Example: TypeAlias = Tensor | tuple[Any, ...] | list[Any] | dict[str, Any]
"""One tensor; a tuple or list of positional inputs; or a dict of inputs by keyword.

Each of them may be a tensor, a list, tuple, dict or dataclass of inputs, or any other
value.
"""


@dataclass(frozen=True)
class Inputs:
    """The arguments of one forward pass.

    Attributes:
        positional: Those by position.
        keywords: Those by name.
    """

    positional: tuple[Any, ...] = ()
    keywords: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_example(cls, example: Example) -> "Inputs":
        """The inputs that a caller has given as an example.

        Args:
            example: See `Example`.

        Raises:
            UserError: If it is something else, or holds no tensor.
        """
        if isinstance(example, Tensor):
            return cls((example,))
        if not isinstance(example, tuple | list | dict):
            raise UserError(
                "example",
                f"must be a tensor, a tuple or list of inputs, or a dict of inputs by "
                f"keyword, got {type(example).__name__}",
            )
        if not tensors_in(example):
            raise UserError("example", f"holds no tensor, got {example!r:.80}")
        if isinstance(example, dict):
            return cls((), dict(example))
        return cls(tuple(example))

    def run(self, model: nn.Module) -> Any:
        """What a network returns for these inputs."""
        return model(*self.positional, **self.keywords)

    def tensors(self) -> list[Tensor]:
        """All tensors, in order."""
        return [*tensors_in(self.positional), *tensors_in(self.keywords)]

    def change(self, change: Callable[[Tensor], Tensor]) -> "Inputs":
        """The same inputs with each tensor exchanged for another one.

        Args:
            change: From a tensor to what stands in its place. A tensor that is given
                twice is changed once, so that it stays one.
        """
        changed: dict[int, Tensor] = {}

        def change_once(tensor: Tensor) -> Tensor:
            if id(tensor) not in changed:
                changed[id(tensor)] = change(tensor)
            return changed[id(tensor)]

        return Inputs(
            _change_tensors(self.positional, change_once),
            _change_tensors(self.keywords, change_once),
        )

    def in_float32(self) -> "Inputs":
        """Copies on the CPU that share no memory; floats in float32, integers stay."""

        def copy(tensor: Tensor) -> Tensor:
            tensor = tensor.detach().to("cpu")
            if tensor.is_floating_point():
                tensor = tensor.float()
            # The same layout whatever the caller's; the same values for all readers.
            return tensor.clone(memory_format=torch.contiguous_format)

        return self.change(copy)

    def first_sample(self) -> "Inputs":
        """The first sample of a batch.

        Tensors are a batch if all of them have equally long first axes. A list of
        tensors isn't cut, since it may hold a sample in each. Where any isn't cut, none
        is.
        """
        tensors = [tensor for tensor in self.tensors() if tensor.ndim]
        lengths = {len(tensor) for tensor in tensors}
        is_alone = len(tensors) == 1 and tensors[0].ndim < 2
        values = [*self.positional, *self.keywords.values()]
        if len(lengths) != 1 or is_alone or any(map(_is_list_of_tensors, values)):
            return self
        return self.change(lambda tensor: tensor[:1] if tensor.ndim else tensor)

    def check_fits(self, model: nn.Module) -> None:
        """Raises a `UserError` if a network's `forward` doesn't take such inputs.

        Args:
            model: The network.
        """
        try:
            signature = inspect.signature(model.forward)
        except ValueError:
            return  # written in C, which says nothing of its arguments
        try:
            signature.bind(*self.positional, **self.keywords)
        except TypeError as error:
            taken = ", ".join(signature.parameters)
            raise UserError(
                "example",
                f"doesn't fit {type(model).__name__}.forward({taken}): {error}; give a "
                f"tensor, a tuple of positional inputs or a dict of inputs by keyword",
            ) from error


def _is_list_of_tensors(value: object) -> bool:
    """Whether a value holds tensors in lists or tuples, in whatever depth."""
    if isinstance(value, dict):
        return any(map(_is_list_of_tensors, value.values()))
    return isinstance(value, list | tuple) and bool(tensors_in(value))


def _change_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A value of the same form whose tensors are exchanged."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _change_tensors(item, change) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        changed = copy.copy(value)
        for each in fields(value):
            item = _change_tensors(getattr(value, each.name), change)
            # Frozen ones as well.
            object.__setattr__(changed, each.name, item)
        return changed
    if not isinstance(value, list | tuple):
        return value
    items = [_change_tensors(item, change) for item in value]
    if hasattr(value, "_fields"):
        # A named tuple takes its items one by one.
        return type(value)(*items)
    return tuple(items) if isinstance(value, tuple) else items
