"""The report's CNN: its network, its three ways, and one penalty that equals the sum of the separate ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import fastewc
from benchmarks.paper import cnn_report, plot
from benchmarks.paper.cnn_report import Setup, build_cnn, protection, run_way, separate_penalties
from benchmarks.paper.conv_run import as_images
from benchmarks.paper.mnist_tasks import Split, pixel_orders
from fastewc.testing import assert_within_roundings
from tests.benchmarks.test_permuted_mnist import prototypes

SMALL = Setup(tasks=3, epochs=6, train_samples=300, width=48, dropout=1.0, batch=20, lr=3e-3, ewc_lambda=2e3)


def tasks(setup: Setup = SMALL) -> list[Split]:
    data = prototypes(train=setup.train_samples, test=40)
    return [as_images(data.permuted(one)) for one in pixel_orders(setup.tasks, 36, 1)]


def test_the_network_is_the_reports() -> None:
    model = build_cnn(28, 1024, 1.0, 10).eval()
    wanted = [(64, 1, 3, 3), (1024, 64 * 14 * 14), (1024, 1024), (10, 1024)]
    assert [tuple(p.shape) for p in model.parameters() if p.ndim > 1] == wanted
    assert [layer.p for layer in model if isinstance(layer, torch.nn.Dropout)] == [0.2, 0.5, 0.5]
    assert model(torch.rand(2, 1, 28, 28)).shape == (2, 10)


def test_one_penalty_equals_the_separate_ones() -> None:
    torch.manual_seed(0)
    model = build_cnn(6, 12, 0.0, 10).double()
    every, last = (protection(model, gamma, 200.0) for gamma in (1.0, 0.0))
    assert every is not None and last is not None
    remembered = []
    for _ in range(3):
        found = fastewc.Importance(
            {name: torch.rand_like(p) for name, p in model.named_parameters()}, num_samples=1, method="given"
        )
        every.consolidate(found)
        last.consolidate(found)
        remembered.append((list(found.values()), [p.detach().clone() for p in model.parameters()]))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.1)
    parameters = list(model.parameters())
    for ewc, terms in ((every, remembered), (last, remembered[-1:])):
        sum_of_terms = separate_penalties(model, terms, 200.0)
        assert isinstance(sum_of_terms, torch.Tensor)
        wanted = torch.autograd.grad(sum_of_terms, parameters)
        got = torch.autograd.grad(ewc.penalty(), parameters)
        for one, other in zip(got, wanted, strict=True):
            scale = torch.full_like(other, 200.0 * 3)  # λΣΩ|w − w_k|, with |w − w_k| of about 1 at most
            assert_within_roundings(one, other, roundings=100, error_scale=scale, context="gradient")


def test_the_three_ways_differ_from_the_task_on_that_their_penalties_do() -> None:
    none, every, last = (run_way(gamma, tasks(), SMALL) for gamma in cnn_report.WAYS.values())
    for history in (none, every, last):
        assert [len(one) for one in history] == [1] * 6 + [2] * 6 + [3] * 6
        assert history[:6] == none[:6]  # no penalty before the second task
        assert history[5][0] > 0.5
    assert every[6:12] == last[6:12]  # one task to remember is the last task
    assert every[12:] != last[12:]
    assert every[11][0] > none[11][0] + 0.1  # and is held


def test_the_program_writes_what_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cnn_report, "load_mnist", lambda *_, **__: prototypes(train=100, test=40))
    file = tmp_path / "machine" / "paper_cnn_report.json"
    words = [
        "--tasks", "2", "--epochs", "1", "--train-samples", "60", "--width", "8", "--batch", "20", "--seconds", "0.01",
        "--out", str(file),
    ]  # fmt: skip
    assert cnn_report.main(words) == 0
    rows = json.loads(file.read_text())
    names = [f"cnn_report/{way}" for way in cnn_report.WAYS]
    names += [cnn_report.time_name(k, separate=False) for k in range(3)]
    names += [cnn_report.time_name(k, separate=True) for k in (1, 2)]
    assert [one["name"] for one in rows] == names
    assert rows[3]["median"] == 1  # a step without tasks, over itself
    assert cnn_report.main(words) == 0  # nothing is missing
    assert json.loads(file.read_text()) == rows
    assert plot.main(["--results", str(tmp_path), "--out", str(tmp_path / "figures")]) == 0
    assert (tmp_path / "figures" / "machine" / "paper_cnn_report.png").stat().st_size > 0
    with pytest.raises(SystemExit):
        cnn_report.main(["--epochs", "1"])
