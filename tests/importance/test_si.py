"""Synaptic intelligence: hand-worked paths, the rules of names, and that both ways to keep the path agree."""

import pytest
import torch
from torch import nn

from fastewc import EWC, PathIntegral, si_importance
from fastewc.optim import SGD, Adam
from fastewc.testing import assert_within_roundings


def one(value: float = 1.0) -> nn.Linear:
    model = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        model.weight.fill_(value)
    return model


def step(opt, model, grad: float) -> None:
    model.weight.grad = torch.full_like(model.weight, grad)
    opt.step()


def trackers(model, **options):
    """The two ways to keep the path, on equal models."""
    yield (
        "hooks",
        *(lambda opt: (opt, PathIntegral(opt, model=model)))(torch.optim.SGD(model.parameters(), lr=0.5)),
    )
    fused = SGD(model.named_parameters(), lr=0.5, path_integral=True, **options)
    yield "fused", fused, fused


@pytest.mark.parametrize("way", [0, 1])
def test_hand_worked(way):
    """lr 0.5: w 1 → 0 (g = 2) → −1.5 (g = 3) → −1 (g = −1): ω = 2·1 + 3·1.5 + 1·0.5 = 7, drift −2, ξ = 0.25."""
    model = one()
    _, opt, source = list(trackers(model))[way]
    for grad in (2.0, 3.0, -1.0):
        step(opt, model, grad)
    imp = si_importance(source, damping=0.25, reset=False)
    assert imp["weight"].item() == 7 / (4 + 0.25)
    assert (imp.method, imp.num_samples) == ("si", 3) and imp["weight"].dtype == torch.float64
    assert si_importance(source, damping=0.25)["weight"].item() == 7 / 4.25
    with pytest.raises(ValueError, match="no step has been tracked"):
        si_importance(source)
    step(opt, model, 2.0)  # a new path starts at w = −1
    assert si_importance(source, damping=0.25)["weight"].item() == 2 / (1 + 0.25)


@pytest.mark.parametrize("way", [0, 1])
def test_clamp(way):
    model = one()
    _, opt, source = list(trackers(model))[way]
    if way == 1:
        opt.param_groups[0]["maximize"] = False
    step(opt, model, 2.0)
    with torch.no_grad():
        model.weight.fill_(5.0)  # not a step: only the drift sees it
    imp = si_importance(source, damping=1.0, reset=False)
    assert imp["weight"].item() == 2 / 17
    source_omega = source.path_integrals()["weight"].omega
    source_omega.mul_(-1)
    assert si_importance(source, damping=1.0, reset=False)["weight"].item() == 0
    negative = si_importance(source, damping=1.0, clamp=False)
    assert negative["weight"].item() == -2 / 17
    with pytest.raises(ValueError, match="negative"):
        EWC(model, ewc_lambda=1.0).consolidate(negative)


def test_ewc_given_subtracts_a_penalty_that_is_in_the_loss_only():
    for attached in (False, True):
        model = one()
        ewc = EWC(model, ewc_lambda=3.0, variant="plain")
        ewc.consolidate({"weight": torch.ones(1, 1)})
        with torch.no_grad():
            model.weight.fill_(2.0)  # the penalty pulls with 3·(2 − 1) = 3
        opt = torch.optim.SGD(model.parameters(), lr=0.5)
        tracker = PathIntegral(opt, ewc=ewc)
        loss = 4 * model.weight.sum()
        if attached:
            ewc.attach(opt)
        else:
            loss = loss + ewc.penalty()
        loss.backward()
        opt.step()  # w: 2 → 2 − 0.5·7 = −1.5
        assert model.weight.item() == -1.5
        assert tracker.path_integrals()["weight"].omega.item() == 4 * 3.5


def test_unused_parameters_are_zero_and_reported():
    model = nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)})
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = PathIntegral(opt, model=model)
    model["a"](torch.ones(1, 1)).sum().backward()
    opt.step()
    imp = si_importance(tracker)
    assert not imp["b.weight"].any() and imp.report["b.weight"][0] == "unused" and imp["a.weight"].all()
    assert imp.report["a.weight"][0] != "unused"


def test_names():
    model = one()
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="parameter names are needed"):
        PathIntegral(plain)
    with pytest.raises(ValueError, match="none of the named parameters"):
        PathIntegral(plain, model=nn.Linear(2, 2))
    assert list(PathIntegral(torch.optim.SGD(model.named_parameters(), lr=0.1)).path_integrals()) == ["weight"]
    tracker = PathIntegral(plain, ewc=EWC(model, ewc_lambda=1.0))
    with pytest.raises(ValueError, match="has a PathIntegral already"):
        PathIntegral(plain, model=model)
    tracker.remove()
    tracker.remove()
    PathIntegral(plain, model=model)
    with pytest.raises(TypeError, match="keeps no path integral"):
        si_importance(plain)
    with pytest.raises(TypeError, match="one gradient per step"):
        PathIntegral(torch.optim.LBFGS(model.parameters()), model=model)


@pytest.mark.parametrize("damping", [0.0, -1.0, float("nan")])
def test_damping_must_be_positive(damping):
    model = one()
    _, opt, source = next(trackers(model))
    step(opt, model, 1.0)
    with pytest.raises(ValueError, match="damping"):
        si_importance(source, damping=damping)


def test_state_dict_keeps_float32_for_bf16_models(tmp_path):
    def fresh():
        torch.manual_seed(0)
        model = nn.Linear(4, 4).bfloat16()
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        return model, opt, PathIntegral(opt, model=model)

    model, opt, tracker = fresh()
    for _ in range(5):
        opt.zero_grad()
        model(torch.randn(8, 4).bfloat16()).float().square().sum().backward()
        opt.step()
    torch.save(tracker.state_dict(), tmp_path / "t")
    _, _, other = fresh()
    other.load_state_dict(torch.load(tmp_path / "t", weights_only=True))
    assert other.path_integral_steps == 5
    for name, term in tracker.path_integrals().items():
        again = other.path_integrals()[name]
        assert (
            again.omega.dtype == torch.float32
            and torch.equal(term.omega, again.omega)
            and torch.equal(term.start, again.start)
        )
    with pytest.raises(ValueError, match="does not fit these parameters: nope"):
        other.load_state_dict(
            {
                "path_integral": {"nope": torch.ones(1)},
                "path_integral_start": {"nope": torch.ones(1)},
                "path_integral_steps": 1,
            }
        )
    with pytest.raises(ValueError, match="missing path_integral_steps"):
        other.load_state_dict({})
    assert other.path_integral_steps == 5


def test_hooks_and_fused_step_agree_on_adam_with_a_penalty():
    x = torch.randn(12, 8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
        ewc = EWC(model, ewc_lambda=2.0)
        ewc.consolidate({n: torch.rand_like(p) for n, p in model.named_parameters()})
        if fused:
            source = opt = Adam(model.named_parameters(), lr=0.01, weight_decay=0.1, ewc=ewc, path_integral=True)
        else:
            opt = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.1)
            source = PathIntegral(opt, ewc=ewc)
            ewc.attach(opt)
        for batch in x:
            opt.zero_grad()
            model(batch).square().mean().backward()
            opt.step()
        found.append(si_importance(source, clamp=False))
    for name in found[0]:
        assert_within_roundings(found[0][name], found[1][name], roundings=1e6, error_scale=found[1][name].abs() + 1e-2)


def test_parameters_added_later_are_tracked():
    model = nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)})
    opt = torch.optim.SGD(model["a"].parameters(), lr=0.1)
    tracker = PathIntegral(opt, model=model)
    opt.add_param_group({"params": list(model["b"].parameters())})
    model["b"](model["a"](torch.ones(1, 1))).sum().backward()
    opt.step()
    imp = si_importance(tracker)
    assert sorted(imp) == ["a.bias", "a.weight", "b.bias", "b.weight"] and imp["b.bias"].all()


def test_nothing_is_subtracted_while_another_optimizer_applies_the_penalty():
    model = nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)}).double()
    ewc = EWC(model, ewc_lambda=5.0)
    ewc.consolidate({n: torch.ones_like(p) for n, p in model.named_parameters()})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    one_part, other = (torch.optim.SGD(model[k].parameters(), lr=0.5) for k in "ab")
    ewc.attach(one_part)
    tracker = PathIntegral(other, ewc=ewc)
    (3 * model["b"].bias).sum().backward()
    other.step()
    assert tracker.path_integrals()["b.bias"].omega.item() == 3 * 1.5


def test_a_wrapped_optimizer_is_looked_through():
    model = one()
    wrapper = type("AcceleratedOptimizer", (), {"__module__": "accelerate.optimizer"})()
    wrapper.optimizer = SGD(model.named_parameters(), lr=0.5, path_integral=True)
    step(wrapper.optimizer, model, 2.0)
    assert si_importance(wrapper, damping=1.0)["weight"].item() == 2 / 2
