"""Where the windows of a convolution lie: position t and kernel position k meet the input at start(t) + moved(k).

Positions count segments, then depth, height and width: one segment of depth 1 has DIMS = 2, all else 3. DIMS = 0 is no
convolution, but a layer with T positions side by side. Offsets are int64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit  # type: ignore[untyped-decorator]
def started(
    t: tl.tensor, out: tl.tensor, stride: tl.tensor, padding: tl.tensor, x_strides: tl.tensor, DIMS: tl.constexpr
) -> tl.tensor:
    """(depth, height, width) of the first input that position t meets, negative in the padding; and its offset."""
    x_s, x_d, x_h, x_w = x_strides
    d, h = t, t
    if DIMS == 0:
        return (d, h, t), t.to(tl.int64) * x_w
    h = (t // out[2]) % out[1] * stride[1] - padding[1]
    w = t % out[2] * stride[2] - padding[2]
    offs = h.to(tl.int64) * x_h + w.to(tl.int64) * x_w
    if DIMS == 3:
        deep = t // (out[2] * out[1])
        d = deep % out[0] * stride[0] - padding[0]
        offs += d.to(tl.int64) * x_d + (deep // out[0]).to(tl.int64) * x_s
    return (d, h, w), offs


@triton.jit  # type: ignore[untyped-decorator]
def displaced(
    k: tl.tensor, kernel: tl.tensor, dilation: tl.tensor, x_strides: tl.tensor, DIMS: tl.constexpr
) -> tl.tensor:
    """(depth, height, width) from a window's first input to the one that kernel position k meets; and its offset."""
    _, x_d, x_h, x_w = x_strides
    d, h, w = k, k, k
    offs = tl.zeros(k.shape, tl.int64)
    if DIMS > 0:
        h, w = (k // kernel[1]) % kernel[0] * dilation[1], k % kernel[1] * dilation[2]
        offs += h.to(tl.int64) * x_h + w.to(tl.int64) * x_w
    if DIMS == 3:
        d = k // (kernel[1] * kernel[0]) * dilation[0]
        offs += d.to(tl.int64) * x_d
    return (d, h, w), offs


@triton.jit  # type: ignore[untyped-decorator]
def inside(start: tl.tensor, moved: tl.tensor, size: tl.tensor, DIMS: tl.constexpr) -> tl.tensor:
    """Whether they meet within the input, and not in its padding: [positions, kernel positions]."""
    h, w = start[1][:, None] + moved[1][None, :], start[2][:, None] + moved[2][None, :]
    found = (h >= 0) & (h < size[1]) & (w >= 0) & (w < size[2])
    if DIMS == 3:
        d = start[0][:, None] + moved[0][None, :]
        found &= (d >= 0) & (d < size[0])
    return found


@dataclass(frozen=True)
class Windows:
    """A convolution of depth, height and width, as the kernels take it.

    Attributes:
        dims: how many of them the kernels have to look at; 0 for none at all.
        out: positions.
        size: of the inputs.
        kernel: positions of the kernel.
        stride: between windows.
        padding: zeros in front.
        dilation: between kernel positions.
    """

    dims: int
    out: tuple[int, ...] = (1, 1, 1)
    size: tuple[int, ...] = (1, 1, 1)
    kernel: tuple[int, ...] = (1, 1, 1)
    stride: tuple[int, ...] = (1, 1, 1)
    padding: tuple[int, ...] = (0, 0, 0)
    dilation: tuple[int, ...] = (1, 1, 1)

    def arguments(self, x: Tensor) -> tuple[int, ...]:
        """Of a launch on x [N, C, segments, depth, height, width]."""
        return (
            *self.out, *self.size, *self.kernel[1:], *self.stride, *self.padding, *self.dilation, *x.stride()[2:]
        )  # fmt: skip


def windows_of(
    x: Tensor, g: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Windows:  # fmt: skip
    """For x [N, C, segments, *spatial] and g [N, O, segments, *out] with one to three spatial dimensions."""

    def three(values: tuple[int, ...], missing: int) -> tuple[int, ...]:
        return (missing,) * (3 - len(values)) + tuple(values)

    flat = x.shape[2] == 1 and len(kernel) < 3
    return Windows(
        2 if flat else 3, three(g.shape[3:], 1), three(x.shape[3:], 1), three(kernel, 1), three(stride, 1),
        three(padding, 0), three(dilation, 1),
    )  # fmt: skip


def stacked(tensors: list[Tensor]) -> Tensor:
    """[N, C, *sizes] each -> [N, C, segments, *largest sizes], smaller ones filled up with zeros at the ends.

    Zeros in g take the positions that a segment does not have out of the sum, and zeros in x are what lies beyond it.
    """
    if len(tensors) == 1:
        return tensors[0].unsqueeze(2)
    largest = [max(sizes) for sizes in zip(*(t.shape[2:] for t in tensors), strict=True)]
    filled = []
    for t in tensors:
        ends = [end for size, wanted in zip(t.shape[2:], largest, strict=True) for end in (wanted - size, 0)]
        filled.append(torch.nn.functional.pad(t, ends[::-1]))  # F.pad begins at the last dimension
    return torch.stack(filled, dim=2)
