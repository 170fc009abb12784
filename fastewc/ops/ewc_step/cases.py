"""Inputs, float64 oracle and error scale of ``ewc_step``, for every implementation and dtype."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastewc import _dispatch
from fastewc.ops.ewc_step.api import ewc_step
from fastewc.ops.ewc_step.halves import whole
from fastewc.ops.ewc_step.rule import StepRule, StepTensors, moment_dtype
from fastewc.ops.importance_codes import Codes, encode, numbers

# 0-dim, empty, one, odd, larger than a block, and two layouts that are not contiguous.
SHAPES: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (17,), (33, 130), (4, 6, 5, 3), (9, 14))


@dataclass(frozen=True)
class Case:
    """One rule on tensors of many shapes; every third is unprotected, every fourth has no path integral.

    Attributes:
        id: name of the test.
        rule: how to step.
        clip_coef: factor of the task gradient, or None.
        grad_scale: factor that the gradients carry, or None.
        first: no momentum buffer exists yet.
        importance_dtype: of Ω, if not that of the arithmetic; anchors are then bfloat16.
        state_dtype: of the moments of 16-bit parameters, if not theirs.
        split: bfloat16 parameters have a remainder, but every fifth.
        dtypes: of the parameters for which the case is special.
        roundings: how many may add up on the error scale: about 7 on the way to the gradient (c takes 4), twice
            that in its square, halved again by the root of v, and a few for the quotient and the update.
    """

    id: str
    rule: StepRule
    clip_coef: float | None = None
    grad_scale: float | None = None
    first: bool = False
    importance_dtype: torch.dtype | None = None
    state_dtype: torch.dtype | None = None
    split: bool = False
    roundings: float = 16.0
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

    def inputs(self, dtype: torch.dtype) -> StepTensors:
        """Seeded inputs: moments, weights and gradients are rounded to ``dtype``; Ω spans twelve decades."""
        gen = torch.Generator().manual_seed(7)

        def normal(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape, generator=gen, dtype=torch.float64).to(dtype)

        def moment(shape: tuple[int, ...]) -> Tensor:
            return normal(shape).to(moment_dtype(dtype, self.state_dtype))

        wide = torch.float64 if dtype == torch.float64 else torch.float32
        t = StepTensors()
        for i, shape in enumerate(SHAPES):
            w = laid_out(normal(shape))
            t.params.append(w)
            t.grads.append((normal(shape).double() * (self.grad_scale or 1.0)).to(dtype))
            held, tracked = i % 3 != 2, i % 4 != 3
            omega = 10 ** (12 * torch.rand(shape, generator=gen, dtype=torch.float64) - 9)
            t.importances.append(self._stored(_with_zeros(omega).to(wide), w) if held else None)
            near = torch.bfloat16 if self.importance_dtype else dtype
            t.anchors.append((w.double() + 0.1 * normal(shape).double()).to(near) if held else None)
            t.path_integrals.append(normal(shape).to(wide) if tracked else None)
            if self.rule.kind == "adam":
                t.exp_avgs.append(laid_out(moment(shape)))
                t.exp_avg_sqs.append(laid_out(moment(shape).square()))
                t.steps.append(torch.tensor(float(3 + i)))
                if self.rule.amsgrad:
                    t.max_exp_avg_sqs.append(moment(shape).square())
            elif self.rule.momentum != 0:
                t.momentum_buffers.append(None if self.first else moment(shape))
            if self.split and dtype == torch.bfloat16:
                low = torch.randint(-(2**15), 2**15, shape, generator=gen).to(torch.int16)
                t.remainders.append(laid_out(low) if i % 5 != 4 else None)
        return t

    def _stored(self, omega: Tensor, w: Tensor) -> Tensor | Codes:
        if self.importance_dtype == torch.uint8:
            return encode(omega, w)
        return omega.to(self.importance_dtype or omega.dtype)

    def run(self, impl: _dispatch.Impl, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        """Everything that the op writes: weights, moments, counters, path integrals."""
        return self.step(converted(self.inputs(dtype), None, device), impl)

    def oracle(self, dtype: torch.dtype) -> list[Tensor]:
        """The float64 reference on the rounded inputs."""
        return [out.double() for out in self.step(converted(self.inputs(dtype), torch.float64), "reference")]

    def error_scale(self, dtype: torch.dtype) -> list[Tensor]:
        """Σ|terms| of each output, in the order of :meth:`run`."""
        t, new = converted(self.inputs(dtype), torch.float64), converted(self.inputs(dtype), torch.float64)
        self.step(new, "reference")
        stored = self.inputs(dtype)
        scales = [self._scales(t, new, i, weight(stored, i).dtype) for i in range(len(t.params))]
        written = columns(replace(new, momentum_buffers=list(new.momentum_buffers)))
        return [scales[i][name] for name, i, _ in written]

    def step(self, t: StepTensors, impl: _dispatch.Impl) -> list[Tensor]:
        """Step these tensors in place; everything that was written."""
        coef = None if self.clip_coef is None else torch.tensor(self.clip_coef, device=t.params[0].device)
        scale = None if self.grad_scale is None else torch.tensor(self.grad_scale, device=t.params[0].device)
        ewc_step(self.rule, t, clip_coef=coef, grad_scale=scale, impl=impl)
        return [tensor for _, _, tensor in columns(t)]

    def _scales(self, t: StepTensors, new: StepTensors, i: int, dtype: torch.dtype) -> dict[str, Tensor]:
        rule, w, lr = self.rule, t.params[i].abs(), float(self.rule.lr)
        g_task = t.grads[i].abs() / (self.grad_scale or 1.0)
        omega, anchor = t.importances[i], t.anchors[i]
        pull, held = torch.zeros_like(w), torch.zeros_like(w)
        if omega is not None and anchor is not None:
            stiff = numbers(omega, torch.float64) * float(rule.ewc_lambda)
            if rule.variant in ("plain", "stabilized"):
                c = stiff if rule.variant == "plain" else stiff / (1 + lr * stiff)
                pull = c * (t.params[i] - anchor).abs()
            held = anchor.abs() if rule.variant == "proximal" else w
        g = g_task * (self.clip_coef or 1.0) + pull + float(rule.weight_decay) * w
        scales = self._sgd_scales(t, i, g) if rule.kind == "sgd" else self._adam_scales(t, new, i, g)
        scales["params"] = w + held + lr * scales.pop("direction")
        rounded = 1 + torch.finfo(dtype).eps / torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        g_path = g_task + pull if rule.regularized_path else g_task
        path = t.path_integrals[i]
        scales["path_integrals"] = g_path * scales["params"] * rounded + (0 if path is None else path.abs())
        return scales

    def _sgd_scales(self, t: StepTensors, i: int, g: Tensor) -> dict[str, Tensor]:
        if self.rule.momentum == 0:
            return {"direction": g}
        old = t.momentum_buffers[i]
        b = g if old is None else self.rule.momentum * old.abs() + (1 - self.rule.dampening) * g
        return {"momentum_buffers": b, "direction": g + self.rule.momentum * b if self.rule.nesterov else b}

    def _adam_scales(self, t: StepTensors, new: StepTensors, i: int, g: Tensor) -> dict[str, Tensor]:
        beta1, beta2 = (float(beta) for beta in self.rule.betas)
        # Below ½, lerp takes β₁ from 1 − (1 − β₁), whose rounding is one of 1.
        m = (beta1 if beta1 >= 0.5 else 1.0) * t.exp_avgs[i].abs() + (1 - beta1) * g
        v = beta2 * t.exp_avg_sqs[i] + (1 - beta2) * g.square()
        step = new.steps[i]
        v_used, v_scale = new.exp_avg_sqs[i], v
        if self.rule.amsgrad:
            v_used, v_scale = new.max_exp_avg_sqs[i], torch.maximum(t.max_exp_avg_sqs[i], v)
        denominator = (v_used / (1 - beta2**step)).sqrt() + self.rule.eps
        # An error of v, relative V/v, reaches the quotient halved by the root.
        quotient = (m + new.exp_avgs[i].abs() * v_scale / v_used) / denominator / (1 - beta1**step)
        scales = {"exp_avgs": m, "exp_avg_sqs": v, "max_exp_avg_sqs": v_scale, "steps": step}
        return scales | {"direction": quotient}


def laid_out(t: Tensor) -> Tensor:
    """The same values, channels_last for 4-D, a slice with gaps for [9, 14]."""
    if t.ndim == 4:
        return t.contiguous(memory_format=torch.channels_last)
    if t.shape == (9, 14):
        return torch.zeros(9, 28, dtype=t.dtype)[:, 1::2].copy_(t)
    return t


def _with_zeros(omega: Tensor) -> Tensor:
    flat = omega.flatten()
    flat[::5] = 0
    return flat.view_as(omega)


def converted(t: StepTensors, dtype: torch.dtype | None, device: str = "cpu") -> StepTensors:
    """On another device, in another dtype; None keeps each tensor's own. What is already there is the same tensor."""
    lists: dict[str, Any] = dict(vars(t))
    if dtype is not None and t.remainders:
        lists |= {"params": [weight(t, i) for i in range(len(t.params))], "remainders": []}
    for name, entries in lists.items():
        lists[name] = [None if e is None else _converted(e, dtype, torch.device(device)) for e in entries]
    return StepTensors(**lists)


def weight(t: StepTensors, i: int) -> Tensor:
    """A parameter, or the float32 weight of its halves."""
    low = t.remainders[i] if t.remainders else None
    return t.params[i] if low is None else whole(t.params[i], low)


def _converted(e: Tensor | Codes, dtype: torch.dtype | None, device: torch.device) -> Tensor | Codes:
    if isinstance(e, Codes):
        return e.to(device) if dtype is None else e.decoded(dtype).to(device)
    return e.to(device, dtype or e.dtype)


def columns(t: StepTensors) -> Iterator[tuple[str, int, Tensor]]:
    """(list, index, tensor) of everything that the op writes; halves as the weights that they are."""
    yield from (("params", i, weight(t, i)) for i in range(len(t.params)))
    written = ("momentum_buffers", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "steps")
    for name in (*written, "path_integrals"):
        for i, tensor in enumerate(getattr(t, name)):
            if tensor is not None:
                yield name, i, tensor


def _cases() -> list[Case]:
    sgd = StepRule("sgd", lr=0.05, ewc_lambda=3.0)
    adam = StepRule("adam", lr=0.01, ewc_lambda=3.0)
    adamw = replace(adam, weight_decay=0.1, decoupled_weight_decay=True)
    heavy, nesterov = replace(sgd, momentum=0.9), replace(sgd, momentum=0.9, nesterov=True)
    bases = {"sgd": sgd, "momentum": heavy, "nesterov": nesterov, "adam": adam, "adamw": adamw}
    cases = [
        Case(f"{name}-{variant}", replace(base, variant=variant))
        for name, base in bases.items()
        for variant in ("plain", "stabilized", "proximal", "wva")
    ]
    compressed = {
        "adamw-stabilized": (torch.uint8, torch.bfloat16),
        "momentum-proximal": (torch.uint8,),
        "sgd-wva": (torch.uint8,),
        "sgd-plain": (torch.bfloat16,),
    }
    damped = replace(heavy, dampening=0.3, weight_decay=0.01)
    return [
        *cases,
        *(
            replace(case, id=f"{case.id}-{str(dtype)[6:]}", importance_dtype=dtype)
            for case in cases
            for dtype in compressed.get(case.id, ())
        ),
        Case("sgd-lambda-0", replace(sgd, ewc_lambda=0.0)),
        Case("sgd-tensor-lr", replace(sgd, lr=torch.tensor(0.0625), ewc_lambda=torch.tensor(3.0))),
        Case("dampening-decay", damped),
        Case("dampening-first", damped, first=True),
        Case("nesterov-maximize", replace(nesterov, maximize=True)),
        Case("adam-decay-maximize", replace(adam, weight_decay=0.01, maximize=True)),
        Case("adam-amsgrad", replace(adam, amsgrad=True, betas=(0.8, 0.95), eps=1e-3)),
        Case("adamw-amsgrad-proximal", replace(adamw, amsgrad=True, variant="proximal")),
        Case("adamw-clip-scale", adamw, clip_coef=0.125, grad_scale=256.0),
        Case("sgd-clip-sum", replace(sgd, clip_penalty=True), clip_coef=0.125),
        Case("sgd-regularized-path", replace(sgd, regularized_path=True), clip_coef=0.5),
        *_cases_of_16_bits(),
    ]


def _cases_of_16_bits() -> list[Case]:
    """Moments wider than their parameters, and weights in two halves."""
    sgd = StepRule("sgd", lr=0.05, ewc_lambda=3.0, state_dtype=torch.float32)
    adamw = StepRule("adam", lr=0.01, weight_decay=0.1, decoupled_weight_decay=True, ewc_lambda=3.0)
    heavy, nesterov = replace(sgd, momentum=0.9), replace(sgd, momentum=0.9, nesterov=True)
    amsgrad = replace(adamw, amsgrad=True, decoupled_weight_decay=False)
    wide = partial(Case, state_dtype=torch.float32, dtypes=(torch.bfloat16, torch.float16))
    split = partial(Case, state_dtype=torch.float32, split=True, dtypes=(torch.bfloat16,))
    return [
        wide("adamw-wide", adamw),
        wide("amsgrad-proximal-wide", replace(amsgrad, variant="proximal")),
        wide("momentum-first-wide", heavy, first=True),
        split("sgd-split", sgd),
        split("sgd-proximal-split", replace(sgd, variant="proximal")),
        split("sgd-regularized-path-split", replace(sgd, variant="plain", regularized_path=True), clip_coef=0.5),
        split("momentum-first-split", heavy, first=True),
        split("nesterov-wva-split", replace(nesterov, variant="wva")),
        split("adamw-split", adamw, clip_coef=0.125, grad_scale=256.0),
        split("amsgrad-proximal-split", replace(amsgrad, variant="proximal")),
        split("adamw-codes-split", adamw, importance_dtype=torch.uint8),
        split("adamw-narrow-split", adamw, state_dtype=torch.bfloat16),
        split("momentum-narrow-split", heavy, state_dtype=torch.bfloat16),
    ]


CASES: list[Case] = _cases()
