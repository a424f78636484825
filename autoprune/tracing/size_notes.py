"""Which sizes PyTorch's functions are given, and what becomes as long as they say."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from autoprune.structure.lengths import AttributePlace
from autoprune.tracing.sizes import Size, SizeMode


class NotingMode(SizeMode):
    """Notes as demands what functions of PyTorch are given as sizes."""

    def execute(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """What the function computes, with the sizes that it was given noted.

        Args:
            func: A function of PyTorch.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
        """
        where = CUTS.get(func)
        # Rules ask while the function runs.
        self.tracer.is_cut_by_attribute = where is not None and where(*args, **kwargs)
        try:
            out = func(*args, **kwargs)
        finally:
            self.tracer.is_cut_by_attribute = False
        note = NOTES.get(func)
        if note is not None:
            note(self, out, *args, **kwargs)
        return out


def _note_reshape(
    sizes: SizeMode, out: Tensor, x: Tensor, *shape: Any, **kwargs: Any
) -> None:
    """`reshape`, `view`, `expand`: all axes of what comes out."""
    if not shape:
        shape = tuple(kwargs.values())
    # One tuple, or the sizes one by one; `view` also takes another dtype.
    if len(shape) == 1 and isinstance(shape[0], list | tuple):
        shape = tuple(shape[0])
    if len(shape) == out.ndim:
        for axis, size in enumerate(shape):
            sizes.note_axis(size, out, axis)


def _note_unflatten(
    sizes: SizeMode, out: Tensor, x: Tensor, dim: int, shape: Any
) -> None:
    """`unflatten`: the axes into which one was split."""
    for offset, size in enumerate(shape):
        sizes.note_axis(size, out, dim % x.ndim + offset)


def _note_split(
    sizes: SizeMode, out: Any, x: Tensor, split_size: Any, dim: int = 0
) -> None:
    """`split`: each part, or the first of equal ones."""
    parts = split_size if isinstance(split_size, list | tuple) else [split_size]
    for size, part in zip(parts, out, strict=False):
        sizes.note_axis(size, part, dim)


def _note_narrow(
    sizes: SizeMode, out: Tensor, x: Tensor, dim: int, start: Any, length: Any
) -> None:
    """`narrow`: the axis that was cut."""
    sizes.note_axis(length, out, dim)


def _note_indexing(sizes: SizeMode, out: Tensor, x: Tensor, index: Any) -> None:
    """`x[:, :n]` and `x[:, n:]`: the axes that slices cut."""
    items = index if isinstance(index, tuple) else (index,)
    if not sizes.tracer.is_activation(x):
        return
    # Up to the first item that isn't a plain slice or number.
    out_axis = 0
    for axis, item in enumerate(items):
        if isinstance(item, slice) and item.step is None:
            whole = Size.of(x.shape[axis], sizes.axis_of(x, axis), sizes)
            length = _slice_length(item, whole)
            sizes.note_axis(length, out, out_axis)
            out_axis += 1
        elif not isinstance(item, int):
            return


def _has_sliced_by_attribute(x: Tensor, index: Any) -> bool:
    """Whether all the slices of an index end where attributes of modules say."""
    ends: list[Any] = []
    for item in index if isinstance(index, tuple) else (index,):
        if isinstance(item, slice):
            # 0 is where every axis begins.
            ends += [end for end in (item.start, item.stop) if end]
    return bool(ends) and all(map(_is_attribute, ends))


def _has_split_by_attribute(x: Tensor, split_size: Any, dim: int = 0) -> bool:
    """Whether attributes of modules say how long each part of a split is."""
    return isinstance(split_size, list | tuple) and all(map(_is_attribute, split_size))


def _is_attribute(value: object) -> bool:
    """Whether an integer is an attribute of a module, as it is."""
    return isinstance(value, Size) and isinstance(value.source, AttributePlace)


def _slice_length(cut: slice, length: Size) -> Any:
    """How long a slice is, as a size where its ends are sizes."""
    if isinstance(cut.stop, Size) and cut.stop >= 0:
        return cut.stop if cut.start is None else cut.stop - cut.start
    if isinstance(cut.start, Size) and cut.stop is None and cut.start >= 0:
        return length - cut.start
    return None


def _note_layer_norm(
    sizes: SizeMode, out: Tensor, x: Tensor, normalized_shape: Any, *_: Any, **__: Any
) -> None:
    """`layer_norm`, `rms_norm`: the axes that are normalised."""
    for offset, size in enumerate(normalized_shape):
        sizes.note_axis(size, out, offset - len(normalized_shape))


def _note_conv_groups(sizes: SizeMode, out: Tensor, *args: Any, **kwargs: Any) -> None:
    """A convolution: as many groups as the code says."""
    n_groups = kwargs.get("groups", args[6] if len(args) > 6 else 1)
    if isinstance(n_groups, Size) and sizes.tracer.is_activation(out):
        n_parts = out.shape[1] // int(n_groups)
        sizes.demand(n_groups, sizes.axis_of(out, 1), n_parts)


NOTES: dict[Callable[..., Any], Callable[..., None]] = {
    Tensor.reshape: _note_reshape,
    Tensor.view: _note_reshape,
    Tensor.expand: _note_reshape,
    torch.reshape: _note_reshape,
    Tensor.unflatten: _note_unflatten,
    torch.unflatten: _note_unflatten,
    Tensor.split: _note_split,
    torch.split: _note_split,
    Tensor.narrow: _note_narrow,
    torch.narrow: _note_narrow,
    Tensor.__getitem__: _note_indexing,
    functional.layer_norm: _note_layer_norm,
    functional.rms_norm: _note_layer_norm,
    functional.conv1d: _note_conv_groups,
    functional.conv2d: _note_conv_groups,
    functional.conv3d: _note_conv_groups,
}
"""Function of PyTorch to what notes which sizes it was given."""
CUTS: dict[Callable[..., Any], Callable[..., bool]] = {
    Tensor.__getitem__: _has_sliced_by_attribute,
    Tensor.split: _has_split_by_attribute,
    torch.split: _has_split_by_attribute,
}
"""Function of PyTorch that cuts, to whether attributes alone say where."""
