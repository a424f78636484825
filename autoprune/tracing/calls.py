"""One executed operation, as rules see it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor
from torch._ops import OpOverload

from autoprune.errors import UserError

if TYPE_CHECKING:
    from autoprune.tracing.tracer import Tracer


def argument(
    func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], name: str
) -> Any:
    """One argument of an operation, or its default.

    Args:
        func: The ATen overload.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        name: As in the operation's schema; a `KeyError` if that has none of the name.
    """
    for position, declared in enumerate(func._schema.arguments):
        if declared.name != name:
            continue
        # Code may pass an argument by name, by position or not at all.
        if name in kwargs:
            return kwargs[name]
        if position < len(args):
            return args[position]
        return declared.default_value
    raise KeyError(name)


@dataclass(frozen=True)
class Call:
    """One executed operation: what went in, what came out.

    Attributes:
        tracer: The notebook of the running trace.
        func: The ATen overload.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        out: What it returned; None while it is yet to be executed.
    """

    tracer: "Tracer"
    func: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any

    def __getitem__(self, name: str) -> Any:
        """An argument by its name in the operation's schema, or its default."""
        return argument(self.func, self.args, self.kwargs, name)

    def refuse(self) -> NoReturn:
        """Raises a `UserError`: the operation reads an activation's values."""
        raise UserError(
            "model",
            f"its forward pass depends on the values of activations "
            f"({self.tracer.locate(self.func)}), so one "
            "pass can't show what belongs together; trace a network without "
            "data-dependent control flow",
        )

    def tensors(self) -> Iterator[Tensor]:
        """The tensor arguments, lists flattened."""
        for argument in [*self.args, *self.kwargs.values()]:
            # `cat` and indexing take lists.
            items = argument if isinstance(argument, list | tuple) else [argument]
            for item in items:
                if isinstance(item, Tensor):
                    yield item

    def substitute_tensors(self, substitute: Callable[[Tensor], Tensor]) -> list[Any]:
        """The positional arguments with every tensor exchanged for another."""

        def exchange(item: Any) -> Any:
            return substitute(item) if isinstance(item, Tensor) else item

        arguments: list[Any] = []
        for argument in self.args:
            if isinstance(argument, list | tuple):
                arguments.append([exchange(item) for item in argument])
            else:
                arguments.append(exchange(argument))
        return arguments
