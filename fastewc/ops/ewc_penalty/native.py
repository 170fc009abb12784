"""The penalty ops in C++ (CPU) and CUDA C++: csrc/ewc_penalty. ``_dispatch.choose`` has loaded the library before."""

from __future__ import annotations

import torch
from torch import Tensor

from fastewc.ops.ewc_penalty.schema import SCHEMAS, TERMS

for _name, _schema in SCHEMAS.items():
    torch.library.define(f"fastewc::{_name}", _schema)


@torch.library.register_fake("fastewc::ewc_penalty_value")  # type: ignore[untyped-decorator]
def _(params: list[Tensor], importances: list[Tensor], *_: object) -> Tensor:
    wide = any(importance.dtype == torch.float64 for importance in importances)
    return torch.empty((), dtype=torch.float64 if wide else torch.float32, device=params[0].device)


@torch.library.register_fake("fastewc::ewc_penalty_grads")  # type: ignore[untyped-decorator]
def _(params: list[Tensor], _i: object, _a: object, grads: list[Tensor], *_: object) -> list[Tensor]:
    return [torch.empty_like(t) for t in grads or params]


@torch.library.register_fake("fastewc::ewc_hold_back_")  # type: ignore[untyped-decorator]
def _(*_: object) -> None:
    pass


@torch.library.register_fake("fastewc::ewc_stats_terms")  # type: ignore[untyped-decorator]
def _(params: list[Tensor], *_: object) -> Tensor:
    return torch.empty(TERMS, dtype=torch.float64, device=params[0].device)


ewc_penalty_value = torch.ops.fastewc.ewc_penalty_value.default
ewc_penalty_grads = torch.ops.fastewc.ewc_penalty_grads.default
ewc_hold_back_ = torch.ops.fastewc.ewc_hold_back_.default
ewc_stats_terms = torch.ops.fastewc.ewc_stats_terms.default
