"""What protection costs the paper's whole fully connected run, next to the same run without any.

    python -m benchmarks.paper.fc_run --data-root PATH [--download] [--threads 2] [--runs 1] [--epochs 6] [--tasks 10]

Both sides learn the ten permuted-MNIST tasks of ``protocol.py`` from the same start in the same order of samples. One
has torch's fused Adam and nothing else. The other has fastewc.optim.Adam with stabilised EWC (λ of the paper's best
stabilised Fisher row) and, after every task but the last, a Fisher of 5,000 samples. They take turns epoch by epoch, so
a machine that changes its speed changes it for both. Testing and the making of tasks are not timed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastewc
from benchmarks.paper.mnist_tasks import Split, load_mnist, pixel_orders
from benchmarks.paper.protocol import ROWS, Protocol, Row, accuracy, build_mlp, measure_importance, train_task
from benchmarks.results_row import ROOT, machine, row, timing_of, write

PROTECTED = ROWS["fisher-stabilized-85"]


@dataclass
class Side:
    """One of the two runs, and the seconds it took."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    order: torch.Generator
    ewc: fastewc.EWC | None = None
    epochs: list[float] = field(default_factory=list)
    importances: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Training and importances."""
        return sum(self.epochs) + sum(self.importances)

    def train(self, task: Split, one_epoch: Protocol) -> None:
        """One more epoch, timed."""
        begun = time.perf_counter()
        train_task(self.model, self.optimizer, task, one_epoch, self.order)
        self.epochs.append(time.perf_counter() - begun)

    def consolidate(self, task: Split, samples: int, which: Row = PROTECTED) -> None:
        """One task's importance measured and folded in, timed."""
        assert self.ewc is not None and which.importance is not None
        last = slice(-samples, None)
        x, y = task.train_x[last], task.train_y[last]
        begun = time.perf_counter()
        self.ewc.consolidate(measure_importance(which.importance, self.model, x, y))
        self.importances.append(time.perf_counter() - begun)


def both_sides(data: Split, seed: int, protocol: Protocol, which: Row = PROTECTED) -> tuple[Side, Side]:
    """(plain, protected) before the first step, with equal weights and an equal order of samples to come."""
    sides = []
    for protect in (False, True):
        torch.manual_seed(seed)
        model = build_mlp(data.train_x.shape[1], protocol.hidden, int(data.train_y.max()) + 1)
        order = torch.Generator().manual_seed(10_000 + seed)
        if protect:
            ewc = fastewc.EWC(model, ewc_lambda=which.ewc_lambda, variant=which.variant)
            sides.append(Side(model, fastewc.optim.Adam(model.parameters(), lr=protocol.lr, ewc=ewc), order, ewc))
        else:
            sides.append(Side(model, torch.optim.Adam(model.parameters(), lr=protocol.lr, fused=True), order))
    return sides[0], sides[1]


def run_side_by_side(
    data: Split, *, seed: int, protocol: Protocol, tell: Callable[[str], object] = print
) -> tuple[Side, Side, list[float]]:
    """Train both sides in turns, a fresh Adam each; also their mean accuracies over all tasks after the last one."""
    plain, protected = sides = both_sides(data, seed, protocol)
    one_epoch = replace(protocol, epochs=1)
    orders = pixel_orders(protocol.tasks, data.train_x.shape[1], protocol.permutations)
    for k, pixels in enumerate(orders):
        task = data.permuted(pixels)
        for epoch in range(protocol.epochs):
            for side in sides if (k * protocol.epochs + epoch) % 2 else (protected, plain):
                side.train(task, one_epoch)
        for side in sides:
            side.model.eval()
        if k < protocol.tasks - 1:
            protected.consolidate(task, protocol.importance_samples)
        tell(f"task {k}: {protected.seconds / plain.seconds:.3f}× so far")
    reached = [
        sum(accuracy(side.model, data.test_x[:, pixels], data.test_y) for pixels in orders) / len(orders)
        for side in sides
    ]
    return plain, protected, reached


def rows_of(plain: Side, protected: Side, reached: list[float], extra: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Seconds of both sides and the ratios of the whole run, training alone, importances alone, and epochs in turn."""
    training = sum(plain.epochs)
    extra = {**extra, "accuracy": {"plain": reached[0], "protected": reached[1]}}

    def ratio(name: str, value: float) -> dict[str, Any]:
        print(f"{name:<34}{value:8.3f}×")
        return row("paper", f"fc_run/{name}", value=value, unit="ratio", **extra)

    yield row("paper", "fc_run/plain seconds", value=training, **extra, epochs=plain.epochs)
    yield row(
        "paper", "fc_run/protected seconds", value=protected.seconds, **extra, epochs=protected.epochs,
        importances=protected.importances,
    )  # fmt: skip
    yield ratio("whole run", protected.seconds / training)
    yield ratio("training", sum(protected.epochs) / training)
    yield ratio("importances", sum(protected.importances) / training)
    by_epoch = timing_of(own / other for own, other in zip(protected.epochs, plain.epochs, strict=True))
    yield row("paper", "fc_run/an epoch's training", by_epoch, unit="ratio", **extra)
    print(f"{'an epoch, median':<34}{by_epoch.median:8.3f}× ({by_epoch.p20:.3f}–{by_epoch.p80:.3f})")


def main() -> None:
    """Run, print the ratios, write all of them."""
    published = Protocol()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper.fc_run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data-root", help="folder with MNIST/raw (default: FASTEWC_DATA)")
    parser.add_argument("--download", action="store_true", help="fetch MNIST if it is not there")
    parser.add_argument("--threads", type=int, help="CPU threads; default torch's")
    parser.add_argument("--runs", type=int, default=1, help="seeds, a pair of runs each")
    parser.add_argument("--tasks", type=int, default=published.tasks, help="fewer for a trial")
    parser.add_argument("--epochs", type=int, default=published.epochs, help="fewer for a trial")
    parser.add_argument("--out", type=Path, help="the JSON file; default benchmarks/results/<machine>/fc_run.json")
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    protocol = replace(published, tasks=args.tasks, epochs=args.epochs)
    data = load_mnist(args.data_root, download=args.download)
    out = args.out or ROOT / "benchmarks" / "results" / machine() / "fc_run.json"
    # What loads or compiles at its first use does so here.
    few = Split(*(part[:200] for part in (data.train_x, data.train_y, data.test_x, data.test_y)))
    run_side_by_side(few, seed=0, protocol=replace(protocol, tasks=2, epochs=1), tell=lambda text: None)
    rows: list[dict[str, Any]] = []
    for seed in range(args.runs):
        extra = {"seed": seed, "row": asdict(PROTECTED), "protocol": asdict(protocol)}
        rows += rows_of(*run_side_by_side(data, seed=seed, protocol=protocol), extra)
        write(out, rows)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
