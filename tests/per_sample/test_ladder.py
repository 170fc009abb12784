"""Without its rule a function is differentiated for each sample ("op"), and the numbers stay exact.

A model for each function that has a rule: with the rule it is "fused", without it "op".
"""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import resolve_name

from fastewc.per_sample.rules import RULES
from tests.per_sample.checking import Lambda, assert_exact, floats, ids

ROWS, TOKENS, COLUMNS, WORDS = floats(5, 4), floats(5, 3, 4), floats(5, 4, 3), ids(9, 5, 3)
MODELS = {}  # function -> (forward of function, w and x; shape of w; inputs)


def used_as(forward, shape, inputs, *functions):
    MODELS.update(dict.fromkeys(functions, (forward, shape, inputs)))


def both(*names):
    """As a function and as a method, where there are both."""
    return [getattr(owner, name) for name in names for owner in (torch, Tensor) if hasattr(owner, name)]


used_as(lambda f, w, x: f(x, w), (3, 4), TOKENS, F.linear)
used_as(lambda f, w, x: f(x, w), (4, 2), TOKENS, *both("matmul"))
used_as(lambda f, w, x: f(x, w), (2, 4), COLUMNS, Tensor.__rmatmul__)
used_as(lambda f, w, x: f(x, w), (4, 2), ROWS, *both("mm"))
used_as(lambda f, w, x: f(x.new_ones(2), x, w), (4, 2), ROWS, *both("addmm"))
used_as(lambda f, w, x: f("nti,oi->nto", x, w), (3, 4), TOKENS, torch.einsum)
for dims in (1, 2, 3):
    grid = floats(4, 2, *[3] * dims)
    used_as(lambda f, w, x: f(x, w), (3, 2, *[2] * dims), grid, getattr(torch, f"conv{dims}d"))
    used_as(lambda f, w, x: f(x, w), (2, 3, *[2] * dims), grid, getattr(torch, f"conv_transpose{dims}d"))
used_as(
    lambda f, w, x: f(x.square() + 0.5, w), (4,), TOKENS,
    *both(
        "add", "sub", "subtract", "rsub", "mul", "multiply", "div", "divide", "true_divide", "pow", "float_power",
        "maximum", "minimum", "fmax", "fmin", "clamp", "clip", "clamp_min", "clamp_max", "atan2", "hypot", "xlogy",
        "logaddexp", "copysign", "__rsub__", "__rtruediv__", "__pow__", "__rpow__",
    ),
)  # fmt: skip
used_as(lambda f, w, x: f(x, x, w), (4,), TOKENS, *both("addcmul", "addcdiv"))
used_as(lambda f, w, x: f(x, x.tanh(), w), (4,), TOKENS, *both("lerp"))
used_as(lambda f, w, x: f(x > 0, w, x), (4,), TOKENS, torch.where)
used_as(lambda f, w, x: f(x, x > 0, w), (4,), TOKENS, Tensor.where)
used_as(lambda f, w, x: f(x, x > 0, w), (), TOKENS, *both("masked_fill"))
used_as(lambda f, w, x: f(x, w), (4,), COLUMNS, *both("prelu"))
used_as(lambda f, w, x: f(w, (len(x), 4)) * x, (1, 4), ROWS, Tensor.expand, *both("broadcast_to"))
used_as(lambda f, w, x: f(w, x) * x, (1, 4), ROWS, Tensor.expand_as)
used_as(lambda f, w, x: f(w, (len(x), 1)) * x, (1, 4), ROWS, Tensor.repeat, *both("tile"))
used_as(lambda f, w, x: f(w, len(x), 0) * x, (1, 4), ROWS, *both("repeat_interleave"))
used_as(lambda f, w, x: f(w, x).tanh(), (9, 4), WORDS, torch.embedding, Tensor.__getitem__)
used_as(lambda f, w, x: f(w, 0, x.flatten()).view(*x.shape, -1).tanh(), (9, 4), WORDS, *both("index_select"))
used_as(lambda f, w, x: f(x, (4,), w), (4,), TOKENS, torch.layer_norm, torch.rms_norm)
used_as(lambda f, w, x: f(x, 2, w), (4,), COLUMNS, torch.group_norm)
used_as(lambda f, w, x: f(x, w, None, None, None, True, 0.1, 1e-5, True), (4,), COLUMNS, torch.instance_norm)
used_as(
    lambda f, w, x: f(x, w, None, x.new_ones(4), x.new_full((4,), 2.0), False, 0.1, 1e-5, True), (4,), COLUMNS,
    torch.batch_norm,
)  # fmt: skip


@pytest.mark.parametrize("function", RULES, ids=resolve_name)
def test_rule_removed(function, monkeypatch):
    assert function in MODELS, f"{resolve_name(function)} has a rule, and no model here: add one with used_as"
    forward, shape, inputs = MODELS[function]
    model = Lambda(lambda m, x: forward(function, m.w, x), w=nn.Parameter(torch.rand(shape) + 0.5)).double().eval()
    x = inputs()
    x = x.double() if x.is_floating_point() else x
    assert_exact(model, x, cuts=((),))
    monkeypatch.delitem(RULES, function)
    assert_exact(model, x, cuts=((),), op={"w"})
