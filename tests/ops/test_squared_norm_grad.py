"""squared_norm_grad: hand-worked numbers, autograd as the oracle, every implementation, every contract sentence."""

import importlib
import math
from decimal import Context, Decimal, localcontext
from types import ModuleType

import pytest
import torch
from torch import Tensor

from fastewc._dispatch import choose, impl_report
from fastewc.ops import squared_norm_grad
from fastewc.ops.squared_norm_grad.cases import CASES, Case
from fastewc.testing import assert_all_within_roundings, assert_within_roundings

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
IMPLS = ("reference", "native")
OUTPUTS = ("logits", "softmax")


def skip_unless_available(impl: str) -> None:
    cell = impl_report()["squared_norm_grad"][impl]
    if not cell["available"]:
        pytest.skip(cell["reason"])


@pytest.fixture(params=IMPLS)
def impl(request: pytest.FixtureRequest) -> str:
    """Each implementation that can run on the CPU here; skipped with the report's reason where it can't."""
    skip_unless_available(request.param)
    return request.param


@pytest.fixture
def native() -> ModuleType:
    """The native implementation with its library loaded."""
    skip_unless_available("native")
    choose("squared_norm_grad", "native", torch.device("cpu"))
    return importlib.import_module("fastewc.ops.squared_norm_grad.native")


def seed_by_autograd(y: Tensor, output: str) -> Tensor:
    """∂‖f‖²/∂y in float64, by autograd."""
    y = y.detach().double().requires_grad_()
    f = y if output == "logits" else y.softmax(-1)
    return torch.autograd.grad((f * f).sum(), y)[0]


def test_hand_worked_numbers(impl: str) -> None:
    """p = (3/4, 1/4): Σp² = 5/8, seed = (2·3/4·1/8, 2·1/4·(−3/8)) = (3/16, −3/16)."""
    y = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
    wanted = torch.tensor([[3 / 16, -3 / 16]], dtype=torch.float64)
    assert_within_roundings(squared_norm_grad(y, "softmax", impl), wanted, roundings=16)
    assert squared_norm_grad(torch.tensor([1.5, -2.0]), "logits", impl).tolist() == [3.0, -4.0]


@pytest.mark.parametrize("gap", [10, 15, 20, 40])
def test_hand_worked_confident_rows(gap: int, impl: str) -> None:
    """Every element is right relative to itself, however small the doubt.

    With ε = e^−gap: y = (gap, 0) has p = (1, ε)/(1+ε) and p₁ − Σp² = p₁p₂ − p₂² = ε(1−ε)/(1+ε)², so the seed is
    ±2ε(1−ε)/(1+ε)³. y = (gap, 0, gap) has p = (1, ε, 1)/(2+ε) and p₁ − Σp² = (2+ε − 2−ε²)/(2+ε)² = ε(1−ε)/(2+ε)², so
    the seed is (1, −2, 1)·2ε(1−ε)/(2+ε)³.
    """
    epsilon = math.exp(-gap)
    two = 2 * epsilon * (1 - epsilon) / (1 + epsilon) ** 3 * torch.tensor([1, -1], dtype=torch.float64)
    three = 2 * epsilon * (1 - epsilon) / (2 + epsilon) ** 3 * torch.tensor([1, -2, 1], dtype=torch.float64)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for wanted in (two, three):
            y = torch.tensor([gap, 0, gap][: len(wanted)], dtype=dtype)
            assert_within_roundings(squared_norm_grad(y, "softmax", impl), wanted, roundings=16)


def test_one_class_has_no_gradient(impl: str) -> None:
    for dtype in DTYPES:
        y = torch.tensor([[-3.0], [0.0], [60.0]], dtype=dtype)
        assert squared_norm_grad(y, "softmax", impl).tolist() == [[0], [0], [0]]


@pytest.mark.parametrize("shape", [(10,), (33,), (1025,)], ids=str)
def test_equal_maxima_have_equal_gradients(shape: tuple[int, ...], impl: str) -> None:
    """Bit for bit, in a vector and in its tail; where all classes are equal the seed is exactly 0."""
    for dtype in DTYPES:
        y = torch.zeros(shape, dtype=dtype)
        assert squared_norm_grad(y, "softmax", impl).count_nonzero() == 0
        y[[0, 5, -1]] = 9
        seed = squared_norm_grad(y, "softmax", impl)
        assert seed[0] == seed[5] == seed[-1] > 0


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_implementations_agree_with_the_float64_reference(case: Case, impl: str) -> None:
    for dtype in case.dtypes:
        assert_all_within_roundings(
            case.run(impl, dtype),
            case.oracle(dtype),
            roundings=case.roundings,
            error_scale=case.error_scale(dtype),
            context=f"{case.id} {impl} {dtype}",
        )


@pytest.mark.parametrize("case", [case for case in CASES if case.spread != "equal"], ids=lambda case: case.id)
def test_the_reference_is_the_gradient_that_autograd_finds(case: Case) -> None:
    """Autograd computes p(g − Σgp), g = 2p: in a confident row it cancels, so its error scale is p and Σp² apart."""
    y = case.make_inputs(torch.float64)
    scale = case.error_scale(torch.float64)[0]
    if case.output == "softmax":
        p = y.softmax(-1)
        scale = scale + 2 * p * (p + (p * p).sum(-1, keepdim=True))
    assert_within_roundings(
        squared_norm_grad(y, case.output, "reference"),
        seed_by_autograd(y, case.output),
        roundings=2 * case.roundings,
        error_scale=scale,
    )


@pytest.mark.parametrize(
    "case",
    [
        case
        for case in CASES
        if case.output == "softmax" and case.spread not in ("decades", "equal") and math.prod(case.shape) < 9999
    ],
    ids=lambda case: case.id,
)
def test_the_float64_reference_is_right_to_the_last_digits(case: Case) -> None:
    """2p(p − Σp²) as written, with 80 digits: what cancels leaves more than float64 holds."""
    y = case.make_inputs(torch.float64)
    wanted = []
    with localcontext(Context(prec=80)):
        for row in y.reshape(-1, max(y.shape[-1], 1)).tolist():
            e = [Decimal(value).exp() for value in row]
            p = [value / sum(e) for value in e]
            square = sum(value * value for value in p)
            wanted.append([float(2 * value * (value - square)) for value in p])
    assert_within_roundings(
        case.oracle(torch.float64)[0],
        torch.tensor(wanted, dtype=torch.float64).reshape(y.shape),
        roundings=case.roundings,
        error_scale=case.error_scale(torch.float64)[0],
    )


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.spread in ("confident", "tied")], ids=lambda case: case.id
)
def test_the_cases_reject_a_top_class_that_cancels(case: Case) -> None:
    """p − Σp² in float32 has the error of 1, not of the others' p."""
    p = case.make_inputs(torch.float32).softmax(-1)
    with pytest.raises(AssertionError, match="outside the rounding bound"):
        assert_all_within_roundings(
            [2 * p * (p - (p * p).sum(-1, keepdim=True))],
            case.oracle(torch.float32),
            roundings=case.roundings,
            error_scale=case.error_scale(torch.float32),
        )


def test_the_cases_reject_a_wrong_answer() -> None:
    """The bound is tight enough to see a forgotten Σp² in every softmax case with more than one class."""
    for case in CASES:
        y = case.make_inputs(torch.float32)
        if case.output == "logits" or y.numel() == 0 or y.shape[-1] == 1:
            continue
        p = y.softmax(-1)
        with pytest.raises(AssertionError, match="outside the rounding bound"):
            assert_all_within_roundings(
                [2 * p * p], case.oracle(torch.float32), roundings=case.roundings,
                error_scale=case.error_scale(torch.float32),
            )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("output", OUTPUTS)
def test_shape_dtype_device_and_history(output: str, dtype: torch.dtype, impl: str) -> None:
    for shape in ((7,), (0,), (2, 0, 3), (2, 3, 0), (2, 3, 4, 5)):
        y = torch.randn(shape).to(dtype).requires_grad_()
        before = y.detach().clone()
        seed = squared_norm_grad(y, output, impl)
        assert (seed.shape, seed.dtype, seed.device) == (y.shape, y.dtype, y.device)
        assert not seed.requires_grad
        assert torch.equal(y.detach(), before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("output", OUTPUTS)
def test_strided_inputs_give_the_numbers_of_contiguous_ones(output: str, dtype: torch.dtype, impl: str) -> None:
    base = torch.randn(6, 10, 8).to(dtype)
    for y in (base.transpose(0, 2), base[:, ::2, 1:6], base[..., 0], base[:1].expand(4, 10, 8), base[:, :, 3:4]):
        wanted = squared_norm_grad(y.contiguous(), output, impl)
        assert torch.equal(squared_norm_grad(y, output, impl), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinities_propagate_as_in_softmax(dtype: torch.dtype, impl: str) -> None:
    inf, nan = math.inf, math.nan
    y = torch.full((6, 40), 0.5)
    y[0, 33], y[1, 2], y[2, 7], y[3, :], y[4, 5] = nan, inf, -inf, -inf, -inf
    y[4, 6] = nan
    seed = squared_norm_grad(y.to(dtype), "softmax", impl)
    assert seed[[0, 1, 3, 4]].isnan().all()
    assert not seed[[2, 5]].isnan().any()
    assert seed[2, 7] == 0
    row = torch.tensor([nan, inf, -inf, 1.0]).to(dtype)
    assert torch.equal(squared_norm_grad(row, "logits", impl)[1:], 2 * row[1:])
    assert squared_norm_grad(row, "logits", impl)[0].isnan()


def test_largest_finite_values_do_not_overflow_the_softmax(impl: str) -> None:
    """y = ±max: the difference overflows to −∞, whose p is exactly 0; one class has all the mass, so its seed is 0."""
    for dtype in DTYPES:
        big = torch.finfo(dtype).max
        row = torch.tensor([big, -big, 0.0], dtype=dtype)
        assert squared_norm_grad(row, "softmax", impl).tolist() == [0, 0, 0]


def test_rows_are_independent_and_runs_identical(impl: str) -> None:
    """Bit for bit, whatever the number of threads and whichever rows share the call."""
    y = 5 * torch.randn(64, 3001)
    whole = squared_norm_grad(y, "softmax", impl)
    assert torch.equal(whole, squared_norm_grad(y, "softmax", impl))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(whole, squared_norm_grad(y, "softmax", impl))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(whole[17:18], squared_norm_grad(y[17:18], "softmax", impl))


def test_every_element_of_the_native_output_is_written(impl: str) -> None:
    """ATen's own allocations filled with NaN: Python's poisoned torch.empty does not reach C++."""
    before = torch.are_deterministic_algorithms_enabled()
    # torch.utils.deterministic.fill_uninitialized_memory is on by default and obeys this switch.
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.ops.aten.empty.memory_format([8]).isnan().all()
        for dtype in DTYPES:
            for output in OUTPUTS:
                for C in (1, 17, 33, 130, 1025):
                    assert not squared_norm_grad(torch.randn(3, C).to(dtype), output, impl).isnan().any()
    finally:
        torch.use_deterministic_algorithms(before)


def test_opcheck(native: ModuleType) -> None:
    strided = torch.randn(4, 6).t()
    for y in (torch.randn(5, 7), strided, torch.randn(0, 3), torch.randn(3).bfloat16(), torch.randn(2, 3, 4)):
        for output in OUTPUTS:
            torch.library.opcheck(torch.ops.fastewc.squared_norm_grad.default, (y, output))


def test_the_kernel_repeats_the_checks_with_wanted_and_given(native: ModuleType) -> None:
    with pytest.raises(RuntimeError, match=r'wanted output "logits" or "softmax", given "sigmoid"'):
        native.squared_norm_grad(torch.ones(2), "sigmoid")
    with pytest.raises(RuntimeError, match=r"wanted a float32.* tensor, given Long"):
        native.squared_norm_grad(torch.ones(2, dtype=torch.long), "logits")
    with pytest.raises(RuntimeError, match=r"at least 1 dimension, given \[\]"):
        native.squared_norm_grad(torch.tensor(1.0), "logits")


@pytest.mark.parametrize("output", OUTPUTS)
def test_compiles_without_graph_breaks(output: str, impl: str) -> None:
    torch.compiler.reset()
    for which in (impl, "auto"):

        def seed_of_double(y: Tensor, which: str = which) -> Tensor:
            return squared_norm_grad(2 * y, output, which) + 1

        compiled = torch.compile(seed_of_double, fullgraph=True, backend="aot_eager")
        for y in (torch.randn(5, 7), torch.randn(3, 11)):
            assert torch.equal(compiled(y), seed_of_double(y))


def test_compiles_with_inductor(native: ModuleType) -> None:
    torch.compiler.reset()
    y = torch.randn(5, 7)
    compiled = torch.compile(lambda y: squared_norm_grad(y, "softmax", "native"), fullgraph=True)
    assert torch.equal(compiled(y), squared_norm_grad(y, "softmax", "native"))


@pytest.mark.parametrize(
    ("y", "output", "error", "text"),
    [
        ([1.0], "logits", TypeError, "y must be a tensor, not list"),
        (torch.ones(2, dtype=torch.long), "logits", TypeError, "not torch.int64"),
        (torch.ones(2, dtype=torch.complex64), "logits", TypeError, "not torch.complex64"),
        (torch.ones(2, 2).to_sparse(), "logits", TypeError, "torch.sparse_coo"),
        (torch.tensor(1.0), "logits", ValueError, "at least one dimension"),
        (torch.ones(2), "sigmoid", ValueError, "'logits' or 'softmax', not 'sigmoid'"),
        (torch.ones(2), None, ValueError, "not None"),
    ],
)
def test_errors_say_what_was_given(y: object, output: object, error: type[Exception], text: str) -> None:
    for impl in ("auto", *IMPLS):
        with pytest.raises(error, match=text):
            squared_norm_grad(y, output, impl)


def test_impl_is_never_replaced_by_another() -> None:
    y = torch.ones(2)
    with pytest.raises(ValueError, match="'reference', 'triton' or 'native', not 'cuda'"):
        squared_norm_grad(y, "logits", "cuda")
    with pytest.raises(NotImplementedError, match=r"triton.*not implemented yet"):
        squared_norm_grad(y, "logits", "triton")
    with pytest.raises(NotImplementedError, match=r"native.*can't run on meta tensors"):
        squared_norm_grad(y.to("meta"), "logits", "native")


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_auto_on_a_gpu(case: Case) -> None:
    for dtype in case.dtypes:
        assert_all_within_roundings(
            case.run("auto", dtype, "cuda"),
            case.oracle(dtype),
            roundings=case.roundings,
            error_scale=case.error_scale(dtype),
            context=f"{case.id} {dtype} cuda",
        )
