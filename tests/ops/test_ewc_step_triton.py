"""ewc_step in Triton: cases, sizes, layouts, dtypes, exact results; tests/ops/test_multi_tensor.py has the tables.

On CPU tensors through Triton's interpreter, in a process of its own, and on a GPU as compiled.
"""

import dataclasses

import pytest
import torch
from torch import Tensor

from fastewc import _dispatch
from fastewc.ops import _multi_tensor as multi
from fastewc.ops.ewc_step import StepRule, StepTensors, cases, ewc_step, halves, whole
from fastewc.ops.ewc_step.cases import CASES, Case
from fastewc.testing import assert_all_within_roundings
from tests.ops import interpreter
from tests.ops.interpreter import DEVICE, needs_kernels
from tests.ops.split_steps import RULES, VARIANTS, Setting, check_same_bits
from tests.ops.test_importance_codes import codes_of, laid_out

BY_ID = {case.id: case for case in CASES}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SGD = StepRule("sgd", lr=0.5, ewc_lambda=2.0)
# Around vectors (16), narrow tiles (128) and tiles (512 and 1,024); the last gives a program several tiles.
SIZES = (0, 1, 3, 7, 8, 15, 16, 17, 63, 64, 65, 127, 129, 511, 512, 513, 1023, 1024, 1025, 20_007)


@pytest.fixture(autouse=True)
def cpu_tensors_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_dispatch._KERNELS, ("ewc_step", "triton"), ("cpu", "cuda"))
    multi._tables.clear()


def test_in_the_interpreter():
    interpreter.run(__file__)


def check(case: Case, dtype: torch.dtype) -> None:
    assert_all_within_roundings(
        case.run("triton", dtype, DEVICE),
        case.oracle(dtype),
        roundings=case.roundings,
        error_scale=case.error_scale(dtype),
        dtype=torch.promote_types(dtype, torch.float32),
    )


def written(t: StepTensors) -> list[Tensor]:
    return [tensor for _, _, tensor in cases.columns(t)]


def copied(t: StepTensors) -> StepTensors:
    """On the device, in the same layouts."""
    lists = {name: [x if x is None else x.clone() for x in entries] for name, entries in vars(t).items()}
    return cases.converted(StepTensors(**lists), None, DEVICE)


def step(rule: StepRule, tensors: StepTensors) -> list[Tensor]:
    """Everything that a step in Triton writes, of copies."""
    t = copied(tensors)
    ewc_step(rule, t, impl="triton")
    return written(t)


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x.cpu(), y.cpu()) for x, y in zip(a, b, strict=True))


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_case_is_within_counted_roundings_of_float64(case: Case, dtype: torch.dtype):
    check(case, dtype)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_sizes_around_every_border(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cases, "SHAPES", [(size,) for size in SIZES])
    check(BY_ID["adamw-stabilized"], dtype)


@needs_kernels
def test_five_hundred_tensors(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cases, "SHAPES", [(i % 10 // 9 * (i % 7),) for i in range(500)])  # nine of ten are empty
    check(BY_ID["adam-plain"], torch.float32)


def inside(t: Tensor, begin: int, stride: int) -> tuple[Tensor, Tensor]:
    """A copy of a tensor of 0 or 1 dimensions inside a storage whose other elements are 7; and that storage."""
    storage = torch.full((begin + stride * t.numel() + 1,), 7.0, dtype=t.dtype, device=DEVICE)
    places = storage[begin : begin + stride * t.numel() : stride]
    return places.copy_(t.flatten()).view(t.shape), storage


@needs_kernels
@pytest.mark.parametrize(("begin", "stride"), [(1, 1), (4, 1), (0, 2), (1, 3)])
@pytest.mark.parametrize("name", ["adamw-amsgrad-proximal", "nesterov-stabilized"])
def test_views_give_the_same_bits_and_their_neighbours_stay(
    name: str, begin: int, stride: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cases, "SHAPES", [(), (0,), (1,), (17,), (300,), (2100,)])
    rule, inputs = BY_ID[name].rule, BY_ID[name].inputs(torch.float32)
    lists, storages = {}, []
    for column, entries in vars(inputs).items():
        pairs = [(None, None) if t is None else inside(t, begin, stride) for t in entries]
        lists[column] = [view for view, _ in pairs]
        storages += [pair for pair in pairs if pair[0] is not None]
    views = StepTensors(**lists)
    ewc_step(rule, views, impl="triton")
    assert same(step(rule, inputs), written(views))
    for view, storage in storages:
        view.fill_(7.0)
        assert bool((storage == 7.0).all())


@needs_kernels
def test_new_gradients_and_reused_memory_are_seen():
    # Numbers so short that float32 is exact: no rounding hides an old address.
    rule = StepRule("sgd", lr=0.5, momentum=0.5)
    for size in (17, 300, 17, 64, 300):  # freed memory comes again, with other sizes
        sizes = (size, 5, 0)
        w = [torch.randint(-8, 8, (n,)).float() for n in sizes]
        exact = StepTensors(params=w, momentum_buffers=[None] * 3)
        ours = copied(exact)
        for _ in range(3):
            grads = [torch.randint(-8, 8, (n,)).float() for n in sizes]
            ewc_step(rule, dataclasses.replace(exact, grads=grads), impl="reference")
            ewc_step(rule, dataclasses.replace(ours, grads=[g.to(DEVICE) for g in grads]), impl="triton")
        assert same(written(exact), written(ours))


@needs_kernels
@pytest.mark.parametrize("whose", ["all", "params", "grads", "importances"])
def test_orders_of_dimensions_change_no_bit(whose: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cases, "SHAPES", [(4, 6, 5, 3), (2, 1, 8, 1)])
    monkeypatch.setattr(cases, "laid_out", lambda t: t)
    rule, inputs = BY_ID["adamw-stabilized"].rule, BY_ID["adamw-stabilized"].inputs(torch.float32)
    for order in ((0, 2, 3, 1), (3, 2, 1, 0)):  # channels_last, and all reversed
        back = torch.tensor(order).argsort().tolist()
        lists = {}
        for name, entries in vars(inputs).items():
            turn = whose in ("all", name)
            lists[name] = [
                t.permute(order).contiguous().permute(back) if turn and t is not None and t.ndim == 4 else t
                for t in entries
            ]
        assert same(step(rule, inputs), step(rule, StepTensors(**lists)))


class Mixed(Case):
    """Dtypes that no kernel has: tensors of the usual ones stand in for them."""

    def inputs(self, dtype: torch.dtype) -> StepTensors:
        t = super().inputs(dtype)
        kinds = (torch.bfloat16, torch.float64, torch.float16, torch.float32)
        return dataclasses.replace(
            t,
            grads=[g.to(kinds[i % 4]) for i, g in enumerate(t.grads)],
            anchors=[a if a is None else a.to(kinds[i % 4]) for i, a in enumerate(t.anchors)],
            importances=[o if o is None else o.to(kinds[i % 2]) for i, o in enumerate(t.importances)],
            exp_avgs=[m.double() for m in t.exp_avgs],
            steps=[count.to(kinds[1 + 2 * (i % 2)]) for i, count in enumerate(t.steps)],
        )


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_dtype_in_any_list(dtype: torch.dtype):
    check(Mixed("mixed", BY_ID["adamw-proximal"].rule), dtype)


@needs_kernels
def test_parameters_of_several_dtypes_in_one_call():
    case = BY_ID["adamw-stabilized"]
    parts = [case.inputs(dtype) for dtype in DTYPES]
    together = StepTensors(**{name: [t for part in parts for t in getattr(part, name)] for name in vars(parts[0])})
    got = cases.converted(together, None, DEVICE)
    ewc_step(case.rule, got, impl="triton")
    alone = [cases.converted(part, None, DEVICE) for part in parts]
    for part in alone:
        ewc_step(case.rule, part, impl="triton")
    for name, entries in vars(got).items():
        wanted = [t for part in alone for t in getattr(part, name)]
        assert all(x is y or torch.equal(x, y) for x, y in zip(entries, wanted, strict=True)), name


@needs_kernels
@pytest.mark.parametrize("kind", [Case, Mixed])
@pytest.mark.parametrize("name", ["sgd-stabilized", "momentum-plain", "adam-amsgrad"])
def test_found_inf_on_the_device_changes_nothing(name: str, kind: type[Case]):
    from fastewc.ops.ewc_step import triton  # the public function reads the flag of CPU tensors itself

    before = kind(name, BY_ID[name].rule).inputs(torch.float32)
    after = copied(before)
    flag = torch.tensor(1.0, device=DEVICE)
    triton.ewc_step(BY_ID[name].rule, after, clip_coef=None, grad_scale=None, found_inf=flag)
    for entries, kept in zip(vars(after).values(), vars(before).values(), strict=True):
        assert all(x is y or torch.equal(x.cpu(), y) for x, y in zip(entries, kept, strict=True))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["nesterov-stabilized", "adamw-proximal", "adam-amsgrad"])
def test_numbers_and_device_scalars_give_the_same_bits(name: str, dtype: torch.dtype):
    rule, inputs = BY_ID[name].rule, BY_ID[name].inputs(dtype)
    fields = ("lr", "ewc_lambda", "weight_decay")
    live = {field: torch.tensor(getattr(rule, field), dtype=torch.float64, device=DEVICE) for field in fields}
    assert same(step(rule, inputs), step(dataclasses.replace(rule, **live), inputs))


@needs_kernels
@pytest.mark.parametrize("variant", ["plain", "stabilized", "proximal", "wva"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_importance_and_zero_lambda_are_exact_no_ops(variant: str, dtype: torch.dtype):
    rule = dataclasses.replace(BY_ID["nesterov-plain"].rule, variant=variant)
    w, g, anchor = torch.randn(3, 257).to(dtype).unbind()
    free = step(rule, StepTensors(params=[w], grads=[g], momentum_buffers=[None]))
    for ewc_lambda, omega in ((3.0, 0.0), (0.0, 3.0)):
        importance = torch.full((257,), omega, dtype=torch.promote_types(dtype, torch.float32))
        held = StepTensors(params=[w], grads=[g], momentum_buffers=[None], importances=[importance], anchors=[anchor])
        assert same(free, step(dataclasses.replace(rule, ewc_lambda=ewc_lambda), held))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_importances_that_overflow_hold_exactly(dtype: torch.dtype):
    omega, anchor = torch.full((3,), torch.finfo(dtype).max, dtype=dtype), torch.tensor([1.0, 1e-3, -7.0], dtype=dtype)
    w = torch.tensor([0.5, 1e8, 3.0], dtype=dtype)
    t = StepTensors(params=[w], grads=[torch.ones_like(w)], importances=[omega], anchors=[anchor])
    assert same(step(dataclasses.replace(SGD, variant="proximal", lr=8.0), t), [anchor])
    assert same(step(dataclasses.replace(SGD, variant="wva", lr=8.0), t), [w])
    # E2 has c = 1/α there: w⁺ = w − αg − (w − w*).
    moved = step(dataclasses.replace(SGD, variant="stabilized"), t)
    scale = [2 * w.double().abs() + anchor.double().abs() + 0.5]
    wanted = [anchor.double() - 0.5]
    assert_all_within_roundings(moved, wanted, roundings=8, error_scale=scale, dtype=dtype)


@needs_kernels
@pytest.mark.parametrize("beta", [0.9, 0.999, 0.5, 0.0])
def test_bias_corrections_of_float64_are_those_of_python(beta: float):
    # g = v = 0 and ε = 1: w⁺ = −α/(1 − βᵗ) · m.
    counts = (1, 2, 3, 10, 1000, 123_457)
    zeros, ones = [[torch.full((1,), float(i), dtype=torch.float64) for _ in counts] for i in (0, 1)]
    steps = [torch.tensor(float(t - 1)) for t in counts]
    rule = StepRule("adam", lr=1.0, betas=(beta, 0.999), eps=1.0)
    got = step(rule, StepTensors(params=zeros, grads=zeros, exp_avgs=ones, exp_avg_sqs=zeros, steps=steps))
    wanted = [-torch.full((1,), beta, dtype=torch.float64) / (1 - beta**t) for t in counts]
    assert_all_within_roundings(got[: len(counts)], wanted, roundings=3)


@needs_kernels
@pytest.mark.parametrize("variant", ["stabilized", "proximal", "wva"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_give_the_bits_of_the_numbers_that_they_stand_for(variant: str, dtype: torch.dtype):
    """Around blocks of codes, which a program may begin in the middle of, and in every order of elements."""
    params, layouts = laid_out()
    codes = codes_of(params, layouts)
    stored = [codes, [one.decoded(torch.promote_types(dtype, torch.float32)) for one in codes], [*codes]]
    stored[2][::2] = stored[1][::2]  # codes and numbers in one call
    params = [p.to(dtype) for p in params]
    anchors = [(1.25 * p).bfloat16() for p in params]
    rule = dataclasses.replace(SGD, variant=variant)
    results = [step(rule, StepTensors(params, params, importances=list(o), anchors=anchors)) for o in stored]
    assert same(results[0], results[1]) and same(results[2], results[1])
    assert not same(results[0], params)


SETTINGS = [
    Setting(),
    Setting(codes=True),
    Setting(anchor=torch.float32),
    Setting(grad=torch.float32),
    Setting(layout="gaps"),
    Setting(layout="misaligned"),
    Setting(layout="channels_last"),
]


@needs_kernels
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", RULES)
def test_two_halves_are_stepped_as_float32(name: str, variant: str):
    rule = dataclasses.replace(RULES[name], variant=variant)
    for setting in SETTINGS if variant == "stabilized" else SETTINGS[:1]:
        check_same_bits(rule, "triton", dataclasses.replace(setting, steps=5, device=DEVICE))


@needs_kernels
@pytest.mark.parametrize("rest", [-5, 5])
def test_no_remainder_makes_a_nan_of_a_number(rest: int):
    w = torch.tensor([0.0, -0.0, 1.0, torch.inf, -torch.inf, torch.nan]).bfloat16().to(DEVICE)
    low = torch.full((6,), rest, dtype=torch.int16, device=DEVICE)
    t = StepTensors(params=[w.clone()], grads=[torch.zeros_like(w)], remainders=[low])
    wanted = halves(whole(w, low))
    ewc_step(StepRule("sgd", lr=0.0), t, impl="triton")
    assert torch.equal(t.params[0].view(torch.int16), wanted[0].view(torch.int16))
    assert torch.equal(t.remainders[0], wanted[1])


@needs_kernels
def test_any_dtype_beside_halves():
    check(Mixed("mixed", BY_ID["adamw-split"].rule, split=True), torch.bfloat16)
