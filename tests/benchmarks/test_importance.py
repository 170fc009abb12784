"""The benchmark of importances: it refuses what is wrong or incomplete, names the reason, and times the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from benchmarks import peak_memory
from benchmarks.importance import exact, memory, peers
from benchmarks.importance.contenders import QUANTITIES, Job, Run, Sums, batch_one, ours, plain, vmap_grad
from benchmarks.importance.gate import Gate
from benchmarks.importance.layer_hooks import NAME as HOOKS
from benchmarks.importance.layer_hooks import hooked, pair_sum, single_sum
from benchmarks.importance.registry import PLAIN, builders
from benchmarks.importance.rows import rows_of
from benchmarks.importance.workloads import DEFAULTS, SPECS, Batch, Missing, Spec, Workload, chunks, gpt2, make, texts
from benchmarks.paper import fc_run
from benchmarks.paper.mnist_tasks import Split
from benchmarks.paper.protocol import Protocol, build_mlp

BY_HAND = partial(hooked, compile_seconds=0.0, functions=(pair_sum, single_sum))


class Residual(nn.Module):
    """A convolution with a stride and one with a dilation, batch norm, an addition, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, padding=2, dilation=2, bias=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.first(x)))
        return self.head((x + self.second(x)).mean((2, 3)))


def drawn(shape: tuple[int, ...], samples: int, data_root: str | None) -> tuple[Batch, str]:
    return (torch.randn(samples, *shape), torch.randint(3, (samples,))), "random"


TINY = {
    "mlp": Spec(partial(build_mlp, 12, (8,), 3), partial(drawn, (12,)), 10, 4),
    "conv": Spec(Residual, partial(drawn, (2, 7, 6)), 6, 4),
    "gpt2": Spec(partial(gpt2, 2, 8, 2, 13, 6), partial(texts, 6, 13), 6, 4),
}


@pytest.fixture(params=TINY)
def workload(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Workload:
    if request.param == "gpt2":
        pytest.importorskip("transformers", reason="needs transformers, which is not installed")
    return tiny(request.param, monkeypatch)


def tiny(name: str, monkeypatch: pytest.MonkeyPatch) -> Workload:
    monkeypatch.setitem(SPECS, f"tiny-{name}", TINY[name])
    return make(f"tiny-{name}", "cpu", None)


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_the_gate_lets_everyone_through_that_is_right(workload: Workload, quantity: str) -> None:
    gate = Gate(Job(workload, QUANTITIES[quantity]))
    for build in (batch_one, vmap_grad, ours):
        assert gate.check("right", build) == 1.0
    share = gate.check("by hand", BY_HAND, part=True)
    assert share == 1.0 if workload.name == "tiny-mlp" else 0.3 < share < 1.0


def wrong(job: Job, how: str) -> Run:
    """The right result, but for one thing."""
    right, model, quantity = batch_one(job), job.model, job.quantity

    def run(batches: Sequence[Batch]) -> Mapping[str, Tensor]:
        if how == "square of the batch's mean":
            sums = Sums(model)
            for x, y in batches:
                gradients = torch.autograd.grad(job.value(model, x, y) / len(x), list(model.parameters()))
                for total, g in zip(sums.total.values(), gradients, strict=True):
                    total.add_(quantity.summed(g[None]), alpha=len(x))
                sums.samples += len(x)
            return sums.mean()
        found = dict(right(batches))
        last = list(found)[-1]
        if how == "last batch only":
            return right(batches[-1:])
        if how == "one parameter missing":
            found.pop(last)
        elif how == "one element":
            flat = found[last].view(-1)
            flat[flat.argmin()] *= 1 + 1e-6 if flat.dtype == torch.float64 else 1
        else:
            found[last] = found[last] * (1 + 1e-3)
        return found

    return run


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize(
    "how",
    [
        "square of the batch's mean",
        "last batch only",
        "one parameter missing",
        "one element",
        "a tenth of a percent",
    ],
)
def test_the_gate_refuses_what_is_wrong(how: str, quantity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(Job(tiny("mlp", monkeypatch), QUANTITIES[quantity]))
    with pytest.raises(
        AssertionError, match="nothing for 1 of 4" if "missing" in how else "outside the rounding bound"
    ):
        gate.check("wrong", partial(wrong, how=how))


def test_who_gives_a_part_must_say_so_and_give_something(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(Job(tiny("mlp", monkeypatch), QUANTITIES["fisher"]))
    assert gate.check("part", partial(wrong, how="one parameter missing"), part=True) < 1
    with pytest.raises(AssertionError, match="nothing for 4 of 4"):
        gate.check("nothing", plain, part=True)


def test_rows_of_those_that_run_and_of_those_that_fail(workload: Workload, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {
        row["extra"]["contender"]: row
        for row in rows_of(workload, "fisher", seconds=0.0, compile_seconds=0.0, memory=False)
    }
    printed = capsys.readouterr().out
    assert list(rows) == list(builders(QUANTITIES["fisher"], 0.0))
    assert rows[HOOKS]["extra"]["failed"] == "NotImplementedError: no time to compile was given"
    for name, row in rows.items():
        assert row["suite"] == "importance" and row["extra"]["workload"] == workload.name
        assert name in printed
        if "failed" in row["extra"]:
            assert (row["median"], row["unit"]) == (0, "calls")
            assert row["extra"]["failed"] in printed
        else:
            assert row["median"] > 0 and row["extra"]["ratio"] > 0 and row["extra"]["calls"] >= 3
    assert rows[PLAIN]["extra"]["ratio"] == 1.0
    for name in ("fastewc.fisher_importance", "batch-1 loop", "vmap(grad)"):
        assert "failed" not in rows[name]["extra"]
    assert sum(rows["fastewc.fisher_importance"]["extra"]["paths"].values()) == len(list(workload.model.parameters()))


def test_a_peer_that_is_right_passes_and_one_that_is_absent_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(Job(tiny("mlp", monkeypatch), QUANTITIES["fisher"]))
    for peer in (peers.backpack, peers.opacus):
        try:
            assert gate.check("peer", peer) == 1.0
        except Missing as error:
            assert "is not installed" in str(error)


def test_who_keeps_gradients_of_samples_takes_no_more_than_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = tiny("mlp", monkeypatch)
    job = Job(workload, QUANTITIES["fisher"])
    monkeypatch.setattr("benchmarks.importance.contenders.KEPT", {"cpu": 3 * 4 * workload.weights})
    assert job.chunk == 3
    assert [len(x) for x, _ in chunks(workload.batches, job.chunk)] == [3, 1, 3, 1, 2]


def test_every_workload_has_its_place() -> None:
    assert set(DEFAULTS["cpu"]) | set(DEFAULTS["cuda"]) == set(SPECS)
    assert all(spec.samples % spec.batch == 0 for spec in SPECS.values())


def test_text_is_read_as_words_and_shifted_by_one(tmp_path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("the cat, the dog. the end " * 3)
    (x, y), source = texts(4, 6, 3, str(tmp_path))
    assert source == "a.txt" and x.shape == y.shape == (3, 4)
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert x[0, 0] == x[0, 3] == 1 and x.max() < 6 and x.min() >= 0


@pytest.mark.skipif(not peak_memory.CLEAR.exists(), reason="the high-water mark is read from Linux's /proc")
def test_peak_memory_is_that_of_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(tiny("mlp", monkeypatch), QUANTITIES["fisher"])
    held = torch.ones(64 << 18)  # 64 MiB that lie there before

    def greedy(job: Job) -> Run:
        def run(batches: Sequence[Batch]) -> dict[str, Tensor]:
            if len(batches) > 2:  # not in the rehearsal
                (held + 1).sum()
            return {}

        return run

    peak = memory.own_peak(greedy, job)
    if peak is None:
        pytest.skip("this system does not let the high-water mark be set back")
    assert 60 << 20 < peak < 100 << 20


def test_the_fc_run_trains_both_sides_alike(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(3)
    data = Split(torch.rand(60, 12), torch.arange(60) % 3, torch.rand(30, 12), torch.arange(30) % 3)
    protocol = Protocol(tasks=2, epochs=2, batch=20, hidden=(6,), importance_samples=20)
    starts = [
        torch.cat([p.detach().flatten() for p in side.model.parameters()])
        for side in fc_run.both_sides(data, 0, protocol)
    ]
    assert torch.equal(*starts)
    one, other, reached = fc_run.run_side_by_side(data, seed=0, protocol=protocol)
    assert (len(one.epochs), len(other.epochs), len(one.importances), len(other.importances)) == (4, 4, 0, 1)
    assert torch.equal(one.order.get_state(), other.order.get_state())
    assert other.ewc is not None and other.ewc.num_tasks == 1
    rows = {row["name"]: row for row in fc_run.rows_of(one, other, reached, {"seed": 0})}
    whole, training, importances = (
        rows[f"fc_run/{name}"]["median"] for name in ("whole run", "training", "importances")
    )
    assert whole == pytest.approx(training + importances)
    assert whole == pytest.approx(other.seconds / one.seconds)
    assert "whole run" in capsys.readouterr().out


def test_the_check_of_whole_models_finds_one_wrong_element(monkeypatch):
    workload = tiny("mlp", monkeypatch)
    assert exact.check(workload, QUANTITIES["fisher"], 6) == [1, 5, 6]
    right = exact.ours

    def wrong(job):
        def run(batches):
            found = right(job)(batches)
            next(iter(found.values())).view(-1)[3] *= 1.01
            return found

        return run

    monkeypatch.setattr(exact, "ours", wrong)
    with pytest.raises(AssertionError, match=r"1 of \d+ elements outside"):
        exact.check(workload, QUANTITIES["mas"], 6)
