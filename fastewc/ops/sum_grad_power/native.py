"""sum_grad_power in C++ (CPU) and CUDA C++: csrc/sum_grad_power. ``_dispatch.choose`` has loaded the library before."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fastewc.ops.sum_grad_power import scales
from fastewc.ops.sum_grad_power.schema import SCHEMAS, ScaleUse

for _name, _schema in SCHEMAS.items():
    torch.library.define(f"fastewc::{_name}", _schema)


@torch.library.register_fake("fastewc::add_sum_grad_power")  # type: ignore[untyped-decorator]
def _(*_: object) -> None:
    pass


@torch.library.register_fake("fastewc::add_conv_grad_power")  # type: ignore[untyped-decorator]
def _(*_: object) -> None:
    pass


@torch.library.register_fake("fastewc::add_scale_grad_power")  # type: ignore[untyped-decorator]
def _(*_: object) -> None:
    pass


@torch.library.register_fake("fastewc::row_moments")  # type: ignore[untyped-decorator]
def _(*_: object) -> None:
    pass


_add_sum_grad_power = torch.ops.fastewc.add_sum_grad_power.default
_add_conv_grad_power = torch.ops.fastewc.add_conv_grad_power.default
_add_scale_grad_power = torch.ops.fastewc.add_scale_grad_power.default
_row_moments = torch.ops.fastewc.row_moments.default
Segments = Sequence[tuple[Tensor, Tensor]]
#: Types of devices with kernels for scales; on others they are depthwise convolutions.
_SCALES = ("cpu",)


@functools.cache
def _has_matrix_unit() -> bool:
    return bool(torch.ops.fastewc.has_matrix_unit.default())


_matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
#: Samples whose powers are formed at a time where one position is a product of matrices.
_ROWS = 1024


def add_sum_grad_power(total_OI: Tensor, segments: Segments, p: int) -> None:
    """See ``reference.py`` for the equation."""
    one_position = len(segments) == 1 and segments[0][0].shape[1] == 1
    if one_position and total_OI.device.type == "cpu" and not _has_matrix_unit():
        a_NI, g_NO = (t[:, 0] for t in segments[0])
        # A user may let torch multiply float32 in less; here it stays float32.
        if a_NI.dtype == total_OI.dtype and _matmul.fp32_precision in ("none", "ieee"):
            # |g a|^p = |g|^p |a|^p: for one position the sum is a plain product, and no vector loop of ours beats the
            # BLAS.
            for start in range(0, len(a_NI), _ROWS):
                rows = slice(start, start + _ROWS)
                total_OI.addmm_(_powers(g_NO[rows], p).T, _powers(a_NI[rows], p))
            return
    _add_sum_grad_power(total_OI, [a for a, _ in segments], [g for _, g in segments], p)


def _powers(values: Tensor, p: int) -> Tensor:
    return values.abs() if p == 1 else values.square()


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
    """See ``reference.py`` for the equation."""
    _add_conv_grad_power(
        total, [x for x, _ in segments], [g for _, g in segments], p, stride, padding, dilation, groups
    )


def add_scale_grad_power(total: Tensor, uses: Sequence[ScaleUse], p: int) -> None:
    """See ``reference.py`` for the equation."""
    if total.device.type in _SCALES:
        g, x, shift, factor = map(list, zip(*uses, strict=True)) if uses else ([], [], [], [])
        _add_scale_grad_power(total, g, x, shift, factor, p)
    elif uses and total.numel():
        depthwise, segments = scales.as_depthwise(total, uses)
        add_conv_grad_power(depthwise, segments, p, **scales.DEPTHWISE, groups=len(depthwise))
        total += depthwise.view(total.shape)


def row_moments(shift: Tensor, factor: Tensor, x: Tensor, eps: float, centred: bool) -> None:
    """See ``reference.py`` for the equation."""
    if x.device.type in _SCALES:
        _row_moments(shift, factor, x, eps, centred)
    else:
        scales.row_moments(shift, factor, x, eps, centred)
