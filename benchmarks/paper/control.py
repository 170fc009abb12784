"""The same protocol once more with torch alone: nothing of fastewc, nothing of ``protocol.py``.

    python -m benchmarks.paper.control --data-root PATH [--ewc-lambda 82 [--stabilized]] [--runs 3]

Where a row of ``permuted_mnist`` misses the paper's number, this decides whether our code differs from the protocol:
the penalty is an autograd term of the loss, importances a loop over single samples, the data comes from a shuffling
DataLoader, and one Adam lives through all runs, as in the published script.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.paper.mnist_tasks import PERMUTATION_SEED, load_mnist, pixel_orders
from benchmarks.results_row import ROOT, machine, row, write

LR, BATCH, EPOCHS, TASKS, LAST = 1e-3, 100, 6, 10, 5_000


def importance(kind: str, net: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """Fisher: the mean of (∂ log p(y|x))²; MAS: the mean of |∂ ‖softmax‖²|; one sample at a time."""
    total = [torch.zeros_like(p) for p in net.parameters()]
    for image, label in zip(x, y, strict=True):
        log_p = nn.functional.log_softmax(net(image[None]), dim=1)[0]
        value = log_p[label] if kind == "fisher" else (log_p.exp() ** 2).sum()
        for t, g in zip(total, torch.autograd.grad(value, list(net.parameters())), strict=True):
            t += g**2 if kind == "fisher" else g.abs()
    return [t / len(x) for t in total]


@dataclass
class Penalty:
    """½ Σ c(w − w*)², c = λΩ or λΩ/(1 + αλΩ), as a term of the loss."""

    ewc_lambda: float
    stabilized: bool
    omega: list[Tensor]
    star: list[Tensor]

    def __call__(self, net: nn.Module) -> Tensor:
        """The term for the present weights."""
        total = torch.zeros(())
        for p, omega, star in zip(net.parameters(), self.omega, self.star, strict=True):
            strength = self.ewc_lambda * omega
            if self.stabilized:
                strength = strength / (1 + LR * strength)
            total = total + 0.5 * (strength * (p - star) ** 2).sum()
        return total


def learn(
    net: nn.Module, adam: torch.optim.Optimizer, batches: Iterable[Sequence[Tensor]], penalty: Penalty | None
) -> None:
    """One step for each batch of images and labels."""
    for image, label in batches:
        loss = nn.functional.cross_entropy(net(image), label)
        if penalty is not None:
            loss = loss + penalty(net)
        adam.zero_grad()
        loss.backward()
        adam.step()


def consolidate(
    kind: str, net: nn.Module, x: Tensor, y: Tensor, ewc_lambda: float, stabilized: bool, penalty: Penalty | None
) -> Penalty:
    """The penalty after one more task: importances are summed, the anchor is where the network is now."""
    omega = importance(kind, net, x, y)
    if penalty is not None:
        omega = [old + new for old, new in zip(penalty.omega, omega, strict=True)]
    return Penalty(ewc_lambda, stabilized, omega, [p.detach().clone() for p in net.parameters()])


def main() -> None:
    """Run, print each accuracy, write all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", help="folder with MNIST/raw (default: FASTEWC_DATA)")
    parser.add_argument("--ewc-lambda", type=float, default=0.0, help="0 is no protection")
    parser.add_argument("--importance", choices=["fisher", "mas"], default="fisher")
    parser.add_argument("--stabilized", action="store_true")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--permutations", type=int, default=PERMUTATION_SEED)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / machine() / "control.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = load_mnist(args.data_root)
    orders = pixel_orders(TASKS, data.train_x.shape[1], args.permutations)
    torch.manual_seed(args.seed)
    layers = [nn.Linear(784, 300), nn.LeakyReLU(), nn.Linear(300, 150), nn.LeakyReLU(), nn.Linear(150, 10)]
    net = nn.Sequential(*layers)
    adam = torch.optim.Adam(net.parameters(), lr=LR)
    accuracies: list[float] = []
    for _ in range(args.runs):
        for layer in layers[::2]:
            layer.reset_parameters()
        penalty = None
        for task, order in enumerate(orders):
            x, y = data.train_x[:, order], data.train_y
            for _ in range(EPOCHS):
                learn(net, adam, DataLoader(TensorDataset(x, y), BATCH, shuffle=True), penalty)
            if args.ewc_lambda and task < TASKS - 1:
                penalty = consolidate(
                    args.importance, net, x[-LAST:], y[-LAST:], args.ewc_lambda, args.stabilized, penalty
                )
        with torch.no_grad():
            hits = [(net(data.test_x[:, order]).argmax(1) == data.test_y).double().mean().item() for order in orders]
        accuracies.append(sum(hits) / len(hits))
        print(f"run {len(accuracies) - 1}: {accuracies[-1]:.4f}", flush=True)
        name = f"control/{args.importance} lambda {args.ewc_lambda:g}{' stabilized' if args.stabilized else ''}"
        mean = sum(accuracies) / len(accuracies)
        write(
            args.out, [row("paper", name, value=mean, unit="accuracy", runs=accuracies, permutations=args.permutations)]
        )


if __name__ == "__main__":
    main()
