"""Which elements of which parameters a tensor shows, before any activation is met.

A weight that the code computes from others, `gain * weight / weight.norm()` for
instance, shows several parameters at once; each of its axes lies along axes of theirs.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from autoprune.structure.labels import (
    broadcast_labels,
    labels_on_axis,
    take_at_origin,
    thin,
    varying_axes,
)


@dataclass(frozen=True)
class ParameterView:
    """A parameter, possibly seen through operations.

    Attributes:
        name: Its name in the state dict.
        shape: Its own shape.
        index: Per original axis the index along that axis of every element of the view;
            None where the code has summed over the axis.
    """

    name: str
    shape: torch.Size
    index: tuple[Tensor | None, ...]

    @classmethod
    def from_parameter(cls, name: str, tensor: Tensor) -> "ParameterView":
        """The parameter as it is.

        Args:
            name: Its name in the state dict.
            tensor: The parameter or buffer.
        """
        index = []
        for axis, size in enumerate(tensor.shape):
            # Broadcast, so that a large weight takes no memory here.
            index.append(broadcast_labels(torch.arange(size), axis, tensor.shape))
        return cls(name, tensor.shape, tuple(index))

    def apply(self, move: Callable[[Tensor], Tensor]) -> "ParameterView":
        """The view after one more movement of its elements."""
        index = []
        for axis_index in self.index:
            index.append(None if axis_index is None else move(axis_index))
        return ParameterView(self.name, self.shape, tuple(index))

    def forget(self, dims: Collection[int]) -> "ParameterView":
        """The view without the axes that lie along some dimensions of it.

        Args:
            dims: Over which the code sums; the shape stays.
        """
        index = []
        for axis_index in self.index:
            is_kept = axis_index is not None and not (
                set(dims) & set(varying_axes(axis_index))
            )
            index.append(axis_index if is_kept else None)
        return ParameterView(self.name, self.shape, tuple(index))

    @property
    def is_complete(self) -> bool:
        """Whether every element of the view is one element of the parameter."""
        return all(axis_index is not None for axis_index in self.index)

    @property
    def axes(self) -> list[tuple[int, Tensor]]:
        """The parameter's axes along which the view varies, each with its index."""
        axes = []
        for axis, axis_index in enumerate(self.index):
            if axis_index is not None and self.shape[axis] > 1:
                axes.append((axis, axis_index))
        return axes

    @property
    def varying_dims(self) -> set[int]:
        """The dimensions along which the view shows different elements."""
        varying: set[int] = set()
        for _, index in self.axes:
            varying.update(varying_axes(index))
        return varying

    def original_axis(self, dim: int) -> int | None:
        """The original axis that lies whole and in order along `dim` of the view.

        None if there is no such axis: a part of one, a permuted one, or two merged.
        """
        matches = []
        for axis, index in enumerate(self.index):
            line = None if index is None else labels_on_axis(index, dim)
            # In a slice or a permutation position i isn't channel i any more.
            if line is not None and torch.equal(line, torch.arange(self.shape[axis])):
                matches.append(axis)
        # Axes of length 1 look alike.
        if dim in matches:
            return dim
        return matches[0] if matches else None

    def axis_part(self, dim: int) -> tuple[int, Tensor | None] | None:
        """The original axis that lies along `dim` of the view, whole or in part.

        Queries' rows of a packed weight `(3 * n, m)` are a part of its axis 0: the
        positions 0 to n - 1.

        Args:
            dim: Of the view.

        Returns:
            The axis, and the positions of it that the view shows, `(n,)`, or None for
            all of them in order. None where no axis lies along `dim` by itself, or a
            position appears twice.
        """
        axis = self.original_axis(dim)
        if axis is not None:
            return axis, None
        for number, index in enumerate(self.index):
            line = None if index is None else labels_on_axis(index, dim)
            # One position could be anything; several say which axis they are on.
            if line is None or len(line) < 2 or not line.any():
                continue
            if len(line.unique()) == len(line):
                return number, line
        return None

    def axis_along(self, labels: Tensor) -> tuple[int, Tensor] | None:
        """The original axis whose positions some labels tell apart.

        A vector `(8,)` beside a weight that is seen as `(3, 8)`, with labels
        5 5 6 6 7 7 8 8 along the second: each position has one label, so the vector's
        axis 0 carries them.

        Args:
            labels: One for each element, in the view's shape.

        Returns:
            The axis, and the label of each of its positions; None where no axis
            carries them, or only a part of one does.
        """
        label_dims = varying_axes(labels)
        for axis, index in self.axes:
            dims = varying_axes(index)
            # Along further dimensions, one position would have several labels.
            if not label_dims or not set(label_dims) <= set(dims):
                continue
            of_position = take_at_origin(index, dims).flatten().numpy()
            label = take_at_origin(labels, dims).flatten().numpy()
            found, first = np.unique(of_position, return_index=True)
            line = label[first]
            is_whole = len(found) == self.shape[axis]
            if is_whole and np.array_equal(line[of_position], label):
                return axis, torch.from_numpy(line)
        return None

    def shows(self, other: "ParameterView") -> bool:
        """Whether another view of the same shape tells nothing beyond this one."""
        if self.name != other.name:
            return False
        for mine, theirs in zip(self.index, other.index, strict=True):
            if theirs is None:
                continue
            if mine is None or mine.stride() != theirs.stride():
                return False
            if not torch.equal(thin(mine), thin(theirs)):
                return False
        return True


def distinct_views(views: Sequence[ParameterView]) -> tuple[ParameterView, ...]:
    """The views without those that others show as well.

    Args:
        views: All of one shape.
    """
    kept: list[ParameterView] = []
    for view in views:
        if any(other.shows(view) for other in kept):
            continue
        kept = [other for other in kept if not view.shows(other)]
        kept.append(view)
    return tuple(kept)


def reshaped(index: Tensor, shape: torch.Size) -> Tensor:
    """`index.reshape(shape)` that leaves what is constant at stride 0.

    A weight `(64, 32, 3, 3)` that is seen as `(64, 288)` keeps an index along its first
    axis of 64 numbers, not of 18,432.

    Args:
        index: Of any shape.
        shape: As many elements.
    """
    varying = varying_axes(index)
    before: list[slice | int] = []
    after: list[int] = []
    for old, new in _blocks(index.shape, shape):
        if set(old) & set(varying):
            before += [slice(None)] * len(old)
            after += [shape[dim] for dim in new]
        else:
            before += [slice(0, 1)] * len(old)
            after += [1] * len(new)
    return index[tuple(before)].reshape(after).expand(shape)


def _blocks(before: torch.Size, after: torch.Size) -> list[tuple[list[int], list[int]]]:
    """Cuts two shapes of the same size into blocks that are reshaped by themselves.

    `(2, 6, 4)` and `(2, 3, 8)` have the blocks `([0], [0])` and `([1, 2], [1, 2])`.
    """
    blocks = []
    old: list[int] = []
    new: list[int] = []
    old_size = 1
    new_size = 1
    next_new = 0
    for dim, size in enumerate(before):
        old.append(dim)
        old_size *= size
        while next_new < len(after) and new_size * after[next_new] <= old_size:
            new.append(next_new)
            new_size *= after[next_new]
            next_new += 1
            if new_size == old_size:
                break
        if new_size == old_size:
            blocks.append((old, new))
            old = []
            new = []
            old_size = 1
            new_size = 1
    # What is left has length 1.
    new += range(next_new, len(after))
    if old or new:
        blocks.append((old, new))
    return blocks
