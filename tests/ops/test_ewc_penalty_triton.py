"""The penalty ops in Triton: cases, hold-back, statistics, layouts and dtypes, exact results.

On CPU tensors through Triton's interpreter, in a process of its own, and on a GPU as compiled.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastewc import _dispatch
from fastewc.ops import _multi_tensor as multi
from fastewc.ops.ewc_penalty import reference
from fastewc.ops.ewc_penalty.cases import CASES, LAMBDA, LR, Case
from fastewc.ops.ewc_penalty.schema import SUMS
from fastewc.testing import assert_all_within_roundings, sum_roundings
from tests.ops import interpreter
from tests.ops.interpreter import DEVICE, needs_kernels
from tests.ops.test_importance_codes import codes_of, laid_out

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
VARIANTS = ["plain", "stabilized"]
# Around vectors (16), narrow tiles (128) and tiles (512 and 1,024); the last gives a program several tiles.
SIZES = (0, 1, 15, 16, 17, 63, 64, 65, 127, 129, 511, 512, 513, 1023, 1024, 1025, 20_007)
Lists = tuple[list[Tensor], ...]


@pytest.fixture(autouse=True)
def cpu_tensors_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_dispatch._KERNELS, ("ewc_penalty", "triton"), ("cpu", "cuda"))
    multi._tables.clear()


@pytest.fixture
def op():
    from fastewc.ops.ewc_penalty import triton

    return triton


def test_in_the_interpreter():
    interpreter.run(__file__)


def inputs(dtype: torch.dtype, *sizes: int) -> Lists:
    """Params, importances, anchors, gradients; αλΩ from 1e-9 to 1e3."""
    case = Case(tuple((size,) for size in sizes), "plain")
    held = case.make_inputs(dtype, DEVICE)
    return (*held, [torch.randn(w.shape, dtype=torch.float64).to(w) for w in held[0]])


def doubles(*lists: list[Tensor]) -> Lists:
    return tuple([t.double().cpu().clone() for t in entries] for entries in lists)


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


@needs_kernels
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_value_and_gradients_of_the_cases(case: Case):
    for dtype in case.dtypes:
        got, scale = case.run("triton", dtype, DEVICE), case.error_scale(dtype)
        assert_all_within_roundings(got, case.oracle(dtype), roundings=case.roundings, error_scale=scale)
        assert same(got, case.run("triton", dtype, DEVICE))


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_and_hold_back_at_every_size(op, dtype: torch.dtype):
    params, importances, anchors, grads = inputs(dtype, *SIZES)
    lrs = [LR * (1 + i % 3) for i in range(len(params))]
    arithmetic = torch.promote_types(dtype, torch.float32)
    exact = doubles(params, importances, anchors, grads)
    pulls = [
        reference.penalty_grad(w, omega, anchor, LAMBDA, lr, "stabilized")
        for w, omega, anchor, lr in zip(*exact[:3], lrs, strict=True)
    ]
    stiff = [
        reference.stiffness(omega.clone(), LAMBDA, lr, "stabilized") for omega, lr in zip(exact[1], lrs, strict=True)
    ]
    scale = [
        g.abs() + 2 * c * (w.abs() + anchor.abs())
        for g, c, w, anchor in zip(exact[3], stiff, exact[0], exact[2], strict=True)
    ]
    factor = torch.tensor(2.0, device=DEVICE)
    got = op.ewc_penalty_grads(params, importances, anchors, grads, LAMBDA, lrs, None, "stabilized", True, factor)
    wanted = [g - 2 * pull for g, pull in zip(exact[3], pulls, strict=True)]
    assert_all_within_roundings(got, wanted, roundings=12, error_scale=scale, dtype=arithmetic)

    op.ewc_hold_back_(params, anchors, importances, LAMBDA, lrs, None, None)
    wanted = [
        reference.held_back(w, anchor, omega, LAMBDA, lr) for w, omega, anchor, lr in zip(*exact[:3], lrs, strict=True)
    ]
    scale = [w.abs() + anchor.abs() for w, anchor in zip(exact[0], exact[2], strict=True)]
    assert_all_within_roundings(params, wanted, roundings=8, error_scale=scale, dtype=arithmetic)


@needs_kernels
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_value_and_statistics_at_every_size(op, dtype: torch.dtype, variant: str):
    params, importances, anchors, _ = inputs(dtype, *SIZES)
    lrs = [LR] * len(params)
    n = sum(SIZES)
    value = op.ewc_penalty_value(params, importances, anchors, LAMBDA, lrs, None, variant)
    terms = op.ewc_stats_terms(params, importances, anchors, LAMBDA, lrs, None, variant)
    exact = doubles(params, importances, anchors)
    wanted = reference.ewc_stats_terms(*exact, LAMBDA, lrs, None, variant)
    assert terms.dtype == torch.float64 and terms.shape == wanted.shape
    stiff = [reference.stiffness(omega.clone(), LAMBDA, LR, variant) for omega in exact[1]]
    sizes = [w.abs() + anchor.abs() for w, anchor in zip(exact[0], exact[2], strict=True)]
    scale = [
        torch.stack([(c * size * size).sum() for c, size in zip(stiff, sizes, strict=True)]).sum(),
        torch.stack([(size * size).sum() for size in sizes]).sum(),
    ]
    roundings = sum_roundings(n) + 8
    arithmetic = torch.promote_types(dtype, torch.float32)
    assert_all_within_roundings(
        [value, terms[1]], [wanted[0], wanted[1]], roundings=roundings, error_scale=scale, dtype=arithmetic
    )
    assert torch.equal(terms[0].to(value.dtype), value)
    assert terms[2] == wanted[2] and terms[SUMS:].sum() == n
    assert_all_within_roundings([terms[3]], [wanted[3]], roundings=4, dtype=arithmetic)
    # A rounding may move an importance over the border of its bin, and no farther.
    moved = (terms.cpu() - wanted)[SUMS:].cumsum(0)
    assert terms[SUMS] == wanted[SUMS] and moved.abs().max() <= 2 and moved.count_nonzero() <= n * 1e-3
    assert same([terms], [op.ewc_stats_terms(params, importances, anchors, LAMBDA, lrs, None, variant)])


@needs_kernels
@pytest.mark.parametrize("x", [0.0, 1e-45, 1e-38, 0.5, 1.0, 3e38])
def test_extreme_importances_are_counted(op, x: float):
    ones = [torch.ones(3, device=DEVICE)]
    omega = [torch.full((3,), x, device=DEVICE)]
    lists = (ones, omega, ones)
    got = op.ewc_stats_terms(*lists, 1.0, [1.0], None, "stabilized")
    assert torch.equal(got.cpu(), reference.ewc_stats_terms(*doubles(*lists), 1.0, [1.0], None, "stabilized"))


@needs_kernels
def test_live_learning_rates_give_the_same_bits(op):
    params, importances, anchors, _ = inputs(torch.float32, 5, 300)
    others = inputs(torch.bfloat16, 7, 0, 20)  # rows of two launches, each with its own places in live_lrs
    params, importances, anchors = (a + b for a, b in zip((params, importances, anchors), others[:3], strict=True))
    lrs = [0.1, 0.02, 0.3, 0.5, 0.7]
    live = torch.tensor(lrs, dtype=torch.float64, device=DEVICE)
    lists = (params, importances, anchors)
    for variant in VARIANTS:
        results = []
        for alphas in ((lrs, None), ([], live)):
            moved = [w.clone() for w in params]
            op.ewc_hold_back_(moved, anchors, importances, LAMBDA, *alphas, None)
            results.append(
                [
                    op.ewc_penalty_value(*lists, LAMBDA, *alphas, variant),
                    *op.ewc_penalty_grads(*lists, [], LAMBDA, *alphas, variant, False, None),
                    *moved,
                    op.ewc_stats_terms(*lists, LAMBDA, *alphas, variant),
                ]
            )
        assert same(*results)


@needs_kernels
def test_a_finite_float16_gradient_stays_finite(op):
    w = torch.full((6,), 2.0, dtype=torch.float16, device=DEVICE)
    own = torch.tensor([0.0, 65504.0, -65504.0, torch.inf, -torch.inf, torch.nan], dtype=torch.float16, device=DEVICE)
    importances = [torch.full((6,), 1e6, device=DEVICE)]
    anchors = [torch.zeros_like(w)]
    lists = ([w], importances, anchors, [own])
    (up,) = op.ewc_penalty_grads(*lists, 1.0, [0.1], None, "plain", False, None)
    (down,) = op.ewc_penalty_grads(*lists, 1.0, [0.1], None, "plain", True, None)
    assert up.tolist()[:5] == [65504.0, 65504.0, 65504.0, torch.inf, -torch.inf] and up[5].isnan()
    assert down.tolist()[:5] == [-65504.0, -65504.0, -65504.0, torch.inf, -torch.inf] and down[5].isnan()


@needs_kernels
def test_hold_back_is_exact_at_both_ends_and_skips(op):
    w, target = torch.randn(2, 257, device=DEVICE)
    for dtype in DTYPES:
        for omega, wanted in ((0.0, w), (torch.finfo(torch.float32).max, target)):
            moved, importance = [w.to(dtype)], [torch.full((257,), omega, device=DEVICE)]
            op.ewc_hold_back_(moved, [target.to(dtype)], importance, 8.0, [8.0], None, None)
            assert same(moved, [wanted.to(dtype)])
    moved = [w.clone()]
    skip = torch.tensor(True, device=DEVICE)
    op.ewc_hold_back_(moved, [target], importance, 8.0, [8.0], None, skip)
    assert same(moved, [w])
    op.ewc_hold_back_(moved, [target], importance, 8.0, [8.0], None, ~skip)
    assert same(moved, [target])


def relaid(how: Callable[[Tensor], Tensor], *lists: list[Tensor]) -> Lists:
    return tuple([how(t) for t in entries] for entries in lists)


def shifted(t: Tensor) -> Tensor:
    return torch.zeros(t.numel() + 1, dtype=t.dtype, device=t.device)[1:].view(t.shape).copy_(t)


def sliced(t: Tensor) -> Tensor:
    return torch.full((*t.shape, 2), 7.0, dtype=t.dtype, device=t.device)[..., 1].copy_(t)


def turned(t: Tensor) -> Tensor:
    return t.transpose(0, -1).contiguous().transpose(0, -1)


@needs_kernels
@pytest.mark.parametrize("how", [shifted, sliced, turned])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts_change_no_bit(op, how: Callable[[Tensor], Tensor], dtype: torch.dtype):
    case = Case(((3, 5, 7), (40, 33), (1, 9)), "stabilized")
    held = case.make_inputs(dtype, DEVICE)
    grads = [torch.ones_like(w) for w in held[0]]
    lrs = [LR] * 3

    def results(params: list[Tensor], importances: list[Tensor], anchors: list[Tensor], grads: list[Tensor]):
        lists = (params, importances, anchors)
        pulled = op.ewc_penalty_grads(*lists, grads, LAMBDA, lrs, None, "stabilized", False, None)
        terms = op.ewc_stats_terms(*lists, LAMBDA, lrs, None, "stabilized")[2:]  # sums depend on the order
        op.ewc_hold_back_(params, anchors, importances, LAMBDA, lrs, None, None)
        return [*pulled, terms, *params]

    views = relaid(how, *held, grads)
    one = relaid(how, held[1])
    mixed = ([w.clone() for w in held[0]], one[0], held[2], grads)
    plain = results([w.clone() for w in held[0]], *held[1:], grads)
    assert same(plain, results(*views)) and same(plain, results(*mixed))
    if how is sliced:
        assert all(bool((w._base[..., 0] == 7.0).all()) for w in views[0])


@needs_kernels
def test_gradients_lie_as_their_parameters(op):
    params = [
        torch.randn(2, 3, 4, 5, device=DEVICE).contiguous(memory_format=torch.channels_last),
        torch.ones((), device=DEVICE),
    ]
    lists = (params, [torch.ones_like(w) for w in params], [torch.zeros_like(w) for w in params])
    pulls = op.ewc_penalty_grads(*lists, [], 1.0, [0.1, 0.1], None, "plain", False, None)
    assert same(pulls, params) and [p.stride() for p in pulls] == [w.stride() for w in params]


@needs_kernels
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
def test_any_dtype_in_any_list(op, grad_dtype: torch.dtype):
    params, importances, anchors, grads = inputs(torch.float32, 40, 300, 5, 17)
    kinds = (torch.bfloat16, torch.float64, torch.float16, torch.float32)
    lists = (
        [w.to(kinds[i % 4]) for i, w in enumerate(params)],
        [omega.to(kinds[1 + 2 * (i % 2)]) for i, omega in enumerate(importances)],
        [anchor.to(kinds[3 - i % 4]) for i, anchor in enumerate(anchors)],
    )
    grads = [g.to(grad_dtype) for g in grads]
    lrs = [LR] * 4
    got = op.ewc_penalty_grads(*lists, grads, LAMBDA, lrs, None, "stabilized", False, None)
    exact = doubles(*lists, grads)
    wanted = reference.ewc_penalty_grads(*exact, LAMBDA, lrs, None, "stabilized", False, None)
    scale = [g.abs() + (w.abs() + anchor.abs()) / LR for w, _, anchor, g in zip(*exact, strict=True)]  # αc ≤ 1
    assert [g.dtype for g in got] == [grad_dtype] * 4
    assert_all_within_roundings(got, wanted, roundings=8, error_scale=scale, dtype=torch.float32)
    value = op.ewc_penalty_value(*lists, LAMBDA, lrs, None, "stabilized")
    assert value.dtype == torch.float64  # some importances are
    moved = [w.clone() for w in lists[0]]
    op.ewc_hold_back_(moved, lists[2], lists[1], LAMBDA, lrs, None, None)
    wanted = [reference.held_back(w, a, o, LAMBDA, LR) for w, o, a in zip(*exact[:3], strict=True)]
    scale = [w.abs() + a.abs() for w, _, a, _ in zip(*exact, strict=True)]
    assert [w.dtype for w in moved] == [w.dtype for w in lists[0]]
    assert_all_within_roundings(moved, wanted, roundings=8, error_scale=scale, dtype=torch.float32)


@needs_kernels
def test_nothing_but_empty_tensors(op):
    lists = tuple([torch.zeros(0, 3, device=DEVICE)] for _ in range(3))
    assert op.ewc_penalty_value(*lists, 1.0, [0.1], None, "plain").item() == 0
    (pull,) = op.ewc_penalty_grads(*lists, [], 1.0, [0.1], None, "plain", False, None)
    assert pull.shape == (0, 3)
    op.ewc_hold_back_(*lists, 1.0, [0.1], None, None)
    assert op.ewc_stats_terms(*lists, 1.0, [0.1], None, "plain").count_nonzero() == 0


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_codes_give_the_bits_of_the_numbers_that_they_stand_for(op, dtype: torch.dtype):
    params, layouts = laid_out()
    codes = codes_of(params, layouts)
    numbers = [one.decoded(torch.promote_types(dtype, torch.float32)) for one in codes]
    params = [p.to(DEVICE, dtype) for p in params]
    anchors = [(1.25 * p).bfloat16() for p in params]
    rest = (LAMBDA, [LR] * len(params), None)
    got, sums = [], []
    for omegas in (codes, numbers):
        held = (params, [omega.to(torch.device(DEVICE)) for omega in omegas], anchors)
        back = [p.clone() for p in params]
        op.ewc_hold_back_(back, anchors, held[1], *rest, None)
        got.append([*back, *op.ewc_penalty_grads(*held, [], *rest, "stabilized", False, None)])
        terms = op.ewc_stats_terms(*held, *rest, "plain")
        sums.append(torch.cat([op.ewc_penalty_value(*held, *rest, "plain").double().reshape(1), terms[:2]]))
        got[-1].append(terms[2:])
    assert same(*got)
    # Tiles are smaller beside codes, so sums are formed in another order.
    roundings = sum_roundings(sum(p.numel() for p in params)) + 8
    assert_all_within_roundings(sums[:1], sums[1:], roundings=roundings, dtype=torch.float32)
