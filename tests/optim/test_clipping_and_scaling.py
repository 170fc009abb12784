"""Clipping the task gradient, and the protocol of torch.amp.GradScaler."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fastewc
from fastewc import EWC
from fastewc.testing import assert_within_roundings
from tests.optim.protected_net import VARIANTS, Net, assert_equal_trees, gradients, protect


def two_weights() -> tuple[nn.Module, EWC]:
    model = nn.Module()
    model.w = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    model.free = nn.Parameter(torch.tensor([0.0], dtype=torch.float64))
    ewc = EWC(model, ewc_lambda=1.0, variant="plain", exclude="free")
    ewc.consolidate({"w": torch.tensor([0.0, 1000.0])})
    with torch.no_grad():
        model.w[1] = 2.5  # penalty gradient 500
    return model, ewc


def test_only_the_task_gradient_is_clipped_over_all_groups():
    model, ewc = two_weights()
    groups = [{"params": [model.w]}, {"params": [model.free], "lr": 0.5}]
    opt = fastewc.optim.SGD(groups, lr=1e-3, ewc=ewc, max_grad_norm=1.0)
    assert opt.grad_norm is None
    model.w.grad, model.free.grad = (
        torch.tensor([3.0, 0.0], dtype=torch.float64),
        torch.tensor([4.0], dtype=torch.float64),
    )
    opt.step()
    assert opt.grad_norm.shape == ()
    assert opt.grad_norm.item() == 5.0
    coef = 1 / (5 + 1e-6)
    assert_within_roundings(
        model.w.detach(), torch.tensor([1 - 1e-3 * 3 * coef, 2.5 - 0.5], dtype=torch.float64), roundings=16
    )
    assert_within_roundings(model.free.detach(), torch.tensor([-0.5 * 4 * coef], dtype=torch.float64), roundings=16)
    assert model.w.grad.tolist() == [3.0, 0.0]
    assert model.free.grad.tolist() == [4.0]


def test_the_papers_order_lets_one_stiff_weight_eat_the_norm():
    model, ewc = two_weights()
    opt = fastewc.optim.SGD(model.parameters(), lr=1e-3, ewc=ewc, max_grad_norm=1.0, clip_penalty=True)
    model.w.grad, model.free.grad = (
        torch.tensor([3.0, 0.0], dtype=torch.float64),
        torch.tensor([4.0], dtype=torch.float64),
    )
    opt.step()
    norm = (3.0**2 + 500.0**2 + 4.0**2) ** 0.5
    assert_within_roundings(opt.grad_norm, torch.tensor(norm, dtype=torch.float64), roundings=8)
    coef = 1 / (norm + 1e-6)
    wanted = torch.tensor([1 - 1e-3 * 3 * coef, 2.5 - 1e-3 * 500 * coef], dtype=torch.float64)
    assert_within_roundings(model.w.detach(), wanted, roundings=16)
    # The same as torch's recipe with the penalty in the loss.
    twin, other = two_weights()
    sgd = torch.optim.SGD(twin.parameters(), lr=1e-3)
    (3 * twin.w[0] + 4 * twin.free.sum() + other.penalty()).backward()
    torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
    sgd.step()
    assert_within_roundings(model.w.detach(), twin.w.detach(), roundings=16)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_clipping_is_clip_grad_norm_without_touching_gradients(name: str):
    mine, torchs = Net(), Net()
    a = getattr(fastewc.optim, name)(mine.parameters(), lr=0.1, max_grad_norm=0.5)
    b = getattr(torch.optim, name)(torchs.parameters(), lr=0.1, foreach=False)
    for step in range(5):
        for m in (mine, torchs):
            for _, p, g in gradients(m, step):
                p.grad = g
        norm = torch.nn.utils.clip_grad_norm_(torchs.parameters(), 0.5)
        a.step()
        b.step()
        assert_within_roundings(a.grad_norm, norm, roundings=16)
    for p, q in zip(mine.parameters(), torchs.parameters(), strict=True):
        assert_within_roundings(p.detach(), q.detach(), roundings=200, error_scale=q.detach().abs() + 1)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize("unscale_first", [False, True])
def test_grad_scaler_on_cpu(name: str, variant: str, unscale_first: bool):
    scaled, plain = Net(torch.float32), Net(torch.float32)
    options: dict[str, Any] = {"lr": 0.1, "path_integral": True, "max_grad_norm": 0.5}
    a = getattr(fastewc.optim, name)(scaled.parameters(), ewc=protect(scaled, variant), **options)
    b = getattr(fastewc.optim, name)(plain.parameters(), ewc=protect(plain, variant), **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(6):
        for model, optimizer in ((scaled, a), (plain, b)):
            optimizer.zero_grad()
            x = torch.full((3,), float("inf") if step == 3 else 0.1 * (step + 1))
            loss = (model.a @ x).square().sum() * model.head + model.b.sin().sum()
            if model is plain:
                loss.backward()
            else:
                scaler.scale(loss).backward()
        before = [p.detach().clone() for p in scaled.parameters()]
        state = copy.deepcopy(a.state_dict())
        if unscale_first:
            scaler.unscale_(a)
        scaler.step(a)
        scaler.update()
        if step == 3:  # an overflow: nothing changes, no counter advances
            assert all(torch.equal(p, q) for p, q in zip(scaled.parameters(), before, strict=True))
            assert_equal_trees(a.state_dict(), state)
            assert scaler.get_scale() == 512.0
        else:
            b.step()
    assert a.path_integral_steps == 5
    # Scales are powers of two, so both did the same arithmetic.
    assert all(torch.equal(p, q) for p, q in zip(scaled.parameters(), plain.parameters(), strict=True))
    assert torch.equal(a.path_integrals()["a"].omega, b.path_integrals()["a"].omega)


def test_found_inf_is_honoured_without_grad_scale_and_before_any_state_exists():
    model = Net()
    opt = fastewc.optim.Adam(model.parameters(), lr=0.1, ewc=protect(model), path_integral=True, max_grad_norm=1.0)
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    opt.found_inf = torch.tensor(1.0)
    opt.step()
    assert not opt.state
    assert opt.grad_norm is None
    assert opt.path_integral_steps == 0
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), Net().parameters(), strict=True))
    opt.found_inf = torch.tensor(0.0)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    assert all(opt.state[p]["step"] == 1 for p in model.parameters())


def test_a_skipped_first_step_leaves_the_momentum_unstarted():
    p = nn.Parameter(torch.ones(2))
    opt = fastewc.optim.SGD([p], lr=0.1, momentum=0.9, dampening=0.5)
    p.grad = torch.full((2,), float("inf"))
    opt.found_inf = torch.tensor(1.0)
    opt.step()
    del opt.found_inf
    p.grad = torch.ones(2)
    opt.step()
    assert opt.state[p]["momentum_buffer"].tolist() == [1.0, 1.0]  # g, not (1 − τ)g
