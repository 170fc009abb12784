"""Which tensors hold samples in numbers or in an order that values decide: what masks and sorting picked.

A router that sends tokens to experts gives tensors whose sizes say nothing about where a sample's entries are. Two runs
with one and with two samples can't tell them from regular ones if the numbers happen to fit, so they are followed
through every operation from where they come up until they are put back into a regular tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from fastewc.per_sample.proxy import all_tensors

#: Operations whose result is as long as values say.
_COUNTING = frozenset(
    {"nonzero", "nonzero_static", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive",
     "unique_dim_consecutive"}
)  # fmt: skip
#: Operations that order by value.
_SORTING = frozenset({"sort", "argsort", "topk", "msort"})
#: Operations that put entries into places of their first argument, and leave its form alone.
_PUTTING = frozenset(
    {"index_put", "index_put_", "_index_put_impl_", "index_add", "index_add_", "index_copy", "index_copy_", "scatter",
     "scatter_", "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_", "masked_scatter",
     "masked_scatter_"}
)  # fmt: skip
#: Operations that may be the first to pick.
_PICKING = _COUNTING | _SORTING | {"repeat_interleave", "index"}


class Picking(TorchDispatchMode):
    """While active, keeps track of such tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._picked: Any = WeakTensorKeyDictionary()

    def __contains__(self, tensor: Tensor) -> bool:
        """True if values decided which entries the tensor has, or in which order."""
        return tensor in self._picked

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run it; mark the results if it picks, or works with what was picked."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name not in _PICKING and not len(self._picked):
            return result
        inputs = args[:1] if name in _PUTTING else (args, kwargs)
        if _picks(name, args, kwargs) or any(tensor in self._picked for tensor in all_tensors(inputs)):
            for tensor in all_tensors(result):
                self._picked[tensor] = True
        return result


def _picks(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if name in _COUNTING or (name == "repeat_interleave" and len(args) == 1):
        return True
    if name == "index":
        return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    if name not in _SORTING:
        return False
    # Along the last of several dimensions it orders a sample's own entries.
    place = 2 if name == "topk" else 1
    dim = args[place] if len(args) > place and type(args[place]) is int else kwargs.get("dim", -1)
    return bool(args[0].ndim < 2 or dim % args[0].ndim != args[0].ndim - 1)
