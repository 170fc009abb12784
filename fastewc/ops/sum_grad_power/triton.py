"""sum_grad_power in Triton: what the kernels are given, how they are compiled, and how programs share the work.

Where the tiles of a weight are too few to fill the device, several programs share the samples of one, and their parts
are added in order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastewc.ops._multi_tensor import on_device, processors
from fastewc.ops.sum_grad_power import scales
from fastewc.ops.sum_grad_power.kernels import channels, tiles
from fastewc.ops.sum_grad_power.scales import row_moments as row_moments
from fastewc.ops.sum_grad_power.schema import ScaleUse
from fastewc.ops.sum_grad_power.windows import Windows, stacked, windows_of

Segments = Sequence[tuple[Tensor, Tensor]]
#: Programs for each multiprocessor that a launch aims at.
_PROGRAMS = 2
#: Steps over T = 1 samples that a program takes at least; below, adding the parts costs more than it saves.
_STEPS = 8
_HIP = 0
#: Generations whose tensor cores read both operands from shared memory: Hopper and the large Blackwell.
_FROM_SHARED_MEMORY = (9, 10)


def arithmetic(dtype: torch.dtype) -> tl.dtype:
    """What sums are formed in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


@lru_cache
def tiles_specialisation(
    dtype: torch.dtype, p: int, dims: int, sizes: tuple[int, int, int], single: bool, vectors: bool, generation: int
) -> dict[str, Any]:
    """The compile-time arguments of a launch of ``tiles`` and its options, for ``sizes`` (O, I, T).

    Registers decide, which hold two tiles of sums: a thread has 32 of each, and 64 where tensor cores take their
    operands from shared memory. More would spill, as would 32 where operands are loaded one by one (not ``vectors``)
    and each has an address.
    """
    on_cores = dtype.itemsize == 2 and not (single and p == 2)
    if on_cores:
        from_memory = generation in _FROM_SHARED_MEMORY and dims < 3 and not single
        largest_o, largest_i, deepest = (128, 128 if from_memory else 64, 64) if vectors else (128, 64, 32)
    elif dtype == torch.float64:
        largest_o, largest_i, deepest = 32, 32, 16
    else:
        largest_o, largest_i, deepest = 128 if vectors else 64, 64, 16
    O, I, T = (max(triton.next_power_of_2(size), 16) for size in sizes)
    constants = {
        "P": p, "KIND": "single" if single else "short" if deepest >= T else "long", "DIMS": dims,
        "OP": arithmetic(dtype), "BLOCK_O": min(O, largest_o), "BLOCK_I": min(I, largest_i),
        "BLOCK_T": min(T, deepest),
    }  # fmt: skip
    threads = 256 if constants["BLOCK_O"] * constants["BLOCK_I"] >= 64 * 64 else 128
    stages = 2 if generation == _HIP else 3 if constants["BLOCK_T"] == 64 else 4
    return constants | _options(dtype, threads, generation) | {"num_stages": stages}


@lru_cache
def channels_specialisation(
    dtype: torch.dtype, p: int, dims: int, sizes: tuple[int, int, int], channels_last: bool, generation: int
) -> dict[str, Any]:
    """The compile-time arguments of a launch of ``channels`` and its options, for ``sizes`` (O, K, T).

    2,048 elements, side by side in memory along channels or along positions. On AMD's cards every element of a thread
    takes scalar registers for its mask, so a thread has half as many.
    """
    O, K, T = map(triton.next_power_of_2, sizes)
    kernel = min(K, 16)
    outputs = min(O, 32 if channels_last else 2)
    positions = min(T, 2048 // (kernel * outputs))
    constants = {
        "P": p, "DIMS": dims, "OP": arithmetic(dtype), "BLOCK_O": outputs, "BLOCK_T": positions, "BLOCK_K": kernel,
    }  # fmt: skip
    return constants | _options(dtype, 256 if generation == _HIP else 128, generation)


def _options(dtype: torch.dtype, threads: int, generation: int) -> dict[str, Any]:
    if generation == _HIP:
        return {"num_warps": threads // 64, "enable_fp_fusion": True}
    # ptxas would spill a few words to reach the next step of occupancy; told how many registers there are it does not.
    limit = {"maxnreg": 255} if generation >= 10 or dtype == torch.float64 else {}
    return {"num_warps": threads // 32, "enable_fp_fusion": True} | limit


@lru_cache
def generation_of(device: torch.device) -> int:
    """The major number of a GPU's compute capability; 0 for AMD's."""
    return _HIP if torch.version.hip or device.type != "cuda" else torch.cuda.get_device_capability(device)[0]


def add_sum_grad_power(total_OI: Tensor, segments: Segments, p: int) -> None:
    """See ``reference.py`` for the equation. One launch; several uses of a weight are first copied into one."""
    segments = [(a, g) for a, g in segments if a.numel() and g.numel()]
    if not segments:
        return
    if len(segments) == 1:
        a_NTI, g_NTO = segments[0]
    else:
        a_NTI, g_NTO = (torch.cat(list(uses), 1) for uses in zip(*segments, strict=True))
    single = a_NTI.shape[1] == 1
    if single:
        a_NTI, g_NTO = a_NTI.transpose(0, 1), g_NTO.transpose(0, 1)
    a_NIT, g_NOT = _arranged(a_NTI.mT, a_NTI.shape[2]), _arranged(g_NTO.mT, g_NTO.shape[2])
    x = a_NIT[:, :, None, None, None]
    _add_tiles(total_OI.unsqueeze(2), x, g_NOT, p, Windows(0), groups=1, single=single)
    torch.autograd.graph.increment_version(total_OI)


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
    """See ``reference.py`` for the equation. One launch; several uses of a weight are first copied into one."""
    segments = [(x, g) for x, g in segments if x.numel() and g.numel()]
    if not segments or not total.numel():
        return
    O, C, *kernel = total.shape
    if groups == 1 and math.prod(kernel) == 1 and not any(padding):  # a layer that is applied at every stride-th pixel
        pixels = (slice(None), slice(None), *(slice(None, None, step) for step in stride))
        add_sum_grad_power(total.view(O, C), [(x[pixels].flatten(2).mT, g.flatten(2).mT) for x, g in segments], p)
        return
    x, g = stacked([x for x, _ in segments]), stacked([g for _, g in segments])
    windows = windows_of(x, g, tuple(kernel), tuple(stride), tuple(padding), tuple(dilation))
    total_OCK, g_NOT = total.flatten(2), g.flatten(2)
    x = x.reshape(*x.shape[:3], *windows.size)
    if C == 1:
        _add_channels(total_OCK, x, g_NOT, p, windows, O // groups)
    else:
        x, g_NOT = _arranged(x, C, along_positions=False), _arranged(g_NOT, O // groups)
        _add_tiles(total_OCK, x, g_NOT, p, windows, groups=groups, single=False)
    if total_OCK.data_ptr() != total.data_ptr():  # kernel positions that no single stride walks
        total.copy_(total_OCK.view(total.shape))
    torch.autograd.graph.increment_version(total)


def add_scale_grad_power(total: Tensor, uses: Sequence[ScaleUse], p: int) -> None:
    """See ``reference.py`` for the equation."""
    if uses and total.numel():
        depthwise, segments = scales.as_depthwise(total, uses)
        add_conv_grad_power(depthwise, segments, p, **scales.DEPTHWISE, groups=len(depthwise))
        total += depthwise.view(total.shape)


def _in_vectors(t: Tensor, width: int, along_positions: bool = True) -> bool:
    """Whether t [N, channels, *positions], its channels in groups of ``width``, can be loaded in vectors."""
    channels = t.stride(1) == 1 and width % 16 == 0
    return channels or (along_positions and t.stride(-1) == 1 and t.shape[-1] % 16 == 0)


def _arranged(t: Tensor, width: int, along_positions: bool = True) -> Tensor:
    """t itself, or a copy where only then its loads are vectors of 16-bit elements.

    A load of less than 4 bytes can't be asynchronous, and the loop would wait for each.
    """
    if t.dtype.itemsize > 2 or width % 16 or 0 in t.stride() or _in_vectors(t, width, along_positions):
        return t
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def _add_tiles(
    total_OCK: Tensor, x: Tensor, g_NOT: Tensor, p: int, windows: Windows, *, groups: int, single: bool
) -> None:
    """x is [N, C of all groups, segments, depth, height, width]."""
    (O, C, K), (N, _, T) = total_OCK.shape, g_NOT.shape
    O //= groups
    vectors = _in_vectors(x, C, along_positions=windows.dims == 0) and _in_vectors(g_NOT, O)
    constants = tiles_specialisation(x.dtype, p, windows.dims, (O, C * K, T), single, vectors, generation_of(x.device))
    chunks = triton.cdiv(T, constants["BLOCK_T"])
    count = groups * triton.cdiv(O, constants["BLOCK_O"]) * triton.cdiv(C * K, constants["BLOCK_I"])
    share, splits = shares(N * chunks, _STEPS if single else chunks, count, processors(x.device))
    out = total_OCK if splits == 1 else x.new_empty(splits, *total_OCK.shape, dtype=total_OCK.dtype)
    with on_device(x.device):
        tiles[(count * splits,)](
            out, x, g_NOT, out.stride(0), *out.stride()[-3:], *x.stride()[:2], *g_NOT.stride(), O, C, C * K, T, groups,
            chunks, N * chunks, share, splits, *windows.arguments(x), **constants,
        )  # fmt: skip
        if splits > 1:
            total_OCK += out.sum(0)


def _add_channels(total_OCK: Tensor, x: Tensor, g_NOT: Tensor, p: int, windows: Windows, spread: int) -> None:
    (O, _, K), (N, _, T) = total_OCK.shape, g_NOT.shape
    channels_last = x.stride(1) == 1 and x.shape[1] > 1
    constants = channels_specialisation(x.dtype, p, windows.dims, (O, K, T), channels_last, generation_of(x.device))
    count = triton.cdiv(O, constants["BLOCK_O"]) * triton.cdiv(K, constants["BLOCK_K"])
    share, splits = shares(N, 1, count, processors(x.device))
    out = total_OCK if splits == 1 else x.new_empty(splits, *total_OCK.shape, dtype=total_OCK.dtype)
    with on_device(x.device):
        channels[(count * splits,)](
            out, x, g_NOT, out.stride(0), out.stride(-3), out.stride(-1), *x.stride()[:2], *g_NOT.stride(), O, K, T,
            spread, N, share, splits, *windows.arguments(x), **constants,
        )  # fmt: skip
        if splits > 1:
            total_OCK += out.sum(0)


def shares(steps: int, unit: int, count: int, processors: int) -> tuple[int, int]:
    """(steps of a program, programs for each of ``count`` tiles): whole units, and enough to fill the device.

    Programs times tiles stays below twice what is aimed at, so their parts take a few megabytes.
    """
    units = triton.cdiv(steps, unit)
    share = unit * triton.cdiv(units, min(units, triton.cdiv(_PROGRAMS * processors, count)))
    return share, triton.cdiv(steps, share)
