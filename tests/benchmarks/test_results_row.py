"""The row format that every published number has."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.results_row import Timing, measure, row, write


def test_a_row_names_machine_versions_commit_and_command(tmp_path: Path) -> None:
    one = row("ops", "copy", Timing(2.0, 1.0, 3.0, 7), impl="native")
    assert (one["median"], one["p20"], one["p80"], one["unit"]) == (2.0, 1.0, 3.0, "s")
    assert one["extra"] == {"calls": 7, "impl": "native"}
    assert one["torch"] == torch.__version__
    for key in ("suite", "name", "machine", "cpu", "gpu", "driver", "triton", "python", "fastewc", "commit", "command"):
        assert key in one
    write(tmp_path / "new" / "rows.json", [one])
    assert json.loads((tmp_path / "new" / "rows.json").read_text()) == [one]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["rows.json"]


def test_a_single_value_is_its_own_percentiles() -> None:
    one = row("paper", "accuracy", value=0.9, unit="accuracy")
    assert (one["median"], one["p20"], one["p80"], one["unit"]) == (0.9, 0.9, 0.9, "accuracy")
    with pytest.raises(ValueError, match="paper/accuracy wants either a timing or a value"):
        row("paper", "accuracy")


def test_measure_warms_up_and_times_at_least_five_calls() -> None:
    calls: list[int] = []
    timing = measure(lambda: calls.append(1), seconds=0.0, warmup=2)
    assert (timing.calls, len(calls)) == (5, 7)
    assert 0 <= timing.p20 <= timing.median <= timing.p80
