"""The fully connected runs of "Stabilizing Elastic Weight Consolidation…" (arXiv 2109.10021), repeated.

    python -m benchmarks.paper.permuted_mnist --data-root PATH [--download] [--seeds 5] [--jobs 2]

Ten permuted-MNIST tasks in a row (see ``protocol.py``), five protections, two ways to begin a run's Adam:

- *carried*: as in the published script, whose ``reset`` renews weights and importances but neither Adam's moments nor
  its step count. Run k starts with the Adam state of run k − 1; in front of run 0 stands the fresh run of seed 0, so
  every carried run really carries one. This is what the published averages consist of, and what is judged here.
- *fresh*: a new Adam for each run, which is what a reader of the paper would do.

A carried row passes if |mean − reference| ≤ 3·sd·√(1/n + 1/20): sd from the authors' 20 runs, n runs here.
The nine permutations are this benchmark's own, not the authors'; how much an *unprotected* network forgets depends on
which they are as much as on the seed, and the authors' sd, over runs with one set of permutations, leaves that out.
Runs are independent of each other except along a carried chain; the command, repeated, skips the finished ones.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.paper.mnist_tasks import Split, load_mnist
from benchmarks.paper.protocol import ROWS, Outcome, Protocol, Row, run_once
from benchmarks.paper.run_store import Run, RunStore
from benchmarks.results_row import ROOT, commit, machine, row, student_half_width, write

AUTHORS_RUNS = 20
# Tensors of a megabyte go back to the system and come again, page by page, at each step: keep them (glibc reads this
# when a process starts). A protected step takes 2.9 ms of processor time instead of 3.6.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}


@dataclass(frozen=True)
class Summary:
    """One line of the table: accuracies in 0..1; ``half_width`` is half the mean's 95 % interval, None for one run."""

    row: Row
    mode: str
    values: list[float]
    mean: float
    sd: float | None
    half_width: float | None
    allowed: float
    passed: bool


def summarise(which: Row, mode: str, values: Sequence[float]) -> Summary:
    """Mean, standard deviation, interval and the verdict of one row."""
    n, mean = len(values), sum(values) / len(values)
    sd = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1)) if n > 1 else None
    allowed = 3 * which.reference_sd * math.sqrt(1 / n + 1 / AUTHORS_RUNS)
    return Summary(
        which, mode, list(values), mean, sd, student_half_width(values), allowed, abs(mean - which.reference) <= allowed
    )


def table(summaries: Sequence[Summary]) -> str:
    """The summaries as text, a line each; only the carried rows are judged."""
    head = f"{'row':<22}{'Adam':<9} n  {'mean':>6}  {'sd':>6}  {'95 % interval':>14}  {'paper':>6}  allowed"
    lines = [head, "-" * len(head)]
    for s in summaries:
        sd = "" if s.sd is None else f"{s.sd:.4f}"
        interval = "" if s.half_width is None else f"{s.mean - s.half_width:.4f}..{s.mean + s.half_width:.4f}"
        verdict = ("pass" if s.passed else "FAIL") if s.mode == "carried" else f"{s.mean - s.row.reference:+.4f}"
        lines.append(
            f"{s.row.name:<22}{s.mode:<9}{len(s.values):>2}  {s.mean:.4f}  {sd:>6}  {interval:>14}  "
            f"{s.row.reference:.4f}  {s.allowed:>7.4f}  {verdict}"
        )
    return "\n".join(lines)


def plan(rows: Sequence[str], modes: Sequence[str], seeds: int, finished: set[Run]) -> list[Run]:
    """The runs still to do, early seeds of all rows first; a carried chain brings the fresh run in front of it."""
    wanted = [Run(name, mode, seed) for seed in range(seeds) for mode in modes for name in rows]
    for run in list(wanted):
        if run.before is not None and run.before not in wanted:
            wanted.insert(wanted.index(run), run.before)
    wanted.sort(key=lambda run: (run.seed, run.mode != "fresh"))
    return [run for run in wanted if run not in finished]


def results_rows(summaries: Sequence[Summary], store: RunStore) -> list[dict[str, Any]]:
    """The summaries in the format of all results; each run keeps the commit that ran it."""
    rows = []
    for s in summaries:
        runs = [store.finished[Run(s.row.name, s.mode, seed)] for seed in range(len(s.values))]
        rows.append(
            row(
                "paper",
                f"permuted_mnist/{s.row.name}/{s.mode}",
                value=s.mean,
                unit="accuracy",
                row=asdict(s.row),
                adam=s.mode,
                runs=s.values,
                sd=s.sd,
                half_width_95=s.half_width,
                allowed_deviation=s.allowed,
                passed=s.passed if s.mode == "carried" else None,
                protocol=asdict(store.protocol),
                run_commits=sorted({run["commit"] for run in runs}),
                run_threads=runs[0]["threads"],
                seconds=[run["seconds"] for run in runs],
                importance_seconds=[run["importance_seconds"] for run in runs],
            )
        )
    return rows


_data: Split | None = None
_tasks_done: Any = None


def _start_worker(data_root: str | None, threads: int, tasks_done: Any) -> None:
    global _data, _tasks_done
    torch.set_num_threads(threads)
    _data, _tasks_done = load_mnist(data_root), tasks_done


def _count_task() -> None:
    with _tasks_done.get_lock():
        _tasks_done.value += 1


def _work(run: Run, protocol: Protocol, adam_state: dict[str, Any] | None) -> Outcome:
    assert _data is not None
    return run_once(
        ROWS[run.row], _data, seed=run.seed, protocol=protocol, adam_state=adam_state, after_task=_count_task
    )


def run_all(todo: list[Run], store: RunStore, *, data_root: str | None, jobs: int, threads: int) -> None:
    """Do the runs in ``jobs`` processes, each as soon as the run before it is finished, and store them as they end."""
    from tqdm import tqdm

    for name, value in KEEP_MEMORY.items():
        os.environ.setdefault(name, value)
    context = multiprocessing.get_context("spawn")
    tasks_done = context.Value("q", 0)
    extra = {"commit": commit(), "torch": torch.__version__, "threads": threads, "jobs": jobs}
    running: dict[Future[Outcome], Run] = {}
    waiting = list(todo)
    on_screen = sys.stderr.isatty()
    with (
        ProcessPoolExecutor(jobs, context, _start_worker, (data_root, threads, tasks_done)) as pool,
        tqdm(total=len(todo) * store.protocol.tasks, unit="task", mininterval=0.5 if on_screen else 60) as bar,
    ):
        while waiting or running:
            ready = [run for run in waiting if run.before is None or run.before in store.finished]
            for run in ready[: jobs - len(running)]:
                waiting.remove(run)
                running[pool.submit(_work, run, store.protocol, store.adam_state(run))] = run
            finished, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in finished:
                run, outcome = running.pop(future), future.result()
                store.add(run, outcome, extra)
                bar.write(f"{run.row} {run.mode} seed {run.seed}: {outcome.accuracy:.4f} in {outcome.seconds:.0f} s")
            bar.update(int(tasks_done.value) - bar.n)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    published = Protocol()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper.permuted_mnist",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data-root",
        default=os.environ.get("FASTEWC_DATA"),
        help="folder with MNIST/raw (default: FASTEWC_DATA)",
    )
    parser.add_argument("--download", action="store_true", help="fetch MNIST if it is not there")
    parser.add_argument("--seeds", type=int, default=5, help="runs per row and mode (default 5)")
    parser.add_argument(
        "--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW", help=f"of {', '.join(ROWS)}"
    )
    parser.add_argument("--adam", nargs="+", default=["carried", "fresh"], choices=["carried", "fresh"])
    parser.add_argument(
        "--out", type=Path, default=Path("build/permuted_mnist/runs"), help="finished runs, a JSON line each"
    )
    parser.add_argument("--work", type=Path, default=Path("build/permuted_mnist/adam"), help="Adam states between runs")
    parser.add_argument("--results", type=Path, help="where the summary goes (default: benchmarks/results/<machine>/)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of each process (default 1)")
    parser.add_argument(
        "--permutations", type=int, default=published.permutations, help="seed of another set of permutations"
    )
    parser.add_argument("--tasks", type=int, default=published.tasks, help="fewer for a trial")
    parser.add_argument("--epochs", type=int, default=published.epochs, help="fewer for a trial")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, print the table, write the summary. Returns 0; 1 if a carried row misses its reference."""
    args = parse(argv)
    protocol = Protocol(tasks=args.tasks, epochs=args.epochs, permutations=args.permutations)
    load_mnist(args.data_root, download=args.download)  # a missing folder fails here, not in every worker
    store = RunStore(args.out, args.work, protocol)
    todo = plan(args.rows, args.adam, args.seeds, set(store.finished))
    if todo:
        run_all(todo, store, data_root=args.data_root, jobs=args.jobs, threads=args.threads)
    summaries = [
        summarise(ROWS[name], mode, values)
        for name in args.rows
        for mode in args.adam
        if (values := store.accuracies(name, mode, args.seeds))
    ]
    print(table(summaries))
    if protocol != Protocol() and args.results is None:
        print("not the published protocol: nothing is written (--results FILE does)")
        return 0
    results = args.results or ROOT / "benchmarks" / "results" / machine() / "permuted_mnist.json"
    write(results, results_rows(summaries, store))
    print(f"written: {results}")
    return 0 if all(s.passed for s in summaries if s.mode == "carried") else 1


if __name__ == "__main__":
    raise SystemExit(main())
