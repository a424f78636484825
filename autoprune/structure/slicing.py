"""Real structured pruning.

A `Slicer` holds one copy of the network and lays the kept channels of the dense tensors
into it, as often as asked: `prune` does so once, the proxy thousands of times.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoprune.structure.attention import OpenMultiheadAttention, is_a, open_attention
from autoprune.structure.groups import (
    Groups,
    loses_whole_conv_groups,
    named_tensors,
    removal_mask,
)

KeptIndices = Mapping[str, Tensor]
"""Prunable group to the channels that survive, int64, ascending."""


def top_channels(
    importance: Mapping[str, Tensor], kept: Mapping[str, int]
) -> dict[str, Tensor]:
    """The `kept` most important channels of each group, ascending.

    Args:
        importance: Group to scores `(n_channels,)`, higher is kept.
        kept: Group to the number of channels to keep; groups left out keep all.
    """
    return {
        name: importance[name].topk(count).indices.sort().values
        for name, count in kept.items()
    }


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers are new objects over the same memory: cheap,
    as long as nobody writes.
    """
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): _alias(tensor) for tensor in tensors})


def _alias(tensor: Tensor) -> Tensor:
    alias = tensor.detach()
    return (
        nn.Parameter(alias, requires_grad=tensor.requires_grad)
        if isinstance(tensor, nn.Parameter)
        else alias
    )


@dataclass(frozen=True)
class _Cut:
    """The positions of one axis on which groups sit: shared by all axes that are cut
    alike.
    """

    length: int
    members: list[tuple[str, Tensor]]
    """Group, and its channels' positions `(n_channels, k)`."""

    def survivors(self, gone: Mapping[str, Tensor]) -> Tensor | None:
        """Positions left when the marked channels go, ascending; None if all are."""
        members = [
            (gone[group], index) for group, index in self.members if group in gone
        ]
        if not members:
            return None
        alive = torch.ones(self.length, dtype=torch.bool)
        for channels, index in members:
            alive[index[channels].flatten()] = False
        return alive.nonzero()[:, 0]


class Slicer:
    """Lays sub-models of one dense network into one reused copy of it.

    Where each group's channels sit is looked up once; a sub-model is then an index for
    each kind of axis, and a selection for each tensor.

    Args:
        model: The dense network; it is never changed.
        groups: Its trace.
        borrow: Share the weights of `model`, which must stay as they are, rather than
            copy them.
    """

    def __init__(self, model: nn.Module, groups: Groups, borrow: bool = False):
        self.groups = groups
        dense = open_attention(shared_copy(model) if borrow else copy.deepcopy(model))
        self.model = shared_copy(dense)
        self._attributes = _attribute_setters(self.model)
        self._cuts, by_axis = _cuts(groups)
        owners, axes = _owners(self.model), {name: [] for name in groups.shapes}
        for (name, axis), cut in by_axis.items():
            axes[name].append((axis, cut))
        tensors = {name: tensor.detach() for name, tensor in named_tensors(dense).items()}
        self._pieces = [
            (*owners[name], tensor, axes[name]) for name, tensor in tensors.items()
        ]

    def apply(self, kept: KeptIndices) -> nn.Module:
        """The sub-model with exactly the kept channels; the same object at every call,
        valid until the next.
        """
        marks = {
            group.name: removal_mask(group, kept)
            for group in self.groups
            if group.name in kept
        }
        gone = {name: mark for name, mark in marks.items() if mark.any()}
        survivors = [cut.survivors(gone) for cut in self._cuts]
        for module, attribute, dense, axes in self._pieces:
            tensor = dense
            for axis, cut in axes:
                if survivors[cut] is not None:
                    tensor = tensor.index_select(axis, survivors[cut])
            _assign(module, attribute, dense.clone() if tensor is dense else tensor)
        for update in self._attributes:
            update()
        return self.model


def _cuts(groups: Groups) -> tuple[list[_Cut], dict[tuple[str, int], int]]:
    """The different cuts, and for each tensor and axis with a prunable group the number
    of its cut.
    """
    members: dict[tuple[str, int], list[tuple[str, Tensor]]] = {}
    for group in groups:
        for member in group.members:
            members.setdefault((member.tensor, member.axis), []).append(
                (group.name, member.index.to(torch.int64))
            )
    cuts, numbers, by_axis = [], {}, {}
    for (name, axis), cut in members.items():
        length = groups.shapes[name][axis]
        key = length, tuple((group, index.numpy().tobytes()) for group, index in cut)
        if key not in numbers:
            numbers[key] = len(cuts)
            cuts.append(_Cut(length, cut))
        by_axis[name, axis] = numbers[key]
    return cuts, by_axis


def prune(model: nn.Module, groups: Groups, kept: KeptIndices) -> nn.Module:
    """A new, smaller network of the same class with exactly the kept channels; the
    original is untouched.

    Attention modules come out as those of `autoprune.structure.attention`, where the
    number of heads and their width are free.

    Args:
        model: The dense network that `groups` was traced from.
        groups: Its trace.
        kept: Prunable group to the surviving channels (`top_channels`); groups left out
            keep all.
    """
    return Slicer(model, groups, borrow=True).apply(kept)


def fit_shapes(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Gives every parameter and buffer of `model`, in place, the shape that it has in
    `state_dict`, and its values.

    Module attributes that the code reads back (`out_channels`, `num_features`, ...)
    follow the shapes; attention modules are opened as `prune` does.
    """
    setters = _attribute_setters(open_attention(model))
    for name, (module, attribute) in _owners(model).items():
        _assign(module, attribute, state_dict[name].clone())
    for update in setters:
        update()


def _owners(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """State dict name to the module and attribute that hold the tensor."""
    owners = {}
    for name in model.state_dict():
        path, _, attribute = name.rpartition(".")
        owners[name] = model.get_submodule(path), attribute
    return owners


def _assign(module: nn.Module, attribute: str, value: Tensor) -> None:
    current = getattr(module, attribute)
    if isinstance(current, nn.Parameter):
        current.data = value
        current.grad = None
    else:
        module._buffers[attribute] = value


def _conv_setter(module: nn.modules.conv._ConvNd):
    whole = loses_whole_conv_groups(
        module.in_channels, module.out_channels, module.groups
    )
    first_axis = module.in_channels if module.transposed else module.out_channels
    per_group = first_axis // module.groups

    def update() -> None:
        if whole:
            module.groups = module.weight.shape[0] // per_group
        ends = module.weight.shape[0], module.weight.shape[1] * module.groups
        module.out_channels, module.in_channels = (
            reversed(ends) if module.transposed else ends
        )

    return update


def _norm_setter(module: nn.Module):
    def update() -> None:
        tensor = module.weight if module.weight is not None else module.running_mean
        if tensor is not None:
            module.num_features = len(tensor)

    return update


def _layer_norm_setter(module: nn.LayerNorm):
    def update() -> None:
        if module.weight is not None:
            module.normalized_shape = tuple(module.weight.shape)

    return update


def _group_norm_setter(module: nn.GroupNorm):
    whole = loses_whole_conv_groups(
        module.num_channels, module.num_channels, module.num_groups
    )
    per_group = module.num_channels // module.num_groups

    def update() -> None:
        if module.weight is not None:
            module.num_channels = len(module.weight)
            module.num_groups = (
                module.num_channels // per_group if whole else module.num_groups
            )

    return update


def _linear_setter(module: nn.Linear):
    def update() -> None:
        module.out_features, module.in_features = module.weight.shape

    return update


def _attention_setter(module: OpenMultiheadAttention):
    def update() -> None:
        module.embed_dim = module.kdim = module.vdim = module.in_proj_weight.shape[1]
        module.num_heads = len(module.scale)
        module.head_dim = len(module.in_proj_weight) // 3 // module.num_heads

    return update


def _vision_transformer_setter(module: nn.Module):
    def update() -> None:
        module.hidden_dim = module.class_token.shape[-1]

    return update


def _timm_attention_setter(module: nn.Module):
    def update() -> None:
        module.num_heads, module.attn_dim = (
            len(module.scale),
            module.qkv.weight.shape[0] // 3,
        )
        module.head_dim = module.attn_dim // module.num_heads

    return update


def _timm_windows_setter(module: nn.Module):
    def update() -> None:
        module.num_heads = module.relative_position_bias_table.shape[1]

    return update


# What a module's code reads back besides its tensors: module class -> function that
# takes the dense module and returns an update, called whenever its tensors have
# changed. An own module class, or its full name, needs one entry.
ATTRIBUTE_SETTERS: dict[
    type[nn.Module] | str, Callable[[nn.Module], Callable[[], None]]
] = {
    nn.modules.conv._ConvNd: _conv_setter,
    nn.modules.batchnorm._NormBase: _norm_setter,
    nn.LayerNorm: _layer_norm_setter,
    nn.GroupNorm: _group_norm_setter,
    nn.Linear: _linear_setter,
    OpenMultiheadAttention: _attention_setter,
    "torchvision.models.vision_transformer.VisionTransformer": _vision_transformer_setter,
    "timm.layers.attention.Attention": _timm_attention_setter,
    "timm.models.swin_transformer.WindowAttention": _timm_windows_setter,
}


def _attribute_setters(model: nn.Module) -> list[Callable[[], None]]:
    """The updates of all modules, inner ones first, so that an outer one may read what
    they have set.
    """
    return [
        make(module)
        for module in reversed(list(model.modules()))
        for known, make in ATTRIBUTE_SETTERS.items()
        if is_a(module, known)
    ]
