"""Inputs on which every implementation of sum_grad_power is compared with the float64 reference."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastewc._dispatch import Impl
from fastewc.ops.sum_grad_power import reference
from fastewc.ops.sum_grad_power.api import DTYPES, sum_grad_power
from fastewc.testing import sum_roundings


@dataclass(frozen=True)
class Case:
    """One input: N samples, T positions (None: a [N, I] and g [N, O]), I inputs, O outputs.

    spread: "normal", or "decades" (magnitudes over 12 decades, so that small sums sit beside large ones).
    """

    N: int
    T: int | None
    I: int
    O: int
    p: Literal[1, 2]
    spread: str = "normal"
    dtypes = DTYPES

    @property
    def id(self) -> str:
        """A name for test output."""
        return f"p{self.p}-N{self.N}-T{self.T}-I{self.I}-O{self.O}-{self.spread}"

    def make_inputs(self, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """The same a and g in every dtype: drawn in float64, then rounded."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.id.encode()))
        rows = (self.N,) if self.T is None else (self.N, self.T)
        made = []
        for width in (self.I, self.O):
            values = torch.randn(*rows, width, generator=generator, dtype=torch.float64)
            if self.spread == "decades":
                exponent = 6 * torch.rand(width, generator=generator, dtype=torch.float64) - 4
                values = values * 10**exponent
            made.append(values.to(device, dtype))
        return made[0], made[1]

    def run(self, impl: Impl, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        """The op on this case's inputs."""
        return [sum_grad_power(*self.make_inputs(dtype, device), self.p, impl)]

    def oracle(self, dtype: torch.dtype) -> list[Tensor]:
        """The float64 reference on the inputs already rounded to ``dtype``."""
        a, g = self._wide(dtype)
        return [reference.sum_grad_power(a, g, self.p)]

    def error_scale(self, dtype: torch.dtype) -> list[Tensor]:
        """Σ_n (Σ_t |g a|)^p: the size of the terms before their signs cancel inside a sample."""
        a, g = self._wide(dtype)
        return [reference.sum_grad_power(a.abs(), g.abs(), self.p)]

    @property
    def roundings(self) -> float:
        """p times those of the sum over T (a power multiplies relative errors), and those of the sum over N."""
        return self.p * sum_roundings(self.T or 1) + sum_roundings(self.N)

    def _wide(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        a, g = (t.double() for t in self.make_inputs(dtype))
        return (a.unsqueeze(1), g.unsqueeze(1)) if self.T is None else (a, g)


_SIZES: tuple[tuple[int, int | None, int, int], ...] = (
    (1, None, 1, 1), (17, None, 33, 5), (130, None, 17, 10), (0, None, 3, 4), (5, None, 0, 4), (5, None, 4, 0),
    (1, 1, 1, 1), (3, 17, 5, 33), (17, 3, 33, 130), (2, 130, 17, 4), (4, 0, 3, 2), (33, 2, 7, 1),
)  # fmt: skip

CASES: list[Case] = [
    *(Case(*size, p=p) for size in _SIZES for p in (1, 2)),
    *(Case(*size, p=p, spread="decades") for size in (_SIZES[1], _SIZES[7]) for p in (1, 2)),
]
