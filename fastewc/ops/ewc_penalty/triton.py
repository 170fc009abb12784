"""The penalty ops in Triton: value, gradients, hold-back and statistics of many tensors, one launch per set of dtypes.

Letters as in ``reference.py``. Nothing waits for the device, and results do not depend on the order in which programs
run: sums go through one float64 partial per program, counts through integer atomics.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastewc.ops import _multi_tensor as multi
from fastewc.ops import _tiles
from fastewc.ops._parts import Dtypes, parts, take
from fastewc.ops._tiles import NARROW, aligned, locate, number, pointer, read, read_importance, scalar, write
from fastewc.ops.ewc_penalty import schema
from fastewc.ops.importance_codes import Codes

# Rows of the table. ANCHORS holds the targets of a hold-back too, LRS the bits of float64 numbers, and INDICES the
# places of the tensors in the caller's lists.
PARAMS, IMPORTANCES, ANCHORS, GRADS, RESULTS, SCALES, LRS, INDICES = map(tl.constexpr, range(1, 9))

BINS_PER_OCTAVE, LOW, BINS = map(tl.constexpr, (schema.BINS_PER_OCTAVE, schema.LOW, schema.BINS))
#: Programs count into this many histograms, so that equal importances do not all queue at one address.
HISTOGRAMS = tl.constexpr(32)


@triton.jit  # type: ignore[untyped-decorator]
def divide(x: tl.tensor, y: tl.tensor, EXACT: tl.constexpr) -> tl.tensor:
    """x/y: rounded to nearest if ``EXACT``, else within 2 ulp (float64 is always rounded to nearest)."""
    if EXACT and y.dtype == tl.float32:
        return tl.div_rn(x, y)
    return x / y


@triton.jit  # type: ignore[untyped-decorator]
def stiffness(omega: tl.tensor, ewc_lambda: tl.tensor, alpha: tl.tensor, EXACT: tl.constexpr) -> tl.tensor:
    """c = λΩ/(1 + αλΩ), E2; E1 is α = 0. λΩ is held where neither it nor αλΩ overflows: there c is 1/α."""
    LARGEST: tl.constexpr = 1.7976931348623157e308 if omega.dtype == tl.float64 else 3.4028234663852886e38
    x = tl.minimum(omega * ewc_lambda, LARGEST / tl.maximum(1.0, 2 * alpha), propagate_nan=tl.PropagateNan.ALL)
    return divide(x, 1 + alpha * x, EXACT)


@triton.jit  # type: ignore[untyped-decorator]
def held_back(w_new: tl.tensor, target: tl.tensor, s: tl.tensor, EXACT: tl.constexpr) -> tl.tensor:
    """(w′ + s·target)/(1 + s), E3 and E4: from w′ where s < 1, so w′ itself at s = 0, else from the target."""
    rest = divide(1.0, 1 + s, EXACT)
    return tl.where(s < 1, w_new + (s * rest) * (target - w_new), target + rest * (w_new - target))


@triton.jit  # type: ignore[untyped-decorator]
def _tile(
    ptrs: tl.tensor,
    scalars: tl.tensor,
    at: tl.tensor,
    left: tl.tensor,
    MODE: tl.constexpr,
    OP: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
) -> tl.tensor:
    """Elements at … at + left. Returns Σc(w − w*)², Σ(w − w*)², #(x > 1) and max x, as far as the mode wants them."""
    param_ptr, omega_ptr, anchor_ptr, grad_ptr, result_ptr, histogram_ptr, scales_ptr, begin = ptrs
    ewc_lambda, lr, alpha, s_of_omega, factor, limit = scalars
    w = read(param_ptr, at, left, OP, WIDTH, VECTOR)
    omega = read_importance(omega_ptr, scales_ptr, begin, at, left, OP, WIDTH, VECTOR)
    anchor = read(anchor_ptr, at, left, OP, WIDTH, VECTOR)
    drift = w - anchor
    value, squares, above, largest = 0.0, 0.0, 0.0, 0.0
    if MODE == "hold_back":
        write(param_ptr, at, left, held_back(w, anchor, s_of_omega * omega, True), WIDTH, VECTOR)
    elif MODE == "pull":
        pull = stiffness(omega, ewc_lambda, alpha, True) * drift * factor
        write(result_ptr, at, left, pull, WIDTH, VECTOR)
    elif MODE == "pulled":
        own = read(grad_ptr, at, left, OP, WIDTH, VECTOR)
        g = own + stiffness(omega, ewc_lambda, alpha, True) * drift * factor
        bounded = tl.where(g > limit, limit, tl.where(g < -limit, -limit, g))
        write(result_ptr, at, left, tl.where(tl.abs(own) < float("inf"), bounded, g), WIDTH, VECTOR)
    else:
        value = tl.sum(stiffness(omega, ewc_lambda, alpha, True) * drift * drift, axis=0).to(tl.float64)
    if MODE == "stats":
        x = omega * ewc_lambda * lr
        # In float64, where subnormal float32 are ordinary numbers.
        octave = tl.log2(tl.where(x > 0, x, 1.0).to(tl.float64)) - LOW
        bins = tl.minimum(tl.maximum(octave * BINS_PER_OCTAVE, 0), BINS - 2).to(tl.int32) + 1
        tl.atomic_add(histogram_ptr + bins, tl.full((WIDTH,), 1, tl.int64), mask=x > 0, sem="relaxed")
        squares = tl.sum(drift.to(tl.float64) * drift.to(tl.float64), axis=0)
        above = tl.sum((x > 1).to(tl.int32), axis=0).to(tl.float64)
        largest = tl.max(x, axis=0).to(tl.float64)
    return value, squares, above, largest


@triton.jit(do_not_specialize=["n", "chunk", "live_lrs", "scale", "skip", "histograms", "stabilized"])  # type: ignore[untyped-decorator]
def _penalty(
    table_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    partials_ptr: tl.tensor,
    n: tl.int64,
    chunk: tl.int64,
    ewc_lambda: tl.float64,
    sign: tl.float64,
    limit: tl.float64,
    live_lrs: tl.int64,
    scale: tl.int64,
    skip: tl.int64,
    histograms: tl.int64,
    stabilized: tl.int32,
    MODE: tl.constexpr,
    PARAM: tl.constexpr,
    ANCHOR: tl.constexpr,
    OMEGA: tl.constexpr,
    OP: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One chunk of one tensor. Scalars are formed in float64.

    MODE "value" puts ½Σc(w − w*)² into row 0 of the partials [4, programs]; "stats" fills all four rows, and counts αλΩ
    into int64 [HISTOGRAMS, BINS]. "pull" gives ±scale·c(w − w*), "pulled" adds it to the gradient and keeps the sum
    within ±limit where the gradient is finite. "hold_back" is E3 or E4, in place.
    """
    row, begin, count = locate(table_ptr, blocks_ptr, chunk)
    count = tl.where(scalar(skip, 0.0, tl.float32) != 0, 0, count)
    ptrs = (
        pointer(table_ptr, n, row, begin, PARAMS, PARAM),
        pointer(table_ptr, n, row, begin, IMPORTANCES, OMEGA),
        pointer(table_ptr, n, row, begin, ANCHORS, ANCHOR),
        pointer(table_ptr, n, row, begin, GRADS, PARAM),
        pointer(table_ptr, n, row, begin, RESULTS, PARAM),
        histograms.to(tl.int64).to(tl.pointer_type(tl.int64)) + tl.program_id(0) % HISTOGRAMS * BINS,
        pointer(table_ptr, n, row, 0, SCALES, tl.float32),
        begin,
    )
    lr = tl.load(table_ptr + LRS * n + row).to(tl.float64, bitcast=True)
    lr = number(live_lrs, tl.load(table_ptr + INDICES * n + row), lr)
    ewc_lambda = tl.full((), ewc_lambda, tl.float64)
    factor = scalar(scale, 1.0, OP) * tl.full((), sign, OP)
    alpha = tl.where(stabilized != 0, lr, 0.0).to(OP)
    scalars = (ewc_lambda.to(OP), lr.to(OP), alpha, (ewc_lambda * lr).to(OP), factor, tl.full((), limit, OP))
    vectors = aligned(table_ptr, n, row, RESULTS)
    value, squares = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
    above, largest = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
    for at in range(0, count, BLOCK):
        left = tl.minimum(count - at, BLOCK)
        whole = tl.where(vectors, left, 0) // 16 * 16
        terms = _tile(ptrs, scalars, at, whole, MODE, OP, BLOCK, True)
        value, squares, above = value + terms[0], squares + terms[1], above + terms[2]
        largest = tl.maximum(largest, terms[3])
        for rest in range(at + whole, at + left, NARROW):
            terms = _tile(ptrs, scalars, rest, at + left - rest, MODE, OP, NARROW, False)
            value, squares, above = value + terms[0], squares + terms[1], above + terms[2]
            largest = tl.maximum(largest, terms[3])
    if MODE == "value" or MODE == "stats":
        partial_ptr, programs = partials_ptr + tl.program_id(0), tl.num_programs(0)
        tl.store(partial_ptr, value / 2)
        tl.store(partial_ptr + programs, squares)
        tl.store(partial_ptr + 2 * programs, above)
        tl.store(partial_ptr + 3 * programs, largest)


MODES = ("value", "pull", "pulled", "hold_back", "stats")


def op_dtype(param: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.promote_types(param, torch.float32)


def stored_anchor(param: torch.dtype, anchor: torch.dtype) -> torch.dtype:
    """The dtype in which kernels read an anchor: the parameter's, bfloat16 of a float32 one, else the arithmetic's."""
    own = anchor == param or (param == torch.float32 and anchor == torch.bfloat16)
    return anchor if own else op_dtype(param)


def stored_importance(param: torch.dtype, omega: torch.dtype | None) -> torch.dtype:
    """The dtype in which kernels read Ω: codes as they are, bfloat16 beside float32 too, else the arithmetic's."""
    own = omega == torch.uint8 or (omega == torch.bfloat16 and param != torch.float64)
    return omega if own and omega is not None else op_dtype(param)


def specialisation(
    mode: str, param: torch.dtype, anchor: torch.dtype, omega: torch.dtype | None = None
) -> dict[str, Any]:
    """The compile-time arguments of a launch; two calls that give the same ones run the same kernel."""
    op = op_dtype(param)
    omega = omega or op
    narrowest = min(param, anchor, omega, key=lambda dtype: dtype.itemsize)
    return {
        "MODE": mode,
        "PARAM": _tiles.ELEMENTS[param],
        "ANCHOR": _tiles.ELEMENTS[anchor],
        "OMEGA": _tiles.ELEMENTS[omega],
        "OP": _tiles.ELEMENTS[op],
        # Statistics are float64 in part: twice the registers.
        "BLOCK": 512 if mode == "stats" else _tiles.tile_width(op, narrowest, written=param),
    }


def ewc_penalty_value(
    params: Sequence[Tensor],
    importances: Sequence[Tensor | Codes],
    anchors: Sequence[Tensor],
    ewc_lambda: float,
    lrs: Sequence[float],
    live_lrs: Tensor | None,
    variant: str,
) -> Tensor:
    """½ Σ c(w − w*)², 0-dim; see ``reference.penalty``."""
    tables = _launch("value", (params, importances, anchors, (), ()), ewc_lambda, lrs, live_lrs, variant)
    dtype = schema.value_dtype(params, importances)
    return _sums(tables, params[0].device)[0].to(dtype)


def ewc_penalty_grads(
    params: Sequence[Tensor],
    importances: Sequence[Tensor | Codes],
    anchors: Sequence[Tensor],
    grads: Sequence[Tensor],
    ewc_lambda: float,
    lrs: Sequence[float],
    live_lrs: Tensor | None,
    variant: str,
    negate: bool,
    scale: Tensor | None,
) -> list[Tensor]:
    """±scale·c(w − w*), or the gradients with it added, as new tensors; see ``reference.penalty_grad``."""
    results = [torch.empty_like(w, dtype=g.dtype) for w, g in zip(params, grads or params, strict=True)]
    mode, sign = "pulled" if grads else "pull", -1.0 if negate else 1.0
    lists = (params, importances, anchors, grads, results)
    _launch(mode, lists, ewc_lambda, lrs, live_lrs, variant, sign=sign, scale=scale)
    return results


def ewc_hold_back_(
    params: Sequence[Tensor],
    targets: Sequence[Tensor],
    importances: Sequence[Tensor | Codes],
    ewc_lambda: float,
    lrs: Sequence[float],
    live_lrs: Tensor | None,
    skip: Tensor | None,
) -> None:
    """w ← (w + s·target)/(1 + s), s = αλΩ, in place; nothing where ``skip`` is not 0. See ``reference.held_back``."""
    _launch("hold_back", (params, importances, targets, (), ()), ewc_lambda, lrs, live_lrs, "stabilized", skip=skip)


def ewc_stats_terms(
    params: Sequence[Tensor],
    importances: Sequence[Tensor | Codes],
    anchors: Sequence[Tensor],
    ewc_lambda: float,
    lrs: Sequence[float],
    live_lrs: Tensor | None,
    variant: str,
) -> Tensor:
    """Float64 [4 + bins]; see ``reference.stats_terms``."""
    histograms = torch.zeros(HISTOGRAMS.value, BINS.value, dtype=torch.int64, device=params[0].device)
    lists = (params, importances, anchors, (), ())
    tables = _launch("stats", lists, ewc_lambda, lrs, live_lrs, variant, histograms=histograms)
    bins = histograms.sum(0)
    bins[0] = sum(map(Tensor.numel, params)) - bins.sum()  # x = 0 is not counted one by one
    return torch.cat([_sums(tables, params[0].device), bins.double()])


def _launch(
    mode: str,
    lists: tuple[Sequence[Any], ...],
    ewc_lambda: float,
    lrs: Sequence[float],
    live_lrs: Tensor | None,
    variant: str,
    *,
    sign: float = 1.0,
    scale: Tensor | None = None,
    skip: Tensor | None = None,
    histograms: Tensor | None = None,
) -> list[multi.Table]:
    """One launch for each set of dtypes; the tables, with the partial sums in their scratch."""
    params, device = lists[0], lists[0][0].device
    omegas, scales = _tiles.with_codes(params, lists[1])
    lists = (params, omegas, *lists[2:], scales)
    skip = None if skip is None else skip.to(device, torch.float32)
    bits = struct.unpack(f"{len(params)}q", struct.pack(f"{len(params)}d", *(lrs or [0.0] * len(params))))
    written = (mode == "hold_back", False, False, False, True, False)
    tables = []
    with multi.on_device(device):
        for part in parts(lists, fresh=range(len(lists)), wanted=_kernel_dtypes, written=written, aside=(5,)):
            param, omega, anchor, *_ = part.dtypes
            op = op_dtype(param)
            constants = specialisation(mode, param, anchor, omega)
            numbers = (take(bits, part.chosen), take(range(len(params)), part.chosen))
            table = multi.table(f"ewc_penalty {mode}", part, constants["BLOCK"], scratch=_partials, numbers=numbers)
            factor = None if scale is None else scale.to(device, op)
            limit = torch.finfo(torch.float16).max if part.own[4] == torch.float16 else math.inf
            if table.programs:
                _penalty[(table.programs,)](
                    table.rows, table.blocks, table.scratch, table.n, table.chunk, float(ewc_lambda), sign, limit,
                    multi.address(live_lrs), multi.address(factor), multi.address(skip), multi.address(histograms),
                    int(variant == "stabilized"), **constants, **_tiles.options(op),
                )  # fmt: skip
            part.copy_back(skip)
            tables.append(table)
    return tables


@lru_cache
def _kernel_dtypes(own: Dtypes) -> Dtypes:
    """What the kernel takes: gradients and results like the parameter, Ω like the arithmetic.

    Where gradients have a dtype of their own, or Ω wants wider arithmetic, all go through tensors of the arithmetic's.
    """
    param, omega, anchor, grad, result, scales = own
    op = torch.promote_types(op_dtype(param), omega if omega.itemsize >= 4 else param)
    stored = param if {grad, result} <= {param, None} and op == op_dtype(param) else op
    kept = stored_importance(stored, omega)
    return (stored, kept, stored_anchor(stored, anchor), grad and stored, result and stored, scales)


def _partials(n: int, programs: int, device: torch.device) -> Tensor:
    """What the modes that sum leave, [4, programs]; see ``_penalty``."""
    return torch.zeros(4, programs, dtype=torch.float64, device=device)


def _sums(tables: Sequence[multi.Table], device: torch.device) -> Tensor:
    """The partial sums of all programs added, and the largest of their maxima: float64 [4]."""
    nothing = torch.zeros(4, 1, dtype=torch.float64, device=device)
    partials = torch.cat([nothing, *(table.scratch for table in tables)], dim=1)
    sums: Tensor = partials.sum(1)
    sums[3] = partials[3].amax()
    return sums
