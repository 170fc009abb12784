"""The penalty ops in C++ (CPU) and CUDA C++: csrc/ewc_penalty. ``_dispatch.choose`` has loaded the library before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastewc.ops.ewc_penalty.schema import SCHEMAS, TERMS, value_dtype
from fastewc.ops.importance_codes import Codes, split

for _name, _schema in SCHEMAS.items():
    torch.library.define(f"fastewc::{_name}", _schema)


@torch.library.register_fake("fastewc::ewc_penalty_value")  # type: ignore[untyped-decorator]
def _(params: list[Tensor], importances: list[Tensor], *_: object) -> Tensor:
    return torch.empty((), dtype=value_dtype(params, importances), device=params[0].device)


@torch.library.register_fake("fastewc::ewc_penalty_grads")  # type: ignore[untyped-decorator]
def _(params: list[Tensor], _i: object, _s: object, _a: object, grads: list[Tensor], *_: object) -> list[Tensor]:
    return [torch.empty_like(t) for t in grads or params]


@torch.library.register_fake("fastewc::ewc_hold_back_")  # type: ignore[untyped-decorator]
def _(*_: object) -> None:
    pass


@torch.library.register_fake("fastewc::ewc_stats_terms")  # type: ignore[untyped-decorator]
def _(params: list[Tensor], *_: object) -> Tensor:
    return torch.empty(TERMS, dtype=torch.float64, device=params[0].device)


def ewc_penalty_value(
    params: Sequence[Tensor], importances: Sequence[Tensor | Codes], anchors: Sequence[Tensor], *rest: Any
) -> Tensor:
    """½ Σ c(w − w*)², 0-dim; arguments and result are those of ``reference.ewc_penalty_value``."""
    value: Tensor = torch.ops.fastewc.ewc_penalty_value.default(params, *split(importances), anchors, *rest)
    return value


def ewc_penalty_grads(
    params: Sequence[Tensor], importances: Sequence[Tensor | Codes], anchors: Sequence[Tensor], *rest: Any
) -> list[Tensor]:
    """±scale·c(w − w*), or gradients with it added; as ``reference.ewc_penalty_grads``."""
    pulls: list[Tensor] = torch.ops.fastewc.ewc_penalty_grads.default(params, *split(importances), anchors, *rest)
    return pulls


def ewc_hold_back_(
    params: Sequence[Tensor], targets: Sequence[Tensor], importances: Sequence[Tensor | Codes], *rest: Any
) -> None:
    """E3 and E4 in place; as ``reference.ewc_hold_back_``."""
    torch.ops.fastewc.ewc_hold_back_.default(params, targets, *split(importances), *rest)


def ewc_stats_terms(
    params: Sequence[Tensor], importances: Sequence[Tensor | Codes], anchors: Sequence[Tensor], *rest: Any
) -> Tensor:
    """Float64 [4 + bins]; as ``reference.ewc_stats_terms``."""
    terms: Tensor = torch.ops.fastewc.ewc_stats_terms.default(params, *split(importances), anchors, *rest)
    return terms
