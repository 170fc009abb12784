"""Ways to use a parameter that are easily overlooked: importances are exact or refused, and never silently wrong."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastewc import fisher_importance, mas_importance
from tests.per_sample.checking import Cube, Lambda, assert_importance, naive, scales_of, weight

N = 4


class Sign(torch.autograd.Function):
    """The sign, with the gradient of the identity: how binary and quantised nets are trained."""

    @staticmethod
    def forward(ctx, w):
        return w.sign()

    @staticmethod
    def backward(ctx, g):
        return g


def constant(function):
    """A forward that makes something of a weight under no_grad, which is a constant to autograd."""
    made = torch.no_grad()(function)
    return lambda m, x: m.first(x) * made(m.w) + m.w


def force(model, x):
    """The gradient of an energy."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        (found,) = torch.autograd.grad((model.first(x).tanh() * model.w).sum(), x, create_graph=True)
    return found


def jacobian(model, x):
    return torch.func.vmap(torch.func.jacrev(lambda one: (model.first(one) * model.w).tanh()))(x)


def spectrum(model, x):
    filtered = torch.fft.rfft(model.first(x)) * torch.view_as_complex(model.w[:4].view(2, 2)).sum()
    return torch.fft.irfft(filtered, n=4)


def recomputed(function):
    """A forward of which the middle is in a reentrant checkpoint."""
    return lambda m, x: checkpoint(lambda z: function(m, z), m.first(x), use_reentrant=True) * m.u


def hooked(model, x):
    w = model.w * 2
    if w.requires_grad:
        w.register_hook(lambda grad: grad * 3)
    return model.first(x) * w


def part_filled(model, x):
    w = model.w.clone()
    w[1:2].zero_()
    return model.first(x) * w


FORWARDS = {
    "no_grad, arithmetic": constant(torch.abs),
    "no_grad, a sum": constant(torch.sum),
    "no_grad, a view": constant(lambda w: w.view(2, 2).flatten()),
    "no_grad, a part": constant(lambda w: w[-1:] * 2),
    "no_grad, a norm to divide by": lambda m, x: m.first(x) * (m.w / torch.no_grad()(torch.norm)(m.w)),
    "detach": lambda m, x: m.first(x) * m.w.detach().abs() + m.w,
    "data": lambda m, x: m.first(x) * m.w.data.abs() + m.w,
    "a custom function of the weight": lambda m, x: m.first(x) * Sign.apply(m.w),
    "a custom function of what is made of the weight": lambda m, x: m.first(x) * Sign.apply(m.w * 2 + 1),
    "a custom function of the weight of a layer": lambda m, x: F.linear(x, Sign.apply(m.first.weight)) * m.w,
    "a custom function of the weight, times another": lambda m, x: m.first(x) * (Sign.apply(m.w) * m.u),
    "a custom function of the weight, or another": lambda m, x: m.first(x) * torch.where(m.u > 0, Sign.apply(m.w), m.u),
    "a weight kept elsewhere, times another": lambda m, x: m.first(x) * (m.kept[0] * m.u) + m.w,
    "a weight kept elsewhere, beside another": lambda m, x: F.linear(m.first(x) * m.w, torch.stack([m.kept[0], m.u])),
    "checkpoint of a custom function": recomputed(lambda m, z: Cube.apply(z, m.w.view(1, 4))),
    "checkpoint of a custom function of what is made": recomputed(lambda m, z: Cube.apply(z, (m.w * 2).view(1, 4))),
    "checkpoint of a weight kept elsewhere": recomputed(lambda m, z: z * m.kept[0]),
    "a hook on what is made of the weight": hooked,
    "vmap of a weight, plus another": lambda m, x: m.first(x) * (torch.vmap(torch.sin)(m.w) + m.u),
    "vmap": lambda m, x: torch.vmap(m.first)(x) * m.w,
    "vmap of weights": lambda m, x: torch.vmap(lambda w: x @ w.repeat(4, 1))(m.w.view(2, 2)).sum(0) + m.first(x)[:, :2],
    "jacobian": jacobian,
    "force": force,
    "complex numbers": lambda m, x: (m.first(x) * torch.complex(m.w, m.w.cos())).real,
    "spectrum": spectrum,
    "nested": lambda m, x: (
        torch.nested.to_padded_tensor(m.first(torch.nested.nested_tensor(list(x[:, None]))), 0) * m.w
    ),
    "masked_fill": lambda m, x: m.first(x).masked_fill(x > 0, m.w.sum()),
    "masked_fill of a number": lambda m, x: m.first(x).masked_fill(x > 0, m.number) * m.w,
    "a part is filled": part_filled,
    "fill_diagonal_": lambda m, x: F.linear(m.first(x), m.w.view(2, 2).clone().fill_diagonal_(0).repeat(2, 2)),
    "masked_fill_": lambda m, x: m.first(x) * m.w.clone().masked_fill_(torch.arange(4) > 1, 0),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", FORWARDS)
def test_exact_or_refused(name):
    parts = {"first": nn.Linear(4, 4), "w": weight(4), "u": weight(4), "number": nn.Parameter(torch.randn([]))}
    model = Lambda(FORWARDS[name], **parts).double().eval()
    model.kept = [model.w]
    x = torch.randn(N, 4, dtype=torch.float64)
    oracle = naive(model, lambda i: [(1.0, model(x[i : i + 1]).square().sum())], N, power=1)
    try:
        got = mas_importance(model, [(x,)])
    except NotImplementedError as refused:
        assert "impl='reference'" in str(refused)  # the way out
        got = mas_importance(model, [(x,)], impl="reference")
    assert_importance(got, oracle, scales=scales_of(oracle, 1))


def test_a_custom_function_in_a_later_batch():
    def forward(model, x):
        w = model.w * 2
        return (Cube.apply(x, w) if x.shape[1] > 3 else F.linear(x, w)).sum(1)

    model = Lambda(forward, w=weight(4, 4)).double().eval()
    data = [(torch.randn(N, length, 4, dtype=torch.float64),) for length in (2, 4)]
    with pytest.raises(RuntimeError, match=r"uses w in a batch as it did not .* impl='reference'"):
        mas_importance(model, data)


class Box:
    """Something that no module knows of."""


class Cached(nn.Module):
    """Keeps what it makes of a parameter for the forwards that follow."""

    def __init__(self, make):
        super().__init__()
        self.table, self.w, self.first = weight(9, 4), weight(4), nn.Linear(4, 4)
        self.make, self.box = make, Box()
        self.box.kept = {}

    def forward(self, x):
        kept = self.box.kept
        if x.shape[1] not in kept:
            kept[x.shape[1]] = self.make(self.table[: x.shape[1]])
        return self.first(x) * torch.mul(kept[x.shape[1]], self.w)


CACHED = {
    "a part": lambda part: part,
    "a view": lambda part: part.view(1, *part.shape),
    "a constant": torch.no_grad()(torch.exp),
    "a constant part": torch.no_grad()(lambda part: part[:1]),
}


@pytest.mark.parametrize("name", CACHED)
def test_what_is_kept_across_forwards(name):
    model = Cached(CACHED[name]).double().eval()
    data = [torch.randn(N, length, 4, dtype=torch.float64) for length in (2, 3, 2)]
    each = [one for x in data for one in x.split(1)]
    got = [mas_importance(model, data) for _ in range(2)]  # the second finds what the first has left
    fisher = fisher_importance(model, [(x, torch.zeros_like(x)) for x in data], loss="gaussian")
    table, x = model.table, data[0]
    found = torch.autograd.grad(model(x).square().sum(), table, allow_unused=True)[0]
    model.box.kept = {}
    wanted = torch.autograd.grad(model(x).square().sum(), table, allow_unused=True)[0]
    assert found is wanted is None or torch.equal(found, wanted)
    oracle = naive(model, lambda i: [(1.0, model(each[i]).square().sum())], len(each), power=1)
    for one in got:
        assert_importance(one, oracle, scales=scales_of(oracle, 1))
    oracle = naive(model, lambda i: [(1.0, 0.5 * model(each[i]).square().sum())], len(each))
    assert_importance(fisher, oracle, scales=scales_of(oracle, 2))
