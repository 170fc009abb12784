"""Convolutions, forward and transposed, in one to three dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastewc.per_sample.layout import Layout
from fastewc.per_sample.proxy import Proxy
from fastewc.per_sample.rules.base import Call, Use, is_proxy, rule
from fastewc.per_sample.rules.linear import added
from fastewc.per_sample.segments import Conv, Segment


@rule(F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d)
def conv(call: Call) -> list[Use] | None:
    """Y = x ∗ W + b."""
    x, weight, bias, stride, padding, dilation, groups = call.bound(
        "input", "weight", "bias", "stride", "padding", "dilation", "groups"
    )
    if is_proxy(x) or not _samples_first(call, x):
        return None
    spatial = x.ndim - 2
    geometry: dict[str, Any] = {
        "stride": _each(stride, spatial, 1),
        "padding": (0,) * spatial,
        "dilation": _each(dilation, spatial, 1),
        "groups": 1 if groups is None else groups,
    }
    before: list[int] = []  # zeros that F.pad puts in front of and behind each dimension, last dimension first
    if padding == "same":
        missing = [d * (k - 1) for d, k in zip(geometry["dilation"], weight.shape[2:], strict=True)]
        if all(m % 2 == 0 for m in missing):
            geometry["padding"] = tuple(m // 2 for m in missing)
        else:
            before = [size for m in reversed(missing) for size in (m // 2, m - m // 2)]
    elif padding != "valid":
        geometry["padding"] = _each(padding, spatial, 0)
    uses = []
    if is_proxy(weight):

        def segment(g: Tensor, x: Tensor) -> Segment:
            x = F.pad(x, before) if before else x
            return Conv(_frames(call, x, g), tuple(weight.shape), geometry)

        uses.append(Use(weight.operand, (x,), segment))
    return uses + _bias(call, bias)


@rule(
    F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
    torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d,
)  # fmt: skip
def conv_transpose(call: Call) -> list[Use] | None:
    """The gradient of its weight is that of a convolution of g that gives x."""
    x, weight, bias, stride, padding, output_padding, groups, dilation = call.bound(
        "input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"
    )
    if is_proxy(x) or not _samples_first(call, x):
        return None
    spatial = x.ndim - 2
    geometry: dict[str, Any] = {
        "stride": _each(stride, spatial, 1),
        "padding": _each(padding, spatial, 0),
        "dilation": _each(dilation, spatial, 1),
        "groups": 1 if groups is None else groups,
    }
    # Windows over g behind the last input: there are some where the output was padded by a whole stride.
    more = [extra // step for extra, step in zip(_each(output_padding, spatial, 0), geometry["stride"], strict=True)]
    uses = []
    if is_proxy(weight):

        def segment(g: Tensor, x: Tensor) -> Segment:
            behind = [size for extra in reversed(more) for size in (0, extra)]
            x = F.pad(x, behind) if any(behind) else x
            return Conv([(g, x.to(g.dtype)) for x, g in _frames(call, x, g)], tuple(weight.shape), geometry)

        uses.append(Use(weight.operand, (x,), segment))
    return uses + _bias(call, bias)


def _samples_first(call: Call, x: Tensor) -> bool:
    """Samples in dimension 0 of a batched input, by themselves or with frames that follow each other."""
    return call.layout.dim == 0 and call.layout.merged != "minor" and x.ndim == call.result.ndim and x.ndim >= 3


def _frames(call: Call, x: Tensor, g: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(x, g) pairs of N each: one, or one for every frame of a sample."""
    if call.layout == Layout(0):
        return [(x, g)]
    return list(zip(call.split(x).unbind(1), call.split(g).unbind(1), strict=True))


def _bias(call: Call, bias: Proxy | Tensor | None) -> list[Use]:
    if not isinstance(bias, Proxy):
        return []
    operand = bias.operand
    use = added(call, operand)

    def segment(g: Tensor) -> Segment | None:
        return use.segment(g.movedim(1, -1))

    return [Use(operand, (), segment)]


def _each(value: int | Sequence[int] | None, spatial: int, default: int) -> tuple[int, ...]:
    """One number per spatial dimension."""
    if value is None:
        value = default
    if isinstance(value, int):
        return (value,) * spatial
    return tuple(value) * (spatial if len(value) == 1 else 1)
