"""Tables of rows: embedding, and indexing with one tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastewc.per_sample.rules.base import Call, Use, is_proxy, rule
from fastewc.per_sample.segments import Rows, Segment


@rule(torch.embedding)
def embedding(call: Call) -> list[Use] | None:
    """Y = W[ids]; rows at padding_idx get no gradient."""
    weight, ids, padding_idx = call.bound("weight", "indices", "padding_idx")
    if not is_proxy(weight) or call.layout.dim >= ids.ndim:
        return None
    padding = -1 if padding_idx is None else padding_idx

    def segment(g: Tensor, ids: Tensor) -> Segment:
        of_samples = call.split(ids).flatten(1)
        if padding >= 0:
            of_samples = of_samples.masked_fill(of_samples == padding, -1)
        return Rows(of_samples, call.tokens(g), weight.shape[0])

    return [Use(weight.operand, (ids,), segment)]


@rule(Tensor.__getitem__, torch.index_select, Tensor.index_select)
def picked(call: Call) -> list[Use] | None:
    """Y = W[ids]."""
    weight, *others = call.args
    if call.func is not Tensor.__getitem__:
        weight, dim, index = call.bound("input", "dim", "index")
        others = [index] if dim in (0, -2) else []
    if not is_proxy(weight) or weight.ndim != 2 or len(others) != 1:
        return None
    ids: Any = others[0]
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int32, torch.int64) or call.layout.dim >= ids.ndim:
        return None

    def segment(g: Tensor, ids: Tensor) -> Segment:
        return Rows(call.split(ids % weight.shape[0]).flatten(1), call.tokens(g), weight.shape[0])

    return [Use(weight.operand, (ids,), segment)]
