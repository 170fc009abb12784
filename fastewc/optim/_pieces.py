"""A step in pieces: Ω and w* come from host memory, and everything else is cut as they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

import torch
from torch import Tensor

from fastewc._offload import Part, Stager, can_cut
from fastewc.ops.ewc_step import StepTensors

_HELD = ("importances", "anchors")
_CUT = tuple(field.name for field in fields(StepTensors) if field.name not in (*_HELD, "steps"))


def step_pieces(stager: Stager, tensors: StepTensors, *, whole: bool) -> Iterator[StepTensors]:
    """The tensors with their Ω and w* on the device, piece by piece; step each before asking for the next.

    Args:
        stager: brings Ω and w*.
        tensors: the lists of a call, Ω and w* on the host; new momentum buffers are put into them.
        whole: no tensor may be cut, as for a norm.
    """
    lists = {name: entries for name in _CUT if (entries := getattr(tensors, name))}
    rows = zip(*lists.values(), *(getattr(tensors, name) for name in _HELD), strict=True)
    cuttable = [not whole and can_cut(*row) for row in rows]
    new_buffers: dict[int, Tensor] = {}
    for piece in stager.pieces([tensors.importances, tensors.anchors], cuttable):
        counts = [_counter(tensors, part) for part in piece.parts if tensors.steps]
        cut = {name: piece.of(entries) for name, entries in lists.items()}
        found = StepTensors(**cut, steps=counts, importances=piece.columns[0], anchors=piece.columns[1])
        yield found
        for part, buffer in zip(piece.parts, found.momentum_buffers, strict=False):  # no buffers without momentum
            if buffer is not None and tensors.momentum_buffers[part.row] is None:
                _take_buffer(tensors, part, buffer, new_buffers)


def _is_last(tensors: StepTensors, part: Part) -> bool:
    return part.whole or part.end == tensors.params[part.row].numel()


def _counter(tensors: StepTensors, part: Part) -> Tensor:
    """A step counts once: every part but a tensor's last counts on a copy."""
    step = tensors.steps[part.row]
    return step if _is_last(tensors, part) else step.clone()


def _take_buffer(tensors: StepTensors, part: Part, buffer: Tensor, parts: dict[int, Tensor]) -> None:
    """A momentum buffer that the op has made: the parts of one are put together, and it is there after the last."""
    if not part.whole:
        if part.row not in parts:
            parts[part.row] = torch.empty_like(tensors.params[part.row], dtype=buffer.dtype, requires_grad=False)
        part.of(parts[part.row]).copy_(buffer)
        buffer = parts[part.row]
    if _is_last(tensors, part):
        tensors.momentum_buffers[part.row] = buffer
