"""Layers in ways that torch's own module tests do not use them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastewc import fisher_importance, mas_importance
from tests.per_sample.checking import Lambda, assert_exact, assert_importance, floats, naive, paths, scales_of, weight

TOKENS, GRID = floats(5, 3, 4), floats(5, 4, 6, 6)


def seen(model, *shape):
    """The model with the shapes of a first batch."""
    model(torch.randn(shape))
    return model


def all_options(model, x):
    """Keys and values of other sizes, with a bias and a zero behind them."""
    k, v = (F.pad(x, (0, more), value=0.3) for more in (1, 2))
    return model.mha(x, k, v, key_padding_mask=x[..., 0] > 1, need_weights=True)[0]


def attends(model, x, *, time_first):
    """Queries that are parameters."""
    q = model.q.repeat(len(x), 1, 1)
    q, k = (t.transpose(0, 1) if time_first else t for t in (q, x))
    out = model.mha(q, k, k)[0]
    return out.transpose(0, 1) if time_first else out


def temperature(function, *shape):
    return lambda: Lambda(
        lambda m, x: function(m.a(x), m.t).softmax(-1), a=nn.Linear(4, 4), t=nn.Parameter(torch.randn(shape))
    )


OPTIONS = {"kdim": 5, "vdim": 6, "add_bias_kv": True, "add_zero_attn": True, "batch_first": True}
LAYERS = {
    "lazy": (
        lambda: seen(
            nn.Sequential(nn.LazyConv2d(3, 2), nn.LazyBatchNorm2d(), nn.LazyConvTranspose2d(2, 2), nn.Flatten(),
                          nn.LazyLinear(2)),
            2, 4, 6, 6,
        ),
        GRID,
    ),
    "lazy instance norm": (
        lambda: seen(nn.Sequential(nn.LazyConv1d(3, 2), nn.LazyInstanceNorm1d(affine=True), nn.Tanh()), 2, 4, 6),
        floats(5, 4, 6),
    ),
    "bilinear without bias": (
        lambda: Lambda(lambda m, x: m.b(x, x.sin()), b=nn.Bilinear(4, 4, 3, bias=False)), floats(5, 4),
    ),
    "local response": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 2), nn.LocalResponseNorm(3), nn.Conv2d(6, 2, 2)), GRID,
    ),
    "cross map": (lambda: nn.Sequential(nn.Conv2d(4, 6, 2), nn.CrossMapLRN2d(3), nn.Conv2d(6, 2, 2)), GRID),
    "one slope": (lambda: nn.Sequential(nn.PReLU(), nn.Linear(4, 4)), floats(5, 4)),
    "one slope of one number": (lambda: nn.Sequential(nn.PReLU()), floats(5)),
    "attention, all options": (lambda: Lambda(all_options, mha=nn.MultiheadAttention(4, 2, **OPTIONS)), TOKENS),
    "attention, all options, T = N": (
        lambda: Lambda(all_options, mha=nn.MultiheadAttention(4, 2, **OPTIONS)), floats(5, 5, 4),
    ),
    "learned queries": (
        lambda: Lambda(
            lambda m, x: attends(m, x, time_first=False), q=weight(1, 2, 4),
            mha=nn.MultiheadAttention(4, 2, batch_first=True),
        ),
        TOKENS,
    ),
    "learned queries, time first": (
        lambda: Lambda(
            lambda m, x: attends(m, x, time_first=True), q=weight(1, 2, 4), mha=nn.MultiheadAttention(4, 2)
        ),
        TOKENS,
    ),
    "transformer, norms first, no biases": (
        lambda: Lambda(
            lambda m, x: m.t(x, x.cos()), t=nn.Transformer(4, 2, 1, 1, 6, norm_first=True, batch_first=True, bias=False)
        ),
        TOKENS,
    ),
    "temperature": (temperature(torch.div), TOKENS),
    "temperature of each head": (temperature(lambda h, t: h.unflatten(-1, (2, 2)) * t.exp(), 2, 1), TOKENS),
    "temperature, bounded": (temperature(lambda h, t: h * t.exp().clamp(max=1.1), 1), TOKENS),
    "temperature, inverted first": (temperature(lambda h, t: (1 / t) * h), TOKENS),
    "temperature, softplus": (temperature(lambda h, t: h / (F.softplus(t) + 0.1), 1), TOKENS),
}  # fmt: skip
OP = {"bilinear without bias": {"b.weight"}, "one slope of one number": {"0.weight"}}


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")  # an encoder's default, which few suit
@pytest.mark.parametrize("name", LAYERS)
def test_layer(name):
    make, inputs = LAYERS[name]
    assert_exact(make().double().eval(), inputs().double(), op=OP.get(name, ()))


class Clusters(nn.Module):
    """Twenty words in a head and two clusters; a sample's loss uses those of its own words alone."""

    def __init__(self, *, head_bias):
        super().__init__()
        self.a = nn.Linear(4, 8)
        self.softmax = nn.AdaptiveLogSoftmaxWithLoss(8, 20, [5, 12], div_value=2.0, head_bias=head_bias)

    def forward(self, x, y):
        log_p, _ = self.softmax(self.a(x).tanh().flatten(0, -2), y.flatten())
        return log_p.view(len(x), -1)


@pytest.mark.parametrize("head_bias", [False, True])
@pytest.mark.parametrize("words", [20, 5], ids=["all words", "frequent words first"])
def test_adaptive_softmax(words, head_bias):
    model = Clusters(head_bias=head_bias).double().eval()
    x, y = torch.randn(6, 3, 4).double(), torch.randint(20, (6, 3))
    y[:2] %= words
    y[0, 0], y[3, 1], y[4, 2] = 0, 10, 15
    got = fisher_importance(
        model, [(x, y)], loss=lambda log_p, _: -log_p.sum(1), forward=lambda m, batch: (m(*batch), batch[1])
    )
    oracle = naive(model, lambda i: [(1.0, -model(x[i : i + 1], y[i : i + 1]).sum())], 6)
    assert_importance(got, oracle, scales=scales_of(oracle, 2))
    clusters = {name for name in got if "tail" in name}
    assert paths(got)["batch-1"] >= clusters  # which words go there, their values decide
    if words == 5:  # the first two samples, which show how parameters are used, have no words in the clusters
        assert paths(got)["batch-1"] == set(got)


def test_adaptive_softmax_of_all_words():
    model, x = Clusters(head_bias=True).double().eval(), torch.randn(6, 3, 4).double()

    def log_p(model, x):
        return model.softmax.log_prob(model.a(x).flatten(0, 1)).view(*x.shape[:2], 20)

    got = mas_importance(model, [(x,)], forward=lambda m, batch: (log_p(m, batch[0]), None))
    oracle = naive(model, lambda i: [(1.0, log_p(model, x[i : i + 1]).square().sum())], 6, power=1)
    assert_importance(got, oracle, scales=scales_of(oracle, 1))
    assert paths(got)["fused"] == set(got)
