"""Normalisations, and parameters that are added, multiplied, repeated or picked from without a layer."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.per_sample.checking import Lambda, assert_exact, floats, weight, with_statistics

ROWS, TOKENS, GRID, LINE = floats(6, 4), floats(6, 5, 4), floats(5, 4, 3, 2), floats(5, 4, 6)


def randomised(make):
    def made():
        model = with_statistics(make())
        for p in model.parameters():
            nn.init.normal_(p)
        return model

    return made


def zeroed(make):
    def made():
        model = with_statistics(make())
        for p in model.parameters():
            nn.init.zeros_(p)
        return nn.Sequential(nn.Tanh(), model, nn.Linear(4, 4))

    return made


NORMS = {
    "LayerNorm": (lambda: nn.LayerNorm(4), TOKENS),
    "LayerNorm of two dimensions": (lambda: nn.LayerNorm((5, 4)), TOKENS),
    "LayerNorm without bias": (lambda: nn.LayerNorm(4, bias=False), ROWS),
    "LayerNorm of windows": (
        lambda: Lambda(lambda m, x: m.n(x.reshape(-1, 4)).view(x.shape), n=nn.LayerNorm(4)), TOKENS,
    ),
    "RMSNorm": (lambda: nn.RMSNorm(4), TOKENS),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), GRID),
    "GroupNorm of rows": (lambda: nn.GroupNorm(2, 4), ROWS),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(4, affine=True), LINE),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True), GRID),
    "BatchNorm1d of rows": (lambda: nn.BatchNorm1d(4), ROWS),
    "BatchNorm1d of lines": (lambda: nn.BatchNorm1d(4), LINE),
    "BatchNorm2d after conv": (lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), GRID),
    "BatchNorm1d after linear": (lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(True)), ROWS),
}  # fmt: skip


@pytest.mark.parametrize("name", NORMS)
def test_norm(name):
    make, inputs = NORMS[name]
    assert_exact(randomised(make)().double().eval(), inputs().double())


@pytest.mark.parametrize(
    ("make", "inputs"),
    [(lambda: nn.LayerNorm(4), TOKENS), (lambda: nn.RMSNorm(4), TOKENS), (lambda: nn.BatchNorm1d(4), ROWS)],
    ids=["LayerNorm", "RMSNorm", "BatchNorm"],
)
def test_scale_of_zero(make, inputs):
    assert_exact(zeroed(make)().double().eval(), inputs().double())


def by(forward, *shape, **parts):
    return lambda: Lambda(forward, w=weight(*shape), **parts)


def constant(*shape):
    return nn.Parameter(torch.rand(shape), requires_grad=False)


def scalar():
    return nn.Parameter(torch.randn(()))


def with_token(model, x, how):
    n = len(x)
    token = {
        "expand": lambda: model.w.expand(n, -1, -1),
        "repeat": lambda: model.w.repeat(n, 1, 1),
        "expand_as": lambda: model.w.expand_as(x[:, :1]),
        "broadcast_to": lambda: torch.broadcast_to(model.w, (n, 1, 4)),
        "zeros": lambda: x.new_zeros(n, 1, 4) + model.w,
        "cat": lambda: torch.cat([model.w] * n, 0),
        "stack": lambda: torch.stack([model.w[0]] * n),
        "tile": lambda: torch.tile(model.w, (n, 1, 1)),
        "repeat_interleave": lambda: model.w.repeat_interleave(n, 0),
    }[how]()
    return model.mix(torch.cat([token, x], 1)).tanh().sum(1)


def add_in_place(model, x):
    h = model.mix(x)
    h += model.w
    return h.tanh()


def add_in_place_by_name(model, x):
    return model.mix(x).add_(model.w, alpha=0.5).tanh()


def add_to_another_name(model, x):
    h = model.mix(x)
    z = h
    z += model.w
    z *= model.u
    return h.tanh()


def add_to_a_part(model, x):
    h = model.mix(x)
    h[:, 0] += model.w
    h[:, 1:].mul_(model.u)
    h[:, 2] = model.w
    return h.tanh()


def put_in_front(model, x):
    h = x.new_zeros(len(x), 6, 4)
    h[:, 0] = model.w
    h[:, 1:] = x
    return model.mix(h)


def picked(model, x):
    table = model.w[torch.arange(5).unsqueeze(0) - torch.arange(5).unsqueeze(1) + 4]  # [T, T, 2]
    scores = (x @ x.mT).unsqueeze(1) + table.permute(2, 0, 1).unsqueeze(0)
    return scores.softmax(-1) @ x.unsqueeze(1)


RAW = {
    "x * w + b": (by(lambda m, x: x * m.w + m.b, 4, b=weight(4)), TOKENS),
    "w * x": (by(lambda m, x: m.w * x, 5, 1), TOKENS),
    "w * itself": (by(lambda m, x: x * (m.w * m.w), 4), TOKENS),
    "w - x": (by(lambda m, x: (m.w - x).tanh() + (x - m.w).sin(), 4), TOKENS),
    "1 - w": (by(lambda m, x: x * (1 - m.w), 4), TOKENS),
    "x / w": (by(lambda m, x: x / m.w, 4), TOKENS),
    "w / x": (by(lambda m, x: m.w / (x.square() + 1), 4), TOKENS),
    "x ** w": (by(lambda m, x: x.abs() ** m.w, 4), TOKENS),
    "scalar": (lambda: Lambda(lambda m, x: x * m.w + m.u, w=scalar(), u=scalar()), TOKENS),
    "exp of a scalar": (lambda: Lambda(lambda m, x: x * m.w.exp(), w=scalar()), TOKENS),
    "halved": (by(lambda m, x: x * (m.w / 2) + 3 * m.w, 4), TOKENS),
    "sub with alpha": (by(lambda m, x: torch.sub(x, m.w, alpha=2), 4), TOKENS),
    "1 + w, used twice": (by(lambda m, x: (lambda w: (x * w).tanh() + w)(1.0 + m.w), 4), TOKENS),
    "times constants": (
        by(lambda m, x: x * (m.w * m.c) + x.sin() * (m.c / m.w) + (m.w - m.c).abs().pow(m.c), 4, c=constant(4)), TOKENS,
    ),
    "times a constant of more entries": (by(lambda m, x: x * (m.w * m.c).sum(0), 4, c=constant(3, 4)), TOKENS),
    "pruned matrix": (by(lambda m, x: F.linear(x, (m.c > 0) * m.w) @ m.w, 4, 4, c=constant(4, 4)), TOKENS),
    "straight through": (by(lambda m, x: F.linear(x, m.w + (m.w.round() - m.w).detach()), 3, 4), TOKENS),
    "matrix of functions": (by(lambda m, x: F.linear(x, 2 * m.w.sigmoid()), 3, 4), TOKENS),
    "matrix of functions, transposed": (by(lambda m, x: x @ (-m.w.exp()).T[:, 1:], 3, 4), TOKENS),
    "a matrix and a function of it": (by(lambda m, x: F.linear(x.sin() @ m.w.exp().T, m.w.T), 3, 4), TOKENS),
    "parts of functions": (by(lambda m, x: x * (m.w.exp()[:4] + 0) + x.sin() * m.w.square().chunk(2)[1], 8), TOKENS),
    "clamped temperature": (by(lambda m, x: x * m.w.clamp(max=0.1).exp(), 3, 1, 1), floats(6, 3, 5, 4)),
    "rows of a function of a table": (by(lambda m, x: (x + (2 * m.w)[[0, 1, 1, 0, 2]]).tanh(), 3, 4), TOKENS),
    "torch.mul": (by(lambda m, x: torch.mul(m.w, x), 4), TOKENS),
    "addcmul": (by(lambda m, x: torch.addcmul(x, x, m.w, value=0.5), 4), TOKENS),
    "lerp": (by(lambda m, x: torch.lerp(x, x.tanh(), m.w), 4), TOKENS),
    "where": (by(lambda m, x: torch.where(x > 0, m.w, x), 4), TOKENS),
    "masked token": (by(lambda m, x: torch.where((x[..., :1] > 0), x, m.w), 1, 1, 4), TOKENS),
    "maximum": (by(lambda m, x: torch.maximum(x, m.w), 4), TOKENS),
    "two weights": (by(lambda m, x: x * (m.w + m.u), 4, u=weight(5, 1)), TOKENS),
    "a weight for each of two uses": (by(lambda m, x: (x + m.w).tanh() * m.w, 4), TOKENS),
    "PReLU": (lambda: nn.PReLU(5), TOKENS),
    "PReLU of one": (lambda: nn.Sequential(nn.Linear(4, 4), nn.PReLU()), TOKENS),
    "positions": (by(lambda m, x: (x + m.w).tanh(), 1, 5, 4), TOKENS),
    "positions cut": (by(lambda m, x: (x + m.w[:, : x.shape[1]]).tanh(), 1, 9, 4), TOKENS),
    "positions by arange": (
        lambda: Lambda(lambda m, x: (x + m.e(torch.arange(x.shape[1]))).tanh(), e=nn.Embedding(9, 4)), TOKENS,
    ),
    "positions by arange with samples": (
        lambda: Lambda(lambda m, x: (x + m.e(torch.arange(5).expand(len(x), -1))).tanh(), e=nn.Embedding(9, 4)), TOKENS,
    ),
    "positions by a repeated index": (by(lambda m, x: (x + m.w[[0, 1, 1, 0, 2]]).tanh(), 3, 4), TOKENS),
    "positions by index_select": (
        by(lambda m, x: (x + m.w.index_select(0, torch.tensor([0, 1, 1, 0, 2]))).tanh(), 3, 4), TOKENS,
    ),
    "time first": (by(lambda m, x: (x.transpose(0, 1) + m.w).tanh().transpose(0, 1), 5, 1, 4), TOKENS),
    "rows of a table by samples": (by(lambda m, x: m.w[(x[:, 0] > 0).long()], 2, 3), TOKENS),
    "gather": (by(lambda m, x: m.w.expand(len(x), -1).gather(1, (x[:, 0] > 0).long()), 1, 3), TOKENS),
    "relative positions": (by(picked, 9, 2), TOKENS),
    "+=": (by(add_in_place, 4, mix=nn.Linear(4, 4)), TOKENS),
    "add_": (by(add_in_place_by_name, 4, mix=nn.Linear(4, 4)), TOKENS),
    "+= under another name": (by(add_to_another_name, 4, u=weight(4), mix=nn.Linear(4, 4)), TOKENS),
    "+= to a part": (by(add_to_a_part, 4, u=weight(4), mix=nn.Linear(4, 4)), TOKENS),
    "put in front": (by(put_in_front, 4, mix=nn.Linear(4, 4)), TOKENS),
    "filter of functions": (
        by(lambda m, x: F.softplus(m.w) * x + torch.sigmoid(m.w)[None, None], 4), TOKENS,
    ),
    "normalised weight": (by(lambda m, x: F.linear(F.normalize(x, dim=-1), F.normalize(m.w, dim=-1)), 3, 4), TOKENS),
    "cosine": (by(lambda m, x: F.cosine_similarity(x, m.w, dim=-1), 4), TOKENS),
    "distance": (by(lambda m, x: torch.cdist(x, m.w), 3, 4), TOKENS),
}  # fmt: skip
OP = {
    "normalised weight": {"w"},
    "cosine": {"w"},
    "distance": {"w"},
    "token by cat": {"w"},
    "token by stack": {"w"},
}
for how in (
    "expand", "repeat", "expand_as", "broadcast_to", "zeros", "cat", "stack", "tile", "repeat_interleave",
):  # fmt: skip
    RAW[f"token by {how}"] = (
        by(lambda m, x, how=how: with_token(m, x, how), 1, 1, 4, mix=nn.Linear(4, 4)), TOKENS,
    )  # fmt: skip


@pytest.mark.parametrize("name", RAW)
def test_raw_parameter(name):
    make, inputs = RAW[name]
    assert_exact(make().double().eval(), inputs().double(), op=OP.get(name, ()))


def test_positions_that_vary_between_batches():
    model = Lambda(lambda m, x: (m.a(x) + m.w[:, : x.shape[1]]).tanh(), w=weight(1, 9, 4), a=nn.Linear(4, 4))
    for length in (5, 1, 3):
        assert_exact(model.double().eval(), floats(4, length, 4)().double())


class LoRA(nn.Module):
    def __init__(self, *, merged, zero=False):
        super().__init__()
        self.base, self.merged = nn.Linear(4, 3), merged
        self.a, self.b = weight(2, 4), weight(3, 2)
        self.base.weight.requires_grad_(False)
        if zero:
            nn.init.zeros_(self.b)

    def forward(self, x):
        if self.merged:
            return F.linear(x, self.base.weight + 0.5 * self.b @ self.a, self.base.bias)
        return self.base(x) + 0.5 * F.linear(F.linear(x, self.a), self.b)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("merged", [False, True])
def test_lora(merged, zero):
    assert_exact(LoRA(merged=merged, zero=zero).double().eval(), TOKENS().double(), op={"a", "b"} if merged else ())


def test_zero_weights_where_samples_share_a_dimension():
    model = Lambda(lambda m, x: m.b(m.a(x.reshape(-1, 4))).view(*x.shape[:2], 3), a=nn.Linear(4, 2), b=nn.Linear(2, 3))
    for p in model.parameters():
        nn.init.zeros_(p)
    nn.init.normal_(model.a.weight)
    assert_exact(model.double().eval(), TOKENS().double())
