"""What DESIGN says of the four penalties, true and untrue: closed forms, stability limits, optima.

Everything is on one quadratic weight, task loss ½h(w − a)², held at w* = 0, in float64. s = αλΩ.
"""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastewc
from fastewc import EWC
from fastewc.testing import assert_within_roundings

F64 = torch.float64
S = [0.0, 1.0, 2.5, 1e6]
MU = 0.9
METHODS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "heavy": {"momentum": MU},
    "nesterov": {"momentum": MU, "nesterov": True},
}
# The largest αh with which the unprotected step is stable on a quadratic.
LIMITS = {"sgd": 2.0, "heavy": 2 * (1 + MU), "nesterov": 2 * (1 + MU) / (1 + 2 * MU)}


def weight(value: float = 1.0) -> nn.Module:
    model = nn.Module()
    model.w = nn.Parameter(torch.tensor([value], dtype=F64))
    return model


def protected(variant: str, s: float, *, lr: float, name: str = "SGD", start: float = 1.0, **options: Any):
    """A weight at ``start``, held at 0 with αλΩ = s, and its optimizer."""
    model = weight(0.0)
    ewc = EWC(model, ewc_lambda=1.0, variant=variant)
    ewc.consolidate({"w": torch.tensor([s / lr], dtype=F64)})
    with torch.no_grad():
        model.w.fill_(start)
    return model.w, getattr(fastewc.optim, name)(model.parameters(), lr=lr, ewc=ewc, **options)


def descend(w: Tensor, opt: torch.optim.Optimizer, h: float, a: float, steps: int) -> list[float]:
    """w after each step on ½h(w − a)²; stops where it has diverged."""
    path = []
    for _ in range(steps):
        w.grad = h * (w.detach() - a)
        opt.step()
        path.append(w.item())
        if not abs(path[-1]) < 1e30:
            break
    return path


def settles(path: list[float], at: float) -> bool:
    """Whether a path has come within 1e-6 of ``at`` and stays there for its last 50 steps."""
    return all(abs(x - at) < 1e-6 for x in path[-50:])


def spectral_radius(method: str, alpha_h: float, s: float, variant: str) -> float:
    """The largest |eigenvalue| of the iteration (w, b) → (w⁺, b⁺), measured by stepping two basis states.

    The step is linear where a = w* = 0, so its matrix is what it does to w = 1, b = 0 and to w = 0, b = 1.
    """
    lr, columns = 0.5, []
    options = METHODS[method]
    for start, momentum in ((1.0, 0.0), (0.0, 1.0)):
        w, opt = protected(variant, s, lr=lr, start=start, **options)
        if options:
            opt.state[w]["momentum_buffer"] = torch.tensor([momentum], dtype=F64)
        descend(w, opt, alpha_h / lr, 0.0, 1)
        columns.append([w.item(), opt.state[w]["momentum_buffer"].item() if options else 0.0])
    return torch.linalg.eigvals(torch.tensor(columns, dtype=F64).T).abs().max().item()


@pytest.mark.parametrize("s", S)
@pytest.mark.parametrize(
    ("variant", "factor"),
    [
        ("plain", lambda s: 1 - s),
        ("stabilized", lambda s: 1 - s / (1 + s)),
        ("proximal", lambda s: 1 / (1 + s)),
        ("wva", lambda s: 1.0),
    ],
)
def test_without_a_task_gradient_w_is_multiplied_by_a_known_factor(variant: str, factor: Any, s: float):
    """E1: 1 − s. E2: 1/(1 + s). E3: 1/(1 + s). E4: 1, a brake does not pull."""
    w, opt = protected(variant, s, lr=0.5)
    path = descend(w, opt, 0.0, 0.0, 10)
    for n, x in enumerate(path[:10], start=1):
        exact = factor(s) ** n
        # n steps, each with a few roundings of terms no larger than |w| before the step times (1 + s) for E1.
        scale = abs(factor(s)) ** (n - 1) * ((1 + s) if variant == "plain" else 1.0)
        got, wanted = torch.tensor(x, dtype=F64), torch.tensor(exact, dtype=F64)
        assert_within_roundings(got, wanted, roundings=8 * n, error_scale=torch.tensor(scale, dtype=F64))


@pytest.mark.parametrize("s", S)
@pytest.mark.parametrize("variant", ["plain", "stabilized", "proximal", "wva"])
def test_one_step_against_a_constant_gradient(variant: str, s: float):
    g, lr, start = 3.0, 0.25, -2.0
    w, opt = protected(variant, s, lr=lr, start=start)
    w.grad = torch.tensor([g], dtype=F64)
    opt.step()
    free = start - lr * g
    wanted = {
        "plain": free - s * start,
        "stabilized": free - s / (1 + s) * start,
        "proximal": free / (1 + s),
        "wva": start - lr * g / (1 + s),
    }[variant]
    scale = torch.tensor([(1 + s) * 3.0], dtype=F64) if variant == "plain" else torch.tensor([3.0], dtype=F64)
    assert_within_roundings(w.detach(), torch.tensor([wanted], dtype=F64), roundings=8, error_scale=scale)


@pytest.mark.parametrize("variant", ["stabilized", "proximal", "wva"])
@pytest.mark.parametrize("s", S)
def test_with_sgd_the_pull_of_one_step_never_exceeds_the_distance(variant: str, s: float):
    w, opt = protected(variant, s, lr=0.1, start=5.0)
    path = descend(w, opt, 0.0, 0.0, 20)
    assert all(0 <= b <= a for a, b in itertools.pairwise([5.0, *path]))


@pytest.mark.parametrize("method", METHODS)
def test_stability_limits_of_the_plain_penalty(method: str):
    """αλΩ < 2 for SGD, 2(1 + μ) for heavy ball (3.8), 2(1 + μ)/(1 + 2μ) for Nesterov (1.357)."""
    limit = LIMITS[method]
    assert (
        spectral_radius(method, 0.0, limit * 0.999, "plain") < 1 < spectral_radius(method, 0.0, limit * 1.001, "plain")
    )
    for s, bounded in ((limit * 0.97, True), (limit * 1.03, False)):
        w, opt = protected("plain", s, lr=0.5, **METHODS[method])
        assert settles(descend(w, opt, 0.0, 0.0, 2000), 0.0) == bounded


def test_the_limit_of_heavy_ball_at_0_9_is_3_8_and_of_nesterov_1_357():
    assert math.isclose(LIMITS["heavy"], 3.8)
    assert math.isclose(LIMITS["nesterov"], 3.8 / 2.8)


def test_plain_sgd_diverges_at_2_5_and_the_others_do_not():
    for variant in ("plain", "stabilized", "proximal", "wva"):
        w, opt = protected(variant, 2.5, lr=0.5)
        path = descend(w, opt, 0.2, 1.0, 500)
        assert (abs(path[-1]) > 1e20) == (variant == "plain")


@pytest.mark.parametrize("method", ["heavy", "nesterov"])
@pytest.mark.parametrize("s", [0.1, 1.0, 10.0, 1e3, 1e6])
def test_under_momentum_the_stabilised_penalty_alone_is_bounded_but_underdamped(method: str, s: float):
    radius = spectral_radius(method, 0.0, s, "stabilized")
    assert radius < 1
    w, opt = protected("stabilized", s, lr=0.5, **METHODS[method])
    path = descend(w, opt, 0.0, 0.0, 400)
    assert settles(path, 0.0)
    if method == "heavy":  # it overshoots its anchor: complex eigenvalues of modulus √μ
        assert min(path) < 0
        assert math.isclose(radius, math.sqrt(MU), rel_tol=1e-9)


def test_the_stabilised_penalty_with_nesterov_diverges_together_with_curvature():
    """αh = 0.5 is stable alone, αλΩ = 10 is stable alone; αh + αc = 0.5 + 10/11 is beyond 1.357."""
    assert spectral_radius("nesterov", 0.5, 0.0, "stabilized") < 1
    assert spectral_radius("nesterov", 0.0, 10.0, "stabilized") < 1
    assert spectral_radius("nesterov", 0.5, 10.0, "stabilized") > 1
    w, opt = protected("stabilized", 10.0, lr=0.5, **METHODS["nesterov"])
    assert abs(descend(w, opt, 1.0, 1.0, 2000)[-1]) > 1e20
    for variant in ("proximal", "wva"):
        w, opt = protected(variant, 10.0, lr=0.5, **METHODS["nesterov"])
        assert abs(descend(w, opt, 1.0, 1.0, 2000)[-1]) < 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("variant", ["proximal", "wva"])
def test_e3_and_e4_never_destabilise_a_stable_step(method: str, variant: str):
    shares = [0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 0.999]
    for share, s in itertools.product(shares, [0.0, 1e-3, 0.1, 0.5, 1.0, 2.5, 10.0, 1e3, 1e6]):
        radius = spectral_radius(method, share * LIMITS[method], s, variant)
        assert radius < 1, (share, s, radius)


def test_e3_never_moves_the_updated_weight_away_from_the_anchor():
    g = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model = nn.Module()
        model.w = nn.Parameter(torch.randn(4096, generator=g, dtype=F64).to(dtype))
        ewc = EWC(model, ewc_lambda=1.0, variant="proximal")
        ewc.consolidate({"w": 10 ** (16 * torch.rand(4096, generator=g) - 8)})
        anchor = model.w.detach().clone()
        with torch.no_grad():
            model.w.add_(torch.randn(4096, generator=g).to(dtype))
        free = nn.Parameter(model.w.detach().clone())
        grad = torch.randn(4096, generator=g).to(dtype)
        model.w.grad, free.grad = grad, grad.clone()
        fastewc.optim.SGD(model.parameters(), lr=0.5, ewc=ewc).step()
        torch.optim.SGD([free], lr=0.5, foreach=False).step()
        wide = torch.promote_types(dtype, torch.float32)
        before, after = (free.to(wide) - anchor.to(wide)).abs(), (model.w.to(wide) - anchor.to(wide)).abs()
        # One spacing of the stored numbers for the rounding of w′ itself, which torch rounds before and we after.
        assert bool((after <= before + torch.finfo(dtype).eps * free.to(wide).abs()).all())


@pytest.mark.parametrize("s", [0.01, 0.5, 1.5, 20.0])
def test_optima_under_sgd(s: float):
    """Task ½h(w − a)²: E1 and E3 rest at ha/(h + λΩ), E2 at ha/(h + c) with c = λΩ/(1 + s), E4 at a itself."""
    h, a, lr = 0.3, 2.0, 0.5
    stiff = s / lr
    rest = {
        "stabilized": h * a / (h + stiff / (1 + s)),
        "proximal": h * a / (h + stiff),
        "wva": a,
    }
    if s < 1.5:
        rest["plain"] = rest["proximal"]
    for variant, at in rest.items():
        w, opt = protected(variant, s, lr=lr)
        assert settles(descend(w, opt, h, a, 2000), at), variant


@pytest.mark.parametrize("s", [10.0, 1e3, 1e6])
def test_e2_holds_a_stiff_weight_at_most_with_one_over_alpha(s: float):
    h, a, lr = 0.3, 2.0, 0.5
    w, opt = protected("stabilized", s, lr=lr)
    at = descend(w, opt, h, a, 2000)[-1]
    assert at > h * a / (h + 1 / lr)  # never closer to the anchor than a spring of 1/α would hold it
    w, opt = protected("proximal", s, lr=lr)
    assert descend(w, opt, h, a, 2000)[-1] < at / 5


def test_e3_is_rescaled_by_momentum_and_adam():
    """Heavy ball moves 1/(1 − μ) times as far as SGD with the same α, so E3 rests at h′a/(h′ + λΩ), h′ = h/(1 − μ)."""
    h, a, lr, s = 0.3, 2.0, 0.1, 0.5
    w, opt = protected("proximal", s, lr=lr, **METHODS["heavy"])
    scaled = h / (1 - MU)
    assert settles(descend(w, opt, h, a, 2000), scaled * a / (scaled + s / lr))
    w, opt = protected("proximal", s, lr=lr, name="Adam", betas=(0.9, 0.99))
    at = descend(w, opt, h, a, 2000)[-1]
    # Adam's step has the size α whatever the gradient: it rests where α = s·w, not where the forces balance.
    assert abs(at - lr / s) < 1e-3
    assert abs(at - h * a / (h + s / lr)) > 0.05


@pytest.mark.parametrize("method", METHODS)
def test_e4_only_delays(method: str):
    h, a, lr = 0.3, 2.0, 0.5
    w, opt = protected("wva", 4.0, lr=lr, start=0.0, **METHODS[method])
    slow = descend(w, opt, h, a, 2000)
    w, opt = protected("wva", 0.0, lr=lr, start=0.0, **METHODS[method])
    fast = descend(w, opt, h, a, 2000)
    assert slow[0] < fast[0]
    assert settles(slow, a)
    assert settles(fast, a)


def test_under_adam_a_bounded_pull_bounds_nothing():
    """αc ≤ 1, yet Adam divides the pull by its own size: the first step past w = w* + ε overshoots to w* + ε − α."""
    w, opt = protected("stabilized", 1e6, lr=0.1, name="Adam", start=1e-3)
    w.grad = torch.zeros(1, dtype=F64)
    opt.step()
    assert abs(w.item() - (1e-3 - 0.1)) < 1e-6
    w, opt = protected("proximal", 1e6, lr=0.1, name="Adam", start=1e-3)
    w.grad = torch.zeros(1, dtype=F64)
    opt.step()
    assert 0 <= w.item() <= 1e-8


def test_wva_is_kutalevs_form_with_lambda_alpha_lambda():
    """Kutalev 2020: Δw/(1 + λΩ); his λ is our αλ."""
    for lr in (0.1, 0.5):
        w, opt = protected("wva", 3.0, lr=lr, start=0.0)
        w.grad = torch.ones(1, dtype=F64)
        opt.step()
        assert_within_roundings(w.detach(), torch.tensor([-lr / (1 + 3.0)], dtype=F64), roundings=8)
