"""Rules that users register: exact on the fast path for every kind of layer, use and layout."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastewc import Outer, mas_importance, per_sample_rule
from tests.per_sample.checking import Cube, Lambda, assert_exact, assert_importance, floats, weight
from tests.per_sample.own_layers import (
    TOKENS,
    CubeLayer,
    Pair,
    Scaled,
    assert_by_rule,
    between,
    by_rule,
    cube_op,
    explicit,
    of_layer,
    of_op,
    of_pair,
    outer,
)

# ── kinds of targets ──


@pytest.mark.parametrize("rule", [outer, explicit])
def test_function(rule):
    per_sample_rule(Cube)(rule)
    assert_by_rule(between(lambda m, x: Cube.apply(x, m.w), w=weight(4, 4)), TOKENS(), {"w"})
    assert_by_rule(Lambda(lambda m, x: Cube.apply(x, m.w), w=weight(3, 4)), floats(5, 4)(), {"w"})


def test_function_with_a_list_of_weights():
    @per_sample_rule(Scaled)
    def rule(grad_output, x, factor, *weights):
        assert len(weights) == 2
        return {"weights[0]": (grad_output * x * factor).sum(1), "weights[1]": grad_output.sum(1)}

    parts = {"w": weight(4), "b": weight(4)}
    assert_by_rule(between(lambda m, x: Scaled.apply(x, 1.5, m.w, m.b), **parts), TOKENS(), {"w", "b"})


def test_module():
    per_sample_rule(CubeLayer)(of_layer)
    model = between(lambda m, x: m.cube(x), cube=CubeLayer())
    assert_by_rule(model, TOKENS(), {"cube.w", "cube.shift.bias"})


@pytest.mark.parametrize("called", [cube_op, torch.ops.fastewc_test.cube, torch.ops.fastewc_test.cube.default], ids=str)
@pytest.mark.parametrize("target", [cube_op, torch.ops.fastewc_test.cube, torch.ops.fastewc_test.cube.default], ids=str)
def test_operator(target, called):
    per_sample_rule(target)(of_op)
    assert_by_rule(between(lambda m, x: called(x, m.w, 0.5), w=weight(4, 4)), TOKENS(), {"w"})
    assert_by_rule(between(lambda m, x: called(x, scale=0.5, w=m.w), w=weight(4, 4)), TOKENS(), {"w"}, cuts=((),))


def test_operator_without_a_rule():
    assert_exact(between(lambda m, x: cube_op(x, m.w), w=weight(4, 4)).double().eval(), TOKENS().double(), op={"w"})


def test_torch_function():
    @per_sample_rule(F.bilinear)
    def rule(grad_output, x, y, w, bias=None):
        return {"weight": torch.einsum("nto,nti,ntj->noij", grad_output, x, y), "bias": grad_output.sum(1)}

    parts = {"w": weight(4, 4, 4), "b": weight(4)}
    assert_by_rule(between(lambda m, x: F.bilinear(x, x.cos(), m.w, m.b), **parts), TOKENS(), {"w", "b"})


def test_torch_function_that_has_a_rule_or_consists_of_others():
    @per_sample_rule(F.linear)
    def linear(grad_output, x, w, bias=None):
        return {"weight": Outer(x, grad_output), "bias": grad_output.sum(1)}

    @per_sample_rule(F.layer_norm)
    def norm(grad_output, x, shape, w, b, eps=1e-5):
        return {"weight": (grad_output * F.layer_norm(x, shape, eps=eps)).sum(1), "bias": None}

    assert_by_rule(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)), TOKENS(), {"0.weight", "0.bias",
                   "2.weight", "2.bias"})  # fmt: skip
    normed = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3)).double().eval()
    normed[0].bias.requires_grad_(False)
    assert_by_rule(normed, TOKENS(), {"0.weight", "1.weight", "1.bias"})


@pytest.mark.parametrize("of", [nn.Module, torch.autograd.Function], ids=["module", "function"])
def test_classes_stand_for_their_subclasses_and_the_nearest_counts(of):
    class Twice(Cube if of is torch.autograd.Function else CubeLayer):
        pass

    class Thrice(Twice):
        pass

    seen = []

    def rule(name):
        def found(grad_output, *args):
            seen.append(name)
            return of_layer(grad_output, *args) if of is nn.Module else outer(grad_output, *args)

        return found

    def model(cls):
        if of is nn.Module:
            return between(lambda m, x: m.cube(x), cube=cls()).double().eval()
        return between(lambda m, x: cls.apply(x, m.w), w=weight(4, 4)).double().eval()

    base = Twice.__mro__[1]
    per_sample_rule(base)(rule("base"))
    assert_exact(model(Thrice), TOKENS().double())
    per_sample_rule(Twice)(rule("first"))
    per_sample_rule(Twice)(rule("later"))
    assert set(seen) == {"base"}
    assert_exact(model(Thrice), TOKENS().double())
    assert set(seen) == {"base", "later"}
    seen.clear()
    assert_exact(model(base), TOKENS().double())
    assert set(seen) == {"base"}


# ── uses ──


@pytest.mark.parametrize("rule", [outer, explicit])
def test_reuse_and_ties(rule):
    def middle(m, x):
        return Cube.apply(torch.tanh(Cube.apply(x, m.w)), m.w) + F.linear(x, m.w) + Cube.apply(x, m.a.weight)

    per_sample_rule(Cube)(rule)
    model = between(middle, w=weight(4, 4)).double().eval()
    assert_exact(model, TOKENS().double())
    assert {"w", "a.weight"} & by_rule(model, TOKENS().double())


def test_a_part_a_transpose_and_arithmetic():
    per_sample_rule(Cube)(outer)
    assert_by_rule(between(lambda m, x: Cube.apply(x, m.w.T[1:]), w=weight(4, 5)), TOKENS(), {"w"})
    made = between(lambda m, x: Cube.apply(x, m.w.exp() @ m.v), w=weight(4, 2), v=weight(2, 4)).double().eval()
    assert_exact(made, TOKENS().double(), op={"w", "v"})
    alone = between(lambda m, x: x @ Cube.apply(m.w, m.v), w=weight(4, 2), v=weight(4, 2)).double().eval()
    assert_exact(alone, TOKENS().double(), op={"w", "v"})


def test_one_parameter_twice_in_a_call():
    @per_sample_rule(Scaled)
    def rule(grad_output, x, factor, w, b):
        return {"weights[0]": (grad_output * x * factor).sum(1), "weights[1]": grad_output.sum(1)}

    assert_by_rule(between(lambda m, x: Scaled.apply(x, 1.5, m.w, m.w), w=weight(4)), TOKENS(), {"w"})


def test_parameters_shared_inside_a_module_and_with_others():
    per_sample_rule(Pair)(of_pair)
    model = between(lambda m, x: m.pair(m.other(x)), pair=Pair(), other=nn.Linear(4, 4))
    model.pair.second.weight = model.pair.first.weight = model.other.weight
    assert_by_rule(model, TOKENS(), {"pair.first.bias", "pair.second.bias"})  # the shared one met a linear layer before
    shared = between(lambda m, x: m.pair(x), pair=Pair())
    shared.pair.second = shared.pair.first
    assert_by_rule(shared, TOKENS(), {"pair.first.weight", "pair.first.bias"})
    shared.pair.first.bias.requires_grad_(False)
    assert_by_rule(shared, TOKENS(), {"pair.first.weight"})


def test_frozen_and_excluded_parameters():
    per_sample_rule(Pair)(of_pair)
    model, x = between(lambda m, x: m.pair(x), pair=Pair()).double().eval(), TOKENS().double()
    model.pair.first.bias.requires_grad_(False)
    assert_by_rule(model, x, {"pair.first.weight", "pair.second.weight", "pair.second.bias"})
    whole, part = mas_importance(model, [x]), mas_importance(model, [x], exclude="pair.second.*")
    assert set(part) == {"a.weight", "a.bias", "pair.first.weight", "out.weight", "out.bias"}
    assert all(torch.equal(value, whole[name]) for name, value in part.items())


def test_hooks_of_a_module_are_outside_of_its_rule():
    per_sample_rule(CubeLayer)(of_layer)
    cube = CubeLayer()
    cube.register_forward_pre_hook(lambda layer, args: (args[0] * 2,))
    cube.register_forward_hook(lambda layer, args, result: result.tanh())
    cube.register_full_backward_hook(lambda *_: None)
    assert_by_rule(between(lambda m, x: m.cube(x), cube=cube), TOKENS(), {"cube.w", "cube.shift.bias"})


def test_a_weight_that_a_hook_makes():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.raw = weight(4, 4)
            self.register_forward_pre_hook(lambda layer, _: setattr(layer, "w", layer.raw.exp()))

        def forward(self, x):
            return Cube.apply(x, self.w)

    @per_sample_rule(Normed)
    def rule(grad_output, layer, x):
        return {**outer(grad_output, x, layer.w), "raw": None}

    model = between(lambda m, x: m.normed(x), normed=Normed())
    assert_by_rule(model, TOKENS(), {"normed.raw"})
    assert type(vars(model.normed)["w"]) is Tensor


def test_a_parameter_as_the_argument_of_a_module():
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = weight(4, 4)

        def forward(self, x, *, gain):
            return Cube.apply(x, self.w) * gain

    @per_sample_rule(Product)
    def rule(grad_output, layer, x, *, gain):
        y = (x @ layer.w.T) ** 3
        return {**outer(grad_output * gain, x, layer.w), "gain": (grad_output * y).sum(1)}

    model = between(lambda m, x: m.product(x, gain=m.gain), product=Product(), gain=weight(4))
    assert_by_rule(model, TOKENS(), {"product.w", "gain"})


def test_results_and_arguments_that_are_not_one_tensor():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = weight(4, 4)

        def forward(self, xs, seen, how):
            seen.append(len(xs))
            y = Cube.apply(xs["x"], self.w)
            return {"y": y} if how == "dict" else (y, None, y.argmax(-1))

    @per_sample_rule(Listed)
    def rule(grad_output, layer, xs, seen, how):
        return outer(grad_output, xs["x"], layer.w)

    def forward(how):
        def middle(m, x):
            seen = []
            y = m.listed({"x": x}, seen, how)
            assert seen == [1]
            return y["y"] if how == "dict" else y[0] + 0 * y[2].unsqueeze(-1)

        return between(middle, listed=Listed())

    assert_by_rule(forward("tuple"), TOKENS(), {"listed.w"})
    model = forward("dict").double().eval()
    assert_exact(model, TOKENS().double(), slow={"listed.w"})
    assert "a tuple as the result, not dict" in mas_importance(model, [TOKENS().double()]).report["listed.w"][1]


def test_none_is_no_gradient():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.idle = weight(4, 4), weight(4)

        def forward(self, x):
            return Cube.apply(x, self.w) + self.idle.detach()

    @per_sample_rule(Half)
    def rule(grad_output, layer, x):
        return {**outer(grad_output, x, layer.w), "idle": None}

    assert_by_rule(between(lambda m, x: m.h(x), h=Half()), TOKENS(), {"h.w"}, unused={"h.idle"})


def test_an_outer_of_weights_that_are_no_matrix():
    class Conv(nn.Conv1d):
        pass

    @per_sample_rule(Conv)
    def rule(grad_output, layer, x):  # kernel of 2, no padding
        return {
            "weight": Outer(x.unfold(2, 2, 1).transpose(1, 2).flatten(2), grad_output.mT),
            "bias": grad_output.sum(2),
        }

    model = Lambda(lambda m, x: m.conv(x).flatten(1), conv=Conv(4, 5, 2))
    assert_by_rule(model, floats(6, 4, 3)(), {"conv.weight", "conv.bias"})

    @per_sample_rule(torch.Tensor.mul)
    def product(grad_output, x, w):
        return {"other": Outer(x.new_ones(len(x), 1), grad_output * x)}

    assert_by_rule(Lambda(lambda m, x: x.mul(m.w), w=weight(4)), floats(6, 4)(), {"w"})


def test_the_wider_dtype_of_an_outer_counts():
    model, x = Lambda(lambda m, x: Cube.apply(x, m.w), w=weight(4, 4)).eval(), TOKENS()
    per_sample_rule(Cube)(lambda g, x, w: {"w": Outer(x, g.sign().bfloat16())})
    got = mas_importance(model, [x])
    per_sample_rule(Cube)(lambda g, x, w: {"w": torch.einsum("nto,nti->noi", g.sign(), x)})
    assert_importance(got, {name: value.double() for name, value in mas_importance(model, [x]).items()}, roundings=32)


# ── where the samples are ──


@pytest.mark.parametrize("rule", [outer, explicit])
def test_several_rows_for_each_sample(rule):
    def windows(m, x):
        return Cube.apply(x.flatten(0, 1), m.w).view(x.shape)

    def of_positions(m, x):
        return Cube.apply(x.unsqueeze(2).expand(-1, -1, 2, -1).flatten(0, 1), m.w).sum(1).view(x.shape)

    per_sample_rule(Cube)(rule)
    assert_by_rule(between(windows, w=weight(4, 4)), TOKENS(), {"w"})
    assert_by_rule(between(of_positions, w=weight(4, 4)), TOKENS(), {"w"})


def test_samples_elsewhere():
    def minor(m, x):
        return Cube.apply(x.transpose(0, 1).flatten(0, 1), m.w).view(3, -1, 4).transpose(0, 1)

    def time_major(m, x):
        return Cube.apply(x.transpose(0, 1), m.w).transpose(0, 1)

    per_sample_rule(Cube)(outer)
    for middle in (minor, time_major):
        model = between(middle, w=weight(4, 4)).double().eval()
        assert_exact(model, TOKENS().double(), slow={"w"})
        assert "samples in dimension 0" in mas_importance(model, [TOKENS().double()]).report["w"][1]


class Doubled(torch.autograd.Function):
    """Writes into x."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x.clone(), w)
        ctx.mark_dirty(x)
        return x.mul_(w)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w, (g * x).flatten(0, -2).sum(0)


def test_a_function_that_writes_into_its_argument():
    def middle(m, x):
        x = x * 1
        Doubled.apply(x, m.w)
        return x

    per_sample_rule(Doubled)(lambda grad_output, x, w: {"w": grad_output})
    model = between(middle, w=weight(4)).double().eval()
    assert_exact(model, TOKENS().double(), slow={"w"})
    assert "Doubled writes into its arguments" in mas_importance(model, [TOKENS().double()]).report["w"][1]


class Keeps(CubeLayer):
    """Has a loss, or a state, beside its result."""

    def __init__(self, how):
        super().__init__()
        self.how, self.seen = how, []

    def forward(self, x, given=None):
        y = super().forward(x)
        if self.how == "attribute":
            self.shift.loss = y.square().mean(1, keepdim=True)
        elif self.how == "list":
            self.seen.append(y)
        elif self.how == "argument":
            given.append(y)
        return y


@pytest.mark.parametrize("how", ["attribute", "list", "argument"])
def test_a_module_that_keeps_tensors(how):
    def middle(m, x):
        given = []
        y = m.cube(x, given)
        return y + (m.cube.shift.loss if how == "attribute" else (given or m.cube.seen)[-1])

    per_sample_rule(CubeLayer)(of_layer)
    model = between(middle, cube=Keeps(how)).double().eval()
    assert_exact(model, TOKENS().double(), slow={"cube.w", "cube.shift.bias"})
    assert "keeps tensors" in mas_importance(model, [TOKENS().double()]).report["cube.w"][1]
