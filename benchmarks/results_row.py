"""One format for every measured number: a JSON list of rows, each with its machine, versions, commit and command."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastewc import __version__

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median and the 20th and 80th percentiles over ``calls`` timed calls."""

    median: float
    p20: float
    p80: float
    calls: int


def measure(fn: Callable[[], Any], *, device: str = "cpu", seconds: float = 1.0, warmup: int = 3) -> Timing:
    """Time ``fn`` call by call for about ``seconds``, at least 5 and at most 1,000 times, after ``warmup`` calls.

    On a GPU every call is timed between two events, which the host waits for only once all are queued.
    """
    for _ in range(warmup):
        fn()
    if device == "cpu":
        return timing_of(_host_times(fn, seconds))
    torch.cuda.synchronize()
    begun = time.perf_counter()
    fn()
    torch.cuda.synchronize()
    calls = _clamp(seconds / max(time.perf_counter() - begun, 1e-6))
    return timing_of(_event_times(lambda: None, fn, calls))


def measure_in_turn(
    contenders: Sequence[tuple[Callable[[], Any], Callable[[], Any]]], *, device: str = "cpu", seconds: float = 1.0
) -> list[list[float]]:
    """Seconds of each contender's call in each round: entry r of all lists was measured in round r.

    In a round every contender has its turn, in an order drawn anew, so a ratio of two entries of one round is fair on a
    machine whose speed changes. One untimed round comes first; then rounds go on for ``seconds`` per contender, at
    least 5 and at most 1,000.

    On a GPU a turn is one untimed and five timed calls, queued without waiting, and the entry is their median: the
    launches of one call hide behind the work of the one before, as they do behind a training step's backward.

    Args:
        contenders: (prepare, call) pairs; ``prepare`` runs before every call and is not timed.
        device: "cpu" or "cuda".
        seconds: time spent on each contender, on average.
    """
    order, turns = random.Random(0), list(range(len(contenders)))
    rounds: list[list[float]] = []
    until = math.inf
    while len(rounds) < 6 or (len(rounds) <= 1000 and time.perf_counter() < until):
        order.shuffle(turns)
        times = [0.0] * len(contenders)
        for i in turns:
            times[i] = _turn(*contenders[i], device)
        rounds.append(times)
        if len(rounds) == 1:
            until = time.perf_counter() + seconds * len(contenders)
    return [list(times) for times in zip(*rounds[1:], strict=True)]


def _turn(prepare: Callable[[], Any], call: Callable[[], Any], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
        return timing_of(_event_times(prepare, call, 6)[1:]).median
    prepare()
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def _event_times(prepare: Callable[[], Any], call: Callable[[], Any], calls: int) -> list[float]:
    """Seconds between two GPU events around each call; the host waits once all are queued."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
    for start, stop in events:
        prepare()
        start.record()
        call()
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) / 1e3 for start, stop in events]


def _host_times(fn: Callable[[], Any], seconds: float) -> list[float]:
    times: list[float] = []
    while len(times) < 5 or (sum(times) < seconds and len(times) < 1000):
        begun = time.perf_counter()
        fn()
        times.append(time.perf_counter() - begun)
    return times


def _clamp(calls: float) -> int:
    return int(min(max(calls, 5), 1000))


def timing_of(times: Iterable[float]) -> Timing:
    """Median and percentiles of the seconds of single calls."""
    ordered = sorted(times)

    def quantile(q: float) -> float:
        return ordered[max(0, math.ceil(q * len(ordered)) - 1)]

    return Timing(quantile(0.5), quantile(0.2), quantile(0.8), len(ordered))


def student_half_width(values: Sequence[float]) -> float | None:
    """Half the 95 % interval of the mean; None for one value."""
    from scipy.stats import t as student_t

    n = len(values)
    if n < 2:
        return None
    mean = sum(values) / n
    sd = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    return float(student_t.ppf(0.975, n - 1)) * sd / math.sqrt(n)


def row(
    suite: str,
    name: str,
    timing: Timing | None = None,
    *,
    value: float | None = None,
    unit: str = "s",
    **extra: Any,
) -> dict[str, Any]:
    """One number with everything needed to judge and repeat it.

    Args:
        suite: the benchmark that measured it, e.g. "ops".
        name: what was measured, unique within the suite.
        timing: from :func:`measure`; or ``value`` where there is only one number.
        value: the single number, in ``unit``; it becomes median, p20 and p80.
        unit: of the numbers, e.g. "s", "accuracy", "ratio".
        extra: anything else, e.g. impl, dtype, shape; kept under "extra".
    """
    if (timing is None) == (value is None):
        raise ValueError(f"row {suite}/{name} wants either a timing or a value")
    numbers = (value, value, value) if timing is None else (timing.median, timing.p20, timing.p80)
    if timing is not None:
        extra = {"calls": timing.calls, **extra}
    return {
        "suite": suite,
        "name": name,
        "median": numbers[0],
        "p20": numbers[1],
        "p80": numbers[2],
        "unit": unit,
        "extra": extra,
        **provenance(),
    }


def provenance() -> dict[str, Any]:
    """Machine, versions, commit and command of this process."""
    on_gpu = torch.cuda.is_available()
    return {
        "machine": machine(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "fastewc": __version__,
        "commit": commit(),
        "command": _command(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def machine() -> str:
    """The folder name of this machine's results: its GPU, else its CPU architecture and thread count."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().lower().replace(" ", "-")
    return f"cpu-{platform.machine()}-{torch.get_num_threads()}-threads"


def commit() -> str:
    """Commit of the checkout, with "-dirty" where tracked files differ; $FASTEWC_COMMIT where git is absent."""
    head = _said("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if head is None:
        return os.environ.get("FASTEWC_COMMIT", "unknown")
    dirty = _said("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return head + ("-dirty" if dirty else "")


def write(path: Path | str, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as a JSON list; a file of that name is replaced whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(path.suffix + ".part")
    scratch.write_text(json.dumps(list(rows), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(scratch, path)


def _command() -> str:
    """As the user would type it: a module run with -m has its file in argv[0]."""
    program = Path(sys.argv[0]).resolve()
    if program.suffix == ".py" and program.is_relative_to(ROOT):
        module = ".".join(program.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
        return shlex.join(["python", "-m", module, *sys.argv[1:]])
    return shlex.join(["python", *sys.argv])


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _said(*command: str) -> str | None:
    """What a program printed, or None where it is missing or failed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
