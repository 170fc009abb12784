"""squared_norm_grad as the equation says it."""

# y_NC: outputs, N rows of C. p: softmax(y) along C.

from __future__ import annotations

import torch
from torch import Tensor


def squared_norm_grad(y: Tensor, output: str) -> Tensor:
    """∂‖y‖²/∂y = 2y for "logits"; ∂‖softmax(y)‖²/∂y = 2p(p − Σ_c p_c²) for "softmax".

    The second follows from ∂p_c/∂y_k = p_c(δ_ck − p_k):  Σ_c 2p_c · p_c(δ_ck − p_k) = 2p_k(p_k − Σ_c p_c²).
    Computed in float32 (float64 for float64) and rounded once to y's dtype.
    """
    x = y.to(torch.float64 if y.dtype == torch.float64 else torch.float32)
    if output == "logits":
        return (2 * x).to(y.dtype)
    p = torch.softmax(x, dim=-1)
    return (2 * p * (p - (p * p).sum(dim=-1, keepdim=True))).to(y.dtype)
