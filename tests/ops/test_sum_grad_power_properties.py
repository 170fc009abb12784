"""sum_grad_power on inputs of any shape, layout and dtype, against the float64 reference; drawn by hypothesis."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastewc._dispatch import choose
from fastewc.ops.sum_grad_power import cases
from fastewc.testing import assert_all_within_roundings

IMPLS = ("reference", "native")
# The fixtures of conftest.py (seeds, poisoned memory) hold for all examples of a test alike.
DRAWN = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def native_library() -> None:
    try:
        choose("sum_grad_power", "native", torch.device("cpu"))
    except NotImplementedError as error:
        pytest.skip(str(error))


def check(case: cases.SegmentsCase | cases.ConvCase | cases.ScaleCase, dtype: torch.dtype) -> None:
    oracle, scale = case.oracle(dtype), case.error_scale(dtype)
    for impl in IMPLS:
        got = case.run(impl, dtype)
        assert_all_within_roundings(got, oracle, roundings=case.roundings, error_scale=scale, context=impl)
        assert torch.equal(got[0], case.run(impl, dtype)[0]), f"{impl} is not deterministic"


sizes = st.integers(0, 40)
powers = st.sampled_from([1, 2])
dtypes = st.sampled_from(cases.DTYPES)
totals = st.sampled_from(["contiguous", "transposed", "gaps"])


@DRAWN
@given(
    case=st.builds(
        cases.SegmentsCase, N=st.integers(0, 9), T=st.lists(st.integers(0, 20), max_size=3).map(tuple), I=sizes,
        O=sizes, p=powers, total=totals, layout=st.sampled_from(["contiguous", "time_first", "transposed", "expanded"]),
    ),
    dtype=dtypes,
)  # fmt: skip
def test_linear_layers(case: cases.SegmentsCase, dtype: torch.dtype) -> None:
    check(case, dtype)


@st.composite
def convolutions(draw: st.DrawFn) -> cases.ConvCase:
    """Of one to three dimensions, whose kernel fits into the padded input."""
    groups, dims = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    kernel = tuple(draw(st.integers(1, 4 - dims // 2)) for _ in range(dims))
    padding, dilation = draw(st.integers(0, 3)), draw(st.integers(1, 3))
    least = [max(1, dilation * (k - 1) + 1 - 2 * padding) for k in kernel]
    return cases.ConvCase(
        N=draw(st.integers(0, 4)), C=groups * draw(st.integers(1, 5)), O=groups * draw(st.integers(1, 12)),
        spatial=tuple(draw(st.integers(size, size + 4)) for size in least), kernel=kernel, padding=padding,
        dilation=dilation, stride=draw(st.integers(1, 3)), groups=groups, segments=draw(st.integers(1, 2)),
        p=draw(powers), total=draw(totals), layout=draw(st.sampled_from(["contiguous", "channels_last", "transposed"])),
    )  # fmt: skip


@DRAWN
@given(case=convolutions(), dtype=dtypes)
def test_convolutions(case: cases.ConvCase, dtype: torch.dtype) -> None:
    check(case, dtype)


@st.composite
def scales(draw: st.DrawFn) -> cases.ScaleCase:
    """Parameters of up to three dimensions, some of size 1; other dimensions in front, and others for each use."""
    few = st.lists(st.sampled_from([0, 1, 2, 5, 9, 40, 530]), max_size=3)
    weight = tuple(draw(few.filter(lambda sizes: math.prod(sizes) < 3000)))
    shapes = []
    for _ in range(draw(st.integers(0, 3))):
        own = tuple(size if size != 1 else draw(st.sampled_from([1, 1, 7, 20])) for size in weight)
        shapes.append((*draw(st.lists(st.sampled_from([0, 1, 2, 3, 11]), max_size=2)), *own))
    layouts = ["contiguous", "channels_first", "transposed", "expanded"]
    if all(shapes):
        layouts.append("time_first")
    return cases.ScaleCase(
        N=draw(st.integers(0, 9)), weight=weight, shapes=tuple(shapes), p=draw(powers), total=draw(totals),
        kind=draw(st.sampled_from(["bias", "scale", "norm", "statistics"])), layout=draw(st.sampled_from(layouts)),
    )  # fmt: skip


@DRAWN
@given(case=scales(), dtype=dtypes)
def test_scales_and_biases(case: cases.ScaleCase, dtype: torch.dtype) -> None:
    check(case, dtype)
