"""Attention modules whose code insists that heads x width equals the embedding, with
that insistence taken out.

`open_attention` exchanges their class for one of this module: same parameters, same
function, but the number of heads and their width are read off the parameters. So heads,
widths and the residual stream can be pruned independently. `OPEN` maps a module class
to its open one; the entry of an own class is a subclass with another `forward`. timm's
modules leave that freedom already; `FREED` makes them take heads and scale from
tensors. Classes of other libraries go by their full names, so that nothing is imported
for networks that don't use them.
"""

import functools
import importlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def open_attention(model: nn.Module) -> nn.Module:
    """Opens every attention module of `OPEN` inside `model`, in place; returns it. Open
    ones are left alone.
    """
    for module in model.modules():
        home, _, name = OPEN.get(_full_name(type(module)), "").rpartition(".")
        opened = getattr(importlib.import_module(home), name) if home else None
        if opened is not None and opened.fits(module):
            module.__class__ = opened
            module.prepare()
        for known, free in FREED.items():
            if is_a(module, known):
                free(module)
    return model


def is_a(module: nn.Module, known: type[nn.Module] | str) -> bool:
    """Whether a module is of a class, given as such or, for libraries that needn't be
    installed, by its full name.
    """
    if isinstance(known, type):
        return isinstance(module, known)
    return known in _full_names(type(module))


@functools.cache
def _full_names(kind: type) -> frozenset[str]:
    """Of a class and of those that it inherits from."""
    return frozenset(map(_full_name, kind.__mro__))


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


class Open:
    """What an open class has to have beside its `forward`; this one takes every
    configuration and has nothing to do.
    """

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether a module's configuration is one that the open class computes."""
        return True

    def prepare(self) -> None:
        """Called once, on the dense module."""


class OpenMultiheadAttention(Open, nn.MultiheadAttention):
    """`nn.MultiheadAttention` with packed projections. A buffer `scale`, one value a
    head, says how many there are.
    """

    @staticmethod
    def fits(module: nn.MultiheadAttention) -> bool:
        """Whether this is the common configuration: one embedding, no extra key or
        value.
        """
        return (
            module._qkv_same_embed_dim
            and module.bias_k is None
            and not module.add_zero_attn
        )

    def prepare(self) -> None:
        """Registers the dense network's scale; PyTorch's fused encoder layer steps
        aside.
        """
        scale = self.in_proj_weight.detach().new_full(
            (self.num_heads, 1, 1), self.head_dim**-0.5
        )
        self.register_buffer("scale", scale)
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
        """As `nn.MultiheadAttention.forward`."""
        if query.dim() != 3:
            raise ValueError(
                f"pruned attention takes batches of three axes, got "
                f"{tuple(query.shape)}"
            )
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if query is key is value:
            q, k, v = (
                F.linear(query, weight, bias)
                .unflatten(-1, (3, len(self.scale), -1))
                .permute(2, 0, 3, 1, 4)
            )
        else:
            biases = bias.chunk(3) if bias is not None else [None] * 3
            parts = zip((query, key, value), weight.chunk(3), biases, strict=True)
            q, k, v = (
                F.linear(x, w, b).unflatten(-1, (len(self.scale), -1)).transpose(1, 2)
                for x, w, b in parts
            )
        q = q * self.scale.to(q.dtype)
        mask = _mask(attn_mask, key_padding_mask, q)
        if need_weights:
            logits = q @ k.transpose(-2, -1)
            weights = (logits if mask is None else logits + mask).softmax(-1)
            x = F.dropout(weights, self.dropout, self.training) @ v
        else:
            dropout = self.dropout if self.training else 0.0
            x = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=1.0)
        x = self.out_proj(x.transpose(1, 2).flatten(2))
        x = x if self.batch_first else x.transpose(0, 1)
        if not need_weights:
            return x, None
        return x, weights.mean(1) if average_attn_weights else weights


def _mask(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, like: Tensor
) -> Tensor | None:
    """What is added to the logits: a mask for all, or one a batch entry and head; and
    keys hidden from every query.
    """
    masks = []
    if attn_mask is not None:
        mask = _additive(attn_mask, like)
        masks.append(mask if mask.dim() == 2 else mask.unflatten(0, (len(like), -1)))
    if key_padding_mask is not None:
        masks.append(_additive(key_padding_mask, like)[:, None, None, :])
    return sum(masks) if masks else None


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """Minus infinity where a boolean mask hides a key; other masks are additive
    already.
    """
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -torch.inf)


OPEN: dict[str, str] = {
    "torch.nn.modules.activation.MultiheadAttention": "autoprune.structure.attention.OpenMultiheadAttention",
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


def _scale_by_head(module: nn.Module) -> None:
    """The scale becomes a buffer with one value a head; the fused path, which knows one
    scale only, is left.
    """
    if "scale" not in module._buffers:
        scale = module.qkv.weight.detach().new_full(
            (module.num_heads, 1, 1), module.scale
        )
        del module.scale
        module.register_buffer("scale", scale)
    module.fused_attn = False


def _scale_as_trained(module: nn.Module) -> None:
    """Outside the fused path the scale is a constant, whatever width is left."""
    module.fused_attn = False


FREED: dict[type[nn.Module] | str, Callable[[nn.Module], None]] = {
    "timm.layers.attention.Attention": _scale_by_head,
    "timm.models.swin_transformer.WindowAttention": _scale_as_trained,
}
