"""Ways to use a parameter that are easily overlooked: importances are exact or refused, and never silently wrong."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastewc import mas_importance
from tests.per_sample.checking import Lambda, assert_importance, naive, scales_of, weight

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
    "vmap": lambda m, x: torch.vmap(m.first)(x) * m.w,
    "vmap of weights": lambda m, x: torch.vmap(lambda w: x @ w.repeat(4, 1))(m.w.view(2, 2)).sum(0) + m.first(x)[:, :2],
    "jacobian": jacobian,
    "force": force,
    "complex numbers": lambda m, x: (m.first(x) * torch.complex(m.w, m.w.cos())).real,
    "spectrum": spectrum,
    "masked_fill": lambda m, x: m.first(x).masked_fill(x > 0, m.w.sum()),
    "masked_fill of a number": lambda m, x: m.first(x).masked_fill(x > 0, m.number) * m.w,
    "a part is filled": part_filled,
    "fill_diagonal_": lambda m, x: F.linear(m.first(x), m.w.view(2, 2).clone().fill_diagonal_(0).repeat(2, 2)),
    "masked_fill_": lambda m, x: m.first(x) * m.w.clone().masked_fill_(torch.arange(4) > 1, 0),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_exact_or_refused(name):
    model = (
        Lambda(FORWARDS[name], first=nn.Linear(4, 4), w=weight(4), number=nn.Parameter(torch.randn([]))).double().eval()
    )
    x = torch.randn(N, 4, dtype=torch.float64)
    oracle = naive(model, lambda i: [(1.0, model(x[i : i + 1]).square().sum())], N, power=1)
    try:
        got = mas_importance(model, [(x,)])
    except NotImplementedError as refused:
        assert "impl='reference'" in str(refused)  # the way out
        got = mas_importance(model, [(x,)], impl="reference")
    assert_importance(got, oracle, scales=scales_of(oracle, 1))
