"""Who may be timed: first every contender's Ω of a few samples must be that of a float64 batch-1 loop.

It is judged twice, elementwise and with no absolute slack: in the precision that is timed, and on a float64 copy of the
model, where a wrong term can't hide behind rounding. The gradient of a sample reaches a weight through the whole
network, so its error is some roundings of the tensor's *largest* gradient, δ = r·u·g_max. Then for Fisher
|(g + δ)² − g²| ≤ 2|g|δ + δ², r·u on the scale 2√(Ω·Ω_max) + r·u·Ω_max, and for MAS |δ|, r·u on the scale Ω_max.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.importance.contenders import Builder, Job, batch_one
from benchmarks.importance.workloads import Batch
from fastewc.testing import assert_within_roundings, unit_roundoff

# r: what a layer's dot products of up to some thousand terms lose, through a dozen layers and back.
ROUNDINGS = 4000.0
# In the timed precision a contender may lose this many times what torch's own batch-1 loop loses, where that is more.
TIMES_TORCH = 8.0
SAMPLES, POSITIONS = 4, 24


def few(batches: Sequence[Batch]) -> list[Batch]:
    """Four samples in two batches, of sequences the first tokens."""
    x, y = (t[:SAMPLES, :POSITIONS] if t.ndim == 2 and not t.is_floating_point() else t[:SAMPLES] for t in batches[0])
    return [batch for batch in ((x[:2], y[:2]), (x[2:], y[2:])) if len(batch[0])]


def in_double(job: Job) -> Job:
    """The same on a float64 copy of the model, without autocast."""
    workload = job.workload
    batches = [(x.double() if x.is_floating_point() else x, y) for x, y in workload.batches]
    return replace(
        job,
        workload=replace(workload, model=deepcopy(workload.model).double(), batches=batches, autocast=False),
    )


class Gate:
    """The float64 result for one job, and how far torch's batch-1 loop is from it in the timed precision.

    Args:
        job: what is asked for.
        cut: takes the batches that are computed out of the job's.
    """

    def __init__(self, job: Job, cut: Callable[[Sequence[Batch]], list[Batch]] = few) -> None:
        self.job = job
        self.timed = replace(job, workload=replace(job.workload, batches=cut(job.workload.batches)))
        self.double = in_double(self.timed)
        self.oracle = dict(batch_one(self.double)(self.double.workload.batches))
        self.dtype = torch.bfloat16 if job.workload.autocast else torch.float32
        lost = batch_one(self.timed)(self.timed.workload.batches)
        self.roundings = max(ROUNDINGS, TIMES_TORCH * self._roundings_of(lost))

    def check(self, name: str, build: Builder, *, part: bool = False) -> float:
        """The share of all weights that a contender gives Ω of; AssertionError where it is wrong or incomplete.

        Args:
            name: for the error's text.
            build: the contender.
            part: it may leave parameters out, though not all.
        """
        for job, dtype, roundings in (
            (self.timed, self.dtype, self.roundings),
            (self.double, torch.float64, ROUNDINGS),
        ):
            got = build(job)(job.workload.batches)
            missing = [parameter for parameter in self.oracle if parameter not in got]
            if missing and (not part or len(missing) == len(self.oracle)):
                named = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
                raise AssertionError(f"nothing for {len(missing)} of {len(self.oracle)} parameters: {named}")
            self.compare(name, got, dtype, roundings)
        return sum(t.numel() for t in got.values()) / sum(t.numel() for t in self.oracle.values())

    def compare(self, name: str, got: Mapping[str, Tensor], dtype: torch.dtype, roundings: float) -> None:
        """AssertionError where an element is not within so many roundings of ``dtype``."""
        for parameter, value in got.items():
            assert_within_roundings(
                value.to(torch.float64), self.oracle[parameter], roundings=roundings,
                error_scale=self._scale(parameter, roundings * unit_roundoff(dtype)), dtype=dtype,
                context=f"{name} {parameter} ({str(dtype).removeprefix('torch.')}):",
            )  # fmt: skip

    def _scale(self, parameter: str, relative: float) -> Tensor:
        """Of Ω's error in units of ``relative`` = r·u."""
        wanted = self.oracle[parameter]
        largest = wanted.max()
        if self.job.quantity.power == 1:
            return largest.expand_as(wanted)
        return 2 * (wanted * largest).sqrt() + relative * largest

    def _roundings_of(self, got: Mapping[str, Tensor]) -> float:
        """The r that a result needs."""
        u, most = unit_roundoff(self.dtype), 0.0
        for parameter, value in got.items():
            wanted = self.oracle[parameter]
            largest = wanted.max()
            if largest == 0:
                continue
            if self.job.quantity.power == 2:  # the error of |g| that explains the error of g²
                delta = (value.double().sqrt() - wanted.sqrt()).abs().max() / largest.sqrt()
            else:
                delta = (value.double() - wanted).abs().max() / largest
            most = max(most, float(delta) / u)
        return most
