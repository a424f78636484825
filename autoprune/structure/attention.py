"""Attention modules in which the number of heads and their width are free.

The code of the original ones insists that heads x width equals the embedding.
`open_attention` exchanges their class for one without that insistence: same parameters,
same function, but the number of heads and their width are read off the parameters. So
heads, widths and the residual stream can be pruned independently.

`OPEN_CLASSES` maps a module class to its open one; the entry of a class of your own is
a subclass of it and of `OpenAttention` with another `forward`. timm's modules leave
that freedom already; `ADAPTERS` make them take heads and scale from tensors. Classes of
other libraries go by their full names, so that nothing is imported for networks that
don't use them.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def open_attention(model: nn.Module) -> nn.Module:
    """Opens every attention module inside a network, in place.

    Modules that are open already are left alone.

    Args:
        model: The network.

    Returns:
        The same network.
    """
    for module in model.modules():
        open_class = _open_class_of(module)
        if open_class is not None and open_class.supports(module):
            # The module stays the same object with the same parameters; only which
            # code runs is exchanged.
            module.__class__ = open_class
            assert isinstance(module, OpenAttention), "it is of that class now"
            module.prepare()
        for known, adapt in ADAPTERS.items():
            if is_instance_of(module, known):
                adapt(module)
    return model


def _open_class_of(module: nn.Module) -> "type[OpenAttention] | None":
    """The open class of a module, imported only if a network has such a module."""
    # Of exactly that class: a subclass may compute something else.
    open_name = OPEN_CLASSES.get(_full_name(type(module)))
    if open_name is None:
        return None
    # Imported here, so that other networks do without torchvision.
    home, _, name = open_name.rpartition(".")
    return getattr(importlib.import_module(home), name)


def is_instance_of(module: nn.Module, known: type[nn.Module] | str) -> bool:
    """Whether a module is of a class or of one that inherits from it.

    Args:
        module: The module.
        known: The class; or, for libraries that needn't be installed, its full name.
    """
    if isinstance(known, type):
        return isinstance(module, known)
    return known in _full_names(type(module))


@functools.cache
def _full_names(kind: type) -> frozenset[str]:
    """The full names of a class and of those that it inherits from."""
    return frozenset(map(_full_name, kind.__mro__))


def _full_name(kind: type) -> str:
    """Module and name of a class, such as "torch.nn.modules.linear.Linear"."""
    return f"{kind.__module__}.{kind.__qualname__}"


class OpenAttention(nn.Module):
    """What an open class has to have beside its `forward`.

    This one takes every configuration and has nothing to prepare.
    """

    @staticmethod
    def supports(module: nn.Module) -> bool:
        """Whether the open class computes what a module does, as that is configured.

        Args:
            module: A module of the original class.
        """
        return True

    def prepare(self) -> None:
        """Called once, on the dense module, when it is opened."""


class OpenMultiheadAttention(OpenAttention, nn.MultiheadAttention):
    """`nn.MultiheadAttention`, its projections packed or of widths of their own.

    Attributes:
        scale: A buffer with one value for each head, `(n_heads, 1, 1)`; so it says how
            many heads there are.
    """

    scale: Tensor

    @staticmethod
    def supports(module: nn.Module) -> bool:
        """Whether this is the common configuration.

        That is no extra key or value.

        Args:
            module: An `nn.MultiheadAttention`.
        """
        assert isinstance(module, nn.MultiheadAttention), "see OPEN_CLASSES"
        return module.bias_k is None and not module.add_zero_attn

    def prepare(self) -> None:
        """Registers the dense network's scale."""
        # That of the dense width, which the weights were trained with.
        scale = self.out_proj.weight.detach().new_full(
            (self.num_heads, 1, 1), self.head_dim**-0.5
        )
        self.register_buffer("scale", scale)
        # PyTorch's fused encoder layer, which knows nothing of free heads, steps aside.
        self._qkv_same_embed_dim = False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`, of batches only.

        Args:
            query: `(batch, n_queries, width)` if `batch_first`, else with the first two
                axes swapped; so are the others.
            key: `(batch, n_keys, width)`.
            value: `(batch, n_keys, width)`.
            key_padding_mask: Keys to ignore, `(batch, n_keys)`; bool, or added to the
                logits.
            need_weights: Whether to return the weights.
            attn_mask: Pairs to ignore, `(n_queries, n_keys)` or one for each batch
                entry and head, `(batch * n_heads, n_queries, n_keys)`; bool or added.
            average_attn_weights: Whether to average the weights over heads.
            is_causal: Only a hint, as in PyTorch; `attn_mask` says what is ignored.

        Returns:
            The output, shaped as the query, and the weights or None.
        """
        if query.dim() != 3:
            raise ValueError(
                f"pruned attention takes batches of three axes, got "
                f"{tuple(query.shape)}"
            )
        q, k, v = self._project(query, key, value)
        # One scale for each head; PyTorch's own products would take one for all.
        q = q * self.scale.to(q.dtype)
        mask = _combine_masks(attn_mask, key_padding_mask, q)
        if not need_weights:
            dropout = self.dropout if self.training else 0.0
            # The queries are scaled already.
            x = functional.scaled_dot_product_attention(
                q, k, v, mask, dropout, scale=1.0
            )
            return self._join_heads(x), None
        logits = q @ k.transpose(-2, -1)
        if mask is not None:
            logits = logits + mask
        weights = logits.softmax(-1)
        x = functional.dropout(weights, self.dropout, self.training) @ v
        return self._join_heads(x), weights.mean(1) if average_attn_weights else weights

    def _project(
        self, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of each head, `(batch, n_heads, n, width)` each."""
        n_heads = len(self.scale)
        if not self.batch_first:
            query = query.transpose(0, 1)
            key = key.transpose(0, 1)
            value = value.transpose(0, 1)
        # One product for all three. Three transposed views of one tensor don't count as
        # the same here; they are told apart by identity, not by what they hold.
        if self.in_proj_weight is not None and query is key is value:
            packed = functional.linear(query, self.in_proj_weight, self.in_proj_bias)
            q, k, v = packed.unflatten(-1, (3, n_heads, -1)).permute(2, 0, 3, 1, 4)
            return q, k, v
        # Keys and values of other widths have weights of their own; biases are packed.
        if self.in_proj_weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        else:
            weights = self.in_proj_weight.chunk(3)
        biases = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        heads = []
        for x, weight, bias in zip((query, key, value), weights, biases, strict=True):
            projected = functional.linear(x, weight, bias)
            heads.append(projected.unflatten(-1, (n_heads, -1)).transpose(1, 2))
        q, k, v = heads
        return q, k, v

    def _join_heads(self, x: Tensor) -> Tensor:
        """The output of all heads, `(batch, n_heads, n, width)`, put together."""
        x = self.out_proj(x.transpose(1, 2).flatten(2))
        return x if self.batch_first else x.transpose(0, 1)


def _combine_masks(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, like: Tensor
) -> Tensor | None:
    """What is added to the logits, from masks of both kinds, or None.

    Args:
        attn_mask: One for all, `(n_queries, n_keys)`, or one for each batch entry and
            head, `(batch * n_heads, n_queries, n_keys)`.
        key_padding_mask: Keys hidden from every query, `(batch, n_keys)`.
        like: A tensor with the batch in front and the dtype of the logits.

    Returns:
        A tensor that broadcasts to `(batch, n_heads, n_queries, n_keys)`.
    """
    pairs = None
    if attn_mask is not None:
        pairs = _additive(attn_mask, like)
        # PyTorch packs batch and heads into one axis; here they are two.
        if pairs.dim() != 2:
            pairs = pairs.unflatten(0, (len(like), -1))
    if key_padding_mask is None:
        return pairs
    keys = _additive(key_padding_mask, like)[:, None, None, :]
    return keys if pairs is None else pairs + keys


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """A mask to add: minus infinity where a boolean one hides a key.

    Other masks are additive already.
    """
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -torch.inf)


OPEN_CLASSES: dict[str, str] = {
    "torch.nn.modules.activation.MultiheadAttention": (
        "autoprune.structure.attention.OpenMultiheadAttention"
    ),
    "torchvision.models.swin_transformer.ShiftedWindowAttention": (
        "autoprune.structure.windows.OpenShiftedWindowAttention"
    ),
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": (
        "autoprune.structure.windows.OpenShiftedWindowAttentionV2"
    ),
    "torchvision.models.maxvit.RelativePositionalMultiHeadAttention": (
        "autoprune.structure.windows.OpenRelativeAttention"
    ),
}
"""Full name of a class, which has to be a module's own, to that of its open one."""


def _scale_by_head(module: Any) -> None:
    """Turns timm's one scale into a buffer with one value for each head."""
    if "scale" not in module._buffers:
        scale = module.qkv.weight.detach().new_full(
            (module.num_heads, 1, 1), module.scale
        )
        # A number so far; the name has to be free before a buffer can have it.
        del module.scale
        module.register_buffer("scale", scale)
    # The fused path takes one scale only.
    module.fused_attn = False


def _keep_trained_scale(module: Any) -> None:
    """Keeps the scale that the weights were trained with, whatever width is left."""
    # Outside the fused path it is a constant.
    module.fused_attn = False


ADAPTERS: dict[type[nn.Module] | str, Callable[[Any], None]] = {
    "timm.layers.attention.Attention": _scale_by_head,
    "timm.models.swin_transformer.WindowAttention": _keep_trained_scale,
}
"""Module class, or its full name, to what frees its heads, in place.

Applied to the class and what inherits from it; more than once, so the second time has
to change nothing. The module is Any, since each adapter knows its own class only.
"""
