"""The op itself: every case against its float64 oracle, hand-worked steps, layouts, no-ops, contract errors."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from fastewc.ops.ewc_step import StepRule, StepTensors, clip_coefficient, ewc_step, gradient_norm, reference
from fastewc.ops.ewc_step.cases import CASES, Case
from fastewc.ops.importance_codes import Codes
from fastewc.testing import assert_all_within_roundings, assert_within_roundings

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SGD = StepRule("sgd", lr=0.5, ewc_lambda=2.0)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def held(w: Tensor, g: Tensor, omega: Tensor, anchor: Tensor, **lists: list[Tensor]) -> StepTensors:
    return StepTensors(params=[w], grads=[g], importances=[omega], anchors=[anchor], **lists)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_case_is_within_counted_roundings_of_float64(case: Case, dtype: torch.dtype, device: str):
    got = case.run("auto", dtype, device)
    scale = case.error_scale(dtype)
    assert_all_within_roundings(got, case.oracle(dtype), roundings=case.roundings, error_scale=scale)


def test_the_cases_bound_sees_a_wrong_penalty():
    # λ off by 1e-5, or the penalty taken after the decay, must not pass: the bound is not slack.
    case = next(case for case in CASES if case.id == "adamw-plain")
    off = dataclasses.replace(case, rule=dataclasses.replace(case.rule, ewc_lambda=3.0 * (1 + 1e-5)))
    with pytest.raises(AssertionError, match="outside the rounding bound"):
        assert_all_within_roundings(
            off.run("auto", torch.float32),
            case.oracle(torch.float32),
            roundings=case.roundings,
            error_scale=case.error_scale(torch.float32),
        )


@pytest.mark.parametrize(
    ("variant", "wanted"),
    [
        # α = 0.5, λ = 2, Ω = 3: s = αλΩ = 3. w = 2, w* = 1, g = 0.25.
        ("plain", 2 - 0.5 * (0.25 + 6 * 1)),  # c = λΩ = 6
        ("stabilized", 2 - 0.5 * (0.25 + 1.5 * 1)),  # c = 6/4
        ("proximal", (2 - 0.125 + 3 * 1) / 4),
        ("wva", 2 + (-0.125) / 4),
    ],
)
def test_one_sgd_step_by_hand(variant: str, wanted: float):
    t = held(f64(2.0), f64(0.25), f64(3.0), f64(1.0))
    ewc_step(dataclasses.replace(SGD, variant=variant), t)
    assert_within_roundings(t.params[0], f64(wanted), roundings=8)


def test_the_task_gradient_is_clipped_and_the_penalty_is_not():
    t = held(f64(2.0), f64(8.0), f64(3.0), f64(1.0))
    ewc_step(SGD, t, clip_coef=torch.tensor(0.25))
    assert_within_roundings(t.params[0], f64(2 - 0.5 * (0.25 * 8 + 1.5)), roundings=8)
    t = held(f64(2.0), f64(8.0), f64(3.0), f64(1.0))
    ewc_step(dataclasses.replace(SGD, clip_penalty=True), t, clip_coef=torch.tensor(0.25))
    assert_within_roundings(t.params[0], f64(2 - 0.5 * 0.25 * (8 + 1.5)), roundings=8)


def test_the_penalty_comes_from_the_weight_before_decoupled_decay():
    # αη = 0.5 halves w. Adam's first step is α·g/(|g| + ε), g = grad + c(w − w*) = 0.5 + 6·(2 − 1); with the
    # decayed weight 1 the pull would vanish.
    rule = StepRule(
        "adam", lr=0.5, weight_decay=1.0, decoupled_weight_decay=True, eps=13.0, variant="plain", ewc_lambda=2.0
    )
    moments = {"exp_avgs": [f64(0.0)], "exp_avg_sqs": [f64(0.0)], "steps": [torch.tensor(0.0)]}
    t = held(f64(2.0), f64(0.5), f64(3.0), f64(1.0), **moments)
    ewc_step(rule, t)
    # √v/√(1 − β₂) = 6.5, m/(1 − β₁) = 6.5, eps = 13.
    assert_within_roundings(t.params[0], f64(2 * 0.5 - 0.5 * 6.5 / 19.5), roundings=16)
    assert t.steps[0] == 1


def test_coupled_decay_joins_the_gradient_after_the_penalty():
    rule = dataclasses.replace(SGD, weight_decay=0.5, variant="plain")
    t = held(f64(2.0), f64(0.25), f64(3.0), f64(1.0))
    ewc_step(rule, t)
    assert_within_roundings(t.params[0], f64(2 - 0.5 * (0.25 + 6 + 0.5 * 2)), roundings=8)


def test_maximize_flips_the_task_gradient_and_not_the_penalty():
    t = held(f64(2.0), f64(0.25), f64(3.0), f64(1.0))
    ewc_step(dataclasses.replace(SGD, maximize=True), t)
    assert_within_roundings(t.params[0], f64(2 - 0.5 * (-0.25 + 1.5)), roundings=8)


@pytest.mark.parametrize("variant", ["proximal", "wva", "plain", "stabilized"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_importance_is_an_exact_no_op(variant: str, dtype: torch.dtype):
    w, g = torch.randn(257).to(dtype), torch.randn(257).to(dtype)
    rule = dataclasses.replace(SGD, variant=variant, momentum=0.9, lr=0.1)
    plain = StepTensors(params=[w.clone()], grads=[g], momentum_buffers=[None])
    ewc_step(rule, plain)
    zero = held(w.clone(), g, torch.zeros(257), torch.randn(257).to(dtype), momentum_buffers=[None])
    ewc_step(rule, zero)
    assert torch.equal(plain.params[0], zero.params[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_an_importance_that_overflows_holds_the_weight_exactly(dtype: torch.dtype):
    huge = torch.full((3,), torch.finfo(dtype).max, dtype=dtype)
    anchor, w = torch.tensor([1.0, 1e-3, -7.0], dtype=dtype), torch.tensor([0.5, 1e8, 3.0], dtype=dtype)
    t = held(w.clone(), torch.ones(3, dtype=dtype), huge, anchor)
    ewc_step(dataclasses.replace(SGD, variant="proximal", lr=8.0), t)
    assert torch.equal(t.params[0], anchor)
    t = held(w.clone(), torch.ones(3, dtype=dtype), huge, anchor)
    ewc_step(dataclasses.replace(SGD, variant="wva", lr=8.0), t)
    assert torch.equal(t.params[0], w)


def test_found_inf_changes_nothing():
    for case in CASES:
        before, after = case.inputs(torch.float32), case.inputs(torch.float32)
        ewc_step(case.rule, after, found_inf=torch.tensor(1.0))
        for name, entries in vars(before).items():
            for one, other in zip(entries, getattr(after, name), strict=True):
                if isinstance(one, Codes):
                    one, other = one.codes, other.codes
                assert (one is None and other is None) or torch.equal(one, other), name


def test_gradients_are_only_read_and_writes_are_counted():
    for case in CASES:
        t = case.inputs(torch.bfloat16)
        copies, versions = [g.clone() for g in t.grads], [p._version for p in t.params]
        grad_versions = [g._version for g in t.grads]
        coef, scale = torch.tensor(0.5), torch.tensor(4.0)
        ewc_step(case.rule, t, clip_coef=coef, grad_scale=scale)
        assert all(torch.equal(a, b) for a, b in zip(copies, t.grads, strict=True))
        assert [g._version for g in t.grads] == grad_versions
        assert all(p._version > v for p, v in zip(t.params, versions, strict=True))


def test_values_outside_a_strided_view_stay():
    storage = torch.arange(64.0)
    view, omega = storage[1::3], torch.full((21,), 4.0)
    before = storage.clone()
    ewc_step(SGD, held(view, torch.ones(21), omega, torch.zeros(21)))
    untouched = torch.ones(64, dtype=torch.bool)
    untouched[1::3] = False
    assert torch.equal(storage[untouched], before[untouched])
    assert not torch.equal(view, before[1::3])


def test_grad_strides_need_not_be_those_of_the_parameter():
    w, g = torch.randn(4, 6, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64).t()
    t = StepTensors(params=[w.clone()], grads=[g])
    ewc_step(SGD, t)
    assert_within_roundings(t.params[0], w - 0.5 * g, roundings=2, error_scale=w.abs() + g.abs())


def test_path_integral_uses_what_was_stored():
    # bf16: w = 1, α = 0.5, g = 1/512. The step 1/1024 is below half the spacing (1/256) under 1: nothing moves.
    w, g, omega = torch.ones(1, dtype=torch.bfloat16), torch.full((1,), 1 / 512), torch.zeros(1)
    t = StepTensors(params=[w], grads=[g.bfloat16()], path_integrals=[omega])
    ewc_step(SGD, t)
    assert w.item() == 1.0
    assert omega.item() == 0.0
    # g = 1/64: 1 − 1/128 is a bf16 number; ω = −g·Δw = 1/64 · 1/128.
    t = StepTensors(params=[w], grads=[torch.full((1,), 1 / 64).bfloat16()], path_integrals=[omega])
    ewc_step(SGD, t)
    assert w.item() == 1 - 1 / 128
    assert omega.item() == 1 / 8192


@pytest.mark.parametrize(("regularized", "g_path"), [(False, 8.0), (True, 8.0 + 1.5)])
def test_path_integral_sees_the_unclipped_gradient_and_the_whole_move(regularized: bool, g_path: float):
    t = held(f64(2.0), f64(8.0 * 4), f64(3.0), f64(1.0), path_integrals=[f64(0.125)])
    rule = dataclasses.replace(SGD, weight_decay=0.5, regularized_path=regularized)
    ewc_step(rule, t, clip_coef=torch.tensor(0.25), grad_scale=torch.tensor(4.0))
    move = -0.5 * (0.25 * 8 + 1.5 + 0.5 * 2)
    assert_within_roundings(t.path_integrals[0], f64(0.125 - g_path * move), roundings=16)


def test_gradient_norm_is_global_unscaled_and_cannot_overflow():
    rule = dataclasses.replace(SGD, variant="plain")
    half = StepTensors(params=[torch.zeros(4).half()], grads=[torch.full((4,), 60000.0).half()])
    wide = StepTensors(params=[torch.zeros(2)], grads=[torch.full((2,), 3e4)])
    norm = gradient_norm([(rule, half), (rule, wide)], grad_scale=torch.tensor(1024.0))
    exact = math.sqrt(4 * 6e4**2 + 2 * 3e4**2) / 1024
    assert norm.shape == ()
    assert_within_roundings(norm, f64(exact)[0], roundings=16)
    assert gradient_norm([]) == 0


def test_gradient_norm_of_the_sum_has_the_penalty_in_it():
    rule = dataclasses.replace(SGD, variant="plain", clip_penalty=True)
    t = held(f64(2.0, 1.0), f64(-3.0, 4.0), f64(3.0, 0.0), f64(1.0, 9.0))
    assert_within_roundings(gradient_norm([(rule, t)]), f64(5.0)[0], roundings=4)  # (−3 + 6, 4)
    task = dataclasses.replace(rule, clip_penalty=False)
    assert_within_roundings(gradient_norm([(task, t)]), f64(5.0)[0], roundings=4)  # (−3, 4)
    pulled = held(f64(2.0, 1.0), f64(0.0, 8.0), f64(3.0, 0.0), f64(1.0, 9.0))
    assert_within_roundings(gradient_norm([(rule, pulled)]), f64(10.0)[0], roundings=4)


def test_clip_coefficient_is_that_of_clip_grad_norm():
    for norm, maximum in ((0.5, 1.0), (2.0, 1.0), (0.0, 1.0), (1e4, 0.01), (3.0, math.inf)):
        p = torch.nn.Parameter(torch.zeros(1))
        p.grad = torch.full((1,), norm)
        torch.nn.utils.clip_grad_norm_([p], maximum)
        assert torch.equal(torch.tensor(norm) * clip_coefficient(torch.tensor(norm), maximum), p.grad[0])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_scalars_that_stay_on_a_device_give_the_same_step(case: Case, monkeypatch: pytest.MonkeyPatch):
    """The arithmetic for scalars on an accelerator (nothing waits for the host), here on CPU tensors."""

    def factor(value: float | Tensor, w: Tensor) -> Tensor:
        return torch.as_tensor(value).reshape(()).to(w.dtype)

    def count(step: Tensor) -> Tensor:
        step += 1
        return step.double()

    oracle, scale = case.oracle(torch.float32), case.error_scale(torch.float32)
    monkeypatch.setattr(reference, "_factor", factor)
    monkeypatch.setattr(reference, "_count", count)
    got = case.run("reference", torch.float32)
    assert_all_within_roundings(got, oracle, roundings=case.roundings, error_scale=scale)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"grads": []}, "grads has 0 entries, wanted one for each of the 1 params"),
        ({"anchors": []}, "importances and anchors belong together"),
        ({"path_integrals": [torch.zeros(1)] * 2}, "path_integrals has 2 entries"),
    ],
)
def test_lists_of_unequal_length_are_refused(change: dict[str, list[Tensor]], text: str):
    t = dataclasses.replace(held(f64(2.0), f64(1.0), f64(3.0), f64(1.0)), **change)
    with pytest.raises(ValueError, match=text):
        ewc_step(SGD, t)
    with pytest.raises(ValueError, match="exp_avgs has 0 entries"):
        ewc_step(StepRule("adam", lr=0.1), StepTensors(params=[f64(1.0)], grads=[f64(1.0)]))


def test_impl_is_honoured():
    t = held(f64(2.0), f64(1.0), f64(3.0), f64(1.0))
    with pytest.raises(ValueError, match="impl"):
        ewc_step(SGD, t, impl="fastest")
    with pytest.raises(NotImplementedError, match="triton"):
        ewc_step(SGD, t, impl="triton")
    assert t.params[0].item() == 2.0
    ewc_step(SGD, StepTensors())
