"""Networks trained as one program do what each does alone; an interrupted run goes on with the same bits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fastewc
from benchmarks.paper import command_line, fc
from benchmarks.paper.mnist_tasks import Split, pixel_orders
from benchmarks.paper.protocol import Row, build_mlp, measure_importance, run_once
from benchmarks.paper.stacked import Method, Network, StackedMLP, Training, run_stack
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
                assert_within_roundings(got, wanted[key], roundings=1e6, error_scale=scale, context=f"{i} {key}")


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


def reference(training: Training, ewc_lambda: float) -> torch.optim.Optimizer:
    """One network of seed 0 in a plain loop: torch's SGD, and the penalty in the loss or in fastewc's step."""
    data, generator = doubles(), torch.Generator().manual_seed(10_000)
    torch.manual_seed(0)
    model = build_mlp(36, SMALL.hidden, 10)
    ewc = fastewc.EWC(model, ewc_lambda=ewc_lambda, variant="stabilized")
    norm = None if training.clip_sum else training.clip
    optimizer: Any = fastewc.optim.SGD(
        model.parameters(), lr=0.05, momentum=0.9, max_grad_norm=norm, ewc=None if training.by_loss else ewc
    )
    for k, pixels in enumerate(pixel_orders(SMALL.tasks, 36, SMALL.permutations)):
        task, step = data.permuted(pixels), 0
        for _ in range(SMALL.epochs):
            for index in torch.randperm(120, generator=generator).split(SMALL.batch):
                optimizer.param_groups[0]["lr"] = lr = (
                    0.025 * (1 + math.cos(math.pi * step / 12)) if training.cosine else 0.05
                )
                loss = torch.nn.functional.cross_entropy(model(task.train_x[index]), task.train_y[index])
                if training.by_loss:
                    loss = loss + ewc.penalty(0.05 if training.fixed_alpha else lr)
                optimizer.zero_grad()
                loss.backward()
                if training.clip_sum and training.clip is not None:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip)
                optimizer.step()
                step += 1
        if k < SMALL.tasks - 1:
            last = slice(-SMALL.importance_samples, None)
            ewc.consolidate(measure_importance("fisher", model.eval(), task.train_x[last], task.train_y[last]))
            model.train()
    return optimizer


@pytest.mark.parametrize(
    "training",
    [
        Training("momentum"),
        Training("momentum", clip=0.3),
        Training("momentum", clip=0.3, clip_sum=True),
        Training("momentum", cosine=True),
        Training("momentum", cosine=True, fixed_alpha=True),
    ],
    ids=["sgd", "clip task", "clip sum", "live alpha", "fixed alpha"],
)
def test_other_ways_to_train_are_those_of_a_plain_loop(training: Training, double: None) -> None:
    protocol = replace(SMALL, lr=0.05)
    stack = run_stack(
        Method("fisher", "stabilized"), [Network(300.0, 0), Network(3.0, 1)], doubles(), protocol=protocol,
        training=training,
    )  # fmt: skip
    wanted = [state["momentum_buffer"] for state in reference(training, 300.0).state.values()]  # weight, bias, …
    for i, moments in stack.moments.items():
        alone = wanted[2 * (i % 3) + i // 3]
        got = moments["momentum_buffer"][0].reshape(alone.shape)
        assert_within_roundings(got, alone, roundings=1e6, error_scale=alone.abs().max().expand_as(got), context=str(i))


def test_a_network_that_diverges_is_noted_and_leaves_the_others_alone(double: None) -> None:
    protocol, training = replace(SMALL, lr=0.5), Training("sgd")
    found = run_stack(
        Method("fisher", "plain"), [Network(1e9, 0), Network(1.0, 1)], doubles(), protocol=protocol, training=training
    )
    assert found.diverged[0] in (1, 2)
    assert found.diverged[1] is None
    assert found.stiffest[0] > 2 > found.stiffest[1]
    alone = run_stack(Method("fisher", "plain"), [Network(1.0, 1)], doubles(), protocol=protocol, training=training)
    assert found.per_task[1] == alone.per_task[0]


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
    monkeypatch.setattr(command_line, "load_mnist", lambda *_, **__: prototypes())
    common = [
        "--importance", "mas", "--variant", "plain", "--tasks", "2", "--epochs", "1", "--stack", "2", "--work",
        str(tmp_path / "work"), "--out", str(tmp_path / "out.json"),
    ]  # fmt: skip
    assert fc.main([*common, "--lambdas", "9", "18", "--seeds", "2", "--adam", "fresh", "carried"]) == 0
    results = fc.Results(tmp_path / "out.json", fc.Protocol(tasks=2, epochs=1))
    assert len(results.rows) == 4
    fresh, carried = (results.accuracies(Method("mas", "plain"), 9.0, adam) for adam in ("fresh", "carried"))
    assert list(fresh) == list(carried) == [0, 1]
    capsys.readouterr()
    assert fc.main([*common, "--lambdas", "9", "--seeds", "2", "--adam", "fresh"]) == 0
    assert "stack of" not in capsys.readouterr().out  # there was nothing to do
    with pytest.raises(ValueError, match="holds runs of"):
        fc.Results(tmp_path / "out.json", fc.Protocol())


def test_carried_runs_begin_with_another_seeds_moments(tmp_path: Path) -> None:
    torch.save(
        {0: {"step": torch.tensor(7.0), "exp_avg": torch.arange(3.0), "exp_avg_sq": torch.ones(3)}}, tmp_path / "m"
    )
    found = fc.carried_on(tmp_path / "m", torch.device("cpu"))
    assert found[0]["exp_avg"].tolist() == [2.0, 0.0, 1.0]
    assert found[0]["step"] == 7
    with pytest.raises(FileNotFoundError, match="run those first"):
        fc.carried_on(tmp_path / "none", torch.device("cpu"))
