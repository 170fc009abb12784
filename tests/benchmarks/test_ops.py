"""The benchmark of the protected step: it refuses what is wrong, and times the rest in turns."""

import math
from dataclasses import replace

import pytest

from benchmarks.ops.ewc_step import Gate, rows_of
from benchmarks.ops.ewc_step_contenders import ADAMW, Board, Contender, builders, fastewc_step, protected
from benchmarks.ops.model_shapes import MODELS
from benchmarks.results_row import measure_in_turn

SHAPES = [(30, 7), (), (5, 4, 3, 3), (1,)]


def test_the_models_have_their_published_sizes():
    sizes = {model: sum(math.prod(shape) for shape in shapes) for model, shapes in MODELS.items()}
    assert sizes == {"mlp": 282_160, "resnet18": 11_689_512, "gpt2": 124_439_808}


def test_everyone_has_a_turn_in_every_round_and_prepares_it():
    done: list[str] = []
    pairs = [(lambda name=name: done.append(f"prepare {name}"), lambda name=name: done.append(name)) for name in "ab"]
    times = measure_in_turn(pairs, seconds=0.0)
    assert [len(own) for own in times] == [5, 5]
    assert sorted(done) == sorted(["prepare a", "a", "prepare b", "b"] * 6)
    assert all(done[i] == f"prepare {done[i + 1]}" for i in range(0, len(done), 2))


@pytest.fixture
def gate() -> Gate:
    board = Board(SHAPES, "cpu")
    board.drift()
    return Gate(board)


def right_step(gate: Gate) -> Contender:
    """Made anew for each check, since the gate judges the fourth step."""
    return fastewc_step(ADAMW, "stabilized", "reference", gate.board)


def test_the_gate_lets_the_right_step_through_and_refuses_one_that_is_slightly_wrong(gate: Gate):
    gate.check("right", right_step(gate))
    for change in ({"ewc_lambda": 10.001}, {"variant": "plain"}, {"lr": 1.0001e-3}):
        sloppy = replace(right_step(gate), rule=replace(protected(ADAMW, "stabilized"), **change))
        with pytest.raises(AssertionError, match=r"sloppy: .* outside the rounding bound"):
            gate.check("sloppy", sloppy)


def test_the_gate_refuses_who_spoils_the_task_gradient(gate: Gate):
    contender = right_step(gate)

    def call() -> None:
        contender.call()
        gate.board.grads[0].zero_()

    with pytest.raises(AssertionError, match="careless changed the task's gradient"):
        gate.check("careless", replace(contender, call=call))


def test_every_contender_that_runs_here_passes_and_gets_a_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(MODELS, "tiny", SHAPES)
    rows = list(rows_of("tiny", "cpu", seconds=0.0, compile_seconds=0.0))
    timed = {row["extra"]["contender"]: row for row in rows if "contender" in row["extra"]}
    printed = capsys.readouterr().out
    assert all((name in timed) != (name in printed.partition("CPU threads")[0]) for name in builders(0.0))
    assert "torch.compile of penalty + AdamW" not in timed
    assert timed["torch AdamW fused"]["extra"]["ratio"] == 1.0
    assert timed["torch AdamW fused"]["extra"]["bytes_per_weight"] == 28
    assert timed["ewc.attach(torch AdamW fused)"]["extra"]["bytes_per_weight"] == 36
    assert timed["foreach penalty + SGD fused"]["extra"]["bytes_per_weight"] == 28
    assert all(row["median"] > 0 for row in rows)
