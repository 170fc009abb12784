"""Ω and w* in host memory, streamed to a GPU through two buffers while the pieces before them are worked on.

Not run on a GPU yet: the order of copies and kernels is checked on a CPU, with streams that are imitated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar, overload

import torch
from torch import Tensor

from fastewc._graphs import capturing
from fastewc.ops._parts import dense_order, lies_as
from fastewc.ops.importance_codes import BLOCK, Codes, in_memory

#: Bytes of each of the two buffers: a millisecond of a PCIe 4 bus, some hundred times what starting a copy costs.
CAPACITY = 32 << 20
_ALIGNMENT = 256  # of a tensor in a buffer: that of torch's allocator

Held = Tensor | Codes
Kind = TypeVar("Kind", Tensor, Codes)
Column = Sequence[Held | None]


def home(parameter: Tensor, offload: bool) -> torch.device:
    """Where Ω and w* of a parameter are kept."""
    return torch.device("cpu") if offload else parameter.device


def pinned(held: Kind, parameter: Tensor) -> Kind:
    """What is kept on the host for a parameter on a GPU: page-locked, so that copies need not wait; else itself."""
    if parameter.device.type != "cuda" or held.device.type != "cpu":
        return held
    if isinstance(held, Codes):
        return held if held.codes.is_pinned() else Codes(held.codes.pin_memory(), held.scales.pin_memory())
    return held if held.is_pinned() else held.pin_memory()


class Streams(Protocol):
    """Two queues of a device: one of copies, and the current one, of whoever works on what was copied."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queue a copy; nothing waits."""

    def copied(self) -> Any:
        """An event: all copies queued so far are done."""

    def worked(self) -> Any:
        """An event: all work queued so far is done."""

    def copies_wait(self, event: Any) -> None:
        """Copies queued from now on begin after it."""

    def work_waits(self, event: Any) -> None:
        """Work queued from now on begins after it."""

    def keep(self, memory: Tensor) -> None:
        """Memory freed on the host is not given away before both queues have passed this point."""

    def synchronize(self) -> None:
        """Let the host wait for the copies."""


class CudaStreams:
    """:class:`Streams` of CUDA: a stream for the copies beside the current one."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._copies = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy(self, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)

    def copied(self) -> Any:
        return self._copies.record_event()

    def worked(self) -> Any:
        return torch.cuda.current_stream(self._device).record_event()

    def copies_wait(self, event: Any) -> None:
        self._copies.wait_event(event)

    def work_waits(self, event: Any) -> None:
        torch.cuda.current_stream(self._device).wait_event(event)

    def keep(self, memory: Tensor) -> None:
        for stream in (self._copies, torch.cuda.current_stream(self._device)):
            memory.record_stream(stream)

    def synchronize(self) -> None:
        self._copies.synchronize()


class Part(NamedTuple):
    """Elements begin … end of the memory of tensor ``row``; ``whole`` if these are all."""

    row: int
    begin: int
    end: int
    whole: bool

    @overload
    def of(self, tensor: Tensor) -> Tensor: ...
    @overload
    def of(self, tensor: Held) -> Held: ...
    def of(self, tensor: Held) -> Held:
        """Those of a tensor: itself, or a view of one dimension."""
        if self.whole:
            return tensor
        flat = tensor.flat() if isinstance(tensor, Codes) else in_memory(tensor.detach())
        return flat[self.begin : self.end]


@dataclass(frozen=True)
class Piece:
    """Parts of tensors, and the columns of what is held for them, on the device."""

    parts: list[Part]
    columns: list[list[Any]]
    arrived: Any

    def of(self, entries: Sequence[Any]) -> list[Any]:
        """The parts of a list of tensors, which may be empty."""
        return [None if entries[p.row] is None else p.of(entries[p.row]) for p in self.parts if entries]


@dataclass
class _Slot:
    memory: Tensor
    worked: Any = None  # after it the memory may be overwritten


@dataclass
class Stager:
    """Brings columns of held tensors to a device, piece by piece: piece k + 1 is copied while piece k is worked on.

    Nothing on the host waits. A buffer is overwritten once the work that read it is done, and read once its copies are.

    Args:
        device: where the work is.
        streams: its queues.
        capacity: bytes of a buffer; more only where a tensor that cannot be cut is larger.
    """

    device: torch.device
    streams: Streams
    capacity: int = CAPACITY
    _slots: list[_Slot] = field(default_factory=list)
    _open: bool = False  # a pass has begun and not ended: it still runs, or its caller raised

    def pieces(self, columns: Sequence[Column], cuttable: Sequence[bool]) -> Iterator[Piece]:
        """In the order of the tensors; a piece is there until the next one is asked for.

        Args:
            columns: parallel lists of what is on the host, such as Ω and w*; None for nothing.
            cuttable: which tensors may be cut into parts, see :func:`can_cut`.

        Raises:
            RuntimeError: a CUDA graph is being captured.
        """
        refuse_capture()
        plan = self._plan(columns, cuttable)
        self._reserve([max((size for _, size in plan[i::2]), default=0) for i in (0, 1)])
        self._open = True
        ahead = self._send(plan[0][0], columns, 0) if plan else None
        for k in range(len(plan)):
            piece, ahead = ahead, self._send(plan[k + 1][0], columns, k + 1) if k + 1 < len(plan) else None
            assert piece is not None
            self.streams.work_waits(piece.arrived)
            yield piece
            self._slots[k % 2].worked = self.streams.worked()
        self._open = False

    def wait(self) -> None:
        """Let the host wait for the copies: what they read may be written then."""
        self.streams.synchronize()

    def _plan(self, columns: Sequence[Column], cuttable: Sequence[bool]) -> list[tuple[list[Part], int]]:
        """The parts of each piece, and its bytes."""
        plan: list[tuple[list[Part], int]] = []
        for i, entries in enumerate(zip(*columns, strict=True)):
            for part in _parts(i, entries, cuttable[i], self.capacity):
                size = sum(_aligned(t.nbytes) for held in entries if held is not None for t in _tensors(part.of(held)))
                if not plan or plan[-1][1] + size > self.capacity:
                    plan.append(([part], size))
                else:
                    parts, used = plan[-1]
                    parts.append(part)
                    plan[-1] = parts, used + size
        return plan

    def _reserve(self, sizes: Sequence[int]) -> None:
        if self._open:  # nothing was recorded of the work that the former pass had begun
            self.streams.work_waits(self.streams.copied())
            for slot in self._slots:
                slot.worked = self.streams.worked()
        for i, size in enumerate(sizes):
            if i == len(self._slots):
                self._slots.append(_Slot(torch.empty(0, dtype=torch.uint8, device=self.device)))
            slot = self._slots[i]
            if slot.memory.numel() < size:
                slot.memory = torch.empty(size, dtype=torch.uint8, device=self.device)
                slot.worked = self.streams.worked()  # of whoever had this memory before
            self.streams.keep(slot.memory)

    def _send(self, parts: list[Part], columns: Sequence[Column], k: int) -> Piece:
        slot, offset = self._slots[k % 2], 0
        if slot.worked is not None:
            self.streams.copies_wait(slot.worked)

        def copied(source: Tensor) -> Tensor:
            nonlocal offset
            target = slot.memory[offset : offset + source.nbytes].view(source.dtype)
            offset += _aligned(source.nbytes)
            order = dense_order(source)
            assert lies_as(source, order), "what is held is dense"
            self.streams.copy(target, in_memory(source))
            return target.as_strided(source.shape, order)

        found: list[list[Any]] = [[] for _ in columns]
        for part in parts:
            for column, staged in zip(columns, found, strict=True):
                held = column[part.row]
                own = None if held is None else part.of(held)
                if isinstance(own, Codes):
                    staged.append(Codes(copied(own.codes), copied(own.scales)))
                else:
                    staged.append(None if own is None else copied(own))
        return Piece(parts, found, self.streams.copied())


Stage = Callable[[torch.device], Stager | None]


def refuse_capture() -> None:
    """RuntimeError while a CUDA graph is captured: its replays would read two buffers that others have filled."""
    if capturing():
        raise RuntimeError(
            "offload=True streams Ω and w* through buffers that every step shares, which a CUDA graph cannot hold: "
            "capture forward and backward alone, or make the EWC with offload=False"
        )


def can_cut(*tensors: Held | None) -> bool:
    """Whether the tensors of one parameter, itself the first, are dense in one order, so that views of parts exist."""
    first = tensors[0]
    assert isinstance(first, Tensor)
    order = dense_order(first)
    return all(t.lie_as(first) if isinstance(t, Codes) else lies_as(t, order) for t in tensors if t is not None)


def _parts(row: int, entries: Sequence[Held | None], cuttable: bool, capacity: int) -> Iterator[Part]:
    """One tensor as a whole, or in as large parts as a buffer holds."""
    n = max((held.numel() for held in entries if held is not None), default=0)
    a_block = sum(BLOCK * held.dtype.itemsize + 4 * isinstance(held, Codes) for held in entries if held is not None)
    room = capacity - 2 * _ALIGNMENT * len(entries)
    step = max(room // max(a_block, 1), 1) * BLOCK
    if not cuttable or n <= step:
        yield Part(row, 0, n, True)
        return
    for begin in range(0, n, step):
        yield Part(row, begin, min(begin + step, n), False)


def _tensors(held: Held) -> tuple[Tensor, ...]:
    return (held.codes, held.scales) if isinstance(held, Codes) else (held,)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
