"""squared_norm_grad in C++: csrc/squared_norm_grad. ``_dispatch.choose`` has loaded the library before."""

from __future__ import annotations

import torch
from torch import Tensor

# The schema lives here alone; the library only adds the kernels, so the op exists before anything is compiled.
torch.library.define("fastewc::squared_norm_grad", "(Tensor y, str output) -> Tensor")


@torch.library.register_fake("fastewc::squared_norm_grad")  # type: ignore[untyped-decorator]
def _fake(y: Tensor, output: str) -> Tensor:
    return torch.empty_like(y, memory_format=torch.contiguous_format)


def squared_norm_grad(y: Tensor, output: str) -> Tensor:
    """One parallel loop over rows; see ``reference.py`` for the equation."""
    grad: Tensor = torch.ops.fastewc.squared_norm_grad(y, output)
    return grad
