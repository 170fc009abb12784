"""The comparison itself must catch what usual tolerances miss."""

import pytest
import torch

from fastewc.testing import assert_within_roundings, sum_roundings

N = 512


@pytest.fixture
def gradients() -> torch.Tensor:
    """Per-sample gradients [N, 200] over six decades, so that their squares span twelve."""
    generator = torch.Generator().manual_seed(0)
    size = 10.0 ** torch.linspace(-9, -3, 200, dtype=torch.float64)
    return (torch.randn(N, 200, generator=generator, dtype=torch.float64) * size).float()


def fisher(g: torch.Tensor) -> torch.Tensor:
    return g.square().sum(0) / N


def check(got: torch.Tensor, g: torch.Tensor) -> None:
    assert_within_roundings(got, fisher(g.double()), roundings=sum_roundings(N) + 2)


def test_accepts_honest_float32(gradients):
    check(fisher(gradients), gradients)
    sequential = torch.zeros(200)
    for row in gradients:
        sequential += row * row
    check(sequential / N, gradients)


def test_torch_default_tolerance_is_blind_and_ours_is_not(gradients):
    zeros = torch.zeros(200)
    torch.testing.assert_close(zeros, fisher(gradients))  # maximum about 1e-6: passes, which is why we do not use it
    with pytest.raises(AssertionError, match="200 of 200"):
        check(zeros, gradients)


def test_catches_flushed_small_entries(gradients):
    flushed = fisher(gradients)
    flushed[flushed < 1e-14] = 0
    with pytest.raises(AssertionError, match="outside the rounding bound"):
        check(flushed, gradients)


def test_catches_a_skipped_sample(gradients):
    with pytest.raises(AssertionError):
        check(gradients[:-1].square().sum(0) / N, gradients)


def test_catches_a_missing_half(gradients):
    with pytest.raises(AssertionError):
        check(fisher(gradients) / 2, gradients)


def test_catches_bf16_accumulation(gradients):
    total = torch.zeros(200, dtype=torch.bfloat16)
    for row in gradients:
        total += (row * row).bfloat16()
    with pytest.raises(AssertionError):
        check(total.float() / N, gradients)


def test_catches_batch_mean_squared(gradients):
    with pytest.raises(AssertionError):
        check(gradients.view(4, N // 4, 200).mean(1).square().mean(0), gradients)


def test_catches_nan_and_shape_and_low_precision_oracle():
    one = torch.ones(3, dtype=torch.float64)
    with pytest.raises(AssertionError, match="elements"):
        assert_within_roundings(torch.tensor([1.0, float("nan"), 1.0]), one, roundings=4)
    with pytest.raises(AssertionError, match="shape"):
        assert_within_roundings(torch.ones(2), one, roundings=4)
    with pytest.raises(AssertionError, match="float64"):
        assert_within_roundings(torch.ones(3), torch.ones(3), roundings=4)


def test_error_scale_allows_cancellation_and_no_more():
    oracle = torch.tensor([1e-6], dtype=torch.float64)  # 1 − (1 − 1e-6): terms of size 1
    got = torch.tensor([1e-6 + 1e-7])
    assert_within_roundings(got, oracle, roundings=4, error_scale=torch.tensor([2.0]))
    with pytest.raises(AssertionError):
        assert_within_roundings(got, oracle, roundings=4)
