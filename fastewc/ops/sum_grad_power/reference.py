"""The specification of sum_grad_power, sample by sample.

Letters: N samples, T positions that share the weight, I inputs, O outputs; of a convolution C channels and K kernel
positions, with any number of spatial dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastewc.ops.sum_grad_power.schema import ScaleUse

Segments = Sequence[tuple[Tensor, Tensor]]


def sum_grad_power(a_NTI: Tensor, g_NTO: Tensor, p: int) -> Tensor:
    """Σ_n |Σ_t g_nto a_nti|^p -> [O, I]: E5 (p = 2) or E6 (p = 1) of one weight, before the division by N.

    Computed and returned in float32; in float64 for float64 inputs.
    """
    dtype = _arithmetic(a_NTI)
    total_OI = torch.zeros(g_NTO.shape[-1], a_NTI.shape[-1], dtype=dtype, device=a_NTI.device)
    add_sum_grad_power(total_OI, [(a_NTI, g_NTO)], p)
    return total_OI


def add_sum_grad_power(total_OI: Tensor, segments: Segments, p: int) -> None:
    """Add Σ_n |Σ_s Σ_t g_s[n,t,o] a_s[n,t,i]|^p: a sample's gradient is the sum over all uses s of the weight."""
    for n in range(_samples(segments)):
        gradient_OI = torch.zeros_like(total_OI)
        for a_NTI, g_NTO in segments:
            dtype = _arithmetic(a_NTI)
            gradient_OI += g_NTO[n].to(dtype).T @ a_NTI[n].to(dtype)
        total_OI += gradient_OI.abs() if p == 1 else gradient_OI.square()


def add_conv_grad_power(
    total: Tensor,
    segments: Segments,
    p: int,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    """Add Σ_n |Σ_s ∂L_n/∂weight|^p of y_s = F.convNd(x_s, weight, None, stride, padding, dilation, groups), g = ∂L/∂y.

    ``total`` is [O, C/groups, *kernel], x_s [N, C, *spatial], g_s [N, O, *out].
    """
    for n in range(_samples(segments)):
        gradient = torch.zeros(total.shape, dtype=total.dtype, device=total.device)
        for x, g in segments:
            patches = _patches(x[n].to(total.dtype), total.shape[2:], g.shape[2:], stride, padding, dilation)
            T, I, O = math.prod(g.shape[2:]), math.prod(total.shape[1:]), total.shape[0] // groups
            g_gOT, patches_gIT = g[n].to(total.dtype).reshape(groups, O, T), patches.reshape(groups, I, T)
            gradient += (g_gOT @ patches_gIT.mT).reshape(total.shape)
        total += gradient.abs() if p == 1 else gradient.square()


def add_scale_grad_power(total: Tensor, uses: Sequence[ScaleUse], p: int) -> None:
    """Add Σ_n |Σ_s ∂L_n/∂w|^p of y_s = w x̂_s + … with x̂ = (x − shift) factor, g = ∂L/∂y; x̂ = 1 without x: a bias.

    What w is broadcast over is summed: ∂L_n/∂w = Σ_t g[n,t] x̂[n,t], of the shape of ``total``.
    """
    for n in range(uses[0].g.shape[0] if uses else 0):
        gradient = torch.zeros_like(total)
        for g, x, shift, factor in uses:
            product = g[n].to(total.dtype)
            if x is not None:
                moved = x[n].to(total.dtype) - (0 if shift is None else shift[n])
                product = product * (moved if factor is None else moved * factor[n])
            gradient += product.sum_to_size(total.shape)
        total += gradient.abs() if p == 1 else gradient.square()


def row_moments(shift: Tensor, factor: Tensor, x: Tensor, eps: float, centred: bool) -> None:
    """shift = mean(x) (0 where not ``centred``) and factor = 1/√(mean((x − shift)²) + eps), over the last dimension."""
    wide = x.to(shift.dtype)
    shift.copy_(wide.mean(-1, keepdim=True) if centred else torch.zeros_like(shift))
    factor.copy_(((wide - shift).square().mean(-1, keepdim=True) + eps).rsqrt())


def _patches(
    x: Tensor,
    kernel: Sequence[int],
    out: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """x[c, t·stride + k·dilation − padding] of one sample, what weight k meets at t: [C, *kernel, *out]."""
    sides = [side for amount in reversed(padding) for side in (amount, amount)]  # F.pad begins at the last dimension
    padded = torch.nn.functional.pad(x, sides).contiguous()
    channel, *steps = padded.stride()
    along_kernel = [step * d for step, d in zip(steps, dilation, strict=True)]
    along_out = [step * s for step, s in zip(steps, stride, strict=True)]
    return padded.as_strided((x.shape[0], *kernel, *out), (channel, *along_kernel, *along_out))


def _samples(segments: Segments) -> int:
    return segments[0][0].shape[0] if segments else 0


def _arithmetic(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32
