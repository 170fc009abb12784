"""Parameters that are broadcast: scales, shifts, slopes, tables of positions, tokens repeated for every sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastewc.per_sample.layout import broadcasts
from fastewc.per_sample.rules.base import Call, Use, is_proxy, rule
from fastewc.per_sample.rules.linear import added
from fastewc.per_sample.rules.rerun import pointwise
from fastewc.per_sample.segments import Scale, Segment

_POINTWISE = (
    "add", "sub", "subtract", "__rsub__", "rsub", "mul", "multiply", "div", "divide", "true_divide", "__rtruediv__",
    "__rdiv__", "pow", "__pow__", "__rpow__",
    "float_power", "addcmul", "addcdiv", "lerp", "where", "maximum", "minimum", "fmax", "fmin", "clamp", "clip",
    "clamp_min", "clamp_max", "atan2", "hypot", "xlogy", "logaddexp", "copysign",
)  # fmt: skip


def _named(*names: str) -> Iterator[Callable[..., Any]]:
    for name in names:
        for owner in (torch, Tensor):
            if callable(found := getattr(owner, name, None)):
                yield found


@rule(*_named(*_POINTWISE), leading=True)
def elementwise(call: Call) -> list[Use] | None:
    """Any function of numbers."""
    return pointwise(call)


@rule(torch.masked_fill, Tensor.masked_fill)
def masked_fill(call: Call) -> list[Use] | None:
    """x, or a number where the mask is True; torch takes no value but a scalar, so it cannot be expanded."""
    x, mask, value = call.bound("input", "mask", "value")
    if not is_proxy(value):
        return pointwise(call)
    if is_proxy(x):
        return None
    return [Use(value.operand, (mask,), lambda g, mask: Scale(call.split(g.masked_fill(~mask, 0)), ()))]


@rule(torch.prelu, Tensor.prelu)
def prelu(call: Call) -> list[Use] | None:
    """y = x or, where that is negative, w · x; one slope, or one for each channel."""
    x, weight = call.bound("input", "weight")
    if is_proxy(x) or x.ndim < 2:
        return None

    def segment(g: Tensor, x: Tensor) -> Segment:
        g, x = call.split(g), call.split(x.clamp_max(0))
        if weight.numel() > 1:
            g, x = g.movedim(2, -1), x.movedim(2, -1)  # the channels
        return Scale(g, tuple(weight.shape), x)

    return [Use(weight.operand, (x,), segment)]


def _two(call: Call) -> tuple[Any, Any] | None:
    """The operands of a function of two; None if there is a factor between them, or both are proxies."""
    if len(call.args) != 2 or call.kwargs:
        return None
    left, right = call.args
    return None if is_proxy(left) and is_proxy(right) else (left, right)


@rule(torch.add, Tensor.add)
def add(call: Call) -> list[Use] | None:
    """Y = x + w: nothing has to be kept."""
    operands = _two(call)
    return pointwise(call) if operands is None else [added(call, one.operand) for one in operands if is_proxy(one)]


@rule(torch.sub, Tensor.sub)
def sub(call: Call) -> list[Use] | None:
    """Y = x − w, or w − x; the sign of a gradient does not matter where its power is taken, but in a sum it does."""
    operands = _two(call)
    if operands is None:
        return pointwise(call)
    left, right = operands
    return [added(call, left.operand)] if is_proxy(left) else [added(call, right.operand, -1.0)]


@rule(torch.mul, Tensor.mul)
def mul(call: Call) -> list[Use] | None:
    """Y = x · w."""
    operands = _two(call)
    if operands is None:
        return pointwise(call)
    weight, x = operands if is_proxy(operands[0]) else operands[::-1]
    if not isinstance(x, Tensor):
        return None

    def segment(g: Tensor, x: Tensor) -> Segment:
        return Scale(call.split(g), tuple(weight.shape), call.split(x.expand(g.shape)))

    return [Use(weight.operand, (x,), segment)]


@rule(*_named("expand", "expand_as", "broadcast_to", "repeat", "tile", "repeat_interleave"))
def expand(call: Call) -> list[Use] | None:
    """A parameter repeated for every sample, such as a class token."""
    weight = call.args[0]
    if not is_proxy(weight):
        return None
    # Repeated as a whole or entry by entry: that is all the same where a dimension has a single entry.
    return [added(call, weight.operand)] if broadcasts(weight.shape, call.result.shape) else None
