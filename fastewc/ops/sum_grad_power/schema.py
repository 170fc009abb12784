"""The ops behind every fast implementation of sum_grad_power: names and schemas."""

from __future__ import annotations

#: name -> schema. ``a`` and ``g``, or ``x`` and ``g``, are the segments of one weight, in pairs.
SCHEMAS = {
    "add_sum_grad_power": "(Tensor(a!) total, Tensor[] a, Tensor[] g, int p) -> ()",
    "add_conv_grad_power": (
        "(Tensor(a!) total, Tensor[] x, Tensor[] g, int p, "
        "int[] stride, int[] padding, int[] dilation, int groups) -> ()"
    ),
    "has_matrix_unit": "() -> bool",  # of the CPU: Intel AMX
}
