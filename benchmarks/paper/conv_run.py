"""One run of the papers' convolutional half: four tasks in a row, then a test on all of them.

Kutalev & Lapina (arXiv 2109.10021): convolutions of 64 (5×5), 128 and 256 (3×3) channels, each with BatchNorm and
LeakyReLU(0.01), one 2×2 max-pool after the first, then one linear layer. No padding: 28 → 24 → pooled 12 → 10 → 8, so
256·8·8 = 16,384 inputs to that layer. Tasks in this order: MNIST, FashionMNIST, MNIST rotated, FashionMNIST rotated,
by 90° counterclockwise. One Adam for the whole run; importances in eval mode, summed, with the latest anchor.

BatchNorm's running statistics are buffers, which no penalty protects. A run can freeze them after its first task, and
every run is tested twice: with the statistics that training left, and with each task's own.

Shapes: N images, S pixels a side.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import fastewc
from benchmarks.paper.mnist_tasks import Split
from benchmarks.paper.protocol import accuracy, measure_importance
from benchmarks.paper.stacked import save_state

#: What training does with BatchNorm's statistics.
NORMS = ("as-they-are", "frozen-after-first")


@dataclass(frozen=True)
class Setup:
    """The numbers of the protocol; the defaults are the published ones, ``statistics_samples`` is ours."""

    tasks: int = 4
    epochs: int = 6
    batch: int = 100
    lr: float = 1e-3
    channels: tuple[int, int, int] = (64, 128, 256)
    train_samples: int = 60_000  # the first of each task's training set
    importance_samples: int = 5_000  # the last of these
    statistics_samples: int = 10_000  # the first of these, for a task's own statistics

    def steps(self, samples: int) -> int:
        """Of one task with so many samples."""
        return self.epochs * -(-samples // self.batch)


@dataclass(frozen=True)
class Run:
    """One training: λ in this library's convention (½λ), and a seed of the initial weights and the samples' order."""

    importance: str  # "none", "fisher", "mas" or "si"
    variant: str
    ewc_lambda: float
    norm: str
    seed: int

    @property
    def curve(self) -> str:
        """All but the seed."""
        return f"conv/{self.importance}/{self.variant}/{self.ewc_lambda:g}/{self.norm}"

    @property
    def name(self) -> str:
        """Of the row in the results."""
        return f"{self.curve}/seed {self.seed}"


@dataclass(frozen=True)
class Outcome:
    """What one run gives: accuracies in 0..1 by task, and seconds.

    ``diverged``: in which task the weights became infinite, which ends the training; the accuracies are then those of
    outputs that are no numbers.
    """

    per_task: list[float]  # after the last task
    per_task_own_statistics: list[float]  # the same weights, each task with its own BatchNorm statistics
    when_learned: list[float]  # each task right after it was trained
    stats: dict[str, float]  # ewc.stats() at the end
    seconds: float
    importance_seconds: float
    diverged: int | None


def build_conv(side: int, channels: tuple[int, int, int], classes: int) -> nn.Sequential:
    """The network for images [N, 1, S, S], with torch's default initialisation."""
    first, second, third = channels
    left = (side - 4) // 2 - 4
    if left < 1:
        raise ValueError(f"images of {side}×{side} pixels are too small for the network: it needs 14×14 at least")

    def block(inputs: int, outputs: int, size: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, size), nn.BatchNorm2d(outputs), nn.LeakyReLU(0.01)]

    return nn.Sequential(
        *block(1, first, 5), nn.MaxPool2d(2), *block(first, second, 3), *block(second, third, 3), nn.Flatten(),
        nn.Linear(third * left * left, classes),
    )  # fmt: skip


def first_samples(data: Split, train: int, test: int | None = None) -> Split:
    """The same with at most so many training and test samples; None: all."""
    return Split(data.train_x[:train], data.train_y[:train], data.test_x[:test], data.test_y[:test])


def as_images(data: Split) -> Split:
    """Flat pictures as [N, 1, S, S]."""
    side = math.isqrt(data.train_x.shape[1])
    train_x, test_x = (x.view(-1, 1, side, side) for x in (data.train_x, data.test_x))
    return Split(train_x, data.train_y, test_x, data.test_y)


def task_of(sources: tuple[Split, Split], k: int) -> Split:
    """Task k of MNIST and FashionMNIST as images: both as they are, then both rotated by 90°, and so on."""
    data = sources[k % 2]
    train_x, test_x = (x.rot90(k // 2, (2, 3)) for x in (data.train_x, data.test_x))
    return Split(train_x, data.train_y, test_x, data.test_y)


def set_training(model: nn.Module, *, frozen_statistics: bool) -> None:
    """Training mode; with frozen statistics BatchNorm stays in eval mode, where it uses what it has and keeps it."""
    model.train()
    if frozen_statistics:
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eval()


@torch.no_grad()
def with_statistics_of(model: nn.Module, x: Tensor) -> nn.Module:
    """A copy with equal weights whose BatchNorm statistics are the means over all batches of x, in eval mode."""
    model = copy.deepcopy(model).eval()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None  # a plain mean, no moving one
            layer.train()
    for some in x.split(500):
        model(some)
    return model.eval()


def accuracy_in_parts(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of right answers, 0..1, in parts whose feature maps fit in a cache."""
    parts = zip(x.split(100), y.split(100), strict=True)
    return sum(accuracy(model, some, wanted) * len(wanted) for some, wanted in parts) / len(y)


def run_conv(
    run: Run,
    sources: tuple[Split, Split],
    setup: Setup,
    *,
    checkpoint: Path | None = None,
    after_step: Callable[[int], object] = lambda _: None,
) -> Outcome:
    """Train one freshly initialised network on all tasks in a row and test it on all of them.

    Args:
        run: protection, BatchNorm's statistics, seed.
        sources: MNIST and FashionMNIST as images.
        setup: the numbers of the protocol.
        checkpoint: a file that keeps the state after each task, and is removed at the end; a run goes on from it.
        after_step: called with the number of steps that were done, for a progress bar.

    Raises:
        ValueError: the checkpoint is of another run.
    """
    torch.manual_seed(run.seed)
    order = torch.Generator().manual_seed(10_000 + run.seed)
    data = sources[0]
    model = build_conv(data.train_x.shape[2], setup.channels, int(data.train_y.max()) + 1)
    with warnings.catch_warnings():  # the statistics that it warns of are what is studied
        warnings.filterwarnings("ignore", message="the model has .* BatchNorm layers", category=UserWarning)
        ewc = fastewc.EWC(model, ewc_lambda=run.ewc_lambda, variant=run.variant)
    path = "regularized" if run.importance == "si" else False  # as in the published script
    optimizer = fastewc.optim.Adam(model.named_parameters(), lr=setup.lr, ewc=ewc, path_integral=path)
    when_learned: list[float] = []
    first, spent, diverged = 0, {"all": 0.0, "importance": 0.0}, None
    identity = [asdict(run), {**asdict(setup), "channels": list(setup.channels)}]
    if checkpoint is not None and checkpoint.exists():
        kept = torch.load(checkpoint, weights_only=True)
        if kept["run"] != identity:
            raise ValueError(f"{checkpoint} is of {kept['run']}, not of {identity}; remove it to begin anew")
        model.load_state_dict(kept["model"])
        ewc.load_state_dict(kept["ewc"])
        optimizer.load_state_dict(kept["optimizer"])
        order.set_state(kept["order"])
        first, spent, when_learned = (kept[key] for key in ("tasks", "spent", "when_learned"))
        after_step(first * setup.steps(len(data.train_y)))

    for k in range(first, setup.tasks):
        begun = time.perf_counter()
        task = task_of(sources, k)
        set_training(model, frozen_statistics=run.norm == "frozen-after-first" and k > 0)
        _train(model, optimizer, task, setup, order, after_step)
        model.eval()
        when_learned.append(accuracy_in_parts(model, task.test_x, task.test_y))
        if not all(bool(p.isfinite().all()) for p in model.parameters()):
            diverged = k
            break
        if k < setup.tasks - 1 and run.importance != "none":
            paused = time.perf_counter()
            last = slice(-setup.importance_samples, None)
            if run.importance == "si":
                ewc.consolidate(fastewc.si_importance(optimizer, damping=0.1))
            else:
                ewc.consolidate(measure_importance(run.importance, model, task.train_x[last], task.train_y[last]))
            spent["importance"] += time.perf_counter() - paused
        spent["all"] += time.perf_counter() - begun
        if checkpoint is not None:
            save_state(checkpoint, {
                "run": identity, "model": model.state_dict(), "ewc": ewc.state_dict(),
                "optimizer": optimizer.state_dict(), "order": order.get_state(), "tasks": k + 1, "spent": spent,
                "when_learned": when_learned,
            })  # fmt: skip

    begun = time.perf_counter()
    per_task, own = [], []
    for k in range(setup.tasks):
        task = task_of(sources, k)
        per_task.append(accuracy_in_parts(model, task.test_x, task.test_y))
        refreshed = with_statistics_of(model, task.train_x[: setup.statistics_samples])
        own.append(accuracy_in_parts(refreshed, task.test_x, task.test_y))
    spent["all"] += time.perf_counter() - begun
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    stats = {} if diverged is not None else ewc.stats(optimizer)
    return Outcome(per_task, own, when_learned, stats, spent["all"], spent["importance"], diverged)


def _train(
    model: nn.Module, optimizer: torch.optim.Optimizer, task: Split, setup: Setup, order: torch.Generator,
    after_step: Callable[[int], object],
) -> None:  # fmt: skip
    for _ in range(setup.epochs):
        for index in torch.randperm(len(task.train_y), generator=order).split(setup.batch):
            loss = nn.functional.cross_entropy(model(task.train_x[index]), task.train_y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            after_step(1)
