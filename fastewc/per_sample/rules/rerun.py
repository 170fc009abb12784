"""Any op, differentiated by autograd: run anew in backward, for each sample or, if it is pointwise, for all at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastewc.per_sample.layout import broadcasts
from fastewc.per_sample.proxy import Operand, Proxy, found_proxies, mapped, replaced
from fastewc.per_sample.rules.base import Call, Use
from fastewc.per_sample.segments import Reran, Scale, Segment


def rerun(call: Call) -> list[Use]:
    """Uses for an op without a rule."""

    def one(operand: Operand, again: Callable[[Tensor, Sequence[Tensor]], Tensor]) -> Callable[..., Segment]:
        def segment(g: Tensor, *saved: Tensor) -> Segment:
            def run() -> tuple[Tensor, Tensor]:
                leaf = operand.plain.clone().requires_grad_()
                return again(leaf, saved), leaf

            return Reran(run, g, call.layout, call.samples)

        return segment

    return _uses(call, one)


def pointwise(call: Call) -> list[Use] | None:
    """Uses for an op that gives each entry of its result from one entry of each operand, broadcast to it.

    The gradient at the operand *broadcast* has one entry for each of the result, so every sample's is there.
    """
    shape = call.result.shape
    for proxy in found_proxies((list(call.args), call.kwargs)):
        if not broadcasts(proxy.shape, shape):
            return None

    def one(operand: Operand, again: Callable[[Tensor, Sequence[Tensor]], Tensor]) -> Callable[..., Segment]:
        def segment(g: Tensor, *saved: Tensor) -> Segment:
            with torch.enable_grad():
                leaf = operand.plain.expand(shape).detach().requires_grad_()
                result = again(leaf, saved)
                (gradient,) = torch.autograd.grad(result, leaf, g.to(result.dtype))
            return Scale(call.split(gradient), tuple(operand.plain.shape))

        return segment

    return _uses(call, one)


def _uses(
    call: Call, make: Callable[[Operand, Callable[[Tensor, Sequence[Tensor]], Tensor]], Callable[..., Segment]]
) -> list[Use]:
    """A use of each operand; ``make`` gets what calls the function anew, with a tensor in the operand's place."""
    content, tensors = apart((list(call.args), call.kwargs))

    def again(operand: Operand) -> Callable[[Tensor, Sequence[Tensor]], Tensor]:
        def run(leaf: Tensor, saved: Sequence[Tensor]) -> Tensor:
            def choose(proxy: Proxy) -> Tensor:
                return leaf if proxy.operand is operand else proxy.operand.plain

            args, kwargs = put_back(replaced(content, choose), saved)
            result: Tensor = call.func(*args, **kwargs)
            return result

        return run

    operands = {id(p.operand): p.operand for p in found_proxies(content)}.values()
    return [Use(operand, tensors, make(operand, again(operand))) for operand in operands]


class _Place(int):
    """The place of a tensor in a list."""


def apart(content: Any) -> tuple[Any, tuple[Tensor, ...]]:
    """Nested arguments without their tensors, but with their proxies; and the tensors, to be saved for backward."""
    tensors = list[Tensor]()

    def keep(leaf: Any) -> Any:
        if isinstance(leaf, Proxy) or not isinstance(leaf, Tensor):
            return leaf
        tensors.append(leaf)
        return _Place(len(tensors) - 1)

    return mapped(content, keep), tuple(tensors)


def put_back(content: Any, tensors: Sequence[Tensor]) -> Any:
    """What :func:`apart` took apart."""
    return mapped(content, lambda leaf: tensors[leaf] if isinstance(leaf, _Place) else leaf)
