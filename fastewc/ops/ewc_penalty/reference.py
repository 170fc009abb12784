"""The penalty of elastic weight consolidation in plain PyTorch: equations E1 and E2, float64-able."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fastewc.ops.ewc_penalty.schema import BINS, BINS_PER_OCTAVE, LOW, SUMS, arithmetic, value_dtype
from fastewc.ops.importance_codes import Codes, numbers


def stiffness(importance: Tensor, ewc_lambda: float | Tensor, lr: float | Tensor | None, variant: str) -> Tensor:
    """c: the penalty pulls a weight by c·(w − w*).

    E1 (plain, Kirkpatrick et al. 2017, eq. 3):       c = λΩ
    E2 (stabilised, Kutalev & Lapina 2021):           c = λΩ / (1 + αλΩ), so that α·c < 1 for every Ω

    E2 is formed as 1/(1/(λΩ) + α), which is 0 at Ω = 0 and 1/α where λΩ overflows, and makes one new tensor: a fresh
    megabyte costs as much as the arithmetic.
    """
    stiff = importance * ewc_lambda
    if variant == "plain":
        return stiff
    assert lr is not None
    return stiff.reciprocal_().add_(lr).reciprocal_()


def held_back(
    w_new: Tensor, target: Tensor, importance: Tensor, ewc_lambda: float | Tensor, lr: float | Tensor
) -> Tensor:
    """w⁺ from w′, with s = αλΩ and k = s/(1 + s); the target is w* for E3 and the weight before the step for E4.

    E3 (proximal):          w⁺ = (w′ + s·w*)/(1 + s)      = w′ + k(w* − w′)
    E4 (WVA, Kutalev 2020): w⁺ = w + (w′ − w)/(1 + s)     = w′ + k(w − w′)

    As interpolations they leave w′ exactly as it is where s = 0 and lose nothing where s is huge; k is formed as
    1/(1 + 1/s), so that an s that overflows gives 1.
    """
    k = (importance * (ewc_lambda * lr)).reciprocal_().add_(1).reciprocal_()
    return torch.lerp(w_new, target.to(w_new.dtype), k)


def penalty(
    w: Tensor,
    importance: Tensor,
    anchor: Tensor,
    ewc_lambda: float | Tensor,
    lr: float | Tensor | None,
    variant: str,
) -> Tensor:
    """½ Σ_i c_i (w_i − w*_i)², a 0-dim tensor of importance's dtype."""
    drift = w.to(importance.dtype) - anchor.to(importance.dtype)
    return (stiffness(importance, ewc_lambda, lr, variant) * drift * drift).sum() / 2


def penalty_grad(
    w: Tensor,
    importance: Tensor,
    anchor: Tensor,
    ewc_lambda: float | Tensor,
    lr: float | Tensor | None,
    variant: str,
) -> Tensor:
    """The pull c (w − w*), of importance's dtype: the derivative of :func:`penalty` by w."""
    drift = w.to(importance.dtype) - anchor.to(importance.dtype)
    return drift.mul_(stiffness(importance, ewc_lambda, lr, variant))


def stats_terms(
    w: Tensor,
    importance: Tensor,
    anchor: Tensor,
    ewc_lambda: float | Tensor,
    lr: float | Tensor,
    variant: str,
) -> Tensor:
    """One float64 vector [4 + bins]: ½Σc(w−w*)², Σ(w−w*)², #(αλΩ > 1), max αλΩ, histogram of log2 αλΩ."""
    x = importance * ewc_lambda * lr
    drift = w.to(importance.dtype) - anchor.to(importance.dtype)
    value = penalty(w, importance, anchor, ewc_lambda, lr, variant)
    largest = x.max() if x.numel() else x.new_zeros(())
    sums = torch.stack([value.double(), drift.double().square().sum(), (x > 1).sum().double(), largest.double()])
    bins = ((torch.log2(x.flatten()) - LOW) * BINS_PER_OCTAVE).clamp(0, BINS - 2).nan_to_num().long() + 1
    bins = torch.where(x.flatten() > 0, bins, 0)
    return torch.cat([sums, torch.bincount(bins, minlength=BINS).double()])


def ewc_penalty_value(
    params: Sequence[Tensor],
    importances: Sequence[Tensor | Codes],
    anchors: Sequence[Tensor],
    ewc_lambda: float,
    lrs: Sequence[float],
    live_lrs: Tensor | None,
    variant: str,
) -> Tensor:
    """½ Σ c(w − w*)² of all tensors: float32, float64 if any importance is."""
    dtype = value_dtype(params, importances)
    total = torch.zeros((), dtype=dtype, device=params[0].device)
    for w, held, anchor, lr in zip(params, importances, anchors, _each(lrs, live_lrs), strict=True):
        omega = _numbers(held, w)
        total = total + penalty(w, omega, anchor, ewc_lambda, _like(lr, omega), variant).to(total)
    return total


def ewc_penalty_grads(
    params: Sequence[Tensor],
    importances: Sequence[Tensor | Codes],
    anchors: Sequence[Tensor],
    grads: Sequence[Tensor],
    ewc_lambda: float,
    lrs: Sequence[float],
    live_lrs: Tensor | None,
    variant: str,
    negate: bool,
    scale: Tensor | None,
) -> list[Tensor]:
    """±scale·c(w − w*) of each tensor in its dtype; added to its gradient, in the gradient's dtype, if ``grads``."""
    results = []
    for i, (w, held, anchor, lr) in enumerate(zip(params, importances, anchors, _each(lrs, live_lrs), strict=True)):
        omega = _numbers(held, w)
        pull = penalty_grad(w, omega, anchor, ewc_lambda, _like(lr, omega), variant)
        if scale is not None:
            pull = pull * scale.to(pull)
        pull = -pull if negate else pull
        results.append(_added(grads[i], pull) if grads else pull.to(w.dtype))
    return results


def _added(grad: Tensor, pull: Tensor) -> Tensor:
    pulled = grad + pull
    if grad.dtype == torch.float16:  # GradScaler has looked for infinities before: the pull must not add one
        largest = torch.finfo(grad.dtype).max
        pulled = torch.where(grad.isfinite(), pulled.clamp(-largest, largest), pulled)
    return pulled.to(grad.dtype)


def ewc_hold_back_(
    params: Sequence[Tensor],
    targets: Sequence[Tensor],
    importances: Sequence[Tensor | Codes],
    ewc_lambda: float,
    lrs: Sequence[float],
    live_lrs: Tensor | None,
    skip: Tensor | None,
) -> None:
    """E3 and E4 in place, w moved towards its target; nothing where ``skip`` is not 0."""
    for param, target, held, lr in zip(params, targets, importances, _each(lrs, live_lrs), strict=True):
        omega = _numbers(held, param)
        w = param.to(omega.dtype)
        moved = held_back(w, target, omega, ewc_lambda, _like(lr, omega))
        param.copy_(moved if skip is None else torch.where(skip.to(w.device).reshape(()) != 0, w, moved))


def ewc_stats_terms(
    params: Sequence[Tensor],
    importances: Sequence[Tensor | Codes],
    anchors: Sequence[Tensor],
    ewc_lambda: float,
    lrs: Sequence[float],
    live_lrs: Tensor | None,
    variant: str,
) -> Tensor:
    """:func:`stats_terms` of all tensors as one: sums add, the maximum is the largest."""
    parts = torch.stack(
        [
            stats_terms(w, omega, anchor, ewc_lambda, _like(lr, omega), variant)
            for w, held, anchor, lr in zip(params, importances, anchors, _each(lrs, live_lrs), strict=True)
            for omega in [_numbers(held, w)]
        ]
    )
    return merge_stats_terms(parts)


def merge_stats_terms(parts: Tensor) -> Tensor:
    """The terms [n, 4 + bins] of disjoint sets of weights as one: sums add, the maximum is the largest."""
    merged: Tensor = parts.sum(0)
    merged[3] = parts[:, 3].max()
    return merged


def _numbers(importance: Tensor | Codes, w: Tensor) -> Tensor:
    return numbers(importance, arithmetic(w.dtype, importance.dtype))


def _each(lrs: Sequence[float], live_lrs: Tensor | None) -> Iterable[float | Tensor]:
    return lrs if live_lrs is None else live_lrs.unbind()


def _like(lr: float | Tensor, omega: Tensor) -> float | Tensor:
    return lr.to(omega.dtype) if isinstance(lr, Tensor) else lr


def finish_stats(terms: Tensor) -> dict[str, float]:
    """The statistics from their summed terms [4 + bins], on the host."""
    value, squares, above, largest = terms[:SUMS].tolist()
    cumulated = terms[SUMS:].cumsum(0)
    count = float(cumulated[-1])
    found = {"penalty": value, "max": largest}
    for name, q in (("q50", 0.5), ("q90", 0.9), ("q99", 0.99)):
        found[name] = min(_quantile(cumulated, count, q), largest)
    found["share_above_1"] = above / count if count else 0.0
    found["rms_drift"] = (squares / count) ** 0.5 if count else 0.0
    return found


def _quantile(cumulated: Tensor, count: float, q: float) -> float:
    """The q-quantile, interpolated linearly between order statistics as torch.quantile does."""
    if not count:
        return 0.0
    rank = q * (count - 1)
    low, high = (_bin_value(int(torch.searchsorted(cumulated, int(r), right=True))) for r in (rank, -(-rank // 1)))
    return low + (high - low) * (rank - int(rank))


def _bin_value(index: int) -> float:
    """The geometric centre of a bin; 0 for bin 0."""
    return float(2.0 ** (LOW + (index - 0.5) / BINS_PER_OCTAVE)) if index else 0.0
