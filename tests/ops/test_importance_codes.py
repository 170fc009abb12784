"""The byte that holds an importance: every bound of its specification, unbiasedness, a hundred tasks."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastewc._dispatch import choose
from fastewc.ops.ewc_penalty import ewc_hold_back_, ewc_penalty, ewc_stats
from fastewc.ops.ewc_step import StepRule, StepTensors, ewc_step
from fastewc.ops.importance_codes import BLOCK, LARGEST, Codes, encode, numbers
from fastewc.testing import assert_within_roundings

DECADES = 1e-6  # of a block's maximum: what is smaller has no relative bound
NEAREST, STOCHASTIC = 0.03, 0.06

sizes = st.sampled_from([0, 1, 2, 17, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
magnitudes = st.floats(-28, 30)


def drawn(n: int, low: float, span: float, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Ω from 10^low over ``span`` decades, every fifth 0."""
    generator = torch.Generator().manual_seed(seed)
    x = 10 ** (low + span * torch.rand(n, generator=generator, dtype=torch.float64))
    x[::5] = 0
    return x.to(dtype)


def maxima(x: Tensor) -> Tensor:
    """The maximum of each element's block."""
    found = [block.max().expand(len(block)) for block in x.flatten().split(BLOCK) if len(block)]
    return torch.cat(found).view_as(x) if found else x.clone()


def check_bounds(x: Tensor, got: Tensor, relative: float) -> None:
    x, got, largest = x.double(), got.double(), maxima(x).double()
    error = (got - x).abs()
    assert (got[x == 0] == 0).all() and (got >= 0).all() and got.shape == x.shape
    near = x >= DECADES * largest
    assert (error[near] <= relative * x[near]).all(), (error / x)[near & (x > 0)].max()
    assert (error[~near] <= DECADES * largest[~near]).all(), (error / largest)[~near].max()


@settings(max_examples=60, deadline=None)
@given(sizes, magnitudes, st.floats(0, 8), st.integers(0, 2**32), st.sampled_from([torch.float32, torch.float64]))
def test_the_bounds_hold_over_all_magnitudes(n, low, span, seed, dtype):
    x = drawn(n, low, min(span, 37 - low), seed, dtype)
    check_bounds(x, encode(x, x).decoded(dtype), NEAREST)
    generator = torch.Generator().manual_seed(seed)
    check_bounds(x, encode(x, x, generator).decoded(dtype), STOCHASTIC)


def test_the_bounds_hold_for_every_float_of_seven_decades():
    """Every mantissa near every border of the code, beside a maximum that is as unlucky as can be."""
    exponents = torch.arange(-24, 1).double()
    mantissas = torch.linspace(1, 2, 4001, dtype=torch.float64)[:-1]
    x = (mantissas * 2 ** exponents[:, None]).flatten().float()
    for largest in (x[x <= 1].max(), torch.tensor(1.0), torch.tensor(1.0).nextafter(torch.tensor(2.0))):
        rows = x[x <= largest]
        rows = rows[: len(rows) // (BLOCK - 1) * (BLOCK - 1)].view(-1, BLOCK - 1)
        blocks = torch.cat([rows, largest.expand(len(rows), 1)], 1)
        check_bounds(blocks, encode(blocks, blocks).decoded(), NEAREST)
        check_bounds(blocks, encode(blocks, blocks, torch.Generator().manual_seed(0)).decoded(), STOCHASTIC)


def test_a_byte_means_what_the_specification_says():
    codes = torch.arange(256, dtype=torch.uint8).repeat(4)
    for exponent in (-104, 0, 127):
        got = Codes(codes, torch.tensor([2.0**exponent])).decoded()
        for c in (0, 1, 2, 3, 4, 128, 254, 255):
            octave, i = divmod(c + 9, 12)
            mantissa = 2**23 + 485_676 * i + 13_371 * i**2 + 365 * i**3
            wanted = math.ldexp(mantissa, octave - 22 - 23 + exponent) if c else 0.0
            assert got[c].item() == wanted, (c, exponent)
    steps = Codes(codes, torch.tensor([1.0])).decoded(torch.float64)[1:256]
    assert (steps[1:] / steps[:-1]).max() <= 1.05955 and steps[-1] == 1


def test_what_was_decoded_is_encoded_without_loss_also_into_other_blocks():
    x = drawn(5 * BLOCK + 3, -4, 4, seed=1)
    value = encode(x, x).decoded()
    for generator in (None, torch.Generator().manual_seed(0)):
        assert torch.equal(encode(value, value, generator).decoded(), value)
    shifted = value.roll(517)
    assert torch.equal(encode(shifted, shifted).decoded(), shifted)


@pytest.mark.parametrize("value", [1.3e-3, 0.7, 3e-7, 1.0, 2.0**-30])
def test_stochastic_rounding_is_unbiased(value):
    """The mean of N draws lies within 6 standard errors: a chance of 2e-9 for a right one to fail."""
    n = 400 * BLOCK
    x = torch.full((n,), value)
    x[::BLOCK] = 0.9  # far from a power of two: the maximum itself is rounded too
    got = encode(x, x, torch.Generator().manual_seed(3)).decoded(torch.float64)
    others = torch.ones(n, dtype=torch.bool)
    others[::BLOCK] = False
    for chosen, wanted in ((others, float(torch.tensor(value))), (~others, float(torch.tensor(0.9)))):
        low, high = got[chosen].min(), got[chosen].max()
        # A value between neighbours a < b has the variance (x − a)(b − x).
        error = max(float((high - wanted) * (wanted - low)), 0.0) ** 0.5 / int(chosen.sum()) ** 0.5
        assert abs(float(got[chosen].mean()) - wanted) <= 6 * error + wanted * 2**-24 * 4
        assert low <= wanted <= high


def test_a_hundred_equal_tasks_add_up_to_a_hundred():
    """With rounding to nearest they stall: an addend below 3 % of the sum is lost."""
    n, tasks = 200 * BLOCK, 100
    x = drawn(n, -3, 3, seed=2).clamp(min=1e-3)
    held, stalled = encode(x, x), encode(x, x)
    generator = torch.Generator().manual_seed(4)
    for _ in range(tasks - 1):
        held = encode(held.decoded() + x, x, generator)
        stalled = encode(stalled.decoded() + x, x)
    ratio = held.decoded(torch.float64) / (tasks * x.double())
    # Each of the K roundings of kΩ has a standard deviation of at most half a step: 0.03 kΩ; their squares add up.
    deviation = 0.03 * (tasks**3 / 3) ** 0.5 / tasks
    # The first task is rounded to nearest, within 3 % of one of a hundred.
    assert abs(float(ratio.mean()) - 1) <= 6 * deviation / n**0.5 + NEAREST / tasks
    assert float(ratio.std()) <= deviation
    assert float((stalled.decoded() / (tasks * x)).mean()) < 0.5


def test_seeds_decide():
    x = drawn(3 * BLOCK, -3, 3, seed=5)
    a, b, c = (encode(x, x, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(a.codes, b.codes) and torch.equal(a.scales, b.scales) and not torch.equal(a.codes, c.codes)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (7,), (33, 130), (40, 6, 5, 3)])
def test_codes_lie_as_the_parameter(shape):
    generator = torch.Generator().manual_seed(6)
    x = torch.rand(shape, generator=generator)
    layouts = [torch.empty(shape)]
    if len(shape) == 4:
        layouts.append(torch.empty(shape, memory_format=torch.channels_last))
    if len(shape) == 2:
        layouts += [torch.empty(shape[::-1]).t(), torch.empty(shape[0], 2 * shape[1])[:, ::2]]
    for parameter in layouts:
        codes = encode(x, parameter)
        assert codes.lie_as(parameter) and codes.shape == x.shape and codes.numel() == x.numel()
        codes.check("w")
        assert ((codes.decoded() - x).abs() <= NEAREST * x).all()
        for other in layouts:
            moved = codes.relaid(other)
            assert moved.lie_as(other) and torch.equal(moved.decoded(), codes.decoded())
        assert codes.relaid(parameter) is codes


def test_ends_of_the_range():
    x = torch.tensor([LARGEST, LARGEST / 2, 1e30])
    assert torch.equal(encode(x, x).decoded()[:2], x[:2])
    tiny = torch.tensor([2.0**-126, 2.0**-140, 0.0])
    got = encode(tiny, tiny)
    assert got.decoded()[0] == tiny[0] and got.decoded()[2] == 0 and got.scales[0] == 2.0**-126
    assert encode(torch.zeros(3), torch.zeros(3)).scales[0] == 0
    assert torch.equal(numbers(tiny, torch.float64), tiny.double())


def test_damaged_codes_are_named():
    good = encode(torch.rand(2000), torch.empty(2000))
    for codes, scales in (
        (good.codes.int(), good.scales),
        (good.codes, good.scales[:1]),
        (good.codes, good.scales.double()),
        (good.codes, good.scales * 1.5),
        (good.codes, good.scales * torch.inf),
        (good.codes, -good.scales),
        (torch.zeros(4000, dtype=torch.uint8)[::2], good.scales),
    ):
        with pytest.raises(ValueError, match=r"'layer\.weight'"):
            Codes(codes, scales).check("layer.weight")


def implementations() -> list[str]:
    found = ["reference"]
    try:
        choose("ewc_step", "native", torch.device("cpu"))
    except NotImplementedError:
        return found
    return [*found, "native"]


SHAPES = [(1,), (BLOCK,), (BLOCK + 1,), (0,), (40, 6, 5, 13), (40, 6, 5, 13), (30, 140)]


def laid_out() -> tuple[list[Tensor], list[Tensor]]:
    """Weights, and what decides the order of their codes: the last three lie otherwise than torch's default."""
    params = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(SHAPES)]
    params[-3] = params[-3].contiguous(memory_format=torch.channels_last)
    params[-1] = torch.zeros(30, 280)[:, 1::2].copy_(params[-1])
    layouts = list(params)
    layouts[-2] = params[-3]  # the codes of a contiguous weight, channels_last
    return params, layouts


def codes_of(params: list[Tensor], layouts: list[Tensor]) -> list[Codes]:
    pairs = zip(params, layouts, strict=True)
    return [encode(drawn(p.numel(), -3, 5, seed=i).view(p.shape), at) for i, (p, at) in enumerate(pairs)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", ["plain", "stabilized", "proximal", "wva"])
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_steps_take_codes_as_the_numbers_that_they_stand_for(kind, variant, dtype):
    """Around blocks and in every order, gradients that lie otherwise than the weight included."""
    params, layouts = laid_out()
    codes = codes_of(params, layouts)
    for impl in implementations():
        results = []
        for omegas in (codes, [one.decoded(torch.promote_types(dtype, torch.float32)) for one in codes]):
            t = StepTensors([p.to(dtype) for p in params], [p.to(dtype) for p in params], importances=list(omegas))
            t.grads[5] = t.grads[5].contiguous()
            t.anchors.extend((1.25 * p).bfloat16() for p in params)
            if kind == "adam":
                t.exp_avgs.extend(torch.ones_like(p) for p in t.params)
                t.exp_avg_sqs.extend(torch.ones_like(p) for p in t.params)
                t.steps.extend(torch.ones(()) for _ in params)
            ewc_step(StepRule(kind, lr=0.1, ewc_lambda=3.0, variant=variant), t, impl=impl)
            results.append(t.params)
        for i, (a, b) in enumerate(zip(*results, strict=True)):
            # The kernel for codes is another loop, in which the compiler may fuse other products into sums.
            assert_within_roundings(a, b.double(), roundings=16, error_scale=b.abs() + 10, context=f"{impl} [{i}]")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_penalty_takes_codes_as_the_numbers_that_they_stand_for(dtype):
    params, layouts = laid_out()
    params = [p.to(dtype) for p in params]
    codes = codes_of(params, layouts)
    anchors = [(1.25 * p).bfloat16() for p in params]
    lrs = [0.1] * len(params)
    shared = {"ewc_lambda": 3.0, "lrs": lrs}
    for impl in implementations():
        got = []
        for omegas in (codes, [one.decoded(torch.promote_types(dtype, torch.float32)) for one in codes]):
            held = [p.clone().requires_grad_() for p in params]
            value = ewc_penalty(held, omegas, anchors, variant="stabilized", impl=impl, **shared)
            pulls = torch.autograd.grad(value, held)
            stats = ewc_stats(params, omegas, anchors, variant="stabilized", impl=impl, **shared)
            back = [p.clone() for p in params]
            ewc_hold_back_(back, anchors, omegas, impl=impl, **shared)
            got.append((value, *pulls, torch.tensor([*stats.values()]), *back))
        assert all(map(torch.equal, *got)), impl


def test_scales_that_do_not_fit_are_refused():
    if "native" not in implementations():
        pytest.skip("needs the native library")
    w = torch.zeros(3000)
    codes = encode(torch.ones(3000), w)
    for scales in (codes.scales[:2], codes.scales.double(), codes.scales.repeat(2)[::2]):
        tensors = StepTensors([w], [w], importances=[Codes(codes.codes, scales)], anchors=[w])
        with pytest.raises(RuntimeError, match="scales"):
            ewc_step(StepRule("sgd", lr=0.1), tensors, impl="native")
    tensors = StepTensors([w], [codes.codes], importances=[codes], anchors=[w])
    with pytest.raises(RuntimeError, match="Byte"):
        ewc_step(StepRule("sgd", lr=0.1), tensors, impl="native")
