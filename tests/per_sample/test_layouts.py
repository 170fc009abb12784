"""Where the samples are: last, in the middle, merged with positions in either order, in numbers like other sizes."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastewc import fisher_importance, mas_importance
from tests.per_sample.checking import Lambda, assert_exact, assert_importance, floats, naive, paths, scales_of, weight

# ── samples in dimension 1, because the user says so ──


def of_layer(cls, *, last=False, **options):
    """A recurrent layer in its own order, [T, N, E], and what it gives at each step or at the last one."""

    def forward(model, x):
        steps, _ = model.rnn(x)
        return model.out(steps[-1] if last else steps)

    return lambda: Lambda(
        forward, rnn=cls(4, 3, **options), out=nn.Linear(3 * (1 + options.get("bidirectional", 0)), 4)
    )


def attention(model, x):
    return model.out(model.mha(x, x.cos(), x.sin(), need_weights=False)[0])


TIME_MAJOR = {
    "linear": lambda: Lambda(lambda m, x: m.out(m.a(x).tanh().cumsum(0)), a=nn.Linear(4, 3), out=nn.Linear(3, 4)),
    "RNN": of_layer(nn.RNN),
    "GRU": of_layer(nn.GRU, bidirectional=True),
    "LSTM": of_layer(nn.LSTM, num_layers=2),
    "LSTM, last": of_layer(nn.LSTM, last=True),
    "attention": lambda: Lambda(attention, mha=nn.MultiheadAttention(4, 2), out=nn.Linear(4, 4)),
    "transformer": lambda: Lambda(lambda m, x: m.t(x, x.cos()), t=nn.Transformer(4, 2, 1, 1, 6)),
    "encoder": lambda: Lambda(lambda m, x: m.t(x), t=nn.TransformerEncoderLayer(4, 2, 6, norm_first=True)),
    "positions": lambda: Lambda(lambda m, x: (m.a(x) + m.p[: len(x)]).tanh(), a=nn.Linear(4, 4), p=weight(9, 1, 4)),
    "flattened": lambda: Lambda(lambda m, x: m.out(m.a(x.flatten(0, 1)).tanh()).view(*x.shape[:2], 4),
                                a=nn.Linear(4, 3), out=nn.Linear(3, 4)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")  # an encoder's default, which few suit
@pytest.mark.parametrize("steps", [3, 4], ids=["T", "T = N = C"])
@pytest.mark.parametrize("name", TIME_MAJOR)
def test_time_major(name, steps):
    model, n = TIME_MAJOR[name]().double().eval(), 4
    x = torch.randn(steps, n, 4, dtype=torch.float64)
    last = name.endswith("last")
    y = torch.randint(4, (n,) if last else (steps, n))

    def output(i):
        out = model(x[:, i : i + 1])
        return out[0] if last else out[:, 0]  # [C] or [T, C]

    def log_loss(i):
        return [(1.0, F.cross_entropy(output(i), y[i] if last else y[:, i], reduction="sum"))]

    fisher, mas = naive(model, log_loss, n), naive(model, lambda i: [(1.0, output(i).square().sum())], n, power=1)
    for cuts in ((n,), (3, 1), (1,) * n):  # whole, with a smaller one at the end, one by one
        parts = list(zip(x.split(cuts, 1), y.split(cuts, 0 if last else 1), strict=True))
        got = fisher_importance(model, parts, batch_dim=1)
        assert_importance(got, fisher, scales=scales_of(fisher, 2))
        other = mas_importance(model, [(part,) for part, _ in parts], batch_dim=1)
        assert_importance(other, mas, scales=scales_of(mas, 1))
        if len(cuts) == 1:
            assert paths(got)["fused"] == paths(other)["fused"] == set(fisher), got.report


# ── samples in dimension 0, and elsewhere inside ──


def back(flat, x):
    """[T·N, E] as [N, T, E]."""
    return flat.view(x.shape[1], len(x), -1).transpose(0, 1)


def by_rows(x):
    """[N, T, E] as [T·N, E]."""
    return x.transpose(0, 1).flatten(0, 1)


def heads(model, x):
    n, t, _ = x.shape
    h = model.a(x).view(n, t, 2, 2).transpose(1, 2).reshape(n * 2, t, 2).cumsum(1)
    return model.b(h.view(n, 2, t, 2).transpose(1, 2).reshape(x.shape))


def two_views(model, x):
    one, other = model.a(torch.cat([x, x.sin()])).tanh().chunk(2)
    return one * other


def swapped(model, x):
    """The order of positions and samples changes between two uses of one weight."""
    return model.a(model.a(x.flatten(0, 1)).view(x.shape).transpose(0, 1).tanh()).transpose(0, 1)


def filters(model, x):
    """Frames of one channel, positions first."""
    return back(model.c(by_rows(model.a(x)).unsqueeze(1)).flatten(1), x)


INSIDE = {
    "flattened": lambda m, x: m.b(m.a(x.flatten(0, 1)).tanh()).view(x.shape),
    "flattened by rows": lambda m, x: back(m.b(m.a(by_rows(x)).tanh()), x),
    "time first": lambda m, x: m.b(m.a(x.transpose(0, 1)).tanh().cumsum(0)).transpose(0, 1),
    "last": lambda m, x: (m.a.weight @ x.permute(1, 2, 0) + m.a.bias[:, None]).permute(2, 0, 1),
    "in the middle, then summed": lambda m, x: m.b(m.a(x.permute(1, 0, 2)).tanh().mean(0)),
    "channels and positions": lambda m, x: m.b(m.a(x).mT.reshape(len(x), -1, 4).tanh()),
    "heads in the batch": heads,
    "each twice": lambda m, x: m.b(m.a(x).repeat_interleave(2, 0).tanh()).view(len(x), 2, -1, 4).sum(1),
    "all twice": lambda m, x: m.b(m.a(x).repeat(2, 1, 1).tanh()).view(2, len(x), -1, 4).sum(0),
    "two views": two_views,
    "swapped between two uses": swapped,
    "pairs of positions": lambda m, x: m.a(x.unsqueeze(1) - x.unsqueeze(2)).tanh().sum(1),
    "rolled": lambda m, x: m.b(m.a(x).roll(1, 1).tanh()),
    "norm by rows": lambda m, x: back(m.n(m.a(by_rows(x))), x),
    "frames": lambda m, x: m.c(m.a(x).flatten(0, 1).unsqueeze(1)).view(len(x), -1),
    "frames by rows": filters,
    "recurrent": lambda m, x: m.r(x.transpose(0, 1))[0].transpose(0, 1),
    "last state": lambda m, x: m.r(x.transpose(0, 1))[1].transpose(0, 1).flatten(1),
    "positions by rows": lambda m, x: back((m.a(by_rows(x)).view(x.shape[1], len(x), 4) + m.p).flatten(0, 1).tanh(), x),
}
#: A convolution of frames that are not in the order of the samples.
OP = {"frames by rows": {"c.weight", "c.bias"}}
SHAPES = {"T": (5, 6, 4), "T = E": (5, 4, 4), "T = N = E": (4, 4, 4), "T = 1": (5, 1, 4), "N = 2, T = 1": (2, 1, 4)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", INSIDE)
def test_inside(name, shape):
    n, t, e = SHAPES[shape]
    parts = {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "n": nn.BatchNorm1d(4), "c": nn.Conv1d(1, 2, 3),
             "r": nn.GRU(4, 4, bidirectional=True), "p": weight(t, 1, 4)}  # fmt: skip
    model = Lambda(INSIDE[name], **parts).double().eval()
    x = torch.randn(n, t, e, dtype=torch.float64)
    used = torch.autograd.grad(model(x).square().sum(), list(model.parameters()), allow_unused=True)
    unused = {name for (name, _), g in zip(model.named_parameters(), used, strict=True) if g is None}
    # Batches of one sample among them, and a last one that is smaller.
    op = OP.get(name, ()) if t > 1 else ()
    assert_exact(model, x, cuts=((), (1, 2), tuple(range(1, n))), op=op, unused=unused)


def of_grid(**options):
    conv = nn.Conv2d(4, 4, 3, padding=1)
    mixed = nn.Conv2d(4, 4, 3, groups=2, stride=2)
    norms = nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.PReLU(4)
    net = nn.Sequential(conv, norms[0], nn.ReLU(), mixed, *norms[1:], nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(net, nn.Linear(4, 3)).double().eval().to(**options)


@pytest.mark.parametrize("samples", [5, 4, 1], ids=["N", "N = C", "N = 1"])
@pytest.mark.parametrize("inputs", [torch.channels_last, torch.contiguous_format], ids=["channels last", "contiguous"])
def test_channels_last(inputs, samples):
    model = of_grid(memory_format=torch.channels_last)
    x = torch.randn(samples, 4, 6, 6, dtype=torch.float64).to(memory_format=inputs)
    slow = {name for name, _ in model.named_parameters()} if samples == 1 else ()
    assert_exact(model, x, cuts=((),) if samples == 1 else ((), (1,)), slow=slow)


# ── one parameter, several uses ──


def shared(one, other, name="bias"):
    setattr(other, name, one.bias)
    return nn.Sequential(one, nn.Tanh(), other)


def frozen_weights(model):
    for name, p in model.named_parameters():
        p.requires_grad_(not name.endswith("weight"))
    return model


def beside(extra):
    """A row of the output that depends on the weight alone."""
    return lambda: Lambda(
        lambda m, x: torch.cat([m.a(x), extra(m.a.weight).expand(len(x), 1, 4)], 1), a=nn.Linear(4, 4)
    )


def by(forward, *shape):
    return lambda: Lambda(forward, w=weight(*shape))


WORDS = lambda: torch.randint(9, (5, 3))  # noqa: E731
TOKENS, LINES = floats(5, 3, 4), floats(5, 4, 6)
SEVERAL = {
    "its own norm": (beside(lambda w: w.square().sum()), TOKENS),
    "its own norm of columns": (beside(lambda w: w.norm(dim=0)), TOKENS),
    "its own size, times a sample": (
        lambda: Lambda(lambda m, x: m.a(x) + x[..., :1] * m.a.weight.abs().mean(), a=nn.Linear(4, 4)), TOKENS,
    ),
    "table, then head": (by(lambda m, x: F.linear(F.embedding(x, m.w).tanh(), m.w), 9, 4), WORDS),
    "head, then table": (by(lambda m, x: F.linear(F.one_hot(x, 9).to(m.w.dtype), m.w.T).tanh() * m.w[x], 9, 4), WORDS),
    "three times, once transposed": (by(lambda m, x: F.linear(F.linear(x @ m.w.T, m.w.T).cos(), m.w), 4, 4), TOKENS),
    "filter, then transposed": (by(lambda m, x: F.conv_transpose1d(F.conv1d(x, m.w).tanh(), m.w), 4, 4, 3), LINES),
    "transposed, then filter": (by(lambda m, x: F.conv1d(F.conv_transpose1d(x, m.w).tanh(), m.w), 4, 4, 3), LINES),
    "filter, and a matrix of it": (
        by(lambda m, x: F.linear(F.conv1d(x, m.w).flatten(1)[:, :12].tanh(), m.w.flatten(1)), 4, 4, 3), LINES,
    ),
    "matrix, and its first row added": (by(lambda m, x: F.linear(x, m.w, m.w[0]), 4, 4), TOKENS),
    "matrix, and its first column added": (by(lambda m, x: F.linear(x, m.w, m.w[:, 0]), 4, 4), TOKENS),
    "bias of two layers alone": (
        lambda: frozen_weights(shared(nn.Linear(4, 4), nn.Linear(4, 4))), TOKENS,
    ),
    "bias of a matrix and of a filter": (lambda: shared(nn.Linear(6, 4), nn.Conv1d(3, 4, 2)), floats(5, 3, 6)),
    "bias of a matrix and of a norm": (lambda: shared(nn.Linear(4, 4), nn.LayerNorm(4)), TOKENS),
    "bias that scales another": (lambda: shared(nn.Linear(4, 4), nn.LayerNorm(4), "weight"), TOKENS),
}  # fmt: skip


@pytest.mark.parametrize("name", SEVERAL)
def test_several_uses(name):
    make, inputs = SEVERAL[name]
    x = inputs()
    assert_exact(make().double().eval(), x.double() if x.is_floating_point() else x)


# ── sizes that depend on the data ──


def of_lengths(*lengths):
    """[N, 6, 4]; how long a sample is, its first number says."""
    x = torch.randn(len(lengths), 6, 4, dtype=torch.float64)
    x[:, 0, 0] = torch.tensor(lengths)
    return x


def cut_to_the_longest(model, x):
    lengths = x[:, :1, 0]
    T = int(lengths.max())
    own = (torch.arange(T) < lengths).unsqueeze(-1)
    return model.out(((model.a(x[:, :T]) + model.p[:T]).tanh() * own).sum(1))


@pytest.mark.parametrize("lengths", [(2, 5, 1, 6, 3), (5, 2, 6, 1, 3)], ids=["shorter first", "longer first"])
def test_as_long_as_the_longest_sample(lengths):
    model = Lambda(cut_to_the_longest, a=nn.Linear(4, 3), p=weight(6, 3), out=nn.Linear(3, 2)).double().eval()
    assert_exact(model, of_lengths(*lengths))


def end_to_end(model, x):
    """All samples' entries behind each other, put together by numbers that no tensor shows."""
    lengths = x[:, 0, 0].int().tolist()
    rows = model.a(torch.cat([one[:n] for one, n in zip(x, lengths, strict=True)])).tanh()
    return model.out(torch.stack([own.sum(0) for own in rows.split(lengths)]))


@pytest.mark.parametrize("lengths", [(2, 5, 1, 6, 3), (0, 2, 3, 4)], ids=["shorter first", "none first"])
def test_entries_of_samples_end_to_end(lengths):
    """Where the first sample has none, the second alone has as many as both."""
    model = Lambda(end_to_end, a=nn.Linear(4, 3), out=nn.Linear(3, 2)).double().eval()
    assert_exact(model, of_lengths(*lengths), slow={"a.weight", "a.bias"})
