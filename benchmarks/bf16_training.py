"""Fine-tuning a bfloat16 model at a small learning rate: what plain bfloat16 loses, and what master weights keep.

    python -m benchmarks.bf16_training --data-root PATH [--threads 2] [--seeds 4] [--out FILE]

PATH (or FASTEWC_DATA) holds ``text/war_and_peace.txt`` and ``text/tinyshakespeare.txt``. A byte-level GPT-2 learns the
book in float32; its weights, rounded to bfloat16, are where every arm starts. Each arm fine-tunes on the plays with
AdamW and stabilised EWC, the Fisher of the book and the same batches; a seed is an order of the batches. The held-out
losses are of float32 arithmetic on the weights of each arm's model, so only the training differs.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastewc
from benchmarks.importance.workloads import data_root_or_none
from benchmarks.results_row import row, write
from benchmarks.small_gpt import DOMAINS, Sizes, Text, batches, held_out_loss, learn_the_book, read_texts, train_step

SUITE = "bf16_training"
#: The parameters' dtype, and the options of the optimizer.
ARMS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "bfloat16": (torch.bfloat16, {}),
    "master weights": (torch.bfloat16, {"master_weights": True}),
    "master weights, bfloat16 moments": (torch.bfloat16, {"master_weights": True, "state_dtype": torch.bfloat16}),
}


@dataclass(frozen=True, kw_only=True)
class Setup(Sizes):
    """Sizes, and numbers of the fine-tuning."""

    steps: int
    lr: float
    ewc_lambda: float
    fisher_samples: int


@dataclass(frozen=True)
class Size:
    """Bytes a weight of an arm's parameters, gradients and optimizer state; Ω and w* are not among them."""

    parameter: float
    gradient: float
    state: float


def rounded(model: nn.Module) -> nn.Module:
    """The model with weights that bfloat16 holds."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16())
    return model


def fine_tuned(
    start: nn.Module, importance: fastewc.Importance, text: Text, setup: Setup, arm: str, seed: int
) -> tuple[nn.Module, Size]:
    """The model after fine-tuning, and what it took."""
    dtype, options = ARMS[arm]
    model = copy.deepcopy(start).to(dtype)
    ewc = fastewc.EWC(model, ewc_lambda=setup.ewc_lambda, variant="stabilized")
    ewc.consolidate(importance)
    optimizer = fastewc.optim.AdamW(model.parameters(), lr=setup.lr, weight_decay=0.0, ewc=ewc, **options)
    for x, y in batches(text.train, setup, setup.steps, seed=1 + seed):
        train_step(model, optimizer, x, y)
    state = [t for own in optimizer.state.values() for t in own.values() if isinstance(t, Tensor) and t.ndim]
    params = list(model.parameters())
    grads = [p.grad for p in params if p.grad is not None]
    return model, Size(
        *(sum(t.nbytes for t in kept) / sum(map(Tensor.numel, params)) for kept in (params, grads, state))
    )


def spread(losses: Sequence[float]) -> float | None:
    """Standard deviation over seeds; None for one."""
    return statistics.stdev(losses) if len(losses) > 1 else None


def rows_of(losses: dict[str, dict[str, list[float]]], sizes: dict[str, Size], **extra: Any) -> list[dict[str, Any]]:
    """A row for each arm and domain; differences to float32 are of means, in its standard deviations over seeds."""
    rows = []
    for domain in DOMAINS:
        base = losses["float32"][domain]
        for arm in ARMS:
            own, sd, base_sd = losses[arm][domain], spread(losses[arm][domain]), spread(base)
            off = statistics.fmean(own) - statistics.fmean(base)
            told = {
                "sd": sd, "losses": own, "difference": off, "difference_in_sd": off / base_sd if base_sd else None,
                "bytes_per_weight": asdict(sizes[arm]), **extra,
            }  # fmt: skip
            rows.append(row(SUITE, f"{domain}, {arm}", value=statistics.fmean(own), unit="nats per byte", **told))
    return rows


def measure(texts: dict[str, Text], setup: Setup, seeds: int) -> list[dict[str, Any]]:
    """Train everything; the rows."""
    begun = time.perf_counter()
    start = rounded(learn_the_book(texts["book"], setup))
    before = {domain: held_out_loss(start, texts[domain], setup) for domain in DOMAINS}
    print(f"after the book: {before} ({time.perf_counter() - begun:.0f} s)", flush=True)
    few = batches(texts["book"].train, setup, -(-setup.fisher_samples // setup.batch), seed=0)
    importance = fastewc.fisher_importance(start, list(few), loss="categorical", max_samples=setup.fisher_samples)
    losses: dict[str, dict[str, list[float]]] = {arm: {domain: [] for domain in DOMAINS} for arm in ARMS}
    sizes = {}
    for seed in range(seeds):
        for arm in ARMS:
            model, sizes[arm] = fine_tuned(start, importance, texts["plays"], setup, arm, seed)
            for domain in DOMAINS:
                losses[arm][domain].append(held_out_loss(model, texts[domain], setup))
            found = {domain: round(own[-1], 4) for domain, own in losses[arm].items()}
            print(f"seed {seed}, {arm}: {found} ({time.perf_counter() - begun:.0f} s)", flush=True)
    return rows_of(losses, sizes, before=before, setup=asdict(setup), seeds=seeds)


def show(rows: list[dict[str, Any]]) -> None:
    """The rows as a table."""
    print(f"{'':<44}{'loss':>9}{'sd':>9}{'− float32':>11}{'in its sd':>11}{'bytes a weight':>16}")
    for one in rows:
        extra = one["extra"]
        numbers = (f"{x:.4f}" if x is not None else "–" for x in (one["median"], extra["sd"], extra["difference"]))
        ratio = extra["difference_in_sd"]
        tail = f"{'–' if ratio is None else f'{ratio:+.1f}':>11}{sum(extra['bytes_per_weight'].values()):>16.1f}"
        print(f"{one['name']:<44}" + "".join(f"{n:>{w}}" for n, w in zip(numbers, (9, 9, 11), strict=True)) + tail)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", help="folder with text/*.txt (default: FASTEWC_DATA)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--positions", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--book-steps", type=int, default=600)
    parser.add_argument("--book-lr", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=2e-5, help="of the fine-tuning")
    parser.add_argument("--ewc-lambda", type=float, default=1.0)
    parser.add_argument("--fisher-samples", type=int, default=256)
    parser.add_argument("--held-out-samples", type=int, default=256)
    parser.add_argument("--out", help="JSON file for the rows")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    setup = Setup(**{name: getattr(args, name) for name in Setup.__dataclass_fields__})
    rows = measure(read_texts(data_root_or_none(args.data_root)), setup, args.seeds)
    show(rows)
    if args.out:
        write(args.out, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
