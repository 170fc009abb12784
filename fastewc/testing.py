"""The only place that compares floats: bounds counted from roundings, never typed into a test.

``torch.testing.assert_close`` adds an absolute tolerance of 1e-5, so it accepts an importance of maximum 1e-6 that was
replaced by zeros. Importances are sums of non-negative terms and span twelve decades: every entry must be right
*relative to its own terms*. Hence one elementwise comparison, atol = 0:

    |got − oracle|  ≤  roundings · u · error_scale  +  u_out · |oracle|

with u the unit roundoff of the arithmetic, u_out that of the stored result, and error_scale = Σ|terms| of each element
(equal to |oracle| where all terms have one sign).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def unit_roundoff(dtype: torch.dtype) -> float:
    """u: the largest relative error of one rounding to nearest, half the distance from 1 to the next number."""
    return torch.finfo(dtype).eps / 2


def op_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype arithmetic is done in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sum_roundings(n: int) -> float:
    """Roundings to allow for a sum of n terms: 4·√n + 4.

    Rounding errors of a sum behave like a random walk, √n steps of u; the factor 4 covers the unlucky walk (the worst
    case, n·u, is never met by random data, and a bound that loose would accept bf16 accumulation).
    """
    return 4 * math.sqrt(max(n, 1)) + 4


def assert_within_roundings(
    got: Tensor,
    oracle: Tensor,
    *,
    roundings: float,
    error_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
    context: str = "",
) -> None:
    """Assert that ``got`` is ``oracle`` up to a counted number of roundings, elementwise and with no absolute slack.

    Args:
        got: the result under test, any shape and float dtype.
        oracle: the same quantity computed in float64 from inputs already rounded to the tested dtype.
        roundings: how many roundings of the arithmetic dtype may accumulate, in units of ``error_scale``.
        error_scale: Σ|terms| of each element, same shape; default |oracle| (right where all terms have one sign).
        dtype: the dtype in which the result was *computed*; default float64 for a float64 result, else float32.
        context: words that start the error text.

    Raises:
        AssertionError: naming the worst element and by how much the bound was missed.
    """
    if got.shape != oracle.shape:
        raise AssertionError(f"{context} shape {tuple(got.shape)}, wanted {tuple(oracle.shape)}")
    if oracle.dtype != torch.float64:
        raise AssertionError(f"{context} the oracle must be float64, not {oracle.dtype}")
    got64, scale = (
        got.detach().double().cpu(),
        (oracle if error_scale is None else error_scale).detach().double().cpu().abs(),
    )
    oracle = oracle.detach().cpu()
    u = unit_roundoff(dtype or op_dtype(got.dtype))
    # Below the smallest normal number roundings are absolute, not relative: half the spacing of subnormals each.
    tiny = torch.finfo(got.dtype).tiny * torch.finfo(got.dtype).eps
    bound = roundings * u * scale + unit_roundoff(got.dtype) * oracle.abs() + tiny * (scale > 0)
    error = (got64 - oracle).abs()
    same = (got64 == oracle) | (got64.isnan() & oracle.isnan())
    wrong = ~(same | (error <= bound))
    if bool(wrong.any()):
        excess = torch.where(same, 0.0, error / bound).nan_to_num(nan=math.inf, posinf=math.inf)
        worst = int(excess.argmax())
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), oracle.shape)) if oracle.ndim else ()
        raise AssertionError(
            f"{context} {int(wrong.sum())} of {oracle.numel()} elements outside the rounding bound; worst at {index}: "
            f"got {got64.flatten()[worst].item():.9g}, wanted {oracle.flatten()[worst].item():.9g}, error "
            f"{error.flatten()[worst].item():.3g} is {excess.flatten()[worst].item():.3g} times the bound "
            f"({roundings:.3g} roundings of {u:.3g} on a scale of {scale.flatten()[worst].item():.3g})"
        )


def assert_all_within_roundings(
    got: Sequence[Tensor],
    oracle: Sequence[Tensor],
    *,
    roundings: float,
    error_scale: Sequence[Tensor] | None = None,
    dtype: torch.dtype | None = None,
    context: str = "",
) -> None:
    """:func:`assert_within_roundings` for lists of tensors."""
    if len(got) != len(oracle):
        raise AssertionError(f"{context} {len(got)} results, wanted {len(oracle)}")
    for i, (one, wanted) in enumerate(zip(got, oracle, strict=True)):
        scale = None if error_scale is None else error_scale[i]
        assert_within_roundings(
            one, wanted, roundings=roundings, error_scale=scale, dtype=dtype, context=f"{context} [{i}]"
        )
