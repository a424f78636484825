"""What a module's code reads back besides its tensors, and how it follows their shapes.

Pruning changes tensors. A convolution also says in `out_channels` how many channels it
has, and some code reads that. `ATTRIBUTE_SETTERS` keeps such attributes true, and is
where a module class of your own comes in.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from autoprune.structure.attention import OpenMultiheadAttention
from autoprune.structure.groups import loses_whole_conv_groups

Update: TypeAlias = Callable[[], None]
"""Sets the attributes of one module by the tensors that it has now."""

AttributeSetter: TypeAlias = Callable[[Any], Update]
"""From a dense module to its update; see `ATTRIBUTE_SETTERS`.

The module is Any, since each entry takes modules of its own class only.
"""


def _weight_shape(module: nn.Linear | _ConvNd) -> torch.Size:
    """The shape of a layer's weight, also where it is computed from others."""
    if parametrize.is_parametrized(module, "weight"):
        computed = module.get_submodule("parametrizations.weight")
        assert isinstance(computed, parametrize.ParametrizationList), "as PyTorch does"
        # PyTorch has checked that the shape stays, unless it was asked not to.
        if computed.is_tensor and not computed.unsafe:
            return computed.original.shape
        was_training = computed.training
        # In training, spectral norm's vectors would move whenever somebody looks.
        computed.eval()
        with torch.no_grad():
            shape = computed().shape
        computed.train(was_training)
        return shape
    # Older norms compute the weight anew before each forward pass.
    for name in ("weight_v", "weight_orig"):
        if name in module._parameters:
            return module.get_parameter(name).shape
    return module.weight.shape


def _conv_setter(module: _ConvNd) -> Update:
    """Channels and groups of a convolution, from its weight."""
    loses_groups = loses_whole_conv_groups(
        module.in_channels, module.out_channels, module.groups
    )
    # A transposed convolution's weight has its inputs in front.
    n_first = module.in_channels if module.transposed else module.out_channels
    channels_per_group = n_first // module.groups

    def update() -> None:
        # Groups first, since the other axis counts the channels of one group only.
        first, per_group = _weight_shape(module)[:2]
        if loses_groups:
            module.groups = first // channels_per_group
        second = per_group * module.groups
        if module.transposed:
            module.in_channels = first
            module.out_channels = second
        else:
            module.out_channels = first
            module.in_channels = second

    return update


def _norm_setter(module: _NormBase) -> Update:
    """Channels of a batch or instance norm, from its weight or its mean."""

    def update() -> None:
        tensor = module.weight if module.weight is not None else module.running_mean
        # Without either it has no idea of its width, and works on any.
        if tensor is not None:
            module.num_features = len(tensor)

    return update


def _layer_norm_setter(module: nn.LayerNorm) -> Update:
    """Normalized axes of a layer norm, from its weight."""

    def update() -> None:
        if module.weight is not None:
            module.normalized_shape = tuple(module.weight.shape)

    return update


def _group_norm_setter(module: nn.GroupNorm) -> Update:
    """Channels and groups of a group norm, from its weight."""
    loses_groups = loses_whole_conv_groups(
        module.num_channels, module.num_channels, module.num_groups
    )
    channels_per_group = module.num_channels // module.num_groups

    def update() -> None:
        if module.weight is None:
            return
        module.num_channels = len(module.weight)
        if loses_groups:
            module.num_groups = module.num_channels // channels_per_group

    return update


def _linear_setter(module: nn.Linear) -> Update:
    """Features of a linear layer, from its weight."""

    def update() -> None:
        # `(out, in)`, the other way round than in the constructor.
        module.out_features, module.in_features = _weight_shape(module)

    return update


def _recurrent_setter(module: nn.RNNBase) -> Update:
    """Widths of a stack of recurrent layers, from its first layer's weights."""
    n_gates = len(module.get_parameter("weight_ih_l0")) // module.hidden_size

    def update() -> None:
        n_rows, module.input_size = module.get_parameter("weight_ih_l0").shape
        module.hidden_size = n_rows // n_gates
        if module.proj_size:
            module.proj_size = len(module.get_parameter("weight_hr_l0"))
        # On GPUs the weights lie in one piece of memory, which is made anew.
        module.flatten_parameters()

    return update


def _recurrent_cell_setter(module: nn.RNNCellBase) -> Update:
    """Widths of a recurrent cell, from its weights."""

    def update() -> None:
        # `(n_gates * hidden, hidden)`
        module.hidden_size = module.weight_hh.shape[1]
        module.input_size = module.weight_ih.shape[1]

    return update


def _attention_setter(module: OpenMultiheadAttention) -> Update:
    """Widths and heads of an opened attention, from its projection and scale."""

    def update() -> None:
        module.num_heads = len(module.scale)
        if module.in_proj_weight is None:
            n_rows, module.embed_dim = module.q_proj_weight.shape
            module.kdim = module.k_proj_weight.shape[1]
            module.vdim = module.v_proj_weight.shape[1]
        else:
            width = module.in_proj_weight.shape[1]
            module.embed_dim = width
            module.kdim = width
            module.vdim = width
            # The rows are those of queries, keys and values.
            n_rows = len(module.in_proj_weight) // 3
        module.head_dim = n_rows // module.num_heads

    return update


def _vision_transformer_setter(module: Any) -> Update:
    """Width of torchvision's vision transformer, from its class token."""

    def update() -> None:
        module.hidden_dim = module.class_token.shape[-1]

    return update


def _timm_attention_setter(module: Any) -> Update:
    """Heads and widths of timm's attention, from its scale and projection."""

    def update() -> None:
        # `scale` has one value for each head since the module was adapted.
        module.num_heads = len(module.scale)
        module.attn_dim = module.qkv.weight.shape[0] // 3
        module.head_dim = module.attn_dim // module.num_heads

    return update


def _timm_windows_setter(module: Any) -> Update:
    """Heads of timm's window attention, from its table of biases."""

    def update() -> None:
        # `(n_places, n_heads)`
        module.num_heads = module.relative_position_bias_table.shape[1]

    return update


ATTRIBUTE_SETTERS: dict[type[nn.Module] | str, AttributeSetter] = {
    _ConvNd: _conv_setter,
    _NormBase: _norm_setter,
    nn.LayerNorm: _layer_norm_setter,
    nn.GroupNorm: _group_norm_setter,
    nn.Linear: _linear_setter,
    nn.RNNBase: _recurrent_setter,
    nn.RNNCellBase: _recurrent_cell_setter,
    OpenMultiheadAttention: _attention_setter,
    "torchvision.models.vision_transformer.VisionTransformer": (
        _vision_transformer_setter
    ),
    "timm.layers.attention.Attention": _timm_attention_setter,
    "timm.models.swin_transformer.WindowAttention": _timm_windows_setter,
}
"""Module class, or its full name, to what keeps its attributes true after pruning.

A class of your own needs an entry where tracing doesn't see which size its code reads:
integers in attributes, and in lists and tuples there, follow by themselves. For
example, an attention that splits its channels with `x.unflatten(-1,
(self.config["heads"], -1))`, and whose buffer `scale` has one value for each head:

```python
def heads(module):
    def update():
        module.config = {"heads": len(module.scale)}

    return update


ATTRIBUTE_SETTERS[MyAttention] = heads
```

`heads` is called once with each dense module of the class, and may note what only that
one can tell, such as how many channels a group has. `update` is called whenever the
tensors have changed. It works from their shapes, or from attributes of inner modules,
which are updated first. An entry holds for subclasses too, and a module that several
entries mean gets all of their updates.

A full name, such as "timm.layers.attention.Attention", saves the import of a library
that a network may not need.
"""
