"""The ways to make one protected optimizer step: torch's, what people write by hand, and fastewc's.

Every contender works on the same memory (a :class:`Board`): what one alone touches has gone cold by its next turn, and
costs it up to a third more than it would cost a training loop.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import fastewc
from benchmarks.ops.model_shapes import Shape
from fastewc import _dispatch
from fastewc.ops.ewc_step import StepRule
from fastewc.ops.ewc_step.cases import Case
from fastewc.ops.importance_codes import encode, numbers
from fastewc.testing import unit_roundoff

#: Steps that were made before the one that is timed.
STEPS = 3
ADAMW = StepRule("adam", lr=1e-3, weight_decay=0.01, decoupled_weight_decay=True)
SGD = StepRule("sgd", lr=1e-3, momentum=0.9)
VARIANTS = ("stabilized", "plain", "proximal", "wva")
LAMBDA = 10.0


class Board:
    """The memory of one model on one device.

    Ω spans ten decades, αλΩ reaches 1 (plain EWC under SGD stays stable), and w is near w*. Ω and w* are numbers that
    one byte and bfloat16 hold, so that everyone computes with the same ones; what is too small for a code is 0.
    """

    def __init__(self, shapes: Sequence[Shape], device: str) -> None:
        self.device = torch.device(device)
        generator = torch.Generator(device).manual_seed(0)

        def normal(std: float) -> list[Tensor]:
            return [torch.empty(shape, device=device).normal_(0, std, generator=generator) for shape in shapes]

        self.anchors = [t.bfloat16().float() for t in normal(0.02)]
        spread = [
            torch.empty(shape, device=device).uniform_(-8, 2, generator=generator).mul_(math.log(10)).exp_()
            for shape in shapes
        ]
        self.importances = [encode(omega, omega).decoded() for omega in spread]
        self.grads, self.scratch_grads = normal(1e-3), [torch.empty(shape, device=device) for shape in shapes]
        self.exp_avgs, self.exp_avg_sqs = normal(1e-3), [t.square_() for t in normal(1e-3)]
        self.model = nn.ParameterList(nn.Parameter(anchor.clone()) for anchor in self.anchors)
        self.params = list(self.model)

    @torch.no_grad()
    def rest(self) -> None:
        """w = w*, so that an EWC takes w* as its anchor."""
        for p, anchor in zip(self.params, self.anchors, strict=True):
            p.copy_(anchor)

    @torch.no_grad()
    def drift(self) -> None:
        """Move the weights away from where they are."""
        for p, g in zip(self.params, self.grads, strict=True):
            p.add_(g.roll(1))

    def give_grads(self) -> None:
        """The task gradient, for who only reads it."""
        for p, g in zip(self.params, self.grads, strict=True):
            p.grad = g

    def give_own_grads(self) -> None:
        """A copy of the task gradient, for who adds to it."""
        for p, g, own in zip(self.params, self.grads, self.scratch_grads, strict=True):
            p.grad = own.copy_(g)

    def seat(self, optimizer: Optimizer) -> Optimizer:
        """Let an optimizer go on from the board's moments."""
        state: dict[int, dict[str, Any]] = {}
        for i, (m, v) in enumerate(zip(self.exp_avgs, self.exp_avg_sqs, strict=True)):
            adam = {"step": torch.tensor(float(STEPS)), "exp_avg": m, "exp_avg_sq": v}
            state[i] = {"momentum_buffer": m} if isinstance(optimizer, torch.optim.SGD) else adam
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        m = optimizer.state[self.params[0]].get("exp_avg", optimizer.state[self.params[0]].get("momentum_buffer"))
        assert m is self.exp_avgs[0], "load_state_dict copied the moments"
        return optimizer


@dataclass(frozen=True)
class Contender:
    """One way to step.

    Attributes:
        rule: the step that it has to make.
        prepare: gives the gradients; not timed.
        call: makes the step.
        roundings: how far it may be from float64, in roundings on the error scale.
        held_bytes: of Ω and w* of one weight.
    """

    rule: StepRule
    prepare: Callable[[], object]
    call: Callable[[], object]
    roundings: float = Case.roundings
    held_bytes: int = 8

    @property
    def bytes_per_weight(self) -> int:
        """What must be read and written: w, g and the moments, four bytes each; Ω and w*."""
        moved = 7 if self.rule.kind == "adam" else 5
        return 4 * moved + (self.held_bytes if self.rule.ewc_lambda else 0)


Builder = Callable[[Board], Contender]


def protected(rule: StepRule, variant: Any) -> StepRule:
    return replace(rule, variant=variant, ewc_lambda=LAMBDA)


def optimizer_of(module: Any, rule: StepRule, params: Sequence[Tensor], **options: Any) -> Optimizer:
    """AdamW or SGD of torch.optim or fastewc.optim."""
    if rule.kind == "adam":
        return module.AdamW(
            params, lr=rule.lr, betas=rule.betas, eps=rule.eps, weight_decay=rule.weight_decay, **options
        )
    return module.SGD(params, lr=rule.lr, momentum=rule.momentum, **options)


def fused_roundings(rule: StepRule) -> float:
    """What torch's fused kernels need: they form 1 − β, and on GPUs 1 − βᵗ, in float32.

    A β near 1 has been rounded when 1 is subtracted: 1 − β₂ comes out 1.3e-5 off, over two hundred roundings.
    """
    if rule.kind != "adam":
        return Case.roundings
    u, t, off = unit_roundoff(torch.float32), STEPS + 1, 0.0
    for beta in (float(beta) for beta in rule.betas):
        rounded = float(torch.tensor(beta))
        off += abs((1 - rounded) / (1 - beta) - 1)
        off += abs((1 - rounded**t) / (1 - beta**t) - 1) + u / (1 - beta**t)
    return Case.roundings + off / u


def torch_alone(rule: StepRule, board: Board, **how: bool) -> Contender:
    optimizer = board.seat(optimizer_of(torch.optim, rule, board.params, **how))
    roundings = fused_roundings(rule) if how.get("fused") else Case.roundings
    return Contender(rule, board.give_grads, optimizer.step, roundings)


def loss_term(rule: StepRule, board: Board, penalty: Callable[[], Tensor]) -> Contender:
    """A penalty in the loss: its forward and backward, added to the task's gradient, then torch's fused step."""
    step = board.seat(optimizer_of(torch.optim, rule, board.params, fused=True)).step

    def call() -> None:
        penalty().backward()
        step()

    return Contender(rule, board.give_own_grads, call, fused_roundings(rule))


def autograd_penalty(board: Board) -> Contender:
    """As most people write it: the plain penalty."""

    def penalty() -> Tensor:
        loss = torch.zeros((), device=board.device)
        for p, omega, anchor in zip(board.params, board.importances, board.anchors, strict=True):
            loss = loss + (omega * (p - anchor) ** 2).sum()
        return LAMBDA / 2 * loss

    return loss_term(protected(ADAMW, "plain"), board, penalty)


def papers_penalty(board: Board) -> Contender:
    """As Kutalev & Lapina write it: λΩ/(1 + αλΩ) formed anew at every step."""
    rule = protected(ADAMW, "stabilized")

    def penalty() -> Tensor:
        loss = torch.zeros((), device=board.device)
        for p, omega, anchor in zip(board.params, board.importances, board.anchors, strict=True):
            loss = loss + 0.5 * (LAMBDA * omega / (rule.lr * LAMBDA * omega + 1) * (p - anchor) ** 2).sum()
        return loss

    return loss_term(rule, board, penalty)


def foreach_penalty(rule: StepRule, board: Board, *, keep: bool = False) -> Contender:
    """torch._foreach_* by hand, then torch's fused step. ``keep``: c is formed once, right while α is fixed."""
    rule = protected(rule, "stabilized")
    step = board.seat(optimizer_of(torch.optim, rule, board.params, fused=True)).step

    def stiffness() -> list[Tensor]:
        c = torch._foreach_mul(board.importances, LAMBDA)
        below = torch._foreach_mul(c, rule.lr)
        torch._foreach_add_(below, 1.0)
        torch._foreach_div_(c, below)
        return c

    kept = stiffness() if keep else None

    @torch.no_grad()
    def call() -> None:
        drift = torch._foreach_sub(board.params, board.anchors)
        torch._foreach_addcmul_(board.scratch_grads, drift, stiffness() if kept is None else kept)
        step()

    return Contender(rule, board.give_own_grads, call, fused_roundings(rule))


def compiled(board: Board, *, seconds: float) -> Contender:
    """Penalty and AdamW in one torch.compile'd function over all tensors; ``seconds``: what compiling may take."""
    if seconds <= 0:
        raise NotImplementedError("no time to compile was given")
    rule = protected(ADAMW, "stabilized")
    lr, (beta1, beta2), count = rule.lr, rule.betas, torch.full((), float(STEPS), dtype=torch.float64)

    def function(step_size: Tensor, root: Tensor, *lists: list[Tensor]) -> None:
        for w, g, m, v, omega, anchor in zip(*lists, strict=True):
            stiff = LAMBDA * omega
            pulled = g + stiff / (1 + lr * stiff) * (w - anchor)
            m.lerp_(pulled, 1 - beta1)
            v.mul_(beta2).addcmul_(pulled, pulled, value=1 - beta2)
            w.mul_(1 - lr * rule.weight_decay).sub_(step_size * m / (v.sqrt() / root + rule.eps))

    fast = torch.compile(function, fullgraph=True, dynamic=False)
    lists = [
        [p.detach() for p in board.params], board.grads, board.exp_avgs, board.exp_avg_sqs, board.importances,
        board.anchors,
    ]  # fmt: skip

    @torch.no_grad()
    def call() -> None:
        count.add_(1)
        step_size, root = lr / (1 - beta1**count), (1 - beta2**count).sqrt()
        fast(step_size.to(board.device, torch.float32), root.to(board.device, torch.float32), *lists)

    with time_limit(seconds, "torch.compile"):
        call()
    count.fill_(STEPS)
    return Contender(rule, board.give_grads, call)


class OutOfTime(BaseException):
    """Goes through the compiler's own handlers of Exception."""


@contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Raise NotImplementedError in the main thread if the body takes longer."""

    def stop(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except OutOfTime:
        raise NotImplementedError(f"{what} took longer than {seconds:g} s") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def ewc_of(board: Board, variant: str, *, compact: bool = False) -> fastewc.EWC:
    """Over the board's own Ω and w*; ``compact``: over uint8 codes and bfloat16 copies of them, which lose nothing."""
    board.rest()
    stored = {"importance_dtype": torch.uint8, "anchor_dtype": torch.bfloat16} if compact else {}
    ewc = fastewc.EWC(board.model, ewc_lambda=LAMBDA, variant=variant, **stored)
    ewc.consolidate({name: board.importances[int(name)] for name, _ in board.model.named_parameters()})
    for p, importance, anchor in zip(board.params, board.importances, board.anchors, strict=True):
        held = ewc.held(p)
        assert held is not None
        assert torch.equal(numbers(held[0], importance.dtype), importance) and torch.equal(held[1].float(), anchor)
        if isinstance(held[0], Tensor):
            held[0].set_(importance)
            held[1].set_(anchor)
    return ewc


def fastewc_step(rule: StepRule, variant: str | None, impl: str, board: Board, *, compact: bool = False) -> Contender:
    _dispatch.choose("ewc_step", impl, board.device)
    ewc = None if variant is None else ewc_of(board, variant, compact=compact)
    rule = rule if variant is None else protected(rule, variant)
    optimizer = board.seat(optimizer_of(fastewc.optim, rule, board.params, ewc=ewc, impl=impl))
    return Contender(rule, board.give_grads, optimizer.step, held_bytes=3 if compact else 8)


def attached(board: Board) -> Contender:
    rule, ewc = protected(ADAMW, "stabilized"), ewc_of(board, "stabilized")
    optimizer = board.seat(optimizer_of(torch.optim, rule, board.params, fused=True))
    ewc.attach(optimizer)
    return Contender(rule, board.give_grads, optimizer.step, fused_roundings(rule))


#: What everything of the same kind is compared with: torch's fused step without a penalty.
BASELINES = {"adam": "torch AdamW fused", "sgd": "torch SGD fused"}


def builders(compile_seconds: float) -> dict[str, Builder]:
    """Every contender by name. A builder raises NotImplementedError, with the reason, where it can't run."""
    found: dict[str, Builder] = {
        "torch AdamW fused": partial(torch_alone, ADAMW, fused=True),
        "torch AdamW foreach": partial(torch_alone, ADAMW, foreach=True),
        "torch AdamW for-loop": partial(torch_alone, ADAMW, foreach=False, fused=False),
        "autograd penalty + AdamW fused": autograd_penalty,
        "the paper's penalty + AdamW fused": papers_penalty,
        "foreach penalty + AdamW fused": partial(foreach_penalty, ADAMW),
        "foreach penalty, c kept + AdamW fused": partial(foreach_penalty, ADAMW, keep=True),
        "torch.compile of penalty + AdamW": partial(compiled, seconds=compile_seconds),
        "ewc.attach(torch AdamW fused)": attached,
        "torch SGD fused": partial(torch_alone, SGD, fused=True),
        "foreach penalty + SGD fused": partial(foreach_penalty, SGD),
    }
    for impl in ("triton", "native"):
        for variant in (*VARIANTS, None):
            name = f"fastewc AdamW {variant or 'without ewc'} [{impl}]"
            found[name] = partial(fastewc_step, ADAMW, variant, impl)
        name = f"fastewc AdamW stabilized, uint8 Ω and bfloat16 w* [{impl}]"
        found[name] = partial(fastewc_step, ADAMW, "stabilized", impl, compact=True)
        found[f"fastewc SGD stabilized [{impl}]"] = partial(fastewc_step, SGD, "stabilized", impl)
    return found
