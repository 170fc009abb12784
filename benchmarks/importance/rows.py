"""One workload: the gate, then times in turns, then peak memory; a row for every contender, also for who failed."""

from __future__ import annotations

import contextlib
import importlib.metadata
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.importance.contenders import QUANTITIES, Builder, Job, Run
from benchmarks.importance.gate import Gate
from benchmarks.importance.memory import peak_bytes
from benchmarks.importance.registry import PARTIAL, PLAIN, builders
from benchmarks.importance.workloads import Workload
from benchmarks.results_row import measure_in_turn, row, timing_of
from fastewc import Importance

Rows = Iterator[dict[str, Any]]
# Who takes more than so many times the unit has turns of its own with it, so few of them, on so many batches as take
# about so many seconds.
_SLOW, _SLOW_ROUNDS, _SLOW_SECONDS = 5.0, 3, 2.0
#: What a contender raises where a model is beyond it: its own errors, or those of torch in it. Named in its row.
_REFUSALS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NotImplementedError, RuntimeError,
    TypeError, ValueError,
)  # fmt: skip


@dataclass
class Entry:
    """What became of one contender on one workload."""

    name: str
    build: Builder
    job: Job
    run: Run | None = None
    failure: str | None = None
    share: float = 1.0
    batches: int | None = None  # how many of them it is measured on; None: all
    ratios: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak: int | None = None
    paths: dict[str, int] | None = None

    def fails(self, error: BaseException) -> None:
        """Keep the reason, in one line."""
        self.run = None
        text = " ".join(str(error).split())
        self.failure = f"{type(error).__name__}: {text[:300]}{'…' if len(text) > 300 else ''}"


def rows_of(
    workload: Workload,
    quantity: str,
    *,
    seconds: float,
    compile_seconds: float,
    memory: bool = True,
    only: Callable[[str], bool] = lambda name: True,
) -> Rows:
    """Measure one quantity of one workload, and print its table.

    Args:
        workload: from :func:`benchmarks.importance.workloads.make`.
        quantity: "fisher" or "mas".
        seconds: timed on each contender that is not slow, on average.
        compile_seconds: what torch.compile may take; 0 leaves its contender out.
        memory: measure peak memory too.
        only: which contenders, by name; the unit is always one.
    """
    job = Job(workload, QUANTITIES[quantity])
    found = builders(job.quantity, compile_seconds)
    entries = [Entry(name, build, job) for name, build in found.items() if name == PLAIN or only(name)]
    print(
        f"{quantity} {workload.name} {workload.device.type}: {workload.weights:,} weights, {samples_of(workload):,} "
        f"samples of {workload.source} in {len(workload.batches)} batches",
        flush=True,
    )
    admit(entries, job)
    time_all(entries, seconds)
    if memory:
        for entry in entries:
            if entry.run is not None:
                entry.peak = peak_bytes(entry.build, job, entry.name, compile_seconds, entry.batches)
    for entry in entries:
        print(line(entry), flush=True)
        yield row_of(entry, workload, quantity)


def admit(entries: list[Entry], job: Job) -> None:
    """Give everyone that runs and is right its pass; keep the reason for the others."""
    gate = Gate(job)
    for entry in entries:
        try:
            if entry.name != PLAIN:
                entry.share = gate.check(entry.name, entry.build, part=entry.name in PARTIAL)
            entry.run = entry.build(job)
        except _REFUSALS as error:
            entry.fails(error)


def time_all(entries: list[Entry], seconds: float) -> None:
    """Seconds of whole passes (of fewer batches: whoever is slow) and their ratios to the unit's of the same round."""
    unit, *others = entries
    device, count = unit.job.workload.device.type, len(unit.job.workload.batches)
    assert unit.run is not None, unit.failure
    _seconds(unit, device, 1)
    quick, slow = [unit], []
    for entry in others:
        if entry.run is not None:
            try:
                some = min(count, 1 + int(_SLOW_SECONDS / _seconds(entry, device, 1)))
                if _seconds(entry, device, some) > _SLOW * _seconds(unit, device, some):
                    entry.batches = some
            except _REFUSALS as error:
                entry.fails(error)
            else:
                (quick if entry.batches is None else slow).append(entry)
    for entry in slow * _SLOW_ROUNDS:
        assert entry.batches is not None
        _seconds(unit, device, entry.batches)  # warm again after who came before
        plain = _seconds(unit, device, entry.batches)
        entry.seconds.append(_seconds(entry, device, entry.batches))
        entry.ratios.append(entry.seconds[-1] / plain)
    measured = measure_in_turn([(_nothing, _call(entry)) for entry in quick], device=device, seconds=seconds)
    for entry, times in zip(quick, measured, strict=True):
        entry.seconds = times
        entry.ratios = [own / plain for own, plain in zip(times, measured[0], strict=True)]


def _nothing() -> None:
    """Passes need no preparation."""


def _call(entry: Entry, first: int | None = None) -> Callable[[], None]:
    """A pass over all batches, or the first; of fastewc also by which path each parameter went."""
    run, batches = entry.run, entry.job.workload.batches[:first]
    assert run is not None

    def call() -> None:
        result = run(batches)
        if isinstance(result, Importance):
            entry.paths = dict(Counter(path for path, _ in result.report.values()))

    return call


def _seconds(entry: Entry, device: str, batches: int) -> float:
    """One pass over the first batches."""
    begun = time.perf_counter()
    _call(entry, batches)()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def _versions() -> dict[str, str]:
    """Of what else took part."""
    found = {}
    for package in ("torchvision", "transformers", "backpack-for-pytorch", "opacus"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def samples_of(workload: Workload, batches: int | None = None) -> int:
    """N of the whole pass, or of its first batches."""
    return sum(len(x) for x, _ in workload.batches[:batches])


def line(entry: Entry) -> str:
    """One contender as text."""
    if entry.failure is not None:
        return f"  {entry.name:<67} failed: {entry.failure}"
    timing, ratio = timing_of(entry.seconds), timing_of(entry.ratios)
    peak = "" if entry.peak is None else f"{entry.peak / 2**20:9.0f} MiB"
    part = "" if entry.share == 1 else f"  {entry.share:.0%} of the weights"
    paths = "" if entry.paths is None else f"  {entry.paths}"
    return (
        f"  {entry.name:<67}{timing.median * 1e3:10.1f} ms {ratio.median:7.2f}× ({ratio.p20:.2f}–{ratio.p80:.2f})"
        f"{peak}{part}{paths}"
    )


def row_of(entry: Entry, workload: Workload, quantity: str) -> dict[str, Any]:
    """The row of one contender; who failed was timed in 0 calls."""
    name = f"{quantity} {workload.name} {workload.device.type} {entry.name}"
    common = {
        "workload": workload.name, "quantity": quantity, "contender": entry.name, "baseline": PLAIN,
        "samples": samples_of(workload, entry.batches), "batch": len(workload.batches[0][0]),
        "weights": workload.weights, "data": workload.source, "device": workload.device.type,
        "dtype": "bfloat16 autocast" if workload.autocast else "float32", "peers": _versions(),
    }  # fmt: skip
    if entry.failure is not None:
        return row("importance", name, value=0, unit="calls", **common, failed=entry.failure)
    ratio = timing_of(entry.ratios)
    return row(
        "importance", name, timing_of(entry.seconds), **common, ratio=ratio.median, ratio_p20=ratio.p20,
        ratio_p80=ratio.p80, peak_bytes=entry.peak, share_of_weights=entry.share, paths=entry.paths,
    )  # fmt: skip
