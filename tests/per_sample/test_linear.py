"""Products with a matrix, in every form that models write them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.per_sample.checking import Lambda, assert_exact, floats, weight


def linear(**options):
    return nn.Linear(4, 3, **options)


def frozen(model, *names):
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


def reused():
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), layer)


def shared_bias():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.bias = first.bias
    return nn.Sequential(first, nn.Tanh(), second)


def shared_weight():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second)


def other_lengths(model, x):
    return model.layer(x).mean(1) + model.layer(x[:, 1:]).tanh().sum(1) + model.layer(x[:, 0])


def of_weight(forward, *shape, **parts):
    return lambda: Lambda(forward, w=weight(*shape), **parts)


ZOO = {
    "2-D": (linear, floats(6, 4)),
    "3-D": (linear, floats(6, 5, 4)),
    "4-D": (linear, floats(6, 2, 5, 4)),
    "5-D": (linear, floats(6, 2, 1, 5, 4)),
    "no bias": (lambda: linear(bias=False), floats(6, 5, 4)),
    "frozen weight": (lambda: frozen(linear(), "weight"), floats(6, 5, 4)),
    "frozen bias": (lambda: frozen(linear(), "bias"), floats(6, 5, 4)),
    "T = N": (lambda: nn.Sequential(linear(), nn.Tanh(), nn.Linear(3, 3)), floats(5, 5, 4)),
    "T = I = N": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), floats(4, 4, 4)),
    "two samples": (linear, floats(2, 3, 4)),
    "one output": (lambda: nn.Sequential(nn.Linear(4, 1)), floats(6, 4)),
    "squeezed": (lambda: Lambda(lambda m, x: m.a(x).squeeze(-1), a=nn.Linear(4, 1)), floats(6, 4)),
    "reused": (reused, floats(6, 4)),
    "reused over positions": (reused, floats(6, 3, 4)),
    "reused with other T": (lambda: Lambda(other_lengths, layer=linear()), floats(6, 3, 4)),
    "shared bias": (shared_bias, floats(6, 3, 4)),
    "shared weight": (shared_weight, floats(6, 3, 4)),
    "summed bias": (of_weight(lambda m, x: F.linear(x, m.w, m.w.sum(1)), 3, 4), floats(6, 4)),
    "x @ w": (of_weight(lambda m, x: x @ m.w, 4, 3), floats(6, 2, 4)),
    "x @ w.T + b": (of_weight(lambda m, x: x @ m.w.T + m.b, 3, 4, b=weight(3)), floats(6, 2, 4)),
    "w @ x": (of_weight(lambda m, x: m.w @ x, 3, 4), floats(6, 4, 2)),
    "w @ x, samples last": (of_weight(lambda m, x: (m.w @ x.T).T, 3, 4), floats(6, 4)),
    "w.T @ x": (of_weight(lambda m, x: torch.matmul(m.w.T, x), 4, 3), floats(6, 4, 2)),
    "mm": (of_weight(lambda m, x: torch.mm(x, m.w), 4, 3), floats(6, 4)),
    "x @ vector": (of_weight(lambda m, x: x @ m.w, 4), floats(6, 2, 4)),
    "linear with a vector": (of_weight(lambda m, x: F.linear(x, m.w), 4), floats(6, 2, 4)),
    "addmm": (
        of_weight(lambda m, x: torch.addmm(m.b, x.reshape(-1, 4), m.w).view(*x.shape[:2], 3), 4, 3, b=weight(3)),
        floats(6, 2, 4),
    ),
    "addmm with factors": (
        of_weight(lambda m, x: torch.addmm(m.b, x, m.w, beta=0.5, alpha=3), 4, 3, b=weight(3)), floats(6, 4),
    ),
    "flattened": (
        of_weight(lambda m, x: F.linear(x.flatten(0, 1), m.w).tanh().view(len(x), -1), 3, 4), floats(6, 2, 4),
    ),
    "columns": (of_weight(lambda m, x: F.linear(x, m.w[:, 1:5]) + F.linear(x, m.w[:, 3:7]), 3, 8), floats(6, 2, 4)),
    "chunks": (
        of_weight(lambda m, x: sum(F.linear(x, c) * (i + 1) for i, c in enumerate(m.w.chunk(3))), 9, 4), floats(6, 4),
    ),
    "both halves": (
        of_weight(lambda m, x: F.linear(F.linear(x, m.w[:4]).tanh(), m.w[4:]), 8, 4), floats(6, 2, 4),
    ),
    "transposed reuse": (of_weight(lambda m, x: torch.tanh(x @ m.w) @ m.w.T, 4, 3), floats(6, 2, 4)),
    "w.T of a square": (of_weight(lambda m, x: torch.tanh(x @ m.w) @ m.w.T, 4, 4), floats(6, 2, 4)),
    "samples in the minor place": (
        of_weight(lambda m, x: F.linear(x.transpose(0, 1).flatten(0, 1), m.w).view(2, -1, 3).transpose(0, 1), 3, 4),
        floats(6, 2, 4),
    ),
    "time first": (of_weight(lambda m, x: F.linear(x.transpose(0, 1), m.w).transpose(0, 1), 3, 4), floats(6, 2, 4)),
    "bilinear": (lambda: Lambda(lambda m, x: m.b(x[:, 0], x[:, 1]), b=nn.Bilinear(4, 4, 3)), floats(6, 2, 4)),
    "experts by bmm": (
        of_weight(lambda m, x: torch.bmm(x.transpose(0, 1), m.w).transpose(0, 1), 3, 4, 5), floats(6, 3, 4),
    ),
    "experts by matmul": (of_weight(lambda m, x: x.unsqueeze(-2) @ m.w, 3, 4, 5), floats(6, 3, 4)),
    "outer": (of_weight(lambda m, x: torch.outer(x, m.w), 4), floats(6)),
    "float in a double model": (
        of_weight(lambda m, x: F.linear(x.float(), m.w.float()).double(), 3, 4), floats(6, 2, 4),
    ),
}  # fmt: skip
OP = {
    "bilinear": {"b.weight", "b.bias"},
    "experts by bmm": {"w"},
    "experts by matmul": {"w"},
    "outer": {"w"},
}


@pytest.mark.parametrize("name", ZOO)
def test_matrices(name):
    make, inputs = ZOO[name]
    roundings = 4000 * 2**29 if name == "float in a double model" else 4000
    assert_exact(make().double().eval(), inputs().double(), op=OP.get(name, ()), roundings=roundings)


EINSUM = {
    "ni,io->no": ((6, 4), (4, 3)),
    "nti,oi->nto": ((6, 2, 4), (3, 4)),
    "nti,oi->otn": ((6, 2, 4), (3, 4)),
    "nte,hed->nhtd": ((6, 2, 4), (2, 4, 3)),
    "nte,edh->nthd": ((6, 2, 4), (4, 3, 2)),
    "nhtd,hde->nte": ((6, 2, 3, 4), (2, 4, 5)),
    "nhtd,dhe->nte": ((6, 2, 3, 4), (4, 2, 5)),
    "nct,tc->n": ((6, 3, 4), (4, 3)),
    "nc,k->nck": ((6, 3), (2,)),
    "nc,c->nc": ((6, 3), (3,)),
    "nc,c->n": ((6, 3), (3,)),
    "nti,tio->nto": ((6, 2, 4), (2, 4, 3)),
    "...i,io->...o": ((6, 2, 4), (4, 3)),
    "nti,oi": ((6, 2, 4), (3, 4)),
}


@pytest.mark.parametrize("first", [True, False], ids=["w second", "w first"])
@pytest.mark.parametrize("equation", EINSUM)
def test_einsum(equation, first):
    x, shape = EINSUM[equation]
    inputs, arrow, out = equation.partition("->")
    turned = equation if first else ",".join(reversed(inputs.split(","))) + arrow + out

    def forward(model, x):
        found = torch.einsum(turned, x, model.w) if first else torch.einsum(turned, model.w, x)
        at = (out or "tno").index("n") if "n" in (out or "n") else 0
        if not arrow:  # letters in alphabetical order
            at = 0
        return found.movedim(at, 0).tanh()

    op = {"w"} if equation in ("nc,c->nc", "nti,tio->nto", "...i,io->...o", "nti,oi") else ()
    assert_exact(Lambda(forward, w=weight(*shape)).double().eval(), floats(*x)().double(), op=op)


def test_einsum_of_three():
    def forward(model, x):
        return torch.einsum("nti,io,jo->ntj", x, model.u, model.v)

    assert_exact(Lambda(forward, u=weight(4, 3), v=weight(5, 3)).double().eval(), floats(6, 2, 4)().double(), op="uv")


def test_transposed_tie_of_two_layers():
    model = Lambda(lambda m, x: F.linear(torch.tanh(m.enc(x)), m.enc.weight.t(), m.b), enc=nn.Linear(4, 3), b=weight(4))
    assert_exact(model.double().eval(), floats(6, 2, 4)().double())


STRIDED = {
    "with holes": lambda m, x: F.linear(x, m.w) + F.linear(x, m.w.reshape(2, 8)[:, :4]).repeat(1, 1, 2),
    "flattened": lambda m, x: F.linear(x, m.w.t().reshape(-1)[:8].view(2, 4)),
    "overlapping": lambda m, x: (
        F.linear(x, m.w.t().reshape(-1)[:8].view(2, 4)) + F.linear(x, m.w.t().reshape(-1)[4:12].view(2, 4))
    ),
    "einsum": lambda m, x: torch.einsum("nti,oi->nto", x, m.w) * m.w.t().flatten()[:4],
}


@pytest.mark.parametrize("name", STRIDED)
def test_strided_parameters(name):
    holes = torch.randn(4, 8, dtype=torch.float64)[:, ::2]
    w = nn.Parameter(holes if name == "with holes" else torch.randn(4, 4, dtype=torch.float64).mT)
    assert_exact(Lambda(STRIDED[name], w=w).eval(), floats(6, 2, 4)().double())
