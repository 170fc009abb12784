"""squared_norm_grad in Triton: a program takes several short rows, or one row; a very long one tile by tile.

2p(p − Σp²) is computed from e = exp(y − max) in the two ways of ``reference.py``. Sums are formed in the arithmetic's
type, a tree over a row or a few dozen numbers for each lane and then a tree, so that a row of 200,000 stays exact.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastewc.ops._multi_tensor import on_device

#: Rows up to this length stay in registers: one read, one write. Longer ones are read twice.
LONGEST_WHOLE = 32_768
#: Elements of a tile of several short rows, and of a long row.
_TILE = 1024
_LONG_TILE = 4096


@triton.jit  # type: ignore[untyped-decorator]
def _seed(e: tl.tensor, total: tl.tensor, squares: tl.tensor, leads: tl.tensor) -> tl.tensor:
    """2p(p − Σp²) from e and the row's Σe, Σe² and Σe(1 − e)."""
    top = 1.0 / total  # the largest p, and the factor from e to p
    p = e * top
    return 2 * p * tl.where(2 * p > top, leads * top * top - (top - p), p - squares * top * top)


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _whole_rows(
    y_ptr: tl.tensor,
    out_ptr: tl.tensor,
    rows: tl.int64,
    C: tl.tensor,
    OP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """ROWS rows of at most BLOCK classes. A row that holds NaN, +∞ or nothing but −∞ becomes NaN: ∞ − ∞ is."""
    offs_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offs_c = tl.arange(0, BLOCK)
    offs = offs_r[:, None] * C + offs_c[None, :]
    mask = (offs_r < rows)[:, None] & (offs_c < C)[None, :]
    y = tl.load(y_ptr + offs, mask=mask, other=float("-inf")).to(OP)  # [ROWS, BLOCK]
    e = tl.exp(y - tl.max(y, 1)[:, None])
    total, squares, leads = tl.sum(e, 1), tl.sum(e * e, 1), tl.sum(e * (1 - e), 1)
    # The longest rows leave a thread 64 registers for 32 classes: they are finished half by half, or they would spill.
    parts: tl.constexpr = 2 if BLOCK > 16_384 else 1
    halves = tl.split(tl.permute(tl.reshape(e, (ROWS, 2, BLOCK // 2)), (0, 2, 1))) if parts == 2 else (e,)
    out_ptrs = out_ptr + offs_r[:, None] * C
    for part in tl.static_range(parts):
        grad = _seed(halves[part], total[:, None], squares[:, None], leads[:, None])
        offs_c = part * (BLOCK // parts) + tl.arange(0, BLOCK // parts)
        mask = (offs_r < rows)[:, None] & (offs_c < C)[None, :]
        tl.store(out_ptrs + offs_c[None, :], grad.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _rescaled(total: tl.tensor, squares: tl.tensor, leads: tl.tensor, f: tl.tensor) -> tl.tensor:
    """The sums of e, e² and e(1 − e) where every e has become f·e: fe(1 − fe) = f·e(1 − e) + f(1 − f)·e²."""
    return f * total, f * f * squares, f * leads + f * (1 - f) * squares


@triton.jit  # type: ignore[untyped-decorator]
def _factor(below: tl.tensor, above: tl.tensor) -> tl.tensor:
    """exp(below − above) for a maximum and a later, larger one; 0 where nothing came before."""
    return tl.where(below == float("-inf"), 0.0, tl.exp(below - above))


@triton.jit  # type: ignore[untyped-decorator]
def _long_row(
    y_ptr: tl.tensor, out_ptr: tl.tensor, C: tl.tensor, OP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """One row: every lane keeps the maximum and the sums of its own classes, so lanes meet only once."""
    row = tl.program_id(0).to(tl.int64) * C
    y_ptr += row
    out_ptr += row
    offs = tl.arange(0, BLOCK)
    high = tl.full((BLOCK,), float("-inf"), OP)
    total = tl.zeros((BLOCK,), OP)
    squares = tl.zeros((BLOCK,), OP)
    leads = tl.zeros((BLOCK,), OP)
    for at in range(0, C, BLOCK):
        y = tl.load(y_ptr + at + offs, mask=offs < C - at, other=float("-inf")).to(OP)
        above = tl.maximum(high, y, propagate_nan=tl.PropagateNan.ALL)
        total, squares, leads = _rescaled(total, squares, leads, _factor(high, above))
        # −∞ adds nothing; NaN and +∞, of which y − above is NaN, make the lane's sums NaN and with them the row.
        e = tl.where(y == float("-inf"), 0.0, tl.exp(y - above))
        total, squares, leads, high = total + e, squares + e * e, leads + e * (1 - e), above
    top = tl.max(high, 0)
    total, squares, leads = _rescaled(total, squares, leads, _factor(high, top))
    total, squares, leads = tl.sum(total, 0), tl.sum(squares, 0), tl.sum(leads, 0)
    for at in range(0, C, BLOCK):
        y = tl.load(y_ptr + at + offs, mask=offs < C - at, other=float("-inf")).to(OP)
        grad = _seed(tl.exp(y - top), total, squares, leads)
        tl.store(out_ptr + at + offs, grad.to(out_ptr.dtype.element_ty), mask=offs < C - at)


@triton.jit(do_not_specialize=["count"])  # type: ignore[untyped-decorator]
def _doubled(y_ptr: tl.tensor, out_ptr: tl.tensor, count: tl.int64, OP: tl.constexpr, BLOCK: tl.constexpr) -> None:
    """2y, exact but for overflow."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(y_ptr + offs, mask=offs < count).to(OP)
    tl.store(out_ptr + offs, (2 * y).to(out_ptr.dtype.element_ty), mask=offs < count)


def arithmetic(dtype: torch.dtype) -> tl.dtype:
    """What sums and products are formed in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


@lru_cache
def specialisation(dtype: torch.dtype, C: int, backend: str = "hip" if torch.version.hip else "cuda") -> dict[str, Any]:
    """The compile-time arguments of a softmax launch and its options: 32 float32 or 16 float64 of a row for a thread.

    Products are not contracted into sums, so that classes that share the maximum get exactly 0 from each other. ptxas
    is told how many registers there are: it would spill a few words to reach the next step of occupancy.
    """
    op, double = arithmetic(dtype), dtype == torch.float64
    block = triton.next_power_of_2(C)
    if block > (LONGEST_WHOLE // 4 if double else LONGEST_WHOLE):
        constants, threads = {"OP": op, "ROWS": 1, "BLOCK": _LONG_TILE // 2 if double else _LONG_TILE}, 512
    else:
        constants = {"OP": op, "ROWS": max(_TILE // block, 1), "BLOCK": block}
        threads = max(block // (16 if double else 32), 128)
    if backend == "hip":
        return constants | {"num_warps": threads // 64, "enable_fp_fusion": False}
    limit = min(65_536 // threads, 255)
    return constants | {"num_warps": threads // 32, "enable_fp_fusion": False, "maxnreg": limit}


def squared_norm_grad(y: Tensor, output: str) -> Tensor:
    """One launch, whatever the strides: y is first made contiguous, as the result is."""
    y = y.contiguous()
    out = torch.empty_like(y)
    if y.numel() == 0:
        return out
    with on_device(y.device):
        if output == "logits":
            _doubled[(triton.cdiv(y.numel(), _TILE),)](y, out, y.numel(), OP=arithmetic(y.dtype), BLOCK=_TILE)
            return out
        C = y.shape[-1]
        rows = y.numel() // C
        constants = specialisation(y.dtype, C)
        if constants["BLOCK"] < C:
            _long_row[(rows,)](y, out, C, **constants)
        else:
            _whole_rows[(triton.cdiv(rows, constants["ROWS"]),)](y, out, rows, C, **constants)
    return out
