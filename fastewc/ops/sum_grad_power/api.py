"""sum_grad_power: contract, validation and choice of the implementation."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastewc._dispatch import choose

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def sum_grad_power(
    a: Tensor, g: Tensor, p: Literal[1, 2], impl: Literal["auto", "reference", "triton", "native"] = "auto"
) -> Tensor:
    """Σ_n |Σ_t g_nto a_nti|^p: a weight's per-sample gradients, reduced over the samples.

    With y = x Wᵀ, a the inputs x and g the gradients of a per-sample scalar with respect to y, Σ_t g_nto a_nti is
    sample n's gradient of W[o, i]. p = 2 gives N times the Fisher diagonal (1/N) Σ_n (∂ log p(y_n|x_n)/∂w)² (E5), p =
    1 gives N times MAS (1/N) Σ_n |∂‖f(x_n)‖²/∂w| (E6; Aljundi et al. 2018). No factor ½ and no 1/N here.

    Args:
        a: inputs of the layer, [N, T, I], or [N, I] for T = 1. float32, float64, bfloat16 or float16.
        g: gradients at its outputs, [N, T, O] or [N, O], of the same dtype and device. N, T, I and O may be 0.
        p: 2 or 1.
        impl: which implementation; "auto" takes the fastest that runs here, any other runs or raises.

    Returns:
        [O, I], float32 (float64 for float64 inputs); no gradient flows through it.

    Raises:
        TypeError: not tensors, or dtypes that differ or are not supported.
        ValueError: shapes or devices that do not fit, p other than 1 or 2, an unknown impl.
        NotImplementedError: an explicit impl that can't run here.
    """
    if not isinstance(a, Tensor) or not isinstance(g, Tensor):
        raise TypeError(f"a and g must be tensors, got {type(a).__name__} and {type(g).__name__}")
    if a.dtype not in DTYPES or g.dtype != a.dtype:
        raise TypeError(f"a and g must share one of float32, float64, bfloat16, float16; got {a.dtype} and {g.dtype}")
    if a.device != g.device:
        raise ValueError(f"a and g must be on one device, got {a.device} and {g.device}")
    if a.ndim not in (2, 3) or g.ndim != a.ndim or a.shape[:-1] != g.shape[:-1]:
        raise ValueError(
            f"wanted a [N, T, I] with g [N, T, O], or a [N, I] with g [N, O]; got a {list(a.shape)} and g "
            f"{list(g.shape)}"
        )
    if isinstance(p, bool) or p not in (1, 2):
        raise ValueError(f"p must be 1 (MAS) or 2 (Fisher), got {p!r}")
    chosen = choose("sum_grad_power", impl, a.device)
    a_NTI, g_NTO = (t.detach().unsqueeze(1) if t.ndim == 2 else t.detach() for t in (a, g))
    match chosen:
        case "reference":
            from fastewc.ops.sum_grad_power import reference

            return reference.sum_grad_power(a_NTI, g_NTO, p)
        case _:
            raise NotImplementedError(f"sum_grad_power has no {chosen!r} implementation yet; use impl='reference'")
