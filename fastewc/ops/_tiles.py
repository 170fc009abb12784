"""Triton helpers of the kernels that walk many tensors at once: where a program works, and how it reads and writes.

A program takes `chunk` elements of one tensor, tile by tile. Of each tile the whole vectors go first, 16 elements to a
unit, so that every access is 128 bits wide; what remains (the end of a tensor whose size is odd, or everything where a
pointer is not on a 16-byte boundary) follows in narrow tiles, element by element. In kernels, `at` is the first element
of a tile and `left` how many of its elements exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastewc.ops import importance_codes
from fastewc.ops.importance_codes import Codes

ELEMENTS = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.uint8: tl.uint8,  # codes of importances
}
#: Width of the narrow tiles: one element for each thread.
NARROW = tl.constexpr(128)
CODES_TO_A_SCALE = tl.constexpr(importance_codes.BLOCK)


def tile_width(op: torch.dtype, narrowest: torch.dtype, written: torch.dtype) -> int:
    """Elements of a whole tile: 8 for each thread, which is one access of 16 bytes to a 16-bit tensor.

    4 for float64, which would otherwise take too many registers, and where something wider than the narrowest tensor is
    written: its stores would be 4 wide, and the compiler would pass tiles through shared memory in between.
    """
    return 512 if op == torch.float64 or written.itemsize > narrowest.itemsize else 1024


def with_codes(
    params: Sequence[Tensor], importances: Sequence[Tensor | Codes]
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """(codes or numbers, scales) of each importance; no scales without codes. Codes in another order become numbers."""
    if not any(isinstance(omega, Codes) for omega in importances):
        return importance_codes.split(importances)
    return importance_codes.split(
        [
            omega.decoded() if isinstance(omega, Codes) and not omega.lie_as(p) else omega
            for p, omega in zip(params, importances, strict=True)
        ]
    )


@lru_cache
def options(op: torch.dtype, backend: str = "hip" if torch.version.hip else "cuda") -> dict[str, Any]:
    """How a kernel is compiled: for 128 threads, and without contracting products into sums.

    So variants of a kernel agree to the bit where their equations do. ptxas would spill a few words to reach the next
    step of occupancy; told how many registers there are it does not, and 16 warps of 8 elements a thread are three
    times the loads in flight that the memory needs.
    """
    if backend == "hip":
        return {"num_warps": 2, "enable_fp_fusion": False}  # of 64 threads
    return {"num_warps": 4, "enable_fp_fusion": False, "maxnreg": 255 if op == torch.float64 else 128}


@triton.jit  # type: ignore[untyped-decorator]
def locate(table_ptr: tl.tensor, blocks_ptr: tl.tensor, chunk: tl.tensor) -> tl.tensor:
    """(row, begin, count): the tensor of this program, the first element it takes, and how many (int32)."""
    program = tl.program_id(0)
    row = tl.load(blocks_ptr + program)
    begin = tl.load(blocks_ptr + tl.num_programs(0) + program)
    return row, begin, tl.minimum(tl.load(table_ptr + row) - begin, chunk).to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def pointer(
    table_ptr: tl.tensor, n: tl.tensor, row: tl.tensor, begin: tl.tensor, COLUMN: tl.constexpr, DTYPE: tl.constexpr
) -> tl.tensor:
    """Where the program's elements of a column begin."""
    return tl.load(table_ptr + COLUMN * n + row).to(tl.pointer_type(DTYPE)) + begin


@triton.jit  # type: ignore[untyped-decorator]
def aligned(table_ptr: tl.tensor, n: tl.tensor, row: tl.tensor, COLUMNS: tl.constexpr) -> tl.tensor:
    """Whether the row's tensors of the first columns all begin on 16-byte boundaries; absent ones are 0."""
    bits = tl.load(table_ptr + n + row)
    for column in tl.static_range(2, 1 + COLUMNS):
        bits |= tl.load(table_ptr + column * n + row)
    return bits % 16 == 0


@triton.jit  # type: ignore[untyped-decorator]
def number(address: tl.tensor, i: tl.tensor, given: tl.tensor) -> tl.tensor:
    """The i-th float64 at the address, or the given one where there is no address."""
    address = address.to(tl.int64)
    given = tl.full((), given, tl.float64)
    return tl.load(address.to(tl.pointer_type(tl.float64)) + i, mask=address != 0, other=given)


@triton.jit  # type: ignore[untyped-decorator]
def scalar(address: tl.tensor, default: tl.constexpr, DTYPE: tl.constexpr) -> tl.tensor:
    """The number at the address, or the default where there is none."""
    address = address.to(tl.int64)
    return tl.load(address.to(tl.pointer_type(DTYPE)), mask=address != 0, other=default)


@triton.jit  # type: ignore[untyped-decorator]
def read(
    ptr: tl.tensor, at: tl.tensor, left: tl.tensor, OP: tl.constexpr, WIDTH: tl.constexpr, VECTOR: tl.constexpr
) -> tl.tensor:
    """A tile as numbers of the arithmetic's type, [WIDTH]; 0 beyond ``left``."""
    ptr += at
    if VECTOR:
        ptr = tl.multiple_of(ptr, 16)
    offs = tl.arange(0, WIDTH)
    return tl.load(ptr + offs, mask=offs < left, other=0.0).to(OP)


@triton.jit  # type: ignore[untyped-decorator]
def read_importance(
    ptr: tl.tensor,
    scales_ptr: tl.tensor,
    begin: tl.tensor,
    at: tl.tensor,
    left: tl.tensor,
    OP: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
) -> tl.tensor:
    """:func:`read`, and codes as what they stand for; ``begin`` is the program's first element.

    A tile lies within one block of codes. Every step of decoding is exact; see ``fastewc/ops/importance_codes.py``.
    """
    if ptr.dtype.element_ty != tl.uint8:
        return read(ptr, at, left, OP, WIDTH, VECTOR)
    code = read(ptr, at, left, tl.int32, WIDTH, VECTOR)
    q = code + 9
    octave = q * 171 >> 11  # q/12
    i = (q - 12 * octave).to(tl.float32)
    mantissa = ((365 / 8388608 * i + 13371 / 8388608) * i + 485676 / 8388608) * i + 1.0
    bits = mantissa.to(tl.int32, bitcast=True) + (octave - 22 << 23)
    value = tl.where(code == 0, 0, bits).to(tl.float32, bitcast=True)
    first = (begin % CODES_TO_A_SCALE).to(tl.int32)  # 64-bit sums in the loop would take registers that Adam lacks
    scales_ptr += begin // CODES_TO_A_SCALE
    scale = tl.load(scales_ptr + (first + at) // CODES_TO_A_SCALE, mask=left > 0, other=0.0)
    return value.to(OP) * scale.to(OP)


@triton.jit  # type: ignore[untyped-decorator]
def read_whole(
    high_ptr: tl.tensor, low_ptr: tl.tensor, at: tl.tensor, left: tl.tensor, WIDTH: tl.constexpr, VECTOR: tl.constexpr
) -> tl.tensor:
    """:func:`read` of float32 weights in two halves; see ``fastewc/ops/ewc_step/halves.py``."""
    high_ptr = high_ptr.to(tl.pointer_type(tl.uint16))
    high = read(high_ptr, at, left, tl.uint32, WIDTH, VECTOR) << 16
    low = read(low_ptr, at, left, tl.int32, WIDTH, VECTOR).to(tl.uint32, bitcast=True)
    w = (high + low).to(tl.float32, bitcast=True)
    return tl.where(w == w, w, high.to(tl.float32, bitcast=True))


@triton.jit  # type: ignore[untyped-decorator]
def write_halves(
    high_ptr: tl.tensor,
    low_ptr: tl.tensor,
    at: tl.tensor,
    left: tl.tensor,
    w: tl.tensor,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
) -> None:
    """:func:`write` of float32 weights: their high halves to the nearest, ties away from zero, and what these lack."""
    bits = tl.where(w == w, w.to(tl.uint32, bitcast=True), 0x7FC00000)
    write(high_ptr.to(tl.pointer_type(tl.uint16)), at, left, (bits + 0x8000) >> 16, WIDTH, VECTOR)
    write(low_ptr.to(tl.pointer_type(tl.uint16)), at, left, bits & 0xFFFF, WIDTH, VECTOR)


@triton.jit  # type: ignore[untyped-decorator]
def write(
    ptr: tl.tensor, at: tl.tensor, left: tl.tensor, x: tl.tensor, WIDTH: tl.constexpr, VECTOR: tl.constexpr
) -> None:
    """Store a tile [WIDTH], rounded once to the tensor's type."""
    ptr += at
    if VECTOR:
        ptr = tl.multiple_of(ptr, 16)
    offs = tl.arange(0, WIDTH)
    tl.store(ptr + offs, x.to(ptr.dtype.element_ty), mask=offs < left)
