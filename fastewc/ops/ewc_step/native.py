"""ewc_step in C++ (CPU) and CUDA C++: csrc/ewc_step. ``_dispatch.choose`` has loaded the library before."""

from __future__ import annotations

import torch
from torch import Tensor

from fastewc.ops.ewc_step.rule import StepRule, StepTensors
from fastewc.ops.ewc_step.schema import SCHEMA, launches, scalars_of
from fastewc.ops.importance_codes import split

torch.library.define("fastewc::ewc_step", SCHEMA)


@torch.library.register_fake("fastewc::ewc_step")  # type: ignore[untyped-decorator]
def _fake(*args: object) -> None:
    pass


_step = torch.ops.fastewc.ewc_step.default


def ewc_step(
    rule: StepRule,
    tensors: StepTensors,
    *,
    clip_coef: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """One call of the op for each set of tensors that have the same lists; see ``reference.py`` for the equations."""
    scalars, live_scalars = scalars_of(rule, tensors.params[0].device)
    for launch in launches(rule, tensors):
        t = launch.tensors
        _step(
            t.params, t.grads, t.momentum_buffers, t.exp_avgs, t.exp_avg_sqs, t.max_exp_avg_sqs, t.steps,
            *split(t.importances), t.anchors, t.path_integrals, t.remainders, clip_coef, grad_scale, found_inf,
            live_scalars, scalars, rule.kind, rule.variant, rule.maximize, rule.nesterov, launch.first, rule.amsgrad,
            rule.decoupled_weight_decay, rule.clip_penalty, rule.regularized_path,
        )  # fmt: skip
