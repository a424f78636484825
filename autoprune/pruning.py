"""Real structured pruning, and masking, its numerical twin.

A `Slicer` holds one copy of the network and lays the kept channels of the dense tensors into it, as often as asked:
`prune` does so once, the proxy thousands of times.
"""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from autoprune.groups import Groups, own_tensors, positions

Kept = Mapping[str, Tensor]
"""Prunable group to the channels that survive, int64, ascending."""


def top_channels(importance: Mapping[str, Tensor], kept: Mapping[str, int]) -> dict[str, Tensor]:
    """The `kept` most important channels of each group, ascending.

    Args:
        importance: Group to scores `(n_channels,)`, higher is kept.
        kept: Group to the number of channels to keep; groups left out keep all.
    """
    return {name: importance[name].topk(count).indices.sort().values for name, count in kept.items()}


class Slicer:
    """Lays sub-models of one dense network into one reused copy of it.

    Args:
        model: The dense network; it is copied and never changed.
        groups: Its trace.
    """

    def __init__(self, model: nn.Module, groups: Groups):
        self.groups = groups
        self.model = copy.deepcopy(model)
        self._dense = {name: tensor.detach().clone() for name, tensor in own_tensors(model).items()}
        self._owners = _owners(self.model)
        self._attributes = [_attribute_setter(module) for module in self.model.modules()]

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
            gone = torch.ones(group.channels, dtype=torch.bool)
            gone[kept.get(group.name, slice(None))] = False
            if not gone.any():
                continue
            for member in group.members:
                axes, length = alive[member.tensor], self.groups.shapes[member.tensor][member.axis]
                mask = axes.setdefault(member.axis, torch.ones(length, dtype=torch.bool))
                mask[positions(member, gone)] = False
        return {name: {axis: mask.nonzero()[:, 0] for axis, mask in axes.items()} for name, axes in alive.items()}


def prune(model: nn.Module, groups: Groups, kept: Kept) -> nn.Module:
    """A new, smaller network of the same class with exactly the kept channels; the original is untouched.

    Args:
        model: The dense network that `groups` was traced from.
        groups: Its trace.
        kept: Prunable group to the surviving channels (`top_channels`); groups left out keep all.
    """
    return Slicer(model, groups).apply(kept)


def mask(model: nn.Module, groups: Groups, kept: Kept) -> nn.Module:
    """A dense copy in which nothing reads the removed channels: its output is what the pruned network's must be.

    Channels are masked where they are consumed, by zeroing the weights that read them; so neither batch norm's shift
    nor a bias keeps a removed channel alive.
    """
    masked = copy.deepcopy(model)
    tensors = masked.state_dict()
    for group in groups:
        gone = torch.ones(group.channels, dtype=torch.bool)
        gone[kept.get(group.name, slice(None))] = False
        for member in group.consumers:
            tensors[member.tensor].index_fill_(member.axis, positions(member, gone), 0)
    return masked


def fit_shapes(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Gives every parameter and buffer of `model`, in place, the shape that it has in `state_dict`, and its values.

    Module attributes that the code reads back (`out_channels`, `num_features`, ...) follow the shapes.
    """
    setters = [_attribute_setter(module) for module in model.modules()]
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
    depthwise = module.groups > 1 and module.groups == module.in_channels
    multiplier = module.out_channels // module.groups
    out_axis, in_axis = (1, 0) if module.transposed else (0, 1)

    def update() -> None:
        module.out_channels = module.weight.shape[out_axis]
        if depthwise:
            module.groups = module.out_channels // multiplier
        module.in_channels = module.weight.shape[in_axis] * module.groups

    return update


def _batch_norm_setter(module: nn.modules.batchnorm._BatchNorm):
    def update() -> None:
        tensor = module.weight if module.weight is not None else module.running_mean
        if tensor is not None:
            module.num_features = len(tensor)

    return update


def _linear_setter(module: nn.Linear):
    def update() -> None:
        module.out_features, module.in_features = module.weight.shape

    return update


# What a module's code reads back besides its tensors; an own module class needs one entry.
ATTRIBUTE_SETTERS = {
    nn.modules.conv._ConvNd: _conv_setter,
    nn.modules.batchnorm._BatchNorm: _batch_norm_setter,
    nn.Linear: _linear_setter,
}


def _attribute_setter(module: nn.Module):
    for module_class, make in ATTRIBUTE_SETTERS.items():
        if isinstance(module, module_class):
            return make(module)
    return lambda: None
