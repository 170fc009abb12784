"""What a CUDA graph cannot hold of a step: refused while it is captured, since no replay would say so."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastewc.optim._base import ProtectedOptimizer


def refuse_uncapturable(optimizer: ProtectedOptimizer) -> None:
    """RuntimeError where the host takes part in the step."""
    name = type(optimizer).__name__
    # Adam's counter lives on the CPU unless capturable: a captured graph would replay one frozen step.
    if not all(group.get("capturable", True) for group in optimizer.param_groups):
        raise RuntimeError(f"CUDA graph capture of {name}.step() needs capturable=True in every group")
    if optimizer.path_integral:
        raise RuntimeError(
            f"CUDA graph capture of {name}.step() with path_integral: its steps are counted on the host, which sees no "
            "replay. Capture forward and backward alone, and call step() after each replay"
        )


def refuse_new_state(optimizer: ProtectedOptimizer) -> None:
    """RuntimeError where the step would make state: zeros written inside a graph are written at every replay."""
    for group in optimizer.param_groups:
        if any(p.grad is not None and optimizer.lacks_state(group, p) for p in group["params"]):
            raise RuntimeError(
                f"the first {type(optimizer).__name__}.step() of a parameter is being captured into a CUDA graph, so "
                "every replay would reset its state: run at least one step before the capture"
            )
