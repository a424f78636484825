"""Real structured pruning: smaller tensors in a network of the same class.

A `Slicer` holds one copy of the network and lays the kept channels of the dense tensors
into it, as often as asked: `prune` does so once, the proxy thousands of times. What a
module's code reads back besides its tensors, such as `out_channels`, is set by the
entries of `ATTRIBUTE_SETTERS`; see `autoprune.structure.attribute_setters` for how to
add one.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from autoprune.structure.attention import is_instance_of, open_attention
from autoprune.structure.attribute_setters import ATTRIBUTE_SETTERS, Update
from autoprune.structure.caches import drop_caches, may_keep_caches
from autoprune.structure.groups import (
    Groups,
    named_tensors,
    removal_mask,
)
from autoprune.structure.wrappers import computed_tensors, unwrap

KeptIndices: TypeAlias = Mapping[str, Tensor]
"""Prunable group to the channels that survive, int64, ascending."""


def top_channels(
    importance: Mapping[str, Tensor], kept: Mapping[str, int]
) -> dict[str, Tensor]:
    """Selects the most important channels of each group.

    Args:
        importance: Group to scores `(n_channels,)`, higher is kept.
        kept: Group to the number of channels to keep; groups left out keep all.

    Returns:
        Group to the channels to keep, int64, ascending.
    """
    channels = {}
    for name, count in kept.items():
        best = importance[name].topk(count).indices
        channels[name] = best.sort().values
    return channels


def shared_copy(model: nn.Module) -> nn.Module:
    """Copies a network without copying its weights.

    Cheap and safe, as long as nobody writes into the weights of either.

    Args:
        model: The network.

    Returns:
        A network whose parameters and buffers are new objects over the same memory.
    """
    tensors = [*model.parameters(), *model.buffers(), *computed_tensors(model)]
    # What deepcopy finds in its memo it takes from there, instead of copying it.
    memo = {id(tensor): _alias(tensor) for tensor in tensors}
    twin = copy.deepcopy(model, memo)
    drop_caches(twin)
    return twin


def copy_buffers(network: nn.Module) -> None:
    """Gives a shared copy buffers of its own, which its code may write into.

    Args:
        network: The copy.
    """
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.clone()


def own_copy(model: nn.Module) -> nn.Module:
    """Copies a network with its weights.

    Args:
        model: The network.

    Returns:
        A network that shares nothing with it, whatever its modules have kept from the
        last forward pass.
    """
    memo = {}
    for tensor in computed_tensors(model):
        memo[id(tensor)] = tensor.detach().clone()
    return copy.deepcopy(model, memo)


def _alias(tensor: Tensor) -> Tensor:
    """A new parameter or buffer over the memory of another one."""
    # Detached tensors share memory with what they come from.
    alias = tensor.detach()
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(alias, requires_grad=tensor.requires_grad)
    return alias


@dataclass(frozen=True)
class _Cut:
    """The positions of one axis on which groups sit.

    All axes that are cut alike share one, so that it's worked out once.

    Attributes:
        length: Of the axis in the dense network.
        members: Groups, each with its channels' positions `(n_channels, k)`.
    """

    length: int
    members: list[tuple[str, Tensor]]

    def survivors(self, masks: Mapping[str, Tensor]) -> Tensor | None:
        """The positions that are left, ascending, or None if all of them are.

        `masks` leads from groups that lose channels to which go, bool `(n_channels,)`.
        """
        pruned = [group for group, _ in self.members if group in masks]
        # Most axes of a network with few pruned groups stay as they are.
        if not pruned:
            return None
        is_alive = torch.ones(self.length, dtype=torch.bool)
        for group, index in self.members:
            if group in masks:
                is_alive[index[masks[group]].flatten()] = False
        return is_alive.nonzero()[:, 0]


@dataclass(frozen=True)
class _Piece:
    """One tensor of the network, and how it is cut.

    Attributes:
        module: The module of the reused copy that holds the tensor.
        attribute: The attribute of the module that does.
        dense: The tensor of the dense network.
        cuts: Axes on which groups sit, each with the number of its cut.
    """

    module: nn.Module
    attribute: str
    dense: Tensor
    cuts: list[tuple[int, int]]


class Slicer:
    """Lays sub-models of one dense network into one reused copy of it.

    Where each group's channels sit is looked up once; a sub-model is then an index for
    each kind of axis, and a selection for each tensor.

    Args:
        model: The dense network; it is never changed.
        groups: Its trace.
        borrow: Share the weights of `model`, which must stay as they are, rather than
            copy them.

    Attributes:
        groups: The trace.
        model: The reused copy.
    """

    def __init__(self, model: nn.Module, groups: Groups, borrow: bool = False):
        self.groups = groups
        # Two copies: the sub-models' tensors are cut from one and laid into the other.
        model = unwrap(model)
        dense = open_attention(shared_copy(model) if borrow else own_copy(model))
        self.model = shared_copy(dense)
        self._updates = _attribute_updates(self.model)
        # Asked once: sub-models are made thousands of times.
        self._may_keep_caches = may_keep_caches(self.model)
        self._cuts, cut_of_axis = _find_cuts(groups)
        cuts: dict[str, list[tuple[int, int]]] = {name: [] for name in groups.shapes}
        for (name, axis), cut in cut_of_axis.items():
            cuts[name].append((axis, cut))
        owners = _owners(self.model)
        self._pieces = []
        for name, tensor in named_tensors(dense).items():
            module, attribute = owners[name]
            piece = _Piece(module, attribute, tensor.detach(), cuts[name])
            self._pieces.append(piece)

    def apply(self, kept: KeptIndices) -> nn.Module:
        """Makes the sub-model with exactly the kept channels.

        Args:
            kept: Prunable group to the surviving channels; groups left out keep all.

        Returns:
            The same object at every call, valid until the next.
        """
        masks = self._removal_masks(kept)
        # Few kinds of cuts, many tensors: the indices are made once for all of them.
        survivors = [cut.survivors(masks) for cut in self._cuts]
        for piece in self._pieces:
            tensor = piece.dense
            for axis, cut in piece.cuts:
                index = survivors[cut]
                if index is not None:
                    tensor = tensor.index_select(axis, index)
            # A tensor that lost nothing is the dense one itself, which the sub-model,
            # free to train or to recalibrate, must not write into.
            if tensor is piece.dense:
                tensor = piece.dense.clone()
            _assign(piece.module, piece.attribute, tensor)
        for update in self._updates:
            update()
        # Few networks keep sizes that no setter knows of.
        if self.groups.attributes:
            for place, value in self.groups.attribute_values(kept).items():
                place.write(self.model, value)
        # Another sub-model may have run since.
        if self._may_keep_caches:
            drop_caches(self.model)
        return self.model

    def _removal_masks(self, kept: KeptIndices) -> dict[str, Tensor]:
        """Group to which of its channels go, for those that lose any."""
        # Few groups, many positions: what goes is looked up once for each group.
        masks = {}
        for group in self.groups:
            if group.name in kept:
                mask = removal_mask(group, kept)
                # Axes that lose nothing needn't be selected from.
                if mask.any():
                    masks[group.name] = mask
        return masks


def _find_cuts(groups: Groups) -> tuple[list[_Cut], dict[tuple[str, int], int]]:
    """Finds the different cuts of a network's axes.

    Returns:
        The cuts; and tensor and axis to the number of its cut, wherever a prunable
        group sits.
    """
    members: dict[tuple[str, int], list[tuple[str, Tensor]]] = {}
    for group in groups:
        for member in group.members:
            on_axis = members.setdefault((member.tensor, member.axis), [])
            on_axis.append((group.name, member.index.to(torch.int64)))
    cuts: list[_Cut] = []
    numbers: dict[tuple, int] = {}
    cut_of_axis: dict[tuple[str, int], int] = {}
    for (name, axis), on_axis in members.items():
        length = groups.shapes[name][axis]
        # Tensors compare elementwise and don't hash; their bytes do.
        layout = tuple((group, index.numpy().tobytes()) for group, index in on_axis)
        key = (length, layout)
        if key not in numbers:
            numbers[key] = len(cuts)
            cuts.append(_Cut(length, on_axis))
        cut_of_axis[name, axis] = numbers[key]
    return cuts, cut_of_axis


def prune(model: nn.Module, groups: Groups, kept: KeptIndices) -> nn.Module:
    """Makes a new, smaller network of the same class with exactly the kept channels.

    Attention modules come out as those of `autoprune.structure.attention`, where the
    number of heads and their width are free.

    Args:
        model: The dense network that `groups` was traced from; it stays untouched.
        groups: Its trace.
        kept: Prunable group to the surviving channels (`top_channels`); groups left out
            keep all.

    Returns:
        The smaller network.
    """
    return Slicer(model, groups, borrow=True).apply(kept)


def fit_shapes(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Lays tensors of other shapes into a network, in place.

    Module attributes that the code reads back (`out_channels`, `num_features`, ...)
    follow the shapes; attention modules are opened as `prune` does.

    Args:
        model: The dense network, or one of another width.
        state_dict: Name to value of each of its parameters and buffers; of buffers that
            its own state dict leaves out, those that have another shape.
    """
    # Made first: they note what only the shapes before can tell.
    updates = _attribute_updates(open_attention(model))
    left_out = _owners(model).keys() - model.state_dict().keys()
    for name, (module, attribute) in _owners(model).items():
        if name in left_out and name not in state_dict:
            continue
        # A copy, so that training the network leaves the caller's tensors alone.
        _assign(module, attribute, state_dict[name].clone())
    for update in updates:
        update()


def _owners(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Name of a parameter or buffer to the module and attribute that hold it."""
    owners = {}
    buffers = [name for name, _ in model.named_buffers(remove_duplicate=False)]
    for name in dict.fromkeys([*model.state_dict(), *buffers]):
        path, _, attribute = name.rpartition(".")
        owners[name] = model.get_submodule(path), attribute
    return owners


def _assign(module: nn.Module, attribute: str, value: Tensor) -> None:
    """Gives a parameter or buffer another value, of whatever shape."""
    current = getattr(module, attribute)
    if isinstance(current, nn.Parameter):
        # The parameter stays the same object, as optimizers and tied weights know it.
        current.data = value
        current.grad = None
    else:
        # A buffer has no state beside its value, so it may be another object.
        module._buffers[attribute] = value


def _attribute_updates(model: nn.Module) -> list[Update]:
    """The updates of all modules.

    Inner ones come first, so that an outer one may read what they have set.
    """
    updates = []
    for module in reversed(list(model.modules())):
        for known, make_update in ATTRIBUTE_SETTERS.items():
            if is_instance_of(module, known):
                updates.append(make_update(module))
    return updates
