"""What the paper says of its stabilised penalty and does not measure.

    python -m benchmarks.paper.claims --data-root PATH [--experiment explosion clipping schedule] [--seeds 3]

Kutalev & Lapina (arXiv 2109.10021, §2) argue that the plain penalty makes gradients explode where αλΩ is large, that
clipping them makes the network forget or stop learning, and that a bounded penalty needs neither. On their network and
tasks (the first four, two epochs each):

- *explosion*: SGD and SGD with momentum over λ, up to αλΩ far above 2, where a quadratic penalty diverges.
- *clipping*: the gradient's norm bounded, of task and penalty together (as they do it) or of the task alone.
- *schedule*: a learning rate that falls to 0 within each task, the penalty's α with it or not.

α is the learning rate, Ω the Fisher diagonal, summed over tasks. Results are written after each part; the command,
repeated, does what is missing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from matplotlib.figure import Figure

from benchmarks.paper.command_line import begin
from benchmarks.paper.protocol import Protocol
from benchmarks.paper.stacked import Method, Network, Training, run_stack
from benchmarks.results_row import row, student_half_width, write

SHORT = Protocol(tasks=4, epochs=2)
VARIANTS = ("plain", "stabilized", "proximal", "wva")
RATES = {"sgd": 0.1, "momentum": 0.02, "adam": 1e-3}
WIDE = (1e1, 1e2, 1e3, 1e4, 1e5, 1e6)
USEFUL = (1e1, 1e2, 1e3, 1e4)
NORMS = (0.03, 0.1, 0.3, 1.0)


@dataclass(frozen=True)
class Part:
    """What one stack answers: a penalty under one way of training, over λ."""

    experiment: str
    variant: str
    training: Training
    lambdas: Sequence[float]

    def name(self, ewc_lambda: float) -> str:
        """Of the row in the results."""
        how = [self.training.optimizer]
        if self.training.clip is not None:
            how.append(f"clip {'sum' if self.training.clip_sum else 'task'} {self.training.clip:g}")
        if self.training.cosine:
            how.append(f"cosine, {'fixed' if self.training.fixed_alpha else 'live'} alpha")
        return "/".join(["claims", self.experiment, self.variant, *how, f"{ewc_lambda:g}"])


def parts(experiment: str) -> Iterator[Part]:
    """The stacks of an experiment."""
    if experiment == "explosion":
        for optimizer in ("sgd", "momentum"):
            for variant in VARIANTS:
                yield Part(experiment, variant, Training(optimizer), WIDE)  # type: ignore[arg-type]
    elif experiment == "clipping":
        for variant in ("plain", "stabilized"):
            yield Part(experiment, variant, Training("momentum"), USEFUL)
            for norm in NORMS:
                for clip_sum in (True, False):
                    yield Part(experiment, variant, Training("momentum", clip=norm, clip_sum=clip_sum), USEFUL)
    else:
        for optimizer in ("momentum", "adam"):
            for fixed in (False, True):
                training = Training(optimizer, cosine=True, fixed_alpha=fixed)  # type: ignore[arg-type]
                yield Part(experiment, "stabilized", training, USEFUL if optimizer == "momentum" else USEFUL[:3])


def rows_of(part: Part, networks: Sequence[Network], outcome: Any, protocol: Protocol) -> Iterator[dict[str, Any]]:
    """A row for each λ."""
    for ewc_lambda in part.lambdas:
        own = [s for s, one in enumerate(networks) if one.ewc_lambda == ewc_lambda]
        values = [sum(outcome.per_task[s]) / len(outcome.per_task[s]) for s in own]
        yield row(
            "paper", part.name(ewc_lambda), value=sum(values) / len(values), unit="accuracy", runs=values,
            half_width_95=student_half_width(values), variant=part.variant, training=asdict(part.training),
            ewc_lambda=ewc_lambda, diverged=[outcome.diverged[s] for s in own],
            first_task=[outcome.per_task[s][0] for s in own], last_task=[outcome.per_task[s][-1] for s in own],
            largest_alpha_lambda_omega=[outcome.stiffest[s] for s in own], protocol=asdict(protocol),
            seconds=outcome.seconds,
        )  # fmt: skip


def draw(rows: Sequence[dict[str, Any]], figure: Figure) -> None:
    """Accuracy over αλΩ (explosion) and over λ (the others), a panel for each optimizer or penalty."""
    panels: dict[tuple[str, ...], dict[str, list[tuple[float, float]]]] = {}
    for one in rows:
        _, experiment, variant, optimizer, *how, _ = one["name"].split("/")
        extra = one["extra"]
        if experiment == "explosion":
            panel, line, x = (experiment, optimizer), variant, max(extra["largest_alpha_lambda_omega"])
        elif experiment == "clipping":
            panel, line, x = (experiment, variant), how[0] if how else "no clipping", extra["ewc_lambda"]
        else:
            panel, line, x = (experiment, optimizer), how[0], extra["ewc_lambda"]
        panels.setdefault(panel, {}).setdefault(line, []).append((x, one["median"]))
    figure.set_size_inches(5 * len(panels), 4.5)
    for axes, (panel, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        xlabel = "largest αλΩ" if panel[0] == "explosion" else "ewc_lambda"
        axes.set(title=", ".join(panel), xlabel=xlabel, ylabel="accuracy", xscale="log", ylim=(0, 1))
        axes.grid(alpha=0.3)
        for line, points in lines.items():
            axes.plot(*zip(*sorted(points), strict=True), "o-", label=line)
        if panel[0] == "explosion":
            axes.axvline(2 if panel[1] == "sgd" else 3.8, color="k", ls=":")
        axes.legend(fontsize="small")


def own_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of this program."""
    experiments = ("explosion", "clipping", "schedule")
    parser.add_argument("--experiment", nargs="+", default=list(experiments), choices=experiments)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing and write it."""
    args, short, data = begin("claims", __doc__, argv, published=SHORT, seeds=3, more=own_arguments)
    rows = json.loads(args.out.read_text()) if args.out.exists() else []
    finished = {one["name"] for one in rows}
    for part in (part for experiment in args.experiment for part in parts(experiment)):
        if all(part.name(ewc_lambda) in finished for ewc_lambda in part.lambdas):
            continue
        protocol = replace(short, lr=RATES[part.training.optimizer])
        networks = [Network(ewc_lambda, seed) for ewc_lambda in part.lambdas for seed in range(args.seeds)]
        outcome = run_stack(Method("fisher", part.variant), networks, data, protocol=protocol, training=part.training)
        for one in rows_of(part, networks, outcome, protocol):
            rows.append(one)
            lost = sum(task is not None for task in one["extra"]["diverged"])
            most = max(one["extra"]["largest_alpha_lambda_omega"])
            print(f"{one['name']:<60}{one['median']:.4f}  {lost} diverged  αλΩ up to {most:.3g}", flush=True)
        write(args.out, rows)
    print(f"written: {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
