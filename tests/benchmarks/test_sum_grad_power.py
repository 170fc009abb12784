"""The benchmark of sum_grad_power: contenders must be right, and each of them gets a row."""

import pytest
import torch

from benchmarks.ops import sum_grad_power as benchmark
from fastewc.ops.sum_grad_power.cases import ConvCase, SegmentsCase

CASES = [SegmentsCase(5, (3,), 7, 4), ConvCase(3, 4, 6, (5, 5), (3, 3), padding=1)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_everyone_gets_a_row(case, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(benchmark, "PEAK", 8)
    rows = list(benchmark.rows_of("tiny", case, torch.float32, "cpu", seconds=0.0))
    names = [row["extra"]["contender"] for row in rows]
    assert names == ["weight gradient", *benchmark.available(torch.device("cpu")), "bmm + square + sum"]
    assert rows[0]["extra"]["ratio_to_weight_gradient"] == 1
    assert all(row["median"] > 0 for row in rows)


def test_who_is_wrong_is_not_timed():
    case = CASES[0]
    total, _ = case.make_inputs(torch.float32)
    sloppy = benchmark.Contender("sloppy", lambda: 1.001 * case.run("reference", torch.float32)[0])
    with pytest.raises(AssertionError, match=r"label sloppy .* outside the rounding bound"):
        benchmark.check("label", case, [sloppy], torch.float32, total)


def test_every_layer_has_a_name_of_its_own():
    layers = [(model, case.id) for model, case in benchmark.layers("cpu")]
    assert len(set(layers)) == len(layers)
