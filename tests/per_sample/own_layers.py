"""Layers that no torch function shows, rules for them, and models with them."""

import torch
from torch import Tensor, nn

from fastewc import Outer, mas_importance
from tests.per_sample.checking import Cube, Lambda, assert_exact, floats, weight

TOKENS = floats(6, 3, 4)


def slope(grad_output, x, w):
    return 3 * (x @ w.T) ** 2 * grad_output


def outer(grad_output, x, w):
    """Of (x wᵀ)³."""
    return {"w": Outer(x, slope(grad_output, x, w))}


def explicit(grad_output, x, w):
    d = slope(grad_output, x, w)
    return {"w": torch.einsum("n...o,n...i->noi", d, x)}


class CubeLayer(nn.Module):
    """A module of it, with a bias in a submodule."""

    def __init__(self, inputs=4, outputs=4):
        super().__init__()
        self.w, self.shift = weight(outputs, inputs), nn.Module()
        self.shift.bias = weight(outputs)

    def forward(self, x):
        return Cube.apply(x, self.w) + self.shift.bias


def of_layer(grad_output, layer, x):
    assert type(layer.w) is type(layer.shift.bias) is Tensor
    rows = grad_output.flatten(1, -2).sum(1) if grad_output.ndim > 2 else grad_output
    return {**outer(grad_output, x, layer.w), "shift.bias": rows}


@torch.library.custom_op("fastewc_test::cube", mutates_args=())
def cube_op(x: Tensor, w: Tensor, scale: float = 1.0) -> Tensor:
    """An operator that torch can differentiate, and nobody can look into."""
    return scale * (x @ w.T) ** 3


def _backward(ctx, g):
    x, w = ctx.saved_tensors
    d = ctx.scale * slope(g, x, w)
    return d @ w, d.flatten(0, -2).T @ x.flatten(0, -2), None


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])
    ctx.scale = inputs[2]


cube_op.register_autograd(_backward, setup_context=_setup)


def of_op(grad_output, x, w, scale=1.0):
    return {"w": Outer(x, scale * slope(grad_output, x, w))}


def by_rule(model, x):
    """Names of the parameters whose report speaks of a rule of the user's."""
    return {name for name, (_, why) in mas_importance(model, [x]).report.items() if "by your rule for" in why}


def assert_by_rule(model, x, names, **others):
    model = model.double().eval()
    assert_exact(model, x.double(), **others)
    assert by_rule(model, x.double()) == set(names)


def between(middle, **parts):
    """A model with it between two layers."""
    parts = {"a": nn.Linear(4, 4), "out": nn.Linear(4, 3), **parts}
    return Lambda(lambda m, x: m.out(middle(m, torch.tanh(m.a(x)))), **parts)


class Scaled(torch.autograd.Function):
    """x times numbers, in the form with setup_context, with any number of weights."""

    @staticmethod
    def forward(x, factor, *weights):
        return x * factor * weights[0] + weights[1]

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.factor = inputs[1]
        ctx.save_for_backward(inputs[0], *inputs[2:])

    @staticmethod
    def backward(ctx, g):
        x, w, _ = ctx.saved_tensors
        return g * ctx.factor * w, None, (g * x * ctx.factor).flatten(0, -2).sum(0), g.flatten(0, -2).sum(0)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def of_pair(grad_output, layer, x):
    h = torch.tanh(layer.first(x))
    inner = (grad_output @ layer.second.weight) * (1 - h**2)
    return {
        "first.weight": Outer(x, inner), "first.bias": inner.sum(1),
        "second.weight": Outer(h, grad_output), "second.bias": grad_output.sum(1),
    }  # fmt: skip


def middles():
    """Between two layers: a call of each kind."""
    return {
        "function": between(lambda m, x: Cube.apply(x, m.w), w=weight(4, 4)),
        "module": between(lambda m, x: m.cube(x), cube=CubeLayer()),
        "operator": between(lambda m, x: cube_op(x, m.w.to(x.dtype)), w=weight(4, 4)),
    }
