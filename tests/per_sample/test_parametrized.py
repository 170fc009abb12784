"""Weights that a forward makes anew: torch's parametrizations, products of low rank, masks, reflections."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from fastewc import mas_importance
from tests.per_sample.checking import Lambda, assert_exact, assert_importance, floats, naive, scales_of, weight

TOKENS, GRID, STEPS = floats(6, 5, 4), floats(5, 3, 5, 5), floats(5, 6, 4)


class Doubled(nn.Module):
    def forward(self, w):
        return w.tril() + w.tril(-1).mT


class LowRank(nn.Module):
    """W + B A, of a matrix or of a filter."""

    def __init__(self, w):
        super().__init__()
        self.a, self.b = weight(2, w[0].numel()), weight(len(w), 2)

    def forward(self, w):
        return w + (self.b @ self.a).view_as(w)


class Reflections(nn.Module):
    """W (1 − 2 u uᵀ) …, one after the other."""

    def __init__(self, w):
        super().__init__()
        self.u = weight(3, w.shape[1])

    def forward(self, w):
        for u in self.u:
            u = u / u.norm()
            w = w - 2 * torch.outer(w @ u, u)
        return w


def own(layer, make, *, frozen=False, name="weight"):
    parametrize.register_parametrization(layer, name, make(getattr(layer, name)))
    getattr(layer.parametrizations, name).original.requires_grad_(not frozen)
    return layer


def in_front(layer, last=nn.Tanh):
    return lambda: nn.Sequential(layer(), last())


def recurrent(change, **options):
    return lambda: Lambda(lambda m, x: m.rnn(x)[0], rnn=change(nn.LSTM(4, 3, batch_first=True), **options))


def pruned():
    layer = prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5)
    return nn.Sequential(prune.random_unstructured(layer, "bias", 0.5), nn.Tanh())


def cached(model, x):
    with parametrize.cached():
        return model.layer(x.cos()).tanh() + model.layer(x)


def tied(model, x):
    return F.linear(model.layer(x).tanh(), model.layer.weight.T)


MADE = {
    "own": (in_front(lambda: own(nn.Linear(4, 4), lambda w: Doubled())), TOKENS),
    "low rank": (in_front(lambda: own(nn.Linear(4, 4), LowRank)), TOKENS),
    "low rank, frozen base": (in_front(lambda: own(nn.Linear(4, 4), LowRank, frozen=True)), TOKENS),
    "low rank filter": (in_front(lambda: own(nn.Conv2d(3, 4, 3), LowRank)), GRID),
    "low rank filter, frozen base": (in_front(lambda: own(nn.Conv2d(3, 4, 3), LowRank, frozen=True)), GRID),
    "reflections": (in_front(lambda: own(nn.Linear(4, 4), Reflections)), TOKENS),
    "reflections, frozen base": (in_front(lambda: own(nn.Linear(4, 4), Reflections, frozen=True)), TOKENS),
    "used twice, cached": (lambda: Lambda(cached, layer=parametrizations.orthogonal(nn.Linear(4, 4))), TOKENS),
    "used transposed": (lambda: Lambda(tied, layer=parametrizations.weight_norm(nn.Linear(4, 3))), TOKENS),
    "rows": (in_front(lambda: parametrizations.weight_norm(nn.Embedding(9, 4))), lambda: torch.randint(9, (5, 3))),
    "transposed filter": (in_front(lambda: parametrizations.weight_norm(nn.ConvTranspose2d(3, 4, 2), dim=1)), GRID),
    "recurrent": (recurrent(parametrizations.weight_norm, name="weight_hh_l0"), STEPS),
    "recurrent, old": (recurrent(nn.utils.weight_norm, name="weight_hh_l0"), STEPS),
    "old weight_norm": (in_front(lambda: nn.utils.weight_norm(nn.Linear(4, 4))), TOKENS),
    "old weight_norm of a filter": (in_front(lambda: nn.utils.weight_norm(nn.Conv2d(3, 4, 3), dim=None)), GRID),
    "old spectral_norm": (in_front(lambda: nn.utils.spectral_norm(nn.Conv2d(3, 4, 3))), GRID),
    "pruned": (pruned, TOKENS),
}
for change in ("weight_norm", "spectral_norm", "orthogonal"):
    of = getattr(parametrizations, change)
    MADE[change] = in_front(lambda of=of: of(nn.Linear(4, 4))), TOKENS
    MADE[f"{change} of a filter"] = in_front(lambda of=of: of(nn.Conv2d(3, 4, 3))), GRID
#: Parameters that are made by arithmetic take "op"; but a mask leaves entries where they are.
FUSED = {"pruned"}


@pytest.mark.filterwarnings("ignore:.*_norm.*is deprecated")
@pytest.mark.parametrize("name", MADE)
def test_parametrized(name):
    make, inputs = MADE[name]
    model, x = make().double().eval(), inputs()
    endings = ("_g", "_v", "_orig")
    made = {n for n, _ in model.named_parameters() if "parametrizations" in n or n.endswith(endings)}
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert_exact(model, x.double() if x.is_floating_point() else x, op=set() if name in FUSED else made - frozen)


def test_cached_around_the_pass():
    """torch keeps what it made of the first forward for all that follow."""
    model, x = own(nn.Linear(4, 4), lambda w: Doubled()).double().eval(), TOKENS().double()
    oracle = naive(model, lambda i: [(1.0, model(x[i : i + 1]).square().sum())], len(x), power=1)
    with parametrize.cached():
        assert_importance(mas_importance(model, [(x,)]), oracle, scales=scales_of(oracle, 1))
        assert_importance(mas_importance(model, [(x,)]), oracle, scales=scales_of(oracle, 1))
