"""sum_grad_power in Triton: the op's cases, every kind of kernel, splits, layouts.

On CPU tensors through Triton's interpreter, in a process of its own, and on a GPU as compiled.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastewc import _dispatch
from fastewc.ops.sum_grad_power.cases import CASES, Case, ConvCase, MomentsCase, ScaleCase, SegmentsCase
from fastewc.testing import assert_all_within_roundings
from tests.ops import interpreter
from tests.ops.interpreter import DEVICE, needs_kernels

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# One for each way through the kernels: T = 1, few positions, many, groups, depthwise, three dimensions.
WAYS = [
    Case(70, None, 33, 17, 2), Case(9, 3, 33, 17, 1), Case(9, 80, 33, 17, 2),
    ConvCase(9, 6, 4, (7, 8), (3, 3), padding=1, groups=2), ConvCase(9, 6, 12, (7, 8), (3, 3), padding=1, groups=6),
    ConvCase(9, 3, 4, (3, 4, 5), (2, 2, 2), stride=2, padding=1, p=1), ScaleCase(9, (10,), ((70, 10),), kind="bias"),
]  # fmt: skip
# Interpreted, p = 1 where no other case has p = 2: they differ in one function.
AFFORDABLE = [
    case
    for case in CASES
    if isinstance(case, MomentsCase) or not (interpreter.INTERPRETED and case.p == 1 and replace(case, p=2) in CASES)
]


@pytest.fixture(autouse=True)
def cpu_tensors_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_dispatch._KERNELS, ("sum_grad_power", "triton"), ("cpu", "cuda"))


@pytest.fixture
def op():
    from fastewc.ops.sum_grad_power import triton

    return triton


def test_in_the_interpreter():
    interpreter.run(__file__)


def check(case, dtype: torch.dtype) -> list[Tensor]:
    got = case.run("triton", dtype, DEVICE)
    assert_all_within_roundings(
        got, case.oracle(dtype), roundings=case.roundings, error_scale=case.error_scale(dtype), context=str(dtype)
    )
    return got


@needs_kernels
@pytest.mark.parametrize("case", AFFORDABLE, ids=lambda case: case.id)
def test_the_cases(case):
    for dtype in case.dtypes:
        check(case, dtype)


@needs_kernels
@pytest.mark.parametrize("case", WAYS, ids=lambda case: case.id)
@pytest.mark.parametrize("processors", [3, 1000])
def test_samples_are_shared_among_programs(op, case, processors: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(op, "processors", lambda device: processors)
    monkeypatch.setattr(op, "_STEPS", 1)
    got = check(case, torch.float32)
    assert torch.equal(got[0], case.run("triton", torch.float32, DEVICE)[0])


def test_shares_are_whole_samples_and_fill_the_device(op):
    for steps, unit, tiles, processors in (
        (1, 1, 1, 132),
        (7, 7, 1, 132),
        (640, 5, 3, 132),
        (999, 1, 1, 8),
        (64, 8, 500, 132),
    ):
        share, splits = op.shares(steps, unit, tiles, processors)
        assert share % unit == 0 and (splits - 1) * share < steps <= splits * share
        assert splits == 1 or tiles * splits < 2 * 2 * processors
        assert splits == -(-steps // unit) or tiles * splits >= processors


@needs_kernels
@pytest.mark.parametrize(
    ("dtype", "kernel"), [(torch.float32, (1,)), (torch.bfloat16, (1,)), (torch.bfloat16, (3,))], ids=str
)
def test_sizes_that_vectors_divide_and_layouts(op, dtype: torch.dtype, kernel: tuple[int, ...]):
    """16-bit operands may be copied, their channels side by side; the result is the same."""
    case = ConvCase(3, 32, 16, (9, 16), kernel * 2, padding=kernel[0] // 2)
    wanted = check(case, dtype)
    for layout in ("channels_last", "transposed"):
        total, segments = case.make_inputs(dtype, DEVICE)
        order = {"channels_last": (0, 2, 3, 1), "transposed": (3, 2, 1, 0)}[layout]
        back = [order.index(d) for d in range(4)]
        relaid = [tuple(t.permute(order).contiguous().permute(back) for t in pair) for pair in segments]
        op.add_conv_grad_power(total, relaid, case.p, **case.settings)
        assert_all_within_roundings(
            [total], case.oracle(dtype), roundings=case.roundings, error_scale=case.error_scale(dtype)
        )
        assert total.shape == wanted[0].shape


@needs_kernels
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_uses_of_several_sizes(dims: int, groups: int):
    size, kernel = (4, 5, 6)[:dims], (2, 3, 1)[:dims]
    p = 1 + (dims + groups) % 2
    check(ConvCase(3, 4, 4, size, kernel, padding=1, stride=2, groups=groups, segments=3, p=p), torch.float32)


@needs_kernels
def test_two_calls_are_one(op):
    a, g = torch.randn(6, 5, 9, device=DEVICE), torch.randn(6, 5, 7, device=DEVICE)
    once, twice = torch.zeros(2, 7, 9, device=DEVICE)
    version = twice._version
    op.add_sum_grad_power(once, [(a, g)], 2)
    for half in (slice(0, 2), slice(2, 6)):
        op.add_sum_grad_power(twice, [(a[half], g[half])], 2)
    assert twice._version > version
    assert_all_within_roundings([twice], [once.double()], roundings=16)


@needs_kernels
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("case", [replace(WAYS[0], N=3), replace(WAYS[2], N=3), SegmentsCase(3, (2, 3), 4, 5)])
def test_not_a_number_stays_one(op, case, value: float):
    made = case.make_inputs(torch.float32, DEVICE)
    segments = [made] if isinstance(case, Case) else made[1]
    segments = [(a[:, None], g[:, None]) if a.ndim == 2 else (a, g) for a, g in segments]
    (a, g), *others = segments
    total = torch.zeros(g.shape[-1], a.shape[-1], device=DEVICE)
    a = a.clone()
    a[1, 0, 2] = value
    op.add_sum_grad_power(total, [(a, g), *others], 2)
    assert not total[:, 2].isfinite().any() and total[:, :2].isfinite().all() and total[:, 3:].isfinite().all()
