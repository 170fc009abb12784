"""Steps of bfloat16 weights with remainders beside the same steps of float32 weights: they agree in every bit."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fastewc.ops.ewc_step import StepRule, StepTensors, ewc_step, halves, moment_dtype, whole
from fastewc.ops.importance_codes import encode
from tests.ops.drawn_steps import laid_out

VARIANTS = ("plain", "stabilized", "proximal", "wva")
SGD = StepRule("sgd", lr=1e-3, ewc_lambda=3.0, weight_decay=0.01, state_dtype=torch.float32)
ADAM = StepRule("adam", lr=1e-4, ewc_lambda=3.0, weight_decay=0.01)
ADAMW = dataclasses.replace(ADAM, weight_decay=0.1, decoupled_weight_decay=True)
RULES = {
    "sgd": SGD,
    "momentum": dataclasses.replace(SGD, momentum=0.9, dampening=0.1, regularized_path=True),
    "nesterov": dataclasses.replace(SGD, momentum=0.9, nesterov=True, maximize=True, clip_penalty=True),
    "adam": ADAM,
    "adamw": ADAMW,
    "amsgrad": dataclasses.replace(ADAMW, amsgrad=True),
}
SHAPES = ((), (0,), (1,), (17,), (3, 5, 2, 2), (1030,))
STATE = ("momentum_buffers", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "path_integrals", "steps")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What belongs to the weights, and how it is stored."""

    codes: bool = False
    anchor: torch.dtype = torch.bfloat16
    grad: torch.dtype = torch.bfloat16
    moment: torch.dtype = torch.float32
    layout: str = "contiguous"
    steps: int = 100
    device: str = "cpu"

    def tensors(self, rule: StepRule, split: bool) -> StepTensors:
        """Weights that bfloat16 holds, with all that may belong to them; every third is unprotected."""
        gen = torch.Generator().manual_seed(3)
        t = StepTensors()
        for i, shape in enumerate(SHAPES):
            w = torch.randn(shape, generator=gen).bfloat16()
            omega = 10 ** (12 * torch.rand(shape, generator=gen) - 9)
            near = (w.float() + 0.1 * torch.randn(shape, generator=gen)).to(self.anchor)
            p = self.place(w if split else w.float())
            stored = encode(omega, p.cpu()).to(torch.device(self.device)) if self.codes else self.place(omega)
            held = i % 3 != 2
            t.params.append(p)
            t.importances.append(stored if held else None)
            t.anchors.append(self.place(near) if held else None)
            t.path_integrals.append(self.place(torch.zeros(shape)) if i % 4 != 1 else None)
            zeros = torch.zeros(shape, dtype=moment_dtype(p.dtype, self.moment))
            if rule.kind == "adam":
                t.exp_avgs.append(self.place(zeros))
                t.exp_avg_sqs.append(self.place(zeros))
                t.steps.append(torch.zeros((), device=self.device))
                if rule.amsgrad:
                    t.max_exp_avg_sqs.append(self.place(zeros))
            elif rule.momentum != 0:
                t.momentum_buffers.append(None)
            if split:
                t.remainders.append(self.place(torch.zeros(shape, dtype=torch.int16)))
        return t

    def place(self, x: Tensor) -> Tensor:
        """In the layout, on the device."""
        return laid_out(x, self.layout).to(self.device)

    def trained(self, rule: StepRule, impl: Any, *, split: bool) -> StepTensors:
        """After all steps, of clipped and scaled gradients that bfloat16 holds."""
        t, gen = self.tensors(rule, split), torch.Generator().manual_seed(4)
        clip, scale = (torch.tensor(x, device=self.device) for x in (0.5, 8.0))
        for _ in range(self.steps):
            values = [torch.randn(shape, generator=gen).bfloat16() for shape in SHAPES]
            t.grads[:] = [self.place(g.to(self.grad if split else torch.float32)) for g in values]
            ewc_step(rule, t, clip_coef=clip, grad_scale=scale, impl=impl)
        return t


def weights(t: StepTensors) -> list[Tensor]:
    """The parameters, or the float32 weights of their halves."""
    return [whole(p, low) for p, low in zip(t.params, t.remainders, strict=True)] if t.remainders else t.params


def check_same_bits(rule: StepRule, impl: Any, setting: Setting) -> None:
    """Both halves are the float32 weights, the parameters those rounded, and all state is the same."""
    ours, theirs = (setting.trained(rule, impl, split=split) for split in (True, False))
    got, wanted = weights(ours), weights(theirs)
    assert all(w.dtype == torch.float32 and torch.equal(w, other) for w, other in zip(got, wanted, strict=True))
    for name in STATE:
        for one, other in zip(getattr(ours, name), getattr(theirs, name), strict=True):
            assert one is other is None or (one.dtype == other.dtype and torch.equal(one, other)), name
    assert all(torch.equal(p, halves(w)[0]) for p, w in zip(ours.params, wanted, strict=True))
    assert any(bool(low.any()) for low in ours.remainders)
