"""squared_norm_grad as the equation says it."""

# y_NC: outputs, N rows of C. p: softmax(y) along C.

from __future__ import annotations

import torch
from torch import Tensor


def squared_norm_grad(y: Tensor, output: str) -> Tensor:
    """∂‖y‖²/∂y = 2y for "logits"; ∂‖softmax(y)‖²/∂y = 2p(p − Σ_c p_c²) for "softmax".

    The second follows from ∂p_c/∂y_k = p_c(δ_ck − p_k):  Σ_c 2p_c · p_c(δ_ck − p_k) = 2p_k(p_k − Σ_c p_c²).
    In p_k − Σp² a confident row's top class would cancel to nothing (1 − 1), and so would every class that shares the
    maximum. With top = max_c p_c the same number is  lead − (top − p_k),  lead = top − Σp² = Σ_c p_c(top − p_c):  a sum
    of non-negative terms. It serves the classes above top/2; below, p_k − Σp² is the better conditioned of the two.
    Computed in float32 (float64 for float64) and rounded once to y's dtype.
    """
    x = y.to(torch.float64 if y.dtype == torch.float64 else torch.float32)
    if output == "logits":
        return (2 * x).to(y.dtype)
    if y.shape[-1] == 0:  # rows of no class have no maximum
        return torch.empty_like(y)
    p = torch.softmax(x, dim=-1)
    top = p.amax(dim=-1, keepdim=True)
    gap = top - p
    lead = (p * gap).sum(dim=-1, keepdim=True)
    excess = torch.where(2 * p > top, lead - gap, p - (p * p).sum(dim=-1, keepdim=True))
    return (2 * p * excess).to(y.dtype)
