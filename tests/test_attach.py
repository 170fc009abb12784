"""attach(): what breaks a naive pre-hook silently must not break this one. The oracle is the equation, written out."""

import gc

import pytest
import torch
from torch import nn

from fastewc import EWC, PathIntegral
from fastewc.optim import SGD
from fastewc.testing import assert_within_roundings
from tests.helpers import importance_of, move, net

LR, LAMBDA = 0.1, 6.0
VARIANTS = ["plain", "stabilized", "proximal", "wva"]


def held(variant="stabilized", model=None, **options):
    """A float64 model that has moved away from its anchor, with a gradient on every parameter."""
    model = net().double() if model is None else model
    ewc = EWC(model, ewc_lambda=LAMBDA, variant=variant, **options)
    ewc.consolidate(importance_of(model))
    move(model, 3)
    fill_grads(model)
    return model, ewc


def fill_grads(model, seed=4, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=g, dtype=p.dtype) * scale


def expected_sgd(model, ewc, lr=LR, sign=1.0):
    """One step of SGD by the equations E1–E4."""
    found = {}
    omega, anchor = ewc.importances(), ewc.anchors()
    for name, p in model.named_parameters():
        w, s = p.detach().clone(), LAMBDA * omega[name].double()
        pull = {"plain": s, "stabilized": s / (1 + lr * s)}.get(ewc.variant, torch.zeros_like(s)) * (w - anchor[name])
        moved = w - lr * (sign * p.grad + pull)
        if ewc.variant == "proximal":
            moved = (moved + lr * s * anchor[name]) / (1 + lr * s)
        if ewc.variant == "wva":
            moved = w + (moved - w) / (1 + lr * s)
        found[name] = moved
    return found


def assert_weights(model, wanted):
    for name, p in model.named_parameters():
        assert_within_roundings(p, wanted[name], roundings=32, error_scale=wanted[name].abs() + 10, context=name)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("foreach", [False, True])
def test_one_sgd_step_is_the_equation(variant, foreach):
    model, ewc = held(variant)
    wanted = expected_sgd(model, ewc)
    opt = torch.optim.SGD(model.parameters(), lr=LR, foreach=foreach)
    grads = [p.grad for p in model.parameters()]
    copies = [g.clone() for g in grads]
    ewc.attach(opt)
    opt.step()
    assert_weights(model, wanted)
    for p, grad, before in zip(model.parameters(), grads, copies, strict=True):
        assert p.grad is grad and torch.equal(grad, before)  # p.grad is given back as it was


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("keyword", [False, True])
def test_closure(variant, keyword):
    model, ewc = held(variant)
    wanted = expected_sgd(model, ewc)
    opt = torch.optim.SGD(model.parameters(), lr=LR)
    ewc.attach(opt)

    def closure():
        opt.zero_grad()
        fill_grads(model)
        return torch.tensor(3.5)

    loss = opt.step(closure=closure) if keyword else opt.step(closure)
    assert loss.item() == 3.5
    assert_weights(model, wanted)


@pytest.mark.parametrize("variant", VARIANTS)
def test_maximize(variant):
    model, ewc = held(variant)
    wanted = expected_sgd(model, ewc, sign=-1.0)
    opt = torch.optim.SGD(model.parameters(), lr=LR, maximize=True)
    ewc.attach(opt)
    opt.step()
    assert_weights(model, wanted)


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_group_has_its_own_live_lr(variant):
    model, ewc = held(variant)
    first, second = expected_sgd(model, ewc, 0.05), expected_sgd(model, ewc, 2.0)
    opt = torch.optim.SGD([{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 4.0}], lr=0.1)
    ewc.attach(opt)
    for group in opt.param_groups:
        group["lr"] /= 2  # as a scheduler does
    opt.step()
    assert_weights(model, {n: (first if n.startswith("0") else second)[n] for n in first})


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(variant, fused, unscale):
    """With fused optimizers GradScaler leaves the gradients scaled: a naive hook adds 1/65536 of the penalty."""
    torch.manual_seed(0)
    model, ewc = held(variant, model=net())
    x = torch.randn(5, 3)
    opt = torch.optim.SGD(model.parameters(), lr=LR, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    ewc.attach(opt)
    opt.zero_grad()
    model(x).square().sum().backward()
    wanted = {n: t.double() for n, t in expected_sgd(model, ewc).items()}
    opt.zero_grad()
    scaler.scale(model(x).square().sum()).backward()
    if unscale:
        scaler.unscale_(opt)
    scaler.step(opt)
    for name, p in model.named_parameters():
        assert_within_roundings(p, wanted[name], roundings=64, error_scale=wanted[name].abs() + 10)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_grad_scaler_skips_changes_nothing(variant, fused):
    model, ewc = held(variant, model=net())
    before = [p.detach().clone() for p in model.parameters()]
    opt = torch.optim.SGD(model.parameters(), lr=LR, fused=fused)
    tracker = PathIntegral(opt, model=model)
    ewc.attach(opt)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    next(iter(model.parameters())).grad[0, 0] = float("inf")
    scaler.step(opt)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert tracker.path_integral_steps == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_missing_gradient_is_skipped_as_torch_does(variant):
    model, ewc = held(variant)
    old = model[0].weight.detach().clone()
    model[0].weight.grad = None
    opt = torch.optim.SGD(model.parameters(), lr=LR)
    ewc.attach(opt)
    opt.step()
    assert torch.equal(model[0].weight, old) and model[0].weight.grad is None


def test_before_the_first_task_steps_are_plain():
    model, twin = net(), net()
    ewc = EWC(model, ewc_lambda=1.0, variant="wva")
    fill_grads(model)
    fill_grads(twin)
    opt, plain = (torch.optim.Adam(m.parameters(), lr=LR) for m in (model, twin))
    ewc.attach(opt)
    opt.step()
    plain.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


class Breaks(torch.optim.SGD):
    """Its step() raises until it is mended."""

    broken = True

    def step(self, closure=None):
        if self.broken:
            raise OSError("boom")
        return super().step(closure)


OPTIMIZERS = [
    lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9, nesterov=True),
    lambda p: torch.optim.Adam(p, lr=LR, amsgrad=True),
    lambda p: torch.optim.AdamW(p, lr=LR),
    lambda p: torch.optim.RMSprop(p, lr=LR),
    lambda p: torch.optim.Adagrad(p, lr=LR),
    lambda p: torch.optim.NAdam(p, lr=LR),
]


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_equals_the_penalty_in_the_loss(make):
    """For E1 and E2 attach() and penalty() are one thing on any optimizer, over many steps."""
    x = torch.randn(20, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for attached in (True, False):
        model, ewc = held("stabilized")
        opt = make(model.parameters())
        if attached:
            ewc.attach(opt)
        for batch in x:
            opt.zero_grad()
            loss = model(batch).square().mean() + (0 if attached else ewc.penalty(lr=opt))
            loss.backward()
            opt.step()
        results.append([p.detach() for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        assert_within_roundings(
            a, b, roundings=1e5, error_scale=b.abs() + 1
        )  # 20 steps, each amplifying ~1e3 roundings


def test_repeated_steps_on_one_gradient_do_not_pile_up():
    model, ewc = held()
    opt = torch.optim.SGD(model.parameters(), lr=LR)
    ewc.attach(opt)
    for _ in range(3):
        wanted = expected_sgd(model, ewc)
        opt.step()  # no zero_grad: the gradient is the same one each time
        assert_weights(model, wanted)


def test_a_step_that_raises_leaves_the_next_one_right():
    model, ewc = held()
    grads = [p.grad for p in model.parameters()]
    opt = Breaks(model.parameters(), lr=LR)
    ewc.attach(opt)
    with pytest.raises(OSError, match="boom"):
        opt.step()
    opt.broken = False
    for p, g in zip(model.parameters(), grads, strict=True):
        assert p.grad is not None and p.grad is not g
        p.grad = g
    wanted = expected_sgd(model, ewc)
    opt.step()
    assert_weights(model, wanted)


def test_an_extra_argument_of_step_is_no_closure():
    class Takes(torch.optim.SGD):
        def step(self, progress=None):
            return super().step()

    model, ewc = held()
    wanted = expected_sgd(model, ewc)
    opt = Takes(model.parameters(), lr=LR)
    ewc.attach(opt)
    opt.step(0.5)
    assert_weights(model, wanted)


def test_a_closure_that_is_never_called_is_an_error():
    class Ignores(torch.optim.SGD):
        def step(self, closure=None):
            return super().step()

    model, ewc = held()
    opt = Ignores(model.parameters(), lr=LR)
    ewc.attach(opt)
    with pytest.raises(RuntimeError, match="never called it"):
        opt.step(lambda: torch.zeros(()))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("closure", [False, True])
def test_a_step_that_calls_its_base_class_acts_once(variant, closure):
    """torch patches step() of each class, so the hooks run twice."""

    class Nested(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])  # patches the base class too
    model, ewc = held(variant)
    wanted = expected_sgd(model, ewc)
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    old = {n: p.detach().clone() for n, p in model.named_parameters()}
    opt = Nested(model.parameters(), lr=LR)
    other = EWC(model, ewc_lambda=0.0, variant="plain")
    other.consolidate(importance_of(model))
    ewc.attach(opt)
    other.attach(opt)
    tracker = PathIntegral(opt, model=model)
    opt.step((lambda: torch.zeros(())) if closure else None)
    assert_weights(model, wanted)
    assert tracker.path_integral_steps == 1
    for name, term in tracker.path_integrals().items():
        moved = term.parameter.detach() - old[name]
        assert_within_roundings(term.omega, -grads[name] * moved, roundings=8)
        assert torch.equal(term.parameter.grad, grads[name])


def test_gradients_that_were_changed_after_a_failed_step_are_refused():
    model, ewc = held()
    opt = Breaks(model.parameters(), lr=LR)
    ewc.attach(opt)
    with pytest.raises(OSError, match="boom"):
        opt.step()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    with pytest.raises(RuntimeError, match=r"an earlier step.* failed with the penalty"):
        opt.step()
    opt.zero_grad()
    fill_grads(model)
    with pytest.raises(OSError, match="boom"):
        opt.step()


def test_a_failed_step_leaves_no_penalty_behind_with_two_of_them():
    model, ewc = held()
    other = EWC(model, ewc_lambda=0.0, variant="plain")
    other.consolidate(importance_of(model))
    opt = Breaks(model.parameters(), lr=LR)
    ewc.attach(opt)
    other.attach(opt)
    wanted = expected_sgd(model, ewc)
    with pytest.raises(OSError, match="boom"):
        opt.step()
    opt.broken = False
    opt.step()
    assert_weights(model, wanted)


def test_float16_under_grad_scaler_stays_finite():
    """The pull times the scale passes 65504 after GradScaler has looked for infinities."""
    torch.manual_seed(0)
    model = net().half()
    ewc = EWC(model, ewc_lambda=50.0, variant="plain")
    ewc.consolidate(importance_of(model, 1.0))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2)
    before = [p.detach().clone() for p in model.parameters()]
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    ewc.attach(opt)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    scaler.scale(model(torch.randn(8, 3).half()).float().square().mean()).backward()
    scaler.step(opt)
    for p, old in zip(model.parameters(), before, strict=True):
        assert p.isfinite().all() and not torch.equal(p, old)


def test_clipping_and_tracking_optimizers_want_ewc_themselves():
    model, ewc = held()
    with pytest.raises(ValueError, match="make it with ewc= instead"):
        ewc.attach(SGD(model.parameters(), lr=LR, max_grad_norm=1.0))
    with pytest.raises(ValueError, match="make it with ewc= instead"):
        ewc.attach(SGD(model.named_parameters(), lr=LR, path_integral=True))
    wanted = expected_sgd(model, ewc)
    plain = SGD(model.parameters(), lr=LR)
    ewc.attach(plain)
    plain.step()
    assert_weights(model, wanted)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_tensor_lr_of_one_element_and_a_scalar_parameter(variant):
    model = torch.nn.Module()
    model.scale = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    ewc = EWC(model, ewc_lambda=LAMBDA, variant=variant)
    ewc.consolidate({"scale": torch.tensor(0.5)})
    with torch.no_grad():
        model.scale.fill_(3.0)
    model.scale.grad = torch.tensor(1.0, dtype=torch.float64)
    wanted = expected_sgd(model, ewc)
    opt = torch.optim.SGD(model.parameters(), lr=torch.tensor([LR], dtype=torch.float64))
    ewc.attach(opt)
    opt.step()
    assert_weights(model, wanted)


def test_refusals():
    model, ewc = held()
    with pytest.raises(NotImplementedError, match=r"LBFGS.*add ewc\.penalty"):
        ewc.attach(torch.optim.LBFGS(model.parameters()))
    with pytest.raises(TypeError, match="got Linear"):
        ewc.attach(nn.Linear(1, 1))
    opt = torch.optim.SGD(model.parameters(), lr=LR)
    ewc.attach(opt)
    with pytest.raises(ValueError, match=r"applies this ewc already \(attached\)"):
        ewc.attach(opt)
    fused = SGD(model.parameters(), lr=LR, ewc=ewc)
    with pytest.raises(ValueError, match=r"applies this ewc already \(fused\)"):
        ewc.attach(fused)


def test_sparse_gradients_are_refused_by_name():
    model = nn.Embedding(5, 2, sparse=True)
    ewc = EWC(model, ewc_lambda=1.0)
    ewc.consolidate({"weight": torch.ones(5, 2)})
    opt = torch.optim.SGD(model.parameters(), lr=LR)
    ewc.attach(opt)
    model(torch.tensor([1])).sum().backward()
    before = model.weight.detach().clone()
    with pytest.raises(NotImplementedError, match="'weight' has a sparse gradient"):
        opt.step()
    assert torch.equal(model.weight, before)


def test_remove_and_context_manager():
    model, ewc = held()
    opt = torch.optim.SGD(model.parameters(), lr=LR)
    plain = {n: p - LR * p.grad for n, p in model.named_parameters()}
    with ewc.attach(opt), pytest.raises(RuntimeError, match="count it twice"):
        ewc.penalty(lr=opt)
    handle = ewc.attach(opt)
    handle.remove()
    handle.remove()
    ewc.penalty(lr=opt)
    opt.step()
    assert_weights(model, {n: t.detach() for n, t in plain.items()})


def test_a_newer_optimizer_takes_over():
    model, ewc = held()
    old = torch.optim.SGD(model.parameters(), lr=LR)
    ewc.attach(old)
    new = torch.optim.Adam(model.parameters(), lr=LR)
    ewc.attach(new)
    with pytest.raises(RuntimeError, match="a newer optimizer over the same parameters took over"):
        old.step()
    new.step()
    newest = SGD(model.parameters(), lr=LR, ewc=ewc)
    with pytest.raises(RuntimeError, match="took over"):
        new.step()
    newest.step()


def test_two_optimizers_over_different_parts_live_side_by_side():
    model, ewc = held()
    wanted = expected_sgd(model, ewc)
    parts = [torch.optim.SGD(m.parameters(), lr=LR) for m in (model[0], model[2])]
    for opt in parts:
        ewc.attach(opt)
    for opt in parts:
        opt.step()
    assert_weights(model, wanted)


def test_an_optimizer_that_is_gone_no_longer_counts():
    model, ewc = held()
    opt = torch.optim.SGD(model.parameters(), lr=LR)
    ewc.attach(opt)
    del opt
    gc.collect()
    ewc.penalty(lr=LR)


@pytest.mark.parametrize("package", ["accelerate.optimizer", "lightning.pytorch.core.optimizer"])
def test_wrappers_are_looked_through(package):
    """Accelerate's and Lightning's optimizers hold the real one in .optimizer; told by the package that defines "
    "them."""
    wrapper = type("Wrapped", (), {"__module__": package})()
    model, ewc = held()
    wrapper.optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    wanted = expected_sgd(model, ewc)
    ewc.attach(wrapper)
    assert ewc.penalty(lr=wrapper).item() if not torch.is_grad_enabled() else True
    wrapper.optimizer.step()
    assert_weights(model, wanted)


def test_scheduler_after_attach():
    model, ewc = held()
    opt = torch.optim.SGD(model.parameters(), lr=LR)
    ewc.attach(opt)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
    opt.step()
    scheduler.step()
    wanted = expected_sgd(model, ewc, LR / 2)
    opt.step()
    assert_weights(model, wanted)


@pytest.mark.parametrize("tracker_first", [False, True])
@pytest.mark.parametrize("closure", [False, True])
def test_path_integral_reads_the_task_gradient(tracker_first, closure):
    model, ewc = held("proximal")
    ewc.consolidate(importance_of(model))
    move(model, 5)
    opt = torch.optim.SGD(model.parameters(), lr=LR)
    tracker = PathIntegral(opt, model=model) if tracker_first else None
    ewc.attach(opt)
    tracker = tracker or PathIntegral(opt, model=model)
    old = {n: p.detach().clone() for n, p in model.named_parameters()}
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    opt.step((lambda: torch.zeros(())) if closure else None)
    for name, term in tracker.path_integrals().items():
        wanted = -grads[name] * (term.parameter.detach() - old[name])
        assert_within_roundings(term.omega, wanted, roundings=8)
        assert torch.equal(term.start, old[name])
