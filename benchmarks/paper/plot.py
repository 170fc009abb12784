"""Draw every figure whose JSON is in the results: python -m benchmarks.paper.plot [--results DIR] [--out DIR].

A figure is a function ``draw(rows, figure)`` beside its experiment, entered in :data:`FIGURES`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.paper import claims, cnn_report, correlation, fc, language_model, pruning
from benchmarks.results_row import ROOT

#: What draws a results file, by its name.
FIGURES: dict[str, Callable[[Sequence[dict[str, Any]], Figure], None]] = {
    "paper_claims.json": claims.draw,
    "paper_cnn_report.json": cnn_report.draw,
    "paper_correlation.json": correlation.draw,
    "paper_fc.json": fc.draw,
    "paper_language_model.json": lambda rows, figure: language_model.draw(rows, figure.subplots()),
    "paper_pruning.json": pruning.draw,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Write OUT/<machine>/<name>.png for each. Returns 1 where there is nothing to draw."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper.plot", description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of <machine>/")
    parser.add_argument("--out", type=Path, default=Path("build/figures"))
    args = parser.parse_args(argv)
    files = [file for file in sorted(args.results.glob("*/*.json")) if file.name in FIGURES]
    for file in files:
        figure = Figure(layout="constrained")
        FigureCanvasAgg(figure)
        FIGURES[file.name](json.loads(file.read_text(encoding="utf-8")), figure)
        picture = args.out / file.parent.name / f"{file.stem}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(picture, dpi=120)
        print(picture)
    if not files:
        print(f"nothing to draw: {args.results} has no <machine>/{{{','.join(FIGURES)}}}")
    return 0 if files else 1


if __name__ == "__main__":
    raise SystemExit(main())
