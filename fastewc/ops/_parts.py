"""Lists of tensors as kernels take them: dense, of known dtypes, in one storage order per row.

Nearly always the lists are so already; the rest goes through temporaries. Nothing here imports Triton.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_dtype = attrgetter("dtype")
_lock = threading.Lock()
#: Entries of a cache; the least recently used goes first.
CACHED = 256

Dtypes = tuple[Any, ...]  # a torch.dtype for each list, None where it is empty


@dataclass
class Part:
    """Rows of lists as a kernel takes them: one dtype per list, and in each row the same dense storage order.

    Attributes:
        own: the dtype of each of the caller's lists; None where it is empty.
        dtypes: those that the kernel takes.
        chosen: which rows of the caller's lists.
        columns: the tensors, or what stands in for them.
        addresses: of the columns.
        copies: a caller's tensor, and the written temporary that stands in for it.
    """

    own: Dtypes
    dtypes: Dtypes
    chosen: list[int] | slice
    columns: Sequence[Sequence[Tensor]]
    addresses: tuple[tuple[int, ...], ...]
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def copy_back(self, skip: Tensor | None = None) -> None:
        """Put results into the tensors they belong to; where the 0-dim ``skip`` is not zero they stay as they are."""
        for target, written in self.copies:
            target.copy_(written if skip is None else torch.where(skip.reshape(()) != 0, target, written))


def parts(
    lists: Sequence[Sequence[Tensor]],
    *,
    fresh: Sequence[int],
    wanted: Callable[[Dtypes], Dtypes],
    written: Sequence[bool],
    aside: Sequence[int] = (),
) -> list[Part]:
    """The rows by their dtypes; nearly always there is one part, and it is the lists themselves.

    Tensors that are not dense, that lie in another order than the first of their row, or that have another dtype than
    the kernel takes are copied. The first list decides, so that a channels_last parameter is walked as it lies.

    Args:
        lists: one tensor per row, or none.
        fresh: lists of new tensors each time, such as gradients: they are looked at anew, the others once.
        wanted: own dtypes -> those that the kernel takes.
        written: per list, whether the kernel changes it.
        aside: lists of contiguous tensors that have a shape of their own, such as the scales of codes.
    """
    addresses = _addresses(lists)
    own = _plain_dtypes(lists, addresses, fresh)
    if own is not None and wanted(own) == own:
        return [Part(own, own, slice(None), lists, addresses)]
    return [_arranged(lists, own, wanted(own), chosen, written, aside) for own, chosen in _groups(lists)]


def _addresses(lists: Sequence[Sequence[Tensor]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(map(Tensor.data_ptr, entries)) for entries in lists)


@dataclass
class _Seen:
    """Tensors that were looked at. ``dead`` fills as they go, so that no other object passes for one of them."""

    ids: tuple[int, ...]
    addresses: tuple[tuple[int, ...], ...]
    dtypes: Dtypes | None
    dead: list[Any]
    references: list[Any]


_seen: OrderedDict[Hashable, _Seen] = OrderedDict()


def _plain_dtypes(
    lists: Sequence[Sequence[Tensor]], addresses: tuple[tuple[int, ...], ...], fresh: Sequence[int]
) -> Dtypes | None:
    """The dtype of each list, None if one has several or if a tensor is not contiguous.

    Looking takes longer than all the rest for many small tensors, so it is done once for objects that live on in the
    same memory.
    """
    lasting = [i for i in range(len(lists)) if i not in fresh]
    if not lasting:
        return _look(lists)
    ids = tuple(map(id, chain.from_iterable(lists[i] for i in lasting)))
    at = tuple(addresses[i] for i in lasting)
    key = (len(lists), at[0])
    with _lock:
        seen = _seen.get(key)
    if seen is not None and not seen.dead and seen.ids == ids and seen.addresses == at:
        dtypes = seen.dtypes
    else:
        dtypes = _look([lists[i] for i in lasting])
        # Other objects in the same memory come anew each time, as the local parts of sharded tensors do.
        if seen is None or seen.addresses != at:
            dead: list[Any] = []
            references = [weakref.ref(t, dead.append) for i in lasting for t in lists[i]]
            with _lock:
                keep(_seen, key, _Seen(ids, at, dtypes, dead, references))
    new = _look([lists[i] for i in fresh])
    if dtypes is None or new is None:
        return None
    found = dict(zip(lasting, dtypes, strict=True)) | dict(zip(fresh, new, strict=True))
    return tuple(found[i] for i in range(len(lists)))


def _look(lists: Sequence[Sequence[Tensor]]) -> Dtypes | None:
    kinds = [set(map(_dtype, entries)) for entries in lists]
    alike = all(len(kind) <= 1 for kind in kinds)
    plain = alike and all(all(map(Tensor.is_contiguous, entries)) for entries in lists)
    return tuple(next(iter(kind), None) for kind in kinds) if plain else None


def _groups(lists: Sequence[Sequence[Tensor]]) -> list[tuple[Dtypes, list[int] | slice]]:
    """Sets of rows that agree in the dtype of every list: the dtypes, and which rows."""
    rows: dict[Dtypes, list[int]] = {}
    for i in range(len(lists[0])):
        rows.setdefault(tuple(entries[i].dtype if entries else None for entries in lists), []).append(i)
    return list(rows.items()) if len(rows) > 1 else [(dtypes, slice(None)) for dtypes in rows]


def _arranged(
    lists: Sequence[Sequence[Tensor]],
    own: Dtypes,
    dtypes: Dtypes,
    chosen: list[int] | slice,
    written: Sequence[bool],
    aside: Sequence[int],
) -> Part:
    columns: list[list[Tensor]] = [[] for _ in lists]
    copies = []
    mine = [take(entries, chosen) for entries in lists]
    for i, first in enumerate(mine[0]):
        order = dense_order(first)
        kinds = zip(mine, columns, own, dtypes, written, strict=True)
        for place, (entries, column, has, dtype, changes) in enumerate(kinds):
            if not entries:
                continue
            tensor = stand_in = entries[i]
            if place in aside:
                column.append(tensor)
                continue
            strides = order[: tensor.ndim]  # a counter has no dimensions
            if has != dtype or not lies_as(tensor, strides):
                stand_in = torch.empty_strided(tensor.shape, strides, dtype=dtype, device=tensor.device)
                stand_in.copy_(tensor)
                if changes:
                    copies.append((tensor, stand_in))
            column.append(stand_in)
    return Part(own, dtypes, chosen, columns, _addresses(columns), copies)


def dense_order(tensor: Tensor) -> tuple[int, ...]:
    """The strides of the tensor if it fills its memory without gaps or overlaps, else those of a contiguous one."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return torch.empty(tensor.shape, device="meta").stride()
        expected *= size
    return tensor.stride()


def lies_as(tensor: Tensor, order: tuple[int, ...]) -> bool:
    """Strides of dimensions of size 1 mean nothing; nor do any where there is no element."""
    strides = zip(tensor.stride(), order, tensor.shape, strict=True)
    return tensor.numel() == 0 or all(own == wanted or size == 1 for own, wanted, size in strides)


def take(entries: Sequence[T], chosen: list[int] | slice) -> Sequence[T]:
    """The chosen entries of a list that is full or empty."""
    if isinstance(chosen, slice) or not entries:
        return entries
    return [entries[i] for i in chosen]


def keep(cache: OrderedDict[Any, Any], key: Hashable, entry: object) -> None:
    """Put an entry into a cache, which stays small."""
    cache[key] = entry
    cache.move_to_end(key)
    while len(cache) > CACHED:
        cache.popitem(last=False)
