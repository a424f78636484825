"""torchvision's attention inside windows, opened: Swin's, Swin V2's and MaxViT's."""

import math

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention
from torchvision.models.swin_transformer import (
    ShiftedWindowAttention,
    ShiftedWindowAttentionV2,
)

from autoprune.structure.attention import OpenAttention


class _OpenWindows(OpenAttention, ShiftedWindowAttention):
    """Shifted windows around an attention that reads its heads off its tables.

    Liu et al. 2021, Swin Transformer, section 3.2. An image of 8 x 8 tokens in windows
    of 4 x 4 has four windows. Every other block shifts the image by 2 first, so that
    its windows lie across the borders of the others'; what the shift carried from one
    side of the image to the other is masked.

    Attributes:
        scale: That of the dense network, which the weights were trained with.
        relative_position_index: A buffer: for each pair of tokens a row of the table of
            biases, int64 `(n_tokens squared,)`.
    """

    scale: float
    relative_position_index: Tensor

    def prepare(self) -> None:
        """Keeps the dense network's scale."""
        width = self.qkv.out_features // 3 // self.num_heads
        self.scale = width**-0.5

    def forward(self, x: Tensor) -> Tensor:
        """As torchvision's.

        Args:
            x: `(batch, height, width, channels)`.

        Returns:
            A tensor of the same shape.
        """
        height, width = x.shape[1:3]
        tall, wide = self.window_size
        # Up to whole windows; the rest is cut off again in the end.
        x = functional.pad(x, (0, 0, 0, -width % wide, 0, -height % tall))
        padded = (x.shape[1], x.shape[2])
        shift = self._shift_within(padded)
        is_shifted = any(shift)
        if is_shifted:
            x = torch.roll(x, (-shift[0], -shift[1]), (1, 2))
        mask = None
        # To `(batch, rows of windows, columns of windows, tall, wide, channels)`.
        windows = x.unflatten(1, (-1, tall)).unflatten(3, (-1, wide)).transpose(2, 3)
        if is_shifted:
            mask = _shift_mask(padded, self.window_size, shift, x)
        out = self.attend(windows.flatten(3, 4).flatten(0, 2), mask)
        # And the same way back.
        n_windows = (-1, padded[0] // tall, padded[1] // wide)
        out = out.unflatten(1, (tall, wide)).unflatten(0, n_windows)
        out = out.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        if is_shifted:
            out = torch.roll(out, (shift[0], shift[1]), (1, 2))
        return out[:, :height, :width].contiguous()

    def _shift_within(self, padded: tuple[int, int]) -> list[int]:
        """By how many tokens an image is shifted, down and to the right."""
        shift = []
        for by, window, side in zip(
            self.shift_size, self.window_size, padded, strict=True
        ):
            # A window as large as the image sees all of it; shifting would change
            # nothing.
            shift.append(by if window < side else 0)
        return shift

    def attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Attention inside windows.

        Args:
            x: `(n_windows, n_tokens, channels)`, all images' windows together.
            mask: Added to the logits, `(n_windows of one image, 1, n_tokens,
                n_tokens)`, or None.

        Returns:
            A tensor of the same shape as `x`.
        """
        bias = self.get_relative_position_bias()
        # Not `num_heads`, which is that of the dense network.
        n_heads = bias.shape[1]
        projected = functional.linear(x, self.qkv.weight, self.qkv_bias())
        q, k, v = projected.unflatten(-1, (3, n_heads, -1)).permute(2, 0, 3, 1, 4)
        logits = self.similarity(q, k) + bias
        if mask is not None:
            # One mask for each window of an image, the same for all images.
            per_image = logits.unflatten(0, (-1, len(mask)))
            logits = (per_image + mask).flatten(0, 1)
        weights = functional.dropout(
            logits.softmax(-1), self.attention_dropout, self.training
        )
        joined = (weights @ v).transpose(1, 2).flatten(2)
        return functional.dropout(self.proj(joined), self.dropout, self.training)

    def qkv_bias(self) -> Tensor | None:
        """The bias of queries, keys and values."""
        return self.qkv.bias

    def similarity(self, q: Tensor, k: Tensor) -> Tensor:
        """Scaled dot products.

        Args:
            q: Queries, `(n_windows, n_heads, n_tokens, width)`.
            k: Keys, likewise.

        Returns:
            Logits `(n_windows, n_heads, n_tokens, n_tokens)`.
        """
        return (q * self.scale) @ k.transpose(-2, -1)


def _shift_mask(
    padded: tuple[int, int], window: list[int], shift: list[int], like: Tensor
) -> Tensor:
    """Keeps tokens apart that only the cyclic shift brought into one window.

    The shift carries a strip of the image from one side to the other, in both
    directions. That leaves three regions a direction: what is far from it, what shares
    a window with the strip, and the strip. A window of the image may lie in several of
    the nine; only pairs of the same one may attend to each other.

    Args:
        padded: Height and width of the image in tokens.
        window: Those of a window.
        shift: By how much it was shifted in each direction.
        like: A tensor with the device and dtype of the logits.

    Returns:
        -100 for pairs to keep apart, which is what torchvision adds, and 0 for others;
        `(n_windows, 1, n_tokens, n_tokens)`.
    """
    # Each token gets its region's number; windows are cut from these as from an image.
    regions = torch.zeros(padded, dtype=like.dtype, device=like.device)
    count = 0
    for rows in _strips(window[0], shift[0]):
        for columns in _strips(window[1], shift[1]):
            regions[rows, columns] = count
            count += 1
    regions = regions.unflatten(0, (-1, window[0])).unflatten(2, (-1, window[1]))
    regions = regions.transpose(1, 2).flatten(2).flatten(0, 1)
    differ = regions.unsqueeze(1) != regions.unsqueeze(2)
    return (differ * -100.0).to(like.dtype).unsqueeze(1)


def _strips(window: int, shift: int) -> tuple[slice, slice, slice]:
    """The three regions of one direction; the last is what the shift carried."""
    # Where nothing was shifted, the last one is all and wins; then there is no border.
    return slice(0, -window), slice(-window, -shift), slice(-shift, None)


class OpenShiftedWindowAttention(_OpenWindows):
    """Swin's attention."""

    def get_relative_position_bias(self) -> Tensor:
        """One logit per head and pair of tokens, `(1, n_heads, n_tokens, n_tokens)`."""
        index = self.relative_position_index
        return _by_pairs(self.relative_position_bias_table[index])


class OpenShiftedWindowAttentionV2(_OpenWindows, ShiftedWindowAttentionV2):
    """Swin V2's attention (Liu et al. 2022, section 3).

    The similarity is a cosine with a learned scale, and biases come from a small
    network.
    """

    def get_relative_position_bias(self) -> Tensor:
        """One logit per head and pair of tokens, `(1, n_heads, n_tokens, n_tokens)`."""
        table = self.cpb_mlp(self.relative_coords_table).flatten(0, 2)
        return 16 * torch.sigmoid(_by_pairs(table[self.relative_position_index]))

    def qkv_bias(self) -> Tensor | None:
        """The bias of queries, keys and values, in which that of keys is zero."""
        bias = super().qkv_bias()
        if bias is None:
            return None
        # A copy, so that the parameter isn't written into.
        bias = bias.clone()
        third = len(bias) // 3
        bias[third : 2 * third].zero_()
        return bias

    def similarity(self, q: Tensor, k: Tensor) -> Tensor:
        """Scaled cosines; shapes as in Swin's.

        Args:
            q: Queries.
            k: Keys.
        """
        queries = functional.normalize(q, dim=-1)
        keys = functional.normalize(k, dim=-1)
        cosine = queries @ keys.transpose(-2, -1)
        # The scale is learned as a logarithm, and limited to 100.
        return cosine * torch.clamp(self.logit_scale, max=math.log(100)).exp()


def _by_pairs(entries: Tensor) -> Tensor:
    """Lays out table entries by pairs of tokens.

    Args:
        entries: `(n_tokens squared, n_heads)`.

    Returns:
        `(1, n_heads, n_tokens, n_tokens)`.
    """
    n_tokens = round(len(entries) ** 0.5)
    by_head = entries.T.unflatten(1, (n_tokens, n_tokens))
    return by_head.contiguous().unsqueeze(0)


class OpenRelativeAttention(OpenAttention, RelativePositionalMultiHeadAttention):
    """MaxViT's attention inside windows and grids; its scale is a constant already."""

    def forward(self, x: Tensor) -> Tensor:
        """As torchvision's.

        Args:
            x: `(batch, n_windows, n_tokens, channels)`.

        Returns:
            A tensor of the same shape.
        """
        # Not `n_heads` of the module, which is that of the dense network.
        n_heads = self.relative_position_bias_table.shape[1]
        projected = self.to_qkv(x).unflatten(-1, (3, n_heads, -1))
        q, k, v = projected.permute(3, 0, 1, 4, 2, 5)
        logits = q @ (k * self.scale_factor).transpose(-2, -1)
        weights = (logits + self.get_relative_positional_bias()).softmax(-1)
        return self.merge((weights @ v).transpose(2, 3).flatten(3))
