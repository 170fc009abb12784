"""λ from the importances and the learning rate, without a search."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from torch import Tensor
from torch.optim import Optimizer

from fastewc import _state
from fastewc._optimizers import unwrap_optimizer

OPTIMIZERS = ("sgd", "momentum", "adam")

# αλΩ at its 0.99-quantile over Ω > 0 that worked best, by (variant, optimizer). Only what a study has measured stands
# here.
TARGETS: dict[tuple[str, str], float] = {}


def suggest_lambda(
    importance: Mapping[str, Tensor],
    lr: float | Tensor,
    *,
    variant: str,
    optimizer: str | Optimizer,
    quantile: float = 0.99,
    target: float | None = None,
) -> float:
    """The λ at which a quantile of αλΩ, over the weights with Ω > 0, meets a target: λ = target / (α · Ω_q).

    αλΩ is how hard a weight is held in units of one step: plain SGD with the plain penalty diverges beyond 2. What
    works best differs by penalty and optimizer, so λ is not comparable across them.

    Args:
        importance: parameter name → Ω ≥ 0, any shapes: one task's, or the sum that ewc.importances() returns.
        lr: α > 0.
        variant: "plain", "stabilized", "proximal" or "wva".
        optimizer: "sgd", "momentum" (SGD with momentum), "adam" (and its relatives), or a torch optimizer.
        quantile: q in [0, 1], of Ω over all weights with Ω > 0, linearly interpolated.
        target: αλΩ wanted at that quantile, > 0; None takes the value measured for this variant and optimizer.

    Returns:
        λ, a float > 0.

    Raises:
        ValueError: an unknown option, an argument out of range, or an importance that is zero everywhere.
        NotImplementedError: target=None where no study has measured a value for this variant and optimizer yet.
    """
    if variant not in _state.VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(_state.VARIANTS)}, got {variant!r}")
    family = _family(optimizer)
    alpha = float(_state.checked_lr(lr))
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"lr must be finite and > 0, got {lr!r}")
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile must be in [0, 1], got {quantile!r}")
    if target is None:
        target = TARGETS.get((variant, family))
        if target is None:
            raise NotImplementedError(
                f"no target has been measured yet for variant={variant!r} with optimizer={family!r}; give target=, "
                f"the αλΩ wanted at the {quantile} quantile (below 2 for the plain penalty with plain SGD)"
            )
    if not (math.isfinite(target) and target > 0):
        raise ValueError(f"target must be finite and > 0, got {target!r}")
    _state.check_finite(importance, "the importance")
    positive = [v[v > 0].numpy() for v in (t.detach().double().cpu().flatten() for t in importance.values())]
    values = np.concatenate(positive) if positive else np.empty(0)
    if values.size == 0:
        raise ValueError("the importance is zero everywhere: no λ makes it hold anything")
    return target / (alpha * float(np.quantile(values, quantile)))


def _family(optimizer: str | Optimizer) -> str:
    """The optimizer family, "sgd", "momentum" or "adam", of a name or an optimizer object."""
    if isinstance(optimizer, str):
        if optimizer not in OPTIMIZERS:
            raise ValueError(
                f"optimizer must be one of {', '.join(OPTIMIZERS)} or a torch optimizer, got {optimizer!r}"
            )
        return optimizer
    inner = unwrap_optimizer(optimizer)
    if inner is None:
        raise TypeError(f"optimizer must be a name or a torch.optim.Optimizer, got {type(optimizer).__name__}")
    first = inner.param_groups[0]
    if "betas" in first:
        return "adam"
    return "momentum" if first.get("momentum", 0) else "sgd"
