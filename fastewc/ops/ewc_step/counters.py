"""Adam's step counters and bias corrections in Triton, a tensor to a lane: they stay on the device."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastewc.ops import _tiles
from fastewc.ops._tiles import number, scalar

#: Counters that one program advances.
COUNTERS = tl.constexpr(128)
#: Their row in the table of ewc_step.
STEPS = tl.constexpr(11)


@triton.jit(do_not_specialize=["n", "live", "found_inf"])  # type: ignore[untyped-decorator]
def advance(
    table_ptr: tl.tensor,
    corrections_ptr: tl.tensor,
    n: tl.int64,
    lr: tl.float64,
    beta1: tl.float64,
    beta2: tl.float64,
    live: tl.int64,
    found_inf: tl.int64,
    STEP: tl.constexpr,
    EXACT: tl.constexpr,
) -> None:
    """t ← t + 1 for each tensor, and float64 [2, n]: α/(1 − β₁ᵗ) and √(1 − β₂ᵗ)."""
    i = tl.program_id(0) * COUNTERS + tl.arange(0, COUNTERS)
    step_ptr = tl.load(table_ptr + STEPS * n + i, mask=i < n, other=0).to(tl.pointer_type(STEP))
    t = tl.load(step_ptr, mask=i < n, other=0.0) + 1
    tl.store(step_ptr, t, mask=i < tl.where(scalar(found_inf, 0.0, tl.float32) != 0, 0, n))
    t = t.to(tl.float64)
    correction1 = 1 - _power(number(live, 3, beta1), t, EXACT)
    correction2 = 1 - _power(number(live, 4, beta2), t, EXACT)
    tl.store(corrections_ptr + i, number(live, 0, lr) / correction1, mask=i < n)
    tl.store(corrections_ptr + n + i, tl.sqrt(correction2), mask=i < n)


@triton.jit  # type: ignore[untyped-decorator]
def _power(beta: tl.tensor, t: tl.tensor, EXACT: tl.constexpr) -> tl.tensor:
    """βᵗ, [COUNTERS].

    EXACT: by squaring pairs of float64, then rounded once like Python's ``**``; of the first steps' 1 − βᵗ, where two
    or three digits cancel, float64 results need every bit of it. Else to about 1e-13.
    """
    if EXACT:
        base_low = tl.zeros_like(t)
        base = base_low + beta
        high, low = base_low + 1, base_low
        bits = t.to(tl.int64)
        for _ in range(32):
            next_high, next_low = _times(high, low, base, base_low)
            high, low = tl.where(bits % 2 == 1, next_high, high), tl.where(bits % 2 == 1, next_low, low)
            base, base_low = _times(base, base_low, base, base_low)
            bits //= 2
        return high + low
    return tl.exp(t * tl.log(beta))


@triton.jit  # type: ignore[untyped-decorator]
def _times(a: tl.tensor, a_low: tl.tensor, b: tl.tensor, b_low: tl.tensor) -> tl.tensor:
    """(a + a_low)(b + b_low) as a rounded product and what it lacks (Dekker 1971); contraction would spoil it."""
    a_top, b_top = 134217729.0 * a, 134217729.0 * b  # 2²⁷ + 1: splits 53 bits into 26 and 26
    a_top, b_top = a_top - (a_top - a), b_top - (b_top - b)
    a_rest, b_rest = a - a_top, b - b_top
    product = a * b
    lacking = ((a_top * b_top - product) + a_top * b_rest + a_rest * b_top) + a_rest * b_rest
    lacking += a * b_low + a_low * b
    high = product + lacking
    return high, lacking - (high - product)


def specialisation(step: torch.dtype, param: torch.dtype) -> dict[str, Any]:
    """The compile-time arguments of :func:`advance` for counters and parameters of these dtypes."""
    return {"STEP": _tiles.ELEMENTS[step], "EXACT": param == torch.float64}
