"""One run of the papers' protocol: a small MLP learns permuted MNIST, ten tasks in a row, and is tested on all.

The protocol of Kutalev & Lapina, "Stabilizing Elastic Weight Consolidation…" (arXiv 2109.10021): MLP 784-300-150-10
with LeakyReLU(0.01) and torch's default initialisation; one Adam, lr 1e-3, never reset between tasks; batch 100, 6
epochs a task; importances from the last 5,000 training samples of each task but the last, summed, with the latest
weights as anchor.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import fastewc
from benchmarks.paper.mnist_tasks import PERMUTATION_SEED, Split, pixel_orders


@dataclass(frozen=True)
class Protocol:
    """The numbers of the protocol; the defaults are the published ones."""

    tasks: int = 10
    epochs: int = 6
    batch: int = 100
    lr: float = 1e-3
    hidden: tuple[int, ...] = (300, 150)
    importance_samples: int = 5_000
    permutations: int = PERMUTATION_SEED  # the authors drew theirs without a seed and did not publish them


@dataclass(frozen=True)
class Row:
    """One line of the table: which protection, and what the authors' runs gave.

    ``ewc_lambda`` is in this library's convention (½λ): the authors' plain penalty has no ½, so their λ counts twice
    here; their stabilised λ is ours. ``reference`` is their mean, at the best λ over neighbouring λ as well (a single
    best point is best partly by luck), ``reference_sd`` the standard deviation over their 20 runs at this λ.
    """

    name: str
    importance: str | None  # "fisher", "mas" or None
    variant: str
    ewc_lambda: float
    reference: float
    reference_sd: float


ROWS = {
    row.name: row
    for row in (
        Row("unprotected", None, "plain", 0.0, 0.475, 0.018),
        Row("fisher-plain-82", "fisher", "plain", 82.0, 0.9494, 0.00328),
        Row("fisher-stabilized-85", "fisher", "stabilized", 85.0, 0.9502, 0.00233),
        Row("mas-stabilized-8.5", "mas", "stabilized", 8.5, 0.9548, 0.00192),
        Row("fisher-plain-20", "fisher", "plain", 20.0, 0.933, 0.00589),
    )
}


@dataclass(frozen=True)
class Outcome:
    """What one run gives: accuracies in 0..1, seconds, and Adam's state for the next run of a carried chain."""

    accuracy: float  # mean over all tasks' test sets after the last task
    per_task: list[float]  # the same, task by task
    when_learned: list[float]  # each task's own test accuracy right after it was trained
    seconds: float
    importance_seconds: float
    adam_state: dict[str, Any]


def build_mlp(pixels: int, hidden: tuple[int, ...], classes: int) -> nn.Sequential:
    """Linear layers with LeakyReLU(0.01) between them, torch's default initialisation."""
    widths = (pixels, *hidden, classes)
    layers: list[nn.Module] = []
    for wide, narrow in pairwise(widths):
        layers += [nn.Linear(wide, narrow), nn.LeakyReLU(0.01)]
    return nn.Sequential(*layers[:-1])


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of right answers, 0..1."""
    return float((model(x).argmax(1) == y).double().mean())


def measure_importance(kind: str, model: nn.Module, x: Tensor, y: Tensor) -> Mapping[str, Tensor]:
    """Fisher with the data set's labels, MAS on the softmax outputs, or SIG: what both papers use."""
    batches = list(zip(x.split(500), y.split(500), strict=True))
    if kind == "fisher":
        return fastewc.fisher_importance(model, batches, loss="categorical", labels="dataset")
    if kind == "signal":
        return fastewc.signal_importance(model, [(x,) for x, _ in batches])
    return fastewc.mas_importance(model, batches, output="softmax")


def train_task(
    model: nn.Module, optimizer: torch.optim.Optimizer, task: Split, protocol: Protocol, order: torch.Generator
) -> None:
    """``protocol.epochs`` passes over the training set, reshuffled each time."""
    model.train()
    for _ in range(protocol.epochs):
        for index in torch.randperm(len(task.train_y), generator=order).split(protocol.batch):
            loss = nn.functional.cross_entropy(model(task.train_x[index]), task.train_y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def run_once(
    row: Row,
    data: Split,
    *,
    seed: int,
    protocol: Protocol,
    adam_state: dict[str, Any] | None = None,
    after_task: Callable[[], None] = lambda: None,
    storage: Mapping[str, Any] | None = None,
) -> Outcome:
    """Train one freshly initialised network on all tasks in a row and test it on all of them.

    Args:
        row: the protection.
        data: MNIST as it is; the tasks are made from it.
        seed: of the initial weights and of the order of the samples. Equal seeds give equal starts in every row.
        protocol: the numbers of the protocol.
        adam_state: Adam's state dict at the end of another run, to go on from (moments and step); None: a new Adam.
        after_task: called after each task, for a progress bar.
        storage: arguments of :class:`fastewc.EWC` about how Ω and w* are kept; None: float32.
    """
    started = time.perf_counter()
    torch.manual_seed(seed)
    order = torch.Generator().manual_seed(10_000 + seed)
    model = build_mlp(data.train_x.shape[1], protocol.hidden, int(data.train_y.max()) + 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=protocol.lr, fused=True)
    if adam_state is not None:
        optimizer.load_state_dict(copy.deepcopy(adam_state))  # torch would go on in the same tensors
    ewc = None
    if row.importance is not None:
        ewc = fastewc.EWC(model, ewc_lambda=row.ewc_lambda, variant=row.variant, **(storage or {}))
        ewc.attach(optimizer)

    importance_seconds, when_learned = 0.0, []
    orders = pixel_orders(protocol.tasks, data.train_x.shape[1], protocol.permutations)
    for k, pixels in enumerate(orders):
        task = data.permuted(pixels)
        train_task(model, optimizer, task, protocol, order)
        model.eval()
        when_learned.append(accuracy(model, task.test_x, task.test_y))
        if ewc is not None and row.importance is not None and k < protocol.tasks - 1:
            paused = time.perf_counter()
            last = slice(-protocol.importance_samples, None)
            ewc.consolidate(measure_importance(row.importance, model, task.train_x[last], task.train_y[last]))
            importance_seconds += time.perf_counter() - paused
        after_task()

    per_task = [accuracy(model, data.test_x[:, pixels], data.test_y) for pixels in orders]
    return Outcome(
        accuracy=sum(per_task) / len(per_task),
        per_task=per_task,
        when_learned=when_learned,
        seconds=time.perf_counter() - started,
        importance_seconds=importance_seconds,
        adam_state=optimizer.state_dict(),
    )
