"""sum_grad_power: contract, validation and choice of the implementation."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from fastewc._dispatch import Impl, choose
from fastewc.ops.sum_grad_power.schema import ScaleUse

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
Segments = Sequence[tuple[Tensor, Tensor]]


def sum_grad_power(a: Tensor, g: Tensor, p: Literal[1, 2], impl: Impl = "auto") -> Tensor:
    """Σ_n |Σ_t g_nto a_nti|^p: a weight's per-sample gradients, reduced over the samples.

    With y = x Wᵀ, a the inputs x and g the gradients of a per-sample scalar with respect to y, Σ_t g_nto a_nti is
    sample n's gradient of W[o, i]. p = 2 gives N times the Fisher diagonal (1/N) Σ_n (∂ log p(y_n|x_n)/∂w)² (E5), p =
    1 gives N times MAS (1/N) Σ_n |∂‖f(x_n)‖²/∂w| (E6; Aljundi et al. 2018). No factor ½ and no 1/N here.

    Args:
        a: inputs of the layer, [N, T, I], or [N, I] for T = 1. float32, float64, bfloat16 or float16.
        g: gradients at its outputs, [N, T, O] or [N, O], of the same dtype and device. N, T, I and O may be 0.
        p: 2 or 1.
        impl: which implementation; "auto" takes the fastest that runs here, any other runs or raises.

    Returns:
        [O, I], float32 (float64 for float64 inputs); no gradient flows through it.

    Raises:
        TypeError: not tensors, or dtypes that differ or are not supported.
        ValueError: shapes or devices that do not fit, p other than 1 or 2, an unknown impl.
        NotImplementedError: an explicit impl that can't run here.
    """
    _check_segments([(a, g)], p)
    if a.ndim not in (2, 3) or g.ndim != a.ndim or a.shape[:-1] != g.shape[:-1]:
        raise ValueError(
            f"wanted a [N, T, I] with g [N, T, O], or a [N, I] with g [N, O]; got a {list(a.shape)} and g "
            f"{list(g.shape)}"
        )
    kernels = _kernels(impl, a.device)
    a_NTI, g_NTO = (t.detach().unsqueeze(1) if t.ndim == 2 else t.detach() for t in (a, g))
    total_OI = torch.zeros(g.shape[-1], a.shape[-1], dtype=_total_dtype(a), device=a.device)
    kernels.add_sum_grad_power(total_OI, [(a_NTI, g_NTO)], p)
    return total_OI


def add_sum_grad_power(total_OI: Tensor, segments: Segments, p: int, impl: Impl = "auto") -> None:
    """Add Σ_n |Σ_s Σ_t g_s[n,t,o] a_s[n,t,i]|^p to ``total_OI``: :func:`sum_grad_power` over all uses s of a weight.

    Args:
        total_OI: [O, I], float32 (float64 for float64 segments), of any strides; its elements share no memory.
        segments: (a [N, T, I], g [N, T, O]) for each use of the weight; T may differ, all else is the same. They are
            summed before |·|^p. Any strides, those of expanded dimensions too. An empty list adds nothing.
        p: 2 or 1.
        impl: which implementation; "auto" takes the fastest that runs here, any other runs or raises.

    Raises:
        TypeError: not tensors, or dtypes that differ or are not supported.
        ValueError: shapes or devices that do not fit, p other than 1 or 2, an unknown impl.
        NotImplementedError: an explicit impl that can't run here.
    """
    _check_segments(segments, p, total_OI)
    for a, g in segments:
        O, I = total_OI.shape if total_OI.ndim == 2 else (-1, -1)
        shape = (*segments[0][0].shape[:1], *a.shape[1:2])  # N of the first, T of its own
        if a.shape != (*shape, I) or g.shape != (*shape, O):
            raise ValueError(
                f"wanted segments a [N, T, I] and g [N, T, O] of one N for a total [O, I]; got a {list(a.shape)} and g "
                f"{list(g.shape)} for a total {list(total_OI.shape)}"
            )
    kernels = _kernels(impl, total_OI.device)
    kernels.add_sum_grad_power(total_OI, [(a.detach(), g.detach()) for a, g in segments], p)


def add_conv_grad_power(
    total: Tensor,
    segments: Segments,
    p: int,
    *,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    impl: Impl = "auto",
) -> None:
    """Add Σ_n |Σ_s ∂L_n/∂weight|^p to ``total``: the per-sample weight gradients of a convolution, reduced.

    The convolution is F.convNd(x, weight, None, stride, padding, dilation, groups), with N of 1, 2 or 3 spatial
    dimensions. A transposed one is this with x and g exchanged.

    Args:
        total: [O, C/groups, *kernel] as the weight, float32 (float64 for float64 segments), of any strides; its
            elements share no memory.
        segments: (x [N, C, *spatial], g [N, O, *out]) for each use of the weight; spatial may differ, all else is the
            same. They are summed before |·|^p. Any strides. An empty list adds nothing.
        p: 2 or 1.
        stride: one number for each spatial dimension; so are padding and dilation.
        padding: zeros on both sides.
        dilation: distance of the kernel's elements.
        groups: of channels and outputs.
        impl: which implementation; "auto" takes the fastest that runs here, any other runs or raises.

    Raises:
        TypeError: not tensors, or dtypes that differ or are not supported.
        ValueError: shapes or devices that do not fit, p other than 1 or 2, an unknown impl.
        NotImplementedError: an explicit impl that can't run here.
    """
    _check_segments(segments, p, total)
    dims = total.ndim - 2
    if (
        dims not in (1, 2, 3)
        or not len(stride) == len(padding) == len(dilation) == dims
        or min(*stride, *dilation, groups) < 1
        or min(padding) < 0
        or total.shape[0] % groups
    ):
        raise ValueError(
            "wanted a total [O, C/groups, *kernel] of 1, 2 or 3 spatial dimensions and as many numbers in stride, "
            f"dilation (at least 1) and padding (at least 0); got a total {list(total.shape)}, stride {stride}, "
            f"padding {padding}, dilation {dilation}, groups {groups}"
        )
    for x, g in segments:
        N, C = segments[0][0].shape[:1], total.shape[1] * groups
        out = _out_size(x.shape[2:], total.shape[2:], stride, padding, dilation)
        if x.ndim != total.ndim or x.shape[:2] != (*N, C) or g.shape != (*N, total.shape[0], *out):
            raise ValueError(
                f"wanted segments x [N, {C}, *spatial] and g [N, {total.shape[0]}, *out] of one N for a total "
                f"{list(total.shape)}; got x {list(x.shape)} and g {list(g.shape)}, with stride {stride}, padding "
                f"{padding}, dilation {dilation}, groups {groups}"
            )
    kernels = _kernels(impl, total.device)
    kernels.add_conv_grad_power(
        total, [(x.detach(), g.detach()) for x, g in segments], p,
        stride=stride, padding=padding, dilation=dilation, groups=groups,
    )  # fmt: skip


def add_scale_grad_power(total: Tensor, uses: Sequence[ScaleUse], p: int, impl: Impl = "auto") -> None:
    """Add Σ_n |Σ_s ∂L_n/∂w|^p to ``total``: the per-sample gradients of a scale w or of a bias, reduced.

    Use s is y = w x̂ + … with x̂ = (x − shift) factor as norms make it, or y = … + w; its gradient is Σ_t g x̂ or Σ_t g
    over all positions t that w is broadcast to.

    Args:
        total: of w's shape, float32 (float64 for float64 uses), of any strides; its elements share no memory.
        uses: g [N, ...] whose other dimensions ``total`` broadcasts to, x of the same shape and dtype or None, shift
            and factor of the total's dtype that broadcast to x, or None. Positions may differ from use to use, all else
            is the same. They are summed before |·|^p. Any strides, those of expanded dimensions too. An empty list adds
            nothing.
        p: 2 or 1.
        impl: which implementation; "auto" takes the fastest that runs here, any other runs or raises.

    Raises:
        TypeError: not tensors, or dtypes that differ or are not supported.
        ValueError: shapes or devices that do not fit, p other than 1 or 2, an unknown impl.
        NotImplementedError: an explicit impl that can't run here.
    """
    _check_segments([(use.g if use.x is None else use.x, use.g) for use in uses], p, total)
    checked = []
    for g, x, shift, factor in uses:
        fits = (
            g.shape[:1] == uses[0].g.shape[:1]
            and g.ndim > total.ndim
            and (x is None or x.shape == g.shape)
            and all(a in (1, b) for a, b in zip(reversed(total.shape), reversed(g.shape), strict=False))
        )
        if not fits:
            raise ValueError(
                f"wanted g and x [N, ...] of one shape and one N, to whose other dimensions the total broadcasts; got "
                f"g {list(g.shape)}, x {None if x is None else list(x.shape)} for a total {list(total.shape)}"
            )
        if x is None:
            if shift is not None or factor is not None:
                raise ValueError("wanted x with a shift or a factor, got None: without x there is nothing to normalise")
            checked.append(ScaleUse(g.detach()))
        else:
            moments = (_moment(t, x, total) for t in (shift, factor))
            checked.append(ScaleUse(g.detach(), x.detach(), *moments))
    _kernels(impl, total.device).add_scale_grad_power(total, checked, p)


def row_moments(x: Tensor, eps: float, *, centred: bool = True, impl: Impl = "auto") -> tuple[Tensor, Tensor]:
    """What a norm of rows subtracts and multiplies with: (x − shift) factor is the norm of x over its last dimension.

    Args:
        x: [..., R], float32, float64, bfloat16 or float16.
        eps: what is added to the variance.
        centred: whether the mean is subtracted, as layer norms do and RMS norms don't.
        impl: as in :func:`sum_grad_power`.

    Returns:
        shift = mean(x), or 0, and factor = 1/√(mean((x − shift)²) + eps), [..., 1], float32 (float64 for float64).

    Raises:
        TypeError: not a tensor, or of a dtype that is not supported.
        ValueError: no dimension, or an unknown impl.
        NotImplementedError: an explicit impl that can't run here.
    """
    if not isinstance(x, Tensor) or x.dtype not in DTYPES:
        raise TypeError(f"x must be a float32, float64, bfloat16 or float16 tensor, got {_kind(x)}")
    if x.ndim == 0:
        raise ValueError("wanted x [..., R] of at least 1 dimension, got a scalar")
    shift, factor = (torch.empty(*x.shape[:-1], 1, dtype=_total_dtype(x), device=x.device) for _ in range(2))
    _kernels(impl, x.device).row_moments(shift, factor, x.detach(), eps, centred)
    return shift, factor


def _moment(t: Tensor | None, x: Tensor, total: Tensor) -> Tensor | None:
    """A shift or factor, as large as x."""
    if t is None:
        return None
    if not isinstance(t, Tensor) or t.dtype != total.dtype or t.device != x.device:
        raise TypeError(
            f"shift and factor must be tensors of the total's dtype on the uses' device, {total.dtype} on {x.device}; "
            f"got {_kind(t)}"
        )
    try:
        return t.detach().expand(x.shape)
    except RuntimeError:
        raise ValueError(
            f"wanted a shift and a factor that broadcast to x, got {list(t.shape)} for x {list(x.shape)}"
        ) from None


def _kind(value: object) -> str:
    return f"{value.dtype} on {value.device}" if isinstance(value, Tensor) else type(value).__name__


def _out_size(
    spatial: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, ...]:
    """Positions of a convolution along each dimension; what no window reaches is left out."""
    return tuple(
        (size + 2 * pad - d * (k - 1) - 1) // step + 1
        for size, k, step, pad, d in zip(spatial, kernel, stride, padding, dilation, strict=False)
    )


def _check_segments(segments: Segments, p: int, total: Tensor | None = None) -> None:
    for a, g in segments:
        if not isinstance(a, Tensor) or not isinstance(g, Tensor):
            raise TypeError(f"a and g must be tensors, got {type(a).__name__} and {type(g).__name__}")
        if a.dtype not in DTYPES or g.dtype != a.dtype:
            raise TypeError(
                f"a and g must share one of float32, float64, bfloat16, float16; got {a.dtype} and {g.dtype}"
            )
        if a.device != g.device:
            raise ValueError(f"a and g must be on one device, got {a.device} and {g.device}")
        if total is not None and (a.dtype != segments[0][0].dtype or total.dtype != _total_dtype(a)):
            raise TypeError(
                "segments must share one dtype, with a total of float64 for float64, else of float32; got "
                f"{segments[0][0].dtype} and {a.dtype} with a total of {total.dtype}"
            )
        if total is not None and a.device != total.device:
            raise ValueError(f"segments and their total must be on one device, got {a.device} and {total.device}")
    if isinstance(p, bool) or p not in (1, 2):
        raise ValueError(f"p must be 1 (MAS) or 2 (Fisher), got {p!r}")


def _total_dtype(a: Tensor) -> torch.dtype:
    return torch.float64 if a.dtype == torch.float64 else torch.float32


def _kernels(impl: Impl, device: torch.device) -> ModuleType:
    """The chosen implementation: a module with functions of one name and signature for each of ours."""
    match choose("sum_grad_power", impl, device):
        case "native":
            from fastewc.ops.sum_grad_power import native

            return native
        case "triton":
            from fastewc.ops.sum_grad_power import triton

            return triton
        case "reference":
            from fastewc.ops.sum_grad_power import reference

            return reference
