"""Synaptic intelligence kept by the step (E7): by hand, what it includes, names, counting, reset."""

from typing import Any

import pytest
import torch
from torch import nn

import fastewc
from fastewc import EWC
from fastewc.testing import assert_within_roundings
from tests.optim.protected_net import Net


@pytest.mark.parametrize(("mode", "wanted"), [(True, 6.0), (False, None), ("regularized", 10.0)])
def test_path_integral_by_hand(mode: Any, wanted: float | None):
    model = nn.Module()
    model.w = nn.Parameter(torch.tensor([3.0]))
    ewc = EWC(model, ewc_lambda=1.0, variant="plain")
    ewc.consolidate({"w": torch.ones(1)})
    with torch.no_grad():
        model.w += 1  # pull c(w − w*) = 1
    opt = fastewc.optim.SGD(
        model.parameters(), lr=0.5, weight_decay=1.0, ewc=ewc, path_integral=mode, max_grad_norm=1.5e30
    )
    # Δw = −0.5·(1.5 + 1 + 4) = −3.25; −g·Δw = 1.5·3.25 = 4.875 and (1.5 + 1)·3.25 = 8.125.
    model.w.grad = torch.tensor([1.5])
    opt.step()
    assert model.w.item() == 0.75
    # w = 0.75, pull −2.25: Δw = −0.5·(g − 2.25 + 0.75) = −0.5·(0.75 − 1.5) = 0.375.
    model.w.grad = torch.tensor([0.75])
    opt.step()
    assert model.w.item() == 1.125
    if wanted is None:
        assert "path_integral" not in opt.state[model.w]
        with pytest.raises(ValueError, match="path_integral=True"):
            opt.path_integrals()
        return
    term = opt.path_integrals()["w"]
    first, second = (1.5, 0.75) if mode is True else (2.5, -1.5)
    assert term.omega.item() == first * 3.25 - second * 0.375
    assert term.start.item() == 4.0
    assert term.parameter is model.w
    assert opt.path_integral_steps == 2


def test_path_integral_includes_proximal_map_decay_and_rounding():
    model = nn.Module()
    model.w = nn.Parameter(torch.tensor([1.0], dtype=torch.bfloat16))
    ewc = EWC(model, ewc_lambda=1.0, variant="proximal")
    ewc.consolidate({"w": torch.tensor([2.0])})
    opt = fastewc.optim.AdamW(model.parameters(), lr=0.5, weight_decay=0.5, eps=1.0, ewc=ewc, path_integral=True)
    model.w.grad = torch.tensor([1.0], dtype=torch.bfloat16)
    # w′ = 1·(1 − 0.25) − 0.5·1/(1 + 1) = 0.5; αλΩ = 1: w⁺ = (0.5 + 1)/2 = 0.75, ω = −1·(0.75 − 1).
    opt.step()
    term = opt.path_integrals()["w"]
    assert model.w.item() == 0.75
    assert term.omega.item() == 0.25
    assert term.omega.dtype == term.start.dtype == torch.float32
    # w⁺ = 0.75 + tiny rounds back to 0.75: nothing was written, so nothing is added.
    opt.param_groups[0].update(lr=1e-6)
    before = term.omega.item()
    opt.step()
    assert model.w.item() == 0.75
    assert opt.path_integrals()["w"].omega.item() == before


def test_path_integral_start_steps_reset_and_importance():
    model = Net()
    ewc = EWC(model, ewc_lambda=1.0, exclude="head")
    opt = fastewc.optim.SGD(model.parameters(), lr=0.1, ewc=ewc, path_integral=True)
    assert opt.path_integral_steps == 0
    assert {n: (t.omega, t.start) for n, t in opt.path_integrals().items()} == {"a": (None, None), "b": (None, None)}
    with torch.no_grad():
        model.a += 1  # after construction, before the first step: part of the start
    start = model.a.detach().clone()
    for step in range(3):
        model.a.grad, model.b.grad = torch.ones_like(model.a), torch.ones_like(model.b) if step == 0 else None
        opt.step()
    assert opt.path_integral_steps == 3
    term = opt.path_integrals()["a"]
    assert torch.equal(term.start, start)
    assert_within_roundings(term.omega, torch.full_like(start, 3 * 0.1), roundings=16, error_scale=start.abs() + 1)
    importance = fastewc.si_importance(opt, damping=0.1)
    assert importance.num_samples == 3
    assert set(importance) == {"a", "b"}
    wanted = torch.full_like(start, 0.3 / (0.3**2 + 0.1))
    assert_within_roundings(importance["a"], wanted, roundings=64, error_scale=wanted * (1 + start.abs()))
    assert opt.path_integral_steps == 0
    assert opt.path_integrals()["a"].omega is None
    ewc.consolidate(importance)
    model.b.grad = None
    moved = model.a.detach().clone()
    opt.step()
    assert torch.equal(opt.path_integrals()["a"].start, moved)
    assert opt.path_integral_steps == 1


def test_steps_are_counted_where_gradients_come_and_go():
    model = Net()
    opt = fastewc.optim.SGD(model.named_parameters(), lr=0.1, path_integral=True)
    for step in range(5):
        model.a.grad = torch.ones_like(model.a) if step % 2 else None
        model.b.grad = None if step % 2 else torch.ones_like(model.b)
        opt.step()
        assert opt.path_integral_steps == step + 1
    opt.zero_grad()
    opt.step()  # nothing to track
    assert opt.path_integral_steps == 5


def test_names_come_from_ewc_else_named_parameters():
    model = Net()
    opt = fastewc.optim.SGD(model.named_parameters(), lr=0.1, path_integral=True)
    assert list(opt.path_integrals()) == ["a", "b", "head"]
    renamed = [(f"other.{n}", p) for n, p in model.named_parameters()]
    opt = fastewc.optim.SGD(renamed, lr=0.1, path_integral=True, ewc=EWC(model, ewc_lambda=1.0))
    assert list(opt.path_integrals()) == ["a", "b", "head"]
