"""With ewc: every optimizer and penalty against the equations written out by hand in float64; owners."""

import dataclasses
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastewc
from fastewc import EWC
from fastewc.testing import assert_within_roundings
from tests.optim.protected_net import VARIANTS, Net, gradients, importances, protect

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
        b = fastewc.optim.AdamW(plain.parameters(), lr=0.1)
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
