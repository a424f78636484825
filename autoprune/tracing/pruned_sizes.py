"""Sizes in a masked run, which know what they are in the pruned network."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional

from autoprune.structure.lengths import OPERATIONS, AttributePlace
from autoprune.tracing.sizes import AxisSize, Size, SizeMode, Source
from autoprune.tracing.tracer import Tracer


class PrunedSizes(SizeMode):
    """Computes with the sizes of the pruned network where they aren't shapes.

    Code that scales by `width**-0.5`, or divides a sum by how many there are, does so
    in the pruned network with what is left there.

    Args:
        tracer: The notebook of the run.
        is_removed: Per label whether its channel is removed; asked when needed, since a
            run can hand out further labels.
        attributes: What the sizes that modules keep are in the pruned network.
    """

    def __init__(
        self,
        tracer: Tracer,
        is_removed: Callable[[], Tensor],
        attributes: Mapping[AttributePlace, int],
    ):
        super().__init__(tracer)
        self.is_removed = is_removed
        self.attributes = attributes

    def kept_length(self, source: Source, dense: int) -> int:
        """What a size is in the pruned network.

        Args:
            source: Where it comes from.
            dense: What it is in the network that runs.
        """
        if isinstance(source, int):
            return source
        if isinstance(source, AttributePlace):
            return self.attributes.get(source, dense)
        if isinstance(source, AxisSize):
            return self._remaining(source)
        left = self.kept_length(source.left, source.dense[0])
        right = self.kept_length(source.right, source.dense[1])
        return OPERATIONS[source.operation](left, right)

    def _remaining(self, axis: AxisSize) -> int:
        """How many positions of an activation's axis are left."""
        if not axis.has_channels:
            return axis.dense
        is_gone = self.is_removed()[axis.labels].movedim(axis.axis, 0).flatten(1)
        return int((~is_gone.all(1)).sum())

    def execute(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """What a function computes of numbers, it computes of those left.

        Args:
            func: A function of PyTorch.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
        """
        if getattr(func, "__name__", "") in ARITHMETIC:
            args = tuple(map(_as_kept, args))
        if func is functional.scaled_dot_product_attention:
            query = args[0] if args else kwargs["query"]
            has_scale = len(args) > 6 or kwargs.get("scale") is not None
            if not has_scale and self.tracer.is_activation(query):
                # Its default is that of the width that the queries have.
                width = self._remaining(self.axis_of(query, -1))
                kwargs = {**kwargs, "scale": width**-0.5}
        return func(*args, **kwargs)


def _as_kept(value: Any) -> Any:
    """A size as what it is in the pruned network; anything else as it is."""
    return value.kept if isinstance(value, Size) else value


ARITHMETIC = frozenset(
    name
    for operation in ("add", "sub", "mul", "div", "true_divide", "truediv", "pow")
    for name in (operation, f"__{operation}__", f"__r{operation}__")
)
"""Names of the functions that compute with a tensor and a number."""
