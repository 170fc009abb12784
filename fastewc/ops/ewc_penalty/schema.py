"""The ops behind every fast implementation of the penalty: their schemas, and the learning rates as they take them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastewc.ops.importance_codes import Codes

Lr = float | Tensor | None

_SHARED = "float ewc_lambda, float[] lrs, Tensor? live_lrs"
_HELD = "Tensor[] params, Tensor[] importances, Tensor[] scales, Tensor[] anchors"
#: name -> schema. ``lrs`` has one α per tensor, unless ``live_lrs`` (float64 [n], on the tensors' device) is given;
#: ``scales`` are those of importances that are codes (``importance_codes.split``), none without codes.
SCHEMAS = {
    "ewc_penalty_value": f"({_HELD}, {_SHARED}, str variant) -> Tensor",
    "ewc_penalty_grads": (f"({_HELD}, Tensor[] grads, {_SHARED}, str variant, bool negate, Tensor? scale) -> Tensor[]"),
    "ewc_hold_back_": (
        f"(Tensor(a!)[] params, Tensor[] targets, Tensor[] importances, Tensor[] scales, {_SHARED}, Tensor? skip) -> ()"
    ),
    "ewc_stats_terms": f"({_HELD}, {_SHARED}, str variant) -> Tensor",
}

#: Statistics of x = αλΩ come from one histogram of log2(x): 40 bins an octave, of width 2^(1/40), hold a quantile to
#: 2^(1/80) − 1 = 0.9 %. The range is that of float32, subnormals included; bin 0 is x = 0.
BINS_PER_OCTAVE, LOW, HIGH = 40, -149, 128
BINS = 1 + (HIGH - LOW) * BINS_PER_OCTAVE
#: What the statistics are made of: penalty, Σ(w − w*)², count of x > 1, maximum of x; the histogram follows.
SUMS = 4
TERMS = SUMS + BINS


def arithmetic(param: torch.dtype, importance: torch.dtype) -> torch.dtype:
    """Ω's own dtype where that is float32 or float64; where Ω is stored in fewer bits, what suits the parameter."""
    return importance if importance.itemsize >= 4 else torch.promote_types(param, torch.float32)


def value_dtype(params: Sequence[Tensor], importances: Sequence[Tensor | Codes]) -> torch.dtype:
    """float32, float64 if any tensor's arithmetic is."""
    kinds = {arithmetic(w.dtype, omega.dtype) for w, omega in zip(params, importances, strict=True)}
    return torch.float64 if torch.float64 in kinds else torch.float32


def lrs_of(lrs: Sequence[Lr], device: torch.device) -> tuple[list[float], Tensor | None]:
    """(numbers, None), or ([], float64 tensor [n] on ``device``) if any α is a tensor; None counts as 0 (plain)."""
    if not any(isinstance(lr, Tensor) for lr in lrs):
        return [0.0 if lr is None else float(lr) for lr in lrs], None
    live = [
        lr.detach().reshape(()).to(device, torch.float64)
        if isinstance(lr, Tensor)
        else torch.full((), lr or 0.0, dtype=torch.float64, device=device)
        for lr in lrs
    ]
    return [], torch.stack(live)
