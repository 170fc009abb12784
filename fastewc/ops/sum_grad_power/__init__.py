"""Σ_n |Σ_t g a|^p: the per-sample gradients of a weight, reduced without being stored."""

from fastewc.ops.sum_grad_power.api import (
    add_conv_grad_power,
    add_scale_grad_power,
    add_sum_grad_power,
    row_moments,
    sum_grad_power,
)
from fastewc.ops.sum_grad_power.schema import ScaleUse

__all__ = [
    "sum_grad_power",
    "add_sum_grad_power",
    "add_conv_grad_power",
    "add_scale_grad_power",
    "row_moments",
    "ScaleUse",
]
