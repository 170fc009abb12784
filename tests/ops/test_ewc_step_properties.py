"""ewc_step on drawn inputs and at the edges of what kernels count in, against the float64 reference.

The drawing is derandomised: every run tests the same inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastewc.ops.ewc_step import StepRule, StepTensors, ewc_step
from tests.ops.drawn_steps import LAYOUTS, Drawn, drawn_case, implementations

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
VARIANTS = ("plain", "stabilized", "proximal", "wva")
# Vectors hold 4 to 16 numbers, blocks 1,024; a thread takes 16 blocks at least.
EDGES = (0, 1, 3, 7, 8, 15, 16, 17, 63, 64, 65, 127, 128, 129, 1023, 1024, 1025, 16383, 16384, 16385)


@pytest.fixture(autouse=True, scope="module")
def three_threads() -> Iterator[None]:
    """So that work is shared out unevenly, however many cores there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@st.composite
def rules(draw: st.DrawFn, live: torch.dtype | None) -> StepRule:
    """Any rule; scalars that may live on a device do so at random, with dtype ``live``."""

    def scalar(low: float, high: float, dtype: torch.dtype | None = live, zero: bool = False) -> float | Tensor:
        value = draw(st.floats(low, high))
        value = 0.0 if zero and draw(st.booleans()) else value
        return value if dtype is None or draw(st.booleans()) else torch.tensor(value, dtype=dtype)

    rule = StepRule(
        draw(st.sampled_from(["sgd", "adam"])),
        lr=scalar(1e-4, 0.5),
        weight_decay=scalar(1e-4, 0.3, zero=True),
        maximize=draw(st.booleans()),
        variant=draw(st.sampled_from(VARIANTS)),
        ewc_lambda=scalar(1e-3, 10.0, zero=True),
        clip_penalty=draw(st.booleans()),
        regularized_path=draw(st.booleans()),
    )
    if rule.kind == "adam":
        wide = None if live is None else torch.float64  # 1 − βᵗ of a float32 β has no digits to compare
        return replace(
            rule,
            betas=(scalar(0.3, 0.97, wide, zero=True), scalar(0.5, 0.9999, wide)),  # β₁ near 0 drowns in 1 − β₁
            eps=draw(st.sampled_from([1e-8, 1e-3])),
            amsgrad=draw(st.booleans()),
            decoupled_weight_decay=draw(st.booleans()),
        )
    momentum, nesterov = draw(st.sampled_from([0.0, 0.5, 0.9])), draw(st.booleans())
    dampening = 0.0 if nesterov else draw(st.sampled_from([0.0, 0.3]))
    return replace(rule, momentum=momentum, nesterov=nesterov and momentum > 0, dampening=dampening)


shapes = st.one_of(
    st.lists(st.integers(0, 20), max_size=3).map(tuple),
    st.tuples(*[st.integers(1, 6)] * 4),
    st.sampled_from(EDGES[:17]).map(lambda n: (n,)),
)


@st.composite
def cases(draw: st.DrawFn) -> Drawn:
    sizes = draw(st.lists(shapes, min_size=1, max_size=4))
    own = [draw(st.sampled_from(DTYPES)) for _ in sizes]
    live = draw(st.sampled_from([None, torch.float64, torch.float32]))
    if live == torch.float32 and torch.float64 in own:
        live = torch.float64  # else the reference itself would compute a float64 step with float32 scalars
    # For each parameter one layout and dtype for all that belongs to it, or any for each.
    alike = [draw(st.none() | st.sampled_from(LAYOUTS)) for _ in sizes]
    mixed = draw(st.booleans())
    grads = (*LAYOUTS, "expanded")

    def layout(i: int, name: str) -> str:
        return alike[i] or draw(st.sampled_from(grads if name == "grads" else LAYOUTS))

    def dtype(i: int, name: str, own: torch.dtype) -> torch.dtype:
        return draw(st.sampled_from(DTYPES)) if mixed and name else own

    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    weights = [torch.randn(size, generator=gen, dtype=torch.float64) for size in sizes]
    return drawn_case(
        draw(rules(live)),
        [w.to(dtype) for w, dtype in zip(weights, own, strict=True)],
        gen,
        layouts=layout,
        dtypes=dtype,
        protected=lambda i: draw(st.booleans()),
        tracked=lambda i: draw(st.booleans()),
        fresh=lambda i: draw(st.booleans()),
        clip_coef=draw(st.none() | st.floats(0.01, 1.0)),
        grad_scale=draw(st.none() | st.sampled_from([0.5, 3.0, 1024.0])),
    )


@settings(
    max_examples=800,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(case=cases())
def test_any_call_agrees_with_float64(case: Drawn, device: str):
    case.check(device)


MOMENTUM = StepRule("sgd", lr=0.05, momentum=0.9, weight_decay=0.01, ewc_lambda=3.0)
ADAMW = StepRule("adam", lr=0.01, weight_decay=0.1, decoupled_weight_decay=True, ewc_lambda=3.0)
EDGE_RULES = {
    "sgd-proximal": replace(MOMENTUM, momentum=0.0, variant="proximal"),
    "momentum-stabilized": MOMENTUM,
    "adamw-stabilized": ADAMW,
    "adamw-amsgrad-wva": replace(ADAMW, amsgrad=True, variant="wva"),
}


@pytest.mark.parametrize("layout", ["contiguous", "misaligned", "gaps"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", EDGE_RULES.values(), ids=EDGE_RULES)
def test_sizes_around_the_edges_of_vectors_and_blocks(rule: StepRule, dtype: torch.dtype, layout: str, device: str):
    gen = torch.Generator().manual_seed(1)
    sizes = EDGES if layout == "contiguous" else EDGES[:17]
    params = [torch.randn(n, generator=gen, dtype=torch.float64).to(dtype) for n in sizes]
    drawn_case(rule, params, gen, layouts=lambda i, name: layout, tracked=lambda i: i % 2 == 0).check(device)


@pytest.mark.parametrize("rule", EDGE_RULES.values(), ids=EDGE_RULES)
def test_five_hundred_tensors_of_every_pattern(rule: StepRule, device: str):
    gen = torch.Generator().manual_seed(2)
    params = [torch.randn((i % 7, 1 + i % 5), generator=gen).to(DTYPES[i % 4 if i % 3 else 0]) for i in range(500)]
    case = drawn_case(
        rule, params, gen, protected=lambda i: i % 4 != 1, tracked=lambda i: i % 6 != 2, fresh=lambda i: i % 5 == 3
    )
    case.check(device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_rows_more_than_two_to_the_31_elements_apart(dtype: torch.dtype, device: str):
    """A storage nobody fills: only its first and its last page are ever touched."""
    row, apart = 40, 2**31 + 8
    storage = torch.UntypedStorage((apart + row) * dtype.itemsize, device=device)
    far = torch.tensor([], dtype=dtype, device=device).set_(storage, 0, (2, row), (apart, 1))
    near = torch.randn(2, row).to(device, dtype)
    omega, anchor, grad = torch.rand(2, row).to(device), torch.randn_like(near), torch.randn_like(near)
    for impl in implementations(device):
        far.copy_(near)
        one, other = (StepTensors([w], [grad], importances=[omega], anchors=[anchor]) for w in (far, near.clone()))
        for tensors in (one, other):
            ewc_step(EDGE_RULES["sgd-proximal"], tensors, impl=impl)
        assert torch.equal(far, other.params[0]), impl


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    """The last elements, past what 32 bits count, are stepped as a short tensor of the same values is."""
    n, tail = 2**31 + 1025, 2048
    short = torch.randn(tail, device="cuda").half()
    for impl in implementations("cuda"):
        if impl == "reference":
            continue  # its intermediate tensors would take 60 GB
        long, grads = torch.zeros(2, n, dtype=torch.float16, device="cuda")
        long[-tail:], grads[-tail:] = short, short.flip(0)
        ewc_step(StepRule("sgd", lr=0.5), StepTensors([long], [grads]), impl=impl)
        wanted = StepTensors([short.clone()], [short.flip(0)])
        ewc_step(StepRule("sgd", lr=0.5), wanted, impl=impl)
        assert torch.equal(long[-tail:], wanted.params[0]), impl
        assert not long[:-tail].any(), impl
