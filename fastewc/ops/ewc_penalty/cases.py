"""Inputs on which every implementation of ewc_penalty is compared with float64: value first, then gradients."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from fastewc._dispatch import Impl
from fastewc.ops.ewc_penalty import reference
from fastewc.ops.ewc_penalty.api import ewc_penalty
from fastewc.ops.importance_codes import Codes, encode, numbers
from fastewc.testing import op_dtype, sum_roundings

LAMBDA, LR = 40.0, 0.01
Inputs = tuple[list[Tensor], list[Tensor | Codes], list[Tensor]]  # params, importances, anchors


@dataclass(frozen=True)
class Case:
    """Some tensors of ``shapes``; importances over 12 decades, so that αλΩ runs from 1e-9 to 1e3, and some zeros."""

    shapes: tuple[tuple[int, ...], ...]
    variant: str
    importance_dtype: torch.dtype | None = None  # of Ω, if not that of the arithmetic; anchors are then bfloat16
    dtypes = (torch.float32, torch.float64, torch.bfloat16)  # the plain gradient reaches 1e6: float16 ends at 65504

    @property
    def id(self) -> str:
        """A name for test output."""
        stored = f"-{str(self.importance_dtype)[6:]}" if self.importance_dtype else ""
        return f"{self.variant}-" + "+".join("x".join(map(str, s)) or "scalar" for s in self.shapes) + stored

    def make_inputs(self, dtype: torch.dtype, device: str = "cpu") -> Inputs:
        """The same values in every dtype: drawn in float64, then rounded."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.id.encode()))
        inputs: Inputs = ([], [], [])
        for shape in self.shapes:
            w, anchor, exponent = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
            importance = 10.0 ** (3 * exponent).clamp(-8, 4) * (exponent > -1.5)
            inputs[0].append(w.to(device, dtype))
            omega = importance.to(device, op_dtype(dtype))
            if self.importance_dtype == torch.uint8:
                inputs[1].append(encode(omega, omega))
            else:
                inputs[1].append(omega.to(self.importance_dtype or omega.dtype))
            inputs[2].append(anchor.to(device, torch.bfloat16 if self.importance_dtype else dtype))
        return inputs

    def run(self, impl: Impl, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        """The op's value and the gradients it gives, on this case's inputs."""
        params, importances, anchors = self.make_inputs(dtype, device)
        params = [w.requires_grad_() for w in params]
        lrs = [LR] * len(params)
        value = ewc_penalty(params, importances, anchors, ewc_lambda=LAMBDA, lrs=lrs, variant=self.variant, impl=impl)
        return [value.detach(), *torch.autograd.grad(value, params)]

    def doubles(self, dtype: torch.dtype) -> tuple[list[Tensor], ...]:
        """:meth:`make_inputs` in float64."""
        return tuple([numbers(t, torch.float64) for t in tensors] for tensors in self.make_inputs(dtype))

    def oracle(self, dtype: torch.dtype) -> list[Tensor]:
        """The float64 reference on the inputs already rounded to ``dtype``."""
        params, importances, anchors = self.doubles(dtype)
        values, grads = [], []
        for w, importance, anchor in zip(params, importances, anchors, strict=True):
            values.append(reference.penalty(w, importance, anchor, LAMBDA, LR, self.variant))
            grads.append(reference.penalty_grad(w, importance, anchor, LAMBDA, LR, self.variant))
        return [torch.stack(values).sum(), *grads]

    def error_scale(self, dtype: torch.dtype) -> list[Tensor]:
        """w − w* is rounded on a scale of |w| + |w*|, and enters once (gradient) or squared (value)."""
        sizes, stiff = [], []
        for w, importance, anchor in zip(*self.doubles(dtype), strict=True):
            sizes.append(w.abs() + anchor.abs())
            stiff.append(reference.stiffness(importance, LAMBDA, LR, self.variant))
        value = torch.stack([(c * size * size).sum() for c, size in zip(stiff, sizes, strict=True)]).sum()
        return [value, *[c * size for c, size in zip(stiff, sizes, strict=True)]]

    @property
    def roundings(self) -> float:
        """The sum, and about 8 of the difference, the coefficient and the products."""
        return sum_roundings(sum(torch.Size(shape).numel() for shape in self.shapes)) + 8


CASES: list[Case] = [
    Case(((33, 130), (0,), (1,)), variant, dtype)
    for variant in ("plain", "stabilized")
    for dtype in (torch.uint8, torch.bfloat16)
] + [
    Case(shapes, variant)
    for variant in ("plain", "stabilized")
    for shapes in (((),), ((1,),), ((17,),), ((33, 130), (0,), (130,)), ((3, 5, 7), (1,), (2, 3)))
]
