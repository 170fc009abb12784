"""Importances of whole batches against autograd on one sample after the other."""

import itertools
from unittest.mock import patch

import torch
from torch import nn

from fastewc import fisher_importance, mas_importance
from fastewc.testing import assert_within_roundings


class Lambda(nn.Module):
    """A module with parts, and a function of it and the input for its forward."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x)


def weight(*shape):
    return nn.Parameter(torch.randn(*shape))


def floats(*shape):
    return lambda: torch.randn(*shape)


def ids(high, *shape):
    return lambda: torch.randint(0, high, shape)


def with_statistics(model):
    """The model with running statistics as after training."""
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model


def naive(model, losses, n, power=2):
    """(1/N) Σ_n Σ_k weight_k |∂loss_k/∂w|^power, losses(i) → [(weight, scalar)], one backward() each."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in named.items()}
    for i in range(n):
        for weight, loss in losses(i):
            for p in named.values():
                p.grad = None
            loss.backward(retain_graph=True)
            for name, p in named.items():
                if p.grad is not None:
                    total[name] += weight * p.grad.to_dense().double().abs() ** power
                    p.grad = None
    return {name: value / n for name, value in total.items()}


def assert_importance(got, oracle, roundings=2000.0, dtype=None, scales=None):
    """Same names, and every entry right relative to its parameter's largest (a backward mixes rows and columns)."""
    assert list(got) == list(oracle)
    for name, value in oracle.items():
        largest = value.abs().max().item() if value.numel() else 0.0
        scale = torch.full_like(value, largest if scales is None else scales[name])
        assert_within_roundings(got[name], value, roundings=roundings, error_scale=scale, dtype=dtype, context=name)


def scales_of(oracle, power):
    """How wrong a parameter's entries may be, for gradients that are wrong by roundings of the model's largest one.

    Some gradients cancel, as that of a key's bias in attention: what remains of them is nothing but others' roundings.
    """
    largest = max(value.max().item() for value in oracle.values() if value.numel())
    # |g + δ|^2 − |g|^2 is about 2|g|δ
    return {n: largest if power == 1 else (largest * v.max().item()) ** 0.5 for n, v in oracle.items()}


def batches(*tensors, cuts=()):
    """The same samples in several batches."""
    edges = [0, *cuts, len(tensors[0])]
    return [tuple(t[a:b] for t in tensors) for a, b in itertools.pairwise(edges)]


def paths(got):
    """Names by path."""
    found = {"fused": set(), "op": set(), "batch-1": set(), "unused": set()}
    for name, (path, _) in got.report.items():
        found[path].add(name)
    return found


def assert_exact(model, x, *, cuts=((), (2, 3)), slow=(), op=(), unused=(), roundings=4000.0):
    """Fisher (gaussian: of any output) and MAS agree with autograd for every way to cut the samples into batches.

    ``slow``, ``op`` and ``unused`` are the names of the parameters that take those paths; all others are "fused".
    """
    assert not model.training
    with torch.no_grad():
        y = torch.randn_like(torch.stack([model(x[i : i + 1])[0] for i in range(len(x))]))

    def half_square(i):
        return [(1.0, 0.5 * (model(x[i : i + 1])[0] - y[i]).square().sum())]

    def norm(i):
        return [(1.0, model(x[i : i + 1])[0].square().sum())]

    fisher, mas = naive(model, half_square, len(x)), naive(model, norm, len(x), power=1)
    wanted = {"op": set(op), "batch-1": set(slow), "unused": set(unused)}
    wanted["fused"] = set(fisher) - wanted["op"] - wanted["batch-1"] - wanted["unused"]
    for cut in cuts:
        # Small batches would be joined again, if they all fitted into the caches.
        with patch("fastewc.per_sample.engine.CACHED", 1 if cut else 1 << 14):
            got = fisher_importance(model, batches(x, y, cuts=cut), loss="gaussian")
            other = mas_importance(model, batches(x, cuts=cut))
        assert_importance(got, fisher, roundings, scales=scales_of(fisher, 2))
        if cut == ():  # samples that come alone are differentiated alone
            assert paths(got) == wanted, got.report
        assert_importance(other, mas, roundings, scales=scales_of(mas, 1))


class Cube(torch.autograd.Function):
    """(x wᵀ)³ in a way that no torch function shows."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return (x @ w.T) ** 3

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        d = 3 * (x @ w.T) ** 2 * g
        return d @ w, d.flatten(0, -2).T @ x.flatten(0, -2)
