"""torchvision's attention inside windows, opened: Swin's, Swin V2's and MaxViT's."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention
from torchvision.models.swin_transformer import (
    ShiftedWindowAttention,
    ShiftedWindowAttentionV2,
)

from autoprune.structure.attention import Open


class _OpenWindows(Open):
    """Shifted windows (Liu et al. 2021, section 3.2) around an attention that reads its
    heads off its tables.
    """

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
        shift = [
            s if w < side else 0
            for s, w, side in zip(
                self.shift_size, self.window_size, padded, strict=True
            )
        ]
        if any(shift):
            x = torch.roll(x, (-shift[0], -shift[1]), (1, 2))
        windows = x.unflatten(1, (-1, tall)).unflatten(3, (-1, wide)).transpose(2, 3)
        mask = _shift_mask(padded, self.window_size, shift, x) if any(shift) else None
        out = self.attend(windows.flatten(3, 4).flatten(0, 2), mask)
        out = out.unflatten(1, (tall, wide)).unflatten(
            0, (-1, padded[0] // tall, padded[1] // wide)
        )
        out = out.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        if any(shift):
            out = torch.roll(out, (shift[0], shift[1]), (1, 2))
        return out[:, :height, :width].contiguous()

    def attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Attention inside windows `(n_windows, tokens, channels)`; `mask` is
        `(n_windows of one image, 1, t, t)`.
        """
        bias = self.get_relative_position_bias()
        n_heads = bias.shape[1]
        q, k, v = (
            F.linear(x, self.qkv.weight, self.qkv_bias())
            .unflatten(-1, (3, n_heads, -1))
            .permute(2, 0, 3, 1, 4)
        )
        logits = self.similarity(q, k) + bias
        if mask is not None:
            logits = (logits.unflatten(0, (-1, len(mask))) + mask).flatten(0, 1)
        weights = F.dropout(logits.softmax(-1), self.attention_dropout, self.training)
        return F.dropout(
            self.proj((weights @ v).transpose(1, 2).flatten(2)),
            self.dropout,
            self.training,
        )

    def qkv_bias(self) -> Tensor | None:
        """The bias of queries, keys and values."""
        return self.qkv.bias

    def similarity(self, q: Tensor, k: Tensor) -> Tensor:
        """Scaled dot products."""
        return (q * self.scale) @ k.transpose(-2, -1)


def _shift_mask(
    padded: tuple[int, int], window: list[int], shift: list[int], like: Tensor
) -> Tensor:
    """-100 between tokens that only the cyclic shift brought into one window,
    `(n_windows, 1, tokens, tokens)`.
    """
    regions = torch.zeros(padded, dtype=like.dtype, device=like.device)
    count = 0
    for rows in (
        slice(0, -window[0]),
        slice(-window[0], -shift[0]),
        slice(-shift[0], None),
    ):
        for columns in (
            slice(0, -window[1]),
            slice(-window[1], -shift[1]),
            slice(-shift[1], None),
        ):
            regions[rows, columns] = count
            count += 1
    regions = (
        regions.unflatten(0, (-1, window[0]))
        .unflatten(2, (-1, window[1]))
        .transpose(1, 2)
        .flatten(2)
        .flatten(0, 1)
    )
    differ = regions.unsqueeze(1) != regions.unsqueeze(2)
    return (differ * -100.0).to(like.dtype).unsqueeze(1)


class OpenShiftedWindowAttention(_OpenWindows, ShiftedWindowAttention):
    """Swin's attention."""

    def get_relative_position_bias(self) -> Tensor:
        """One logit per head and pair of tokens, `(1, heads, tokens, tokens)`."""
        return _pairs(self.relative_position_bias_table[self.relative_position_index])


class OpenShiftedWindowAttentionV2(_OpenWindows, ShiftedWindowAttentionV2):
    """Swin V2's attention: cosine similarity, a learned scale, biases from a small
    network.
    """

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
        return cosine * torch.clamp(self.logit_scale, max=math.log(100)).exp()


def _pairs(entries: Tensor) -> Tensor:
    """Table entries of all pairs of tokens, `(tokens squared, heads)`, as `(1, heads,
    tokens, tokens)`.
    """
    n_tokens = round(len(entries) ** 0.5)
    return entries.T.unflatten(1, (n_tokens, n_tokens)).contiguous().unsqueeze(0)


class OpenRelativeAttention(Open, RelativePositionalMultiHeadAttention):
    """MaxViT's attention inside windows and grids; its scale is a constant already."""

    def forward(self, x: Tensor) -> Tensor:
        """As torchvision's: `(batch, groups, tokens, channels)` in and out."""
        n_heads = self.relative_position_bias_table.shape[1]
        q, k, v = (
            self.to_qkv(x).unflatten(-1, (3, n_heads, -1)).permute(3, 0, 1, 4, 2, 5)
        )
        logits = q @ (k * self.scale_factor).transpose(-2, -1)
        weights = (logits + self.get_relative_positional_bias()).softmax(-1)
        return self.merge((weights @ v).transpose(2, 3).flatten(3))
