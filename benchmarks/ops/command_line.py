"""The command line that all op benchmarks share: options in, one JSON file of rows out."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.ops.model_shapes import MODELS
from benchmarks.results_row import ROOT, machine, write

Rows = Iterator[dict[str, Any]]


def run(description: str | None, name: str, *suites: Callable[[argparse.Namespace], Rows]) -> None:
    """Measure every suite and write ``benchmarks/results/<machine>/<name>.json``, or --out."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the JSON file; default benchmarks/results/<machine>/")
    parser.add_argument("--seconds", type=float, default=1.0, help="time spent on each number")
    parser.add_argument(
        "--device", nargs="+", choices=devices, default=devices[-1:], help="default: cuda if there is one"
    )
    parser.add_argument("--threads", type=int, help="CPU threads; default torch's")
    parser.add_argument("--shapes", nargs="+", choices=[*MODELS], default=[*MODELS], help="models that ewc_step steps")
    parser.add_argument(
        "--compile-seconds",
        type=float,
        default=180.0,
        help="what torch.compile may take; 0: leave it out",
    )
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    out = args.out or ROOT / "benchmarks" / "results" / machine() / f"{name}.json"
    rows: list[dict[str, Any]] = []
    for suite in suites:
        for row in suite(args):
            rows.append(row)
            write(out, rows)  # what is measured stays, whatever comes after
    print(f"wrote {out}")
