"""sum_grad_power: hand-worked numbers, autograd as oracle, contract."""

import math

import pytest
import torch
from torch.nn import functional

from fastewc._dispatch import choose
from fastewc.ops.sum_grad_power import (
    ScaleUse,
    add_conv_grad_power,
    add_scale_grad_power,
    add_sum_grad_power,
    cases,
    row_moments,
    sum_grad_power,
)
from fastewc.testing import assert_all_within_roundings, assert_within_roundings, sum_roundings

CPU = torch.device("cpu")


@pytest.fixture(params=["reference", "native"])
def impl(request: pytest.FixtureRequest) -> str:
    try:
        return choose("sum_grad_power", request.param, CPU)
    except NotImplementedError as error:
        pytest.skip(str(error))


@pytest.fixture
def ops():
    try:
        choose("sum_grad_power", "native", CPU)
    except NotImplementedError as error:
        pytest.skip(str(error))
    from fastewc.ops.sum_grad_power import native  # noqa: F401  # defines them

    return torch.ops.fastewc


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_by_hand(impl):
    # Sample 1: gradient 1·1 + 2·(−1) = −1; sample 2: 3·1 + 1·2 = 5.
    a = torch.tensor([[[1.0], [2.0]], [[3.0], [1.0]]])
    g = torch.tensor([[[1.0], [-1.0]], [[1.0], [2.0]]])
    assert sum_grad_power(a, g, 2, impl).tolist() == [[26.0]]
    assert sum_grad_power(a, g, 1, impl).tolist() == [[6.0]]
    # The same as one sample that uses the weight twice: gradient −1 + 5 = 4.
    for p, wanted in ((2, 17.0), (1, 5.0)):
        total = torch.ones(1, 1)
        add_sum_grad_power(total, [(a[:1], g[:1]), (a[1:], g[1:])], p, impl)
        assert total.tolist() == [[wanted]]


@pytest.mark.parametrize("p", [1, 2])
def test_is_the_sum_of_per_sample_weight_gradients(p, impl):
    x = torch.randn(5, 7, 3, dtype=torch.float64)
    seed = torch.randn(5, 7, 4, dtype=torch.float64)
    w = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    oracle = 0
    for n in range(5):
        (gradient,) = torch.autograd.grad((x[n] @ w.T * seed[n]).sum(), w)
        oracle = oracle + gradient.abs() ** p
    scale = sum((seed[n].abs().T @ x[n].abs()) ** p for n in range(5))
    assert_within_roundings(sum_grad_power(x, seed, p, impl), oracle, roundings=64, error_scale=scale)


def test_scales_by_hand(impl):
    # Sample 1: gradient 1·1 + 2·(−1) = −1; sample 2: 3·1 + 1·2 = 5. Of a bias: 1 − 1 = 0 and 1 + 2 = 3.
    x = torch.tensor([[[1.0], [2.0]], [[3.0], [1.0]]])
    g = torch.tensor([[[1.0], [-1.0]], [[1.0], [2.0]]])
    for use, first, second in ((ScaleUse(g, x), 6.0, 26.0), (ScaleUse(g), 3.0, 9.0)):
        for p, wanted in ((1, first), (2, second)):
            total = torch.ones(1)
            add_scale_grad_power(total, [use], p, impl)
            assert total.tolist() == [1 + wanted]
    # (x − 1) · 2, of the one and of the other position's use: −2 for sample 1, 4 + 0 for sample 2.
    total, one, two = torch.zeros(()), torch.tensor(1.0), torch.tensor(2.0)
    uses = [ScaleUse(g[:, t], x[:, t], one, two) for t in (0, 1)]
    add_scale_grad_power(total, uses, 1, impl)
    assert total.item() == 6
    add_scale_grad_power(total, uses, 2, impl)
    assert total.item() == 6 + 4 + 16


@pytest.mark.parametrize(
    ("norm", "shape", "parameter"),
    [
        (functional.layer_norm, (5, 7, 6), (6,)), (functional.layer_norm, (5, 7, 6), (7, 6)),
        (functional.rms_norm, (5, 7, 6), (6,)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("p", [1, 2])
def test_norms_are_those_of_torch(norm, shape, parameter, p, impl):
    x, g = 3 + torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    w = torch.randn(parameter, dtype=torch.float64, requires_grad=True)
    oracle = torch.zeros(parameter, dtype=torch.float64)
    for n in range(len(x)):
        (gradient,) = torch.autograd.grad((norm(x[n], parameter, w, eps=1e-3) * g[n]).sum(), w)
        oracle += gradient.abs() ** p
    rows = x.flatten(-len(parameter))
    moments = row_moments(rows, 1e-3, centred=norm is functional.layer_norm, impl=impl)
    shift, factor = (t.view(*x.shape[: x.ndim - len(parameter)], *[1] * len(parameter)) for t in moments)
    total, scale = torch.zeros(parameter, dtype=torch.float64), torch.zeros(parameter, dtype=torch.float64)
    add_scale_grad_power(total, [ScaleUse(g, x, shift, factor)], p, impl)
    add_scale_grad_power(scale, [ScaleUse(g.abs(), x.abs(), -shift.abs(), factor)], p, "reference")
    assert_within_roundings(total, oracle, roundings=2 * p * sum_roundings(42) + 64, error_scale=scale)


CONVOLUTIONS = [case for case in cases.CASES if isinstance(case, cases.ConvCase)]


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=lambda c: c.id)
def test_convolutions_are_those_of_torch(case, impl):
    convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[len(case.kernel) - 1]
    oracle, segments = case.make_inputs(torch.float64)
    oracle = oracle.clone()
    for n in range(case.N):
        w = torch.zeros(oracle.shape, dtype=torch.float64, requires_grad=True)
        outputs = [(convolve(x[n : n + 1], w, None, **case.settings) * g[n]).sum() for x, g in segments]
        (gradient,) = torch.autograd.grad(sum(outputs), w)
        oracle += gradient.abs() ** case.p
    (got,) = case.run(impl, torch.float64)
    (scale,) = case.error_scale(torch.float64)
    assert_within_roundings(got, oracle, roundings=2 * case.roundings, error_scale=scale)


@pytest.mark.parametrize("case", cases.CASES, ids=lambda c: c.id)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_reference_matches_itself_in_float64(case, dtype):
    got = case.run("reference", dtype)
    assert got[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_all_within_roundings(got, case.oracle(dtype), roundings=case.roundings, error_scale=case.error_scale(dtype))


def test_case_names_differ():
    assert len({case.id for case in cases.CASES}) == len(cases.CASES)


# Larger than what the native kernel takes at a time: of positions, of samples at one position, of rows in a strip, and
# of x in the cache.
LARGE = [
    cases.Case(3, 700, 41, 70, p=2),
    cases.SegmentsCase(2, (300, 3, 520), 37, 26, p=1),
    cases.SegmentsCase(260, (1,), 515, 520, total="transposed"),
    cases.SegmentsCase(2, (20,), 800, 1000, p=1),
    cases.SegmentsCase(4, (200,), 410, 500),
    cases.ConvCase(2, 3, 40, (45, 33), (3, 3), stride=2, padding=1),
    cases.ConvCase(2, 130, 33, (9, 8), (3, 3), padding=1, total="transposed"),
    cases.ConvCase(30, 64, 8, (12, 12), (3, 3), padding=1, p=1),
    cases.ConvCase(2, 70, 70, (20, 17), (3, 3), padding=1, groups=70),
    # More channels than a block has, more samples than a piece, more positions than a block along them.
    cases.ScaleCase(70, (1100,), ((1100,),), p=1),
    cases.ScaleCase(9, (700,), ((30, 700), (700,)), kind="norm", total="gaps"),
    cases.ScaleCase(5, (9,), ((1300, 9),), kind="statistics", layout="channels_first"),
    cases.ScaleCase(3, (2, 1, 300), ((2, 60, 300),), kind="bias"),
]


@pytest.mark.parametrize("case", LARGE, ids=lambda c: c.id)
def test_large_inputs_and_any_number_of_threads(case, ops, threads):
    oracle, scale = case.oracle(torch.float32), case.error_scale(torch.float32)
    for count in (1, 3):
        threads(count)
        got, again = (case.run("native", torch.float32) for _ in range(2))
        assert_all_within_roundings(got, oracle, roundings=case.roundings, error_scale=scale, context=f"{count}")
        assert torch.equal(got[0], again[0]), f"not deterministic with {count} threads"


@pytest.mark.parametrize("case", LARGE[-4:], ids=lambda c: c.id)
def test_the_number_of_threads_changes_no_bit_of_a_scale(case, ops, threads):
    found = []
    for count in (1, 2, 3):
        threads(count)
        found += case.run("native", torch.float32)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_two_dimensions_are_one_position(impl):
    a, g = torch.randn(6, 3), torch.randn(6, 4)
    assert torch.equal(sum_grad_power(a, g, 2, impl), sum_grad_power(a[:, None], g[:, None], 2, impl))


def test_no_gradient_flows_and_strides_do_not_matter(impl):
    a, g = torch.randn(3, 5, 6, requires_grad=True).transpose(0, 1), torch.randn(5, 3, 4)
    out = sum_grad_power(a, g, 2, impl)
    assert not out.requires_grad
    assert torch.equal(out, sum_grad_power(a.contiguous(), g, 2, impl))


@pytest.mark.parametrize("p", [1, 2])
def test_two_calls_add_up_to_one_on_all_samples(p, impl):
    a, g = torch.randn(11, 4, 9), torch.randn(11, 4, 35)
    total = torch.zeros(35, 9)
    for samples in (slice(0, 3), slice(3, 11)):
        add_sum_grad_power(total, [(a[samples], g[samples])], p, impl)
    oracle, scale = (sum_grad_power(x.double(), y.double(), p, "reference") for x, y in ((a, g), (a.abs(), g.abs())))
    assert_within_roundings(total, oracle, roundings=p * sum_roundings(4) + sum_roundings(11), error_scale=scale)


def test_nothing_but_the_elements_of_the_total_is_written(impl):
    memory = torch.full((40, 3, 50), math.nan)
    total = memory[::2, 1, 3:48:3]
    total.zero_()
    add_sum_grad_power(total, [(torch.randn(4, 5, 15), torch.randn(4, 5, 20))], 2, impl)
    assert not total.isnan().any()
    assert int(memory.isnan().sum()) == memory.numel() - total.numel()


def test_nothing_but_the_elements_of_a_scales_total_is_written(impl):
    memory = torch.full((40, 3, 50), math.nan)
    total = memory[::2, 1, 3:48:3]
    total.zero_()
    add_scale_grad_power(total, [ScaleUse(torch.randn(4, 5, 20, 15), torch.randn(4, 5, 20, 15))], 2, impl)
    assert (total > 0).all()
    assert int(memory.isnan().sum()) == memory.numel() - total.numel()


def test_nan_and_infinities_stay_with_their_channels(impl):
    x, g = torch.randn(5, 3, 40), torch.randn(5, 3, 40)
    x[2, 0, 33], g[1, 0, 5] = math.nan, math.inf
    total = torch.zeros(40)
    add_scale_grad_power(total, [ScaleUse(g, x)], 1, impl)
    assert total[33].isnan() and not total[5].isfinite()
    total[33] = total[5] = 0
    assert total.isfinite().all()


@pytest.mark.parametrize("T", [1, 3])
def test_nan_and_infinities_stay_with_their_rows(T, impl):
    a, g = torch.randn(5, T, 40), torch.randn(5, T, 70)
    a[2, 0, 33], g[1, 0, 5] = math.nan, math.inf
    out = sum_grad_power(a, g, 1, impl)
    assert out[:, 33].isnan().all()
    rest = out[5, torch.arange(40) != 33]
    assert not rest.isfinite().any()
    out[:, 33], out[5] = 0, 0
    assert out.isfinite().all()


@pytest.mark.parametrize(
    ("a", "g", "p", "error"),
    [
        (torch.ones(2, 3), torch.ones(2, 3), 3, ValueError),
        (torch.ones(2, 3), torch.ones(2, 3), True, ValueError),
        (torch.ones(2, 3), torch.ones(3, 3), 2, ValueError),
        (torch.ones(2, 4, 3), torch.ones(2, 5, 3), 2, ValueError),
        (torch.ones(2, 4, 3), torch.ones(2, 3), 2, ValueError),
        (torch.ones(3), torch.ones(3), 2, ValueError),
        (torch.ones(2, 3), torch.ones(2, 3).double(), 2, TypeError),
        (torch.ones(2, 3).long(), torch.ones(2, 3).long(), 2, TypeError),
        ([1.0], torch.ones(2, 3), 2, TypeError),
    ],
)
def test_refuses(a, g, p, error):
    with pytest.raises(error):
        sum_grad_power(a, g, p)


A, G = torch.ones(2, 4, 3), torch.ones(2, 4, 5)


@pytest.mark.parametrize(
    ("total", "segments", "p", "error", "text"),
    [
        (torch.zeros(5, 3), [(A, G)], 0, ValueError, "p must be 1"),
        (torch.zeros(3, 5), [(A, G)], 2, ValueError, r"for a total \[3, 5\]"),
        (torch.zeros(15), [(A, G)], 2, ValueError, r"for a total \[15\]"),
        (torch.zeros(5, 3), [(A, G), (A[:1], G[:1])], 2, ValueError, "one N"),
        (torch.zeros(5, 3), [(A, G), (A, G[:, :3])], 2, ValueError, "one N"),
        (torch.zeros(5, 3), [(A.double(), G.double())], 2, TypeError, "total of torch.float32"),
        (torch.zeros(5, 3), [(A, G), (A.half(), G.half())], 2, TypeError, "share one dtype"),
        (torch.zeros(5, 3), [(A, 1.0)], 2, TypeError, "must be tensors"),
        (torch.zeros(5, 3, device="meta"), [(A, G)], 2, ValueError, "one device"),
    ],
)
def test_add_refuses_with_wanted_and_given(total, segments, p, error, text, impl):
    with pytest.raises(error, match=text):
        add_sum_grad_power(total, segments, p, impl)
    assert total.is_meta or not total.any()


@pytest.mark.parametrize(
    ("total", "x", "g", "changed"),
    [
        ((4, 3, 3), (2, 3, 6), (2, 4, 3), {}),  # 4 positions
        ((4, 3, 3), (2, 3, 6), (1, 4, 4), {}),
        ((4, 3, 3), (2, 4, 6), (2, 4, 4), {}),
        ((4, 3, 3), (2, 3, 6, 6), (2, 4, 4), {}),
        ((4, 3, 3), (2, 3, 6), (2, 4, 4), {"stride": (1, 1)}),
        ((4, 3, 3), (2, 3, 6), (2, 4, 4), {"stride": (0,)}),
        ((4, 3, 3), (2, 3, 6), (2, 4, 4), {"padding": (-1,)}),
        ((4, 3, 3), (2, 9, 6), (2, 4, 4), {"groups": 3}),
        ((4, 3), (2, 3, 6), (2, 4, 4), {}),
    ],
)
def test_convolutions_that_do_not_fit_are_refused(total, x, g, changed, impl):
    settings = {"stride": (1,), "padding": (0,), "dilation": (1,), "groups": 1, **changed}
    with pytest.raises(ValueError, match="wanted"):
        add_conv_grad_power(torch.zeros(total), [(torch.ones(x), torch.ones(g))], 2, **settings, impl=impl)


def test_explicit_impl_never_falls_back():
    a = torch.ones(2, 3)
    with pytest.raises(NotImplementedError, match="sum_grad_power"):
        sum_grad_power(a, a, 2, "triton")  # for CUDA tensors
    with pytest.raises(ValueError, match="impl"):
        sum_grad_power(a, a, 2, "cuda")


S = torch.ones(2, 4, 3)


@pytest.mark.parametrize(
    ("total", "uses", "p", "error", "text"),
    [
        (torch.zeros(3), [ScaleUse(S)], 3, ValueError, "p must be 1"),
        (torch.zeros(4), [ScaleUse(S)], 2, ValueError, r"for a total \[4\]"),
        (torch.zeros(2, 4, 3), [ScaleUse(S)], 2, ValueError, r"for a total \[2, 4, 3\]"),
        (torch.zeros(3), [ScaleUse(S), ScaleUse(S[:1])], 2, ValueError, "one N"),
        (torch.zeros(3), [ScaleUse(S, S[..., :1])], 2, ValueError, r"x \[2, 4, 1\]"),
        (torch.zeros(3), [ScaleUse(S, None, torch.ones(3))], 2, ValueError, "wanted x"),
        (torch.zeros(3), [ScaleUse(S, S, torch.ones(4))], 2, ValueError, r"got \[4\] for x"),
        (torch.zeros(3), [ScaleUse(S, S, None, torch.ones(3).half())], 2, TypeError, "total's dtype"),
        (torch.zeros(3), [ScaleUse(S, S.half())], 2, TypeError, "must share"),
        (torch.zeros(3), [ScaleUse(S.double())], 2, TypeError, "total of torch.float32"),
        (torch.zeros(3), [ScaleUse(S), ScaleUse(S.half())], 2, TypeError, "share one dtype"),
        (torch.zeros(3), [ScaleUse(1.0)], 2, TypeError, "must be tensors"),
    ],
)
def test_scales_that_do_not_fit_are_refused(total, uses, p, error, text, impl):
    with pytest.raises(error, match=text):
        add_scale_grad_power(total, uses, p, impl)
    assert not total.any()


@pytest.mark.parametrize(("x", "error"), [(torch.tensor(1.0), ValueError), (torch.ones(2).long(), TypeError)])
def test_moments_are_refused(x, error, impl):
    with pytest.raises(error, match="got"):
        row_moments(x, 1e-5, impl=impl)


# ---- the registered ops ----


def test_opcheck(ops):
    a, g = torch.randn(3, 2, 5), torch.randn(3, 2, 4)
    for dtype in cases.DTYPES:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        pairs = [a.to(dtype), a.to(dtype)[:, :1]], [g.to(dtype), g.to(dtype)[:, :1]]
        torch.library.opcheck(ops.add_sum_grad_power.default, (torch.zeros(4, 5, dtype=wide), *pairs, 2))
    torch.library.opcheck(ops.add_sum_grad_power.default, (torch.zeros(5, 4).t(), [a], [g], 1))
    one = torch.ones(1, 1, 1).expand(a.shape)
    args = (torch.zeros(5), [a, a[:, :1]], [None, a[:, :1]], [None, one[:, :1]], [None, None], 2)
    torch.library.opcheck(ops.add_scale_grad_power.default, args)
    torch.library.opcheck(ops.row_moments.default, (torch.zeros(3, 2, 1), torch.zeros(3, 2, 1), a, 1e-5, True))
    x, y = torch.randn(2, 4, 6, 5), torch.randn(2, 6, 3, 3)
    for total in (torch.zeros(6, 2, 3, 3), torch.zeros(6, 2, 3, 3).to(memory_format=torch.channels_last)):
        args = (total, [x], [y], 2, [2, 2], [1, 1], [1, 1], 2)
        torch.library.opcheck(ops.add_conv_grad_power.default, args)


def test_the_kernels_repeat_the_checks(ops):
    a, g, total = torch.ones(2, 4, 3), torch.ones(2, 4, 5), torch.zeros(5, 3)
    for args, text in (
        ((total, [a], [g], 3), "p 1 or 2, given 3"),
        ((total, [a], [], 2), "as many tensors"),
        ((total, [a], [g.half()], 2), "one dtype"),
        ((total.double(), [a], [g], 2), "total of Float"),
        ((total.t(), [a], [g], 2), r"for \[3, 5\]"),
        ((total, [a[0]], [g], 2), r"given \[4, 3\]"),
        ((total, [a.long()], [g.long()], 2), "float32"),
    ):
        with pytest.raises(RuntimeError, match=text):
            ops.add_sum_grad_power(*args)
    x, y, weight = torch.ones(2, 4, 6), torch.ones(2, 6, 4), torch.zeros(6, 4, 3)
    for args, text in (
        ((weight, [x], [y], 2, [1], [0], [2], 1), "of this convolution"),
        ((weight, [x], [y], 2, [1, 1], [0], [1], 1), "1 numbers"),
        ((weight, [x], [y], 2, [1], [0], [1], 4), "4 groups"),
        ((torch.zeros(6, 4), [x], [y], 2, [1], [0], [1], 1), "spatial"),
    ):
        with pytest.raises(RuntimeError, match=text):
            ops.add_conv_grad_power(*args)
    bias, none = torch.zeros(5), [None]
    for args, text in (
        ((bias, [g], none, none, none, 3), "p 1 or 2, given 3"),
        ((bias, [g], [], none, none, 2), "given 0, 1, 1 and 1"),
        ((bias, [g], [g.half()], none, none, 2), "of Float, given Half"),
        ((bias, [g], [g], [g.double()], none, 2), "of Float, given Double"),
        ((bias, [g], none, [g], none, 2), "given none"),
        ((bias.double(), [g], none, none, none, 2), "total of Float"),
        ((torch.zeros(4), [g], none, none, none, 2), r"a total \[4\] broadcasts"),
        ((torch.zeros(2, 4, 5), [g], none, none, none, 2), r"a total \[2, 4, 5\] broadcasts"),
        ((bias, [g, g[:1]], none * 2, none * 2, none * 2, 2), "with N 2"),
        ((bias, [g], [g[:, :3]], none, none, 2), r"and \[2, 3, 5\]"),
    ):
        with pytest.raises(RuntimeError, match=text):
            ops.add_scale_grad_power(*args)
    for args, text in (
        ((torch.zeros(2, 3, 1), torch.zeros(2, 4, 1), g), "side by side"),
        ((torch.zeros(2, 4, 1), torch.zeros(2, 4, 1).half(), g), "wanted Float"),
    ):
        with pytest.raises(RuntimeError, match=text):
            ops.row_moments(*args, 1e-5, True)
    assert not total.any() and not weight.any() and not bias.any()


def test_compiles_to_one_graph(impl):
    torch.compiler.reset()
    a, g, x, y = torch.randn(4, 3, 6), torch.randn(4, 3, 5), torch.randn(2, 3, 8), torch.randn(2, 7, 4)

    def all_of_them(total: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        add_sum_grad_power(total, [(2 * a, g), (a, g)], 2, impl)
        add_conv_grad_power(
            weight, [(x + 1, y)], 1, stride=(2,), padding=(1,), dilation=(1,), groups=1, impl=impl
        )  # fmt: skip
        add_scale_grad_power(total[0], [ScaleUse(a, a + 1, a[:, :1, :1], a[0, 0]), ScaleUse(2 * a)], 2, impl)
        return sum_grad_power(a, g, 2, impl) + total

    totals = [(torch.zeros(5, 6), torch.zeros(7, 3, 3)) for _ in range(2)]
    got = torch.compile(all_of_them, fullgraph=True, backend="aot_eager")(*totals[0])
    assert torch.equal(got, all_of_them(*totals[1]))
    assert all(map(torch.equal, *totals))


@pytest.mark.gpu
def test_auto_on_a_gpu():
    for case in LARGE:
        got = case.run("auto", torch.float32, "cuda")
        scale = case.error_scale(torch.float32)
        oracle = case.oracle(torch.float32)
        assert_all_within_roundings(got, oracle, roundings=case.roundings, error_scale=scale, context=case.id)


def test_one_position_stays_float32_whatever_torch_multiplies_in():
    a, g = torch.randn(64, 33), torch.randn(64, 17)
    oracle = g.double().square().T @ a.double().square()
    torch.set_float32_matmul_precision("medium")
    try:
        got = sum_grad_power(a, g, 2)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert_within_roundings(got, oracle, roundings=2 + sum_roundings(64))
