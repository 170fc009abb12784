"""squared_norm_grad in Triton: the op's own tests, both kinds of rows and the length between them.

On CPU tensors through Triton's interpreter, in a process of its own, and on a GPU as compiled.
"""

import pytest
import torch

from fastewc import _dispatch
from fastewc.ops import squared_norm_grad
from fastewc.ops.squared_norm_grad.cases import CASES, Case
from fastewc.testing import assert_all_within_roundings
from tests.ops import interpreter
from tests.ops.interpreter import DEVICE, needs_kernels

if interpreter.INTERPRETED:  # they make CPU tensors
    from tests.ops import test_squared_norm_grad as general

    test_by_hand = general.test_hand_worked_numbers
    test_confident_rows = general.test_hand_worked_confident_rows
    test_one_class = general.test_one_class_has_no_gradient
    test_equal_maxima = general.test_equal_maxima_have_equal_gradients
    test_largest_values = general.test_largest_finite_values_do_not_overflow_the_softmax

# Rows that a tile of 32 divides into two, of every spread, and one long enough for lanes to see many maxima.
_TILED = ("17x33-normal", "17x33-decades", "17x33-equal", "17x33-confident15", "17x33-tied20", "5x1025-tied15")
TILED = [case for case in CASES if case.id.removeprefix("softmax-") in _TILED]


def affordable(case: Case) -> bool:
    """Interpreted, one row of 200,000 is enough."""
    return not interpreter.INTERPRETED or case.shape[-1] < 10_000 or case.id == "softmax-2x200000-normal"


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def cpu_tensors_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_dispatch._KERNELS, ("squared_norm_grad", "triton"), ("cpu", "cuda"))


@pytest.fixture
def impl() -> str:
    return "triton"


@pytest.fixture
def short_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of more than 16 classes are walked tile by tile."""
    from fastewc.ops.squared_norm_grad import triton

    monkeypatch.setattr(triton, "LONGEST_WHOLE", 16)
    monkeypatch.setattr(triton, "_LONG_TILE", 32)
    triton.specialisation.cache_clear()
    yield
    triton.specialisation.cache_clear()


def test_in_the_interpreter():
    interpreter.run(__file__)


def check(case: Case) -> None:
    for dtype in case.dtypes:
        got = case.run("triton", dtype, DEVICE)
        assert_all_within_roundings(
            got, case.oracle(dtype), roundings=case.roundings, error_scale=case.error_scale(dtype), context=str(dtype)
        )


@needs_kernels
@pytest.mark.parametrize("case", [case for case in CASES if affordable(case)], ids=lambda case: case.id)
def test_the_cases(case: Case):
    check(case)


@needs_kernels
@pytest.mark.parametrize("case", TILED, ids=lambda case: case.id)
def test_the_cases_tile_by_tile(case: Case, short_rows: None):
    check(case)


@needs_kernels
@pytest.mark.parametrize("C", [8192, 8193, 32_768, 32_769])
def test_rows_around_the_longest_that_is_read_once(C: int):
    case = Case((2, C), "softmax")
    check(case)
    assert torch.equal(*(case.run("triton", torch.float32, DEVICE)[0] for _ in range(2)))


@needs_kernels
@pytest.mark.parametrize("C", [10, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_a_number(dtype: torch.dtype, C: int, short_rows: None):
    """As torch.softmax: NaN, +∞ and −∞ alone spoil their row and no other; −∞ among numbers has no mass."""
    inf = torch.inf
    y = torch.randn(6, C, device=DEVICE).to(dtype)
    y[0, 3], y[1, -1], y[3], y[4, 7:] = torch.nan, inf, -inf, -inf
    y[5, 0], y[5, -1] = -inf, inf
    seed = squared_norm_grad(y, "softmax", "triton")
    assert seed[[0, 1, 3, 5]].isnan().all() and not seed[[2, 4]].isnan().any()
    assert seed[4, 7:].count_nonzero() == 0 and seed[4, :7].all()
    wanted = squared_norm_grad(y[4:5].double().cpu(), "softmax", "reference")
    scale = [torch.full_like(wanted, 2)]
    assert_all_within_roundings([seed[4:5]], [wanted], roundings=100, error_scale=scale, dtype=torch.float32)
    row = torch.tensor([torch.nan, inf, -inf, 1.0], device=DEVICE).to(dtype)
    assert torch.equal(squared_norm_grad(row, "logits", "triton")[1:], 2 * row[1:])


@needs_kernels
@pytest.mark.parametrize("output", ["logits", "softmax"])
def test_any_strides(output: str):
    y = torch.randn(7, 5, 12, device=DEVICE)
    for view in (y.transpose(0, 2), y[:, ::2, 1::3], y[:1].expand(4, 5, 12), y[0, 0, :0]):
        got = squared_norm_grad(view, output, "triton")
        assert got.is_contiguous() and torch.equal(got, squared_norm_grad(view.contiguous(), output, "triton"))
