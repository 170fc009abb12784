"""A CNN learns five permuted-MNIST tasks: no penalty, one for each task, one for the last task only.

    python -m benchmarks.paper.cnn_report --data-root PATH [--epochs 3] [--train-samples 10000] [--width 128]

The experiment of S. Sörberg's project report on EWC in a Keras CNN (Politecnico di Torino, July 2020): dropout 0.2,
convolution of 64 channels (3×3, "same"), ReLU, 2×2 max-pool, two dense layers of WIDTH units with ReLU and dropout 0.5,
softmax. MNIST as it is, then permutations of its pixels; plain penalty ½λΣΩ(w − w*)², λ = 200, Ω the Fisher diagonal of
the data set's labels over all training samples; a new Adam for each task; after each epoch accuracy on the tasks begun
so far. In the report: width 1024, 30 epochs a task on 60,000 samples, lr 1e-4, 10,000 test samples. The defaults here
are a size for minutes on one core, with a larger lr and without dropout, with which so few steps learn the later tasks
badly; the report's permutations are not known, and torch's default initialisation takes Keras's place.

The report keeps the weights and the Fisher of every task, adds one penalty for each, and notes that the sum could be
expanded so that its cost no longer grows with the number of tasks. ``anchor="weighted"`` does that: EWC holds the exact
sum as one penalty (its centre and its total importance), and with γ = 0 that of the last task. The program times the
training step after 0 to 5 tasks, both ways, in turns.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import fastewc
from benchmarks.paper.command_line import begin_setup
from benchmarks.paper.conv_run import accuracy_in_parts, as_images, first_samples
from benchmarks.paper.mnist_tasks import PERMUTATION_SEED, Split, load_mnist, pixel_orders
from benchmarks.paper.protocol import measure_importance
from benchmarks.paper.results_file import Results
from benchmarks.results_row import measure_in_turn, timing_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PREFIX = "cnn_report"
#: γ of each way; None: no penalty.
WAYS: dict[str, float | None] = {"no penalty": None, "a penalty for each task": 1.0, "the last task only": 0.0}


@dataclass(frozen=True)
class Setup:
    """The whole experiment."""

    tasks: int = 5
    epochs: int = 3
    train_samples: int = 10_000
    test_samples: int = 2_000
    width: int = 128
    dropout: float = 0.0  # times the report's rates
    batch: int = 64
    lr: float = 1e-3
    ewc_lambda: float = 200.0
    seed: int = 0


def build_cnn(side: int, width: int, dropout: float, classes: int) -> nn.Sequential:
    """The report's network for images [N, 1, S, S] with ``dropout`` times its rates; logits instead of softmax."""
    return nn.Sequential(
        nn.Dropout(0.2 * dropout), nn.Conv2d(1, 64, 3, padding="same"), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(64 * (side // 2) ** 2, width), nn.ReLU(), nn.Dropout(0.5 * dropout),
        nn.Linear(width, width), nn.ReLU(), nn.Dropout(0.5 * dropout),
        nn.Linear(width, classes),
    )  # fmt: skip


def protection(model: nn.Module, gamma: float | None, ewc_lambda: float) -> fastewc.EWC | None:
    """Σ_k ½λΩ_k(w − w_k)² over all tasks (γ = 1) or the last (γ = 0), as one penalty."""
    if gamma is None:
        return None
    return fastewc.EWC(model, ewc_lambda=ewc_lambda, variant="plain", gamma=gamma, anchor="weighted")


def run_way(
    gamma: float | None, tasks: Sequence[Split], setup: Setup, after_epoch: Callable[[], object] = lambda: None
) -> list[list[float]]:
    """Learn the tasks in a row.

    Returns:
        For each epoch of the whole run the accuracies, 0..1, on the tasks that were begun until then.
    """
    torch.manual_seed(setup.seed)
    order = torch.Generator().manual_seed(10_000 + setup.seed)
    first = tasks[0]
    model = build_cnn(first.train_x.shape[2], setup.width, setup.dropout, int(first.train_y.max()) + 1)
    ewc = protection(model, gamma, setup.ewc_lambda)
    history = []
    for k, task in enumerate(tasks):
        optimizer = fastewc.optim.Adam(model.parameters(), lr=setup.lr, ewc=ewc)
        for _ in range(setup.epochs):
            model.train()
            for index in torch.randperm(len(task.train_y), generator=order).split(setup.batch):
                train_step(model, optimizer, task.train_x[index], task.train_y[index])
            model.eval()
            history.append([accuracy_in_parts(model, one.test_x, one.test_y) for one in tasks[: k + 1]])
            after_epoch()
        if ewc is not None and k < len(tasks) - 1:
            ewc.consolidate(measure_importance("fisher", model, task.train_x, task.train_y))
    return history


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor,
    penalty: Callable[[], Tensor | float] = lambda: 0.0,
) -> None:  # fmt: skip
    """Forward, backward, update."""
    loss = nn.functional.cross_entropy(model(x), y) + penalty()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


Remembered = tuple[list[Tensor], list[Tensor]]


def separate_penalties(model: nn.Module, remembered: Sequence[Remembered], ewc_lambda: float) -> Tensor | float:
    """As in the report: one term ½λΣΩ_k(w − w_k)² for each task, from its importances and weights."""
    total: Tensor | float = 0.0
    for importances, anchors in remembered:
        for p, omega, anchor in zip(model.parameters(), importances, anchors, strict=True):
            total = total + 0.5 * ewc_lambda * (omega * (p - anchor) ** 2).sum()
    return total


def time_steps(task: Split, setup: Setup, results: Results, seconds: float) -> None:
    """A row for each number of tasks and way to penalise: time of a step over that of a step without a task."""
    x, y = task.train_x[: setup.batch], task.train_y[: setup.batch]
    torch.manual_seed(setup.seed)
    start = build_cnn(x.shape[2], setup.width, setup.dropout, int(task.train_y.max()) + 1).eval()
    found = fastewc.fisher_importance(start, [(x, y)], loss="categorical", labels="dataset")

    def step(tasks: int, *, separate: bool) -> Callable[[], None]:
        model = copy.deepcopy(start)
        ewc = None if separate else protection(model, 1.0, setup.ewc_lambda)
        optimizer = fastewc.optim.Adam(model.parameters(), lr=setup.lr, ewc=ewc)
        remembered: list[Remembered] = []
        for _ in range(tasks):
            if ewc is not None:
                ewc.consolidate(found)
            else:
                remembered.append(
                    ([one.clone() for one in found.values()], [p.detach().clone() for p in model.parameters()])
                )
        model.train()
        return lambda: train_step(
            model, optimizer, x, y, lambda: separate_penalties(model, remembered, setup.ewc_lambda)
        )

    contenders = [(tasks, separate) for separate in (False, True) for tasks in range(setup.tasks + 1)]
    contenders.remove((0, True))
    times = measure_in_turn(
        [(lambda: None, step(tasks, separate=separate)) for tasks, separate in contenders], seconds=seconds
    )
    for (tasks, separate), own in zip(contenders, times, strict=True):
        ratio = timing_of(mine / without for mine, without in zip(own, times[0], strict=True))
        results.add(
            time_name(tasks, separate=separate), ratio, unit="ratio", tasks=tasks, separate=separate,
            seconds=timing_of(own).median,
        )  # fmt: skip


def time_name(tasks: int, *, separate: bool) -> str:
    """Of the row of one step's time."""
    return f"{PREFIX}/step/{'separate terms' if separate else 'one penalty'}/{tasks} tasks"


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Final accuracies by task and times of a step."""
    for one in rows:
        if "history" in one["extra"]:
            final = "  ".join(f"{value:.4f}" for value in one["extra"]["history"][-1])
            print(f"{one['name']:<40}{one['median']:.4f}   by task: {final}")
        else:
            times = f"{one['median']:.3f}× ({one['p20']:.3f} to {one['p80']:.3f}) of a step without tasks"
            print(f"{one['name']:<40}{times}, {one['extra']['seconds'] * 1e3:.1f} ms")


def draw(rows: Sequence[dict[str, Any]], figure: Figure) -> None:
    """The report's three figures as panels: accuracy on each task, from its first epoch on."""
    runs = [one for one in rows if "history" in one["extra"]]
    figure.set_size_inches(4.5 * len(runs), 4)
    for one, axes in zip(runs, figure.subplots(1, len(runs), sharey=True, squeeze=False)[0], strict=True):
        history, epochs = one["extra"]["history"], one["extra"]["setup"]["epochs"]
        for k in range(len(history[-1])):
            later = history[k * epochs :]
            axes.plot(range(k * epochs + 1, len(history) + 1), [some[k] for some in later], label=f"task {k + 1}")
            if k:
                axes.axvline(k * epochs + 0.5, color="grey", linestyle=":")
        axes.set(title=one["name"].removeprefix(f"{PREFIX}/"), xlabel="epoch", ylabel="test accuracy", ylim=(0, 1))
        axes.legend(loc="lower left")


def own_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of this program."""
    parser.add_argument("--data-root", default=os.environ.get("FASTEWC_DATA"), help="folder with MNIST/raw")
    parser.add_argument("--download", action="store_true", help="fetch MNIST if it is not there")
    parser.add_argument("--seconds", type=float, default=1.0, help="for timing each kind of step")


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing and write it."""
    args, setup, results = begin_setup("cnn_report", __doc__, argv, Setup, own_arguments)
    todo = [way for way in WAYS if f"{PREFIX}/{way}" not in results]
    timed = time_name(setup.tasks, separate=True) in results
    if todo or not timed:
        mnist = load_mnist(args.data_root, download=args.download)
        mnist = first_samples(mnist, setup.train_samples, setup.test_samples)
        orders = pixel_orders(setup.tasks, mnist.train_x.shape[1], PERMUTATION_SEED)
        run_missing(todo, [as_images(mnist.permuted(one)) for one in orders], setup, results)
        if not timed:
            time_steps(as_images(mnist), setup, results, args.seconds)
    show(results.rows)
    print(f"written: {results.file}")
    return 0


def run_missing(todo: Sequence[str], tasks: Sequence[Split], setup: Setup, results: Results) -> None:
    """The ways that are not in the results yet."""
    from tqdm import tqdm

    interval = 0.5 if sys.stderr.isatty() else 60
    with tqdm(total=len(todo) * setup.tasks * setup.epochs, unit="epoch", mininterval=interval) as bar:
        for way in todo:
            begun = time.perf_counter()
            history = run_way(WAYS[way], tasks, setup, bar.update)
            results.add(
                f"{PREFIX}/{way}", unit="accuracy", value=sum(history[-1]) / len(history[-1]), history=history,
                gamma=WAYS[way], run_seconds=time.perf_counter() - begun,
            )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
