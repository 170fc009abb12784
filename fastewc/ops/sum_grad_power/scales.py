"""Scales and biases for the GPUs' kernels: a depthwise convolution with a kernel of one position is all that they are.

∂L_n/∂w = Σ_t g[n,c,t] x̂[n,c,t] is the gradient of its weight. Nothing here imports Triton.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastewc.ops.sum_grad_power.schema import ScaleUse

#: The settings of that convolution; its groups are the channels.
DEPTHWISE: dict[str, Any] = {"stride": (1,), "padding": (0,), "dilation": (1,)}


def as_depthwise(total: Tensor, uses: Sequence[ScaleUse]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """A weight [C, 1, 1] of zeros to add to, and its uses ([N, C, T], [N, C, T])."""
    pairs = []
    for g, x, shift, factor in uses:
        if x is None:
            pairs.append((_flat(g, total), _flat(g.new_ones(()).expand(g.shape), total)))
            continue
        if shift is not None or factor is not None:  # x̂ has the arithmetic's digits, and a product one type
            x, g = x.to(total.dtype), g.to(total.dtype)
            x = x if shift is None else x - shift
            x = x if factor is None else x * factor
        pairs.append((_flat(x, total), _flat(g, total)))
    return total.new_zeros(total.numel(), 1, 1), pairs


def _flat(t: Tensor, total: Tensor) -> Tensor:
    """[N, C, T]: a view where strides allow it."""
    first = t.ndim - total.ndim  # the first dimension of t that total has
    own = [d for d in range(first, t.ndim) if total.shape[d - first] != 1]
    others = [d for d in range(1, t.ndim) if d not in own]
    positions = math.prod(t.shape[d] for d in others)
    return t.permute(0, *own, *others).reshape(t.shape[0], total.numel(), positions)


def row_moments(shift: Tensor, factor: Tensor, x: Tensor, eps: float, centred: bool) -> None:
    """See ``reference.py`` for the equation."""
    if x.numel() == 0:
        return  # var_mean warns
    wide = x.to(shift.dtype)
    if centred:
        var, mean = torch.var_mean(wide, -1, correction=0, keepdim=True)
        shift.copy_(mean)
    else:
        var = wide.square().mean(-1, keepdim=True)
        shift.zero_()
    torch.rsqrt(var + eps, out=factor)
