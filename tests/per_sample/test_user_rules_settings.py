"""Rules that users register: checkpoints, autocast, verify, errors, what is left behind, and the README's example."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastewc import Outer, fisher_importance, mas_importance, per_sample_rule, signal_importance
from tests.per_sample.checking import Cube, assert_exact, assert_importance, naive, paths, scales_of, weight
from tests.per_sample.own_layers import (
    TOKENS,
    CubeLayer,
    Pair,
    assert_by_rule,
    between,
    cube_op,
    middles,
    of_layer,
    of_op,
    of_pair,
    outer,
)

# ── settings ──


@pytest.fixture(params=["function", "module", "operator"])
def model(request):
    per_sample_rule(Cube)(outer)
    per_sample_rule(CubeLayer)(of_layer)
    per_sample_rule(cube_op)(of_op)
    return middles()[request.param].eval()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch, where there is no gradient at all
@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_a_checkpoint(model, reentrant):
    whole, inner = model.function, model.double()
    inner.function = lambda m, x: (
        checkpoint(whole, m, m.a(x), use_reentrant=reentrant)
        + checkpoint(whole, m, x.cos().requires_grad_(), use_reentrant=reentrant)
    )
    names = {name for name, _ in inner.named_parameters() if not name.startswith(("a.", "out."))}
    assert_by_rule(inner, TOKENS(), names)


def test_autocast(model):
    x = TOKENS()
    with torch.autocast("cpu", torch.bfloat16):
        got = mas_importance(model, [x])
        oracle = naive(model, lambda i: [(1.0, model(x[i : i + 1]).float().square().sum())], len(x), power=1)
    assert_importance(got, oracle, roundings=64, dtype=torch.bfloat16, scales=scales_of(oracle, 1))
    assert paths(got)["fused"] == set(got)


def test_rules_see_the_autocast_of_their_forward(rules):
    dtypes = []

    @per_sample_rule(Cube)
    def rule(grad_output, x, w):
        dtypes.append((x @ w.T).dtype)
        return outer(grad_output, x, w)

    def middle(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            return Cube.apply(x, m.w).float()

    mas_importance(between(middle, w=weight(4, 4)).eval(), [TOKENS()])
    assert set(dtypes) == {torch.bfloat16}


def test_float32(model):
    x = TOKENS()
    oracle = naive(model, lambda i: [(1.0, model(x[i : i + 1]).square().sum())], len(x), power=1)
    assert_importance(mas_importance(model, [x]), oracle, scales=scales_of(oracle, 1))


def test_many_backwards_of_one_forward(model):
    model, x = model.double(), TOKENS().double()[:, 0]
    x = x.unsqueeze(1)
    got = fisher_importance(model, [x], labels="expected")
    assert_importance(got, dict(fisher_importance(model, [x], labels="expected", impl="reference")))
    assert paths(got)["fused"] == set(got)


def test_a_forward_that_was_replaced_on_the_module_goes_function_by_function(rules):
    per_sample_rule(Pair)(of_pair)
    model = between(lambda m, x: m.pair(x), pair=Pair())
    forward = model.pair.forward
    model.pair.forward = lambda x: checkpoint(forward, x, use_reentrant=False)
    assert_by_rule(model, TOKENS(), set())


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_inside_of_a_module_is_refused(reentrant):
    class Checkpointed(Pair):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=reentrant)

    per_sample_rule(Pair)(of_pair)
    model = between(lambda m, x: m.pair(x), pair=Checkpointed()).double().eval()
    with pytest.raises(RuntimeError, match="a checkpoint computes in backward what the forward did not"):
        mas_importance(model, [TOKENS().double()])


def test_an_alias_of_apply_goes_sample_by_sample():
    alias = Cube.apply
    per_sample_rule(Cube)(outer)
    assert_exact(between(lambda m, x: alias(x, m.w), w=weight(4, 4)).double().eval(), TOKENS().double(), slow={"w"})


def test_where_no_rule_is_used(rules):
    def never(*_):
        raise AssertionError("asked")

    per_sample_rule(Cube)(never)
    per_sample_rule(nn.Linear)(never)
    model = between(lambda m, x: Cube.apply(x, m.w), w=weight(4, 4)).eval()
    mas_importance(model, [TOKENS()], impl="reference")
    signal_importance(model, [TOKENS()], exclude="w")


def test_verify_finds_a_wrong_rule():
    model = between(lambda m, x: Cube.apply(x, m.w), w=weight(4, 4)).double().eval()
    x, y = TOKENS().double(), torch.randint(0, 3, (6, 3))
    per_sample_rule(Cube)(outer)
    fisher_importance(model, [(x, y)], verify=True)
    mas_importance(model, [x], verify=True)
    per_sample_rule(Cube)(lambda grad_output, x, w: {"w": Outer(x, grad_output)})
    with pytest.raises(RuntimeError, match=r"verify=True.*: w \("):
        fisher_importance(model, [(x, y)], verify=True)
    with pytest.raises(RuntimeError, match=r"verify=True.*: w \("):
        mas_importance(model, [x], verify=True)


# ── what is left behind, and errors ──


class Own(torch.autograd.Function):
    """With an apply of its own."""

    forward, backward = Cube.forward, Cube.backward

    @classmethod
    def apply(cls, x, w):
        return super().apply(x, w)


def test_apply_is_the_class_own_again_and_others_never_change():
    other = type("Other", (Cube,), {})
    seen = []

    def middle(m, x):
        seen.append(("apply" in vars(Cube), "apply" in vars(other), vars(Own)["apply"] is not before))
        return Cube.apply(x, m.w) + Own.apply(x, m.v) + other.apply(x, m.u)

    before = vars(Own)["apply"]
    per_sample_rule(Own)(outer)
    model = between(middle, w=weight(4, 4), v=weight(4, 4), u=weight(4, 4)).double().eval()
    assert_exact(model, TOKENS().double(), slow={"w", "u"})
    assert (False, False, True) in seen
    per_sample_rule(Cube)(outer)
    assert_by_rule(model, TOKENS(), {"w", "v", "u"})
    assert (True, False, True) in seen
    assert vars(Own)["apply"] is before
    assert "apply" not in vars(Cube)


def test_a_pass_inside_of_a_pass():
    per_sample_rule(Cube)(outer)
    x = TOKENS().double()
    inner, plain = (between(lambda m, x: Cube.apply(x, m.w), w=weight(4, 4)).double().eval() for _ in range(2))
    wanted = mas_importance(inner, [x])

    def middle(m, h):
        got = mas_importance(inner, [x])
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)
        return Cube.apply(h, m.w)

    model = between(middle, **dict(plain.named_children()), w=plain.w).eval()
    got, oracle = mas_importance(model, [x]), mas_importance(plain, [x])
    assert all(torch.equal(got[name], oracle[name]) for name in oracle)
    assert paths(got)["fused"] == set(oracle)
    assert "apply" not in vars(Cube)


#: what a rule returns for w [4, 4] in a batch of 6 -> the error
WRONG = {
    "no dict": (lambda g, x, w: Outer(x, g), TypeError, "dict from parameter name to gradients, got Outer"),
    "nothing": (lambda g, x, w: {}, ValueError, "gives nothing for w, .* gives nothing. Return None"),
    "another": (lambda g, x, w: {"weight": g}, ValueError, "gives nothing for w, .* gives weight"),
    "unknown": (lambda g, x, w: {"w": None, "v": None}, ValueError, "gives w, v; wanted names among x, w"),
    "a number": (lambda g, x, w: {"w": 1.0}, TypeError, "'w' must be a floating-point tensor.*got float"),
    "integers": (lambda g, x, w: {"w": Outer(x, g.long())}, TypeError, "got torch.float32, torch.int64"),
    "no samples": (lambda g, x, w: {"w": w}, ValueError, r"must be \[6, 4, 4\].*got \[4, 4\]"),
    "transposed": (lambda g, x, w: {"w": x.new_ones(6, 4, 2, 2)}, ValueError, r"must be \[6, 4, 4\]"),
    "positions": (lambda g, x, w: {"w": Outer(x.sum(1), g)}, ValueError, r"got \[6, 4\] and \[6, 3, 4\]"),
    "rows": (lambda g, x, w: {"w": Outer(x[:2], g[:2])}, ValueError, r"inputs \[6, \(T,\) I\].*got \[2, 3, 4\]"),
    "size": (lambda g, x, w: {"w": Outer(x[..., :2], g)}, ValueError, r"of shape \[4, 4\] needs an Outer"),
    "its own": (lambda g, x, w: {}[1], KeyError, "1"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("kind", ["function", "module", "operator"])
def test_wrong_rules_leave_the_model_as_it_was(kind, name):
    rule, error, match = WRONG[name]
    model = middles()[kind].eval()
    if kind == "module":
        model.cube.shift.bias.requires_grad_(False)
    per_sample_rule(Cube)(rule)
    per_sample_rule(cube_op)(rule)
    per_sample_rule(CubeLayer)(lambda g, layer, x: rule(g, x, layer.w))
    before = [(dict(vars(m)), dict(m._parameters)) for m in model.modules()]
    match = match.replace("among x, w", "among w, shift.bias" if kind == "module" else "among x, w")
    with pytest.raises(error, match=match):
        mas_importance(model, [TOKENS()])
    for module, (attributes, parameters) in zip(model.modules(), before, strict=True):
        assert vars(module) == attributes
        assert all(module._parameters[key] is p for key, p in parameters.items())
    assert "apply" not in vars(Cube)
    assert_importance(mas_importance(model, [TOKENS()], impl="reference"), naive_of(model))


def naive_of(model):
    torch.manual_seed(0)
    middles(), TOKENS()  # the same numbers as the test has drawn
    x = TOKENS()
    return naive(model, lambda i: [(1.0, model(x[i : i + 1]).square().sum())], len(x), power=1)


def test_a_name_for_a_parameter_and_an_argument():
    class Clash(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = weight(4, 4)

        def forward(self, x, w):
            return x @ self.w @ w

    per_sample_rule(Clash)(lambda grad_output, layer, x, w: {"w": None})
    model = between(lambda m, x: m.clash(x, m.w), clash=Clash(), w=weight(4, 4)).eval()
    with pytest.raises(ValueError, match="w names both a parameter and an argument"):
        mas_importance(model, [TOKENS()])


@pytest.mark.parametrize(
    "target",
    [None, "aten::linear", nn.Linear(1, 1), Cube.apply, outer, nn.Module, torch.autograd.Function, int],
    ids=str,
)
def test_targets_of_another_kind(target):
    with pytest.raises(TypeError, match="a per-sample rule is for a"):
        per_sample_rule(target)


@pytest.mark.parametrize("target", [torch.Tensor.add_, torch.ops.aten.add_, torch.Tensor.__setitem__], ids=str)
def test_targets_that_write(target):
    with pytest.raises(TypeError, match="writes into its arguments"):
        per_sample_rule(target)


def test_rules_that_are_no_functions(rules):
    before = dict(rules)
    with pytest.raises(TypeError, match=r"function of \(grad_output, \*arguments\), got \{\}"):
        per_sample_rule(Cube)({})
    assert rules == before
    assert per_sample_rule(Cube)(outer) is outer


def test_the_example_of_the_readme(capsys):
    text = (Path(__file__).parents[2] / "README.md").read_text()
    (code,) = re.findall(r"### Rules for your own layers.*?```python\n(.*?)```", text, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert re.findall(r"print\(.*\)  # (.*)\n", code) == capsys.readouterr().out.splitlines()
