"""The convolutional half of the paper's tables, and how much of that network's forgetting is BatchNorm's.

    python -m benchmarks.paper.conv --data-root PATH [--importance none fisher mas si] [--variant plain stabilized]
        [--lambdas 600 1300] [--norm as-they-are frozen-after-first] [--seeds 3]

Four tasks: MNIST, FashionMNIST, and both rotated by 90°; network and protocol are those of ``conv_run.py``. λ is this
library's (½λ): the authors' plain λ, twice; without ``--lambdas`` the authors' best. Every run begins with a new Adam
(theirs is carried from run to run); SI is clamped at 0 (theirs is not).

BatchNorm: the running statistics go on through all tasks (*as-they-are*) or stay those of the first task
(*frozen-after-first*). Each trained network is tested with the statistics that it has, and once more with each task's
own, measured by forward passes over its training data: no weight changes, so what that gives back was never forgotten.

A run takes long; it goes on after its last finished task, and finished runs are in the results file, which is written
after each: the command, repeated, does what is missing.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.paper.authors import FILE
from benchmarks.paper.conv_run import NORMS, Outcome, Run, Setup, as_images, first_samples, run_conv
from benchmarks.paper.mnist_tasks import Split, load_mnist
from benchmarks.paper.results_file import Results
from benchmarks.results_row import ROOT, machine, student_half_width

#: The authors' best λ in this library's convention, of the plain and of the stabilised penalty. Where their curve is
#: flat between two λ, both.
BEST: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "fisher": ((1350.0,), (600.0, 1300.0)),
    "mas": ((600.0,), (450.0,)),
    "si": ((48.0,), (30.0, 140.0)),
}
IMPORTANCES = ("none", *BEST)
VARIANTS = ("plain", "stabilized", "proximal", "wva")


def authors_run(run: Run) -> dict[str, float] | None:
    """Mean, standard deviation and number of the authors' runs at this λ; None where they have none."""
    if run.variant not in ("plain", "stabilized"):
        return None
    wanted = {
        "network": "convolutional",
        "importance": "fisher" if run.importance == "none" else run.importance,
        "stabilized": str(int(run.variant == "stabilized")),
    }
    theirs = run.ewc_lambda / 2 if run.variant == "plain" else run.ewc_lambda
    with FILE.open() as stream:
        for one in csv.DictReader(stream):
            if wanted.items() <= one.items() and float(one["lambda"]) == theirs and one["std_accuracy"]:
                return {"mean": float(one["mean_accuracy"]), "sd": float(one["std_accuracy"]), "n": int(one["runs"])}
    return None


def plan(args: argparse.Namespace) -> list[Run]:
    """All runs that are asked for, the first seed of everything before the second."""
    curves: list[tuple[str, str, float]] = []
    for importance in args.importance:
        if importance == "none":
            curves.append(("none", "plain", 0.0))
            continue
        plain, stabilized = BEST[importance]
        for variant in args.variant:
            lambdas = args.lambdas or (plain if variant == "plain" else stabilized)
            curves += [(importance, variant, one) for one in lambdas]
    return [Run(*curve, norm, seed) for seed in range(args.seeds) for curve in curves for norm in args.norm]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def add(results: Results, run: Run, outcome: Outcome) -> None:
    """One finished run's row: its accuracy with the statistics as they are."""
    results.add(
        run.name, unit="accuracy", value=_mean(outcome.per_task),
        accuracy_own_statistics=_mean(outcome.per_task_own_statistics), run=asdict(run), **asdict(outcome),
        authors=authors_run(run),
    )  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each method, λ and treatment of the statistics: both accuracies and what the authors have."""
    head = f"{'runs':<48}{'n':>2}  {'as trained':>16}  {'own statistics':>16}  {'paper':>15}"
    lines = [head, "-" * len(head)]
    for curve in dict.fromkeys(Run(**one["extra"]["run"]).curve for one in rows):
        same = [one for one in rows if Run(**one["extra"]["run"]).curve == curve]
        columns = [[one["median"] for one in same], [one["extra"]["accuracy_own_statistics"] for one in same]]
        cells = [_with_interval(one) for one in columns]
        theirs = same[0]["extra"]["authors"]
        paper = "" if theirs is None else f"{theirs['mean']:.4f} ({theirs['sd']:.4f})"
        lines.append(f"{curve:<48}{len(same):>2}  {cells[0]:>16}  {cells[1]:>16}  {paper:>15}")
    return "\n".join([*lines, "ours: mean ± half its 95 % interval; paper: mean (sd of a run)"])


def _with_interval(values: Sequence[float]) -> str:
    half = student_half_width(values)
    return f"{_mean(values):.4f}" + ("" if half is None else f" ± {half:.4f}")


def run_missing(todo: Sequence[Run], sources: tuple[Split, Split], setup: Setup, results: Results, work: Path) -> None:
    """Train, test and write all runs, with the time that is left for each."""
    from tqdm import tqdm

    steps = setup.tasks * setup.steps(len(sources[0].train_y))
    for i, run in enumerate(todo, 1):
        label = f"{i}/{len(todo)} {run.name}"
        with tqdm(total=steps, desc=label, unit="step", mininterval=0.5 if sys.stderr.isatty() else 60) as bar:
            checkpoint = work / f"{run.name.replace('/', '-').replace(' ', '-')}.pt"
            outcome = run_conv(run, sources, setup, checkpoint=checkpoint, after_step=bar.update)
        add(results, run, outcome)
        lost = "" if outcome.diverged is None else f", diverged in task {outcome.diverged + 1}"
        print(
            f"{run.name}: {_mean(outcome.per_task):.4f}, with each task's own statistics "
            f"{_mean(outcome.per_task_own_statistics):.4f}, in {outcome.seconds:.0f} s{lost}",
            flush=True,
        )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    published = Setup()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper.conv",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data-root", default=os.environ.get("FASTEWC_DATA"), help="folder with MNIST/raw and FashionMNIST/raw"
    )
    parser.add_argument("--download", action="store_true", help="fetch the data sets if they are not there")
    parser.add_argument("--importance", nargs="+", default=list(IMPORTANCES), choices=IMPORTANCES)
    parser.add_argument("--variant", nargs="+", default=["plain", "stabilized"], choices=VARIANTS)
    parser.add_argument("--lambdas", nargs="+", type=float, help="default: the authors' best")
    parser.add_argument("--norm", nargs="+", default=list(NORMS), choices=NORMS, help="BatchNorm's statistics")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="CPU threads; default torch's")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<machine>/paper_conv.json")
    parser.add_argument("--work", type=Path, default=Path("build/paper_conv"), help="states of unfinished runs")
    for name in ("tasks", "epochs", "train_samples"):
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, default=getattr(published, name), help="fewer for a trial")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, print the table, write the JSON; the exit status."""
    args = parse(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    setup = Setup(tasks=args.tasks, epochs=args.epochs, train_samples=args.train_samples)
    if setup != Setup() and args.out is None:
        print("not the published protocol: give --out FILE", file=sys.stderr)
        return 2
    results = Results(args.out or ROOT / "benchmarks" / "results" / machine() / "paper_conv.json", setup)
    todo = [run for run in plan(args) if run.name not in results]
    if todo:
        mnist, fashion = (
            as_images(
                first_samples(load_mnist(args.data_root, download=args.download, fashion=one), setup.train_samples)
            )
            for one in (False, True)
        )
        run_missing(todo, (mnist, fashion), setup, results, args.work)
    print(table(results.rows))
    print(f"written: {results.file}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
