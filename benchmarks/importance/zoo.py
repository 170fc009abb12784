"""The Fisher pass over the small models that the tests compare with autograd, relative to plain training passes.

    python -m benchmarks.importance.zoo [--models resnet18 gpt2 …] [--batches 16] [--batch 16] [--threads 1]

Both sides get the same batches, in turns: forward and backward of the summed loss, and ``fisher_importance`` with all
that it does: the first look at the model, the checks, joining of small batches. These models are small, so most of
their time is torch's own overhead per function. Needs what the tests need: pip install -e ".[test]".
"""

from __future__ import annotations

import argparse
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastewc
from benchmarks.results_row import ROOT, machine, measure_in_turn, row, timing_of, write
from tests.per_sample import test_zoo as zoo
from tests.per_sample import test_zoo_peft as adapters

KINDS = zoo.ZOO | {name: zoo.Kind(make, zoo.tokens(7)) for name, make in adapters.MODELS.items()}


def sides_of(name: str, batch: int, batches: int) -> tuple[Callable[[], Any], Callable[[], fastewc.Importance]]:
    """(plain, Fisher) of one model, float32, over the same batches."""
    kind = KINDS[name]
    torch.manual_seed(0)
    model = zoo.randomised(kind.make()).float()
    data = []
    for _ in range(batches):
        parts = [kind.inputs() for _ in range(-(-batch // zoo.N))]
        x = torch.cat(parts)[:batch]
        x = x.float() if x.is_floating_point() else x
        with torch.no_grad():
            data.append((x, zoo.target_of(kind, zoo.call(kind, model, x))))

    def loss(output: Tensor, y: Tensor) -> Tensor:
        if kind.loss == "gaussian":
            return 0.5 * (output - y).square().sum()
        return F.cross_entropy(output.flatten(0, -2), y.flatten(), reduction="sum")

    def plain() -> None:
        for x, y in data:
            loss(zoo.call(kind, model, x), y).backward()
            model.zero_grad()

    def forward(m: nn.Module, parts: Any) -> tuple[Tensor, Tensor]:
        return zoo.call(kind, m, parts[0]), parts[1]

    own = {} if kind.call is None else {"forward": forward}
    return plain, lambda: fastewc.fisher_importance(model, data, loss=kind.loss, **own)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.importance.zoo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", default=list(KINDS), choices=list(KINDS), metavar="MODEL")
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each side of a model, about")
    parser.add_argument("--threads", type=int, help="CPU threads; default torch's")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<machine>/importance_zoo.json")
    args = parser.parse_args(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")  # the models', about optional packages
    rows = []
    for name in args.models:
        plain, fisher = sides_of(name, args.batch, args.batches)
        paths = Counter(path for path, _ in fisher().report.values())
        ours, theirs = measure_in_turn([(lambda: None, fisher), (lambda: None, plain)], seconds=args.seconds)
        ratio = timing_of(a / b for a, b in zip(ours, theirs, strict=True))
        rows.append(
            row(
                "importance", f"zoo/{name}", ratio, unit="ratio", batch=args.batch, batches=args.batches,
                paths=dict(paths), plain_seconds=timing_of(theirs).median, seconds=timing_of(ours).median,
            )
        )  # fmt: skip
        print(f"{name:<26}{ratio.median:6.2f}×  ({ratio.p20:.2f}–{ratio.p80:.2f})  {dict(paths)}", flush=True)
    slow = [one["name"] for one in rows if one["median"] > 2]
    print(f"above 2×: {', '.join(slow) or 'none'}")
    write(args.out or ROOT / "benchmarks" / "results" / machine() / "importance_zoo.json", rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
