"""attach() on every optimizer of torch and on a third party's, where a naive hook on step() is wrong and says nothing.

The oracle steps a twin with the equations E1–E4 written out around a plain optimizer. Each failure is shown on the
naive hook as well: a test that it passed would prove nothing. Everything is float64 and judged by roundings of float32,
so that no optimizer's amplification of a last bit counts.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastewc import EWC
from fastewc.testing import assert_within_roundings
from tests.helpers import importance_of, move

LR, LAMBDA, STEPS = 0.05, 6.0, 4
VARIANTS = ["plain", "stabilized", "proximal", "wva"]


class LikeBitsAndBytes(torch.optim.Optimizer):
    """Adam as libraries of 8-bit optimizers write it: states of their own names, contiguous copies, no flags."""

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})
        self.initialized = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    if not self.state[p]:
                        self.state[p] = {"step": 0, "state1": torch.zeros_like(p), "state2": torch.zeros_like(p)}
                    self.update_step(group, p)
        return loss

    def update_step(self, group: dict[str, Any], p: nn.Parameter) -> None:
        p.data, p.grad = p.data.contiguous(), p.grad.contiguous()
        state, (beta1, beta2) = self.state[p], group["betas"]
        state["step"] += 1
        state["state1"].mul_(beta1).add_(p.grad, alpha=1 - beta1)
        state["state2"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
        bias1, bias2 = 1 - beta1 ** state["step"], 1 - beta2 ** state["step"]
        p.data.addcdiv_(state["state1"] / bias1, (state["state2"] / bias2).sqrt() + group["eps"], value=-group["lr"])


REFUSED = {"LBFGS", "SparseAdam"}
TORCHS = {
    name: cls
    for name, cls in vars(torch.optim).items()
    if inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
}
OPTIMIZERS = {name: cls for name, cls in TORCHS.items() if name not in REFUSED} | {"like8bit": LikeBitsAndBytes}


def takes(name: str, option: str) -> bool:
    return option in inspect.signature(OPTIMIZERS[name].__init__).parameters


MAXIMIZING = [name for name in OPTIMIZERS if takes(name, "maximize")]
FUSED = [name for name in OPTIMIZERS if takes(name, "fused")]


def net() -> nn.Sequential:
    """Matrices only (all that Muon steps), one of them transposed in memory."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False)).double()
    model[0].weight = nn.Parameter(torch.randn(3, 4, dtype=torch.float64).t())
    return model


def held(variant: str) -> tuple[nn.Sequential, EWC]:
    """A model that has moved away from its anchor, and its ewc."""
    model = net()
    ewc = EWC(model, ewc_lambda=LAMBDA, variant=variant)
    ewc.consolidate(importance_of(model))
    move(model, 3)
    return model, ewc


def fill_grads(model: nn.Module, step: int, scale: float = 1.0) -> None:
    g = torch.Generator().manual_seed(10 + step)
    for p in model.parameters():
        p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=g, dtype=p.dtype) * scale)


def build(name: str, model: nn.Sequential, *, lrs: tuple[float, float] = (LR, LR), **options: Any) -> Any:
    parts = [{"params": model[i].parameters(), "lr": lr} for i, lr in zip((0, 2), lrs, strict=True)]
    return OPTIMIZERS[name](parts, lr=LR, **options)


def pull(ewc: EWC, p: Tensor, omega: Tensor, anchor: Tensor, lr: float) -> Tensor:
    s = ewc.ewc_lambda * omega.double()
    return {"plain": s, "stabilized": s / (1 + lr * s)}.get(ewc.variant, torch.zeros_like(s)) * (p - anchor)


@torch.no_grad()
def expected(name: str, ewc: EWC, *, lrs: tuple[float, float] = (LR, LR), **options: Any) -> list[Tensor]:
    """Where the weights end: STEPS plain steps of a twin on g + c(w − w*), each followed by the map of E3 or E4."""
    twin = net()
    anchors, omegas = list(ewc.anchors().values()), list(ewc.importances().values())
    move(twin, 3)
    optimizer = build(name, twin, lrs=lrs, **options)
    sign = -1 if options.get("maximize") else 1
    for step in range(STEPS):
        fill_grads(twin, step)
        before = [p.clone() for p in twin.parameters()]
        for p, omega, anchor, lr in zip(twin.parameters(), omegas, anchors, lrs, strict=True):
            p.grad += sign * pull(ewc, p, omega, anchor, lr)
        optimizer.step()
        for p, w, omega, anchor, lr in zip(twin.parameters(), before, omegas, anchors, lrs, strict=True):
            x = lr * ewc.ewc_lambda * omega.double()
            if ewc.variant == "proximal":
                p.copy_((p + x * anchor) / (1 + x))
            elif ewc.variant == "wva":
                p.copy_(w + (p - w) / (1 + x))
    return [p.clone() for p in twin.parameters()]


def naive_hook(ewc: EWC, optimizer: torch.optim.Optimizer) -> None:
    """What one writes first: before the step, add the pull to every gradient."""

    def add(optimizer: Any, *_: object) -> None:
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            omega, anchor = ewc.held(p)
            if p.grad is not None:
                p.grad += pull(ewc, p.detach(), omega, anchor, optimizer.defaults["lr"])

    optimizer.register_step_pre_hook(add)


def is_expected(model: nn.Module, wanted: list[Tensor]) -> bool:
    try:
        for i, (p, w) in enumerate(zip(model.parameters(), wanted, strict=True)):
            assert_within_roundings(
                p, w, roundings=32, error_scale=w.abs() + 10, dtype=torch.float32, context=f"parameter {i}"
            )
    except AssertionError:
        return False
    return True


def ways(variant: str) -> Iterator[tuple[nn.Sequential, EWC, Any, bool]]:
    """The naive hook and attach(): (model, ewc, how to hook an optimizer, is it right?)."""
    for hook, right in ((naive_hook, False), (lambda ewc, optimizer: ewc.attach(optimizer), True)):
        if right or variant in ("plain", "stabilized"):
            model, ewc = held(variant)
            yield model, ewc, hook, right


def test_every_optimizer_of_torch_is_here():
    assert {"SGD", "Adam", "AdamW", "Adafactor", "RMSprop", "Rprop"} <= set(OPTIMIZERS)
    assert set(TORCHS) >= REFUSED


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_plain_steps(name: str, variant: str):
    """Here the naive hook is right too, as it should be: it is no straw man."""
    for model, ewc, hook, _ in ways(variant):
        optimizer = build(name, model)
        hook(ewc, optimizer)
        for step in range(STEPS):
            fill_grads(model, step)
            optimizer.step()
        assert is_expected(model, expected(name, ewc))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_come_back_whatever_the_step_did_with_them(name: str):
    model, ewc = held("stabilized")
    optimizer = build(name, model)
    ewc.attach(optimizer)
    fill_grads(model, 0)
    grads = [(p.grad, p.grad.clone()) for p in model.parameters()]
    optimizer.step()
    for p, (grad, before) in zip(model.parameters(), grads, strict=True):
        assert p.grad is grad
        assert torch.equal(grad, before)
    optimizer.register_step_post_hook(lambda optimizer, *_: optimizer.zero_grad())
    optimizer.step()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_closure(name: str, variant: str):
    """The naive hook acts before the closure, which overwrites the gradients: the penalty is gone."""
    for model, ewc, hook, right in ways(variant):
        optimizer = build(name, model)
        hook(ewc, optimizer)
        for step in range(STEPS):

            def closure(model: nn.Module = model, step: int = step) -> float:
                fill_grads(model, step)
                return 2.5

            fill_grads(model, step)  # of an earlier evaluation
            assert optimizer.step(closure) == 2.5
        assert is_expected(model, expected(name, ewc)) == right


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", MAXIMIZING)
def test_maximize(name: str, variant: str):
    """The naive hook pushes the weights away from the anchor."""
    for model, ewc, hook, right in ways(variant):
        optimizer = build(name, model, maximize=True)
        hook(ewc, optimizer)
        for step in range(STEPS):
            fill_grads(model, step)
            optimizer.step()
        assert is_expected(model, expected(name, ewc, maximize=True)) == right


@pytest.mark.parametrize("variant", VARIANTS[1:])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_groups(name: str, variant: str):
    """The naive hook takes one learning rate for all groups, and α decides how far E2–E4 pull."""
    lrs = (LR, 20 * LR)
    for model, ewc, hook, right in ways(variant):
        optimizer = build(name, model, lrs=lrs)
        hook(ewc, optimizer)
        for step in range(STEPS):
            fill_grads(model, step)
            optimizer.step()
        assert is_expected(model, expected(name, ewc, lrs=lrs)) == right


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", FUSED)
def test_scaled_gradients_with_fused(name: str, variant: str):
    """GradScaler leaves gradients scaled where the optimizer is fused: the naive hook adds 1/1024 of the pull."""
    for model, ewc, hook, right in ways(variant):
        optimizer = build(name, model, fused=True)
        unscaled = not getattr(optimizer, "_step_supports_amp_scaling", False)  # Adagrad in older torch
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(torch.zeros(()))
        hook(ewc, optimizer)
        for step in range(STEPS + 1):
            fill_grads(model, min(step, STEPS - 1), scale=scaler.get_scale())
            before = [p.detach().clone() for p in model.parameters()]
            if step == STEPS:
                next(model.parameters()).grad[0, 0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
        # The last step overflowed, and changed nothing.
        assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))
        assert is_expected(model, expected(name, ewc)) == (right or unscaled)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_double_attach(name: str):
    """The naive hook pulls twice as hard without a word; attach() raises, and the penalty stays what it was."""
    for model, ewc, hook, right in ways("stabilized"):
        optimizer = build(name, model)
        hook(ewc, optimizer)
        if right:
            with pytest.raises(ValueError, match=r"applies this ewc already \(attached\)"):
                hook(ewc, optimizer)
        else:
            hook(ewc, optimizer)
        for step in range(STEPS):
            fill_grads(model, step)
            optimizer.step()
        assert is_expected(model, expected(name, ewc)) == right


def test_what_cannot_be_attached_to_says_why():
    model, ewc = held("stabilized")
    with pytest.raises(NotImplementedError, match=r"LBFGS.*add ewc\.penalty"):
        ewc.attach(torch.optim.LBFGS(model.parameters()))
    sparse = torch.optim.SparseAdam(model.parameters())
    ewc.attach(sparse)
    fill_grads(model, 0)
    for p in model.parameters():
        p.grad = p.grad.to_sparse()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(NotImplementedError, match=r"'0\.weight' has a sparse gradient"):
        sparse.step()
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_third_partys_state_is_saved_and_resumed(variant: str):
    """Nothing of the penalty is in its state dict, and a resumed run goes on as the first one."""
    model, ewc = held(variant)
    optimizer = build("like8bit", model)
    ewc.attach(optimizer)
    for step in range(2):
        fill_grads(model, step)
        optimizer.step()
    saved = optimizer.state_dict()
    assert {key for state in saved["state"].values() for key in state} == {"step", "state1", "state2"}
    resumed = build("like8bit", model)
    resumed.load_state_dict(saved)
    ewc.attach(resumed)
    for step in range(2, STEPS):
        fill_grads(model, step)
        resumed.step()
    assert is_expected(model, expected("like8bit", ewc))
