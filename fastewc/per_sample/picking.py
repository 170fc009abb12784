"""Which tensors hold samples in numbers or in an order that values decide: what masks and sorting picked.

A router that sends tokens to experts gives tensors whose sizes say nothing about where a sample's entries are. Two runs
with one and with two samples can't tell them from regular ones if the numbers happen to fit, so they are followed
through every operation from where they come up until they are put back into a regular tensor. A packed sequence is
such a tensor; its order is that of its samples' lengths.
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
_PACKS = "_pack_padded_sequence"
#: Puts back what was taken by the same index, or made from the same order: what else has been picked stays marked.
_UNDOES = "index_copy"
#: Operations that put entries into places of their first argument, and leave its form alone.
_PUTTING = frozenset(
    {"index_put", "index_put_", "_index_put_impl_", "index_add", "index_add_", "index_copy_", "scatter", "scatter_",
     "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_", "masked_scatter", "masked_scatter_"}
)  # fmt: skip
#: Operations that may be the first to pick.
_PICKING = _COUNTING | _SORTING | {"repeat_interleave", "index", _PACKS}


class Picking(TorchDispatchMode):
    """While active, keeps track of such tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._picked: Any = WeakTensorKeyDictionary()  # tensor -> marks, one of each operation that has picked

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
        own = frozenset({object()}) if _picks(name, args, kwargs) else frozenset()
        marks = self._marks(args[:1] if name in _PUTTING or name in (_PACKS, _UNDOES) else (args, kwargs))
        if name == _UNDOES:
            marks |= self._marks(args[3:]) - self._marks(args[2:3])
        for index, tensor in enumerate(all_tensors(result)):
            # Second comes what tells how to undo it, an order or sizes: it is about this operation alone.
            if found := own if own and index == 1 else marks | own:
                self._picked[tensor] = found
        return result

    def _marks(self, content: Any) -> frozenset[object]:
        return frozenset(mark for tensor in all_tensors(content) for mark in self._picked.get(tensor, ()))


def _picks(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if name in _COUNTING or name == _PACKS or (name == "repeat_interleave" and len(args) == 1):
        return True
    if name == "index":
        return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    if name not in _SORTING:
        return False
    # Along the last of several dimensions it orders a sample's own entries.
    place = 2 if name == "topk" else 1
    dim = args[place] if len(args) > place and type(args[place]) is int else kwargs.get("dim", -1)
    return bool(args[0].ndim < 2 or dim % args[0].ndim != args[0].ndim - 1)
