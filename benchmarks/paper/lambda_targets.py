"""At which αλΩ does each penalty work best? The table behind ``fastewc.suggest_lambda(target=None)``.

    python -m benchmarks.paper.lambda_targets [--seeds 2] [--jobs 2]

Five permuted-digits tasks in a row (as in ``python -m fastewc demo``), Fisher importances, a grid of αλΩ at the
0.99-quantile of the first task's Ω > 0, for each penalty and optimizer: mean accuracy over all tasks at the end. λ is
fixed after the first task, as a user of suggest_lambda would fix it. The target is the centre (geometric mean) of the
grid points within one point of the best: the middle of the plateau rather than its luckiest point.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import nn

import fastewc
from benchmarks.results_row import ROOT, machine, row, write
from fastewc.demo import accuracy, load_tasks

TARGETS = [10.0 ** (k / 2) for k in range(-6, 7)]  # αλΩ from 1e-3 to 1e3
VARIANTS = ("plain", "stabilized", "proximal", "wva")
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda parameters, ewc: fastewc.optim.SGD(parameters, lr=0.2, ewc=ewc),
    "momentum": lambda parameters, ewc: fastewc.optim.SGD(parameters, lr=0.05, momentum=0.9, ewc=ewc),
    "adam": lambda parameters, ewc: fastewc.optim.Adam(parameters, lr=1e-3, ewc=ewc),
}
TASKS, EPOCHS, BATCH = 5, 8, 32


def run(variant: str, family: str, target: float, seed: int) -> float:
    """Mean accuracy over all tasks after the last one, 0..1; 0.1 (chance) where training diverged."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    tasks = load_tasks(TASKS, seed)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    ewc = fastewc.EWC(model, ewc_lambda=0.0, variant=variant)
    optimizer = OPTIMIZERS[family](model.parameters(), ewc)
    for k, task in enumerate(tasks):
        for _ in range(EPOCHS):
            for index in torch.randperm(len(task.train_y)).split(BATCH):
                loss = nn.functional.cross_entropy(model(task.train_x[index]), task.train_y[index])
                if not math.isfinite(loss.item()):
                    return 0.1
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        if k < TASKS - 1:
            batches = list(zip(task.train_x.split(256), task.train_y.split(256), strict=True))
            importance = fastewc.fisher_importance(model, batches, max_samples=500)
            if k == 0:
                lr = optimizer.param_groups[0]["lr"]
                ewc.ewc_lambda = fastewc.suggest_lambda(
                    importance, lr, variant=variant, optimizer=optimizer, target=target
                )
            ewc.consolidate(importance)
    return sum(accuracy(model, task.test_x, task.test_y) for task in tasks) / TASKS


def plateau(means: dict[float, float]) -> float:
    """The geometric centre of the targets whose accuracy is within 0.01 of the best."""
    best = max(means.values())
    near = [target for target, mean in means.items() if mean >= best - 0.01]
    return math.exp(sum(map(math.log, near)) / len(near))


def main() -> None:
    """Run the grid, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / machine() / "lambda_targets.json")
    args = parser.parse_args()
    rows = []
    with ProcessPoolExecutor(args.jobs) as pool:
        for family in OPTIMIZERS:
            for variant in VARIANTS:
                runs = {t: [pool.submit(run, variant, family, t, seed) for seed in range(args.seeds)] for t in TARGETS}
                means = {t: sum(f.result() for f in futures) / args.seeds for t, futures in runs.items()}
                best = plateau(means)
                curve = " ".join(f"{t:g}:{100 * mean:.1f}" for t, mean in means.items())
                print(f"{family:<9}{variant:<11} target {best:8.3g}   {curve}", flush=True)
                name = f"lambda_targets/{variant}/{family}"
                grid = {f"{t:g}": mean for t, mean in means.items()}
                rows.append(row("paper", name, value=best, unit="αλΩ", accuracy=grid, seeds=args.seeds))
    write(args.out, rows)
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
