"""Weights in two halves: the split and its inverse on every pattern of bits, and steps that are those of float32."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastewc.ops.ewc_step import StepTensors, ewc_step, halves, whole
from tests.ops.drawn_steps import LAYOUTS, implementations
from tests.ops.split_steps import RULES, VARIANTS, Setting, check_same_bits, weights

# Zeros, subnormals, ones and their neighbours, ties, the largest numbers, infinities and NaN, of both signs.
EDGES = [0, 1, 0x7FFF, 0x8000, 0x8001, 0x7FFFFF, 0x800000, 0x3F800000, 0x3F808000, 0x3F818000, 0x3F7FFFFF]
EDGES += [0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7F808000, 0x7FC00000, 0x7FFF8000, 0x7FFFFFFF]
EDGES += [0x80000000 | bits for bits in EDGES]
bit_patterns = st.lists(st.integers(0, 2**32 - 1) | st.sampled_from(EDGES), min_size=1, max_size=64)
pairs_of_halves = st.lists(
    st.tuples(st.integers(0, 2**16 - 1), st.integers(-(2**15), 2**15 - 1)), min_size=1, max_size=64
)
drawn = settings(max_examples=300, derandomize=True, database=None, deadline=None)


def words(bits: list[int]) -> Tensor:
    return torch.tensor(bits, dtype=torch.int64).to(torch.uint32).view(torch.float32)


def same_bits(a: Tensor, b: Tensor) -> bool:
    integer = {2: torch.int16, 4: torch.int32}[a.itemsize]
    return a.dtype == b.dtype and torch.equal(a.view(integer), b.view(integer))


def step_of_nothing(p: Tensor, remainders: list[Tensor], impl: str) -> Tensor:
    """The parameter after a step with α = 0, which reads and writes w − 0·g."""
    t = StepTensors(params=[p.clone()], grads=[torch.zeros_like(p)], remainders=remainders)
    ewc_step(dataclasses.replace(RULES["sgd"], lr=0.0, weight_decay=0.0), t, impl=impl)
    return t.params[0]


@drawn
@given(bit_patterns)
def test_halves_are_exactly_the_weight(bits: list[int]) -> None:
    w = words([*bits, *EDGES])
    high, low = halves(w)
    assert (high.dtype, low.dtype) == (torch.bfloat16, torch.int16)
    back, nan = whole(high, low), w.isnan()
    assert same_bits(back[~nan], w[~nan])
    assert bool((high[nan].view(torch.int16) == 0x7FC0).all()) and not bool(low[nan].any())
    assert bool(back[nan].isnan().all())
    # The nearest bfloat16; of the two that a tie lies between, the one farther from zero.
    finite, ties = w.isfinite(), (w.view(torch.int32) & 0xFFFF) == 0x8000
    assert same_bits(high[finite & ~ties], w.bfloat16()[finite & ~ties])
    assert bool((high.float().abs() > w.abs())[finite & ties].all())
    # A weight that bfloat16 holds has no remainder.
    again, nothing = halves(high.float())
    assert same_bits(again, high) and not bool(nothing.any())


@drawn
@given(pairs_of_halves)
def test_a_remainder_that_stayed_moves_a_new_weight_by_half_an_ulp_at_most(pairs: list[tuple[int, int]]) -> None:
    pairs = [*pairs, (0, -5), (0x8000, -5), (0x7F80, 5), (0xFF80, 5), (0, 5), (0x7FC0, -9)]
    high = torch.tensor([top for top, _ in pairs], dtype=torch.int64).to(torch.uint16).view(torch.bfloat16)
    low = torch.tensor([rest for _, rest in pairs], dtype=torch.int16)
    w, top = whole(high, low), high.view(torch.int16)
    assert torch.equal(w.isnan(), high.isnan())  # nobody's stale half makes a NaN of a number
    beside = (top + low.sign() * ((top != 0) | (low > 0))).view(torch.bfloat16).double()  # the next one on its side
    known = high.isfinite() & beside.isfinite()
    assert bool(((w.double() - high.double()).abs() <= (beside - high.double()).abs() / 2)[known].all())


@drawn
@given(bit_patterns, pairs_of_halves)
def test_every_implementation_splits_and_joins_alike(bits: list[int], pairs: list[tuple[int, int]]) -> None:
    high, low = halves(words([*bits, *EDGES]))
    other = torch.tensor([top for top, _ in pairs], dtype=torch.int64).to(torch.uint16).view(torch.bfloat16)
    high = torch.cat([high, other, torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan]).bfloat16()])
    low = torch.cat([low, torch.tensor([rest for _, rest in pairs] + [-5, -5, 5, 5, -9], dtype=torch.int16)])
    for impl in implementations("cpu"):
        own = low.clone()
        got, wanted = step_of_nothing(high, [own], impl), halves(step_of_nothing(whole(high, low), [], impl))
        assert same_bits(got, wanted[0]) and torch.equal(own, wanted[1]), impl


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", RULES)
def test_steps_are_those_of_float32(name: str, variant: str, device: str) -> None:
    for impl in implementations(device):
        check_same_bits(dataclasses.replace(RULES[name], variant=variant), impl, Setting(device=device))


@pytest.mark.parametrize(
    "setting",
    [
        Setting(codes=True, steps=30),
        Setting(anchor=torch.float32, steps=30),
        Setting(grad=torch.float32, steps=30),
        *(Setting(layout=layout, steps=10) for layout in LAYOUTS[1:]),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["nesterov", "adamw", "amsgrad"])
def test_steps_are_those_of_float32_however_things_are_stored(name: str, setting: Setting, device: str) -> None:
    for impl in implementations(device):
        check_same_bits(RULES[name], impl, dataclasses.replace(setting, device=device))


@pytest.mark.parametrize("name", RULES)
def test_plain_bfloat16_is_not_float32(name: str) -> None:
    """So the checks above can fail: without the lower halves most updates vanish."""
    setting = Setting()
    plain, exact = setting.tensors(RULES[name], True), setting.trained(RULES[name], "reference", split=False)
    start = [p.clone() for p in plain.params]
    plain.remainders.clear()
    gen = torch.Generator().manual_seed(4)
    for _ in range(setting.steps):
        grads = [torch.randn(p.shape, generator=gen).bfloat16() for p in plain.params]
        scalars = {"clip_coef": torch.tensor(0.5), "grad_scale": torch.tensor(8.0)}
        ewc_step(RULES[name], dataclasses.replace(plain, grads=grads), impl="reference", **scalars)
    stuck = torch.cat([(p == w).flatten() for p, w in zip(plain.params, start, strict=True)])
    moved = torch.cat([(p.bfloat16() != w).flatten() for p, w in zip(weights(exact), start, strict=True)])
    assert not all(map(torch.equal, plain.params, [halves(w)[0] for w in weights(exact)]))
    assert int((stuck & moved).sum()) > 100


@pytest.mark.parametrize("moment", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", RULES)
def test_found_inf_leaves_both_halves(name: str, moment: torch.dtype, device: str) -> None:
    for impl in implementations(device):
        t = Setting(moment=moment, steps=3, device=device).trained(RULES[name], impl, split=True)
        before = [x.clone() for x in (*t.params, *t.remainders)]
        ewc_step(RULES[name], t, found_inf=torch.tensor(1.0, device=device), impl=impl)
        assert all(map(torch.equal, before, (*t.params, *t.remainders)))


def test_remainders_that_do_not_fit_are_refused() -> None:
    p = torch.zeros(3, dtype=torch.bfloat16)
    for param, low in ((p.float(), torch.zeros(3, dtype=torch.int16)), (p, torch.zeros(3, dtype=torch.int32))):
        t = StepTensors(params=[param], grads=[param.clone()], remainders=[low])
        with pytest.raises(ValueError, match=f"int16 remainders of bfloat16 params, given {low.dtype} of"):
            ewc_step(RULES["sgd"], t)
    with pytest.raises(ValueError, match="remainders has 2 entries"):
        ewc_step(RULES["sgd"], StepTensors(params=[p], grads=[p], remainders=[None, None]))
