"""The penalty inside any torch optimizer's step(), by hooks, and the one pair of hooks that SI shares with it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastewc._graphs import capturing
from fastewc._optimizers import learning_rate, unwrap_optimizer
from fastewc._storage import Held
from fastewc.ops.ewc_penalty import ewc_hold_back_, ewc_penalty_grads
from fastewc.optim._base import ProtectedOptimizer

if TYPE_CHECKING:
    from fastewc.ewc import EWC


def attach(ewc: EWC, optimizer: Any) -> AttachHandle:
    """Apply an EWC penalty inside ``optimizer.step()``: E1 and E2 before the update, E3 and E4 after it.

    The gradient that the optimizer sees is g + c(w − w*), w before the step; p.grad itself is given back as it was.
    Closures, GradScaler (also with fused optimizers, whose gradients arrive scaled), maximize, several groups, live
    learning rates and CUDA graphs (λ is read at every replay) are honoured; a parameter without gradient is skipped, as
    torch skips it. An older optimizer over the same parameters is superseded: its next step raises.

    Args:
        ewc: what to apply.
        optimizer: any torch.optim.Optimizer that updates each parameter from its own gradient; Accelerate's and
            Lightning's wrappers are looked through.

    Returns:
        A handle; ``handle.remove()`` takes the penalty off again. It is also a context manager.

    Raises:
        TypeError: not an optimizer.
        NotImplementedError: LBFGS, whose line search evaluates the loss many times a step: add ewc.penalty() to it.
        ValueError: attached already, or a fastewc optimizer that applies this ewc itself, or one with max_grad_norm or
            path_integral (make it with ewc= instead).
    """
    inner = unwrap_optimizer(optimizer)
    if inner is None:
        raise TypeError(f"attach needs a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if isinstance(inner, torch.optim.LBFGS):
        raise NotImplementedError(
            "LBFGS evaluates the loss many times inside one step, so a hook on the step is wrong for it: add "
            "ewc.penalty(lr=…) to the loss in its closure"
        )
    if ewc.applied_by(inner) is not None:
        raise ValueError(
            f"this {type(inner).__name__} applies this ewc already ({ewc.applied_by(inner)}): twice would count "
            "twice. Call remove() on the handle of the first attach(), or build a new optimizer."
        )
    if isinstance(inner, ProtectedOptimizer) and (inner.max_grad_norm is not None or inner.path_integral):
        raise ValueError(
            f"this fastewc.optim.{type(inner).__name__} clips or tracks the task's gradient, which attach() would mix "
            "with the penalty: make it with ewc= instead"
        )
    ewc.adopt(inner, how="attached")
    return AttachHandle(ewc, inner)


class AttachHandle:
    """Takes the penalty off the optimizer again: call :meth:`remove`, or use it as a context manager."""

    def __init__(self, ewc: EWC, optimizer: Optimizer) -> None:
        self._ewc = ewc
        self._optimizer = ref(optimizer)
        self._part = _Penalty(ewc)
        StepHooks.on(optimizer).parts.append(self._part)

    def remove(self) -> None:
        """Detach. A second call does nothing."""
        optimizer = self._optimizer()
        if optimizer is None:
            return
        hooks = StepHooks.on(optimizer)
        if self._part in hooks.parts:
            self._part.undo()
            hooks.parts.remove(self._part)
            self._ewc.release(optimizer)
        hooks.drop_if_idle()

    def __enter__(self) -> AttachHandle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


class Part(Protocol):
    """Something that acts around an update. ``order``: lower acts first before the update and last after it."""

    order: int

    def check(self, optimizer: Optimizer) -> None:
        """Raise if the step must not run; nothing has happened yet."""

    def before(self, optimizer: Optimizer) -> None:
        """Gradients are ready, weights are old."""

    def after(self, optimizer: Optimizer) -> None:
        """The optimizer has updated the weights, or skipped."""

    def undo(self) -> None:
        """Give back what ``before`` changed, if no ``after`` came: the step raised, or begins anew inside itself."""


_HOOKS: WeakKeyDictionary[Optimizer, StepHooks] = WeakKeyDictionary()


@dataclass(eq=False)
class StepHooks:
    """The one pre- and post-hook of an optimizer. Parts act in a fixed order, whoever was added first.

    With a closure, gradients are ready only once the optimizer has called it: the closure is wrapped and the parts act
    at its end. An optimizer whose step() calls super().step() runs the hooks twice: the outer call acts. A step that
    raises has no post-hook: the next one first undoes what it left.
    """

    parts: list[Part] = field(default_factory=list)
    _handles: list[Any] = field(default_factory=list)
    _owner: Callable[[], Optimizer | None] = lambda: None
    _running: FrameType | None = None  # the call of step() that is under way, or that raised
    _acted: bool = False

    @classmethod
    def on(cls, optimizer: Optimizer) -> StepHooks:
        """The hooks of this optimizer, registered on first use."""
        hooks = _HOOKS.get(optimizer)
        if hooks is None:
            hooks = _HOOKS[optimizer] = cls(_owner=ref(optimizer))
            hooks._handles = [
                optimizer.register_step_pre_hook(hooks._pre),
                optimizer.register_step_post_hook(hooks._post),
            ]
        return hooks

    def drop_if_idle(self) -> None:
        """Unregister once no part is left."""
        owner = self._owner()
        if not self.parts:
            for handle in self._handles:
                handle.remove()
            if owner is not None:
                _HOOKS.pop(owner, None)

    def _ordered(self) -> list[Part]:
        return sorted(self.parts, key=lambda part: part.order)

    def _pre(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        if self._running is not None and _on_stack(self._running):
            return None
        self._undo()
        for part in self._ordered():
            part.check(optimizer)
        self._running, self._acted = sys._getframe(1), False
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # args[0] is the optimizer itself
        if not callable(closure):
            self._before(optimizer)
            return None

        def closure_then_parts() -> Any:
            loss = closure()
            self._before(optimizer)
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": closure_then_parts}
        return (args[0], closure_then_parts, *args[2:]), kwargs

    def _undo(self) -> None:
        for part in reversed(self._ordered()):
            part.undo()

    @torch.no_grad()
    def _before(self, optimizer: Optimizer) -> None:
        self._undo()  # an optimizer may call its closure several times
        for part in self._ordered():
            part.before(optimizer)
        self._acted = True

    def _post(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if sys._getframe(1) is not self._running:
            return
        self._running = None
        if not self._acted:
            raise RuntimeError(
                f"{type(optimizer).__name__}.step() was given a closure and never called it, so this step ran without "
                "the penalty or the path integral; call step() without it"
            )
        with torch.no_grad():
            for part in reversed(self._ordered()):
                part.after(optimizer)


def _on_stack(frame: FrameType) -> bool:
    """True while the call that a frame belongs to has not returned."""
    current: FrameType | None = sys._getframe(1)
    while current is not None and current is not frame:
        current = current.f_back
    return current is not None


def grad_sign(group: dict[str, Any]) -> int:
    """−1 where the optimizer maximises (it steps along +grad): what lowers the loss must enter with the other sign."""
    return -1 if group.get("maximize", False) else 1


def skipped(optimizer: Optimizer, like: Tensor) -> Tensor | None:
    """True (0-dim, on a tensor's device) if GradScaler found infinities and this step was skipped; None without it."""
    found: Tensor | None = getattr(optimizer, "found_inf", None)
    return None if found is None else found.to(like.device).reshape(()) != 0


def with_grad(optimizer: Optimizer) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """(group, parameter) of every parameter that this step will update."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                yield group, p


@dataclass(eq=False)
class _Penalty:
    """E1–E4 around one optimizer's update."""

    ewc: EWC
    order: int = 1
    # p, its own grad, the grad lent to the optimizer, the version of the lent one: to give p.grad back after the step
    _lent: list[tuple[Tensor, Tensor, Tensor, int]] = field(default_factory=list)
    # p, w before the step (E4 alone needs it), α
    _old: list[tuple[Tensor, Tensor | None, float | Tensor]] = field(default_factory=list)
    _replayed: Tensor | None = None  # λ of this step where a CUDA graph has to read it at every replay

    def check(self, optimizer: Optimizer) -> None:
        self.ewc.check_owner(optimizer)
        for _, p in with_grad(optimizer):
            if p.grad is not None and p.grad.layout != torch.strided and self.ewc.held(p) is not None:
                raise NotImplementedError(
                    f"{self.ewc.name_of(p)!r} has a sparse gradient; attach() needs dense ones (sparse=False), or "
                    "exclude it"
                )

    def before(self, optimizer: Optimizer) -> None:
        """Lend the pulled gradients (E1, E2), or remember what E3 and E4 need after the update."""
        self._replayed = self._lambda_of_graphs(optimizer)
        for group in optimizer.param_groups:
            protected = [(p, held) for p in group["params"] if p.grad is not None and (held := self.ewc.held(p))]
            params = [p for p, _ in protected]
            if self.ewc.variant in ("proximal", "wva"):
                olds = [p.detach().clone() if self.ewc.variant == "wva" else None for p in params]
                self._old += [(p, old, self._alpha(group)) for p, old in zip(params, olds, strict=True)]
            elif params:
                self._lend(optimizer, group, params, [held for _, held in protected])

    def _lambda_of_graphs(self, optimizer: Optimizer) -> Tensor | None:
        """λ as a tensor if this step may become part of a CUDA graph."""
        device = next((p.device for _, p in with_grad(optimizer)), None)
        live = None if device is None else self.ewc.live_lambda(device)  # made before any capture
        capturable = any(group.get("capturable", False) for group in optimizer.param_groups)
        return live if capturable or capturing() else None

    # A graph reads λ through α and the scale of the pull: λΩ/(1 + αλΩ) = λ · Ω/(1 + (αλ)Ω).
    def _alpha(self, group: dict[str, Any]) -> float | Tensor:
        lr = learning_rate(group)
        return lr if self._replayed is None else lr * self._replayed

    def _ewc_lambda(self) -> float:
        return self.ewc.ewc_lambda if self._replayed is None else 1.0

    def _scale(self, optimizer: Optimizer) -> Tensor | None:
        scale: Tensor | None = getattr(optimizer, "grad_scale", None)
        if self._replayed is None:
            return scale
        return self._replayed if scale is None else scale.reshape(()) * self._replayed

    def _lend(self, optimizer: Optimizer, group: dict[str, Any], params: list[Tensor], held: list[Held]) -> None:
        """Put p.grad + c(w − w*) in its place, as p.grad counts: still scaled under GradScaler, flipped by maximize."""
        owns = [p.grad for p in params if p.grad is not None]
        pulled = ewc_penalty_grads(
            params,
            [omega for omega, _ in held],
            [anchor for _, anchor in held],
            ewc_lambda=self._ewc_lambda(),
            lrs=[self._alpha(group)] * len(params),
            variant=self.ewc.variant,
            grads=owns,
            negate=grad_sign(group) < 0,
            scale=self._scale(optimizer),
            stage=self.ewc.stage,
        )
        for p, own, lent in zip(params, owns, pulled, strict=True):
            p.grad = lent
            self._lent.append((p, own, lent, lent._version))

    def undo(self) -> None:
        for p, _, lent, version in self._lent:
            if p.grad is lent and lent._version != version:
                raise RuntimeError(
                    f"an earlier step() failed with the penalty in the gradient of {self.ewc.name_of(p)!r}, which was "
                    "changed since, so it cannot be taken out again: call zero_grad(set_to_none=True) and backward()"
                )
        self._give_back()
        self._old = []

    def _give_back(self, *, after_the_step: bool = False) -> None:
        for p, own, lent, _ in self._lent:
            # Some optimizers put a contiguous copy in its place, some None, which stays.
            if p.grad is lent or (after_the_step and p.grad is not None):
                p.grad = own
        self._lent = []

    def after(self, optimizer: Optimizer) -> None:
        self._give_back(after_the_step=True)
        held = [self.ewc.held(p) for p, _, _ in self._old]
        importances, anchors = ([pair[0] for pair in held if pair], [pair[1] for pair in held if pair])
        if self._old:
            # E3 moves w′ towards w*, E4 back towards the old weight.
            olds = [anchor if old is None else old for (_, old, _), anchor in zip(self._old, anchors, strict=True)]
            ewc_hold_back_(
                [p.detach() for p, _, _ in self._old],
                olds,
                importances,
                ewc_lambda=self._ewc_lambda(),
                lrs=[lr for _, _, lr in self._old],
                skip=getattr(optimizer, "found_inf", None),
                stage=self.ewc.stage,
                stage_targets=self.ewc.variant == "proximal",
            )
        self._old = []
