"""The EWC penalty over many tensors: value, gradient and statistics; contract and choice of implementation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastewc._dispatch import choose

VARIANTS = ("plain", "stabilized")
Lr = float | Tensor | None


def ewc_penalty(
    params: Sequence[Tensor],
    importances: Sequence[Tensor],
    anchors: Sequence[Tensor],
    *,
    ewc_lambda: float,
    lrs: Sequence[Lr],
    variant: str,
    impl: str = "auto",
) -> Tensor:
    """½ Σ c (w − w*)² over all tensors, differentiable by the parameters.

    c = λΩ for ``variant="plain"`` (E1: Kirkpatrick et al. 2017, eq. 3) and λΩ/(1 + αλΩ) for ``"stabilized"``
    (E2: Kutalev & Lapina 2021). The gradient by w is c (w − w*); importances, anchors, λ and lr are constants.

    Args:
        params: weights w, any float dtype and shape.
        importances: Ω ≥ 0, one per parameter, of its shape and device; float32, or float64 for float64 parameters.
        anchors: w*, one per parameter, of its shape and device, any float dtype.
        ewc_lambda: λ ≥ 0.
        lrs: α per parameter, a float or 0-dim tensor; None is allowed for ``"plain"`` only.
        variant: "plain" or "stabilized".
        impl: "auto", "reference", "triton" or "native"; only "auto" may choose.

    Returns:
        0-dim tensor on the first parameter's device, float32 (float64 if any parameter is float64).

    Raises:
        ValueError: lists of different length, shapes or devices that do not match, unknown variant, lr missing.
        NotImplementedError: ``impl`` cannot run here (says why).
    """
    _check(params, importances, anchors, lrs, variant)
    choose("ewc_penalty", impl, params[0].device)  # only the reference exists so far; an explicit other one raises here
    value: Tensor = _Penalty.apply(ewc_lambda, tuple(lrs), variant, len(params), *params, *importances, *anchors)
    return value


def ewc_penalty_grad(
    param: Tensor,
    importance: Tensor,
    anchor: Tensor,
    *,
    ewc_lambda: float,
    lr: Lr,
    variant: str,
    impl: str = "auto",
) -> Tensor:
    """The gradient c (w − w*) that :func:`ewc_penalty` adds, of the importance's dtype. Same arguments and errors."""
    _check([param], [importance], [anchor], [lr], variant)
    choose("ewc_penalty", impl, param.device)
    from fastewc.ops.ewc_penalty import reference

    return reference.penalty_grad(param.detach(), importance, anchor, ewc_lambda, lr, variant)


def ewc_held_back(
    updated: Tensor, target: Tensor, importance: Tensor, *, ewc_lambda: float, lr: float | Tensor, impl: str = "auto"
) -> Tensor:
    """The weight after E3 or E4: ``updated`` moved towards ``target`` by αλΩ/(1 + αλΩ) of the way.

    E3 (proximal): target = w*. E4 (WVA, Kutalev 2020): target = the weight before the step. All tensors have one shape
    and device; the result has the dtype of ``updated``. Errors as in :func:`ewc_penalty`.
    """
    _check([updated], [importance], [target], [lr], "stabilized")
    choose("ewc_penalty", impl, updated.device)
    from fastewc.ops.ewc_penalty import reference

    return reference.held_back(updated, target, importance, ewc_lambda, lr)


def ewc_stats(
    params: Sequence[Tensor],
    importances: Sequence[Tensor],
    anchors: Sequence[Tensor],
    *,
    ewc_lambda: float,
    lrs: Sequence[float | Tensor],
    variant: str,
    impl: str = "auto",
) -> dict[str, float]:
    """What the penalty does to these weights, in one pass and one transfer to the host; see fastewc.EWC.stats."""
    _check(params, importances, anchors, lrs, variant)
    choose("ewc_penalty", impl, params[0].device)
    from fastewc.ops.ewc_penalty import reference

    device = params[0].device
    total: Tensor | None = None
    for w, importance, anchor, lr in zip(params, importances, anchors, lrs, strict=True):
        part = reference.stats_terms(w.detach(), importance, anchor, ewc_lambda, lr, variant).to(device)
        total = part if total is None else reference.merge_stats_terms(total, part)
    assert total is not None
    return reference.finish_stats(total.cpu())


class _Penalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ewc_lambda: float, lrs: tuple[Lr, ...], variant: str, n: int, *tensors: Tensor) -> Tensor:
        from fastewc.ops.ewc_penalty import reference

        ctx.save_for_backward(*tensors)
        ctx.constants = ewc_lambda, lrs, variant, n
        params, importances, anchors = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
        dtype = torch.float64 if any(i.dtype == torch.float64 for i in importances) else torch.float32
        total = torch.zeros((), dtype=dtype, device=params[0].device)
        for w, importance, anchor, lr in zip(params, importances, anchors, lrs, strict=True):
            total = total + reference.penalty(w, importance, anchor, ewc_lambda, lr, variant).to(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from fastewc.ops.ewc_penalty import reference

        ewc_lambda, lrs, variant, n = ctx.constants
        tensors = ctx.saved_tensors
        grads: list[Tensor | None] = []
        for i, (w, importance, anchor, lr) in enumerate(
            zip(tensors[:n], tensors[n : 2 * n], tensors[2 * n :], lrs, strict=True)
        ):
            if not ctx.needs_input_grad[4 + i]:
                grads.append(None)
                continue
            pull = reference.penalty_grad(w, importance, anchor, ewc_lambda, lr, variant)
            grads.append((pull * grad.to(pull)).to(w.dtype))
        return (None, None, None, None, *grads, *[None] * (2 * n))


def _check(
    params: Sequence[Tensor],
    importances: Sequence[Tensor],
    anchors: Sequence[Tensor],
    lrs: Sequence[Lr],
    variant: str,
) -> None:
    if variant not in VARIANTS:
        raise ValueError(
            f"variant must be one of {', '.join(VARIANTS)} (the ones that are a loss term), got {variant!r}"
        )
    if not len(params) == len(importances) == len(anchors) == len(lrs):
        raise ValueError(
            f"params, importances, anchors and lrs must be equally long, got {len(params)}, {len(importances)}, "
            f"{len(anchors)} and {len(lrs)}"
        )
    if not params:
        raise ValueError("params is empty: there is nothing to penalise")
    for i, (w, importance, anchor, lr) in enumerate(zip(params, importances, anchors, lrs, strict=True)):
        if not w.shape == importance.shape == anchor.shape:
            raise ValueError(
                f"tensor {i}: params {tuple(w.shape)}, importances {tuple(importance.shape)} and anchors "
                f"{tuple(anchor.shape)} must have one shape"
            )
        if not w.device == importance.device == anchor.device:
            raise ValueError(
                f"tensor {i}: params on {w.device}, importances on {importance.device}, anchors on {anchor.device}; "
                "wanted one device"
            )
        if lr is None and variant != "plain":
            raise ValueError(f"variant {variant!r} needs the learning rate: c = λΩ/(1 + αλΩ)")
