"""Real structured pruning.

A `Slicer` holds one copy of the network and lays the kept channels of the dense tensors into it, as often as asked:
`prune` does so once, the proxy thousands of times.
"""

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from autoprune.attention import OpenMultiheadAttention, is_a, open_attention
from autoprune.groups import Groups, loses_whole_conv_groups, own_tensors, positions, removed

Kept = Mapping[str, Tensor]
"""Prunable group to the channels that survive, int64, ascending."""


def top_channels(importance: Mapping[str, Tensor], kept: Mapping[str, int]) -> dict[str, Tensor]:
    """The `kept` most important channels of each group, ascending.

    Args:
        importance: Group to scores `(n_channels,)`, higher is kept.
        kept: Group to the number of channels to keep; groups left out keep all.
    """
    return {name: importance[name].topk(count).indices.sort().values for name, count in kept.items()}


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers are new objects over the same memory: cheap, as long as nobody writes."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): _alias(tensor) for tensor in tensors})


def _alias(tensor: Tensor) -> Tensor:
    alias = tensor.detach()
    return nn.Parameter(alias, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else alias


class Slicer:
    """Lays sub-models of one dense network into one reused copy of it.

    Args:
        model: The dense network; it is never changed.
        groups: Its trace.
        borrow: Read the weights from `model` at every call rather than from a copy made now.
    """

    def __init__(self, model: nn.Module, groups: Groups, borrow: bool = False):
        self.groups = groups
        dense = open_attention(shared_copy(model) if borrow else copy.deepcopy(model))
        self.model = shared_copy(dense)
        self._dense = {name: tensor.detach() for name, tensor in own_tensors(dense).items()}
        self._owners = _owners(self.model)
        self._attributes = _attribute_setters(self.model)

    def apply(self, kept: Kept) -> nn.Module:
        """The sub-model with exactly the kept channels; the same object at every call, valid until the next."""
        for name, axes in self._kept_positions(kept).items():
            tensor = self._dense[name]
            for axis, index in axes.items():
                tensor = tensor.index_select(axis, index)
            _assign(*self._owners[name], tensor if axes else tensor.clone())
        for update in self._attributes:
            update()
        return self.model

    def _kept_positions(self, kept: Kept) -> dict[str, dict[int, Tensor]]:
        alive: dict[str, dict[int, Tensor]] = {name: {} for name in self._dense}
        for group in self.groups:
            gone = removed(group, kept)
            if not gone.any():
                continue
            for member in group.members:
                axes, length = alive[member.tensor], self.groups.shapes[member.tensor][member.axis]
                mask = axes.setdefault(member.axis, torch.ones(length, dtype=torch.bool))
                mask[positions(member, gone)] = False
        return {name: {axis: mask.nonzero()[:, 0] for axis, mask in axes.items()} for name, axes in alive.items()}


def prune(model: nn.Module, groups: Groups, kept: Kept) -> nn.Module:
    """A new, smaller network of the same class with exactly the kept channels; the original is untouched.

    Attention modules come out as those of `autoprune.attention`, where the number of heads and their width are free.

    Args:
        model: The dense network that `groups` was traced from.
        groups: Its trace.
        kept: Prunable group to the surviving channels (`top_channels`); groups left out keep all.
    """
    return Slicer(model, groups, borrow=True).apply(kept)


def fit_shapes(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Gives every parameter and buffer of `model`, in place, the shape that it has in `state_dict`, and its values.

    Module attributes that the code reads back (`out_channels`, `num_features`, ...) follow the shapes; attention
    modules are opened as `prune` does.
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
    whole = loses_whole_conv_groups(module.in_channels, module.out_channels, module.groups)
    first_axis = module.in_channels if module.transposed else module.out_channels
    per_group = first_axis // module.groups

    def update() -> None:
        if whole:
            module.groups = module.weight.shape[0] // per_group
        ends = module.weight.shape[0], module.weight.shape[1] * module.groups
        module.out_channels, module.in_channels = reversed(ends) if module.transposed else ends

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
    whole = loses_whole_conv_groups(module.num_channels, module.num_channels, module.num_groups)
    per_group = module.num_channels // module.num_groups

    def update() -> None:
        if module.weight is not None:
            module.num_channels = len(module.weight)
            module.num_groups = module.num_channels // per_group if whole else module.num_groups

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
        module.num_heads, module.attn_dim = len(module.scale), module.qkv.weight.shape[0] // 3
        module.head_dim = module.attn_dim // module.num_heads

    return update


def _timm_windows_setter(module: nn.Module):
    def update() -> None:
        module.num_heads = module.relative_position_bias_table.shape[1]

    return update


# What a module's code reads back besides its tensors: module class -> function that takes the dense module and returns
# an update, called whenever its tensors have changed. An own module class, or its full name, needs one entry.
ATTRIBUTE_SETTERS: dict[type[nn.Module] | str, Callable[[nn.Module], Callable[[], None]]] = {
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
    """The updates of all modules, inner ones first, so that an outer one may read what they have set."""
    return [
        make(module)
        for module in reversed(list(model.modules()))
        for known, make in ATTRIBUTE_SETTERS.items()
        if is_a(module, known)
    ]
