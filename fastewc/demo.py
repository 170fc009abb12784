"""``python -m fastewc demo``: one small network learns several tasks in a row, with and without protection.

The data are scikit-learn's digits, 1,797 real handwritten images of 8×8 pixels. Task 1 shows them as they are, every
further task with its own fixed shuffle of the pixels: same labels, nothing else in common. Without protection the
network forgets the first tasks while it learns the later ones; each method here holds on to them in its own way.

What to copy into your own code is :func:`train`: an :class:`fastewc.EWC`, an optimizer that knows it, and one call of
``consolidate`` after each task.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import fastewc
from fastewc import _dispatch

if TYPE_CHECKING:
    from tqdm import tqdm

LR, MOMENTUM, BATCH = 0.05, 0.9, 32
COLOURS = ("#2f4b9b", "#2a9d8f", "#e9a03b", "#d1495b", "#7b4fa3", "#5c677d", "#8ab17d", "#b56576")

Batches = list[tuple[Tensor, Tensor]]  # x [N, 64] float32, y [N] int64


@dataclass(frozen=True)
class Task:
    """One shuffle of the pixels: images x [N, 64] in 0..1 and labels y [N]."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


@dataclass(frozen=True)
class Method:
    """A way to protect what was learned: which importance, which penalty, how strong."""

    name: str
    variant: str = "stabilized"
    ewc_lambda: float = 0.0
    importance: Callable[[nn.Module, Any, Batches], fastewc.Importance] | None = None
    path_integral: bool = False


def _uniform(model: nn.Module, optimizer: fastewc.optim.SGD, batches: Batches) -> fastewc.Importance:
    return fastewc.uniform_importance(model)


def _fisher(model: nn.Module, optimizer: fastewc.optim.SGD, batches: Batches) -> fastewc.Importance:
    return fastewc.fisher_importance(model, batches)


def _mas(model: nn.Module, optimizer: fastewc.optim.SGD, batches: Batches) -> fastewc.Importance:
    return fastewc.mas_importance(model, batches, output="softmax")


def _si(model: nn.Module, optimizer: fastewc.optim.SGD, batches: Batches) -> fastewc.Importance:
    return fastewc.si_importance(optimizer)  # the optimizer has kept the path integral while it trained


# Each λ comes from a search of its own on seeds 1 and 2, about three values per decade, by mean accuracy: λ means
# something different for every importance and every variant, so equal numbers would not be a fair comparison.
METHODS = (
    Method("no protection"),
    Method("L2", "plain", 0.03, _uniform),
    Method("EWC plain", "plain", 200.0, _fisher),  # near the top of its range: at 500 it diverges
    Method("EWC stabilised", "stabilized", 300.0, _fisher),
    Method("EWC proximal", "proximal", 3_000.0, _fisher),
    Method("MAS", "stabilized", 30.0, _mas),
    Method("SI", "stabilized", 3.0, _si, path_integral=True),
)


@dataclass
class Result:
    """What one method reached. Accuracies in 0..1."""

    method: Method
    curves: list[list[float]]  # [task][epoch over all tasks]; NaN before the task was first trained
    epochs: int
    steps: int = 0
    step_seconds: float = 0.0  # the whole training loop
    passes: int = 0
    pass_seconds: float = 0.0  # all importances together
    final: list[float] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """Mean accuracy over all tasks at the end."""
        return sum(self.final) / len(self.final)

    @property
    def forgetting(self) -> float:
        """How much accuracy was lost since each task was learned: mean over all tasks but the last."""
        learned = [curve[(k + 1) * self.epochs - 1] for k, curve in enumerate(self.curves)]
        lost = [then - now for then, now in zip(learned[:-1], self.final[:-1], strict=True)]
        return sum(lost) / len(lost)


def require_extras() -> None:
    """ImportError, before any work is done, if a package that the demo needs is missing."""
    for module, package in (("sklearn", "scikit-learn"), ("matplotlib", "matplotlib"), ("tqdm", "tqdm")):
        if importlib.util.find_spec(module) is None:
            raise ImportError(f"the demo needs {package}: pip install 'fastewc[demo]'")


def load_tasks(count: int, seed: int) -> list[Task]:
    """The digits, a quarter of them held out for testing; task 1 as they are, the others with shuffled pixels."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images / 16, labels, test_size=0.25, random_state=seed, stratify=labels)
    train_x, test_x = (torch.tensor(part, dtype=torch.float32) for part in split[:2])
    train_y, test_y = (torch.tensor(part) for part in split[2:])
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.arange(64)] + [torch.randperm(64, generator=generator) for _ in range(count - 1)]
    return [Task(train_x[:, order], train_y, test_x[:, order], test_y) for order in orders]


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of right answers, 0..1."""
    return float((model(x).argmax(1) == y).double().mean())


def train(method: Method, tasks: Sequence[Task], *, epochs: int, seed: int, bar: tqdm[Any]) -> Result:
    """Train one network on all tasks in a row, protected by ``method``."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer: torch.optim.Optimizer
    if method.importance is None:
        ewc = None
        optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    else:
        ewc = fastewc.EWC(model, ewc_lambda=method.ewc_lambda, variant=method.variant)
        optimizer = fastewc.optim.SGD(
            model.parameters(), lr=LR, momentum=MOMENTUM, ewc=ewc, path_integral=method.path_integral
        )

    result = Result(method, [[] for _ in tasks], epochs)
    for k, task in enumerate(tasks):
        for _ in range(epochs):
            model.train()
            started = time.perf_counter()
            for index in torch.split(torch.randperm(len(task.train_y)), BATCH):
                loss = nn.functional.cross_entropy(model(task.train_x[index]), task.train_y[index])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()  # the penalty is part of the step
                result.steps += 1
            result.step_seconds += time.perf_counter() - started
            model.eval()
            for j, seen in enumerate(tasks):
                result.curves[j].append(accuracy(model, seen.test_x, seen.test_y) if j <= k else math.nan)
            bar.update()
        if ewc is not None and method.importance is not None and k < len(tasks) - 1:
            started = time.perf_counter()
            batches = list(zip(torch.split(task.train_x, 256), torch.split(task.train_y, 256), strict=True))
            ewc.consolidate(method.importance(model, optimizer, batches))  # remember this task from here on
            result.pass_seconds += time.perf_counter() - started
            result.passes += 1
    result.final = [curve[-1] for curve in result.curves]
    return result


def run(methods: Sequence[Method], *, tasks: int, epochs: int, seed: int) -> list[Result]:
    """All methods on the same tasks, from the same initial weights, with a progress bar."""
    from tqdm import tqdm

    data = load_tasks(tasks, seed)
    results = []
    for op in _dispatch.OPS:  # what has to be compiled first is compiled before the bar, which it would disturb
        _dispatch.choose(op, "auto", torch.device("cpu"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices this small only lose by being shared between cores
    try:
        with torch.random.fork_rng(devices=[]), tqdm(total=len(methods) * tasks * epochs, unit="epoch") as bar:
            for method in methods:
                bar.set_description(method.name)
                results.append(train(method, data, epochs=epochs, seed=seed, bar=bar))
    finally:
        torch.set_num_threads(threads)
    return results


def format_table(results: Sequence[Result]) -> str:
    """Accuracy of each task at the end, mean, forgetting (all in %), and what the protection cost.

    Costs are against the first result: a step as a multiple of its step, an importance pass as a multiple of the time
    it needs for one epoch over the same samples.
    """
    base = results[0]
    base_step = base.step_seconds / base.steps
    base_epoch = base.step_seconds / (base.epochs * len(base.final))
    names = "".join(f"{f'task {k}':>8}" for k in range(1, len(base.final) + 1))
    head = f"{'':<16}{names}{'mean':>8}{'forgot':>8}{'step':>9}{'importance':>22}"
    lines = [head, "-" * len(head)]
    for r in results:
        accuracies = "".join(f"{100 * a:>8.1f}" for a in (*r.final, r.mean, r.forgetting))
        cost = f"{r.step_seconds / r.steps / base_step:>8.2f}×"
        if r.passes:
            seconds = r.pass_seconds / r.passes
            cost += f"{1e3 * seconds:>11.1f} ms{seconds / base_epoch:>7.2f}×"
        lines.append(f"{r.method.name:<16}{accuracies}{cost}")
    lines.append(
        f"accuracies in %; step: × the unprotected {1e6 * base_step:.0f} µs; importance, once a task: × an "
        f"unprotected epoch of {1e3 * base_epoch:.0f} ms"
    )
    return "\n".join(lines)


def draw(results: Sequence[Result], path: Path) -> None:
    """One panel per method: the accuracy of every task while the network goes through all of them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count, epochs = len(results[0].final), results[0].epochs
    columns = 4
    rows = math.ceil((len(results) + 1) / columns)  # one place more than panels: the legend lives there
    figure = Figure(figsize=(3.3 * columns, 2.7 * rows + 0.7), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    places = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    panels, rest = places[: len(results)], places[len(results) :]
    for panel, r in zip(panels, results, strict=True):
        for k, curve in enumerate(r.curves):
            colour = COLOURS[k % len(COLOURS)]
            epoch = range(k * epochs + 1, count * epochs + 1)
            panel.plot(epoch, [100 * a for a in curve[k * epochs :]], color=colour, lw=1.8, label=f"task {k + 1}")
            panel.axvspan(k * epochs, (k + 1) * epochs, color=colour, alpha=0.08, lw=0)
        panel.set_title(r.method.name, loc="left", fontsize=11, fontweight="bold")
        panel.set_title(f"mean {100 * r.mean:.1f} %", loc="right", fontsize=10, color="#555555")
        panel.set(xlim=(0, count * epochs), ylim=(0, 102))
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#dddddd", lw=0.6)
        panel.tick_params(length=0, labelsize=9)
    for panel in rest:
        panel.set_axis_off()
    lines, names = panels[0].get_legend_handles_labels()
    rest[-1].legend(
        lines,
        names,
        loc="center",
        frameon=False,
        fontsize=11,
        title="accuracy on the test images of\n(shaded: while it is trained)",
        title_fontsize=10,
    )
    figure.supxlabel("epochs, all tasks in a row", fontsize=10)
    figure.supylabel("test accuracy, %", fontsize=10)
    figure.savefig(path)


def main(argv: list[str] | None = None) -> int:
    """Run the demo: train, print the table, write the picture. Returns 0."""
    parser = argparse.ArgumentParser(prog="python -m fastewc demo", description="forgetting, and what holds it off")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the shuffles and the weights (default 0)")
    parser.add_argument("--tasks", type=int, help="tasks in a row (default 5)")
    parser.add_argument("--epochs", type=int, help="epochs per task (default 8)")
    parser.add_argument("--out", type=Path, default=Path("fastewc_demo.png"), help="the picture (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="two tasks of two epochs: too short to forget much")
    args = parser.parse_args(argv)
    tasks = args.tasks if args.tasks is not None else 2 if args.quick else 5
    epochs = args.epochs if args.epochs is not None else 2 if args.quick else 8
    if tasks < 2 or epochs < 1:
        parser.error(f"forgetting needs at least 2 tasks and 1 epoch, got --tasks {tasks} --epochs {epochs}")

    if not args.out.absolute().parent.is_dir():
        parser.error(f"--out {args.out}: that folder does not exist")

    require_extras()
    results = run(METHODS, tasks=tasks, epochs=epochs, seed=args.seed)
    print(format_table(results))
    draw(results, args.out)
    print(f"picture: {args.out}")
    return 0
