"""Does EWC in three bytes a weight protect as well as in eight? Five permuted-MNIST tasks, five seeds each.

    python -m benchmarks.paper.compressed --data-root PATH [--download] [--seeds 5] [--jobs 2]

The protocol of ``protocol.py`` with Fisher importances and the stabilised penalty, once with Ω and w* in float32, once
with Ω in one byte (``importance_dtype=torch.uint8``) and w* in bfloat16. Runs of one seed start from the same weights
and see the same samples in the same order. Each task re-encodes Ω, with stochastic rounding. What is judged is the mean
accuracy over all tasks after the last: both means have to be within one standard deviation of the float32 runs.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import statistics
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.paper.mnist_tasks import Split, load_mnist
from benchmarks.paper.protocol import ROWS, Protocol, run_once
from benchmarks.results_row import ROOT, machine, row, write

PROTECTION = ROWS["fisher-stabilized-85"]
STORAGES: dict[str, dict[str, Any]] = {
    "float32": {},
    "uint8 Ω, bfloat16 w*": {"importance_dtype": torch.uint8, "anchor_dtype": torch.bfloat16},
}


@functools.cache
def _mnist(data_root: str | None) -> Split:
    return load_mnist(data_root)


def accuracy_of(storage: str, seed: int, protocol: Protocol, data_root: str | None) -> float:
    """Mean test accuracy over all tasks after the last, 0..1."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        # bfloat16 anchors of float32 weights: how far they are rounded is told at every task.
        warnings.filterwarnings("ignore", message=".*bfloat16")
        return run_once(PROTECTION, _mnist(data_root), seed=seed, protocol=protocol, storage=STORAGES[storage]).accuracy


def judge(runs: dict[str, list[float]]) -> tuple[float, bool]:
    """The standard deviation of the float32 runs, and whether all other means are within it of theirs."""
    exact = runs["float32"]
    sd, mean = statistics.stdev(exact), statistics.mean(exact)
    return sd, all(abs(statistics.mean(values) - mean) <= sd for values in runs.values())


def main(argv: Sequence[str] | None = None) -> int:
    """Run all, print a table, write the JSON. Returns 0; 1 if a mean is further than one standard deviation off."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper.compressed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data-root", default=os.environ.get("FASTEWC_DATA"), help="folder with MNIST/raw")
    parser.add_argument("--download", action="store_true", help="fetch MNIST if it is not there")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each (default 5, at least 2)")
    parser.add_argument("--tasks", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=Protocol().epochs, help="fewer for a trial")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread (default 2)")
    parser.add_argument("--results", type=Path, help="default: benchmarks/results/<machine>/compressed.json")
    args = parser.parse_args(argv)
    if args.seeds < 2:
        parser.error(f"--seeds must be at least 2 for a standard deviation, got {args.seeds}")
    load_mnist(args.data_root, download=args.download)
    protocol = Protocol(tasks=args.tasks, epochs=args.epochs)

    jobs = [(storage, seed) for seed in range(args.seeds) for storage in STORAGES]
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(accuracy_of, storage, seed, protocol, args.data_root) for storage, seed in jobs]
        runs: dict[str, list[float]] = {storage: [] for storage in STORAGES}
        for (storage, seed), future in zip(jobs, futures, strict=True):
            runs[storage].append(future.result())
            print(f"{storage}, seed {seed}: {runs[storage][-1]:.4f}", flush=True)

    sd, passed = judge(runs)
    for storage, values in runs.items():
        off = statistics.mean(values) - statistics.mean(runs["float32"])
        print(f"{storage:<22} {statistics.mean(values):.4f} ± {statistics.stdev(values):.4f} (sd)  {off / sd:+.2f} sd")
    print("within one standard deviation" if passed else "NOT within one standard deviation")
    rows = [
        row(
            "paper",
            f"compressed/{storage}",
            value=statistics.mean(values),
            unit="accuracy",
            runs=values,
            sd=statistics.stdev(values),
            passed=passed,
            row=asdict(PROTECTION),
            protocol=asdict(protocol),
        )
        for storage, values in runs.items()
    ]
    write(args.results or ROOT / "benchmarks" / "results" / machine() / "compressed.json", rows)
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
