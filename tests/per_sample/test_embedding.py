"""Tables: embeddings and bags, alone and together with other uses of the same rows."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.per_sample.checking import Lambda, assert_exact, floats, ids, weight


def table(**options):
    return nn.Sequential(nn.Embedding(9, 4, **options), nn.Tanh())


def bag(**options):
    return nn.EmbeddingBag(9, 4, **options)


def bags(forward, **options):
    parts = {"w": weight(9), "at": weight(5), "e": nn.Embedding(9, 1)}
    return lambda: Lambda(forward, b=bag(**options), **parts)


def offsets(model, x):
    return model.b(x.flatten(), torch.arange(0, x.numel(), x.shape[1]))


def all_offsets(model, x):
    return model.b(x.flatten(), torch.arange(0, x.numel() + 1, x.shape[1]))


def two_each(model, x):
    return model.b(x.flatten(), torch.arange(0, x.numel(), x.shape[1] // 2)).view(len(x), -1)


def of_lengths(model, x):
    lengths = x[:, 0] % 3 + 1
    return model.b(x[torch.arange(x.shape[1]) < lengths[:, None]], F.pad(lengths.cumsum(0)[:-1], (1, 0)))


def weighed(weights):
    return lambda m, x: m.b(x, per_sample_weights=weights(m, x).to(m.w.dtype))


ZOO = {
    "rows": (table, ids(9, 6, 5)),
    "one id for each sample": (table, ids(9, 6)),
    "ids of two dimensions": (table, ids(9, 6, 2, 3)),
    "one row": (lambda: nn.Sequential(nn.Embedding(1, 4), nn.Tanh()), ids(1, 6, 3)),
    "padding_idx": (lambda: table(padding_idx=2), ids(4, 6, 5)),
    "negative padding_idx": (lambda: table(padding_idx=-9), ids(4, 6, 5)),
    "sparse": (lambda: table(sparse=True), ids(9, 6, 5)),
    "by frequency": (lambda: table(scale_grad_by_freq=True), ids(3, 6, 5)),
    "time first": (
        lambda: Lambda(lambda m, x: m.e(x.T).transpose(0, 1).tanh(), e=nn.Embedding(9, 4)), ids(9, 6, 5),
    ),
    "flattened": (
        lambda: Lambda(lambda m, x: m.e(x.flatten()).view(*x.shape, 4).tanh(), e=nn.Embedding(9, 4)), ids(9, 6, 5),
    ),
    "indexed": (lambda: Lambda(lambda m, x: m.w[x].tanh(), w=weight(9, 4)), ids(9, 6, 5)),
    "indexed from the end": (lambda: Lambda(lambda m, x: m.w[x - 9].tanh(), w=weight(9, 4)), ids(9, 6, 5)),
    "a vector indexed": (lambda: Lambda(lambda m, x: m.w[x].tanh(), w=weight(9)), ids(9, 6, 5)),
    "index_select": (
        lambda: Lambda(lambda m, x: m.w.index_select(0, x.flatten()).view(*x.shape, 4), w=weight(9, 4)), ids(9, 6, 5),
    ),
    "looked up twice": (lambda: Lambda(lambda m, x: m.e(x) * m.e(x // 2), e=nn.Embedding(9, 4)), ids(9, 6, 5)),
    "scaled": (lambda: Lambda(lambda m, x: m.e(x) * 3 + m.e.weight.mean(0), e=nn.Embedding(9, 4)), ids(9, 6, 5)),
    "bag of means": (bag, ids(9, 6, 5)),
    "bag of sums": (lambda: bag(mode="sum", padding_idx=1), ids(9, 6, 5)),
    "bag of maxima": (lambda: bag(mode="max"), ids(9, 6, 5)),
    "bag of maxima, padding_idx": (lambda: bag(mode="max", padding_idx=1), ids(4, 6, 5)),
    "bag of sums, sparse": (lambda: bag(mode="sum", sparse=True), ids(9, 6, 5)),
    "bag by frequency": (lambda: bag(scale_grad_by_freq=True), ids(3, 6, 5)),
    "bag by offsets": (bags(offsets, mode="sum"), ids(9, 6, 5)),
    "bag by offsets, as many ids as samples": (bags(offsets, mode="max"), ids(9, 6, 6)),
    "bag by all offsets": (bags(all_offsets, include_last_offset=True), ids(9, 6, 5)),
    "two bags for each sample": (bags(two_each), ids(9, 6, 4)),
    "bag of other lengths": (bags(of_lengths), ids(9, 6, 5)),
    "bag weighed": (bags(weighed(lambda m, x: x.cos()), mode="sum", padding_idx=1), ids(4, 6, 5)),
    "bag weighed by parameters": (bags(weighed(lambda m, x: m.w[x] * m.at), mode="sum"), ids(9, 6, 5)),
    "bag weighed by places": (bags(weighed(lambda m, x: m.at.expand_as(x)), mode="sum"), ids(9, 6, 5)),
    "bag weighed by attention": (
        bags(weighed(lambda m, x: m.e(x).squeeze(-1).softmax(-1)), mode="sum"), ids(9, 6, 5),
    ),
    "bag weighed by itself": (bags(weighed(lambda m, x: m.b.weight[x].sum(-1)), mode="sum"), ids(9, 6, 5)),
    "bag tied to a head": (bags(lambda m, x: F.linear(m.b(x).tanh(), m.b.weight)), ids(9, 6, 5)),
    "positions that start later": (
        lambda: Lambda(lambda m, x: m.e(x) + m.p(torch.arange(x.shape[1]) + 2), e=nn.Embedding(9, 4),
                       p=nn.Embedding(9, 4)), ids(9, 6, 5),
    ),
    "positions with padding_idx": (
        lambda: Lambda(lambda m, x: (m.e(x) + m.p(torch.tensor([3, 1, 1, 0, 3]))).tanh(), e=nn.Embedding(9, 4),
                       p=nn.Embedding(9, 4, padding_idx=1)), ids(9, 6, 5),
    ),
    "one table of ids and positions": (
        lambda: Lambda(lambda m, x: (m.e(x) * m.e(torch.arange(x.shape[1]))).tanh(), e=nn.Embedding(9, 4)),
        ids(9, 6, 5),
    ),
}  # fmt: skip
OP = {
    "a vector indexed": {"w"},
    "bag of means": {"weight"},
    "bag of sums": {"weight"},
    "bag of maxima": {"weight"},
    "bag of maxima, padding_idx": {"weight"},
    "bag of sums, sparse": {"weight"},
    "bag by frequency": set(),
    "bag weighed by parameters": {"w", "b.weight"},
}
SLOW = {"by frequency": {"0.weight"}, "bag by frequency": {"weight"}, "bag of other lengths": {"b.weight"}}


@pytest.mark.parametrize("name", ZOO)
def test_table(name):
    make, inputs = ZOO[name]
    model, x = make().double().eval(), inputs()
    op = OP.get(name, {"b.weight"} if name.startswith(("bag ", "two bags")) else set())
    slow = SLOW.get(name, set())
    used = torch.autograd.grad(model(x).sum(), list(model.parameters()), allow_unused=True)
    unused = {name for (name, _), grad in zip(model.named_parameters(), used, strict=True) if grad is None}
    assert_exact(model, x, op=op - slow, slow=slow, unused=unused)


def test_rows_that_are_renormed():
    model = table(max_norm=0.5).double().eval()
    tied = Lambda(lambda m, x: F.linear(m.e(x).tanh(), m.e.weight), e=nn.Embedding(9, 4, max_norm=0.5)).double().eval()
    for one in (model, tied):
        one(torch.arange(9))  # the forward changes the table, which a pass would refuse: here, before it
        assert_exact(one, ids(9, 6, 5)())


class Tied(nn.Module):
    """Embedding and head with one table, tied in one of three ways."""

    def __init__(self, how):
        super().__init__()
        self.wte, self.mix, self.how = nn.Embedding(11, 4, padding_idx=0), nn.Linear(4, 4), how
        if how == "module":
            self.head = nn.Linear(4, 11, bias=False)
            self.head.weight = self.wte.weight

    def forward(self, x):
        h = torch.tanh(self.mix(self.wte(x)))
        if self.how == "module":
            return self.head(h)
        return F.linear(h, self.wte.weight) if self.how == "functional" else h @ self.wte.weight.T


@pytest.mark.parametrize("explicit", [1, 1 << 24])
@pytest.mark.parametrize("how", ["module", "functional", "transposed"])
def test_tied_table(how, explicit, monkeypatch):
    monkeypatch.setattr("fastewc.per_sample.segments.EXPLICIT", explicit)
    x = torch.randint(0, 11, (6, 5))
    x[0] = x[0, 0]
    x[1] = 0
    assert_exact(Tied(how).double().eval(), x)


def test_a_tied_table_is_never_formed_for_each_sample(monkeypatch):
    def refuse(*_):
        raise AssertionError("explicit gradients of a whole table")

    monkeypatch.setattr("fastewc.per_sample.segments.Rows.rows", refuse)
    monkeypatch.setattr("fastewc.per_sample.segments.Outer.rows", refuse)
    assert_exact(Tied("module").double().eval(), ids(11, 6, 5)())


def test_a_tied_table_where_both_uses_cancel():
    # y = (w[x] − w) · 1 on the rows that x names: the gradient of these is 0, and roundings must not make it negative.
    model = Lambda(lambda m, x: m.w[x].sum(1) - x.new_ones(len(x), 1, dtype=m.w.dtype) @ m.w[:1], w=weight(2, 3))
    assert_exact(model.double().eval(), torch.zeros(4, 1, dtype=torch.long))


def test_ids_of_a_table_that_is_also_a_matrix_elsewhere():
    model = Lambda(lambda m, x: F.embedding(x, m.w) @ m.w[:4, :4], w=weight(9, 4))
    assert_exact(model.double().eval(), ids(9, 6, 3)())


def test_three_kinds_of_use_of_one_table():
    model = Lambda(lambda m, x: (F.linear(F.embedding(x, m.w) * m.w[2], m.w)).tanh(), w=weight(9, 4))
    assert_exact(model.double().eval(), ids(9, 6, 3)())


def test_embedded_floats():
    model = Lambda(lambda m, x: m.e((x > 0).long()).sum(-2), e=nn.Embedding(2, 3))
    assert_exact(model.double().eval(), floats(6, 5)().double())
