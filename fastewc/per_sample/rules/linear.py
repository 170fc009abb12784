"""Products with a matrix: linear, matmul, addmm, einsum."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastewc.per_sample.proxy import Operand, Proxy
from fastewc.per_sample.rules.base import Call, Use, is_proxy, rule
from fastewc.per_sample.segments import Outer, Scale, Segment


def added(call: Call, operand: Operand, factor: float = 1.0) -> Use:
    """The use of something that the result has been given by addition: its gradient is g, summed."""
    shape = operand.value.shape

    def segment(g: Tensor) -> Segment:
        g = call.split(g)
        return Scale(g, shape, None if factor == 1.0 else g.new_full((), factor))

    return Use(operand, (), segment)


def multiplied(call: Call, x: Tensor, weight: Proxy, *, transposed: bool, factor: float = 1.0) -> Use | None:
    """The use of the matrix of factor · x @ weight.T (or of x @ weight: ``transposed``), or of a vector."""
    if weight.ndim == 1 and x.ndim >= 2 and call.layout.dim < call.result.ndim:

        def of_vector(g: Tensor, x: Tensor) -> Segment:
            return Outer(call.tokens(x), call.tokens(g.unsqueeze(-1)), shape=(weight.shape[0],))

        return Use(weight.operand, (x,), of_vector)
    if weight.ndim != 2 or x.ndim < 2 or call.layout.dim >= call.result.ndim - 1:
        return None

    def segment(g: Tensor, x: Tensor) -> Segment:
        a, g = call.tokens(x), call.tokens(g if factor == 1.0 else g * factor)
        return Outer(g, a) if transposed else Outer(a, g)

    return Use(weight.operand, (x,), segment)


@rule(F.linear, leading=True)
def linear(call: Call) -> list[Use] | None:
    """Y = x Wᵀ + b."""
    x, weight, bias = call.bound("input", "weight", "bias")
    if is_proxy(x):
        return None
    uses = [multiplied(call, x, weight, transposed=False)] if is_proxy(weight) else []
    if is_proxy(bias):
        uses.append(added(call, bias.operand))
    return _all(uses)


@rule(torch.matmul, Tensor.matmul, Tensor.__rmatmul__, torch.mm, Tensor.mm, leading=True)
def matmul(call: Call) -> list[Use] | None:
    """Y = x W, or y = W x: then the columns of x are the positions."""
    left, right = call.bound("input", "other") if len(call.args) == 2 else (None, None)
    if call.func is Tensor.__rmatmul__:
        left, right = right, left
    if left is None or right is None or (is_proxy(left) and is_proxy(right)):
        return None
    if is_proxy(right):
        return _all([multiplied(call, left, right, transposed=True)])
    if left.ndim != 2 or right.ndim < 2:
        return None
    dim, last = call.layout.dim, call.result.ndim - 1
    if dim == last - 1:
        return None
    turned = call.layout.moved(last - 1) if dim == last else call.layout

    def segment(g: Tensor, x: Tensor) -> Segment:
        a, g = (turned.split(t.mT, call.samples).flatten(1, -2) for t in (x, g))
        return Outer(a, g)

    return [Use(left.operand, (right,), segment)]


@rule(torch.addmm, Tensor.addmm)
def addmm(call: Call) -> list[Use] | None:
    """Y = βb + α x W."""
    bias, x, weight = call.bound("input", "mat1", "mat2")
    if is_proxy(x):
        return None
    factor = float(call.kwargs.get("alpha", 1))
    uses = [multiplied(call, x, weight, transposed=True, factor=factor)] if is_proxy(weight) else []
    if is_proxy(bias):
        uses.append(added(call, bias.operand, float(call.kwargs.get("beta", 1))))
    return _all(uses)


@rule(torch.einsum)
def einsum(call: Call) -> list[Use] | None:
    """Two operands, each index in two of the three tensors: the parameter's gradient is Σ_t g a as for a matrix."""
    equation, *operands = call.args
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    if not isinstance(equation, str) or "..." in equation or "->" not in equation or len(operands) != 2:
        return None
    inputs, out = equation.replace(" ", "").split("->")
    terms = inputs.split(",")
    if any(len(set(term)) != len(term) for term in (*terms, out)) or is_proxy(operands[0]) == is_proxy(operands[1]):
        return None
    own = 0 if is_proxy(operands[0]) else 1
    w, x = terms[own], terms[1 - own]
    if set(w) & set(x) & set(out) or set(w) - set(x) - set(out) or set(x) - set(w) - set(out):
        return None
    sample = out[call.layout.dim]
    if sample in w:
        return None
    ins, outs = [i for i in w if i in x], [o for o in w if o in out]
    positions = [t for t in out if t not in w and t != sample]
    x_order = [x.index(i) for i in (sample, *positions, *ins)]
    g_order = [out.index(i) for i in (sample, *positions, *outs)]
    weight: Operand = operands[own].operand
    layout = call.layout.moved(0)
    order = [w.index(i) for i in (*outs, *ins)]
    shape = tuple(weight.value.shape[i] for i in order)

    def segment(g: Tensor, x: Tensor) -> Segment:
        flat = []
        for tensor, order, kept in ((x, x_order, len(ins)), (g, g_order, len(outs))):
            turned = layout.split(tensor.permute(order), call.samples)  # [N, k, positions…, kept…]
            flat.append(turned.reshape(call.samples, turned.shape[1:-kept].numel() if kept else turned[0].numel(), -1))
        return Outer(flat[0], flat[1], shape)

    turned = weight.moved(f"{weight.key}[{order}]", lambda tensor: tensor.permute(order))
    return [Use(turned, (operands[1 - own],), segment)]


def _all(uses: list[Use | None]) -> list[Use] | None:
    found = [use for use in uses if use is not None]
    return found if len(found) == len(uses) else None
