"""Sums over the ranks of torch.distributed: numerators and counts, once per pass, and no rank left waiting."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_NOT_A_MEMBER = "this rank is not a member of process_group; call the pass on its members only"


class Ranks:
    """The ranks that share one pass: this one's place among them, and sums over all of them.

    Use it as a context around the local work. Leaving it, every rank learns whether another one failed; then all of
    them raise, and none waits for a sum that will never come.

    Args:
        process_group: None for the default group where torch.distributed is initialised (else this process alone),
            False for this rank alone, or a ProcessGroup.
        device: where the model is; NCCL exchanges from there (from the current GPU where the model is on none), other
            backends from the CPU.

    Raises:
        TypeError: process_group is something else.
        ValueError: this rank is not in the group.
    """

    def __init__(self, process_group: Any, device: torch.device) -> None:
        available = dist.is_available()
        if available and type(process_group) is int and process_group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(_NOT_A_MEMBER)  # what new_group returns on the ranks that it leaves out
        default_or_alone = process_group is None or process_group is False
        if not default_or_alone and not (available and isinstance(process_group, dist.ProcessGroup)):
            raise TypeError(
                "process_group must be None (the default group), False (this rank alone) or a torch.distributed "
                f"ProcessGroup, got {type(process_group).__name__}"
            )
        together = process_group is not False and available and dist.is_initialized()
        self._group = process_group if together else None
        self.world = dist.get_world_size(self._group) if together else 1
        self.rank = dist.get_rank(self._group) if together else 0
        if self.rank < 0:
            raise ValueError(_NOT_A_MEMBER)
        self._device = torch.device("cpu")
        if together and "nccl" in dist.get_backend(self._group):
            self._device = device if device.type == "cuda" else torch.device("cuda")
        self._signature = 0

    def share(self, max_samples: int | None) -> int | None:
        """How many of the first ``max_samples`` samples are on this rank: sample j of rank r is number j·world + r."""
        return None if max_samples is None else max(0, -(-(max_samples - self.rank) // self.world))

    def expect_same(self, what: str) -> None:
        """Remember a description of the work; leaving the context raises if the ranks disagree about it."""
        self._signature = zlib.crc32(what.encode())

    def __enter__(self) -> Ranks:
        """Start the local work."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Tell the others how it went. An interrupt (not an Exception) ends the process, and they notice that."""
        if self.world == 1 or (kind is not None and not issubclass(kind, Exception)):
            return
        flags = torch.tensor([int(kind is not None), self._signature, -self._signature], device=self._device)
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._group)
        failed, largest, negated_smallest = flags.tolist()
        if kind is not None:
            return
        if failed:
            raise RuntimeError(
                "the importance pass failed on another rank (its own error says why); nothing was summed"
            )
        if largest != -negated_smallest:
            raise RuntimeError(
                "the ranks do not run the same importance pass: model, trainable parameters, exclude, method and "
                "labels must agree on all of them"
            )

    def sum_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Sum each tensor over the ranks, in place."""
        if self.world > 1:
            for tensor in tensors.values():
                # all_reduce wants contiguous memory; a channels_last sum goes through a copy.
                dense = tensor.contiguous()
                dist.all_reduce(dense, dist.ReduceOp.SUM, group=self._group)
                if dense is not tensor:
                    tensor.copy_(dense)

    def sum_counts(self, counts: Iterable[int]) -> list[int]:
        """Sums of whole numbers over the ranks, exact."""
        values = list(counts)
        if self.world > 1 and values:
            total = torch.tensor(values, dtype=torch.int64, device=self._device)
            dist.all_reduce(total, dist.ReduceOp.SUM, group=self._group)
            values = [int(value) for value in total.tolist()]
        return values
