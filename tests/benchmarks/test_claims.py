"""The program of the paper's claims: its parts, what is kept between calls, and the figures of all stacked runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.paper import claims, command_line, fc, plot
from tests.benchmarks.test_permuted_mnist import prototypes


def test_parts_have_names_of_their_own() -> None:
    names = [
        part.name(ewc_lambda)
        for experiment in ("explosion", "clipping", "schedule")
        for part in claims.parts(experiment)
        for ewc_lambda in part.lambdas
    ]
    assert len(set(names)) == len(names)
    assert "claims/clipping/plain/momentum/clip sum 0.1/100" in names
    assert "claims/schedule/stabilized/adam/cosine, fixed alpha/10" in names


def test_the_program_finds_what_explodes_and_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command_line, "load_mnist", lambda *_, **__: prototypes())
    monkeypatch.setattr(command_line, "load_mnist", lambda *_, **__: prototypes())
    monkeypatch.setattr(claims, "SHORT", claims.replace(claims.SHORT, batch=20, hidden=(16, 12), importance_samples=40))
    out = tmp_path / "m" / "paper_claims.json"
    short = ["--tasks", "2", "--epochs", "3", "--seeds", "1", "--out", str(out)]
    assert claims.main(["--experiment", "explosion", *short]) == 0
    rows = {one["name"]: one["extra"] for one in json.loads(out.read_text())}
    plain, bounded = (rows[f"claims/explosion/{variant}/sgd/1e+06"] for variant in ("plain", "stabilized"))
    assert plain["diverged"] == [1]
    assert bounded["diverged"] == [None]
    assert bounded["largest_alpha_lambda_omega"][0] > 2
    capsys.readouterr()
    assert claims.main(["--experiment", "explosion", *short]) == 0
    assert "diverged" not in capsys.readouterr().out  # there was nothing to do

    few = ["--importance", "mas", "--variant", "plain", "--lambdas", "9", "--seeds", "2", "--adam", "fresh"]
    work = ["--tasks", "2", "--epochs", "1", "--work", str(tmp_path / "w"), "--out", str(tmp_path / "m/paper_fc.json")]
    assert fc.main([*few, *work]) == 0
    assert plot.main(["--results", str(tmp_path), "--out", str(tmp_path / "drawn")]) == 0
    assert {file.name for file in (tmp_path / "drawn" / "m").iterdir()} == {"paper_claims.png", "paper_fc.png"}
