"""How alike the importances are: their correlations, layer by layer and task by task.

    python -m benchmarks.paper.correlation --data-root PATH [--download] [--seeds 3] [--threads 1]

After Kutalev, "Correlation of the importances of neural network weights calculated by modern methods of overcoming
catastrophic forgetting" (arXiv 2211.17012). A network learns the ten permuted-MNIST tasks of ``protocol.py`` in a row,
protected by the stabilised penalty with Fisher importances. After each task, the last too, Fisher, MAS (on the
softmax) and SIG come from its last 5,000 training samples and SI from the path of this task alone, of the task
gradient. Each weight matrix then gives Pearson's and Spearman's correlation of its importances, biases left out.

Shapes: S networks, O outputs, I inputs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

import fastewc
from benchmarks.paper.command_line import begin
from benchmarks.paper.mnist_tasks import Split, pixel_orders
from benchmarks.paper.protocol import ROWS, Protocol
from benchmarks.paper.stacked import accuracies_of, initial_stack, measure_stack, sample_orders, train_stack
from benchmarks.results_row import row, write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROTECTION = ROWS["fisher-stabilized-85"]
#: MAS² is MAS squared weight by weight, so it has the ranks of MAS.
PAIRS = (
    ("fisher", "mas"), ("fisher", "mas²"), ("fisher", "si"), ("fisher", "signal"), ("mas", "si"), ("mas", "signal"),
    ("si", "signal"),
)  # fmt: skip
COEFFICIENTS = ("pearson", "spearman")
Correlations = dict[tuple[str, str, str], float]  # by coefficient and pair


def correlations(importances: Mapping[str, Tensor]) -> Correlations:
    """Both coefficients of all pairs, for the importances "fisher", "mas", "si" and "signal" of one weight matrix.

    Raises:
        ValueError: an importance is the same everywhere, so that it correlates with nothing.
    """
    from scipy.stats import rankdata

    values = {name: one.detach().flatten().double().numpy() for name, one in importances.items()}
    values["mas²"] = values["mas"] ** 2
    for name, one in values.items():
        if one.min() == one.max():
            raise ValueError(f"the importance {name} of {one.size} weights is {one[0]} everywhere: no correlation")
    found: Correlations = {}
    for coefficient in COEFFICIENTS:
        matrix = np.corrcoef([one if coefficient == "pearson" else rankdata(one) for one in values.values()])
        place = {name: i for i, name in enumerate(values)}
        for a, b in PAIRS:
            found[coefficient, a, b] = float(matrix[place[a], place[b]])
    return found


def run(seeds: Sequence[int], data: Split, protocol: Protocol) -> tuple[list[list[list[Correlations]]], float]:
    """Train on all tasks in a row: correlations [task][layer][S], and the mean accuracy over all tasks at the end."""
    model = initial_stack(seeds, data, protocol)
    ewc = fastewc.EWC(model, ewc_lambda=PROTECTION.ewc_lambda, variant=PROTECTION.variant)
    optimizer = fastewc.optim.Adam(model.named_parameters(), lr=protocol.lr, ewc=ewc, path_integral=True)
    generators, found = sample_orders(seeds), []
    orders = pixel_orders(protocol.tasks, data.train_x.shape[1], protocol.permutations)
    for k, pixels in enumerate(orders):
        begun, task = time.perf_counter(), data.permuted(pixels)
        train_stack(model, optimizer, task, protocol, generators)
        measured: dict[str, Mapping[str, Tensor]] = {
            kind: measure_stack(kind, model, task, protocol) for kind in ("fisher", "mas", "signal")
        }
        measured["si"] = fastewc.si_importance(optimizer, damping=0.1)  # and begin a new path
        found.append([
            [correlations({kind: one[f"weights.{i}"][s] for kind, one in measured.items()}) for s in range(len(seeds))]
            for i in range(len(model.weights))
        ])  # fmt: skip
        ewc.consolidate(measured["fisher"])
        print(f"task {k + 1} of {protocol.tasks}: {time.perf_counter() - begun:.0f} s", flush=True)
    accuracies = [accuracies_of(model, data.test_x[:, pixels], data.test_y).mean().item() for pixels in orders]
    return found, sum(accuracies) / len(accuracies)


def results(
    found: Sequence[Sequence[Sequence[Correlations]]], accuracy: float, protocol: Protocol, seconds: float
) -> list[dict[str, Any]]:
    """A row for each coefficient, pair and layer: its mean over tasks and seeds, and in ``extra`` each task's."""
    rows, layers, seeds = [], len(found[0]), len(found[0][0])
    for coefficient in COEFFICIENTS:
        for pair in PAIRS:
            for i in range(layers):
                runs = [[task[i][s][(coefficient, *pair)] for task in found] for s in range(seeds)]
                tasks = [sum(one) / seeds for one in zip(*runs, strict=True)]
                rows.append(
                    row(
                        "paper", f"correlation/{coefficient}/{'-'.join(pair)}/layer {i + 1}",
                        value=sum(tasks) / len(tasks), unit="correlation", coefficient=coefficient,
                        pair=list(pair), layer=i + 1, tasks=tasks, runs=runs, protection=asdict(PROTECTION),
                        accuracy=accuracy, protocol=asdict(protocol), seconds=seconds,
                    )
                )  # fmt: skip
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The mean over tasks of each layer, and in brackets the lowest and the highest task."""
    lines = []
    for coefficient in COEFFICIENTS:
        lines.append(coefficient)
        for pair in PAIRS:
            cells = ""
            for one in rows:
                if one["extra"]["coefficient"] == coefficient and one["extra"]["pair"] == list(pair):
                    tasks = one["extra"]["tasks"]
                    cells += f"{one['median']:>8.2f} ({min(tasks):.2f} to {max(tasks):.2f})"
            lines.append(f"  {'-'.join(pair):<14}{cells}")
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, Any]], figure: Figure) -> None:
    """Correlation over the tasks: a line for each pair, a column for each layer, a row for each coefficient."""
    layers = max(one["extra"]["layer"] for one in rows)
    figure.set_size_inches(4.5 * layers, 8)
    panels = figure.subplots(len(COEFFICIENTS), layers, sharex=True, sharey=True, squeeze=False)
    for one in rows:
        extra = one["extra"]
        axes = panels[COEFFICIENTS.index(extra["coefficient"])][extra["layer"] - 1]
        axes.plot(range(1, len(extra["tasks"]) + 1), extra["tasks"], "o-", label="–".join(extra["pair"]), markersize=3)
        axes.set_title(f"{extra['coefficient']}, layer {extra['layer']}")
        axes.grid(alpha=0.3)
    for axes in panels[-1]:
        axes.set_xlabel("task")
    panels[0][-1].legend(fontsize="small", loc="center")


def main(argv: Sequence[str] | None = None) -> int:
    """Train, correlate after each task, print a table, write the JSON."""
    args, protocol, data = begin("correlation", __doc__, argv, published=Protocol(), seeds=3, least_seeds=2)
    begun = time.perf_counter()
    found, accuracy = run(range(args.seeds), data, protocol)
    rows = results(found, accuracy, protocol, time.perf_counter() - begun)
    print(table(rows))
    print(f"accuracy over all tasks after the last: {accuracy:.4f}")
    write(args.out, rows)
    print(f"written: {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
