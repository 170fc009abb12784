"""Any op, differentiated by autograd: run anew in backward, for each sample or, if it is pointwise, for all at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastewc.per_sample.layout import broadcasts
from fastewc.per_sample.proxy import Operand, Proxy, found_proxies, replaced
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
    tensors = list[Tensor]()

    def keep(content: Any) -> Any:
        """The arguments with every tensor that is no proxy replaced by its place in ``tensors``."""
        if isinstance(content, Proxy):
            return content
        if isinstance(content, Tensor):
            tensors.append(content)
            return _Place(len(tensors) - 1)
        if isinstance(content, (tuple, list)):
            return type(content)(keep(part) for part in content)
        if isinstance(content, dict):
            return {key: keep(part) for key, part in content.items()}
        return content

    args, kwargs = keep(list(call.args)), keep(call.kwargs)

    def again(operand: Operand) -> Callable[[Tensor, Sequence[Tensor]], Tensor]:
        def run(leaf: Tensor, saved: Sequence[Tensor]) -> Tensor:
            def choose(proxy: Proxy) -> Tensor:
                return leaf if proxy.operand is operand else proxy.operand.plain

            there_args, there_kwargs = _put_back(replaced((args, kwargs), choose), saved)
            result: Tensor = call.func(*there_args, **there_kwargs)
            return result

        return run

    operands = {id(p.operand): p.operand for p in found_proxies((args, kwargs))}.values()
    return [Use(operand, tuple(tensors), make(operand, again(operand))) for operand in operands]


class _Place(int):
    """The place of a tensor in a list."""


def _put_back(content: Any, tensors: Sequence[Tensor]) -> Any:
    if isinstance(content, _Place):
        return tensors[content]
    if isinstance(content, (tuple, list)):
        return type(content)(_put_back(part, tensors) for part in content)
    if isinstance(content, dict):
        return {key: _put_back(part, tensors) for key, part in content.items()}
    return content
