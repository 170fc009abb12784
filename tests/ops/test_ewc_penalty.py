"""The penalty op: value, gradient and statistics against float64 formulas written out here."""

import re

import pytest
import torch

from fastewc import _build
from fastewc.ops.ewc_penalty import ewc_penalty, ewc_penalty_grads, ewc_stats, schema
from fastewc.testing import assert_within_roundings, sum_roundings

LAMBDA, LR = 40.0, 0.01


def tensors(n: int, dtype: torch.dtype = torch.float32, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    importance = 10.0 ** (torch.rand(n, generator=g, dtype=torch.float64) * 12 - 8)
    w, anchor = torch.randn(2, n, generator=g, dtype=torch.float64)
    return (
        w.to(dtype),
        importance.to(torch.float64 if dtype == torch.float64 else torch.float32),
        anchor.to(dtype),
    )


def c64(importance: torch.Tensor, variant: str) -> torch.Tensor:
    stiff = LAMBDA * importance.double()
    return stiff if variant == "plain" else stiff / (1 + LR * stiff)


@pytest.mark.parametrize("variant", ["plain", "stabilized"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 17, 130])
def test_value_and_gradient(variant, dtype, n):
    w, importance, anchor = tensors(n, dtype)
    w.requires_grad_()
    value = ewc_penalty([w], [importance], [anchor], ewc_lambda=LAMBDA, lrs=[LR], variant=variant)
    drift, c = w.detach().double() - anchor.double(), c64(importance, variant)
    # w − w* is rounded once on a scale of |w| + |w*| and then squared
    size = w.detach().double().abs() + anchor.double().abs()
    assert value.dtype == importance.dtype and value.shape == ()
    assert_within_roundings(
        value, (c * drift**2).sum() / 2, roundings=sum_roundings(n) + 8, error_scale=(c * size**2).sum()
    )
    (3 * value).backward()
    assert w.grad is not None and w.grad.dtype == dtype
    assert_within_roundings(w.grad, 3 * c * drift, roundings=8, error_scale=3 * c * size, dtype=importance.dtype)


def test_gradient_matches_autograd_of_the_formula():
    w, importance, anchor = tensors(33, torch.float64)
    w.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda w: ewc_penalty([w], [importance], [anchor], ewc_lambda=LAMBDA, lrs=[LR], variant="stabilized"),
        [w],
    )


def test_second_derivatives():
    w, importance, anchor = tensors(7, torch.float64)
    w.requires_grad_()
    value = ewc_penalty([w], [importance], [anchor], ewc_lambda=LAMBDA, lrs=[LR], variant="stabilized")
    (gradient,) = torch.autograd.grad(value, w, create_graph=True)
    (curvature,) = torch.autograd.grad(gradient.sum(), w)
    assert_within_roundings(curvature, c64(importance, "stabilized"), roundings=8)


def test_several_tensors_each_with_its_own_lr():
    a, b = tensors(5, torch.float64, 1), tensors(7, torch.float64, 2)
    value = ewc_penalty(
        *map(list, zip(a, b, strict=True)),
        ewc_lambda=2.0,
        lrs=[0.1, torch.tensor(10.0)],
        variant="stabilized",
    )
    parts = [(2 * o / (1 + 2 * lr * o) * (w - s) ** 2).sum() / 2 for (w, o, s), lr in ((a, 0.1), (b, 10.0))]
    assert_within_roundings(value, sum(parts), roundings=40)
    (whole,) = ewc_penalty_grads(*([t] for t in b), ewc_lambda=2.0, lrs=[10.0], variant="stabilized")
    assert_within_roundings(whole, 2 * b[1] / (1 + 20 * b[1]) * (b[0] - b[2]), roundings=8)


def test_only_tensors_that_require_grad_get_one():
    a, b = tensors(5), tensors(7)
    a[0].requires_grad_()
    ewc_penalty(*map(list, zip(a, b, strict=True)), ewc_lambda=1.0, lrs=[None, None], variant="plain").backward()
    assert a[0].grad is not None and b[0].grad is None


def test_backward_notices_a_changed_anchor():
    w, importance, anchor = tensors(5)
    w.requires_grad_()
    value = ewc_penalty([w], [importance], [anchor], ewc_lambda=1.0, lrs=[None], variant="plain")
    anchor.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_stats_against_exact_quantiles():
    w, importance, anchor = tensors(5000)
    importance[:100] = 0
    parts = [slice(0, 1000), slice(1000, 5000)]
    found = ewc_stats(
        *([t[s] for s in parts] for t in (w, importance, anchor)),
        ewc_lambda=LAMBDA,
        lrs=[LR, LR],
        variant="stabilized",
    )
    x = LAMBDA * LR * importance.double()
    for key, q in (("q50", 0.5), ("q90", 0.9), ("q99", 0.99)):
        wanted = x.quantile(q).item()
        assert abs(found[key] / wanted - 1) <= 0.01
    assert found["max"] == pytest.approx(x.max().item(), rel=1e-6)
    assert found["share_above_1"] == (x > 1).sum().item() / 5000
    drift = w.double() - anchor.double()
    assert found["rms_drift"] == pytest.approx(drift.square().mean().sqrt().item(), rel=1e-5)
    assert found["penalty"] == pytest.approx((c64(importance, "stabilized") * drift**2).sum().item() / 2, rel=1e-5)


def test_the_sources_have_the_same_histogram():
    text = (_build.source_folder() / "ewc_penalty" / "terms.h").read_text()
    for name in ("BINS_PER_OCTAVE", "LOW", "HIGH"):
        assert int(re.search(rf"\b{name} = (-?\d+)", text)[1]) == getattr(schema, name)
    assert len(re.search(r"enum Term \{(.*), TERMS \}", text)[1].split(",")) == schema.SUMS


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 0.5, 1.0, 3e38])
def test_stats_of_one_value(value):
    one = torch.ones(1)
    found = ewc_stats([one], [torch.tensor([value])], [one], ewc_lambda=1.0, lrs=[1.0], variant="plain")
    wanted = torch.tensor(value).item()
    assert found["max"] == wanted and found["q50"] == pytest.approx(wanted, rel=0.01, abs=0)
    assert found["share_above_1"] == float(wanted > 1)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"variant": "proximal"}, "variant must be one of plain, stabilized"),
        ({"lrs": [None]}, "needs the learning rate"),
        ({"importances": [torch.ones(4)]}, r"params \(3,\), importances \(4,\)"),
        ({"anchors": []}, "equally long"),
        ({"impl": "fast"}, "impl"),
    ],
)
def test_bad_input(change, text):
    good = {
        "params": [torch.ones(3)],
        "importances": [torch.ones(3)],
        "anchors": [torch.ones(3)],
        "lrs": [0.1],
    }
    good |= {"ewc_lambda": 1.0, "variant": "stabilized"}
    with pytest.raises(ValueError, match=text):
        ewc_penalty(**(good | change))


def test_explicit_impl_never_falls_back():
    one = torch.ones(1)
    with pytest.raises(NotImplementedError, match="triton"):
        ewc_penalty([one], [one], [one], ewc_lambda=1.0, lrs=[0.1], variant="plain", impl="triton")
