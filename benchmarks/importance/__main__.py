"""What Fisher and MAS cost, relative to one plain forward and backward over the same batches.

python -m benchmarks.importance [--workloads mlp-b100 resnet18-b16 ...] [--quantities fisher mas] [--seconds 3]
    [--only fastewc batch-1] [--data-root PATH] [--device cpu] [--threads N] [--no-memory] [--out FILE]

First every contender's importances must be those of a float64 batch-1 loop on a few samples (``gate.py``),
elementwise; who fails is named with the reason. Then all make whole passes in turns; medians over rounds. Who takes
more than five times the unit is measured three times, on as many batches as take about two seconds, against the unit on
the same. Peak memory is measured for each contender by itself. Images are MNIST's, tokens the words of the first
``text/*.txt``, both under --data-root (or FASTEWC_DATA); without one all data is random, which changes no time.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.importance.contenders import QUANTITIES
from benchmarks.importance.rows import rows_of
from benchmarks.importance.workloads import DEFAULTS, SPECS, Missing, data_root_or_none, make
from benchmarks.results_row import ROOT, machine, write


def parse() -> argparse.Namespace:
    """The command line."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.importance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workloads", nargs="+", choices=[*SPECS], metavar="NAME", help=f"of {', '.join(SPECS)}")
    parser.add_argument("--quantities", nargs="+", choices=[*QUANTITIES], default=[*QUANTITIES])
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="contenders whose names hold one of these")
    parser.add_argument("--seconds", type=float, default=3.0, help="timed on each contender that is not slow")
    parser.add_argument("--compile-seconds", type=float, default=180.0, help="what torch.compile may take; 0: none")
    parser.add_argument("--data-root", help="folder with MNIST/raw and text/*.txt (default: FASTEWC_DATA)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default=device)
    parser.add_argument("--threads", type=int, help="CPU threads; default torch's")
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--out", type=Path, help="the JSON file; default benchmarks/results/<machine>/importance.json")
    return parser.parse_args()


def main() -> None:
    """Measure and write; what is measured stays, whatever comes after."""
    args = parse()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    out = args.out or ROOT / "benchmarks" / "results" / machine() / "importance.json"
    rows: list[dict[str, Any]] = []
    for name in args.workloads or DEFAULTS[args.device]:
        try:
            workload = make(name, args.device, data_root_or_none(args.data_root))
        except Missing as error:
            print(f"without {name}: {error}")
            continue
        for quantity in args.quantities:
            for row in rows_of(
                workload, quantity, seconds=args.seconds, compile_seconds=args.compile_seconds,
                memory=not args.no_memory, only=lambda name: not args.only or any(text in name for text in args.only),
            ):  # fmt: skip
                rows.append(row)
                write(out, rows)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
