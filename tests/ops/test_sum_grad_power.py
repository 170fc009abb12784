"""sum_grad_power: hand-worked numbers, autograd as oracle, contract."""

import pytest
import torch

from fastewc.ops.sum_grad_power import cases, sum_grad_power
from fastewc.testing import assert_all_within_roundings, assert_within_roundings


def test_by_hand():
    # Sample 1: gradient 1·1 + 2·(−1) = −1; sample 2: 3·1 + 1·2 = 5.
    a = torch.tensor([[[1.0], [2.0]], [[3.0], [1.0]]])
    g = torch.tensor([[[1.0], [-1.0]], [[1.0], [2.0]]])
    assert sum_grad_power(a, g, 2).tolist() == [[26.0]]
    assert sum_grad_power(a, g, 1).tolist() == [[6.0]]


@pytest.mark.parametrize("p", [1, 2])
def test_is_the_sum_of_per_sample_weight_gradients(p):
    x = torch.randn(5, 7, 3, dtype=torch.float64)
    seed = torch.randn(5, 7, 4, dtype=torch.float64)
    w = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    oracle = 0
    for n in range(5):
        (gradient,) = torch.autograd.grad((x[n] @ w.T * seed[n]).sum(), w)
        oracle = oracle + gradient.abs() ** p
    scale = sum((seed[n].abs().T @ x[n].abs()) ** p for n in range(5))
    assert_within_roundings(sum_grad_power(x, seed, p), oracle, roundings=64, error_scale=scale)


@pytest.mark.parametrize("case", cases.CASES, ids=lambda c: c.id)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_reference_matches_itself_in_float64(case, dtype):
    got = case.run("reference", dtype)
    assert got[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got[0].shape == (case.O, case.I)
    assert_all_within_roundings(got, case.oracle(dtype), roundings=case.roundings, error_scale=case.error_scale(dtype))


def test_two_dimensions_are_one_position():
    a, g = torch.randn(6, 3), torch.randn(6, 4)
    assert torch.equal(sum_grad_power(a, g, 2), sum_grad_power(a[:, None], g[:, None], 2))


def test_no_gradient_flows_and_strides_do_not_matter():
    a, g = torch.randn(3, 5, 6, requires_grad=True).transpose(0, 1), torch.randn(5, 3, 4)
    out = sum_grad_power(a, g, 2)
    assert not out.requires_grad
    assert torch.equal(out, sum_grad_power(a.contiguous(), g, 2))


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


def test_explicit_impl_never_falls_back():
    a = torch.ones(2, 3)
    for impl in ("triton", "native"):
        with pytest.raises(NotImplementedError, match="sum_grad_power"):
            sum_grad_power(a, a, 2, impl)
    with pytest.raises(ValueError, match="impl"):
        sum_grad_power(a, a, 2, "cuda")
