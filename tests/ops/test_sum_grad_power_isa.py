"""sum_grad_power with every kind of instructions that this processor has: vectors of each width, and Intel's AMX."""

import math
import os
import subprocess
import sys

import pytest
import torch

from fastewc._dispatch import choose
from fastewc.ops.sum_grad_power import add_sum_grad_power, cases, reference, sum_grad_power
from fastewc.testing import assert_all_within_roundings, assert_within_roundings

CPU = torch.device("cpu")

IN_ANOTHER_PROCESS = """
import sys
import torch
from fastewc._dispatch import choose
from fastewc.ops.sum_grad_power import cases
from fastewc.testing import assert_all_within_roundings

choose("sum_grad_power", "native", torch.device("cpu"))
from fastewc.ops.sum_grad_power import native

assert not native._has_matrix_unit()
torch.set_num_threads(2)
for case in cases.CASES:
    for dtype in case.dtypes:
        got, scale = case.run("native", dtype), case.error_scale(dtype)
        assert_all_within_roundings(
            got, case.oracle(dtype), roundings=case.roundings, error_scale=scale, context=f"{case.id} {dtype}"
        )
print(len(cases.CASES), "cases")
"""


@pytest.fixture(autouse=True)
def native():
    try:
        choose("sum_grad_power", "native", CPU)
    except NotImplementedError as error:
        pytest.skip(str(error))
    from fastewc.ops.sum_grad_power import native

    return native


@pytest.fixture
def amx(native):
    if not native._has_matrix_unit():
        pytest.skip("needs a processor with Intel AMX, and a system that lets us use it")


def run_with(isa: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS], env={**os.environ, "FASTEWC_MAX_CPU_ISA": isa}, capture_output=True,
        text=True, timeout=600, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_case_with_lesser_instructions(isa):
    done = run_with(isa)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{len(cases.CASES)} cases"


def test_unknown_instructions_are_refused():
    done = run_with("avx1024")
    assert done.returncode != 0
    assert "FASTEWC_MAX_CPU_ISA: wanted baseline, avx2, avx512 or amx, given avx1024" in done.stderr


# Sizes that are worth the unit: every rest of positions after whole steps of 32, runs of more than 512, and more
# channels, or samples at one position, than are taken at a time.
SHAPES = [
    *((3, (T,), 40, 33 + T) for T in range(8, 66, 3)),
    (2, (9, 30, 2), 70, 64),
    (2, (513,), 64, 33),
    (2, (700, 400), 32, 100),
    (3, (1100,), 33, 40),
    (1, (64,), 1500, 40),
    (40, (60,), 300, 310),
    *((N, (1,), 65, 35) for N in (16, 31, 513, 1030)),
]


@pytest.mark.usefixtures("amx")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_matrix_unit(shape, dtype):
    for number, p in enumerate((1, 2)):
        total = ("contiguous", "transposed")[number]
        for layout in ("contiguous", "transposed"):
            case = cases.SegmentsCase(*shape, p=p, total=total, layout=layout)
            oracle, scale = case.oracle(dtype), case.error_scale(dtype)
            got, again = case.run("native", dtype), case.run("native", dtype)
            assert_all_within_roundings(got, oracle, roundings=case.roundings, error_scale=scale, context=case.id)
            assert torch.equal(got[0], again[0])


@pytest.mark.usefixtures("amx")
def test_the_matrix_unit_does_not_count_in_sixteen_bits():
    """Sums that three bfloat16 for each number give, and two would not."""
    a, g = torch.randn(4, 64, 64), torch.randn(4, 64, 64)
    exact = sum_grad_power(a.double(), g.double(), 1, "reference")
    error = (sum_grad_power(a, g, 1, "native") - exact).norm() / exact.norm()
    parts = [t.bfloat16().double() + (t - t.bfloat16()).bfloat16() for t in (a, g)]
    of_two_parts = (sum_grad_power(*parts, 1, "reference") - exact).norm() / exact.norm()
    assert error < 0.1 * of_two_parts


@pytest.mark.usefixtures("amx")
@pytest.mark.parametrize("exponent", [-100, -60, 60, 100])
def test_small_and_large_numbers_keep_their_digits(exponent):
    a, g = torch.randn(4, 32, 64) * 2.0**exponent, torch.randn(4, 32, 64)
    oracle, scale = (sum_grad_power(x.double(), y.double(), 1, "reference") for x, y in ((a, g), (a.abs(), g.abs())))
    case = cases.Case(4, 32, 64, 64, p=1)
    assert_within_roundings(sum_grad_power(a, g, 1, "native"), oracle, roundings=case.roundings, error_scale=scale)


@pytest.mark.usefixtures("amx")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("T", [1, 33])
def test_what_is_not_finite_stays_so_and_spreads_no_further(bad, T):
    a, g = torch.randn(40, T, 64), torch.randn(40, T, 64)
    a[3, 0, 17] = bad
    total, wanted = torch.zeros(64, 64), torch.zeros(64, 64)
    add_sum_grad_power(total, [(a, g)], 2, "native")
    reference.add_sum_grad_power(wanted, [(a, g)], 2)
    assert torch.equal(total.isfinite(), wanted.isfinite())
    assert total.isfinite().sum() == 64 * 63
