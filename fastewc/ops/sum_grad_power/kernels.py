"""The Triton kernels of sum_grad_power: a program owns one tile of the weight and walks its samples; no atomics.

Letters: N samples, T positions, I inputs, O outputs; of a convolution C channels of a group and K kernel positions,
I = K·C with the channels side by side. A tile of Σ_t g a is accumulated where dot products are (float32 in IEEE
arithmetic, 16-bit elements on tensor cores with float32 sums); at a sample's last position |·|^p of it is added to a
second tile. At T = 1 the powers are taken first, φ(G)ᵀφ(A), and the contraction runs over the samples.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastewc.ops.sum_grad_power.windows import displaced, inside, started

#: Sizes of which Triton need not know whether they are 1 or a multiple of 16: they decide about no vector.
VARYING = (
    "split_stride", "groups", "chunks", "steps", "share", "splits", "out_d", "out_h", "out_w", "in_d",
    "in_h", "in_w", "kernel_h", "kernel_w", "stride_d", "stride_h", "stride_w", "padding_d", "padding_h", "padding_w",
    "dilation_d", "dilation_h", "dilation_w",
)  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _power(x: tl.tensor, P: tl.constexpr) -> tl.tensor:
    """φ(x) = |x|^p."""
    if P == 1:
        return tl.abs(x)
    return x * x


@triton.jit  # type: ignore[untyped-decorator]
def _add(
    ptrs: tl.tensor, tile: tl.tensor, rows: tl.tensor, in_columns: tl.tensor, count: tl.tensor, splits: tl.tensor
) -> None:
    """Into the total; or, where several programs share a tile, to the program's own place, where nothing is yet."""
    held = tl.where(splits == 1, count, 0)
    before = tl.load(ptrs, mask=(rows < held)[:, None] & in_columns[None, :], other=0.0)
    tl.store(ptrs, before + tile, mask=(rows < count)[:, None] & in_columns[None, :])


@triton.jit(do_not_specialize=VARYING)  # type: ignore[untyped-decorator]
def tiles(
    total_ptr: tl.tensor,
    x_ptr: tl.tensor,
    g_ptr: tl.tensor,
    split_stride: tl.tensor,
    total_o: tl.tensor,
    total_c: tl.tensor,
    total_k: tl.tensor,
    x_n: tl.tensor,
    x_c: tl.tensor,
    g_n: tl.tensor,
    g_o: tl.tensor,
    g_t: tl.tensor,
    O: tl.tensor,
    C: tl.tensor,
    I: tl.tensor,
    T: tl.tensor,
    groups: tl.tensor,
    chunks: tl.tensor,
    steps: tl.tensor,
    share: tl.tensor,
    splits: tl.tensor,
    out_d: tl.tensor,
    out_h: tl.tensor,
    out_w: tl.tensor,
    in_d: tl.tensor,
    in_h: tl.tensor,
    in_w: tl.tensor,
    kernel_h: tl.tensor,
    kernel_w: tl.tensor,
    stride_d: tl.tensor,
    stride_h: tl.tensor,
    stride_w: tl.tensor,
    padding_d: tl.tensor,
    padding_h: tl.tensor,
    padding_w: tl.tensor,
    dilation_d: tl.tensor,
    dilation_h: tl.tensor,
    dilation_w: tl.tensor,
    x_s: tl.tensor,
    x_d: tl.tensor,
    x_h: tl.tensor,
    x_w: tl.tensor,
    P: tl.constexpr,
    KIND: tl.constexpr,
    DIMS: tl.constexpr,
    OP: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
) -> None:
    """One tile of one group's [O, I], from the steps that are this program's share.

    A step is BLOCK_T positions of a sample, and a sample has ``chunks`` of them; the loop runs over the steps of all
    samples, so that loads of the next sample are on their way before the last is done. KIND: "single" (T = 1, with
    samples in the place of positions), "short" (a sample is one step) or "long".
    """
    tiles_o, tiles_i = tl.cdiv(O, BLOCK_O), tl.cdiv(I, BLOCK_I)
    program = tl.program_id(0)
    tile, rest = program % (tiles_o * tiles_i), program // (tiles_o * tiles_i)
    group, split = (rest % groups).to(tl.int64), rest // groups
    tile_o, tile_i = tl.swizzle2d(tile // tiles_i, tile % tiles_i, tiles_o, tiles_i, 8)
    out, size, strides = (out_d, out_h, out_w), (in_d, in_h, in_w), (stride_d, stride_h, stride_w)
    padding, x_strides = (padding_d, padding_h, padding_w), (x_s, x_d, x_h, x_w)

    offs_o, offs_i = tile_o * BLOCK_O + tl.arange(0, BLOCK_O), tile_i * BLOCK_I + tl.arange(0, BLOCK_I)
    in_o, in_i = offs_o < O, offs_i < I
    c, k = offs_i % C, offs_i // C
    moved, offs_k = displaced(
        k, (kernel_h, kernel_w), (dilation_d, dilation_h, dilation_w), x_strides, DIMS
    )  # each [BLOCK_I]
    g_ptrs = g_ptr + group * O * g_o + (offs_o.to(tl.int64) * g_o)[:, None]  # [BLOCK_O, 1]
    x_ptrs = x_ptr + group * C * x_c + (c.to(tl.int64) * x_c + offs_k)[None, :]  # [1, BLOCK_I]

    total = tl.zeros((BLOCK_O, BLOCK_I), OP)
    sample = tl.zeros((BLOCK_O, BLOCK_I), OP)
    for step in range(split * share, tl.minimum(split * share + share, steps)):
        n = (step // chunks).to(tl.int64)
        chunk = step % chunks
        t = chunk * BLOCK_T + tl.arange(0, BLOCK_T)
        in_t = t < T
        start, offs_t = started(t, out, strides, padding, x_strides, DIMS)  # each [BLOCK_T]
        g_mask, x_mask = in_o[:, None] & in_t[None, :], in_t[:, None] & in_i[None, :]
        if DIMS > 0:
            x_mask &= inside(start, moved, size, DIMS)
        g = tl.load(g_ptrs + n * g_n + (t.to(tl.int64) * g_t)[None, :], mask=g_mask, other=0.0)  # [BLOCK_O, BLOCK_T]
        x = tl.load(x_ptrs + n * x_n + offs_t[:, None], mask=x_mask, other=0.0)  # [BLOCK_T, BLOCK_I]
        if KIND == "single":
            if P == 2:  # a square has twice the digits of a 16-bit number
                g, x = g.to(OP), x.to(OP)
            total = tl.dot(_power(g, P), _power(x, P), total, input_precision="ieee", out_dtype=OP)
        elif KIND == "short":
            total += _power(tl.dot(g, x, input_precision="ieee", out_dtype=OP), P)
        else:
            sample = tl.dot(g, x, sample, input_precision="ieee", out_dtype=OP)
            if chunk == chunks - 1:
                total += _power(sample, P)
                sample = tl.zeros((BLOCK_O, BLOCK_I), OP)

    total_ptr += split.to(tl.int64) * split_stride + group * O * total_o
    rows = total_ptr + (offs_o.to(tl.int64) * total_o)[:, None]
    # Half by half: each number has an address of its own where no vector divides the total, and all would spill.
    halves = tl.split(tl.permute(tl.reshape(total, (BLOCK_O, 2, BLOCK_I // 2)), (0, 2, 1)))
    for half in tl.static_range(2):
        offs = tile_i * BLOCK_I + half * (BLOCK_I // 2) + tl.arange(0, BLOCK_I // 2)
        ptrs = rows + ((offs % C).to(tl.int64) * total_c + (offs // C).to(tl.int64) * total_k)[None, :]
        _add(ptrs, halves[half], offs_o, offs < I, O, splits)


@triton.jit(do_not_specialize=VARYING)  # type: ignore[untyped-decorator]
def channels(
    total_ptr: tl.tensor,
    x_ptr: tl.tensor,
    g_ptr: tl.tensor,
    split_stride: tl.tensor,
    total_o: tl.tensor,
    total_k: tl.tensor,
    x_n: tl.tensor,
    x_c: tl.tensor,
    g_n: tl.tensor,
    g_o: tl.tensor,
    g_t: tl.tensor,
    O: tl.tensor,
    K: tl.tensor,
    T: tl.tensor,
    spread: tl.tensor,
    steps: tl.tensor,
    share: tl.tensor,
    splits: tl.tensor,
    out_d: tl.tensor,
    out_h: tl.tensor,
    out_w: tl.tensor,
    in_d: tl.tensor,
    in_h: tl.tensor,
    in_w: tl.tensor,
    kernel_h: tl.tensor,
    kernel_w: tl.tensor,
    stride_d: tl.tensor,
    stride_h: tl.tensor,
    stride_w: tl.tensor,
    padding_d: tl.tensor,
    padding_h: tl.tensor,
    padding_w: tl.tensor,
    dilation_d: tl.tensor,
    dilation_h: tl.tensor,
    dilation_w: tl.tensor,
    x_s: tl.tensor,
    x_d: tl.tensor,
    x_h: tl.tensor,
    x_w: tl.tensor,
    P: tl.constexpr,
    DIMS: tl.constexpr,
    OP: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Depthwise: groups of one channel each, of ``spread`` outputs. Some outputs, some kernel positions, some samples.

    There is nothing to contract but positions, so this is a sum over the middle of [BLOCK_O, BLOCK_T, BLOCK_K].
    """
    tiles_o, tiles_k = tl.cdiv(O, BLOCK_O), tl.cdiv(K, BLOCK_K)
    program = tl.program_id(0)
    tile, split = program % (tiles_o * tiles_k), (program // (tiles_o * tiles_k)).to(tl.int64)
    out, size, strides = (out_d, out_h, out_w), (in_d, in_h, in_w), (stride_d, stride_h, stride_w)
    padding, x_strides = (padding_d, padding_h, padding_w), (x_s, x_d, x_h, x_w)

    offs_o = (tile // tiles_k) * BLOCK_O + tl.arange(0, BLOCK_O)
    k = (tile % tiles_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_o, in_k = offs_o < O, k < K
    moved, offs_k = displaced(k, (kernel_h, kernel_w), (dilation_d, dilation_h, dilation_w), x_strides, DIMS)
    g_ptrs = g_ptr + (offs_o.to(tl.int64) * g_o)[:, None]  # [BLOCK_O, 1]
    x_ptrs = x_ptr + ((offs_o // spread).to(tl.int64) * x_c)[:, None, None] + offs_k[None, None, :]

    total = tl.zeros((BLOCK_O, BLOCK_K), OP)
    for n in range(split * share, tl.minimum(split * share + share, steps)):
        terms = tl.zeros((BLOCK_O, BLOCK_T, BLOCK_K), OP)
        for first in range(0, T, BLOCK_T):
            t = first + tl.arange(0, BLOCK_T)
            in_t = t < T
            start, offs_t = started(t, out, strides, padding, x_strides, DIMS)
            g_mask = in_o[:, None] & in_t[None, :]
            g = tl.load(g_ptrs + n * g_n + (t.to(tl.int64) * g_t)[None, :], mask=g_mask, other=0.0)
            window = inside(start, moved, size, DIMS) & in_k[None, :]  # [BLOCK_T, BLOCK_K]
            x_mask = g_mask[:, :, None] & window[None, :, :]
            x = tl.load(x_ptrs + n * x_n + offs_t[None, :, None], mask=x_mask, other=0.0)
            terms += g.to(OP)[:, :, None] * x.to(OP)
        total += _power(tl.sum(terms, 1), P)

    ptrs = total_ptr + split * split_stride
    ptrs += (offs_o.to(tl.int64) * total_o)[:, None] + (k.to(tl.int64) * total_k)[None, :]
    _add(ptrs, total, offs_o, in_k, O, splits)
