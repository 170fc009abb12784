"""The paper's benchmark follows its protocol: tasks, Adam carried or fresh, importances, resuming, the verdict."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.paper import control, permuted_mnist, protocol
from benchmarks.paper.mnist_tasks import Split, load_mnist, pixel_orders
from benchmarks.paper.protocol import ROWS, Protocol, Row, run_once
from benchmarks.paper.run_store import Run, RunStore
from fastewc.testing import assert_within_roundings

SMALL = Protocol(tasks=3, epochs=2, batch=20, hidden=(16, 12), importance_samples=40)
UNPROTECTED = ROWS["unprotected"]


def prototypes(train: int = 120, test: int = 60, pixels: int = 36, classes: int = 10) -> Split:
    """A random picture per class plus noise; every label present."""
    generator = torch.Generator().manual_seed(5)
    pictures = torch.rand(classes, pixels, generator=generator)

    def part(count: int) -> tuple[Tensor, Tensor]:
        y = torch.arange(count) % classes
        return pictures[y] + 0.2 * torch.randn(count, pixels, generator=generator), y

    return Split(*part(train), *part(test))


def test_pixel_orders_are_fixed_permutations_that_start_with_the_identity() -> None:
    torch.manual_seed(1)
    orders = pixel_orders(10, 784, 1)
    torch.manual_seed(2)
    again = pixel_orders(10, 784, 1)
    assert torch.equal(orders[0], torch.arange(784))
    for k, order in enumerate(orders):
        assert torch.equal(order, again[k])
        assert torch.equal(order.sort().values, torch.arange(784))
        assert all(not torch.equal(order, other) for other in orders[:k])


def test_network_and_numbers_are_the_published_ones() -> None:
    published = Protocol()
    assert (published.tasks, published.epochs, published.batch, published.lr) == (10, 6, 100, 1e-3)
    assert published.importance_samples == 5_000
    model = protocol.build_mlp(784, published.hidden, 10)
    assert [tuple(p.shape) for p in model.parameters()] == [
        (300, 784),
        (300,),
        (150, 300),
        (150,),
        (10, 150),
        (10,),
    ]
    slopes = [layer.negative_slope for layer in model if isinstance(layer, torch.nn.LeakyReLU)]
    assert slopes == [0.01, 0.01]
    assert {name: row.ewc_lambda for name, row in ROWS.items()} == {
        "unprotected": 0.0,
        "fisher-plain-82": 82.0,
        "fisher-stabilized-85": 85.0,
        "mas-stabilized-8.5": 8.5,
        "fisher-plain-20": 20.0,
    }


def test_adam_is_never_reset_within_a_run_and_carried_only_if_asked() -> None:
    steps_per_run = SMALL.tasks * SMALL.epochs * 6
    fresh = run_once(UNPROTECTED, prototypes(), seed=0, protocol=SMALL)
    assert {float(s["step"]) for s in fresh.adam_state["state"].values()} == {steps_per_run}
    again = run_once(UNPROTECTED, prototypes(), seed=0, protocol=SMALL)
    carried = run_once(UNPROTECTED, prototypes(), seed=0, protocol=SMALL, adam_state=fresh.adam_state)
    assert {float(s["step"]) for s in carried.adam_state["state"].values()} == {2 * steps_per_run}
    for index, state in fresh.adam_state["state"].items():
        assert torch.equal(state["exp_avg"], again.adam_state["state"][index]["exp_avg"])
        assert not torch.equal(state["exp_avg"], carried.adam_state["state"][index]["exp_avg"])


def test_importances_come_from_the_last_samples_of_every_task_but_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, seen = prototypes(), []

    def spy(kind: str, model: torch.nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        seen.append((kind, model.training, x, y))
        return {name: torch.ones_like(p) for name, p in model.named_parameters()}

    monkeypatch.setattr(protocol, "measure_importance", spy)
    run_once(ROWS["fisher-plain-82"], data, seed=0, protocol=SMALL)
    assert len(seen) == SMALL.tasks - 1
    for (kind, training, x, y), order in zip(seen, pixel_orders(SMALL.tasks, 36, SMALL.permutations), strict=False):
        assert kind == "fisher" and not training
        assert torch.equal(x, data.train_x[-40:, order]) and torch.equal(y, data.train_y[-40:])


def test_protection_of_strength_zero_is_no_protection() -> None:
    bare = run_once(UNPROTECTED, prototypes(), seed=1, protocol=SMALL)
    zero = run_once(Row("zero", "fisher", "plain", 0.0, 0.0, 0.0), prototypes(), seed=1, protocol=SMALL)
    for index, state in bare.adam_state["state"].items():
        assert torch.equal(state["exp_avg"], zero.adam_state["state"][index]["exp_avg"])


@pytest.mark.parametrize(("kind", "ewc_lambda"), [("fisher", 1000.0), ("mas", 30.0)])
def test_protection_keeps_the_first_task(kind: str, ewc_lambda: float) -> None:
    data = prototypes(train=200, test=200)
    quick = Protocol(tasks=3, epochs=8, batch=20, lr=1e-2, hidden=(32, 24), importance_samples=100)
    bare = run_once(UNPROTECTED, data, seed=0, protocol=quick)
    held = run_once(Row("held", kind, "stabilized", ewc_lambda, 0.0, 0.0), data, seed=0, protocol=quick)
    assert bare.when_learned[0] == held.when_learned[0] > 0.9
    assert bare.per_task[0] < 0.5
    assert held.per_task[0] > bare.per_task[0] + 0.15
    assert held.accuracy == pytest.approx(sum(held.per_task) / 3)


@pytest.mark.parametrize("name", ["unprotected", "fisher-stabilized-85", "fisher-plain-82", "mas-stabilized-8.5"])
def test_the_control_takes_the_same_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given one start and one order of samples, a carried chain with and without fastewc is the same chain."""
    data = Split(*(t.double() if t.is_floating_point() else t for t in vars(prototypes()).values()))
    row, numbers = ROWS[name], Protocol(tasks=3, epochs=2, batch=20, hidden=(12,), importance_samples=30)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        outcome = run_once(row, data, seed=0, protocol=numbers)
        outcome = run_once(row, data, seed=1, protocol=numbers, adam_state=outcome.adam_state)
        net = protocol.build_mlp(36, numbers.hidden, 10)
        adam = torch.optim.Adam(net.parameters(), lr=control.LR)
        for seed in range(2):
            torch.manual_seed(seed)
            for layer in net[::2]:
                layer.reset_parameters()
            order, penalty = torch.Generator().manual_seed(10_000 + seed), None
            for k, pixels in enumerate(pixel_orders(numbers.tasks, 36, numbers.permutations)):
                x, y = data.train_x[:, pixels], data.train_y
                for _ in range(numbers.epochs):
                    batches = torch.randperm(len(y), generator=order).split(numbers.batch)
                    control.learn(net, adam, ((x[index], y[index]) for index in batches), penalty)
                if row.importance and k < numbers.tasks - 1:
                    stabilized = row.variant == "stabilized"
                    penalty = control.consolidate(
                        row.importance, net, x[-30:], y[-30:], row.ewc_lambda, stabilized, penalty
                    )
    finally:
        torch.set_default_dtype(before)
    wanted, steps = adam.state_dict()["state"], 2 * 3 * 2 * 6
    for i, state in outcome.adam_state["state"].items():
        assert state["step"] == wanted[i]["step"] == steps
        for moment in ("exp_avg", "exp_avg_sq"):
            # Errors of a step are passed on by the network to all its weights, and grow with the steps.
            scale = torch.full_like(wanted[i][moment], float(wanted[i][moment].abs().max()))
            assert_within_roundings(
                state[moment], wanted[i][moment], roundings=100 * steps, error_scale=scale, context=f"{i} {moment}"
            )


def test_a_carried_chain_has_a_fresh_run_in_front_of_it() -> None:
    todo = permuted_mnist.plan(["a", "b"], ["carried"], 2, set())
    assert todo == [
        Run("a", "fresh", 0),
        Run("b", "fresh", 0),
        Run("a", "carried", 0),
        Run("b", "carried", 0),
        Run("a", "carried", 1),
        Run("b", "carried", 1),
    ]
    for k, run in enumerate(todo):
        assert run.before is None or run.before in todo[:k]
    assert permuted_mnist.plan(["a"], ["fresh", "carried"], 1, {Run("a", "fresh", 0)}) == [Run("a", "carried", 0)]


def test_store_resumes_and_refuses_what_does_not_fit(tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    store = RunStore(out, work, SMALL)
    outcome = run_once(UNPROTECTED, prototypes(), seed=0, protocol=SMALL)
    store.add(Run("unprotected", "fresh", 0), outcome, {"threads": 1})

    again = RunStore(out, work, SMALL)
    assert again.accuracies("unprotected", "fresh", 5) == [outcome.accuracy]
    state = again.adam_state(Run("unprotected", "carried", 0))
    assert state is not None
    for index, saved in state["state"].items():
        assert torch.equal(saved["exp_avg_sq"], outcome.adam_state["state"][index]["exp_avg_sq"])
    assert again.adam_state(Run("unprotected", "fresh", 1)) is None
    with pytest.raises(RuntimeError, match="is missing"):
        again.adam_state(Run("unprotected", "carried", 3))
    with pytest.raises(ValueError, match="another --out"):
        RunStore(out, work, Protocol())


def test_summary_by_hand() -> None:
    row = Row("r", "fisher", "plain", 1.0, reference=0.95, reference_sd=0.004)
    s = permuted_mnist.summarise(row, "carried", [0.94, 0.95, 0.96, 0.95, 0.95])
    assert s.mean == pytest.approx(0.95)
    assert s.sd == pytest.approx(math.sqrt(2e-4 / 4))
    assert s.half_width == pytest.approx(2.7764451 * math.sqrt(2e-4 / 4) / math.sqrt(5))
    assert s.allowed == pytest.approx(3 * 0.004 * 0.5)  # 1/5 + 1/20 = 1/4
    assert s.passed
    assert not permuted_mnist.summarise(row, "carried", [0.943] * 5).passed
    assert "pass" in permuted_mnist.table([s])


def test_results_keep_every_run_and_where_it_came_from(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "out", tmp_path / "work", SMALL)
    outcome = run_once(UNPROTECTED, prototypes(), seed=0, protocol=SMALL)
    for seed in range(2):
        store.add(Run("unprotected", "carried", seed), outcome, {"threads": 1, "commit": f"c{seed}"})
    values = store.accuracies("unprotected", "carried", 2)
    (result,) = permuted_mnist.results_rows([permuted_mnist.summarise(UNPROTECTED, "carried", values)], store)
    assert result["median"] == outcome.accuracy and result["unit"] == "accuracy"
    assert result["extra"]["runs"] == values and result["extra"]["run_commits"] == ["c0", "c1"]
    assert result["machine"] and result["command"]


def write_idx(folder: Path, images: int, part: str) -> None:
    """A little MNIST in the original file format: random images, labels 0..9 in turn."""
    generator = torch.Generator().manual_seed(images)
    pixels = torch.randint(0, 256, (images, 28, 28), dtype=torch.uint8, generator=generator)
    header = struct.pack(">IIII", 2051, images, 28, 28)
    (folder / f"{part}-images-idx3-ubyte").write_bytes(header + pixels.numpy().tobytes())
    labels = (torch.arange(images) % 10).to(torch.uint8)
    (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, images) + labels.numpy().tobytes())


def test_command_runs_resumes_and_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchvision", reason="MNIST is read through torchvision (extra: bench)")
    pytest.importorskip("tqdm", reason="progress is shown with tqdm (extra: bench)")
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    write_idx(raw, 300, "train")
    write_idx(raw, 100, "t10k")
    data = load_mnist(tmp_path)
    assert data.train_x.shape == (300, 784) and float(data.train_x.max()) == 1.0

    command = [
        "--data-root",
        str(tmp_path),
        "--rows",
        "fisher-stabilized-85",
        "--seeds",
        "1",
        "--tasks",
        "2",
        "--epochs",
        "1",
        "--jobs",
        "1",
        "--out",
        str(tmp_path / "out"),
        "--work",
        str(tmp_path / "work"),
    ]
    assert permuted_mnist.main(command) == 0
    first = capsys.readouterr().out
    assert "fisher-stabilized-85" in first and "carried" in first and "fresh" in first

    def nothing_left(*_: object, **__: object) -> None:
        raise AssertionError("a finished run was repeated")

    monkeypatch.setattr(permuted_mnist, "run_all", nothing_left)
    assert permuted_mnist.main(command) == 0
    table = [line for line in first.splitlines() if line.startswith("fisher") and ":" not in line]
    assert len(table) == 2
    second = capsys.readouterr().out
    assert all(line in second for line in table)


def test_no_data_folder_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTEWC_DATA", raising=False)
    with pytest.raises(ValueError, match="--data-root"):
        load_mnist(None)
