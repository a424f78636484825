"""Opened attention computes what the original does, and loses heads, width and
embedding independently.
"""

import copy

import pytest
import torch
from nets import CLASSES, RGB, build, images, outputs, randomise
from torch import nn
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention
from torchvision.models.swin_transformer import (
    ShiftedWindowAttention,
    ShiftedWindowAttentionV2,
)

from autoprune.costs.cost import CostTable
from autoprune.structure.attention import open_attention
from autoprune.structure.attribute_setters import ATTRIBUTE_SETTERS
from autoprune.structure.slicing import fit_shapes, prune
from autoprune.tracing.masking import mask
from autoprune.tracing.trace import trace

WIDTH, HEADS, TOKENS = 12, 3, 5


def opened(module: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A module with random weights, and its open twin."""
    module = randomise(module).eval()
    return module, open_attention(copy.deepcopy(module))


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("crossed", [True, False])
def test_open_multihead_attention_equals_the_original(
    batch_first, bias, need_weights, crossed
):
    original, open_one = opened(
        nn.MultiheadAttention(WIDTH, HEADS, bias=bias, batch_first=batch_first)
    )
    x, y = tokens(0), tokens(1)
    query, key = (x, x) if batch_first else (x.transpose(0, 1), x.transpose(0, 1))
    if crossed:
        key = y if batch_first else y.transpose(0, 1)
    expected = original(query, key, key, need_weights=need_weights)
    found = open_one(query, key, key, need_weights=need_weights)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("shape", [(TOKENS, TOKENS), (2 * HEADS, TOKENS, TOKENS)])
@pytest.mark.parametrize("kind", ["bool", "float", "padding", "both"])
def test_open_multihead_attention_hides_what_the_original_hides(
    kind, shape, need_weights
):
    original, open_one = opened(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.rand(shape, generator=generator) < 0.4
    hidden[..., 0] = False
    padding = torch.zeros(2, TOKENS, dtype=torch.bool)
    padding[1, -2:] = True
    masks = {
        "bool": {"attn_mask": hidden},
        "float": {"attn_mask": torch.randn(shape, generator=generator)},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": hidden, "key_padding_mask": padding},
    }[kind]
    x = tokens()
    expected = original(x, x, x, need_weights=need_weights, **masks)
    torch.testing.assert_close(
        open_one(x, x, x, need_weights=need_weights, **masks), expected
    )


@pytest.mark.parametrize("masks", ["attn_mask", "key_padding_mask"])
def test_masks_take_the_precision_of_the_network(masks):
    original, open_one = opened(
        nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).double()
    )
    x, hidden = (
        tokens().double(),
        torch.zeros(
            (2, TOKENS) if masks == "key_padding_mask" else (TOKENS, TOKENS)
        ).bool(),
    )
    hidden[:, -1] = True
    expected = original(x, x, x, need_weights=False, **{masks: hidden})[0]
    torch.testing.assert_close(
        open_one(x, x, x, need_weights=False, **{masks: hidden})[0], expected
    )


@pytest.mark.parametrize("bias", [True, False])
def test_open_attention_over_other_widths_equals_the_original(bias):
    original, open_one = opened(
        nn.MultiheadAttention(WIDTH, HEADS, bias=bias, batch_first=True, kdim=6, vdim=4)
    )
    key, value = tokens(1)[..., :6], tokens(2)[..., :4]
    expected = original(tokens(), key, value)
    torch.testing.assert_close(open_one(tokens(), key, value), expected)


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_unusual_configurations_stay_as_they_are(options):
    module = nn.MultiheadAttention(WIDTH, HEADS, **options)
    assert type(open_attention(module)) is nn.MultiheadAttention


@pytest.mark.parametrize("shift", [[0, 0], [2, 2], [2, 0]])
@pytest.mark.parametrize("side", [8, 7, 3])
@pytest.mark.parametrize("kind", [ShiftedWindowAttention, ShiftedWindowAttentionV2])
def test_open_windows_equal_the_original(kind, side, shift):
    original, open_one = opened(kind(WIDTH, [4, 4], list(shift), HEADS))
    x = torch.randn(
        2, side, side + 1, WIDTH, generator=torch.Generator().manual_seed(0)
    )
    torch.testing.assert_close(open_one(x), original(x))


def test_open_relative_attention_equals_the_original():
    original, open_one = opened(
        RelativePositionalMultiHeadAttention(WIDTH, WIDTH // HEADS, max_seq_len=16)
    )
    x = torch.randn(2, 3, 16, WIDTH, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(open_one(x), original(x))


def test_opening_is_done_once_and_leaves_the_parameters():
    module = nn.MultiheadAttention(WIDTH, HEADS)
    names = [name for name, _ in module.named_parameters()]
    again = open_attention(open_attention(module))
    assert again is module
    assert [name for name, _ in again.named_parameters()] == names
    assert again.scale.flatten().tolist() == pytest.approx(
        [(WIDTH / HEADS) ** -0.5] * HEADS
    )


def test_heads_width_and_stream_are_pruned_independently():
    model, x = build("attention").double(), images(2, 8, torch.float64)
    groups = trace(model, x)
    for heads, width, stream in ((1, 4, 8), (2, 1, 8), (2, 4, 3), (1, 2, 5)):
        kept = {
            "attention:heads": torch.arange(heads),
            "attention:width": torch.arange(width),
            "stem": torch.arange(stream),
        }
        pruned = prune(model, groups, kept)
        attention = pruned.attention
        assert attention.in_proj_weight.shape == (3 * heads * width, stream)
        assert (attention.num_heads, attention.head_dim, attention.embed_dim) == (
            heads,
            width,
            stream,
        )
        torch.testing.assert_close(
            outputs(pruned, x),
            outputs(mask(model, groups, kept), x),
            rtol=1e-9,
            atol=1e-12,
        )
        reloaded = build("attention").double()
        fit_shapes(reloaded, pruned.state_dict())
        assert torch.equal(outputs(reloaded, x), outputs(pruned, x))


class Encoder(nn.Module):
    """PyTorch's own encoder, which has a fused path for inference."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(RGB, WIDTH, 2, 2)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True)
        self.encoder, self.head = (
            nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
            nn.Linear(WIDTH, CLASSES),
        )

    def forward(self, x):
        return self.head(self.encoder(self.stem(x).flatten(2).transpose(1, 2)).mean(1))


def test_pytorchs_transformer_encoder_is_pruned():
    model, x = randomise(Encoder()).eval(), images(2, 8)
    groups = trace(model, x)
    assert groups.channels == {
        "stem": WIDTH,
        **{f"encoder.layers.{i}.self_attn:heads": HEADS for i in (0, 1)},
        **{f"encoder.layers.{i}.self_attn:width": WIDTH // HEADS for i in (0, 1)},
        **{f"encoder.layers.{i}.linear1": 16 for i in (0, 1)},
    }
    kept = {group.name: torch.arange(group.channels - 1) for group in groups}
    torch.testing.assert_close(
        outputs(prune(model, groups, kept), x), outputs(mask(model, groups, kept), x)
    )


class OwnAttention(nn.Module):
    """Its sizes stand where tracing doesn't see them read: in a dict."""

    def __init__(self):
        super().__init__()
        self.config = {"heads": HEADS, "width": WIDTH // HEADS}
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        batch, n_tokens, _ = x.shape
        heads, width = self.config["heads"], self.config["width"]
        qkv = self.qkv(x).view(batch, n_tokens, 3, heads, width)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * width**-0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, n_tokens, -1))


class OwnTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.attention = nn.Conv2d(RGB, WIDTH, 2, 2), OwnAttention()
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        return self.head(
            self.attention(self.stem(x).flatten(2).transpose(1, 2)).mean(1)
        )


def set_heads(module: OwnAttention):
    def update() -> None:
        width = module.config["width"]
        n_heads = module.qkv.out_features // 3 // width
        # A new one, since modules may share a dict.
        module.config = {"heads": n_heads, "width": width}

    return update


@pytest.mark.parametrize(
    "known", [OwnAttention, f"{OwnAttention.__module__}.OwnAttention"]
)
def test_users_setter_frees_the_heads_of_an_own_module(monkeypatch, known):
    model, x = randomise(OwnTransformer()).eval(), images(1, 8)
    untaught = trace(model, x)
    assert set(untaught.channels) == {"stem", "attention.out"}
    assert (
        "the pruned network doesn't run"
        in {g.name: g.pinned for g in untaught.pinned}["attention.qkv:heads"]
    )
    monkeypatch.setitem(ATTRIBUTE_SETTERS, known, set_heads)
    taught = trace(model, x)
    assert taught.channels == {
        "stem": WIDTH,
        "attention.qkv:heads": HEADS,
        "attention.out": WIDTH,
    }
    costs = CostTable(taught)
    pruned = prune(model, taught, {"attention.qkv:heads": torch.tensor([0, 2])})
    assert costs.params({"attention.qkv:heads": 2}) == sum(
        p.numel() for p in pruned.parameters()
    )


class MultiQuery(nn.Module):
    """All heads share one key and one value."""

    def __init__(self):
        super().__init__()
        self.stem, self.query = nn.Conv2d(RGB, WIDTH, 2, 2), nn.Linear(WIDTH, HEADS * 4)
        self.key, self.value, self.head = (
            nn.Linear(WIDTH, 4),
            nn.Linear(WIDTH, 4),
            nn.Linear(HEADS * 4, CLASSES),
        )

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        q = self.query(x).unflatten(-1, (HEADS, 4)).transpose(1, 2)
        k, v = self.key(x).unsqueeze(1), self.value(x).unsqueeze(1)
        x = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.head(x.transpose(1, 2).flatten(2).mean(1))


def test_attention_with_one_key_for_all_heads_loses_widths_and_no_heads_of_the_code():
    model, x = randomise(MultiQuery()).eval(), images(1, 8)
    groups = trace(model, x)
    # The code says how many heads there are, and how wide queries are.
    assert groups.channels == {"stem": WIDTH, "value:width": 4}
    kept = {"stem": torch.arange(5), "value:width": torch.tensor([0, 3])}
    pruned = prune(model, groups, kept)
    torch.testing.assert_close(
        outputs(pruned, x), outputs(mask(model, groups, kept), x)
    )
    counts = {"stem": 5, "value:width": 2}
    n_params = sum(p.numel() for p in pruned.parameters())
    assert CostTable(groups).params(counts) == n_params
