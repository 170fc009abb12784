"""squared_norm_grad: its contract, its validation, its choice of implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from fastewc._dispatch import Impl, choose

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def squared_norm_grad(y: Tensor, output: str, impl: Impl = "auto") -> Tensor:
    """Gradient of the squared norm of a model's output, row by row: the seed of a MAS backward pass.

    Memory aware synapses (Aljundi et al. 2018, arXiv 1711.09601) measure the importance of a weight by
    Ω_i = (1/N) Σ_n |∂ ‖f(x_n)‖² / ∂w_i|. Backward starts from ∂‖f‖²/∂y, where y is the model's output:

    - ``output="logits"``: f = y, so the seed is 2y (Aljundi 2018);
    - ``output="softmax"``: f = p = softmax(y) over the last dimension, so the seed is 2p(p − Σ_c p_c²) (what
      Kutalev and Lapina 2021, arXiv 2109.10021, use).

    There is no ½ and no 1/N in it. Rows are independent and may have any length; the arithmetic is float32 (float64
    for float64) and is rounded once, to the dtype of ``y``. NaN and infinities propagate as in ``torch.softmax``:
    under "softmax" a row with a NaN or +∞, or of −∞ alone, becomes NaN; −∞ among finite values has p = 0 and
    gradient 0.

    Args:
        y: [..., C], at least one dimension, C classes last; float32, float64, bfloat16 or float16; any strides;
            may be empty.
        output: "logits" or "softmax".
        impl: "auto", "reference", "triton" or "native"; see :func:`fastewc.impl_report`.

    Returns:
        Tensor of the shape, dtype and device of ``y``. It is detached: no gradient flows through the seed.

    Raises:
        TypeError: ``y`` is not a dense floating tensor of those dtypes.
        ValueError: ``y`` has no dimension, or ``output`` or ``impl`` is unknown.
        NotImplementedError: an explicit ``impl`` that can't run here.
    """
    _validate(y, output)
    chosen = choose("squared_norm_grad", impl, y.device)
    match chosen:
        case "triton":
            from fastewc.ops.squared_norm_grad import triton

            return triton.squared_norm_grad(y.detach(), output)
        case "native":
            from fastewc.ops.squared_norm_grad import native

            return native.squared_norm_grad(y.detach(), output)
        case "reference":
            from fastewc.ops.squared_norm_grad import reference

            return reference.squared_norm_grad(y.detach(), output)


def _validate(y: Tensor, output: str) -> None:
    if not isinstance(y, Tensor):
        raise TypeError(f"y must be a tensor, not {type(y).__name__}")
    if y.dtype not in DTYPES or y.layout != torch.strided:
        raise TypeError(
            f"y must be a dense float32, float64, bfloat16 or float16 tensor, not {y.dtype} with layout {y.layout}"
        )
    if y.ndim == 0:
        raise ValueError("y must have at least one dimension, the row of classes; it has none")
    if output not in ("logits", "softmax"):
        raise ValueError(f"output must be 'logits' or 'softmax', not {output!r}")
