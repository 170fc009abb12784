"""A small GPT that has learned a book is fine-tuned on plays: what it forgets of the book, with and without EWC.

    python -m benchmarks.paper.language_model --data-root PATH [--lambdas 10 100] [--seeds 3] [--steps 80]

The language model of Kutalev & Lapina (arXiv 2109.10021, §3), in small: PATH (or FASTEWC_DATA) holds
``text/war_and_peace.txt`` and ``text/tinyshakespeare.txt``, a byte is a token, and the head is tied to the embedding.
Perplexities are of held-out parts of both texts, before fine-tuning and after it:

- *none*: AdamW alone;
- *fisher*: the same step with stabilised EWC, Ω the Fisher of pieces of the book, for a grid of λ;
- *uniform*: the same with Ω ≡ 1 and λ·mean(Ω of the Fisher) instead of λ, so L2 to the old weights of equal mean pull.

A seed is an order of the fine-tuning's batches, the same for all. Finished runs are in the results file, which is
written after each; the command, repeated, does what is missing.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastewc
from benchmarks.importance.workloads import data_root_or_none
from benchmarks.paper.command_line import begin_setup
from benchmarks.paper.results_file import Results
from benchmarks.results_row import measure_in_turn, timing_of
from benchmarks.small_gpt import (
    DOMAINS,
    Sizes,
    Text,
    batches,
    build_gpt,
    held_out_loss,
    learn_the_book,
    read_texts,
    token_loss,
    train_step,
)

PREFIX = "language_model"
BEFORE = f"{PREFIX}/before"
TIME = f"{PREFIX}/time of Fisher over forward and backward"
PENALTIES = ("none", "fisher", "uniform")
#: From where the penalty begins to be seen to where it hinders learning; suggest_lambda(target=1) is beyond the last.
LAMBDAS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
TIMED_BATCHES = 16


@dataclass(frozen=True, kw_only=True)
class Setup(Sizes):
    """The whole experiment but for λ and seeds."""

    layers: int = 4
    width: int = 160
    positions: int = 64
    batch: int = 16
    book_steps: int = 1600
    book_lr: float = 3e-3
    held_out_samples: int = 256
    fisher_samples: int = 1024
    steps: int = 80
    lr: float = 1e-3


@dataclass(frozen=True)
class Run:
    """One fine-tuning: λ of the Fisher's penalty, also where a uniform Ω of the same mean pull takes its place."""

    penalty: str
    ewc_lambda: float
    seed: int

    @property
    def name(self) -> str:
        return f"{PREFIX}/{self.penalty}/{self.ewc_lambda:g}/seed {self.seed}"


@dataclass(frozen=True)
class Point:
    """What the n seeds of one penalty and λ gave: mean perplexities, and their standard deviation (None for one)."""

    penalty: str
    ewc_lambda: float
    n: int
    mean: dict[str, float]
    sd: dict[str, float | None]
    q99: float | None  # of αλΩ, Ω as it was used


def perplexities(model: nn.Module, texts: dict[str, Text], setup: Sizes) -> dict[str, float]:
    """exp of the mean negative log-likelihood of a byte, by domain."""
    return {domain: math.exp(held_out_loss(model, text, setup)) for domain, text in texts.items()}


def fisher_of(model: nn.Module, book: Text, setup: Setup) -> tuple[fastewc.Importance, list[Any]]:
    """The Fisher diagonal of pieces of the training text, and these pieces."""
    pieces = list(batches(book.train, setup, -(-setup.fisher_samples // setup.batch), seed=0))
    found = fastewc.fisher_importance(
        model, pieces, loss="categorical", labels="dataset", max_samples=setup.fisher_samples
    )
    return found, pieces


def mean_of(importance: fastewc.Importance) -> float:
    """Mean over all weights."""
    return float(sum(t.double().sum() for t in importance.values())) / sum(t.numel() for t in importance.values())


def protection(model: nn.Module, run: Run, fisher: fastewc.Importance) -> fastewc.EWC | None:
    """What holds the weights of the model where they are; None for no penalty."""
    match run.penalty:
        case "none":
            return None
        case "fisher":
            ewc_lambda, importance = run.ewc_lambda, fisher
        case _:
            ewc_lambda, importance = run.ewc_lambda * mean_of(fisher), fastewc.uniform_importance(model)
    ewc = fastewc.EWC(model, ewc_lambda=ewc_lambda, variant="stabilized")
    ewc.consolidate(importance)
    return ewc


def fine_tuned(
    start: nn.Module, run: Run, fisher: fastewc.Importance, plays: Text, setup: Setup
) -> tuple[nn.Module, dict[str, float] | None]:
    """A copy of the model after fine-tuning, and ewc.stats() at its end."""
    model = copy.deepcopy(start)
    ewc = protection(model, run, fisher)
    optimizer = fastewc.optim.AdamW(model.parameters(), lr=setup.lr, weight_decay=0.0, ewc=ewc)
    for x, y in batches(plays.train, setup, setup.steps, seed=1 + run.seed):
        train_step(model, optimizer, x, y)
    return model, None if ewc is None else ewc.stats(optimizer)


def learned(book: Text, setup: Setup, file: Path) -> nn.Module:
    """The model that has learned the book: from the file, where that is of the same sizes, else trained and kept."""
    sizes = {field.name: getattr(setup, field.name) for field in fields(Sizes)}
    if file.exists():
        kept = torch.load(file, weights_only=True, map_location=book.train.device)
        if kept["sizes"] == sizes:
            model = build_gpt(setup).to(book.train.device)
            model.load_state_dict(kept["model"])
            return model.eval()
    begun = time.perf_counter()
    model = learn_the_book(book, setup)
    print(f"learned the book in {time.perf_counter() - begun:.0f} s", flush=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"sizes": sizes, "model": model.state_dict()}, file)
    return model


def time_fisher(model: nn.Module, pieces: Sequence[Any], results: Results, device: str) -> None:
    """A row: time of the Fisher's pass relative to forward and backward of the batches' mean losses."""
    own = copy.deepcopy(model)

    def plain() -> None:
        for x, y in pieces:
            own.zero_grad()
            token_loss(own, x, y).backward()

    def fisher() -> None:
        fastewc.fisher_importance(own, pieces, loss="categorical", labels="dataset")

    passes = measure_in_turn([(lambda: None, plain), (lambda: None, fisher)], device=device, seconds=0.5)
    ratio = timing_of(b / a for a, b in zip(*passes, strict=True))
    results.add(
        TIME, ratio, unit="ratio",
        seconds=dict(zip(("forward and backward", "Fisher"), (timing_of(one).median for one in passes), strict=True)),
        samples=sum(len(x) for x, _ in pieces),
    )  # fmt: skip


def run_missing(todo: Sequence[Run], texts: dict[str, Text], setup: Setup, results: Results, work: Path) -> None:
    """All runs that are not in the results; what stands before them is made again where its file is gone."""
    from tqdm import tqdm

    start = learned(texts["book"], setup, work / "book.pt")
    fisher, pieces = fisher_of(start, texts["book"], setup)
    if BEFORE not in results:
        before = perplexities(start, texts, setup)
        results.add(
            BEFORE, value=before["book"], unit="perplexity", perplexity=before,
            weights=sum(p.numel() for p in start.parameters()), mean_importance=mean_of(fisher),
            lambda_where_q99_is_1=fastewc.suggest_lambda(
                fisher, setup.lr, variant="stabilized", optimizer="adam", target=1.0
            ),
        )  # fmt: skip
    if TIME not in results:
        time_fisher(start, pieces[:TIMED_BATCHES], results, texts["book"].train.device.type)
    for run in tqdm(todo, unit="run", mininterval=0.5 if sys.stderr.isatty() else 60):
        begun = time.perf_counter()
        model, stats = fine_tuned(start, run, fisher, texts["plays"], setup)
        found = perplexities(model, texts, setup)
        results.add(
            run.name, value=found["book"], unit="perplexity", **asdict(run), perplexity=found, stats=stats,
            seconds=time.perf_counter() - begun,
        )  # fmt: skip


def points_of(rows: Sequence[dict[str, Any]]) -> list[Point]:
    """Over seeds, by penalty and then by λ; rows of other programs are left out."""
    runs = [one["extra"] for one in rows if one["name"].startswith(f"{PREFIX}/") and "penalty" in one["extra"]]
    points = []
    for penalty in PENALTIES:
        for ewc_lambda in sorted({one["ewc_lambda"] for one in runs if one["penalty"] == penalty}):
            same = [one for one in runs if (one["penalty"], one["ewc_lambda"]) == (penalty, ewc_lambda)]
            found = {domain: [one["perplexity"][domain] for one in same] for domain in DOMAINS}
            points.append(
                Point(
                    penalty, ewc_lambda, len(same),
                    {domain: statistics.fmean(values) for domain, values in found.items()},
                    {d: statistics.stdev(values) if len(values) > 1 else None for d, values in found.items()},
                    None if same[0]["stats"] is None else same[0]["stats"]["q99"],
                )
            )  # fmt: skip
    return points


def before_of(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Perplexities before fine-tuning; ValueError where the rows are another program's."""
    found = [one["extra"]["perplexity"] for one in rows if one["name"] == BEFORE]
    if not found:
        raise ValueError(f"no row {BEFORE!r} among {len(rows)}: give the rows that {__name__} writes")
    return found[0]


def show(rows: Sequence[dict[str, Any]]) -> None:
    """The perplexities as a table."""
    print(f"{'penalty':<10}{'λ':>8}{'n':>3}{'q99(αλΩ)':>11}" + "".join(f"{domain:>18}" for domain in DOMAINS))
    print(f"{'before':<32}" + "".join(f"{before_of(rows)[domain]:>18.3f}" for domain in DOMAINS))
    for one in points_of(rows):
        q99 = "" if one.q99 is None else f"{one.q99:.2g}"
        ends = (f"{one.mean[d]:.3f}" + ("" if (sd := one.sd[d]) is None else f" ± {sd:.3f}") for d in DOMAINS)
        print(f"{one.penalty:<10}{one.ewc_lambda:>8g}{one.n:>3}{q99:>11}" + "".join(f"{end:>18}" for end in ends))


def draw(rows: Sequence[dict[str, Any]], axes: Any) -> None:
    """The trade-off into matplotlib axes: perplexity on the plays (x) and on the book (y), a point per λ."""
    labels = {"none": "plain fine-tuning", "fisher": "EWC, Fisher", "uniform": "L2 of equal mean pull"}
    before, points = before_of(rows), points_of(rows)
    axes.axhline(before["book"], color="grey", linestyle=":", label="before fine-tuning")
    for penalty, mark in zip(PENALTIES, ("s", "o-", "^--"), strict=True):
        same = [one for one in points if one.penalty == penalty]
        if not same:
            continue
        x, y = ([one.mean[domain] for one in same] for domain in ("plays", "book"))
        axes.plot(x, y, mark, label=labels[penalty])
        if penalty == "fisher":
            for one in same:
                at = one.mean["plays"], one.mean["book"]
                axes.annotate(
                    f"λ = {one.ewc_lambda:g}", at, (-5, -9), textcoords="offset points", ha="right", fontsize="small"
                )
    axes.set_xlabel("perplexity on the plays")
    axes.set_ylabel("perplexity on the book")
    axes.set_title("A small GPT, fine-tuned")
    axes.legend()


def own_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of this program."""
    parser.add_argument("--data-root", help="folder with text/*.txt (default: FASTEWC_DATA)")
    parser.add_argument("--lambdas", nargs="+", type=float, default=LAMBDAS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=Path("build/paper_language_model"), help="the model of the book")


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing and write it."""
    args, setup, results = begin_setup("language_model", __doc__, argv, Setup, own_arguments)
    wanted = [
        run
        for seed in range(args.seeds)
        for run in (
            Run("none", 0.0, seed),
            *(Run(penalty, one, seed) for one in args.lambdas for penalty in ("fisher", "uniform")),
        )
    ]
    todo = [run for run in wanted if run.name not in results]
    if todo:
        texts = read_texts(data_root_or_none(args.data_root), args.device)
        run_missing(todo, texts, setup, results, args.work)
    show(results.rows)
    print(f"written: {results.file}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
