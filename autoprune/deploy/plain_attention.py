"""Scaled dot-product attention as products and a softmax, for exporters without it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class PlainAttention(TorchFunctionMode):
    """Within it, attention runs as the operations that it consists of.

    PyTorch's exporter to ONNX knows attention of four axes alone, and takes the layout
    of its result from another kernel than the one that ran.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs one function of PyTorch."""
        if func is functional.scaled_dot_product_attention:
            func = plain_attention
        return func(*args, **(kwargs or {}))


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What `torch.nn.functional.scaled_dot_product_attention` computes.

    Args:
        query: `(..., heads, n, width)`.
        key: `(..., heads, m, width)`.
        value: `(..., heads, m, width_out)`.
        attn_mask: Added to the logits `(..., heads, n, m)`; a boolean one says which of
            them count.
        dropout_p: Share of the weights that are dropped.
        is_causal: Whether position i of n reads the first i + 1 of m alone.
        scale: Factor of the logits (None: one over the root of the width).
        enable_gqa: Whether several heads of the query share one of key and value.

    Returns:
        `(..., heads, n, width_out)`.
    """
    if enable_gqa:
        n_shared = query.shape[-3] // key.shape[-3]
        key = key.repeat_interleave(n_shared, -3)
        value = value.repeat_interleave(n_shared, -3)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    logits = (query * factor) @ key.transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones_like(logits, dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        logits = logits + attn_mask
    weights = logits.softmax(-1)
    if dropout_p:
        weights = functional.dropout(weights, dropout_p)
    return weights @ value
