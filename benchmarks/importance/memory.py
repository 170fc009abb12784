"""Peak memory of one pass, beyond the model and the data that lie there before it.

On a CPU each contender has a process of its own, since a process never gives all its memory back:

python -m benchmarks.importance.memory WORKLOAD QUANTITY CONTENDER

It reads the high-water mark of its own address space, VmHWM, after
setting it to the present size; getrusage's ru_maxrss can't be set back, and after an exec begins with the parent's.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.importance.contenders import QUANTITIES, Builder, Job
from benchmarks.importance.gate import few
from benchmarks.importance.registry import builders
from benchmarks.importance.workloads import SPECS, make
from benchmarks.results_row import ROOT

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_bytes(
    build: Builder, job: Job, contender: str, compile_seconds: float, first: int | None = None
) -> int | None:
    """Bytes at the peak beyond those before; None where this system can't tell. A GPU's are read in this process.

    ``first``: of a pass over so many batches; None: all.
    """
    batches = job.workload.batches[:first]
    if job.workload.device.type == "cuda":
        run = build(job)
        job.model.zero_grad(set_to_none=True)
        run(few(batches))
        job.model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(batches)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if platform.system() != "Linux" or job.workload.name not in SPECS:
        return None
    command = [
        sys.executable, "-m", "benchmarks.importance.memory", job.workload.name, job.quantity.name, contender,
        "--threads", str(torch.get_num_threads()), "--compile-seconds", str(compile_seconds),
        *([] if first is None else ["--batches", str(first)]),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"    no peak memory of {contender}: {done.stderr.strip().splitlines()[-1:]}")
        return None
    found: int | None = json.loads(done.stdout.splitlines()[-1])["bytes"]
    return found


def host_peak(build: Builder, job: Job, first: int | None = None) -> int | None:
    """The same on the host, for a process that does nothing else; None where the mark can't be set back."""
    run = build(job)
    run(few(job.workload.batches))  # what libraries keep after their first use is not the pass's
    job.model.zero_grad(set_to_none=True)
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        _CLEAR.write_text("5")
    except OSError:
        return None
    before = _kilobytes("VmRSS")
    run(job.workload.batches[:first])
    return 1024 * (_kilobytes("VmHWM") - before)


def _kilobytes(field: str) -> int:
    found = re.search(rf"{field}:\s*(\d+) kB", _STATUS.read_text())
    assert found is not None, f"{_STATUS} has no {field}"
    return int(found[1])


def main() -> None:
    """Print {"bytes": …} of one contender; random data, since memory does not depend on it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=[*SPECS])
    parser.add_argument("quantity", choices=[*QUANTITIES])
    parser.add_argument("contender")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--compile-seconds", type=float, default=180.0)
    parser.add_argument("--batches", type=int)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    quantity = QUANTITIES[args.quantity]
    job = Job(make(args.workload, "cpu", None), quantity)
    build = builders(quantity, args.compile_seconds)[args.contender]
    print(json.dumps({"bytes": host_peak(build, job, args.batches)}))


if __name__ == "__main__":
    main()
