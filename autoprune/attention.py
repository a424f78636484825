"""Attention modules whose code insists that heads x width equals the embedding, with that insistence taken out.

`open_attention` exchanges their class for one of this module: same parameters, same function, but the number of heads
and their width are read off the parameters. So heads, widths and the residual stream can be pruned independently.
`OPEN` maps a module class to its open one; the entry of an own class is a subclass with another `forward`. timm's
modules leave that freedom already; `FREED` makes them take heads and scale from tensors.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2


def open_attention(model: nn.Module) -> nn.Module:
    """Opens every attention module of `OPEN` inside `model`, in place; returns it. Open ones are left alone."""
    for module in model.modules():
        opened = OPEN.get(type(module))
        if opened is not None and opened.fits(module):
            module.__class__ = opened
            module.prepare()
        for known, free in FREED.items():
            if is_a(module, known):
                free(module)
    return model


def is_a(module: nn.Module, known: type[nn.Module] | str) -> bool:
    """Whether a module is of a class, given as such or, for libraries that needn't be installed, by its full name."""
    if isinstance(known, type):
        return isinstance(module, known)
    return any(f"{parent.__module__}.{parent.__qualname__}" == known for parent in type(module).__mro__)


class OpenMultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` with packed projections. A buffer `scale`, one value a head, says how many there are."""

    @staticmethod
    def fits(module: nn.MultiheadAttention) -> bool:
        """Whether this is the common configuration: one embedding, no extra key or value."""
        return module._qkv_same_embed_dim and module.bias_k is None and not module.add_zero_attn

    def prepare(self) -> None:
        """Registers the dense network's scale; PyTorch's fused encoder layer steps aside."""
        scale = self.in_proj_weight.detach().new_full((self.num_heads, 1, 1), self.head_dim**-0.5)
        self.register_buffer("scale", scale)
        self._qkv_same_embed_dim = False

    def forward(  # noqa: PLR0913
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
            raise ValueError(f"pruned attention takes batches of three axes, got {tuple(query.shape)}")
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if query is key is value:
            q, k, v = F.linear(query, weight, bias).unflatten(-1, (3, len(self.scale), -1)).permute(2, 0, 3, 1, 4)
        else:
            biases = bias.chunk(3) if bias is not None else [None] * 3
            parts = zip((query, key, value), weight.chunk(3), biases, strict=True)
            q, k, v = (F.linear(x, w, b).unflatten(-1, (len(self.scale), -1)).transpose(1, 2) for x, w, b in parts)
        q = q * self.scale.to(q.dtype)
        mask = _combined(_additive(attn_mask, q), key_padding_mask)
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


def _additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A mask to add to the logits, broadcast over batch and heads where it is one for all."""
    if mask is None:
        return None
    mask = _hidden(mask).to(like.dtype)
    return mask if mask.dim() == 2 else mask.unflatten(0, (len(like), -1))


def _hidden(mask: Tensor) -> Tensor:
    """Minus infinity where a boolean mask hides a key; other masks are additive already."""
    return torch.zeros(mask.shape).masked_fill(mask, float("-inf")) if mask.dtype == torch.bool else mask


def _combined(mask: Tensor | None, padding: Tensor | None) -> Tensor | None:
    """Adds what `(batch, keys)` hides from every query."""
    if padding is None:
        return mask
    padding = padding[:, None, None, :]
    return _hidden(padding) if mask is None else mask + _hidden(padding)


class _OpenWindows:
    """Shifted windows (Liu et al. 2021, section 3.2) around an attention that reads its heads off its tables."""

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Every configuration is open to it."""
        return True

    def prepare(self) -> None:
        """Keeps the dense network's scale."""
        self.scale = (self.qkv.out_features // 3 // self.num_heads) ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        """As torchvision's: `(batch, height, width, channels)` in and out."""
        height, width = x.shape[1:3]
        tall, wide = self.window_size
        x = F.pad(x, (0, 0, 0, -width % wide, 0, -height % tall))
        padded = tuple(x.shape[1:3])
        # A window as large as the image sees all of it; shifting would change nothing.
        shift = [s if w < side else 0 for s, w, side in zip(self.shift_size, self.window_size, padded, strict=True)]
        if any(shift):
            x = torch.roll(x, (-shift[0], -shift[1]), (1, 2))
        windows = x.unflatten(1, (-1, tall)).unflatten(3, (-1, wide)).transpose(2, 3)
        mask = _shift_mask(padded, self.window_size, shift, x) if any(shift) else None
        out = self.attend(windows.flatten(3, 4).flatten(0, 2), mask)
        out = out.unflatten(1, (tall, wide)).unflatten(0, (-1, padded[0] // tall, padded[1] // wide))
        out = out.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        if any(shift):
            out = torch.roll(out, (shift[0], shift[1]), (1, 2))
        return out[:, :height, :width].contiguous()

    def attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Attention inside windows `(n_windows, tokens, channels)`; `mask` is `(n_windows of one image, 1, t, t)`."""
        bias = self.get_relative_position_bias()
        n_heads = bias.shape[1]
        q, k, v = F.linear(x, self.qkv.weight, self.qkv_bias()).unflatten(-1, (3, n_heads, -1)).permute(2, 0, 3, 1, 4)
        logits = self.similarity(q, k) + bias
        if mask is not None:
            logits = (logits.unflatten(0, (-1, len(mask))) + mask).flatten(0, 1)
        weights = F.dropout(logits.softmax(-1), self.attention_dropout, self.training)
        return F.dropout(self.proj((weights @ v).transpose(1, 2).flatten(2)), self.dropout, self.training)

    def qkv_bias(self) -> Tensor | None:
        """The bias of queries, keys and values."""
        return self.qkv.bias

    def similarity(self, q: Tensor, k: Tensor) -> Tensor:
        """Scaled dot products."""
        return (q * self.scale) @ k.transpose(-2, -1)


def _shift_mask(padded: tuple[int, int], window: list[int], shift: list[int], like: Tensor) -> Tensor:
    """-100 between tokens that only the cyclic shift brought into one window, `(n_windows, 1, tokens, tokens)`."""
    regions = torch.zeros(padded, dtype=like.dtype, device=like.device)
    count = 0
    for rows in (slice(0, -window[0]), slice(-window[0], -shift[0]), slice(-shift[0], None)):
        for columns in (slice(0, -window[1]), slice(-window[1], -shift[1]), slice(-shift[1], None)):
            regions[rows, columns] = count
            count += 1
    regions = (
        regions.unflatten(0, (-1, window[0])).unflatten(2, (-1, window[1])).transpose(1, 2).flatten(2).flatten(0, 1)
    )
    differ = regions.unsqueeze(1) != regions.unsqueeze(2)
    return (differ * -100.0).to(like.dtype).unsqueeze(1)


class OpenShiftedWindowAttention(_OpenWindows, ShiftedWindowAttention):
    """Swin's attention."""

    def get_relative_position_bias(self) -> Tensor:
        """One logit per head and pair of tokens, `(1, heads, tokens, tokens)`."""
        return _pairs(self.relative_position_bias_table[self.relative_position_index])


class OpenShiftedWindowAttentionV2(_OpenWindows, ShiftedWindowAttentionV2):
    """Swin V2's attention: cosine similarity, a learned scale, biases from a small network."""

    def get_relative_position_bias(self) -> Tensor:
        """One logit per head and pair of tokens, `(1, heads, tokens, tokens)`."""
        table = self.cpb_mlp(self.relative_coords_table).flatten(0, 2)
        return 16 * torch.sigmoid(_pairs(table[self.relative_position_index]))

    def qkv_bias(self) -> Tensor | None:
        """Keys have no bias."""
        bias = super().qkv_bias()
        if bias is None:
            return None
        bias = bias.clone()
        third = len(bias) // 3
        bias[third : 2 * third].zero_()
        return bias

    def similarity(self, q: Tensor, k: Tensor) -> Tensor:
        """Scaled cosines."""
        cosine = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        return cosine * torch.clamp(self.logit_scale, max=4.605170185988092).exp()  # log(100)


def _pairs(entries: Tensor) -> Tensor:
    """Table entries of all pairs of tokens, `(tokens squared, heads)`, as `(1, heads, tokens, tokens)`."""
    n_tokens = round(len(entries) ** 0.5)
    return entries.T.unflatten(1, (n_tokens, n_tokens)).contiguous().unsqueeze(0)


class OpenRelativeAttention(RelativePositionalMultiHeadAttention):
    """MaxViT's attention inside windows and grids."""

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Every configuration is open to it."""
        return True

    def prepare(self) -> None:
        """Its scale is a constant already."""

    def forward(self, x: Tensor) -> Tensor:
        """As torchvision's: `(batch, groups, tokens, channels)` in and out."""
        n_heads = self.relative_position_bias_table.shape[1]
        q, k, v = self.to_qkv(x).unflatten(-1, (3, n_heads, -1)).permute(3, 0, 1, 4, 2, 5)
        logits = q @ (k * self.scale_factor).transpose(-2, -1)
        weights = (logits + self.get_relative_positional_bias()).softmax(-1)
        return self.merge((weights @ v).transpose(2, 3).flatten(3))


OPEN: dict[type[nn.Module], type[nn.Module]] = {
    nn.MultiheadAttention: OpenMultiheadAttention,
    ShiftedWindowAttention: OpenShiftedWindowAttention,
    ShiftedWindowAttentionV2: OpenShiftedWindowAttentionV2,
    RelativePositionalMultiHeadAttention: OpenRelativeAttention,
}


def _scale_by_head(module: nn.Module) -> None:
    """The scale becomes a buffer with one value a head; the fused path, which knows one scale only, is left."""
    if "scale" not in module._buffers:
        scale = module.qkv.weight.detach().new_full((module.num_heads, 1, 1), module.scale)
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
