"""One Triton launch over many tensors: the table of addresses and blocks that lives on the device, and its cache.

Row 0 of a table counts elements; every other row holds one address (or one number) per tensor. Beside it stands the
list of blocks: which tensor a program works on, and where in it the program begins. Tables are cached by addresses and
sizes, never by object, so they keep no tensor alive and stay right when memory is reused; a step with new gradients
sends one row. Nothing here imports Triton, and nothing waits for the device.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

#: Programs that fill one multiprocessor several times over, so that the last wave costs little.
PROGRAMS_PER_PROCESSOR = 16
#: Tiles that one program takes at most: its start (two dependent loads) is then far below its bandwidth time.
MAX_TILES = 16
#: Tables kept; the least recently used goes first.
CACHED_TABLES = 256

_dtype = attrgetter("dtype")


@dataclass(frozen=True)
class Column:
    """A list that a kernel uses, one tensor per parameter (or none at all).

    Attributes:
        tensors: all of dtype ``own``.
        dtype: what the kernel reads and writes.
        written: the kernel changes it.
    """

    tensors: Sequence[Tensor]
    own: torch.dtype | None
    dtype: torch.dtype
    written: bool = False


@dataclass
class Arranged:
    """Columns as kernels want them: the dtypes asked for, and in each row the same dense storage order.

    ``copies`` pairs a caller's tensor with the temporary that stands in for it and was written.
    """

    columns: list[Sequence[Tensor]]
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def copy_back(self, skip: Tensor | None = None) -> None:
        """Put results into the tensors they belong to; where the 0-dim ``skip`` is not zero they stay as they are."""
        for target, written in self.copies:
            target.copy_(written if skip is None else torch.where(skip.reshape(()) != 0, target, written))


def arrange(columns: Sequence[Column]) -> Arranged:
    """The tensors themselves where they are dense, of one order and of the right dtype, else temporaries.

    The first column decides the order of a row, so that a channels_last parameter is walked as it lies.
    """
    if all(_plain(column) for column in columns):
        return Arranged([column.tensors for column in columns])
    copies = []
    ready: list[list[Tensor]] = [[] for _ in columns]
    for i, first in enumerate(columns[0].tensors):
        order = _dense_order(first)
        for column, entries in zip(columns, ready, strict=True):
            if not column.tensors:
                continue
            tensor = stand_in = column.tensors[i]
            strides = order[: tensor.ndim]  # a counter has no dimensions
            if column.own != column.dtype or not _lies_as(tensor, strides):
                stand_in = torch.empty_strided(tensor.shape, strides, dtype=column.dtype, device=tensor.device)
                stand_in.copy_(tensor)
                if column.written:
                    copies.append((tensor, stand_in))
            entries.append(stand_in)
    return Arranged(list(ready), copies)


def _plain(column: Column) -> bool:
    return not column.tensors or (column.own == column.dtype and all(map(Tensor.is_contiguous, column.tensors)))


def _dense_order(tensor: Tensor) -> tuple[int, ...]:
    """The strides of the tensor if it fills its memory without gaps or overlaps, else those of a contiguous one."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return torch.empty(tensor.shape, device="meta").stride()
        expected *= size
    return tensor.stride()


def _lies_as(tensor: Tensor, order: tuple[int, ...]) -> bool:
    """Strides of dimensions of size 1 mean nothing; nor do any where there is no element."""
    strides = zip(tensor.stride(), order, tensor.shape, strict=True)
    return tensor.numel() == 0 or all(own == wanted or size == 1 for own, wanted, size in strides)


def groups(
    lists: Sequence[Sequence[Tensor]],
) -> list[tuple[tuple[torch.dtype | None, ...], list[int] | slice]]:
    """Sets of rows that agree in the dtype of every list (None where it is empty): the dtypes, and which rows.

    A full slice where all rows agree, which is what nearly always happens.
    """
    kinds = [set(map(_dtype, entries)) for entries in lists]
    if all(len(kind) <= 1 for kind in kinds):
        return [(tuple(next(iter(kind), None) for kind in kinds), slice(None))]
    rows: dict[tuple[torch.dtype | None, ...], list[int]] = {}
    for i in range(len(lists[0])):
        rows.setdefault(tuple(entries[i].dtype if entries else None for entries in lists), []).append(i)
    return list(rows.items())


def take(entries: Sequence[T], chosen: list[int] | slice) -> Sequence[T]:
    """The chosen entries of a list that is full or empty."""
    if isinstance(chosen, slice) or not entries:
        return entries
    return [entries[i] for i in chosen]


@dataclass
class Table:
    """What a launch over many tensors is given.

    Attributes:
        rows: int64 [1 + rows, n] on the device: element counts, then addresses (0 where a column is empty).
        blocks: int64 [2, programs] on the device: the tensor of each program, and the element it begins with.
        chunk: elements per program.
        scratch: what a kernel keeps beside the table, allocated once.
    """

    rows: Tensor
    blocks: Tensor
    chunk: int
    scratch: Tensor
    sent: tuple[tuple[int, ...], ...]

    @property
    def n(self) -> int:
        """The number of tensors."""
        return self.rows.shape[1]

    @property
    def programs(self) -> int:
        """The number of programs; 0 where every tensor is empty."""
        return self.blocks.shape[1]

    def refresh(self, rows: tuple[tuple[int, ...], ...]) -> None:
        """Send the rows that have changed since, in one asynchronous copy."""
        changed = [i for i, (old, new) in enumerate(zip(self.sent, rows, strict=True)) if old != new]
        if changed:
            begin, end = changed[0], changed[-1] + 1
            self.rows[1 + begin : 1 + end].copy_(_staged(rows[begin:end], self.n, self.rows.device), non_blocking=True)
            self.sent = rows


_tables: OrderedDict[Hashable, Table] = OrderedDict()
_lock = threading.Lock()


def table(
    name: str,
    columns: Sequence[Sequence[Tensor]],
    block: int,
    *,
    scratch: Callable[[int, int, torch.device], Tensor],
    numbers: Sequence[Sequence[int]] = (),
) -> Table:
    """The table of these tensors, new or cached and brought up to date.

    Kernels of one stream run in order, so a row may be overwritten while older kernels still wait to read it: the copy
    queues behind them. Hence a stream's tables are its own. A captured graph replays the copies it was captured with,
    from host memory that torch keeps for it; its table is shared with nobody.

    Args:
        name: of the kernel: two kernels over the same parameters have different rows.
        columns: one list per row, empty or with one tensor for each of the first column; all on one device.
        block: elements of a tile.
        scratch: (tensors, programs, device) -> what to allocate with a new table.
        numbers: further rows, int64.
    """
    device = columns[0][0].device
    numels = tuple(map(Tensor.numel, columns[0]))
    rows = (*(tuple(map(Tensor.data_ptr, column)) for column in columns), *map(tuple, numbers))
    stream, capturing = _stream(device)
    if capturing:
        return _new_table(numels, rows, block, device, scratch)
    key = (name, device, stream, numels, rows[0])
    with _lock:
        found = _tables.get(key)
        if found is not None:
            _tables.move_to_end(key)
            found.refresh(rows)
            return found
    found = _new_table(numels, rows, block, device, scratch)
    with _lock:
        _tables[key] = found
        while len(_tables) > CACHED_TABLES:
            _tables.popitem(last=False)
    return found


def _new_table(
    numels: tuple[int, ...],
    rows: tuple[tuple[int, ...], ...],
    block: int,
    device: torch.device,
    scratch: Callable[[int, int, torch.device], Tensor],
) -> Table:
    n = len(numels)
    chunk = chunk_size(numels, block, processors(device))
    blocks = block_list(numels, chunk)
    sent = _staged((numels, *rows), n, device).to(device, non_blocking=True)
    return Table(
        sent, _pinned(blocks, device).to(device, non_blocking=True), chunk, scratch(n, blocks.shape[1], device), rows
    )


def chunk_size(numels: Sequence[int], block: int, processors: int) -> int:
    """Elements per program: one tile for small sets, so that they fill the device, and MAX_TILES for large ones."""
    tiles = sum(-(-numel // block) for numel in numels)
    return block * min(max(tiles // (PROGRAMS_PER_PROCESSOR * processors), 1), MAX_TILES)


def block_list(numels: Sequence[int], chunk: int) -> Tensor:
    """int64 [2, programs] on the host: tensor and first element of each program; empty tensors have none."""
    sizes = torch.tensor(numels, dtype=torch.int64)
    counts = (sizes + (chunk - 1)).div(chunk, rounding_mode="floor")
    owners = torch.repeat_interleave(torch.arange(len(numels)), counts)
    before = counts.cumsum(0) - counts
    starts = (torch.arange(owners.numel()) - before[owners]) * chunk
    return torch.stack([owners, starts])


def _staged(rows: Sequence[tuple[int, ...]], n: int, device: torch.device) -> Tensor:
    """Rows as an int64 tensor in host memory, absent ones as zeros.

    Fresh memory each time: torch keeps a pinned block from being reused until the copies that read it are done.
    """
    return _pinned(torch.tensor([row or (0,) * n for row in rows], dtype=torch.int64), device)


def _pinned(host: Tensor, device: torch.device) -> Tensor:
    return host.pin_memory() if device.type == "cuda" else host


def _stream(device: torch.device) -> tuple[int, bool]:
    """(the current stream, whether it is being captured)."""
    if device.type != "cuda":
        return 0, False
    return torch.cuda.current_stream(device).cuda_stream, torch.cuda.is_current_stream_capturing()


@lru_cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the device; 1 for a CPU, where the interpreter runs one program after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def address(tensor: Tensor | None) -> int:
    """Where a kernel finds an optional scalar; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()
