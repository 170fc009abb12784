"""Networks trained as one program do what each does alone; an interrupted run goes on with the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.paper import grid
from benchmarks.paper.mnist_tasks import Split
from benchmarks.paper.protocol import Row, run_once
from benchmarks.paper.stacked import Method, Network, StackedMLP, run_stack
from fastewc.testing import assert_within_roundings
from tests.benchmarks.test_permuted_mnist import SMALL, prototypes

NETWORKS = [Network(85.0, 0), Network(8.0, 3)]


def doubles() -> Split:
    data = prototypes()
    return Split(data.train_x.double(), data.train_y, data.test_x.double(), data.test_y)


@pytest.fixture
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "method", [Method("fisher", "stabilized"), Method("mas", "plain"), Method("signal", "wva")], ids=str
)
def test_each_network_is_as_if_alone(method: Method, double: None) -> None:
    stack = run_stack(method, NETWORKS, doubles(), protocol=SMALL)
    for s, network in enumerate(NETWORKS):
        row = Row("", method.importance, method.variant, network.ewc_lambda, 0.0, 0.0)
        alone = run_once(row, doubles(), seed=network.seed, protocol=SMALL)
        assert stack.per_task[s] == alone.per_task
        assert stack.when_learned[s] == alone.when_learned
        state = alone.adam_state["state"]  # weight, bias, weight, bias, …
        for i, moments in stack.moments.items():
            layer, is_bias = i % 3, i // 3
            wanted = state[2 * layer + is_bias]
            for key in ("exp_avg", "exp_avg_sq"):
                got = moments[key][s].reshape(wanted[key].shape)
                scale = wanted[key].abs().max().expand_as(got)
                assert_within_roundings(got, wanted[key], roundings=1e6, error_scale=scale, context=(i, key))


def test_different_seeds_and_lambdas_are_different_runs() -> None:
    found = run_stack(
        Method("si", "plain"), [Network(85.0, 0), Network(85.0, 1), Network(0.0, 0)], prototypes(), protocol=SMALL
    )
    first = found.moments[0]["exp_avg"]
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])


def test_a_network_shares_the_memory_of_the_stack() -> None:
    stack = StackedMLP([torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LeakyReLU(), torch.nn.Linear(4, 2))] * 2)
    x = torch.randn(5, 3)
    with torch.no_grad():
        stack.weights[0][1].zero_()
        torch.testing.assert_close(stack.network(1)(x), stack(x.expand(2, 5, 3))[1])
        assert not stack.network(1)[0].weight.any()


class Stopped(Exception):
    pass


@pytest.mark.parametrize("importance", ["fisher", "si"])
def test_an_interrupted_run_goes_on_with_the_same_bits(importance: str, tmp_path: Path) -> None:
    method, file = Method(importance, "stabilized"), tmp_path / "state.pt"
    whole = run_stack(method, NETWORKS, prototypes(), protocol=SMALL)

    def stop() -> None:
        if file.exists():
            raise Stopped

    with pytest.raises(Stopped):
        run_stack(method, NETWORKS, prototypes(), protocol=SMALL, checkpoint=file, after_task=stop)
    with pytest.raises(ValueError, match="other networks"):
        run_stack(method, NETWORKS[:1], prototypes(), protocol=SMALL, checkpoint=file)
    again = run_stack(method, NETWORKS, prototypes(), protocol=SMALL, checkpoint=file)
    assert again.per_task == whole.per_task
    assert again.when_learned == whole.when_learned
    for i, moments in whole.moments.items():
        assert all(torch.equal(again.moments[i][key], value) for key, value in moments.items())
    assert not file.exists()


def test_the_program_does_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(grid, "load_mnist", lambda *_, **__: prototypes())
    common = [
        "--importance", "mas", "--variant", "plain", "--tasks", "2", "--epochs", "1", "--stack", "2", "--work",
        str(tmp_path / "work"), "--out", str(tmp_path / "out.json"),
    ]  # fmt: skip
    assert grid.main([*common, "--lambdas", "9", "18", "--seeds", "2", "--adam", "fresh", "carried"]) == 0
    results = grid.Results(tmp_path / "out.json", grid.Protocol(tasks=2, epochs=1))
    assert len(results.rows) == 4
    fresh, carried = (results.accuracies(Method("mas", "plain"), 9.0, adam) for adam in ("fresh", "carried"))
    assert list(fresh) == list(carried) == [0, 1]
    capsys.readouterr()
    assert grid.main([*common, "--lambdas", "9", "--seeds", "2", "--adam", "fresh"]) == 0
    assert "stack of" not in capsys.readouterr().out  # there was nothing to do
    with pytest.raises(ValueError, match="holds runs of"):
        grid.Results(tmp_path / "out.json", grid.Protocol())


def test_carried_runs_begin_with_another_seeds_moments(tmp_path: Path) -> None:
    torch.save(
        {0: {"step": torch.tensor(7.0), "exp_avg": torch.arange(3.0), "exp_avg_sq": torch.ones(3)}}, tmp_path / "m"
    )
    found = grid.carried_on(tmp_path / "m", torch.device("cpu"))
    assert found[0]["exp_avg"].tolist() == [2.0, 0.0, 1.0]
    assert found[0]["step"] == 7
    with pytest.raises(FileNotFoundError, match="run those first"):
        grid.carried_on(tmp_path / "none", torch.device("cpu"))
