"""Fisher (E5): hand-worked numbers, enumeration of every label, a zoo of models against batch-1 autograd."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastewc import fisher_importance
from fastewc.testing import assert_within_roundings, sum_roundings
from tests.per_sample.checking import Cube, assert_importance, batches, floats, naive


def mlp(dtype=torch.float64, out=3):
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, out)).to(dtype).eval()


class TwoParameters(nn.Module):
    """z = (a·x, b·x): two classes, one parameter each."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(0.0)), nn.Parameter(torch.tensor(0.0))

    def forward(self, x):
        return torch.stack([self.a * x, self.b * x], dim=-1)


def test_by_hand():
    # At a = b = 0 both classes have p = ½, so ∂log p(y=0)/∂a = x(1 − ½) and ∂/∂b = −x/2: squares x²/4 whatever y.
    # x = 1, 2, 3: (1 + 4 + 9)/4/3 = 14/12.
    x, y = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 1, 0])
    for labels in ("dataset", "predicted", "sampled", "expected"):
        got = fisher_importance(TwoParameters(), [(x, y)], labels=labels)
        for name in ("a", "b"):
            wanted = torch.tensor(14 / 12, dtype=torch.float64)
            assert_within_roundings(got[name], wanted, roundings=sum_roundings(3) + 4)
        assert got.num_samples == 3
        assert got.method == f"fisher/categorical/{labels}"
        assert got.report["a"][0] == "fused"


@pytest.mark.parametrize("offset", [1e4, 1e8, 1e20])
def test_gaussian_draws_do_not_drown_in_a_large_output(offset):
    # y = f + ε, so the gradient by the bias is −ε whatever f is.
    model = nn.Linear(1, 1)
    nn.init.zeros_(model.weight)

    def drawn(bias):
        nn.init.constant_(model.bias, bias)
        generator = torch.Generator().manual_seed(0)
        return fisher_importance(model, [torch.ones(200, 1)], "gaussian", "sampled", generator=generator)["bias"]

    assert 0.7 < drawn(0.0).item() < 1.3
    assert torch.equal(drawn(offset), drawn(0.0))


def test_squares_are_per_sample_not_of_the_mean():
    # Two samples with opposite gradients: the square of the mean gradient would be 0.
    x = torch.tensor([1.0, -1.0])
    got = fisher_importance(TwoParameters(), [(x, torch.tensor([0, 0]))])
    assert got["a"].item() == 0.25


@pytest.mark.parametrize("labels", ["dataset", "predicted", "expected"])
@pytest.mark.parametrize("positions", [(), (2,)])
def test_categorical(labels, positions):
    model, x = mlp(), torch.randn(6, *positions, 4, dtype=torch.float64)
    y = torch.randint(0, 3, (6, *positions))

    def losses(i):
        logp = model(x[i]).log_softmax(-1).reshape(-1, 3)
        t = range(len(logp))
        if labels == "dataset":
            return [(1.0, -sum(logp[k, y[i].reshape(-1)[k]] for k in t))]
        if labels == "predicted":
            return [(1.0, -sum(logp[k].max() for k in t))]
        # Every joint labelling of the positions with its probability: no use of independence.
        joint = []
        for classes in itertools.product(range(3), repeat=len(logp)):
            total = sum(logp[k, c] for k, c in enumerate(classes))
            joint.append((total.exp().item(), total))
        return joint

    assert_importance(fisher_importance(model, [(x, y)], labels=labels), naive(model, losses, 6))


@pytest.mark.parametrize("labels", ["dataset", "expected"])
def test_gaussian(labels):
    model, x, y = mlp(), torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)

    def losses(i):
        f = model(x[i])
        return [(1.0, 0.5 * (f - y[i]).square().sum())] if labels == "dataset" else [(1.0, o) for o in f]

    got = fisher_importance(model, [(x, y)], loss="gaussian", labels=labels)
    assert_importance(got, naive(model, losses, 5))
    assert got.method == f"fisher/gaussian/{labels}"


@pytest.mark.parametrize("labels", ["dataset", "predicted", "expected"])
def test_bernoulli(labels):
    model, x = mlp(), torch.randn(5, 4, dtype=torch.float64)
    y = torch.randint(0, 2, (5, 3))

    def log_p(z, bits):
        return sum((F.logsigmoid(z[o]) if b else F.logsigmoid(-z[o])) for o, b in enumerate(bits))

    def losses(i):
        z = model(x[i])
        if labels == "dataset":
            return [(1.0, log_p(z, y[i].tolist()))]
        if labels == "predicted":
            return [(1.0, log_p(z, (z > 0).tolist()))]
        every = [log_p(z, bits) for bits in itertools.product((0, 1), repeat=3)]
        return [(total.exp().item(), total) for total in every]

    for target in (y, y.double(), y.bool()):
        got = fisher_importance(model, [(x, target)], loss="bernoulli", labels=labels)
        assert_importance(got, naive(model, losses, 5))


def test_bernoulli_soft_targets_and_minus_100():
    model, x = mlp(), torch.randn(3, 4, dtype=torch.float64)
    y = torch.tensor([[0.2, 1.0, -100], [-100, -100, -100], [0.0, 0.5, 0.9]], dtype=torch.float64)

    def losses(i):
        z = model(x[i])
        keep = y[i] != -100
        full = -(y[i] * F.logsigmoid(z) + (1 - y[i]) * F.logsigmoid(-z))
        return [(1.0, full[keep].sum())]

    got = fisher_importance(model, [(x, y)], loss="bernoulli")
    assert_importance(got, naive(model, losses, 3))
    assert got.num_samples == 3


@pytest.mark.parametrize("loss", ["categorical", "bernoulli", "gaussian"])
def test_sampled_converges_to_expected(loss):
    model = mlp(out=2)
    x = torch.randn(1, 4, dtype=torch.float64).expand(1000, 4)
    expected = fisher_importance(model, [(x[:1],)], loss=loss, labels="expected")
    sampled = fisher_importance(model, [(x,)], loss=loss, labels="sampled")
    total, wanted = (sum(v.sum().item() for v in imp.values()) for imp in (sampled, expected))
    # Each sample's term has a relative deviation of at most about √2 (a squared normal): 5 standard errors.
    assert abs(total / wanted - 1) < 5 * math.sqrt(2 / 1000)


def test_sampled_draws_repeat_and_do_not_depend_on_batches():
    model, x = mlp(), torch.randn(9, 2, 4, dtype=torch.float64)

    def draw(data, **options):
        torch.manual_seed(5)
        return fisher_importance(model, data, labels="sampled", **options)

    one = draw([(x,)])
    assert_importance(draw([(x[:2],), (x[2:3],), (x[3:],)]), one)
    generator = torch.Generator().manual_seed(5)
    given = draw([(x,)], generator=generator)
    assert all(torch.equal(one[name], given[name]) for name in one)
    again = draw([(x,)], generator=generator)
    assert any(not torch.equal(one[name], again[name]) for name in one)


def test_sampled_ignores_padding():
    model = mlp()
    x = torch.randn(3, 4, 4, dtype=torch.float64)
    y = torch.zeros(3, 4, dtype=torch.long)
    y[:, 2:] = -100
    torch.manual_seed(1)
    padded = fisher_importance(model, [(x, y)], labels="sampled")
    torch.manual_seed(1)
    short = fisher_importance(model, [(x[:, :2], y[:, :2])], labels="sampled")
    assert_importance(padded, dict(short))


def test_callable_loss():
    model, x, y = mlp(), torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    got = fisher_importance(model, batches(x, y, cuts=(2,)), loss=lambda out, t: (out - t).abs().sum(1))
    assert_importance(got, naive(model, lambda i: [(1.0, (model(x[i]) - y[i]).abs().sum())], 5))
    assert got.method == "fisher/custom/dataset"
    no_target = fisher_importance(model, [x], loss=lambda out, t: out.sum(1) if t is None else out * math.nan)
    assert_importance(no_target, naive(model, lambda i: [(1.0, model(x[i]).sum())], 5))


def test_gaussian_minus_100_and_another_shape_of_mask():
    model, x = mlp(), torch.randn(3, 4, dtype=torch.float64)
    y = torch.randn(3, 3, dtype=torch.float64)
    y[0, 1] = y[2] = -100.0

    def losses(i):
        return [(1.0, (0.5 * (model(x[i]) - y[i]) ** 2)[y[i] != -100].sum())]

    assert_importance(fisher_importance(model, [(x, y)], loss="gaussian"), naive(model, losses, 3))
    expected = fisher_importance(model, [(x, y)], loss="gaussian", labels="expected")
    assert_importance(expected, naive(model, lambda i: [(1.0, o) for o in model(x[i])[y[i] != -100]], 3))


def test_nothing_counts_at_all():
    got = fisher_importance(mlp(), [(torch.randn(2, 4).double(), torch.full((2,), -100))])
    assert got.num_samples == 2
    assert all(value.count_nonzero() == 0 for value in got.values())
    assert "counted" in got.report["0.weight"][1]


# ── models ──


class TiedLM(nn.Module):
    """Embedding, position embedding over arange, a tied head."""

    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(11, 6), nn.Embedding(7, 6)
        self.mix, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, ids):
        h = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        return self.head(self.norm(h + self.mix(h).cumsum(1)))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn, self.out = kind(4, 5, num_layers=2, bidirectional=True, batch_first=True), nn.Linear(10, 3)

    def forward(self, x):
        return self.out(self.rnn(x)[0])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.cls, self.scale = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.tensor(0.7))
        self.mha, self.out = nn.MultiheadAttention(4, 2), nn.Linear(4, 3)

    def forward(self, x):
        h = torch.cat([self.cls.expand(len(x), -1, -1), x], 1).transpose(0, 1)
        return self.out(self.mha(h, h, h)[0].mean(0) * self.scale)


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        return Cube.apply(x, self.w)


class Reentrant(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.reentrant = reentrant

    def forward(self, x):
        h = self.first(x)
        h = checkpoint(lambda z: torch.relu(self.inner(z)), h, use_reentrant=self.reentrant)
        return self.last(h)


def conv_bn():
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 2, groups=2),
        nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 2)
    return net


def frozen():
    net = mlp()
    net[0].weight.requires_grad_(False)
    net[2].bias.requires_grad_(False)
    return net


ZOO = {
    "mlp": (mlp, floats(6, 4), (6,)),
    "conv_bn_eval": (conv_bn, floats(5, 1, 8, 8), (5,)),
    "tied_lm": (TiedLM, lambda: torch.randint(0, 11, (4, 7)), (4, 7)),
    "lstm": (lambda: Recurrent(nn.LSTM), floats(4, 3, 4), (4, 3)),
    "gru": (lambda: Recurrent(nn.GRU), floats(4, 3, 4), (4, 3)),
    "mha_cls_scale": (Attention, floats(4, 3, 4), (4,)),
    "custom_function": (Custom, floats(5, 4), (5,)),
    "frozen": (frozen, floats(5, 4), (5,)),
    "checkpoint": (lambda: Reentrant(False), floats(5, 4), (5,)),
    "reentrant_checkpoint": (lambda: Reentrant(True), floats(5, 4), (5,)),
    "sparse_embedding": (
        lambda: nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Flatten(), nn.Linear(12, 3)),
        lambda: torch.randint(0, 9, (5, 3)),
        (5,),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", ZOO)
def test_zoo_against_autograd(name, dtype):
    make, inputs, shape = ZOO[name]
    model = make().to(dtype).eval()
    x, y = inputs(), torch.randint(0, 3, shape)
    x = x.to(dtype) if x.is_floating_point() else x

    def losses(i):
        out = model(x[i : i + 1]).double()
        return [(1.0, F.cross_entropy(out.flatten(0, -2), y[i : i + 1].flatten(), reduction="sum"))]

    got = fisher_importance(
        model,
        batches(
            x,
            y,
            cuts=(
                2,
                3,
            ),
        ),
    )
    assert_importance(got, naive(model, losses, len(x)), roundings=4000)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert list(got) == list(trainable)
    assert all(got[n].shape == p.shape and got[n].dtype == dtype for n, p in trainable.items())
    slow = {n for n, (path, _) in got.report.items() if path == "batch-1"}
    assert slow == {n for n in trainable if name == "custom_function"}
    assert not any(path == "op" for path, _ in got.report.values())


def test_bf16_model_is_summed_in_float32():
    model = mlp(torch.bfloat16)
    x, y = torch.randn(300, 4, dtype=torch.bfloat16), torch.randint(0, 3, (300,))
    got = fisher_importance(model, [(x, y)])
    assert all(value.dtype == torch.float32 for value in got.values())
    oracle = naive(model, lambda i: [(1.0, F.cross_entropy(model(x[i : i + 1]).float(), y[i : i + 1]))], 300)
    # The oracle's weight gradients are rounded to bfloat16 before they are squared, and its forward is of one sample.
    for name, value in oracle.items():
        assert_within_roundings(got[name], value, roundings=8, dtype=torch.bfloat16)


def test_time_major_batches():
    rnn, head = nn.LSTM(4, 5), nn.Linear(5, 3)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = rnn, head

        def forward(self, x):
            return self.head(self.rnn(x)[0])

    model = Model().double().eval()
    for n in (3, 5):  # 5 = T: the sizes alone don't tell the dimensions apart
        x, y = torch.randn(5, n, 4, dtype=torch.float64), torch.randint(0, 3, (5, n))

        def losses(i, x=x, y=y):
            return [(1.0, F.cross_entropy(model(x[:, i : i + 1])[:, 0], y[:, i], reduction="sum"))]

        got = fisher_importance(model, [(x, y)], batch_dim=1)
        assert got.num_samples == n
        assert_importance(got, naive(model, losses, n))
    last = fisher_importance(model, [(x, y[0])], batch_dim=1, forward=lambda m, b: (m(b[0])[-1], b[1]))
    oracle = naive(model, lambda i: [(1.0, F.cross_entropy(model(x[:, i : i + 1])[-1], y[0, i : i + 1]))], 5)
    assert_importance(last, oracle)


def test_unused_parameter():
    model = mlp()
    model.spare = nn.Linear(2, 2)
    model.forward = lambda x: model[2](model[1](model[0](x)))
    got = fisher_importance(model, [(torch.randn(2, 4, dtype=torch.float64), torch.tensor([0, 1]))])
    assert got["spare.weight"].count_nonzero() == 0
    assert got.report["spare.weight"][0] == "unused"
    assert got.report["0.weight"][0] == "fused"


def test_minus_100_and_samples_without_positions():
    model, x = mlp(), torch.randn(4, 3, 4, dtype=torch.float64)
    y = torch.randint(0, 3, (4, 3))
    y[0, 1] = y[2, 0] = -100
    y[3] = -100

    def losses(i):
        return [(1.0, F.cross_entropy(model(x[i]), y[i], ignore_index=-100, reduction="sum"))]

    got = fisher_importance(model, [(x, y)])
    assert got.num_samples == 4
    assert_importance(got, naive(model, losses, 4))
    # The mask of the targets holds for the other labels too.
    predicted = fisher_importance(model, [(x, y)], labels="predicted")

    def argmax(i):
        out = model(x[i])
        return [(1.0, F.cross_entropy(out, out.argmax(-1).where(y[i] != -100, -100), reduction="sum"))]

    assert_importance(predicted, naive(model, argmax, 4))


def test_attention_mask_counts_without_labels():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, inputs_embeds, attention_mask=None):
            return {"logits": self.net(inputs_embeds)}

    model, x = Model(), torch.randn(3, 4, 4, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]])

    def losses(i):
        out = model(x[i])["logits"]
        return [(1.0, F.cross_entropy(out, out.argmax(-1).where(mask[i] != 0, -100), reduction="sum"))]

    batch = {"inputs_embeds": x, "attention_mask": mask}
    assert_importance(fisher_importance(model, [batch], labels="predicted"), naive(model, losses, 3))
    # With labels the labels decide.
    y = torch.randint(0, 3, (3, 4))
    labelled = fisher_importance(model, [batch | {"labels": y}])
    oracle = naive(model, lambda i: [(1.0, F.cross_entropy(model(x[i])["logits"], y[i], reduction="sum"))], 3)
    assert_importance(labelled, oracle)


def test_expected_refuses_beyond_1024_passes():
    model = mlp(out=2)
    x = torch.randn(1, 513, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="sampled"):
        fisher_importance(model, [x], labels="expected")
    assert fisher_importance(model, [x[:, :2]], labels="expected").num_samples == 1


def test_expected_with_an_impossible_class():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            return self.net(x) + torch.tensor([0.0, -math.inf, 0.0])

    model, x = Masked(), torch.randn(2, 4, dtype=torch.float64)

    def losses(i):
        logp = model(x[i]).log_softmax(-1)
        return [(logp[c].exp().item(), logp[c]) for c in (0, 2)]

    assert_importance(fisher_importance(model, [x], labels="expected"), naive(model, losses, 2))
