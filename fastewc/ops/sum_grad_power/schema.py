"""The ops behind every fast implementation of sum_grad_power: names and schemas."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ScaleUse(NamedTuple):
    """One use y = w x̂ + … of a scale w, or y = … + w of a bias.

    Attributes:
        g: ∂L_n/∂y, [N, ...]: w broadcasts to all but the first dimension.
        x: of g's shape; None stands for ones, and a bias.
        shift: x̂ = (x − shift) factor, as norms make it; None stands for 0.
        factor: None stands for 1.
    """

    g: Tensor
    x: Tensor | None = None
    shift: Tensor | None = None
    factor: Tensor | None = None


#: name -> schema. ``a`` and ``g``, or ``x`` and ``g``, are the segments of one weight, in pairs.
SCHEMAS = {
    "add_sum_grad_power": "(Tensor(a!) total, Tensor[] a, Tensor[] g, int p) -> ()",
    "add_conv_grad_power": (
        "(Tensor(a!) total, Tensor[] x, Tensor[] g, int p, "
        "int[] stride, int[] padding, int[] dilation, int groups) -> ()"
    ),
    "add_scale_grad_power": (
        "(Tensor(a!) total, Tensor[] g, Tensor?[] x, Tensor?[] shift, Tensor?[] factor, int p) -> ()"
    ),
    "row_moments": "(Tensor(a!) shift, Tensor(b!) factor, Tensor x, float eps, bool centred) -> ()",
    "has_matrix_unit": "() -> bool",  # of the CPU: Intel AMX
}
