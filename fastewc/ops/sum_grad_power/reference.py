"""The specification of sum_grad_power, sample by sample.

Shapes: N samples, T positions that share the weight, I inputs, O outputs of a weight [O, I].
"""

from __future__ import annotations

import torch
from torch import Tensor


def sum_grad_power(a_NTI: Tensor, g_NTO: Tensor, p: int) -> Tensor:
    """Σ_n |Σ_t g_nto a_nti|^p -> [O, I]: E5 (p = 2) or E6 (p = 1) of one weight, before the division by N.

    Computed and returned in float32; in float64 for float64 inputs.
    """
    dtype = torch.float64 if a_NTI.dtype == torch.float64 else torch.float32
    total_OI = torch.zeros(g_NTO.shape[-1], a_NTI.shape[-1], dtype=dtype, device=a_NTI.device)
    for a_TI, g_TO in zip(a_NTI.to(dtype), g_NTO.to(dtype), strict=True):
        gradient_OI = g_TO.T @ a_TI
        total_OI += gradient_OI.abs() if p == 1 else gradient_OI.square()
    return total_OI
