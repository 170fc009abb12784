"""The authors' runs are all there, and the luck of the best of many is found where it was put."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks.paper import authors


def curve(spread: float, points: int = 41) -> authors.Curve:
    """A parabola whose top is 0.9 at λ = 50 and which loses 0.01 at a factor of 3, measured with noise."""
    lambdas = 50 * np.geomspace(1 / 4, 4, points)
    truth = 0.9 - 0.01 * (np.log(lambdas / 50) / math.log(3)) ** 2
    noise = spread / math.sqrt(20) * np.random.default_rng(1).standard_normal(points)
    return authors.Curve(
        "fully-connected", "fisher", "plain", lambdas, truth + noise, np.full(points, spread), np.full(points, 20.0)
    )


def test_every_curve_is_read() -> None:
    found = {one.name: one for one in authors.curves()}
    assert len(found) == 13  # stabilised SIG was not run
    fisher = found["fully-connected/fisher/plain"]
    best = int(fisher.means.argmax())
    assert (fisher.lambdas[best], fisher.means[best], fisher.sds[best]) == (41.0, 0.95055, 0.00328)
    assert all((np.diff(one.lambdas) > 0).all() and (one.runs >= 10).all() for one in found.values())


def test_the_top_is_found() -> None:
    top = authors.top_of(curve(1e-6))
    assert top.best_lambda == pytest.approx(50, rel=1e-3)
    assert top.height == pytest.approx(0.9, abs=1e-5)
    assert top.width == pytest.approx(9, rel=1e-3)


def test_luck_grows_with_the_scatter_and_is_that_of_the_largest_of_many() -> None:
    generator = np.random.default_rng(0)
    small, large = (
        authors.redrawn_best(top, 4000, generator).mean() - top.height
        for top in (authors.top_of(curve(1e-5)), authors.top_of(curve(0.04)))
    )
    assert small < 1e-5
    # 41 draws of sd 0.04/√20 = 0.0089 on a curve that falls by up to 0.016: below the 0.019 of a flat one.
    assert 0.008 < large < 0.019
    assert authors.top_of(curve(0.01)).chi_square == pytest.approx(1, abs=0.6)


def test_the_program_writes_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert authors.main(["--repeats", "50", "--out", str(tmp_path / "out.json")]) == 0
    assert "convolutional/fisher/stabilized - plain" in capsys.readouterr().out
    assert len((tmp_path / "out.json").read_text()) > 1000
