"""Sizes that remember where they come from.

Code that is written by hand computes the shapes that it asks for: `B, N, C = x.shape`,
then `x.reshape(B, N, 3, self.num_heads, C // self.num_heads)`. While a network is
traced, shapes and the integer attributes of its modules are `Size`s: integers that
carry the axis or the attribute that they were read from through arithmetic. What they
become the length of is a `Demand`; `autoprune.tracing.size_solver` sees to it that the
demands still hold when channels go.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autoprune.structure.attention import OpenAttention, is_instance_of
from autoprune.structure.attribute_setters import ATTRIBUTE_SETTERS
from autoprune.structure.labels import thin, varying_axes
from autoprune.structure.lengths import OPERATIONS, AttributePlace
from autoprune.tracing.tracer import Tracer


@dataclass(frozen=True, eq=False)
class AxisSize:
    """The length of an activation's axis.

    Attributes:
        labels: The activation's labels, of length 1 where they don't vary.
        axis: Which axis.
        dense: Its length in the dense network.
    """

    labels: Tensor
    axis: int
    dense: int

    @cached_property
    def has_channels(self) -> bool:
        """Whether channels lie on the axis; else its length is the same for ever."""
        return self.axis in varying_axes(self.labels)


@dataclass(frozen=True, eq=False)
class ComputedSize:
    """What arithmetic makes of sizes.

    Attributes:
        operation: "add", "sub", "mul" or "floordiv".
        left: The first operand.
        right: The second one.
        dense: The two operands in the dense network.
    """

    operation: str
    left: "Source"
    right: "Source"
    dense: tuple[int, int] = (0, 0)


Source: TypeAlias = AxisSize | AttributePlace | ComputedSize | int
"""Where a size comes from; an int is a number that the code writes."""


@dataclass(frozen=True, eq=False)
class Demand:
    """Something that has to be as long as the code says.

    Attributes:
        source: What the code says.
        length: The axis that has this length, or what the code compares it with.
        n_parts: By what the length of the axis is divided, where the code says how many
            groups of channels there are.
    """

    source: Source
    length: Source
    n_parts: int = 1


class Size(int):
    """An integer that remembers where it comes from.

    In a masked run it also knows what it is in the pruned network; as a float, in a
    scale for instance, that is what it is worth.
    """

    source: Source
    sizes: "SizeMode"

    @classmethod
    def of(cls, value: int, source: Source, sizes: "SizeMode") -> "Size":
        """Makes one.

        Args:
            value: In the network that runs.
            source: Where it comes from.
            sizes: The run to which it belongs.
        """
        size = cls(value)
        size.source = source
        size.sizes = sizes
        return size

    @property
    def kept(self) -> int:
        """What it is in the pruned network; while tracing, in the dense one."""
        return self.sizes.kept_length(self.source, int(self))

    def _compute(self, operation: str, other: object, is_swapped: bool = False) -> Any:
        """An arithmetic operation with another integer."""
        if not isinstance(other, int):
            return NotImplemented
        mine: Source = self.source
        theirs: Source = source_of(other, self.sizes)
        left, right = (theirs, mine) if is_swapped else (mine, theirs)
        values = (int(other), int(self)) if is_swapped else (int(self), int(other))
        value = OPERATIONS[operation](*values)
        return Size.of(value, ComputedSize(operation, left, right, values), self.sizes)

    def __add__(self, other: int) -> Any:
        return self._compute("add", other)

    def __radd__(self, other: int) -> Any:
        return self._compute("add", other, is_swapped=True)

    def __sub__(self, other: int) -> Any:
        return self._compute("sub", other)

    def __rsub__(self, other: int) -> Any:
        return self._compute("sub", other, is_swapped=True)

    def __mul__(self, other: int) -> Any:
        return self._compute("mul", other)

    def __rmul__(self, other: int) -> Any:
        # A list that is repeated so many times comes here too.
        return self._compute("mul", other, is_swapped=True)

    def __floordiv__(self, other: int) -> Any:
        return self._compute("floordiv", other)

    def __rfloordiv__(self, other: int) -> Any:
        return self._compute("floordiv", other, is_swapped=True)

    def __mod__(self, other: int) -> Any:
        if not isinstance(other, int):
            return NotImplemented
        return self - self // other * other

    def __neg__(self) -> Any:
        # Rounding up is often written as `-(-n // 4)`.
        return 0 - self

    def __float__(self) -> float:
        return float(self.kept)

    def __truediv__(self, other: float) -> float:
        return float(self) / float(other)

    def __rtruediv__(self, other: float) -> float:
        return float(other) / float(self)

    def __pow__(self, other: float) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        # Scales are powers, `width**-0.5`; sizes hardly are.
        return self.kept**other

    def __eq__(self, other: object) -> bool:
        is_equal = int.__eq__(self, other)
        if is_equal is True and isinstance(other, int):
            self.sizes.compare(self, other)
        return is_equal

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return int.__hash__(self)

    def __reduce__(self) -> Any:
        # What code keeps of a run, in an attribute for instance, is a plain number.
        return int, (int(self),)

    def __deepcopy__(self, memo: dict[int, Any]) -> int:
        return int(self)


def source_of(value: int, sizes: "SizeMode") -> Source:
    """Where an integer comes from; of a plain one, or of another run, the number.

    Args:
        value: Any integer.
        sizes: The run.
    """
    if isinstance(value, Size) and value.sizes is sizes:
        return value.source
    return int(value)


SHAPES = (
    Tensor.shape.__get__,  # pyright: ignore[reportAttributeAccessIssue]
    Tensor.size,
)
"""What reads the shape of a tensor."""


class SizeMode(TorchFunctionMode):
    """Hands out sizes while a network runs, and notes what they become the length of.

    PyTorch calls `__torch_function__` for each function of its Python interface, above
    autograd and above the operations whose labels `LabelDispatchMode` moves.

    Args:
        tracer: The notebook of the run.

    Attributes:
        demands: In the order of the forward pass.
        kept_true: Names of the modules whose attributes follow their tensors by
            themselves.
    """

    def __init__(self, tracer: Tracer):
        super().__init__()
        self.tracer = tracer
        self.demands: list[Demand] = []
        self.kept_true: set[str] = set()

    def kept_length(self, source: Source, dense: int) -> int:
        """What a size is in the pruned network.

        Args:
            source: Where it comes from.
            dense: What it is in the network that runs.
        """
        return dense

    def demand(self, size: int, length: Source, n_parts: int = 1) -> None:
        """Notes that something has to be as long as the code says.

        Args:
            size: What the code says.
            length: What has to be as long.
            n_parts: By what the length is divided.
        """
        source = source_of(size, self)
        # A number that the code writes can't follow; the proof finds whether it has to.
        is_fixed = isinstance(source, int) and isinstance(length, int)
        if not is_fixed:
            self.demands.append(Demand(source, length, n_parts))

    def compare(self, size: "Size", other: int) -> None:
        """Notes that code insists on a size: it would stop if one changed alone.

        Args:
            size: One that comes from somewhere.
            other: What it is compared with.
        """
        # A recurrent layer compares its input with `input_size`, which its setter
        # keeps true.
        is_own = self.tracer.current_module in self.kept_true
        if not (is_own and not isinstance(other, Size)):
            self.demand(size, source_of(other, self))

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs one function; shapes come out as sizes, and sizes go in as demands."""
        kwargs = kwargs or {}
        out = self.execute(func, args, kwargs)
        if func in SHAPES:
            return self._with_sources(args[0], out, *args[1:], **kwargs)
        return out

    def execute(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """What the function computes.

        Args:
            func: A function of PyTorch.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
        """
        return func(*args, **kwargs)

    def _with_sources(self, tensor: Tensor, shape: Any, dim: int | None = None) -> Any:
        """A tensor's shape, or one of its lengths, that remembers the tensor."""
        if not self.tracer.is_activation(tensor):
            return shape
        if dim is not None:
            return Size.of(shape, self.axis_of(tensor, dim), self)
        sizes = []
        for axis, value in enumerate(shape):
            sizes.append(Size.of(value, self.axis_of(tensor, axis), self))
        return torch.Size(sizes)

    def axis_of(self, tensor: Tensor, axis: int) -> AxisSize:
        """An activation's axis.

        Args:
            tensor: The activation.
            axis: Its axis; negative ones count from the end.
        """
        # Thin, so that what a size holds on to takes no memory.
        labels = thin(self.tracer.labels(tensor))
        axis %= labels.ndim
        return AxisSize(labels, axis, int(tensor.shape[axis]))

    def note_axis(self, size: object, out: Tensor, axis: int) -> None:
        """Notes that a size became the length of an axis.

        Args:
            size: What the code gave; -1 and None are no size.
            out: What came out, an activation or a view of a parameter.
            axis: Its axis.
        """
        if not isinstance(size, Size):
            return
        if self.tracer.is_activation(out):
            self.demand(size, self.axis_of(out, axis))
            return
        view = self.tracer.parameter(out)
        original = None if view is None else view.original_axis(axis % out.ndim)
        # A layer scale that is seen as `(self.dim, 1, 1)`, say.
        if view is not None and original is not None:
            labels = self.tracer.label_axis(view.name, original)
            self.demand(size, AxisSize(labels, 0, len(labels)))


@contextmanager
def sized_attributes(model: nn.Module, sizes: SizeMode) -> Iterator[None]:
    """Lets the integer attributes of a network's modules be sizes, for a while.

    Modules that `ATTRIBUTE_SETTERS` keeps true are left alone.

    Args:
        model: The network.
        sizes: The run that they belong to.
    """
    before: list[tuple[nn.Module, str, Any]] = []
    for path, module in model.named_modules():
        if has_setter(module):
            # As the tracer names it.
            sizes.kept_true.add(path or type(module).__name__)
            continue
        for name, value in list(vars(module).items()):
            sized = _sized(value, path, name, sizes)
            if sized is not None:
                before.append((module, name, value))
                vars(module)[name] = sized
    try:
        yield
    finally:
        for module, name, value in before:
            vars(module)[name] = value


def has_setter(module: nn.Module) -> bool:
    """Whether a module's sizes follow its tensors already.

    Args:
        module: The module.
    """
    if isinstance(module, OpenAttention):
        return True
    return any(is_instance_of(module, known) for known in ATTRIBUTE_SETTERS)


def _sized(value: object, path: str, name: str, sizes: SizeMode) -> Any:
    """An attribute's value as sizes, or None where it isn't one.

    Args:
        value: What the attribute holds.
        path: Name of the module.
        name: Of the attribute.
        sizes: The run.
    """
    # Exactly int: a bool is one too, and says nothing about a length.
    if type(value) is int and value > 0:
        return Size.of(value, AttributePlace(path, name, None), sizes)
    if type(value) not in (list, tuple) or not value:
        return None
    assert isinstance(value, list | tuple), "as was just asked"
    items: list[Any] = []
    for position, item in enumerate(value):
        if type(item) is not int:
            return None
        items.append(Size.of(item, AttributePlace(path, name, position), sizes))
    return type(value)(items)
