"""With ewc: every optimizer and penalty against the equations written out by hand in float64, clipping, AMP, owners."""

import copy
import dataclasses
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastewc
from fastewc import EWC, Importance
from fastewc.testing import assert_within_roundings

VARIANTS = ["plain", "stabilized", "proximal", "wva"]
OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.05}),
    ("SGD", {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.05, "momentum": 0.9, "dampening": 0.2, "maximize": True}),
    ("SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    ("Adam", {"lr": 0.02, "weight_decay": 0.1, "betas": (0.8, 0.95)}),
    ("Adam", {"lr": 0.02, "amsgrad": True, "maximize": True}),
    ("AdamW", {"lr": 0.02, "weight_decay": 0.5}),
]
IDS = ["sgd", "momentum", "dampening", "nesterov", "adam", "amsgrad", "adamw"]


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(5)
        self.a = nn.Parameter(torch.randn(4, 3, generator=g, dtype=torch.float64).to(dtype))
        self.b = nn.Parameter(torch.randn(5, generator=g, dtype=torch.float64).to(dtype))
        self.head = nn.Parameter(torch.randn((), generator=g, dtype=torch.float64).to(dtype))


def importances(model: Net, seed: int = 6) -> Importance:
    """αλΩ from 1e-6 to about 1e2 at αλ = 0.1, exact zeros among them."""
    g = torch.Generator().manual_seed(seed)
    values = {}
    for name, p in model.named_parameters():
        if name != "head":
            values[name] = 10 ** (8 * torch.rand(p.shape, generator=g, dtype=torch.float64) - 5)
            values[name].view(-1)[0] = 0
    return Importance(values, num_samples=8, method="test")


def protect(model: Net, variant: str = "stabilized", ewc_lambda: float = 2.0) -> EWC:
    ewc = EWC(model, ewc_lambda=ewc_lambda, variant=variant, exclude="head")
    ewc.consolidate(importances(model))
    return ewc


def gradients(model: Net, step: int) -> Iterator[tuple[str, nn.Parameter, Tensor | None]]:
    g = torch.Generator().manual_seed(1000 + step)
    for name, p in model.named_parameters():
        value = torch.randn(p.shape, generator=g, dtype=torch.float64)
        yield name, p, None if name == "b" and step in (1, 7) else value


@dataclasses.dataclass
class ByHand:
    """One weight tensor under E1–E4 in float64, written from the equations and sharing nothing with the package."""

    kind: str
    options: dict[str, Any]
    variant: str
    ewc_lambda: float
    omega: Tensor
    anchor: Tensor
    w: Tensor
    b: Tensor | None = None
    m: Tensor | float = 0.0
    v: Tensor | float = 0.0
    vmax: Tensor | float = 0.0
    t: int = 0
    path: Tensor | float = 0.0

    def step(self, g: Tensor) -> None:
        o, w, lr = self.options, self.w, self.options["lr"]
        if o.get("maximize"):
            g = -g
        g_task, stiff = g, self.ewc_lambda * self.omega
        if self.variant == "plain":
            g = g + stiff * (w - self.anchor)
        elif self.variant == "stabilized":
            g = g + stiff / (lr * stiff + 1) * (w - self.anchor)
        eta = o.get("weight_decay", 0)
        start = w
        if self.kind == "AdamW":
            w = w - lr * eta * w
        else:
            g = g + eta * w
        w = w - (self.sgd(g) if self.kind == "SGD" else self.adam(g))
        s = lr * stiff
        if self.variant == "proximal":
            w = (w + s * self.anchor) / (1 + s)
        elif self.variant == "wva":
            w = start + (w - start) / (1 + s)
        self.path = self.path - g_task * (w - start)
        self.w = w

    def sgd(self, g: Tensor) -> Tensor:
        o, mu = self.options, self.options.get("momentum", 0)
        if mu:
            self.b = g if self.b is None else mu * self.b + (1 - o.get("dampening", 0)) * g
            g = g + mu * self.b if o.get("nesterov") else self.b
        return o["lr"] * g

    def adam(self, g: Tensor) -> Tensor:
        beta1, beta2 = self.options.get("betas", (0.9, 0.999))
        self.t += 1
        self.m = beta1 * self.m + (1 - beta1) * g
        self.v = beta2 * self.v + (1 - beta2) * g**2
        self.vmax = torch.maximum(torch.as_tensor(self.vmax, dtype=g.dtype), self.v)
        v = self.vmax if self.options.get("amsgrad") else self.v
        m_hat, v_hat = self.m / (1 - beta1**self.t), v / (1 - beta2**self.t)
        return self.options["lr"] * m_hat / (v_hat.sqrt() + 1e-8)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("name", "options"), OPTIMIZERS, ids=IDS)
def test_50_steps_are_the_equations_by_hand(name: str, options: dict[str, Any], variant: str):
    model = Net()
    ewc = protect(model, variant, ewc_lambda=2.0)
    omegas, anchors = ewc.importances(), ewc.anchors()
    opt = getattr(fastewc.optim, name)(model.parameters(), ewc=ewc, path_integral=True, **options)
    hand = {}
    for n, p in model.named_parameters():
        omega = omegas[n] if n in omegas else torch.zeros_like(p)
        anchor = anchors.get(n, torch.zeros_like(p)).clone()
        hand[n] = ByHand(name, options, variant, 2.0, omega, anchor, p.detach().clone())
    extreme = {n: h.w.abs() for n, h in hand.items()}
    for step in range(50):
        for n, p, g in gradients(model, step):
            p.grad = g
            if g is not None:
                hand[n].step(g)
                extreme[n] = torch.maximum(extreme[n], hand[n].w.abs())
        opt.step()
    # Each step adds about 20 roundings of what it adds up; where a stiff weight under the plain penalty oscillates or
    # diverges, they are of the size of its largest excursion, which enters its own later steps.
    terms = opt.path_integrals()
    for n, p in model.named_parameters():
        scale = 50 * (extreme[n] + 10)
        assert_within_roundings(p, hand[n].w, roundings=20 * 50, error_scale=scale, context=n)
        if n != "head":
            path = torch.as_tensor(hand[n].path)
            bound = scale * 50
            assert_within_roundings(terms[n].omega, path, roundings=20 * 50, error_scale=bound, context=n)
    assert set(terms) == {"a", "b"}
    assert opt.path_integral_steps == 50


def test_before_the_first_task_and_at_lambda_0_steps_are_the_plain_ones():
    for ewc_of in (lambda m: EWC(m, ewc_lambda=3.0), lambda m: protect(m, ewc_lambda=0.0)):
        model, plain = Net(), Net()
        a = fastewc.optim.AdamW(model.parameters(), lr=0.1, ewc=ewc_of(model))
        b = torch.optim.AdamW(plain.parameters(), lr=0.1, foreach=False, fused=False)
        for step in range(3):
            for m in (model, plain):
                for _, p, g in gradients(m, step):
                    p.grad = g
            a.step()
            b.step()
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("tensor", [False, True])
def test_alpha_is_the_live_lr_of_each_group_and_lambda_is_live(tensor: bool):
    model = Net()
    ewc = EWC(model, ewc_lambda=1.0, variant="proximal")
    ewc.consolidate({n: torch.full_like(p, 3.0) for n, p in model.named_parameters()})
    w, anchors = {n: p + 1 for n, p in model.named_parameters()}, ewc.anchors()
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(w[n])
    lrs = [torch.tensor(0.5), torch.tensor(0.25)] if tensor else [0.5, 0.25]
    groups = [{"params": [model.a], "lr": lrs[0]}, {"params": [model.b, model.head], "lr": lrs[1]}]
    opt = fastewc.optim.SGD(groups, ewc=ewc)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    for n, p in model.named_parameters():
        s = (0.5 if n == "a" else 0.25) * 3
        assert_within_roundings(
            p.detach(), (w[n] + s * anchors[n]).detach() / (1 + s), roundings=8, error_scale=w[n].abs() + 9
        )
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    ewc.ewc_lambda = 8.0
    opt.param_groups[0]["lr"] = 0.125
    opt.step()
    for n, p in model.named_parameters():
        s = (0.125 if n == "a" else 0.25) * 3 * 8
        wanted = (before[n] + s * anchors[n]) / (1 + s)
        assert_within_roundings(p.detach(), wanted, roundings=8, error_scale=before[n].abs() + 9)


def test_frozen_midway_and_absent_gradients_are_skipped_not_pulled():
    model = Net()
    opt = fastewc.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, ewc=protect(model))
    for step in range(4):
        model.b.requires_grad_(step < 2)
        loss = (model.a.sum() + model.b.sum()) * model.head
        opt.zero_grad()
        loss.backward()
        before = model.b.detach().clone()
        opt.step()
        assert torch.equal(model.b, before) == (step >= 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_penalty_is_computed_in_float32(dtype: torch.dtype):
    # One step of plain SGD from w = w* + 2⁻⁵: bf16 arithmetic would lose the bits of αc that float32 keeps.
    model = Net(dtype)
    ewc = EWC(model, ewc_lambda=1.0, variant="stabilized")
    ewc.consolidate({n: torch.full(p.shape, 1.01) for n, p in model.named_parameters()})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(2**-5)
    opt = fastewc.optim.SGD(model.parameters(), lr=0.7, ewc=ewc)
    wanted = {}
    for n, p in model.named_parameters():
        p.grad = torch.full_like(p, 0.3)
        w, anchor = p.detach().double(), ewc.anchors()[n].double()
        c = 1.01 / (1 + 0.7 * 1.01)
        wanted[n] = w - 0.7 * (p.grad.double() + c * (w - anchor))
    opt.step()
    for n, p in model.named_parameters():
        scale = wanted[n].abs() + 1
        assert p.dtype == dtype
        assert_within_roundings(p, wanted[n], roundings=8, error_scale=scale, context=n)


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


def assert_equal_trees(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal_trees(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal_trees(x, y)
    elif isinstance(a, Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    else:
        assert a == b


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_state_dict_carries_num_tasks_and_refuses_another(name: str):
    cls = getattr(fastewc.optim, name)
    model = Net()
    ewc = protect(model)
    opt = cls(model.parameters(), lr=0.1, ewc=ewc)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    assert [g["num_tasks"] for g in saved["param_groups"]] == [1]
    assert "num_tasks" not in opt.param_groups[0]

    without = cls(model.parameters(), lr=0.3)
    unchanged = copy.deepcopy(without.state_dict())
    with pytest.raises(ValueError, match=r"saved with 1 consolidated tasks, but this optimizer has no ewc.*EWC\.load"):
        without.load_state_dict(saved)
    assert_equal_trees(without.state_dict(), unchanged)
    fresh = cls(model.parameters(), lr=0.3, ewc=EWC(model, ewc_lambda=1.0))
    with pytest.raises(ValueError, match="has an ewc with 0 consolidated tasks"):
        fresh.load_state_dict(saved)

    same = cls(model.parameters(), lr=0.3, ewc=ewc)
    same.load_state_dict(saved)
    assert same.param_groups[0]["lr"] == 0.1
    assert "num_tasks" not in same.param_groups[0]
    assert_equal_trees(same.state_dict(), saved)
    ewc.consolidate(importances(model))
    assert same.state_dict()["param_groups"][0]["num_tasks"] == 2
    with pytest.raises(ValueError, match="saved with 1 consolidated tasks, but this optimizer has an ewc with 2"):
        same.load_state_dict(saved)


def test_zero_tasks_load_without_ewc_and_torchs_checkpoints_always():
    model = Net()
    zero = fastewc.optim.SGD(model.parameters(), lr=0.1, ewc=EWC(model, ewc_lambda=1.0)).state_dict()
    assert zero["param_groups"][0]["num_tasks"] == 0
    plain = fastewc.optim.SGD(model.parameters(), lr=0.3)
    plain.load_state_dict(zero)
    assert "num_tasks" not in plain.state_dict()["param_groups"][0]
    torchs = torch.optim.SGD(model.parameters(), lr=0.2).state_dict()
    protected = fastewc.optim.SGD(model.parameters(), lr=0.1, ewc=protect(model))
    protected.load_state_dict(torchs)
    assert protected.param_groups[0]["lr"] == 0.2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_resuming_with_a_path_integral_is_bitwise(dtype: torch.dtype, tmp_path: Any):
    def made() -> tuple[Net, torch.optim.Optimizer]:
        model = Net(dtype)
        return model, fastewc.optim.AdamW(model.parameters(), lr=0.1, ewc=protect(model), path_integral=True)

    def run(model: Net, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            for _, p, g in gradients(model, step):
                p.grad = None if g is None else g.to(dtype)
            optimizer.step()

    one, a = made()
    run(one, a, range(4))
    torch.save((one.state_dict(), a.state_dict()), tmp_path / "both.pt")
    two, b = made()
    weights, state = torch.load(tmp_path / "both.pt", weights_only=True)
    two.load_state_dict(weights)
    b.register_load_state_dict_pre_hook(lambda _, sd: {**sd, "state": dict(reversed(sd["state"].items()))})
    b.load_state_dict(state)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(t.omega.dtype == t.start.dtype == wide for t in b.path_integrals().values())
    run(one, a, range(4, 8))
    run(two, b, range(4, 8))
    assert_equal_trees(a.state_dict(), b.state_dict())
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
    assert b.path_integral_steps == 8


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_keep_their_own_ewc_and_step_alike(how: str):
    model = Net()
    opt = fastewc.optim.Adam(
        model.parameters(), lr=0.1, ewc=protect(model), path_integral="regularized", max_grad_norm=1.0
    )
    for _, p, g in gradients(model, 0):
        p.grad = g
    opt.step()
    pair = (model, opt)
    twin, other = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert other.ewc is not opt.ewc
    assert other.ewc.num_tasks == 1
    assert other.path_integral == "regularized"
    for m in (model, twin):
        for _, p, g in gradients(m, 2):
            p.grad = g
    opt.step()
    other.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    assert_equal_trees(opt.state_dict(), other.state_dict())


def test_a_newer_optimizer_takes_over():
    model = Net()
    ewc = protect(model)
    old = fastewc.optim.SGD(model.parameters(), lr=0.1, ewc=ewc)
    new = fastewc.optim.SGD(model.parameters(), lr=0.1, ewc=ewc)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="newer optimizer"):
        old.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), Net().parameters(), strict=True))
    new.step()


def test_a_constructor_that_fails_takes_nothing_over():
    model = Net()
    ewc = protect(model)
    old = fastewc.optim.SGD(model.parameters(), lr=0.1, ewc=ewc)
    with pytest.raises(ValueError, match="max_grad_norm"):
        fastewc.optim.SGD(model.parameters(), lr=0.1, ewc=ewc, max_grad_norm=-1.0)
    with pytest.raises(TypeError, match=r"ewc must be a fastewc\.EWC, got Importance"):
        fastewc.optim.SGD(model.parameters(), lr=0.1, ewc=importances(model))
    old.step()


def test_unknown_parameters_are_named_once_and_stepped_plainly():
    model, stranger = Net(), nn.Parameter(torch.ones(2))
    ewc = protect(model)
    with pytest.warns(UserWarning, match="unprotected"):
        opt = fastewc.optim.SGD([*model.parameters(), stranger], lr=0.5, ewc=ewc)
    stranger.grad = torch.ones(2)
    opt.step()
    assert stranger.tolist() == [0.5, 0.5]
    extra = nn.Parameter(torch.ones(3))
    with pytest.warns(UserWarning, match="unprotected"):
        opt.add_param_group({"params": [extra]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()


def test_penalty_with_gradients_raises_while_fused_and_reads_under_no_grad():
    model = Net()
    ewc = protect(model)
    opt = fastewc.optim.SGD(model.parameters(), lr=0.5, ewc=ewc)
    with pytest.raises(RuntimeError, match="twice"):
        ewc.penalty(lr=opt)
    with torch.no_grad():
        assert ewc.penalty(lr=0.5).item() == 0.0


@pytest.mark.parametrize("option", [{"ewc": True}, {"max_grad_norm": 1.0}, {"path_integral": True}])
def test_dtensor_parameters_are_refused_by_name(option: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    model = Net()
    if option.pop("ewc", False):
        option["ewc"] = protect(model)
    monkeypatch.setattr("fastewc.optim._base.is_dtensor", lambda t: t is model.b)
    with pytest.raises(NotImplementedError, match="DTensor"):
        fastewc.optim.SGD(model.named_parameters(), lr=0.1, **option)
    opt = fastewc.optim.SGD([("a", model.a)], lr=0.1, **option)
    with pytest.raises(NotImplementedError, match="DTensor"):
        opt.add_param_group({"params": [("b", model.b)]})
    assert len(opt.param_groups) == 1
