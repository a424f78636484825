"""Networks as people write them by hand: sizes from shapes and attributes, attention of
their own, parameters used in parts.
"""

import math

import torch
from nets import images
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 12
HEADS = 3
N_CLASSES = 5


class Packed(nn.Module):
    """Queries, keys and values from one layer; sizes from C and the number of heads."""

    def __init__(self, dim: int = WIDTH):
        super().__init__()
        self.num_heads = HEADS
        self.scale = (dim // HEADS) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.heads(x)
        weights = (q * self.scale @ k.transpose(-2, -1)).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(B, N, C))


class Fused(Packed):
    """With PyTorch's own scale, that of the width."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.proj(x.reshape(*x.shape[:2], -1))


class ScaledByShape(Packed):
    """The scale is computed from what the queries have."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class ScaledByRoot(Packed):
    """The logits are divided by the root of the width."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        weights = (q @ k.transpose(-2, -1) / math.sqrt(k.size(-1))).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class Separate(nn.Module):
    """One layer each, sizes in attributes, as in Hugging Face's networks."""

    def __init__(self, dim: int = WIDTH):
        super().__init__()
        self.num_attention_heads = HEADS
        self.attention_head_size = dim // HEADS
        self.all_head_size = dim
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.dense = nn.Linear(dim, dim)

    def split(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.num_attention_heads, self.attention_head_size)
        return x.view(shape).permute(0, 2, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(self.split, (self.query(x), self.key(x), self.value(x)))
        logits = q @ k.transpose(-1, -2) / math.sqrt(self.attention_head_size)
        context = (logits.softmax(-1) @ v).permute(0, 2, 1, 3).contiguous()
        return self.dense(context.view(*context.shape[:-2], self.all_head_size))


class Checked(Separate):
    """The code insists on its sizes."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] == self.all_head_size, "the embedding has the heads' width"
        q, k, v = map(self.split, (self.query(x), self.key(x), self.value(x)))
        out = F.scaled_dot_product_attention(q, k, v)
        B, heads, N, width = q.shape
        if out.size() != (B, self.num_attention_heads, N, self.attention_head_size):
            raise ValueError("attention returned another shape")
        return self.dense(out.transpose(1, 2).reshape(B, N, heads * width))


class FreeWidth(nn.Module):
    """Only the number of heads is written down."""

    def __init__(self, dim: int = WIDTH):
        super().__init__()
        self.heads = HEADS
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in qkv)
        return self.proj(
            F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        )


class BiasTable(Packed):
    """BEiT's way: biases of queries and values, none of keys; a table by heads."""

    def __init__(self, dim: int = WIDTH):
        super().__init__(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.randn(dim))
        self.v_bias = nn.Parameter(torch.randn(dim))
        self.table = nn.Parameter(torch.randn(40, HEADS))
        index = torch.arange(16)[:, None] + torch.arange(16)[None, :]
        self.register_buffer("index", index)

    def forward(self, x: Tensor) -> Tensor:
        B, N, _ = x.shape
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        qkv = F.linear(x, self.qkv.weight, bias)
        qkv = qkv.reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        bias = self.table[self.index.view(-1)].view(N, N, -1).permute(2, 0, 1)
        weights = (q * self.scale @ k.transpose(-2, -1) + bias).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(B, N, -1))


class RelativePositions(Packed):
    """SAM's and MViT's way: positions meet queries by einsum."""

    def __init__(self, dim: int = WIDTH):
        super().__init__(dim)
        self.rel_pos_h = nn.Parameter(torch.randn(7, dim // HEADS))
        self.rel_pos_w = nn.Parameter(torch.randn(7, dim // HEADS))

    def forward(self, x: Tensor) -> Tensor:
        B, N, _ = x.shape
        side = 4
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.reshape(3, B * self.num_heads, N, -1).unbind(0)
        logits = (q * self.scale) @ k.transpose(-2, -1)
        places = torch.arange(side)[:, None] - torch.arange(side)[None, :] + side - 1
        by_row = q.reshape(B * self.num_heads, side, side, -1)
        rel_h = torch.einsum("bhwc,hkc->bhwk", by_row, self.rel_pos_h[places])
        rel_w = torch.einsum("bhwc,wkc->bhwk", by_row, self.rel_pos_w[places])
        logits = logits.view(B * self.num_heads, side, side, side, side)
        logits = logits + rel_h[:, :, :, :, None] + rel_w[:, :, :, None, :]
        weights = logits.view(B * self.num_heads, N, N).softmax(-1)
        out = (weights @ v).view(B, self.num_heads, N, -1)
        return self.proj(out.transpose(1, 2).reshape(B, N, -1))


class Rotary(Packed):
    """DINOv3's and EVA's way: queries and keys are turned by constant angles."""

    def __init__(self, dim: int = WIDTH):
        super().__init__(dim)
        angles = torch.randn(16, dim // HEADS)
        self.register_buffer("sin", angles.sin())
        self.register_buffer("cos", angles.cos())

    def turn(self, x: Tensor) -> Tensor:
        half = torch.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)
        return x * self.cos + half * self.sin

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.heads(x)
        out = F.scaled_dot_product_attention(self.turn(q), self.turn(k), v)
        return self.proj(out.transpose(1, 2).reshape([B, N, C]))


class SharedQuery(nn.Module):
    """Fewer heads for keys and values than for queries."""

    def __init__(self, dim: int = WIDTH):
        super().__init__()
        self.heads = 4
        self.kv_heads = 2
        self.head_dim = 6
        self.q = nn.Linear(dim, self.heads * self.head_dim)
        self.kv = nn.Linear(dim, 2 * self.kv_heads * self.head_dim)
        self.proj = nn.Linear(self.heads * self.head_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, _ = x.shape
        q = self.q(x).view(B, N, self.heads, self.head_dim).transpose(1, 2)
        kv = self.kv(x).view(B, N, 2, self.kv_heads, self.head_dim)
        k, v = kv.permute(2, 0, 3, 1, 4)
        k = k.repeat_interleave(self.heads // self.kv_heads, 1)
        v = v.repeat_interleave(self.heads // self.kv_heads, 1)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))


class OneKey(nn.Module):
    """One key and one value for all heads, as in MobileNetV4."""

    def __init__(self, dim: int = WIDTH):
        super().__init__()
        self.num_heads = HEADS
        self.key_dim = 5
        self.query = nn.Linear(dim, HEADS * 5)
        self.key = nn.Linear(dim, 5)
        self.value = nn.Linear(dim, 6)
        self.proj = nn.Linear(HEADS * 6, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, _ = x.shape
        q = self.query(x).view(B, N, self.num_heads, self.key_dim).transpose(1, 2)
        k, v = self.key(x).unsqueeze(1), self.value(x).unsqueeze(1)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(B, N, -1))


class SplitByHead(nn.Module):
    """LeViT's and TinyViT's way: each head's query, key and value side by side, and the
    value wider.
    """

    def __init__(self, dim: int = WIDTH):
        super().__init__()
        self.num_heads = HEADS
        self.key_dim = 5
        self.d = 7
        self.qkv = nn.Linear(dim, HEADS * (5 + 5 + 7))
        self.proj = nn.Linear(HEADS * 7, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, _ = x.shape
        qkv = self.qkv(x).view(B, N, self.num_heads, -1)
        q, k, v = qkv.split([self.key_dim, self.key_dim, self.d], dim=3)
        q, k, v = q.permute(0, 2, 1, 3), k.permute(0, 2, 1, 3), v.permute(0, 2, 1, 3)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(B, N, -1))


class CachedTable(BiasTable):
    """LeViT's way: the table is looked up once in evaluation, and kept."""

    def __init__(self, dim: int = WIDTH):
        super().__init__(dim)
        self.cache: dict[str, Tensor] = {}

    def train(self, mode: bool = True):
        super().train(mode)
        if mode:
            self.cache = {}
        return self

    def forward(self, x: Tensor) -> Tensor:
        B, N, _ = x.shape
        if self.training or "bias" not in self.cache:
            bias = self.table.t()[:, self.index]
            self.cache["bias"] = bias if self.training else bias.detach()
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        weights = (q * self.scale @ k.transpose(-2, -1) + self.cache["bias"]).softmax(
            -1
        )
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class Tokens(nn.Module):
    """A vision transformer around an attention."""

    def __init__(self, attention: type[nn.Module], depth: int = 2):
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 8, 8)
        self.positions = nn.Parameter(torch.randn(1, 16, WIDTH))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(depth))
        self.blocks = nn.ModuleList(attention(WIDTH) for _ in range(depth))
        self.mlp = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 20), nn.GELU(), nn.Linear(20, WIDTH)
        )
        self.head = nn.Linear(WIDTH, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        return self.head((x + self.mlp(x)).mean(1))


class PartialConvolution(nn.Module):
    """FasterNet's way: a part of the channels is convolved, the rest passes."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, 2, 1)
        self.dim_conv = WIDTH // 4
        self.dim_rest = WIDTH - WIDTH // 4
        self.conv = nn.Conv2d(self.dim_conv, self.dim_conv, 3, 1, 1)
        self.head = nn.Linear(WIDTH, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        first, rest = torch.split(x, [self.dim_conv, self.dim_rest], dim=1)
        x = torch.cat((self.conv(first).relu(), rest), 1)
        return self.head(x.mean((2, 3)))


class OneKeyOfMaps(nn.Module):
    """MobileNetV4's way: one key and one value for all heads, all by convolutions."""

    def __init__(self):
        super().__init__()
        self.num_heads = HEADS
        self.key_dim = 5
        self.stem = nn.Conv2d(3, WIDTH, 8, 8)
        self.query = nn.Conv2d(WIDTH, HEADS * 5, 1)
        self.key = nn.Conv2d(WIDTH, 5, 1)
        self.value = nn.Conv2d(WIDTH, 5, 1)
        self.proj = nn.Conv2d(HEADS * 5, WIDTH, 1)
        self.head = nn.Conv2d(WIDTH, N_CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        B, _, H, W = x.shape
        q = self.query(x).reshape(B, self.num_heads, self.key_dim, -1)
        q = q.transpose(-1, -2).contiguous()
        k = self.key(x).flatten(2).transpose(1, 2).unsqueeze(1).contiguous()
        v = self.value(x).flatten(2).transpose(1, 2).unsqueeze(1).contiguous()
        # Widths alike and in memory like this: PyTorch takes one operation for it all.
        out = F.scaled_dot_product_attention(q, k, v)
        out = out.transpose(1, 2).reshape(B, H, W, -1).permute(0, 3, 1, 2)
        return self.head(self.proj(out).relu()).mean((2, 3))


class Slices(PartialConvolution):
    """The same, cut by slices."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        first = self.conv(x[:, : self.dim_conv]).relu()
        x = torch.cat((first, x[:, self.dim_conv :]), 1)
        return self.head(x.mean((2, 3)))


class RoundedUp(PartialConvolution):
    """A quarter of the channels, rounded up, is doubled."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        n = -(-x.shape[1] // 4)
        x = torch.cat((2 * x[:, :n], x[:, n:]), 1)
        return self.head(x.mean((2, 3)))


class ToMap(nn.Module):
    """A linear layer makes a feature map."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Conv2d(3, 8, 8, 8)
        self.up = nn.Linear(8, WIDTH * 16)
        self.unflatten = nn.Unflatten(1, (WIDTH, 4, 4))
        self.conv = nn.Conv2d(WIDTH, N_CLASSES, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.encode(x).mean((2, 3)).relu())
        return self.conv(self.unflatten(x).relu())


class ToMapByAttribute(ToMap):
    """The channels of the map stand in an attribute."""

    def __init__(self):
        super().__init__()
        self.channels = WIDTH

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.encode(x).mean((2, 3)).relu())
        return self.conv(x.view(-1, self.channels, 4, 4).relu())


class OwnLayers(nn.Module):
    """Functional calls with sizes from attributes."""

    def __init__(self):
        super().__init__()
        self.dim = WIDTH
        self.stem = nn.Conv2d(3, WIDTH, 3, 2, 1)
        self.kernel = nn.Parameter(torch.randn(WIDTH, 1, 3, 3))
        self.gain = nn.Parameter(torch.randn(WIDTH))
        self.shift = nn.Parameter(torch.randn(WIDTH))
        self.head = nn.Linear(WIDTH, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(self.stem(x).relu(), self.kernel, groups=self.dim)
        x = x.mean((2, 3))
        return self.head(F.layer_norm(x, (self.dim,), self.gain, self.shift))


class MeanByHand(OwnLayers):
    """A sum over channels is divided by how many there are."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu().mean((2, 3))
        mean = x.sum(1, keepdim=True) / x.shape[1]
        return self.head(x - mean)


class LearnedQueries(nn.Module):
    """A decoder: a parameter is read as if it were an activation."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 8, 8)
        self.queries = nn.Parameter(torch.randn(1, 4, WIDTH))
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        queries = self.norm(self.queries + self.mix(self.queries))
        weights = (queries @ tokens.transpose(1, 2)).softmax(-1)
        return self.head(queries + weights @ tokens).mean(1)


class Autoencoder(nn.Module):
    """The decoder's weights are the encoder's, transposed."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, 2, 1)
        self.outer = nn.Parameter(torch.randn(10, WIDTH) / 3)
        self.inner = nn.Parameter(torch.randn(7, 10) / 3)
        self.head = nn.Linear(WIDTH, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu().mean((2, 3))
        code = F.linear(F.linear(x, self.outer).relu(), self.inner).tanh()
        x = F.linear(F.linear(code, self.inner.T).relu(), self.outer.T)
        return self.head(x)


ATTENTIONS = (
    Packed,
    Fused,
    ScaledByShape,
    ScaledByRoot,
    Separate,
    Checked,
    FreeWidth,
    BiasTable,
    RelativePositions,
    Rotary,
    SharedQuery,
    OneKey,
    SplitByHead,
    CachedTable,
)
OTHERS = (
    PartialConvolution,
    Slices,
    RoundedUp,
    ToMap,
    ToMapByAttribute,
    OwnLayers,
    MeanByHand,
    LearnedQueries,
    Autoencoder,
    OneKeyOfMaps,
)


def networks() -> dict[str, nn.Module]:
    """All of them, by name."""
    found: dict[str, nn.Module] = {}
    for kind in ATTENTIONS:
        found[kind.__name__] = Tokens(kind)
    for kind in OTHERS:
        found[kind.__name__] = kind()
    return found


def example() -> Tensor:
    """An input for any of them."""
    return images(2, 32)
