"""The contract of the protected optimizer step: what goes in, in which order it acts, what runs it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from fastewc import _dispatch
from fastewc.ops.ewc_step.rule import StepRule, StepTensors


def ewc_step(
    rule: StepRule,
    tensors: StepTensors,
    *,
    clip_coef: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    impl: _dispatch.Impl = "auto",
) -> None:
    """Step every tensor in place: parameters, moments, counters, path integrals; gradients are only read.

    With w the weight, w* the anchor, Ω the importance, α = lr, λ = ewc_lambda and s = αλΩ, in this order:

    1. g = grad / grad_scale; −g under ``maximize``. If found_inf is not zero nothing below happens at all.
    2. g ← clip_coef · g.
    3. g ← g + c(w − w*), with w before any decay: c = λΩ (E1, "plain": Kirkpatrick et al. 2017, eq. 3) or
       c = λΩ/(1 + αλΩ) (E2, "stabilized": Kutalev & Lapina 2021, arXiv 2109.10021).
    4. Weight decay, moments and update of torch.optim: w′.
    5. w⁺ = (w′ + s·w*)/(1 + s) (E3, "proximal"), w⁺ = w + (w′ − w)/(1 + s) (E4, "wva"), else w⁺ = w′.
       w⁺ is rounded to the dtype of the parameter and stored.
    6. ω ← ω − g_task · (w⁺ − w) (E7, Zenke et al. 2017, eq. 3), with g_task the g of step 1 and w⁺ as stored.

    All arithmetic is float32 (float64 for float64 parameters), whatever the storage; each result is rounded
    once, when it is stored. A bfloat16 parameter with a remainder is the float32 weight of both halves
    (``halves.py``), and so is w⁺. Any layout, 0-dim and empty tensors included.

    Args:
        rule: what all tensors share.
        tensors: parallel lists on one device.
        clip_coef: 0-dim factor of the task gradient, see :func:`clip_coefficient`; None for 1.
        grad_scale: 0-dim factor that the gradients still carry (torch.amp.GradScaler); None for 1.
        found_inf: 0-dim flag, not zero if a gradient overflowed; None for no.
        impl: "auto", "reference", "triton" or "native".

    Raises:
        ValueError: lists of unequal length, a remainder that is not int16 or not of a bfloat16 parameter, or an
            unknown ``impl``.
        NotImplementedError: the requested ``impl`` cannot run here; the reason is named.
    """
    _check_lengths(rule, tensors)
    if tensors.params:
        step = implementation(impl, tensors.params[0].device)
        step(rule, tensors, clip_coef=clip_coef, grad_scale=grad_scale, found_inf=found_inf)


class Implementation(Protocol):
    """:func:`ewc_step` without its checks, for tensors of one kind of device."""

    def __call__(
        self,
        rule: StepRule,
        tensors: StepTensors,
        *,
        clip_coef: Tensor | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Step every tensor in place."""


def implementation(impl: _dispatch.Impl, device: torch.device) -> Implementation:
    """What :func:`ewc_step` runs: chosen once, called as often as the device stays. Errors as there."""
    match _dispatch.choose("ewc_step", impl, device):
        case "reference":
            from fastewc.ops.ewc_step import reference

            return reference.ewc_step
        case "native":
            from fastewc.ops.ewc_step import native

            return _counted(native.ewc_step)
        case "triton":
            from fastewc.ops.ewc_step import triton

            return _counted(triton.ewc_step)


def _counted(kernel: Implementation) -> Implementation:
    """What the kernels leave to Python."""

    def step(
        rule: StepRule,
        tensors: StepTensors,
        *,
        clip_coef: Tensor | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        if found_inf is not None:
            # Kernels read it where they run; a new momentum buffer, though, must not come to be in a skipped step.
            new = any(buffer is None for buffer in tensors.momentum_buffers)
            if (new or tensors.params[0].device.type == "cpu") and bool(found_inf):
                return
        kernel(rule, tensors, clip_coef=clip_coef, grad_scale=grad_scale, found_inf=found_inf)
        # They write without telling autograd; a later backward through the old weights must notice.
        torch.autograd.graph.increment_version(tensors.params)

    return step


def gradient_norm(calls: Iterable[tuple[StepRule, StepTensors]], *, grad_scale: Tensor | None = None) -> Tensor:
    """The global L2 norm of the unscaled gradients of several calls: what clipping compares with its maximum.

    Of task gradient + penalty where ``rule.clip_penalty`` is set, of the task gradient otherwise. Squares are
    summed in float32 (float64) whatever the dtype of the gradients, so float16 gradients cannot overflow it.

    Args:
        calls: (rule, tensors) pairs, each on its own device; no longer needed once the next one is asked for.
        grad_scale: 0-dim factor that the gradients still carry; None for 1.

    Returns:
        0-dim tensor on the device of the first parameter; 0 if there is none.
    """
    from fastewc.ops.ewc_step import reference

    norms = [norm for rule, tensors in calls for norm in reference.gradient_norms(rule, tensors, grad_scale)]
    if not norms:
        return torch.zeros(())
    device = norms[0].device
    total: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(device) for norm in norms]))
    return total


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """min(1, max_norm / (norm + 1e-6)), the factor of torch.nn.utils.clip_grad_norm_; 0-dim, no host sync."""
    coefficient: Tensor = max_norm / (norm + 1e-6)
    return coefficient.clamp(max=1.0)


def _check_lengths(rule: StepRule, tensors: StepTensors) -> None:
    needed = {"grads"}
    if rule.kind == "adam":
        needed |= {"exp_avgs", "exp_avg_sqs", "steps"} | ({"max_exp_avg_sqs"} if rule.amsgrad else set())
    elif rule.momentum != 0:
        needed |= {"momentum_buffers"}
    for name, entries in vars(tensors).items():
        if len(entries) != len(tensors.params) and (entries or name in needed):
            raise ValueError(
                f"ewc_step: {name} has {len(entries)} entries, wanted one for each of the {len(tensors.params)} params"
            )
    if len(tensors.importances) != len(tensors.anchors):
        raise ValueError("ewc_step: importances and anchors belong together: give both or neither")
    for param, remainder in zip(tensors.params, tensors.remainders, strict=False):  # none without split weights
        if remainder is not None and (param.dtype, remainder.dtype) != (torch.bfloat16, torch.int16):
            raise ValueError(
                f"ewc_step: wanted int16 remainders of bfloat16 params, given {remainder.dtype} of {param.dtype}"
            )
