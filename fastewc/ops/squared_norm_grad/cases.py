"""Inputs on which every implementation of squared_norm_grad is compared with the float64 reference."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from fastewc._dispatch import Impl
from fastewc.ops.squared_norm_grad import reference
from fastewc.ops.squared_norm_grad.api import DTYPES, squared_norm_grad
from fastewc.testing import op_dtype, sum_roundings, unit_roundoff


@dataclass(frozen=True)
class Case:
    """One input: ``shape`` [..., C], and how its values are spread.

    spread: "normal" (like logits), "decades" (magnitudes over 12 decades, both signs), "equal" (a uniform softmax),
    "confident" (one class ``gap`` above the largest of the others) or "tied" (two equal classes ``gap`` above them).
    """

    shape: tuple[int, ...]
    output: str
    spread: str = "normal"
    gap: int = 0
    dtypes = DTYPES

    @property
    def id(self) -> str:
        """A name for test output."""
        return f"{self.output}-{'x'.join(map(str, self.shape))}-{self.spread}" + (f"{self.gap}" if self.gap else "")

    def make_inputs(self, dtype: torch.dtype, device: str = "cpu") -> Tensor:
        """The same values in every dtype: drawn in float64, then rounded."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.id.encode()))
        y = torch.randn(self.shape, generator=generator, dtype=torch.float64)
        if self.spread == "normal":
            y = 4 * y
        elif self.spread == "decades":
            exponent = 12 * torch.rand(self.shape, generator=generator, dtype=torch.float64) - 8
            y = torch.sign(y) * 10**exponent
        elif self.spread == "equal":
            y = torch.ones_like(y)
        else:
            winners = torch.rand(self.shape, generator=generator).argsort(dim=-1)[..., : 1 + (self.spread == "tied")]
            y = y.scatter(-1, winners, (y.amax(dim=-1, keepdim=True) + self.gap).expand(winners.shape))
        return y.to(device, dtype)

    def run(self, impl: Impl, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        """The op on this case's inputs."""
        return [squared_norm_grad(self.make_inputs(dtype, device), self.output, impl)]

    def oracle(self, dtype: torch.dtype) -> list[Tensor]:
        """The float64 reference on the inputs already rounded to ``dtype``."""
        return [reference.squared_norm_grad(self.make_inputs(dtype).double(), self.output)]

    def error_scale(self, dtype: torch.dtype) -> list[Tensor]:
        """What one rounding can move each element by, in units of the arithmetic's roundoff.

        Σ|terms| of 2p(p − Σp²) is 2p(p + Σp²) for a class below half the top. For one above it is that of
        2p(lead − (top − p)), lead = Σ_c p_c(top − p_c): a difference top − p_c counts as top, and as 0 where c shares
        the maximum, since it is exact there. So the top class of a confident row must be right relative to the few
        others' p, not to 1. Rounding y − max y moves the exponent by |y − max| roundoffs and p by that factor, each p
        on its own and all through Σe^y. A p below the smallest normal number may become 0.
        """
        y = self.make_inputs(dtype).double()
        if self.output == "logits" or y.numel() == 0:
            return [2 * y.abs()]
        p = torch.softmax(y, dim=-1)
        depth = y.amax(dim=-1, keepdim=True) - y
        amplified = 1 + depth + (p * depth).sum(dim=-1, keepdim=True)
        top = p.amax(dim=-1, keepdim=True)
        difference = top * (depth > 0)
        lead = (p * amplified * difference).sum(dim=-1, keepdim=True)
        terms = torch.where(2 * p > top, lead + difference, p + (p * p).sum(dim=-1, keepdim=True))
        scale = 2 * p * terms * amplified
        smallest = torch.finfo(op_dtype(dtype)).tiny / unit_roundoff(op_dtype(dtype))
        return [scale + smallest]

    @property
    def roundings(self) -> float:
        """The sums over C of which an element is made, two at most, and about 16 of exp, division and products."""
        return 0.0 if self.output == "logits" else 2 * sum_roundings(self.shape[-1]) + 16


_SHAPES: tuple[tuple[int, ...], ...] = (
    (1,), (17,), (0, 10), (5, 0), (1, 1), (5, 1), (33, 10), (130, 17), (17, 33), (3, 5, 130), (2, 1025), (2, 200_000),
)  # fmt: skip

CASES: list[Case] = [
    Case(shape, output, spread)
    for output in ("logits", "softmax")
    for shape in _SHAPES
    for spread in ("normal", "decades", "equal")
    if spread == "normal" or shape in ((33, 10), (17, 33), (2, 200_000))
] + [
    Case(shape, "softmax", spread, gap)
    for shape in ((7, 3), (33, 10), (17, 33), (5, 1025))
    for spread in ("confident", "tied")
    for gap in (10, 15, 20, 40)
    if gap > 10 or shape[-1] < 100  # a thousand others at e^−10 are no longer few: such a row is not confident
]
