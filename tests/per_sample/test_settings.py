"""Three models as people train them: checkpointed, under autocast, compiled, partly frozen, hooked, with buffers."""

import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastewc import mas_importance
from tests.per_sample.checking import assert_importance, naive, paths, scales_of
from tests.per_sample.test_zoo import VOCABULARY, images, pretrained, randomised, scales, tokens

resnet = pytest.importorskip("torchvision.models.resnet", reason="needs torchvision, which is not installed")
N = 3


class Residual(nn.Module):
    """A ResNet of two blocks."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        down = nn.Sequential(nn.Conv2d(4, 8, 1, 2, bias=False), nn.BatchNorm2d(8))
        self.blocks = nn.ModuleList([resnet.BasicBlock(4, 4), resnet.BasicBlock(4, 8, 2, down)])
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        h = self.stem(x)
        for block in self.blocks:
            h = block(h)
        return self.head(h.mean((2, 3)))


gpt2 = pretrained(
    "GPT2LMHeadModel", "GPT2Config", vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32,
    bos_token_id=1, eos_token_id=2, use_cache=False,  # a checkpoint that runs again would add to the cache again
)  # fmt: skip
vit = pretrained(
    "ViTForImageClassification", "ViTConfig", hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=24, image_size=16, patch_size=8, num_labels=5,
)  # fmt: skip
#: name -> how to make it, its inputs, where its blocks are, a parameter of the first of them
MODELS = {
    "resnet": (Residual, images(8), "blocks", "conv1.weight"),
    "gpt2": (gpt2, tokens(7), "transformer.h", "attn.c_attn.weight"),
    "vit": (vit, images(16), "vit.layers", "attention.q_proj.weight"),
}


@pytest.fixture(params=MODELS)
def case(request):
    """Model, inputs, its blocks, the name of a parameter in the first of them."""
    make, inputs, place, name = MODELS[request.param]
    model = randomised(make())
    return model, inputs(), model.get_submodule(place), f"{place}.0.{name}"


def logits(model, x):
    found = model(x)
    return getattr(found, "logits", found)


def by_autograd(model, x):
    """In float32 or float64; what autocast gives is raised to float32."""

    def norm(i):
        out = logits(model, x[i : i + 1])
        return [(1.0, (out if out.dtype == torch.float64 else out.float()).square().sum())]

    return naive(model, norm, N, power=1)


def assert_fused(got, oracle):
    assert_importance(got, oracle, scales=scales(oracle))
    assert paths(got)["fused"] == set(oracle), got.report


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointed_blocks(case, reentrant):
    model, x, blocks, _ = case
    oracle = by_autograd(model, x)

    def again(inner, *args, **kwargs):
        return checkpoint(functools.partial(inner, **kwargs), *args, use_reentrant=reentrant)

    for block in blocks:
        block.forward = functools.partial(again, block.forward)
    assert_fused(mas_importance(model, [(x,)]), oracle)


def test_autocast(case):
    model, x, *_ = case
    model = model.float()
    x = x.float() if x.is_floating_point() else x
    with torch.autocast("cpu", torch.bfloat16):
        got, oracle = mas_importance(model, [(x,)]), by_autograd(model, x)
    assert_importance(got, oracle, roundings=32, dtype=torch.bfloat16, scales=scales_of(oracle, 1))
    assert paths(got)["fused"] == set(oracle), got.report


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at all inputs
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_block(case, backend):
    model, x, blocks, _ = case
    oracle = by_autograd(model, x)
    blocks[1].compile(backend=backend)
    model(x)  # compiles it; the pass itself runs eagerly
    assert_fused(mas_importance(model, [(x,)]), oracle)


@pytest.mark.parametrize("frozen", [0, 1], ids=["first block", "last block"])
def test_frozen_block(case, frozen):
    model, x, blocks, _ = case
    before = by_autograd(model, x)
    blocks[frozen].requires_grad_(False)
    oracle = by_autograd(model, x)
    assert 0 < len(oracle) < len(before)
    assert_fused(mas_importance(model, [(x,)]), oracle)


def test_all_but_one_parameter_frozen(case):
    model, x, _, name = case
    oracle = {name: by_autograd(model, x)[name]}
    model.requires_grad_(False)
    model.get_parameter(name).requires_grad_(True)
    assert_fused(mas_importance(model, [(x,)]), oracle)


def test_hook_on_a_parameter_is_refused(case):
    model, x, _, name = case
    handle = model.get_parameter(name).register_hook(lambda grad: grad * 0)
    with pytest.raises(ValueError, match=f"{name}.*register_hook"):
        mas_importance(model, [(x,)])
    handle.remove()
    assert_fused(mas_importance(model, [(x,)]), by_autograd(model, x))


class Buffered(nn.Module):
    """Buffers around a model: one that scales, one that is subtracted and written to, one that counts."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.shift = inner, nn.Parameter(torch.randn(1, dtype=torch.float64))
        self.register_buffer("scale", torch.rand(1, dtype=torch.float64) + 0.5)
        self.register_buffer("mean", torch.randn(1, dtype=torch.float64))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.calls += 1
        out = logits(self.inner, x) * self.scale + (self.shift - self.mean)
        with torch.no_grad():
            self.mean.mul_(0.5).mul_(2)
        return out


def test_buffers(case):
    inner, x, *_ = case
    model = Buffered(inner).eval()
    oracle = by_autograd(model, x)
    model.calls.zero_()
    before = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    got = mas_importance(model, [(x,)])
    assert_importance(got, oracle, scales=scales(oracle))
    assert paths(got)["fused"] == set(oracle)
    for name, now in model.named_buffers():
        buffer, content = before[name]
        assert buffer is now
        assert torch.equal(content, now)
