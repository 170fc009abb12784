"""The fully connected half of the papers' tables and figures: accuracy over λ, for every importance and penalty.

    python -m benchmarks.paper.fc --data-root PATH [--importance fisher mas si signal]
        [--variant plain stabilized proximal wva] [--lambdas 42.5 85 170] [--seeds 20] [--adam fresh carried]

The protocol of ``protocol.py``; networks that differ in seed and λ are trained as one program (``stacked.py``),
``--stack`` at a time. λ is this library's (½λ): the authors' plain λ, twice; without ``--lambdas`` the authors' best
one and its neighbours. Two ways to begin: *fresh*, a new Adam, and *carried*, as in the published script: each network
begins with the moments that Adam had at the end of the fresh run of another seed.

Finished stacks are in the results file, which is written after each; the command, repeated, does what is missing, and
goes on after the last finished task of a stack that was interrupted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.paper.authors import curves
from benchmarks.paper.command_line import begin
from benchmarks.paper.mnist_tasks import Split
from benchmarks.paper.protocol import Protocol
from benchmarks.paper.stacked import Method, Moments, Network, StackOutcome, run_stack
from benchmarks.results_row import row, student_half_width, write

#: The authors' best λ in this library's convention, by importance: of the plain and of the stabilised penalty (which
#: they have not run with SIG).
BEST = {"fisher": (82.0, 85.0), "mas": (9.0, 8.5), "si": (0.5, 0.64), "signal": (0.2, 0.2)}
AROUND = (0.25, 0.5, 1.0, 2.0, 4.0)


def lambdas_of(method: Method) -> list[float]:
    """The authors' best λ and its neighbours."""
    plain, stabilized = BEST[method.importance]
    return [factor * (plain if method.variant == "plain" else stabilized) for factor in AROUND]


class Results:
    """The rows of a results file by what was run; written whole after each addition.

    Raises:
        ValueError: the file holds runs of another protocol.
    """

    def __init__(self, file: Path, protocol: Protocol) -> None:
        self.file, self._protocol = file, json.loads(json.dumps(asdict(protocol)))
        self.rows: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
        other = next((one for one in self.rows if one["extra"]["protocol"] != self._protocol), None)
        if other is not None:
            raise ValueError(
                f"{file} holds runs of {other['extra']['protocol']}, not {self._protocol}; give another --out"
            )

    def accuracies(self, method: Method, ewc_lambda: float, adam: str) -> dict[int, float]:
        """Of the finished runs, by seed."""
        found = next((one for one in self.rows if one["name"] == _name(method, ewc_lambda, adam)), None)
        return {} if found is None else {int(seed): one for seed, one in found["extra"]["runs"].items()}

    def add(self, method: Method, adam: str, networks: Sequence[Network], outcome: StackOutcome) -> None:
        """Put a stack's accuracies to those that are there."""
        for ewc_lambda in dict.fromkeys(one.ewc_lambda for one in networks):
            runs = self.accuracies(method, ewc_lambda, adam)
            for one, accuracies in zip(networks, outcome.per_task, strict=True):
                if one.ewc_lambda == ewc_lambda:
                    runs[one.seed] = sum(accuracies) / len(accuracies)
            values, name = list(runs.values()), _name(method, ewc_lambda, adam)
            self.rows = [one for one in self.rows if one["name"] != name]
            self.rows.append(
                row(
                    "paper", name, value=sum(values) / len(values), unit="accuracy", method=asdict(method), adam=adam,
                    ewc_lambda=ewc_lambda, runs=dict(sorted(runs.items())), half_width_95=student_half_width(values),
                    protocol=self._protocol, stack=len(networks), seconds=outcome.seconds,
                    importance_seconds=outcome.importance_seconds,
                )
            )  # fmt: skip
        write(self.file, self.rows)


def _name(method: Method, ewc_lambda: float, adam: str) -> str:
    return f"fc/{method.importance}/{method.variant}/{ewc_lambda:g}/{adam}"


def missing(results: Results, method: Method, lambdas: Sequence[float], seeds: int, adam: str) -> list[Network]:
    """The networks still to train."""
    return [
        Network(ewc_lambda, seed)
        for ewc_lambda in lambdas
        for seed in range(seeds)
        if seed not in results.accuracies(method, ewc_lambda, adam)
    ]


def stacks(networks: Sequence[Network], size: int) -> Iterator[list[Network]]:
    """As many at a time as one program trains, in parts of about one size."""
    count = -(-len(networks) // size)
    for i in range(count):
        yield list(networks[len(networks) * i // count : len(networks) * (i + 1) // count])


def carried_on(file: Path, device: torch.device) -> Moments:
    """The moments of a fresh stack, each network's those of the one before.

    Raises:
        FileNotFoundError: the fresh runs were not made here.
    """
    if not file.exists():
        raise FileNotFoundError(
            f"carried runs begin with the moments of fresh ones, and {file} is missing: run those first"
        )
    kept: Moments = torch.load(file, weights_only=True, map_location=device)
    return {
        i: {key: value.roll(1, 0) if value.ndim else value for key, value in one.items()} for i, one in kept.items()
    }


def run_method(
    method: Method,
    lambdas: Sequence[float],
    args: argparse.Namespace,
    protocol: Protocol,
    data: Split,
    results: Results,
) -> None:
    """Everything of one method that is not in the results yet."""
    from tqdm import tqdm

    for adam in args.adam:
        for networks in stacks(missing(results, method, lambdas, args.seeds, adam), args.stack):
            label = (
                f"{method.importance}-{method.variant}-{networks[0].ewc_lambda:g}-{networks[0].seed}-{len(networks)}"
            )
            moments = args.work / f"moments-{label}.pt"
            carried = carried_on(moments, data.train_x.device) if adam == "carried" else None
            with tqdm(total=protocol.tasks, desc=f"{label} {adam}", unit="task") as bar:
                outcome = run_stack(
                    method, networks, data, protocol=protocol, moments=carried,
                    checkpoint=args.work / f"at-{label}-{adam}.pt", after_task=bar.update,
                )  # fmt: skip
            if adam == "fresh":
                torch.save(outcome.moments, moments)
            results.add(method, adam, networks, outcome)
            for ewc_lambda in dict.fromkeys(one.ewc_lambda for one in networks):
                found = list(results.accuracies(method, ewc_lambda, adam).values())
                half = student_half_width(found)
                print(
                    f"{_name(method, ewc_lambda, adam)}: {sum(found) / len(found):.4f}"
                    f"{'' if half is None else f' ± {half:.4f}'} (n = {len(found)}), stack of {len(networks)} in "
                    f"{outcome.seconds:.0f} s",
                    flush=True,
                )


def draw(rows: Sequence[dict[str, Any]], figure: Figure) -> None:
    """Accuracy over λ, a panel for each importance and penalty that was run, over the authors' runs (mean ± 2 sd)."""
    theirs = {(one.importance, one.variant): one for one in curves() if one.network == "fully-connected"}
    methods = list(
        dict.fromkeys((one["extra"]["method"]["importance"], one["extra"]["method"]["variant"]) for one in rows)
    )
    figure.set_size_inches(4.5 * len(methods), 4.5)
    for axes, method in zip(figure.subplots(1, len(methods), squeeze=False)[0], methods, strict=True):
        axes.set(title=" ".join(method), xlabel="ewc_lambda", xscale="log")
        axes.grid(alpha=0.3)
        if (curve := theirs.get(method)) is not None:
            x = curve.lambdas * (2 if curve.variant == "plain" else 1)
            axes.fill_between(x, curve.means - 2 * curve.sds, curve.means + 2 * curve.sds, color="k", alpha=0.15)
            axes.plot(x, curve.means, "k-", lw=1, label="the paper")
            axes.set_ylim(float(curve.means.max()) - 0.06, float(curve.means.max()) + 0.02)
        for adam in ("fresh", "carried"):
            own = sorted(
                (one["extra"]["ewc_lambda"], one["median"], one["extra"]["half_width_95"] or 0.0)
                for one in rows
                if one["extra"]["adam"] == adam and tuple(one["extra"]["method"].values()) == method
            )
            if own:
                x, y, half = zip(*own, strict=True)
                axes.errorbar(x, y, half, fmt="o-", capsize=3, label=f"ours, {adam} Adam")
        axes.legend()


def own_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of this program."""
    parser.add_argument("--importance", nargs="+", default=list(BEST), choices=list(BEST))
    parser.add_argument(
        "--variant", nargs="+", default=["plain", "stabilized"], choices=["plain", "stabilized", "proximal", "wva"]
    )
    parser.add_argument("--lambdas", nargs="+", type=float, help="default: around the authors' best")
    parser.add_argument("--adam", nargs="+", default=["fresh", "carried"], choices=["fresh", "carried"])
    parser.add_argument("--stack", type=int, default=20, help="networks in one program")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=Path("build/paper_fc"), help="states between runs")


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing and write it."""
    args, protocol, data = begin("fc", __doc__, argv, published=Protocol(), seeds=20, more=own_arguments)
    data = Split(*(part.to(args.device) for part in (data.train_x, data.train_y, data.test_x, data.test_y)))
    results = Results(args.out, protocol)
    for importance in args.importance:
        for variant in args.variant:
            method = Method(importance, variant)
            run_method(method, args.lambdas or lambdas_of(method), args, protocol, data, results)
    print(f"written: {results.file}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
