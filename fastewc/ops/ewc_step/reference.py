"""The protected optimizer step in plain PyTorch: the specification of every fast implementation.

One tensor at a time. Letters: w weight before the step, w′ after the optimizer's own update, w⁺ after E3/E4,
w* anchor, Ω importance, g gradient, m and v Adam's moments, b momentum buffer, ω path integral; α learning
rate, λ ewc_lambda. Without a penalty these are the operations of torch.optim (foreach=False, fused=False) in
the same order, so float32 and float64 results have the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastewc._names import op_dtype
from fastewc.ops.ewc_penalty import reference as penalty
from fastewc.ops.ewc_step.halves import halves, whole
from fastewc.ops.ewc_step.rule import StepRule, StepTensors, moment_dtype
from fastewc.ops.importance_codes import numbers

Scalar = float | Tensor


def ewc_step(
    rule: StepRule,
    tensors: StepTensors,
    *,
    clip_coef: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Step every tensor in place; the order of the statements is the contract of ``api.ewc_step``."""
    if found_inf is not None and bool(found_inf):
        return
    update = adam_update if rule.kind == "adam" else sgd_update
    for i, param in enumerate(tensors.params):
        w, remainder = weight(tensors, i), tensors.remainders[i] if tensors.remainders else None
        g_task = task_gradient(tensors.grads[i], w.dtype, grad_scale, maximize=rule.maximize)
        pull = penalty_gradient(rule, tensors, i, w)
        g = clipped_sum(g_task, pull, clip_coef, clip_penalty=rule.clip_penalty)
        w_new = update(rule, tensors, i, w, g)
        w_new = held_back(rule, tensors, i, w, w_new)
        stored = w_new if remainder is not None else w_new.to(param.dtype)
        omega = tensors.path_integrals[i] if tensors.path_integrals else None
        if omega is not None:
            g_path = g_task + pull if rule.regularized_path and pull is not None else g_task
            omega.sub_(g_path * (stored.to(w.dtype) - w))  # E7: ω ← ω − g(w⁺ − w), with w⁺ as it is stored
        if remainder is not None:
            stored, low = halves(w_new)
            remainder.copy_(low)
        param.copy_(stored)


def weight(tensors: StepTensors, i: int) -> Tensor:
    """w in the dtype of the arithmetic: the parameter, with its remainder if it has one."""
    param, remainder = tensors.params[i], tensors.remainders[i] if tensors.remainders else None
    return param.to(op_dtype(param)) if remainder is None else whole(param, remainder)


def task_gradient(grad: Tensor, dtype: torch.dtype, grad_scale: Tensor | None, *, maximize: bool) -> Tensor:
    """The gradient g of the loss that is minimised.

    Unscaled as GradScaler does it: by the float32 reciprocal of the scale, formed in float64.
    """
    g = grad.to(dtype)
    if grad_scale is not None:
        g = g * _factor(grad_scale.double().reciprocal().float(), g)
    return -g if maximize else g


def penalty_gradient(rule: StepRule, tensors: StepTensors, i: int, w: Tensor) -> Tensor | None:
    """c(w − w*) with c = λΩ (E1) or λΩ/(1 + αλΩ) (E2); None where nothing is added to the gradient."""
    importance, anchor = _held(tensors, i, w.dtype)
    if importance is None or anchor is None or rule.variant not in ("plain", "stabilized"):
        return None
    ewc_lambda, lr = _factor(rule.ewc_lambda, w), _factor(rule.lr, w)
    return penalty.penalty_grad(w, importance, anchor, ewc_lambda, lr, rule.variant)


def clipped_sum(g_task: Tensor, pull: Tensor | None, clip_coef: Tensor | None, *, clip_penalty: bool) -> Tensor:
    """κg + c(w − w*), κ the clip coefficient; κ(g + c(w − w*)) for comparison with the paper's order."""
    kappa = 1.0 if clip_coef is None else _factor(clip_coef, g_task)
    if pull is None:
        return g_task * kappa
    return (g_task + pull) * kappa if clip_penalty else g_task * kappa + pull


def held_back(rule: StepRule, tensors: StepTensors, i: int, w: Tensor, w_new: Tensor) -> Tensor:
    """w⁺ from w′: E3 moves it towards w*, E4 back towards w; the other variants have acted on the gradient."""
    importance, anchor = _held(tensors, i, w.dtype)
    if importance is None or anchor is None or rule.variant not in ("proximal", "wva"):
        return w_new
    target = anchor if rule.variant == "proximal" else w
    ewc_lambda, lr = _factor(rule.ewc_lambda, w), _factor(rule.lr, w)
    return penalty.held_back(w_new, target, importance, ewc_lambda, lr)


def sgd_update(rule: StepRule, tensors: StepTensors, i: int, w: Tensor, g: Tensor) -> Tensor:
    """w′ of SGD: b ← μb + (1 − τ)g, b = g at the first step; w′ = w − αb, or w − α(g + μb) with Nesterov."""
    g = _with_coupled_decay(rule, w, g)
    if rule.momentum != 0:
        stored = tensors.momentum_buffers[i]
        b = g if stored is None else (stored.to(w.dtype) * rule.momentum).add_(g, alpha=1 - rule.dampening)
        if stored is None:
            dtype = moment_dtype(tensors.params[i].dtype, rule.state_dtype)
            stored = torch.empty_like(tensors.params[i], dtype=dtype, requires_grad=False)
            tensors.momentum_buffers[i] = stored
        stored.copy_(b)
        g = g.add(b, alpha=rule.momentum) if rule.nesterov else b
    return _add(w, g, -rule.lr)


def adam_update(rule: StepRule, tensors: StepTensors, i: int, w: Tensor, g: Tensor) -> Tensor:
    """w′ of Adam and AdamW, t counting from 1.

    m ← β₁m + (1 − β₁)g,  v ← β₂v + (1 − β₂)g²,  w′ = w − α/(1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε)

    AdamW multiplies w by 1 − αη first (η weight decay); Adam adds ηw to g. amsgrad divides by the largest v
    so far.
    """
    lr, (beta1, beta2) = _scalar(rule.lr), (_scalar(beta) for beta in rule.betas)
    if rule.decoupled_weight_decay:
        w = w * _factor(1 - lr * rule.weight_decay, w) if rule.weight_decay != 0 else w
    else:
        g = _with_coupled_decay(rule, w, g)
    m = torch.lerp(tensors.exp_avgs[i].to(w.dtype), g, _factor(1 - beta1, w))
    v = tensors.exp_avg_sqs[i].to(w.dtype) * _factor(beta2, w)
    v = _addcmul(v, g, g, 1 - beta2)
    tensors.exp_avgs[i].copy_(m)
    tensors.exp_avg_sqs[i].copy_(v)
    if rule.amsgrad:
        v = torch.maximum(tensors.max_exp_avg_sqs[i].to(w.dtype), v)
        tensors.max_exp_avg_sqs[i].copy_(v)
    t = _count(tensors.steps[i])
    step_size = lr / (1 - beta1**t)
    denominator = (v.sqrt() / _factor((1 - beta2**t) ** 0.5, w)).add_(rule.eps)
    return _addcdiv(w, m, denominator, -step_size)


def gradient_norms(rule: StepRule, tensors: StepTensors, grad_scale: Tensor | None) -> list[Tensor]:
    """The L2 norm of each unscaled, unclipped gradient, with the penalty in it if ``rule.clip_penalty``."""
    norms = []
    for i in range(len(tensors.params)):
        w = weight(tensors, i)
        g = task_gradient(tensors.grads[i], w.dtype, grad_scale, maximize=rule.maximize)
        pull = penalty_gradient(rule, tensors, i, w) if rule.clip_penalty else None
        norms.append(torch.linalg.vector_norm(g if pull is None else g + pull))
    return norms


def _with_coupled_decay(rule: StepRule, w: Tensor, g: Tensor) -> Tensor:
    """The gradient of (η/2)w² added: g + ηw, the weight decay of SGD and Adam."""
    eta = rule.weight_decay
    return g if not isinstance(eta, Tensor) and eta == 0 else _add(g, w, eta)


def _held(tensors: StepTensors, i: int, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Ω as numbers of the arithmetic's dtype, and w*."""
    importance = tensors.importances[i] if tensors.importances else None
    return (None, None) if importance is None else (numbers(importance, dtype), tensors.anchors[i])


def _count(step: Tensor) -> Scalar:
    """Advance the counter: t as a number, or in float64 on its device so that nothing waits for the host."""
    step += 1
    return step.item() if step.device.type == "cpu" else step.double()


def _scalar(value: Scalar) -> Scalar:
    return value.detach().reshape(()) if isinstance(value, Tensor) else value


def _factor(value: Scalar, w: Tensor) -> Scalar:
    """A scalar that can meet w without changing its dtype or waiting for a device: a number if it is on the host."""
    value = _scalar(value)
    if not isinstance(value, Tensor):
        return value
    return value.item() if value.device.type == "cpu" else value.to(w.device, w.dtype)


# torch's fused multiply-adds take numbers only; a scalar on a device is multiplied in.
def _add(x: Tensor, y: Tensor, scale: Scalar) -> Tensor:
    scale = _factor(scale, x)
    return x + scale * y if isinstance(scale, Tensor) else x.add(y, alpha=scale)


def _addcmul(x: Tensor, y: Tensor, z: Tensor, scale: Scalar) -> Tensor:
    scale = _factor(scale, x)
    return x + scale * (y * z) if isinstance(scale, Tensor) else x.addcmul(y, z, value=scale)


def _addcdiv(x: Tensor, y: Tensor, z: Tensor, scale: Scalar) -> Tensor:
    scale = _factor(scale, x)
    return x + scale * (y / z) if isinstance(scale, Tensor) else x.addcdiv(y, z, value=scale)
