"""What CUDA graphs ask of a step: a replay runs the captured kernels alone, so every number that may change is read."""

from __future__ import annotations

import torch
from torch import Tensor


def capturing() -> bool:
    """True while the current CUDA stream is being captured."""
    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return initialized and torch.cuda.is_current_stream_capturing()


class LiveNumber:
    """A number as a 0-dim float64 tensor on every device that asks: graphs keep the address and read the value."""

    def __init__(self) -> None:
        self._tensors: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device, value: float) -> Tensor:
        """The tensor of a device, the same one for ever; ``value`` where it is new.

        Raises:
            RuntimeError: it is new during a capture: the graph would write it at every replay.
        """
        found = self._tensors.get(device)
        if found is None:
            if capturing():
                raise RuntimeError(
                    "the first step with this ewc on this device is being captured into a CUDA graph: run at least one "
                    "step before the capture (torch.cuda.graph asks for a warm-up anyway)"
                )
            found = self._tensors[device] = torch.tensor(value, dtype=torch.float64, device=device)
        return found

    def set(self, value: float) -> None:
        """Change it on every device; later replays read it."""
        for tensor in self._tensors.values():
            tensor.fill_(value)
