"""What the tests of the ops don't reach of the CUDA sources; run by tests/ops/test_cuda_on_cpu.py in its own process.

There is one multiprocessor: 16 chunks if there is enough to do, of tiles of 1,024 elements (512 of float64).
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastewc.ops.ewc_penalty import native as penalty_native
from fastewc.ops.ewc_penalty import reference as penalty
from fastewc.ops.ewc_step import cases, native
from fastewc.ops.ewc_step.cases import Case
from fastewc.ops.ewc_step.rule import StepTensors
from fastewc.ops.importance_codes import Codes, encode
from fastewc.testing import assert_all_within_roundings, assert_within_roundings, sum_roundings

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BY_ID = {case.id: case for case in cases.CASES}
# Around vectors and tiles, empty ones between, several chunks of several tiles, and more tensors than one launch takes.
SIZES = (1, 3, 4, 5, 511, 512, 513, 1023, 1024, 1025, 0, 70_001, 0, 40_960, *range(2, 90))


def misaligned(t: Tensor) -> Tensor:
    return torch.zeros(t.numel() + 1, dtype=t.dtype)[1:].copy_(t)


def check(case: Case, dtype: torch.dtype) -> None:
    got = case.run("native", dtype)
    arithmetic = torch.promote_types(dtype, torch.float32)
    assert_all_within_roundings(
        got, case.oracle(dtype), roundings=case.roundings, error_scale=case.error_scale(dtype), dtype=arithmetic
    )


@pytest.mark.parametrize("layout", [lambda t: t, misaligned], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["adamw-stabilized", "nesterov-proximal", "adamw-amsgrad-proximal"])
def test_sizes_around_every_border(name: str, dtype: torch.dtype, layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "SHAPES", [(size,) for size in SIZES])
    monkeypatch.setattr(cases, "laid_out", layout)
    check(BY_ID[name], dtype)


class Mixed(Case):
    """Every list in a dtype of its own."""

    def inputs(self, dtype: torch.dtype) -> StepTensors:
        t = super().inputs(dtype)
        kinds = (torch.bfloat16, torch.float64, torch.float16, torch.float32)
        return replace(
            t,
            grads=[g.to(kinds[i % 4]) for i, g in enumerate(t.grads)],
            anchors=[a if a is None else a.to(kinds[i % 4]) for i, a in enumerate(t.anchors)],
            importances=[o if o is None else o.to(kinds[i % 2]) for i, o in enumerate(t.importances)],
            exp_avgs=[m.double() for m in t.exp_avgs],
            steps=[step.to(kinds[1 + 2 * (i % 2)]) for i, step in enumerate(t.steps)],
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lists_of_other_dtypes(dtype: torch.dtype) -> None:
    check(Mixed("mixed", BY_ID["adam-stabilized"].rule), dtype)


def test_parameters_of_several_dtypes_in_one_call() -> None:
    case = BY_ID["adamw-clip-scale"]
    parts = [case.inputs(dtype) for dtype in DTYPES]
    together = StepTensors(**{name: [e for t in parts for e in getattr(t, name)] for name in vars(parts[0])})
    scalars = {"clip_coef": torch.tensor(0.125), "grad_scale": torch.tensor(256.0)}
    native.ewc_step(case.rule, together, **scalars, found_inf=None)
    alone = []
    for t in parts:
        native.ewc_step(case.rule, t, **scalars, found_inf=None)
        alone += t.params
    assert all(torch.equal(a, b) for a, b in zip(alone, together.params, strict=True))


@pytest.mark.parametrize("flag", [torch.tensor(1.0), torch.tensor(1.0).double(), torch.tensor(True)], ids=str)
@pytest.mark.parametrize("name", ["adamw-amsgrad-proximal", "dampening-decay"])
def test_found_inf_is_read_by_the_kernels(name: str, flag: Tensor) -> None:
    case = BY_ID[name]
    before, after = case.inputs(torch.float32), case.inputs(torch.float32)
    native.ewc_step(case.rule, after, clip_coef=None, grad_scale=None, found_inf=flag)
    for column, i, tensor in cases.columns(before):
        assert torch.equal(tensor, getattr(after, column)[i]), (column, i)
    native.ewc_step(case.rule, after, clip_coef=None, grad_scale=None, found_inf=torch.zeros_like(flag))
    assert not any(torch.equal(a, b) for a, b in zip(before.params, after.params, strict=True) if a.numel())


@pytest.mark.parametrize("name", ["adamw-stabilized", "adam-decay-maximize", "nesterov-wva", "dampening-decay"])
def test_scalars_on_the_device_give_the_same_bits(name: str) -> None:
    case = BY_ID[name]
    live = replace(case.rule, lr=torch.tensor(case.rule.lr, dtype=torch.float64))
    for dtype in DTYPES:
        got, wanted = case.inputs(dtype), case.inputs(dtype)
        native.ewc_step(live, got, clip_coef=None, grad_scale=None, found_inf=None)
        native.ewc_step(case.rule, wanted, clip_coef=None, grad_scale=None, found_inf=None)
        for column, i, tensor in cases.columns(wanted):
            assert torch.equal(tensor, getattr(got, column)[i]), (column, i)


# ---- ewc_penalty ----

LAMBDA = 40.0


def weights(dtype: torch.dtype, anchor_dtype: torch.dtype, sizes: tuple[int, ...] = SIZES) -> list[list[Tensor]]:
    """Params, importances over twelve decades with zeros, anchors, gradients."""
    lists: list[list[Tensor]] = [[], [], [], []]
    for i, size in enumerate(sizes):
        w, anchor, grad = torch.randn(3, size, dtype=torch.float64)
        omega = 10 ** (12 * torch.rand(size, dtype=torch.float64) - 9)
        omega[::5] = 0
        kept = misaligned if i % 3 == 0 else (lambda t: t)
        lists[0].append(kept(w.to(dtype)))
        lists[1].append(omega.to(torch.promote_types(dtype, torch.float32)))
        lists[2].append(kept(anchor.to(anchor_dtype)))
        lists[3].append(grad.to(dtype))
    return lists


def rates(count: int) -> list[float]:
    return [0.01 * (1 + i % 7) for i in range(count)]


PAIRS = [(dtype, other) for dtype in DTYPES for other in {dtype, torch.float32, torch.bfloat16}] + [
    (torch.float32, torch.float64)
]
every_pair = pytest.mark.parametrize(("dtype", "anchor_dtype"), PAIRS, ids=lambda dtype: str(dtype)[6:])
variants = pytest.mark.parametrize("variant", ["plain", "stabilized"])


@every_pair
@variants
def test_value(dtype: torch.dtype, anchor_dtype: torch.dtype, variant: str) -> None:
    params, importances, anchors, _ = weights(dtype, anchor_dtype)
    lrs = rates(len(params))
    op = torch.ops.fastewc.ewc_penalty_value
    got = op(params, importances, [], anchors, LAMBDA, lrs, None, variant)
    live = op(params, importances, [], anchors, LAMBDA, [], torch.tensor(lrs, dtype=torch.float64), variant)
    assert torch.equal(got, live)
    assert got.dtype == importances[0].dtype and got.shape == ()
    oracle, scale = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for w, omega, anchor, lr in zip(params, importances, anchors, lrs, strict=True):
        w, omega, anchor = w.double(), omega.double(), anchor.double()
        oracle += penalty.penalty(w, omega, anchor, LAMBDA, lr, variant)
        scale += penalty.penalty(w.abs(), omega, -anchor.abs(), LAMBDA, lr, variant)
    assert_within_roundings(got, oracle, roundings=sum_roundings(sum(SIZES)) + 8, error_scale=2 * scale)


@every_pair
@variants
@pytest.mark.parametrize("joins", [False, True], ids=["alone", "joined"])
def test_grads(dtype: torch.dtype, anchor_dtype: torch.dtype, variant: str, joins: bool) -> None:
    params, importances, anchors, grads = weights(dtype, anchor_dtype)
    lrs = rates(len(params))
    scale = torch.tensor(0.5)
    got = torch.ops.fastewc.ewc_penalty_grads(
        params, importances, [], anchors, grads if joins else [], LAMBDA, lrs, None, variant, True, scale
    )
    for out, w, omega, anchor, own, lr in zip(got, params, importances, anchors, grads, lrs, strict=True):
        assert out.dtype == dtype
        w, omega, anchor = w.double(), omega.double(), anchor.double()
        own = own.double() if joins else torch.zeros_like(w)
        oracle = own - 0.5 * penalty.penalty_grad(w, omega, anchor, LAMBDA, lr, variant)
        error_scale = own.abs() + 0.5 * penalty.penalty_grad(w.abs(), omega, -anchor.abs(), LAMBDA, lr, variant)
        if dtype == torch.float16:
            largest = torch.finfo(dtype).max
            overflows = oracle.to(dtype).isinf()
            oracle = (
                oracle.clamp(-largest, largest) if joins else torch.where(overflows, oracle.to(dtype).double(), oracle)
            )
        assert_within_roundings(
            out, oracle, roundings=10, error_scale=error_scale, dtype=torch.promote_types(dtype, torch.float32)
        )


def test_grads_keep_infinities_and_strides() -> None:
    w = torch.zeros(4, 6, 5, 3).contiguous(memory_format=torch.channels_last)
    own = torch.zeros(w.shape).half()
    own[0, 0, 0, 0], own[1, 0, 0, 0], own[2, 0, 0, 0] = torch.inf, torch.nan, 60_000
    importances, anchors = [torch.full_like(w, 1e4)], [torch.full_like(w, -1.0)]
    op = torch.ops.fastewc.ewc_penalty_grads
    (out,) = op([w], importances, [], anchors, [own], 1.0, [0.0], None, "plain", False, None)
    assert out.dtype == torch.float16 and out.stride() == own.stride()
    assert out[0, 0, 0, 0] == torch.inf and out[1, 0, 0, 0].isnan() and out[2, 0, 0, 0] == 65504
    assert (out[3] == 1e4).all()
    (out,) = op([w], importances, [], anchors, [], 1.0, [0.0], None, "plain", True, None)
    assert out.stride() == w.stride() and (out == -1e4).all()
    gaps = torch.zeros(9, 28)[:, ::2]
    (out,) = op([gaps], [torch.ones(9, 14)], [], [torch.ones(14, 9).t()], [], 2.0, [0.0], None, "plain", False, None)
    assert out.stride() == torch.empty_like(gaps).stride() and (out == -2).all()


@every_pair
def test_hold_back(dtype: torch.dtype, anchor_dtype: torch.dtype) -> None:
    params, importances, anchors, _ = weights(dtype, anchor_dtype)
    lrs = rates(len(params))
    op = torch.ops.fastewc.ewc_hold_back_
    kept = [w.clone() for w in params]
    for flag in (torch.tensor(True), torch.tensor(1.0)):
        op(params, anchors, importances, [], LAMBDA, lrs, None, flag)
        assert all(torch.equal(a, b) for a, b in zip(params, kept, strict=True))
    op(params, anchors, importances, [], LAMBDA, lrs, None, torch.tensor(False))
    for w, old, omega, anchor, lr in zip(params, kept, importances, anchors, lrs, strict=True):
        old, omega, anchor = old.double(), omega.double(), anchor.double()
        oracle = penalty.held_back(old, anchor, omega, LAMBDA, lr)
        error_scale = old.abs() + anchor.abs()
        arithmetic = torch.promote_types(dtype, torch.float32)
        assert_within_roundings(w, oracle, roundings=8, error_scale=error_scale, dtype=arithmetic)
        assert torch.equal(w[omega == 0], old[omega == 0].to(dtype))


@variants
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stats(dtype: torch.dtype, variant: str) -> None:
    sizes = (1, 1025, 0, 3000, 20_000)
    params, importances, anchors, _ = weights(dtype, dtype, sizes)
    lrs = rates(len(params))
    got = torch.ops.fastewc.ewc_stats_terms(params, importances, [], anchors, LAMBDA, lrs, None, variant)
    wanted = penalty.ewc_stats_terms(params, importances, anchors, LAMBDA, lrs, None, variant)
    assert got.dtype == torch.float64
    roundings = sum_roundings(sum(sizes)) + 8
    assert_within_roundings(got[:2], wanted[:2], roundings=roundings, dtype=importances[0].dtype)
    assert torch.equal(got[2:4], wanted[2:4])
    # A logarithm may land on the other side of a border between two bins.
    moved = (got[4:] - wanted[4:]).cumsum(0)
    assert got[4:].sum() == sum(sizes) and got[4] == wanted[4] and moved.abs().max() <= 1
    assert (moved != 0).sum() <= sum(sizes) / 1000


# ---- codes ----


def coded(shape: tuple[int, ...], layout: Tensor) -> tuple[Tensor, Codes]:
    omega = 10 ** (6 * torch.rand(shape, dtype=torch.float64) - 4)
    omega.view(-1)[::5] = 0
    codes = encode(omega.float(), layout)
    return codes.decoded(), codes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["adamw-stabilized", "nesterov-proximal", "sgd-wva"])
def test_codes_give_the_bits_of_their_numbers(name: str, dtype: torch.dtype) -> None:
    """Around tiles and blocks of codes, in other layouts than the parameter's too."""
    case = BY_ID[name]
    shapes = [(size,) for size in SIZES] + [(40, 6, 5, 13), (40, 6, 5, 13), (90, 140)]
    lasts = (torch.channels_last, torch.contiguous_format)
    params = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]
    layouts = list(params)
    params[-3], params[-2] = (p.contiguous(memory_format=f) for p, f in zip(params[-3:-1], lasts, strict=True))
    layouts[-3] = layouts[-2] = params[-3]  # the second one's codes lie in another order than it
    params[-1] = torch.zeros(90, 280, dtype=dtype)[:, 1::2].copy_(params[-1])
    pairs = [coded(shape, layout) for shape, layout in zip(shapes, layouts, strict=True)]
    results = []
    for which in range(2):
        own = [p.clone() for p in params]
        t = StepTensors(params=own, grads=[p.clone() for p in params], importances=[pair[which] for pair in pairs])
        t.anchors.extend((p * 1.25).bfloat16() for p in params)
        if case.rule.kind == "adam":
            t.exp_avgs.extend(torch.ones_like(p) for p in params)
            t.exp_avg_sqs.extend(torch.ones_like(p) for p in params)
            t.steps.extend(torch.ones(()) for _ in params)
        elif case.rule.momentum:
            t.momentum_buffers.extend(torch.ones_like(p) for p in params)
        if which == 0 and dtype == torch.float64:
            t.importances[:] = [pair[0].double() for pair in pairs]
        native.ewc_step(case.rule, t, clip_coef=None, grad_scale=None, found_inf=None)
        results.append(own)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(params, results[0], strict=True) if a.numel() > 100)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_penalty_of_codes_has_the_bits_of_their_numbers(dtype: torch.dtype) -> None:
    params, _, anchors, grads = weights(dtype, torch.bfloat16)
    pairs = [coded(tuple(w.shape), w) for w in params]
    numbers = [omega.to(torch.promote_types(dtype, torch.float32)) for omega, _ in pairs]
    codes = [one for _, one in pairs]
    rest = (LAMBDA, rates(len(params)), None, "stabilized")
    kernels = penalty_native
    assert torch.equal(*(kernels.ewc_penalty_value(params, omega, anchors, *rest) for omega in (numbers, codes)))
    got, wanted = (
        kernels.ewc_penalty_grads(params, omega, anchors, grads, *rest, False, None) for omega in (codes, numbers)
    )
    assert all(map(torch.equal, got, wanted))
    assert torch.equal(*(kernels.ewc_stats_terms(params, omega, anchors, *rest) for omega in (numbers, codes)))
    moved = []
    for omega in (numbers, codes):
        own = [w.clone() for w in params]
        kernels.ewc_hold_back_(own, anchors, omega, *rest[:3], None)
        moved.append(own)
    assert all(map(torch.equal, *moved))


def test_codes_that_do_not_fit_are_refused() -> None:
    w, anchor = torch.zeros(3000), torch.zeros(3000)
    _, codes = coded((3000,), w)
    for scales in ([], [codes.scales[:2]], [codes.scales.double()]):
        with pytest.raises(RuntimeError, match="scales"):
            torch.ops.fastewc.ewc_penalty_value([w], [codes.codes], scales, [anchor], 1.0, [0.1], None, "plain")
    with pytest.raises(RuntimeError, match="Byte"):
        torch.ops.fastewc.ewc_penalty_value([w], [w], [], [codes.codes], 1.0, [0.1], None, "plain")
