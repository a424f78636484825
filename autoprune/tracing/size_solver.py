"""Sizes that code computes have to be right in the pruned network too.

A demand says that an axis is as long as the code computes from other axes and from
attributes of modules. Attributes can be given other values. What else doesn't hold when
channels go is mended by joining the channels of the two sides, so that as many go here
as there.
"""

from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from autoprune.structure.labels import lines
from autoprune.structure.lengths import OPERATIONS, AttributePlace
from autoprune.tracing.constraint_solver import solve_constraints
from autoprune.tracing.sizes import (
    AxisSize,
    ComputedSize,
    Demand,
    Source,
)
from autoprune.tracing.tracer import Tracer
from autoprune.tracing.units import (
    axis_units,
    label_units,
    pinning_reasons,
    removed_units,
)

N_TRIALS = 8
"""Random choices of channels with which a demand is tried. Lengths are sums of counts;
two that differ agree by chance now and then, hardly eight times."""
MAX_ROUNDS = 100
"""So often all demands are looked at again; joins for one can break another."""

Values: TypeAlias = dict[AttributePlace, Source]
"""Attribute to what it follows from."""


def solve_sizes(
    tracer: Tracer, demands: list[Demand], representatives: np.ndarray
) -> tuple[np.ndarray, Values]:
    """Joins channels until every demand holds that can.

    An attention written by hand, for example: `C` channels enter, a linear layer makes
    queries, keys and values of them, and the code splits these by `reshape(B, N, 3,
    self.num_heads, C // self.num_heads)`. The demand on the fourth axis says that
    `num_heads` is the number of heads that are left. The one on the fifth says that
    heads are `C // num_heads` wide; when one of the `C` channels goes, they aren't. So
    each of these channels is joined with the query of the same number: whole heads can
    go, or the same places of all heads, here and there together.

    Args:
        tracer: The notebook of the forward pass.
        demands: What the code asked for, in order.
        representatives: Of all labels, after `Tracer.solve_constraints`.

    Returns:
        The representatives after the joins, and the attributes' values.
    """
    values: Values = {}
    for _ in range(MAX_ROUNDS):
        trials = _Trials(tracer, representatives)
        values = _attribute_values(demands)
        n_changes = tracer.book.n_joins + tracer.book.n_pins
        tied: set[int] = set()
        for demand in demands:
            if trials.hold(demand, values):
                continue
            # What was just tied may hold by now; the next round tells.
            units = trials.units_of(demand)
            if not tied & units:
                _tie(tracer, demand, values, trials.units)
                tied |= units
        if tracer.book.n_joins + tracer.book.n_pins == n_changes:
            # What no join has mended is wrong as soon as a channel goes; the proof
            # tries few choices of channels and might miss it.
            for demand in demands:
                if not trials.hold(demand, values):
                    _pin(tracer, demand, values, trials.units)
        if tracer.book.n_joins + tracer.book.n_pins == n_changes:
            break
        representatives = solve_constraints(tracer.book)
    return representatives, values


class _Trials:
    """Random choices of channels, and how long axes are with each of them.

    Args:
        tracer: The notebook of the forward pass.
        representatives: Of all labels.
    """

    def __init__(self, tracer: Tracer, representatives: np.ndarray):
        self.units = label_units(tracer.book, representatives)
        pinned = set(pinning_reasons(tracer.book, representatives, self.units))
        self.is_removed = removed_units(self.units, pinned, N_TRIALS, seed=0)
        self._lengths: dict[AxisSize, np.ndarray] = {}

    def length(self, source: Source, values: Values) -> np.ndarray | None:
        """How long something is in each trial, `(n_trials,)`.

        Args:
            source: Where the length comes from.
            values: Attribute to what it follows from.

        Returns:
            The lengths, NaN in trials that leave nothing to divide by; or None where
            one follows from an attribute of which nothing is known.
        """
        if isinstance(source, int):
            return np.full(N_TRIALS, float(source))
        if isinstance(source, AttributePlace):
            return self.length(values[source], values) if source in values else None
        if isinstance(source, AxisSize):
            return self._axis_length(source)
        left = self.length(source.left, values)
        right = self.length(source.right, values)
        if left is None or right is None:
            return None
        # An axis of which a trial left nothing divides nothing.
        divisor = np.where(right == 0, np.nan, right)
        if source.operation == "floordiv":
            right = divisor
        return OPERATIONS[source.operation](left, right)

    def units_of(self, demand: Demand) -> set[int]:
        """The units on the axis that has to be as long as the code says."""
        if not isinstance(demand.length, AxisSize) or not demand.length.has_channels:
            return set()
        axis = demand.length
        own = axis_units(axis.labels, axis.axis, self.units)
        return set(own.ravel().tolist()) - {0}

    def _axis_length(self, axis: AxisSize) -> np.ndarray:
        """How long an activation's axis is in each trial."""
        if axis not in self._lengths:
            if axis.has_channels:
                own = axis_units(axis.labels, axis.axis, self.units)
                is_gone = self.is_removed[:, own].any(2)
                self._lengths[axis] = (~is_gone).sum(1).astype(np.float64)
            else:
                self._lengths[axis] = np.full(N_TRIALS, float(axis.dense))
        return self._lengths[axis]

    def hold(self, demand: Demand, values: Values) -> bool:
        """Whether something is as long as the code says in every trial."""
        says = self.length(demand.source, values)
        length = self.length(demand.length, values)
        if says is None or length is None:
            # What can't be computed can't be mended; the proof has the last word.
            return True
        difference = says * demand.n_parts - length
        return not np.nan_to_num(difference).any()


def _attribute_values(demands: list[Demand]) -> Values:
    """What each attribute follows from, by the first demand that tells.

    `reshape(B, N, self.num_heads, -1)` says that `num_heads` is as long as the third
    axis of what comes out; `reshape(B, N, 3 * self.dim)`, that `dim` is a third of it.

    Args:
        demands: In the order of the forward pass.
    """
    values: Values = {}
    # Sizes of axes without channels, such as an image's, say nothing of those with.
    _solve_demands(demands, values, must_have_channels=True)
    # Of `dim // n_paths` with both unknown, the divisor is taken to stay.
    for demand in demands:
        for attribute, dense in _divisors(demand.source):
            values.setdefault(attribute, dense)
    _solve_demands(demands, values, must_have_channels=True)
    _solve_demands(demands, values, must_have_channels=False)
    return values


def _solve_demands(
    demands: list[Demand], values: Values, must_have_channels: bool
) -> None:
    """Finds the attributes that a demand with no other unknown tells of.

    Args:
        demands: In the order of the forward pass.
        values: The known attributes; those that are found are added.
        must_have_channels: Leave demands aside in which nothing can go.
    """
    for demand in demands:
        for source, length in (
            (demand.source, demand.length),
            (demand.length, demand.source),
        ):
            # Of two attributes that are compared, none tells of the other. So what
            # follows from attributes follows from known ones, and none from itself.
            if not values.keys() >= set(_attributes(length)):
                continue
            unknown = [item for item in _attributes(source) if item not in values]
            has_channels = bool(_channel_axes(length, values))
            if len(unknown) == 1 and (has_channels or not must_have_channels):
                _solve_for(source, length, demand.n_parts, values)


def _divisors(source: Source) -> list[tuple[AttributePlace, int]]:
    """The attributes by which a computed size divides, with what they are."""
    if not isinstance(source, ComputedSize):
        return []
    divisors = _divisors(source.left) + _divisors(source.right)
    is_divided = source.operation == "floordiv"
    if is_divided and isinstance(source.right, AttributePlace):
        divisors.append((source.right, source.dense[1]))
    return divisors


def _solve_for(source: Source, length: Source, n_parts: int, values: Values) -> None:
    """Finds the one unknown attribute of a computed size.

    Args:
        source: The size; exactly one attribute in it is unknown.
        length: What it has to be, after the division by `n_parts`; no attribute in it
            is unknown.
        n_parts: By what the length is divided.
        values: The known attributes; the unknown one is added.
    """
    target = length
    if n_parts > 1:
        target = ComputedSize("floordiv", length, n_parts)
    while isinstance(source, ComputedSize):
        is_left = any(item not in values for item in _attributes(source.left))
        other = source.right if is_left else source.left
        inverse = INVERSE[source.operation, is_left]
        if inverse.is_swapped:
            target = ComputedSize(inverse.operation, other, target)
        else:
            target = ComputedSize(inverse.operation, target, other)
        source = source.left if is_left else source.right
    assert isinstance(source, AttributePlace), "the unknown is an attribute"
    values[source] = target


class _Inverse(NamedTuple):
    """How an operand follows from the result and the other operand.

    Attributes:
        operation: Which one.
        is_swapped: Whether the result is its second operand.
    """

    operation: str
    is_swapped: bool = False


INVERSE = {
    ("add", True): _Inverse("sub"),
    ("add", False): _Inverse("sub"),
    ("sub", True): _Inverse("add"),
    ("sub", False): _Inverse("sub", is_swapped=True),
    ("mul", True): _Inverse("floordiv"),
    ("mul", False): _Inverse("floordiv"),
    ("floordiv", True): _Inverse("mul"),
    ("floordiv", False): _Inverse("floordiv", is_swapped=True),
}
"""Operation, and whether its left operand is asked for, to its inverse."""


def _attributes(source: Source) -> list[AttributePlace]:
    """The attributes in a computed size."""
    if isinstance(source, AttributePlace):
        return [source]
    if isinstance(source, ComputedSize):
        return _attributes(source.left) + _attributes(source.right)
    return []


def _channel_axes(source: Source, values: Values) -> list[AxisSize]:
    """The axes with channels from which a size follows.

    Args:
        source: The size.
        values: Attribute to what it follows from.
    """
    if isinstance(source, AxisSize):
        return [source] if source.has_channels else []
    if isinstance(source, AttributePlace) and source in values:
        return _channel_axes(values[source], values)
    if isinstance(source, ComputedSize):
        return [
            *_channel_axes(source.left, values),
            *_channel_axes(source.right, values),
        ]
    return []


def _tie(tracer: Tracer, demand: Demand, values: Values, units: np.ndarray) -> None:
    """Joins the channels of an axis with those from which the code computes its length.

    Any pairing makes them equally many; positions that code counts alike are joined.
    Where one of the two never changes, the channels of the other are pinned.

    Args:
        tracer: The notebook of the forward pass.
        demand: One that doesn't hold.
        values: Attribute to what it follows from.
        units: Those of every label, `(n_labels, 2)`.
    """
    axes = _channel_axes(demand.length, values)
    sources = _channel_axes(demand.source, values)
    for axis in axes:
        for source in sources:
            if source is not axis and _tie_axes(tracer, source, axis, units):
                return
    if not (axes and sources):
        # What has to be as long as something that never changes keeps all its channels.
        _pin(tracer, demand, values, units)


def _pin(tracer: Tracer, demand: Demand, values: Values, units: np.ndarray) -> None:
    """Pins the channels on both sides of a demand.

    Args:
        tracer: The notebook of the forward pass.
        demand: One that doesn't hold.
        values: Attribute to what it follows from.
        units: Those of every label, `(n_labels, 2)`.
    """
    axes = _channel_axes(demand.length, values)
    sources = _channel_axes(demand.source, values)
    reason = "has to be as long as something that stays"
    if axes and sources:
        reason = "the code computes its length otherwise than channels are removed"
    for axis in [*axes, *sources]:
        own = axis_units(axis.labels, axis.axis, units)
        tracer.book.pin(torch.from_numpy(own[own > 0]), reason)


def _tie_axes(
    tracer: Tracer, first: AxisSize, second: AxisSize, units: np.ndarray
) -> bool:
    """Joins the channels of two axes, position by position.

    Where one is longer, it is a product of the other with a number: three times as many
    channels, or a head's width, which makes up all channels together with the axis of
    the heads beside it.

    Args:
        tracer: The notebook of the forward pass.
        first: One axis.
        second: The other.
        units: Those of every label, `(n_labels, 2)`.

    Returns:
        Whether a way was found.
    """
    if first.dense < second.dense:
        first, second = second, first
    long_lines = _lines(first.labels, first.axis, units)
    n = second.dense
    if first.dense % n:
        return False
    whole = _neighbours(second, first.dense)
    if first.dense > n and whole is not None:
        begin, end = whole
        short_lines = _lines(second.labels.flatten(begin, end), begin, units)
    else:
        # As `3 * C` has them: all of the shorter axis, then all of it again.
        long_lines = long_lines.reshape(-1, n)
        short_lines = _lines(second.labels, second.axis, units)
    together = torch.cat([long_lines, short_lines])
    tracer.book.join_lines(together)
    return True


def _lines(labels: Tensor, axis: int, units: np.ndarray) -> Tensor:
    """What decides about the positions of an axis, `(n_lines, n)`.

    Args:
        labels: Of an activation.
        axis: Which axis.
        units: Those of every label, `(n_labels, 2)`.
    """
    axis_lines = lines(labels, axis)
    if len(axis_lines) == 1:
        return axis_lines
    # Where cells lie along the axis, their row or their column decides.
    own = axis_units(labels, axis, units)
    if (own[:, 0] > 0).all() and not own[:, 1].any():
        return torch.from_numpy(own[None, :, 0])
    return axis_lines


def _neighbours(axis: AxisSize, n: int) -> tuple[int, int] | None:
    """Axes side by side that have `n` positions together, one of them given.

    Args:
        axis: The given one.
        n: How many positions.

    Returns:
        The first and the last of them, or None.
    """
    shape = axis.labels.shape
    for begin in range(axis.axis, -1, -1):
        for end in range(axis.axis, len(shape)):
            if shape[begin : end + 1].numel() == n:
                return begin, end
    return None
