"""What the paper's own runs say to a statistician: how wide its optima are, and how much of them is luck.

    python -m benchmarks.paper.authors [--repeats 20000]

``authors_runs.csv`` has mean, standard deviation and number of runs at every λ behind Tables 1 and 2 of Kutalev &
Lapina (arXiv 2109.10021), read from the logs that they published with their code (aakutalev/ewc-features); λ is theirs,
of which the plain one counts twice here. The tables give the best mean over all λ. The mean of n runs that scatter by s
is off by s/√n, and the best of many is off upwards: so for every curve a parabola over log λ around its top is taken
for the truth, all its points are drawn anew with the scatter that they had, and the best of them is compared with the
parabola's top. Where two parabolas fit (plain and stabilised), so is the difference of the two bests.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results_row import ROOT, machine, row, write

FILE = Path(__file__).with_name("authors_runs.csv")
#: Points of a curve that its parabola is fitted to: as far below the best mean at most.
NEAR = {"fully-connected": 0.02, "convolutional": 0.06}
#: "Within 1 % of the best".
CLOSE = 0.01


@dataclass(frozen=True)
class Curve:
    """One network, importance and penalty over λ, ascending; accuracies in 0..1."""

    network: str
    importance: str
    variant: str
    lambdas: np.ndarray
    means: np.ndarray
    sds: np.ndarray
    runs: np.ndarray

    @property
    def name(self) -> str:
        """For tables and files."""
        return f"{self.network}/{self.importance}/{self.variant}"

    @property
    def errors(self) -> np.ndarray:
        """Standard errors of the means."""
        return self.sds / np.sqrt(self.runs)


@dataclass(frozen=True)
class Top:
    """The parabola over log λ around a curve's best: its coefficients, and the points that it was fitted to."""

    near: Curve
    parabola: np.ndarray
    chi_square: float  # per degree of freedom: about 1 where the parabola and the errors explain the points

    @property
    def best_lambda(self) -> float:
        """Where the parabola is highest."""
        a, b, _ = self.parabola
        return math.exp(-b / (2 * a))

    @property
    def height(self) -> float:
        """How high it is there."""
        a, b, c = self.parabola
        return float(c - b * b / (4 * a))

    @property
    def width(self) -> float:
        """The factor from the lowest to the highest λ within ``CLOSE`` of the top."""
        return math.exp(2 * math.sqrt(CLOSE / -self.parabola[0]))


def curves() -> list[Curve]:
    """Every curve of the file; points of fewer than 10 runs are left out."""
    points = defaultdict(list)
    with FILE.open() as stream:
        for one in csv.DictReader(stream):
            if int(one["runs"]) >= 10 and float(one["lambda"]) > 0:
                key = one["network"], one["importance"], "stabilized" if one["stabilized"] == "1" else "plain"
                numbers = (one[name] for name in ("lambda", "mean_accuracy", "std_accuracy", "runs"))
                points[key].append(tuple(map(float, numbers)))
    return [Curve(*key, *np.array(sorted(found)).T) for key, found in points.items()]


def top_of(curve: Curve) -> Top:
    """A weighted least-squares parabola through the points near the best."""
    near = curve.means > curve.means.max() - NEAR[curve.network]
    part = Curve(
        curve.network, curve.importance, curve.variant,
        *(values[near] for values in (curve.lambdas, curve.means, curve.sds, curve.runs)),
    )  # fmt: skip
    x = np.log(part.lambdas)
    parabola = np.polyfit(x, part.means, 2, w=1 / part.errors)
    residuals = (part.means - np.polyval(parabola, x)) / part.errors
    return Top(part, parabola, float((residuals**2).sum() / max(1, len(x) - 3)))


def redrawn_best(top: Top, repeats: int, generator: np.random.Generator) -> np.ndarray:
    """[repeats]: the best mean, if the parabola is true and every point is measured anew."""
    truth = np.polyval(top.parabola, np.log(top.near.lambdas))
    drawn = truth + top.near.errors * generator.standard_normal((repeats, len(truth)))
    return drawn.max(1)


def rows_of(repeats: int) -> list[dict[str, Any]]:
    """Width and luck of each curve, then the difference between plain and stabilised."""
    generator, rows, best = np.random.default_rng(0), [], {}
    for curve in curves():
        top = top_of(curve)
        drawn = redrawn_best(top, repeats, generator)
        best[curve.network, curve.importance, curve.variant] = curve.means.max(), drawn
        rows.append(
            row(
                "paper", f"authors/{curve.name}/luck", value=float(drawn.mean() - top.height), unit="accuracy",
                published_best=float(curve.means.max()), top=top.height, best_lambda=top.best_lambda,
                width_within_1_percent=top.width, points=len(top.near.lambdas), chi_square=top.chi_square,
                sd_of_a_run=float(np.median(top.near.sds)), sd_of_the_best=float(drawn.std()),
            )
        )  # fmt: skip
    for network, importance, variant in list(best):
        other = best.get((network, importance, "stabilized"))
        if variant == "plain" and other is not None:
            published, drawn = best[network, importance, "plain"]
            spread = float((other[1] - drawn).std())
            rows.append(
                row(
                    "paper", f"authors/{network}/{importance}/stabilized - plain", value=float(other[0] - published),
                    unit="accuracy", sd_of_the_difference=spread,
                )
            )  # fmt: skip
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Compute, print, write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper.authors",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--repeats", type=int, default=20_000)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<machine>/paper_authors.json")
    args = parser.parse_args(argv)
    rows = rows_of(args.repeats)
    for one in rows:
        numbers = "  ".join(f"{key} {value:.4g}" for key, value in one["extra"].items())
        print(f"{one['name']:<55}{one['median']:+.4f}  {numbers}")
    out = args.out or ROOT / "benchmarks" / "results" / machine() / "paper_authors.json"
    write(out, rows)
    print(f"written: {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
