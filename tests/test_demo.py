"""The demo runs, draws a real picture, prints numbers that agree with each other, and shows what it promises."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn", reason="the demo needs scikit-learn (extra: demo)")
pytest.importorskip("matplotlib", reason="the demo needs matplotlib (extra: demo)")
pytest.importorskip("tqdm", reason="the demo needs tqdm (extra: demo)")

from matplotlib import image

from fastewc import demo


def rows_of(printed: str, tasks: int) -> dict[str, list[float]]:
    """Method name → accuracies per task, mean and forgetting, in %, from the printed table."""
    rows = {}
    for line in printed.splitlines():
        name, cells = line[:16].strip(), line[16:].split()
        if name in {method.name for method in demo.METHODS}:
            rows[name] = [float(cell) for cell in cells[: tasks + 2]]
    return rows


def test_main_draws_a_picture_and_prints_a_consistent_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo.png"
    random_state = torch.get_rng_state()
    assert demo.main(["--quick", "--seed", "3", "--out", str(out)]) == 0
    assert torch.equal(torch.get_rng_state(), random_state)

    picture = image.imread(out)
    assert picture.shape[0] > 300 and picture.shape[1] > 600
    colours = {tuple(pixel) for pixel in picture.reshape(-1, picture.shape[2])[::7].round(2).tolist()}
    assert len(colours) > 50  # lines, shades and text, not an empty canvas

    rows = rows_of(capsys.readouterr().out, tasks=2)
    assert list(rows) == [method.name for method in demo.METHODS]
    for name, (*per_task, mean, _) in rows.items():
        assert all(0 <= accuracy <= 100 for accuracy in per_task), name
        # One decimal is printed: every task and the mean itself may be off by half of the last digit.
        assert abs(mean - sum(per_task) / len(per_task)) <= 0.1 + 1e-9, name


def test_forgetting_is_the_loss_since_each_task_was_learned() -> None:
    result = demo.Result(demo.METHODS[0], [[0.5, 0.75, 0.5, 0.25], [math.nan, math.nan, 0.5, 1.0]], epochs=2)
    result.final = [0.25, 1.0]
    assert result.forgetting == 0.5
    assert result.mean == 0.625


def test_equal_seeds_give_equal_numbers() -> None:
    methods = [demo.METHODS[0], demo.METHODS[3]]
    first, second = (demo.run(methods, tasks=2, epochs=1, seed=1) for _ in range(2))
    assert [r.final for r in first] == [r.final for r in second]


def test_the_network_forgets_and_protection_helps() -> None:
    """Three of the demo's five tasks are enough to see it."""
    bare, held = demo.run([demo.METHODS[0], demo.METHODS[3]], tasks=3, epochs=6, seed=0)
    learned = bare.curves[0][bare.epochs - 1]
    assert learned == held.curves[0][held.epochs - 1] > 0.90  # nothing differs before the first task is over
    assert bare.final[0] < 0.70
    assert held.final[0] >= bare.final[0] + 0.15
    assert held.mean > bare.mean and held.forgetting < bare.forgetting


def test_a_missing_package_is_named_before_any_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "run", lambda *_, **__: pytest.fail("trained before it looked"))
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else name)
    with pytest.raises(ImportError, match=r"matplotlib.*fastewc\[demo\]"):
        demo.main(["--out", str(tmp_path / "demo.png")])


def test_too_few_tasks_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        demo.main(["--tasks", "1"])
    assert "at least 2 tasks" in capsys.readouterr().err
