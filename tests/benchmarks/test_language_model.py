"""The language-model benchmark on texts of its own: what is measured is what its words say."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastewc
from benchmarks.paper import language_model
from benchmarks.paper.language_model import Run, Setup, fine_tuned, fisher_of, main, mean_of, perplexities, protection
from benchmarks.small_gpt import DOMAINS, HELD_OUT, Text, batches, build_gpt, read_texts

pytest.importorskip("transformers")

TINY = Setup(
    layers=1, width=32, positions=16, batch=4, book_steps=8, held_out_samples=8, fisher_samples=6, steps=25, lr=1e-3
)  # fmt: skip
WORDS = [
    f"--{name.replace('_', '-')}={getattr(TINY, name)}"
    for name in ("layers", "width", "positions", "batch", "book_steps", "held_out_samples", "fisher_samples", "steps")
]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "text").mkdir()
    for i, name in enumerate(DOMAINS.values()):
        (tmp_path / "text" / name).write_text(" ".join(str(n * n + i) for n in range(2000)))
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


def run(folder: Path, *words: str) -> list[dict[str, Any]]:
    """The program's rows."""
    out = folder / "rows.json"
    named = ("--data-root", str(folder), "--out", str(out), "--work", str(folder / "work"), "--threads", "1")
    assert main([*named, *WORDS, *words]) == 0
    return json.loads(out.read_text())


class Repeating(nn.Module):
    """The byte before has probability ½, the two others have ¼."""

    def forward(self, x: Tensor) -> Tensor:
        return (1 + nn.functional.one_hot(x, 3)).div(4).log()


def test_perplexity_is_that_of_the_bytes_that_follow() -> None:
    held_out = torch.tensor([1, 0, 1, 0, 1, 1, 0, 0, 0, 2])  # windows 101, 011, 000; one byte is left over
    text = Text(torch.empty(0, dtype=torch.int64), held_out)
    sizes = Setup(positions=2, batch=2, held_out_samples=100)  # batches of two windows and of one
    bits = (2 + 2) + (2 + 1) + (1 + 1)
    found = perplexities(Repeating(), {"book": text}, sizes)
    assert found == {"book": pytest.approx(2 ** (bits / 6), rel=1e-6)}


def test_held_out_bytes_are_never_trained_on(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    held_out = int(2000 * HELD_OUT)
    for name in DOMAINS.values():
        (tmp_path / "text" / name).write_text("a" * (2000 - held_out) + "z" * held_out)
    for text in read_texts(str(tmp_path)).values():
        assert text.held_out.tolist() == [ord("z")] * held_out
        assert len(text.train) + len(text.held_out) == 2000
        shown = torch.stack([torch.stack(pair) for pair in batches(text.train, TINY, 500, seed=0)])
        assert (shown == ord("a")).all()
        assert shown.shape == (500, 2, TINY.batch, TINY.positions)
    for x, y in batches(torch.arange(100), TINY, 5, seed=0):
        assert torch.equal(y, x + 1)


def started() -> tuple[nn.Module, fastewc.Importance, Text]:
    """A model, a Fisher of it, and a text of which nothing is held out: neither may look there."""
    torch.manual_seed(0)
    model = build_gpt(TINY).eval()
    text = Text(torch.randint(40, 90, (2000,)), torch.empty(0, dtype=torch.int64))
    return model, fisher_of(model, text, TINY)[0], text


def moved(model: nn.Module, start: nn.Module) -> float:
    """The largest change of a weight."""
    return max(float((a - b).detach().abs().max()) for a, b in zip(model.parameters(), start.parameters(), strict=True))


@pytest.mark.parametrize("penalty", ["fisher", "uniform"])
def test_without_lambda_it_is_plain_fine_tuning_to_the_bit(penalty: str) -> None:
    start, fisher, text = started()
    plain, stats = fine_tuned(start, Run("none", 0.0, 3), fisher, text, TINY)
    assert stats is None
    assert moved(plain, start) > 5 * TINY.lr
    for ewc_lambda, same in ((0.0, True), (1.0, False)):
        model, _ = fine_tuned(start, Run(penalty, ewc_lambda, 3), fisher, text, TINY)
        pairs = zip(model.parameters(), plain.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs) == same
    other, _ = fine_tuned(start, Run("none", 0.0, 4), fisher, text, TINY)
    assert moved(other, plain) > 0


@pytest.mark.parametrize("penalty", ["fisher", "uniform"])
def test_a_huge_lambda_keeps_the_weights(penalty: str) -> None:
    start, fisher, text = started()
    plain, _ = fine_tuned(start, Run("none", 0.0, 0), fisher, text, TINY)
    model, stats = fine_tuned(start, Run(penalty, 1e15, 0), fisher, text, TINY)
    # Adam's first step is one lr, and its momentum carries it on before the pull has turned it.
    assert moved(model, start) < 5 * TINY.lr < moved(plain, start)
    assert stats is not None and stats["rms_drift"] < 2 * TINY.lr


def test_uniform_has_the_mean_pull_of_the_fisher() -> None:
    start, fisher, _ = started()
    pulls = []
    for penalty in ("fisher", "uniform"):
        ewc = protection(start, Run(penalty, 7.0, 0), fisher)
        assert ewc is not None and ewc.variant == "stabilized"
        pulls.append(ewc.ewc_lambda * mean_of(ewc.importances()))
    assert pulls[0] == pytest.approx(pulls[1], rel=1e-6)
    assert mean_of(fisher) == pytest.approx(float(torch.cat([t.flatten() for t in fisher.values()]).mean()), rel=1e-5)


def test_the_program_and_its_repetition(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = run(folder, "--seeds", "1", "--lambdas", "3")
    runs = [f"language_model/{what}/seed 0" for what in ("none/0", "fisher/3", "uniform/3")]
    assert [one["name"] for one in rows] == [language_model.BEFORE, language_model.TIME, *runs]
    for one in rows[:1] + rows[2:]:
        assert one["unit"] == "perplexity"
        assert one["median"] == one["extra"]["perplexity"]["book"]
        assert 1 < one["extra"]["perplexity"]["plays"] < math.inf
    assert rows[1]["unit"] == "ratio" and rows[1]["median"] > 0 and rows[1]["extra"]["samples"] == 8
    plays = [one["extra"]["perplexity"]["plays"] for one in (rows[0], *rows[2:])]
    assert plays[1] < plays[2] < plays[0]  # it learns, less so where it is held

    made: list[Run] = []

    def counted(start: nn.Module, run: Run, *others: Any) -> Any:
        made.append(run)
        return fine_tuned(start, run, *others)

    monkeypatch.setattr(language_model, "fine_tuned", counted)
    monkeypatch.setattr(language_model, "learn_the_book", None)  # the model is in the work folder
    more = run(folder, "--seeds", "1", "--lambdas", "3", "0")
    assert made == [Run("fisher", 0.0, 0), Run("uniform", 0.0, 0)]
    assert more[: len(rows)] == rows and len(more) == len(rows) + len(made)
    assert more[-1]["extra"]["perplexity"] == rows[2]["extra"]["perplexity"]  # λ = 0 again

    monkeypatch.setattr(language_model, "read_texts", None)  # nothing is missing, so nothing is needed
    assert run(folder, "--seeds", "1", "--lambdas", "3", "0") == more


def row_of(penalty: str, ewc_lambda: float, seed: int, book: float, plays: float) -> dict[str, Any]:
    found = {"book": book, "plays": plays}
    extra = {"penalty": penalty, "ewc_lambda": ewc_lambda, "seed": seed, "perplexity": found, "stats": None}
    return {"name": Run(penalty, ewc_lambda, seed).name, "extra": extra}


def test_the_figure_has_a_point_for_each_lambda(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib import pyplot

    rows = [
        {"name": language_model.BEFORE, "extra": {"perplexity": {"book": 4.0, "plays": 9.0}}},
        {"name": "of another program", "extra": {}},
        *(row_of("fisher", ewc_lambda, seed, 5.0 + seed, ewc_lambda) for ewc_lambda in (7.0, 6.0) for seed in (0, 2)),
        row_of("none", 0.0, 0, 8.0, 5.0),
    ]
    figure, axes = pyplot.subplots()
    language_model.draw(rows, axes)
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    pyplot.close(figure)
    assert lines["EWC, Fisher"] == [[6.0, 6.0], [7.0, 6.0]]
    assert lines["plain fine-tuning"] == [[5.0, 8.0]]
    assert {y for _, y in lines["before fine-tuning"]} == {4.0}
    language_model.show(rows)
    with pytest.raises(ValueError, match="no row 'language_model/before' among 1"):
        language_model.draw(rows[1:2], axes)
    assert f"6.000 ± {math.sqrt(2):.3f}" in capsys.readouterr().out


def test_another_setup_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--steps", "3"])
    assert "give --out FILE" in capsys.readouterr().err
    (folder / "rows.json").write_text(json.dumps([{"name": "x", "extra": {"setup": {"steps": 3}}}]))
    with pytest.raises(ValueError, match="give another --out"):
        run(folder)
