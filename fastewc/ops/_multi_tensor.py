"""One Triton launch over many tensors: the table of addresses and blocks that lives on the device, and its cache.

Row 0 of a table counts elements; every other row holds one address (or one number) per tensor. Beside it stands the
list of blocks: which tensor a program works on, and where in it the program begins. Tables are cached by addresses and
sizes, so they keep no tensor alive and stay right when memory is reused; a step with new gradients sends one row.
Nothing here imports Triton, and nothing waits for the device.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastewc.ops._parts import Part, keep

#: Programs that fill one multiprocessor several times over, so that the last wave costs little.
PROGRAMS_PER_PROCESSOR = 16
#: Tiles that one program takes at most: its start (two dependent loads) is then far below its bandwidth time.
MAX_TILES = 16


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
    part: Part,
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
        part: what the table has addresses of, one row per column; all on one device.
        block: elements of a tile.
        scratch: (tensors, programs, device) -> what to allocate with a new table.
        numbers: further rows, int64.
    """
    params = part.columns[0]
    device = params[0].device
    numels = tuple(map(Tensor.numel, params))
    rows = (*part.addresses, *map(tuple, numbers))
    stream, capturing = _stream(device)
    if capturing:
        return _new_table(numels, rows, block, device, scratch)
    key = (name, block, device, stream, numels, rows[0])
    with _lock:
        found = _tables.get(key)
        if found is not None:
            _tables.move_to_end(key)
            found.refresh(rows)
            return found
    found = _new_table(numels, rows, block, device, scratch)
    with _lock:
        keep(_tables, key, found)
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
