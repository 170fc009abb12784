"""Peak memory of one pass, beyond the model and the data that lie there before it.

On a CPU each contender has a process of its own, since a process never gives all its memory back:

python -m benchmarks.importance.memory WORKLOAD QUANTITY CONTENDER
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys

import torch

from benchmarks.importance.contenders import QUANTITIES, Builder, Job
from benchmarks.importance.gate import few
from benchmarks.importance.registry import builders
from benchmarks.importance.workloads import SPECS, make
from benchmarks.peak_memory import high_water
from benchmarks.results_row import ROOT


def peak_bytes(
    build: Builder, job: Job, contender: str, compile_seconds: float, first: int | None = None
) -> int | None:
    """Bytes at the peak beyond those before; None where this system can't tell. A GPU's are read in this process.

    ``first``: of a pass over so many batches; None: all.
    """
    if job.workload.device.type == "cuda":
        return own_peak(build, job, first)
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


def own_peak(build: Builder, job: Job, first: int | None = None) -> int | None:
    """The same in this process, which on a CPU does nothing else; None where the mark can't be set back."""
    run = build(job)
    job.model.zero_grad(set_to_none=True)
    run(few(job.workload.batches))  # what libraries keep after their first use is not the pass's
    job.model.zero_grad(set_to_none=True)
    found = high_water(lambda: run(job.workload.batches[:first]), job.workload.device)
    return None if found is None else found[1] - found[0]


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
    print(json.dumps({"bytes": own_peak(build, job, args.batches)}))


if __name__ == "__main__":
    main()
