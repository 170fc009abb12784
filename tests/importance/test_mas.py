"""MAS (E6): hand-worked numbers and the absolute value per sample."""

import itertools
import sys

import pytest
import torch
from torch import nn

from fastewc import mas_importance
from fastewc.testing import assert_within_roundings


def naive(model, norms, n):
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in named.items()}
    for i in range(n):
        grads = torch.autograd.grad(norms(i), list(named.values()))
        for name, grad in zip(named, grads, strict=True):
            total[name] += grad.double().abs()
    return {name: value / n for name, value in total.items()}


def assert_importance(got, oracle):
    assert list(got) == list(oracle)
    for name, value in oracle.items():
        scale = torch.full_like(value, value.abs().max().item())
        assert_within_roundings(got[name], value, roundings=2000, error_scale=scale, context=name)


def net(dtype=torch.float64):
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype).eval()


def test_by_hand():
    # f = w x with w = 2: ∂(w²x²)/∂w = 2 w x² = 4, 16 for x = 1, −2; the mean is 10.
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 2.0)
    got = mas_importance(model, [torch.tensor([[1.0], [-2.0]])])
    assert got["weight"].tolist() == [[10.0]]
    assert (got.method, got.num_samples) == ("mas/logits", 2)


def test_absolute_value_is_per_sample():
    # f = x + b at b = 0: ∂‖f‖²/∂b = 2x, so ±2 cancel in a batch gradient but not here.
    model = nn.Linear(1, 1)
    nn.init.ones_(model.weight), nn.init.zeros_(model.bias)
    assert mas_importance(model, [torch.tensor([[1.0], [-1.0]])])["bias"].tolist() == [2.0]


def test_softmax_by_hand():
    # z = (w x, 0) at w = 0, x = 1: p = (½, ½), ‖p‖² has gradient 2p(p − Σp²) = 2·½(½ − ½) = 0 there.
    model = nn.Linear(1, 2, bias=False)
    nn.init.zeros_(model.weight)
    assert mas_importance(model, [torch.ones(1, 1)], output="softmax")["weight"].count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("positions", [(), (3,)])
@pytest.mark.parametrize("output", ["logits", "softmax"])
def test_against_autograd(output, positions, dtype):
    model, x = net(dtype), torch.randn(7, *positions, 4, dtype=dtype)

    def norms(i):
        out = model(x[i : i + 1])
        return (out.softmax(-1) if output == "softmax" else out).square().sum()

    data = [x[a:b] for a, b in itertools.pairwise((0, 3, 4, 7))]
    assert_importance(mas_importance(model, data, output), naive(model, norms, 7))


def test_targets_are_not_needed_but_mask():
    model, x = net(), torch.randn(4, 3, 4, dtype=torch.float64)
    y = torch.randint(0, 3, (4, 3))
    plain = mas_importance(model, [x])
    with_targets = mas_importance(model, [(x, y)])
    assert all(torch.equal(plain[name], with_targets[name]) for name in plain)
    y[1, 2] = y[3, 0] = -100
    oracle = naive(model, lambda i: model(x[i])[y[i] != -100].square().sum(), 4)
    assert_importance(mas_importance(model, [(x, y)]), oracle)


@pytest.mark.parametrize("shape", [(5,), (5, 3)])
def test_elementwise_targets_mask_entries(shape):
    model = net() if len(shape) == 2 else nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)).double()
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    y.view(-1)[[0, 2]] = -100

    def norms(i):
        return model(x[i : i + 1]).reshape(-1)[y[i].reshape(-1) != -100].square().sum()

    assert_importance(mas_importance(model, [(x, y)]), naive(model, norms, 5))
    if len(shape) == 2:
        with pytest.raises(ValueError, match="softmax"):
            mas_importance(model, [(x, y)], output="softmax")
        assert mas_importance(model, [(x, y * 0)], output="softmax").num_samples == 5


def test_class_dimension_must_be_last():
    conv, x = nn.Conv1d(2, 3, 1), torch.randn(2, 2, 5)
    y = torch.zeros(2, 5, dtype=torch.long)
    with pytest.raises(ValueError, match="forward"):
        mas_importance(conv, [(x, y)], output="softmax")
    assert mas_importance(conv, [(x, y)]).num_samples == 2
    y[0, 0] = -100  # would not be found in [N, C]
    with pytest.raises(ValueError, match="forward"):
        mas_importance(conv, [(x, y)])


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_the_seed_comes_from_the_asked_implementation(monkeypatch, impl):
    asked = []
    module = sys.modules["fastewc.importance.mas"]
    seed = module.squared_norm_grad
    monkeypatch.setattr(
        module, "squared_norm_grad", lambda y, output, impl: asked.append(impl) or seed(y, output, impl)
    )
    mas_importance(net(), [torch.ones(1, 4, dtype=torch.float64)], impl=impl)
    assert asked == [impl]


def test_one_output_without_a_class_dimension():
    model, x = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)), torch.randn(5, 4)
    oracle = naive(model, lambda i: model(x[i : i + 1]).square().sum(), 5)
    assert_importance(mas_importance(model, [x]), oracle)
    with pytest.raises(ValueError, match="softmax"):
        mas_importance(model, [x], output="softmax")


def test_bf16_model_is_summed_in_float32():
    model, x = net(torch.bfloat16), torch.randn(300, 4, dtype=torch.bfloat16)
    got = mas_importance(model, [x])
    oracle = naive(model, lambda i: model(x[i : i + 1]).float().square().sum(), 300)
    for name, value in oracle.items():  # its weight gradients are rounded to bfloat16, ours are not
        assert_within_roundings(got[name], value, roundings=8, dtype=torch.bfloat16)


def test_unknown_output():
    with pytest.raises(ValueError, match="softmax"):
        mas_importance(net(), [torch.ones(1, 4)], output="probabilities")
