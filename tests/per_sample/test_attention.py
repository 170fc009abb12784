"""Attention, and the nets that are built of it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.per_sample.checking import Lambda, assert_exact, floats, weight

TOKENS = floats(5, 3, 4)


def attention(*, weights=False, mask=None, **options):
    """nn.MultiheadAttention on [N, T, E], whatever order it wants itself."""
    turned = not options.get("batch_first")

    def forward(model, x):
        k, v = (F.pad(x, (0, options.get(name, 4) - 4), value=0.3) for name in ("kdim", "vdim"))
        q, k, v = (t.transpose(0, 1) if turned else t for t in (x, k, v))
        out, found = model.mha(q, k, v, need_weights=weights, attn_mask=mask)
        out = out.transpose(0, 1) if turned else out
        return out if found is None else torch.cat([out, found], -1)

    mha = nn.MultiheadAttention(4, 2, **options)
    for p in mha.parameters():
        nn.init.normal_(p)
    return Lambda(forward, mha=mha)


CAUSAL = torch.ones(3, 3, dtype=torch.bool).triu(1)
MHA = {
    "time first": {},
    "time first, weights": {"weights": True},
    "batch first": {"batch_first": True},
    "batch first, weights": {"batch_first": True, "weights": True},
    "no bias": {"bias": False},
    "kdim, vdim": {"kdim": 5, "vdim": 6},
    "kdim, vdim, batch first": {"kdim": 5, "vdim": 6, "batch_first": True, "weights": True},
    "bias_k": {"add_bias_kv": True},
    "bias_k, batch first": {"add_bias_kv": True, "batch_first": True},
    "zero attention": {"add_zero_attn": True, "batch_first": True},
    "mask": {"mask": CAUSAL, "batch_first": True},
}


@pytest.mark.parametrize("length", [3, 5], ids=["T", "T = N"])
@pytest.mark.parametrize("name", MHA)
def test_multi_head_attention(name, length):
    if "mask" in name and length != 3:
        pytest.skip("the mask is of one size")
    model = attention(**MHA[name]).double().eval()
    assert_exact(model, floats(5, length, 4)().double())


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_layer(batch_first, norm_first):
    layer = nn.TransformerEncoderLayer(
        4, 2, 6, batch_first=batch_first, norm_first=norm_first, dropout=0.0, activation="gelu"
    )

    def forward(model, x):
        return model.layer(x) if batch_first else model.layer(x.transpose(0, 1)).transpose(0, 1)

    assert_exact(Lambda(forward, layer=layer).double().eval(), TOKENS().double())


def test_decoder_layer():
    layer = nn.TransformerDecoderLayer(4, 2, 6, batch_first=True, dropout=0.0)
    assert_exact(Lambda(lambda m, x: m.layer(x, x.cumsum(1)), layer=layer).double().eval(), TOKENS().double())


class Scaled(nn.Module):
    """F.scaled_dot_product_attention with heads, packed projections, causal."""

    def __init__(self, *, packed):
        super().__init__()
        self.qkv, self.out, self.packed = nn.Linear(4, 12), nn.Linear(4, 4), packed

    def forward(self, x):
        n, t, _ = x.shape
        if self.packed:
            q, k, v = self.qkv(x).view(n, t, 3, 2, 2).permute(2, 0, 3, 1, 4)
        else:
            parts = zip(self.qkv.weight.chunk(3), self.qkv.bias.chunk(3), strict=True)
            q, k, v = (F.linear(x, w, b).view(n, t, 2, 2).transpose(1, 2) for w, b in parts)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(h.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("packed", [True, False])
def test_scaled_dot_product(packed):
    assert_exact(Scaled(packed=packed).double().eval(), TOKENS().double())


class Windows(nn.Module):
    """Swin: windows merged into the batch, attention with a table of relative positions inside each."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out, self.norm = nn.Linear(4, 12), nn.Linear(4, 4), nn.LayerNorm(4)
        self.table = weight(9, 2)
        at = torch.cartesian_prod(torch.arange(2), torch.arange(2))
        index = (at[:, None] - at[None] + 1) @ torch.tensor([3, 1])
        self.register_buffer("index", index)

    def forward(self, x):  # [N, 4, 4, E]
        n = len(x)
        h = x.view(n, 2, 2, 2, 2, 4).transpose(2, 3).reshape(-1, 4, 4)
        q, k, v = self.qkv(self.norm(h)).view(-1, 4, 3, 2, 2).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index.view(-1)].view(4, 4, -1).permute(2, 0, 1).contiguous()
        scores = (q @ k.mT + bias.unsqueeze(0)).softmax(-1)
        h = self.out((scores @ v).transpose(1, 2).reshape(-1, 4, 4))
        return x + h.view(n, 2, 2, 2, 2, 4).transpose(2, 3).reshape(n, 4, 4, 4)


def test_windows():
    assert_exact(Windows().double().eval(), floats(5, 4, 4, 4)().double())


class Vision(nn.Module):
    """ViT: patches by a convolution, class token, table of positions, pooling by the token."""

    def __init__(self):
        super().__init__()
        self.patches, self.cls, self.positions = nn.Conv2d(1, 4, 2, stride=2), weight(1, 1, 4), weight(1, 5, 4)
        self.layer, self.head = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, dropout=0.0), nn.Linear(4, 3)

    def forward(self, x):
        h = self.patches(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.cls.expand(len(h), -1, -1), h], 1) + self.positions
        return self.head(self.layer(h)[:, 0])


def test_vision():
    assert_exact(Vision().double().eval(), floats(5, 1, 4, 4)().double())


class Learned(nn.Module):
    """Queries that are parameters, met by keys of the samples."""

    def __init__(self):
        super().__init__()
        self.queries, self.k, self.v = weight(2, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return (self.queries @ self.k(x).mT).softmax(-1) @ self.v(x)


def test_learned_queries():
    assert_exact(Learned().double().eval(), TOKENS().double())


class ByTable(nn.Module):
    """Learned queries of [1, Q, E], through a projection of their own, which meets no samples."""

    def __init__(self):
        super().__init__()
        self.queries, self.q, self.k = weight(1, 2, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return F.scaled_dot_product_attention(self.q(self.queries).expand(len(x), -1, -1), self.k(x), x)


def test_a_layer_that_meets_no_samples():
    assert_exact(ByTable().double().eval(), TOKENS().double())


transformers = pytest.importorskip("transformers", reason="needs transformers, which is not installed")
SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}


def pretrained(name):
    if name == "gpt2":
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=13, n_positions=9, n_embd=8, n_layer=1, n_head=2)
        )
    if name == "bert":
        return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=13, max_position_embeddings=9, **SIZES))
    if name == "llama":
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(vocab_size=13, num_key_value_heads=1, max_position_embeddings=16, **SIZES)
        )
    if name == "vit":
        return transformers.ViTForImageClassification(
            transformers.ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=3, **SIZES)
        )
    if name == "swin":
        return transformers.SwinForImageClassification(
            transformers.SwinConfig(
                image_size=8, patch_size=2, num_channels=1, num_labels=3, embed_dim=8, depths=[1, 1], num_heads=[2, 2],
                window_size=2,
            )
        )  # fmt: skip
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=13, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=1, **SIZES
        )
    )


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama", "vit", "swin", "mixtral"])
def test_pretrained_kinds(name):
    torch.manual_seed(0)
    model = pretrained(name)
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    images = name in ("vit", "swin")
    x = torch.randn(4, 1, 8, 8).double() if images else torch.randint(1, 13, (4, 5))
    wrapped = Lambda(lambda m, x: m.net(x).logits, net=model)
    if name == "mixtral":
        model.set_experts_implementation("eager")
    named = dict(wrapped.named_parameters())
    slow = {n for n in named if "experts" in n}
    # They do part of their arithmetic in float32, whatever their dtype.
    assert_exact(wrapped.double().eval(), x, cuts=((),), slow=slow, roundings=200 * 2**29)
