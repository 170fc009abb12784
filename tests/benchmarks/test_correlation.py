"""Correlations of importances are scipy's, each task has its own SI path, and the program writes what it says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy import stats

import fastewc
from benchmarks.paper import command_line, correlation, plot
from benchmarks.paper.protocol import ROWS, measure_importance, run_once
from benchmarks.paper.pruning import trained
from tests.benchmarks.test_permuted_mnist import SMALL, prototypes
from tests.benchmarks.test_stacked import double, doubles  # noqa: F401 (a fixture)


def importances() -> dict[str, torch.Tensor]:
    """Related, unrelated and opposed ones, with ties, over several decades."""
    generator = torch.Generator().manual_seed(2)
    base = torch.randn(12, 16, generator=generator).exp()
    other = torch.rand(12, 16, generator=generator)
    return {"fisher": base**2, "mas": base * (1 + other), "si": (other * 8).round(), "signal": 1e-3 / base}


def test_the_numbers_are_scipys() -> None:
    arrays = {name: one.flatten().double().numpy() for name, one in importances().items()}
    arrays["mas²"] = arrays["mas"] ** 2
    found = correlation.correlations(importances())
    assert len(found) == 2 * len(correlation.PAIRS)
    for a, b in correlation.PAIRS:
        assert found["pearson", a, b] == pytest.approx(stats.pearsonr(arrays[a], arrays[b])[0], abs=1e-12)
        assert found["spearman", a, b] == pytest.approx(stats.spearmanr(arrays[a], arrays[b])[0], abs=1e-12)
    assert found["spearman", "fisher", "signal"] == pytest.approx(-1)
    assert found["pearson", "fisher", "signal"] > -0.9


def test_what_is_the_same_everywhere_correlates_with_nothing() -> None:
    with pytest.raises(ValueError, match=r"signal of 192 weights is 7\.0 everywhere"):
        correlation.correlations(importances() | {"signal": torch.full((12, 16), 7.0)})


@pytest.mark.usefixtures("double")
def test_each_task_has_its_own_path_and_the_runs_are_protected(monkeypatch: pytest.MonkeyPatch) -> None:
    data, steps, si = doubles(), [], fastewc.si_importance

    def spy(*args, **options):
        found = si(*args, **options)
        steps.append(found.num_samples)
        return found

    monkeypatch.setattr(fastewc, "si_importance", spy)
    long = replace(SMALL, epochs=4, lr=1e-2)  # long enough for the penalty to matter
    found, accuracy = correlation.run([0, 3], data, long)
    assert steps == [long.epochs * len(data.train_y) // long.batch] * long.tasks
    assert [len(task) for task in found] == [3] * long.tasks and all(len(layer) == 2 for layer in found[0])
    alone = {
        row: sum(run_once(row, data, seed=seed, protocol=long).accuracy for seed in (0, 3)) / 2
        for row in (correlation.PROTECTION, ROWS["unprotected"])
    }
    assert accuracy == pytest.approx(alone[correlation.PROTECTION], abs=1e-12) != alone[ROWS["unprotected"]]


def test_the_first_tasks_numbers_come_from_the_networks_importances() -> None:
    data = prototypes()
    found, _ = correlation.run([0, 3], data, SMALL)
    model, si = trained([0, 3], data, SMALL)  # the first task, unprotected as here
    for s in range(2):
        alone = model.network(s)
        measured = {
            kind: measure_importance(kind, alone, data.train_x[-40:], data.train_y[-40:])
            for kind in ("fisher", "mas", "signal")
        }
        for layer in range(3):
            arrays = {kind: one[f"{2 * layer}.weight"] for kind, one in measured.items()}
            arrays["si"] = si[f"weights.{layer}"][s]
            numpy = {kind: one.flatten().double().numpy() for kind, one in arrays.items()}
            for a, b in (("fisher", "mas"), ("mas", "si"), ("si", "signal")):
                assert found[0][layer][s]["pearson", a, b] == pytest.approx(
                    stats.pearsonr(numpy[a], numpy[b])[0], abs=1e-6
                )


def test_the_program_writes_every_value_and_the_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command_line, "load_mnist", lambda *_, **__: prototypes())
    out = tmp_path / "machine" / "paper_correlation.json"
    assert correlation.main(["--seeds", "2", "--tasks", "2", "--epochs", "1", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())
    assert [one["name"] for one in rows] == [
        f"correlation/{coefficient}/{a}-{b}/layer {layer}"
        for coefficient in ("pearson", "spearman")
        for a, b in correlation.PAIRS
        for layer in (1, 2, 3)
    ]
    for one in rows:
        runs = torch.tensor(one["extra"]["runs"], dtype=torch.float64)
        assert runs.shape == (2, 2) and runs.abs().max() <= 1 + 1e-9
        assert one["extra"]["tasks"] == pytest.approx(runs.mean(0).tolist())
        assert one["median"] == pytest.approx(runs.mean().item())
    by_name = {one["name"]: one for one in rows}
    squared = by_name["correlation/spearman/fisher-mas²/layer 2"]
    assert squared["median"] == pytest.approx(by_name["correlation/spearman/fisher-mas/layer 2"]["median"])
    printed = capsys.readouterr().out
    assert all("-".join(pair) in printed for pair in correlation.PAIRS)
    assert plot.main(["--results", str(tmp_path), "--out", str(tmp_path / "figures")]) == 0
    assert (tmp_path / "figures" / "machine" / "paper_correlation.png").stat().st_size > 10_000
