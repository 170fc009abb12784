"""verify=True: the first two samples of a batch together, against each of them by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from fastewc.importance.batches import Batch

# Relative L1 distance over a parameter. Another order of summation moves a gradient by roundings, and an activation
# with a kink that is hit within a rounding changes a few entries; confused samples move it by tens of percent.
_TOLERANCE, _TOLERANCE_NARROW = 0.01, 0.1


class Sums(Protocol):
    """What a measure adds up."""

    sums: dict[str, Tensor]

    def add(self, batch: Batch) -> None:
        """Add the batch's samples to the sums."""

    def finish(self) -> None:
        """There are no more batches."""


def compare_with_single_samples(
    make: Callable[[], Sums], batch: Batch, *, narrow: bool, generator: torch.Generator | None, what: str
) -> None:
    """Measure two samples in one batch and one by one, with the same random labels.

    Args:
        make: gives a new measure.
        batch: the first one; of a single sample there is nothing to compare.
        narrow: whether the forward computes in less than 32 bits.
        generator: what labels are drawn from; it and torch's own state stay as they are.
        what: the public function, for error texts.

    Raises:
        RuntimeError: the sums differ by more than roundings; the text names the parameters.
    """
    if batch.size < 2:
        return
    together, singly = make(), make()
    with torch.random.fork_rng(devices=[]):
        state, given = torch.get_rng_state(), None if generator is None else generator.get_state()

        def rewind() -> None:
            torch.set_rng_state(state)
            if generator is not None and given is not None:
                generator.set_state(given)

        together.add(batch.rows(0, 2))
        together.finish()
        rewind()
        for index in (0, 1):
            singly.add(batch.rows(index, index + 1))
            singly.finish()  # or it would wait for the next one
        rewind()
    differences = {name: _distance(value, singly.sums[name]) for name, value in together.sums.items()}
    limit = _TOLERANCE_NARROW if narrow else _TOLERANCE
    wrong = {name: value for name, value in differences.items() if not value <= limit}
    if wrong:
        told = ", ".join(f"{name} ({value:.2g})" for name, value in list(wrong.items())[:8])
        raise RuntimeError(
            f"{what} with verify=True: two samples in one batch do not give the sum of what they give one by one; "
            f"relative differences: {told}. Use impl='reference', which takes every sample by itself, or exclude= "
            "these parameters"
        )


def _distance(value: Tensor, wanted: Tensor) -> float:
    """Σ|difference| / Σ|wanted|; 0 for equal ones, NaN equal to NaN."""
    same = (value == wanted) | (value.isnan() & wanted.isnan())
    difference = torch.where(same, 0.0, value.double() - wanted.double()).abs().sum().item()
    return 0.0 if difference == 0 else difference / wanted.double().abs().sum().item()
