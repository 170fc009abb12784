"""What each penalty does to a stiff weight, with every implementation of the step that runs here."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import fastewc
from fastewc._dispatch import Impl
from fastewc.ops.ewc_step import StepRule, StepTensors, ewc_step
from fastewc.testing import assert_within_roundings
from tests.ops.drawn_steps import implementations

VARIANTS = ("plain", "stabilized", "proximal", "wva")
PLAIN_SGD = StepRule("sgd", lr=0.1, ewc_lambda=10.0)


def excursion(rule: StepRule, stiff: float, impl: Impl, device: str, steps: int = 300) -> float:
    """How far a weight gets from w* = 0, from 2, on the task ½h(w − 1)² with αh = ½ and αλΩ = ``stiff``."""
    alpha = float(rule.lr)
    w, anchor = torch.full((40,), 2.0, device=device), torch.zeros(40, device=device)
    omega = torch.full((40,), stiff / (alpha * float(rule.ewc_lambda)), device=device)
    zeros = [torch.zeros(40, device=device) for _ in range(3)]
    adam = {"exp_avgs": [zeros[0]], "exp_avg_sqs": [zeros[1]], "steps": [torch.zeros((), device=device)]}
    t = StepTensors([w], [zeros[2]], importances=[omega], anchors=[anchor], **(adam if rule.kind == "adam" else {}))
    if rule.momentum:
        t.momentum_buffers.append(None)
    farthest = 0.0
    for _ in range(steps):
        t.grads[0].copy_((w - 1) * 0.5 / alpha)
        ewc_step(rule, t, impl=impl)
        largest = w.abs().max().item()
        farthest = math.inf if math.isnan(largest) else max(farthest, largest)
    return farthest


def test_plain_sgd_diverges_at_three_with_the_plain_penalty_alone(device: str):
    for impl in implementations(device):
        for variant in VARIANTS:
            far = excursion(replace(PLAIN_SGD, variant=variant), 3.0, impl, device)
            assert (far > 1e9) if variant == "plain" else (far <= 2.0), (impl, variant, far)


STIFF = {
    "sgd-stabilized": replace(PLAIN_SGD, variant="stabilized"),
    "sgd-proximal": replace(PLAIN_SGD, variant="proximal"),
    "sgd-wva": replace(PLAIN_SGD, variant="wva"),
    "momentum-proximal": replace(PLAIN_SGD, variant="proximal", momentum=0.9),
    "momentum-wva": replace(PLAIN_SGD, variant="wva", momentum=0.9),
    "adam-proximal": StepRule("adam", lr=0.1, ewc_lambda=10.0, variant="proximal"),
    "adam-wva": StepRule("adam", lr=0.1, ewc_lambda=10.0, variant="wva"),
}


@pytest.mark.parametrize("rule", STIFF.values(), ids=STIFF)
def test_no_stiffness_destabilises_the_other_penalties(rule: StepRule, device: str):
    for impl in implementations(device):
        far = excursion(rule, 1e9, impl, device)
        assert far <= 2.0, (impl, far)


def test_one_huge_importance_does_not_eat_the_clipped_gradient(device: str):
    """Ω = 1e9 on one weight: the others still move by lr·g·max/‖g‖; clipped together with the penalty they do not."""
    lr, limit = 0.1, 1.0
    gradient = torch.linspace(-2, 3, 100, device=device)
    norm = gradient.double().norm().cpu()
    for impl in implementations(device):
        moves = {}
        for together in (False, True):
            model = torch.nn.Linear(100, 1, bias=False, device=device)
            ewc = fastewc.EWC(model, ewc_lambda=1.0, variant="plain")
            omega = torch.zeros_like(model.weight)
            omega[0, 7] = 1e9
            ewc.consolidate({"weight": omega.detach()})
            with torch.no_grad():
                model.weight += 1.0
                before = model.weight.clone()
            optimizer = fastewc.optim.SGD(
                model.parameters(), lr=lr, ewc=ewc, max_grad_norm=limit, clip_penalty=together, impl=impl
            )
            model.weight.grad = gradient[None].clone()
            optimizer.step()
            moves[together] = (before - model.weight.detach())[0]
            if not together:
                assert_within_roundings(optimizer.grad_norm, norm, roundings=16, context=impl)
        free = torch.arange(100) != 7
        wanted = lr * limit / norm * gradient.double().cpu()
        scale = wanted.abs() + 4  # the weights: they, and so what they lost, are rounded
        own = moves[False].cpu()
        assert_within_roundings(own[free], wanted[free], roundings=16, error_scale=scale[free], context=impl)
        assert not moves[True].cpu()[free].any(), impl  # the norm is 1e9: less than a rounding is left of the step
