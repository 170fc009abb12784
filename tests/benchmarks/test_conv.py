"""The convolutional half of the paper: its network, its tasks, and what happens to BatchNorm's statistics."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.paper import conv
from benchmarks.paper.conv_run import (
    Run,
    Setup,
    as_images,
    build_conv,
    first_samples,
    run_conv,
    set_training,
    task_of,
    with_statistics_of,
)
from benchmarks.paper.mnist_tasks import Split
from tests.benchmarks.test_permuted_mnist import prototypes

SMALL = Setup(
    tasks=3, epochs=2, batch=20, channels=(3, 4, 5), train_samples=60, importance_samples=20, statistics_samples=40
)
PROTECTED = Run("fisher", "stabilized", 600.0, "as-they-are", 0)


def sources() -> tuple[Split, Split]:
    """Two sets of 14×14 pictures, the second one dark where the first is bright."""
    images = as_images(prototypes(train=60, test=40, pixels=196))
    return images, Split(1 - images.train_x, images.train_y, 1 - images.test_x, images.test_y)


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]


def test_the_network_is_the_published_one() -> None:
    model = build_conv(28, (64, 128, 256), 10).eval()
    assert [tuple(p.shape) for p in model.parameters() if p.ndim > 1] == [
        (64, 1, 5, 5), (128, 64, 3, 3), (256, 128, 3, 3), (10, 16_384),
    ]  # fmt: skip
    convolutions = (64 * 25 + 64) + (128 * 64 * 9 + 128) + (256 * 128 * 9 + 256)
    assert sum(p.numel() for p in model.parameters()) == convolutions + 2 * (64 + 128 + 256) + 163_850 == 535_434
    assert model(torch.rand(2, 1, 28, 28)).shape == (2, 10)
    kinds = [type(layer).__name__ for layer in model]
    block = ["Conv2d", "BatchNorm2d", "LeakyReLU"]
    assert kinds == [*block, "MaxPool2d", *block, *block, "Flatten", "Linear"]
    assert {layer.negative_slope for layer in model if isinstance(layer, nn.LeakyReLU)} == {0.01}
    with pytest.raises(ValueError, match="14×14 at least"):
        build_conv(13, (64, 128, 256), 10)
    published = Setup()
    assert (published.tasks, published.epochs, published.batch, published.lr) == (4, 6, 100, 1e-3)
    assert published.importance_samples == 5_000


def test_tasks_are_both_sets_and_then_both_turned_counterclockwise() -> None:
    picture = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    other = torch.tensor([[5.0, 6.0], [7.0, 8.0]])
    y = torch.zeros(1, dtype=torch.int64)
    both = tuple(as_images(Split(one.view(1, 4), y, one.view(1, 4) + 10, y)) for one in (picture, other))
    shown = [task_of(both, k) for k in range(4)]  # type: ignore[arg-type]
    assert torch.equal(shown[0].train_x[0, 0], picture)
    assert torch.equal(shown[1].train_x[0, 0], other)
    assert shown[2].train_x[0, 0].tolist() == [[2.0, 4.0], [1.0, 3.0]]
    assert shown[2].test_x[0, 0].tolist() == [[12.0, 14.0], [11.0, 13.0]]
    assert shown[3].train_x[0, 0].tolist() == [[6.0, 8.0], [5.0, 7.0]]


def test_a_tasks_own_statistics_change_no_weight_and_are_those_of_its_data() -> None:
    model = build_conv(14, SMALL.channels, 10).eval()
    x = 3 + torch.rand(700, 1, 14, 14)  # more than one part
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = with_statistics_of(model, x)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), found.parameters(), strict=True))
    maps = model[0](x)
    wanted = (maps[:500].mean((0, 2, 3)) + maps[500:].mean((0, 2, 3))) / 2
    torch.testing.assert_close(norms(found)[0].running_mean, wanted)
    assert not any(layer.training for layer in found.modules())


def test_frozen_statistics_stay_and_others_move() -> None:
    model = build_conv(14, SMALL.channels, 10)
    x = torch.rand(20, 1, 14, 14)
    for frozen in (True, False):
        set_training(model, frozen_statistics=frozen)
        before = [layer.running_mean.clone() for layer in norms(model)]  # type: ignore[union-attr]
        model(x)
        same = [torch.equal(a, layer.running_mean) for a, layer in zip(before, norms(model), strict=True)]  # type: ignore[arg-type]
        assert same == [frozen] * 3
        assert model.training and model[-1].training


def last_state(run: Run, setup: Setup, file: Path, until: int) -> dict[str, Any]:
    """What the checkpoint holds after so many tasks: the run is stopped in the task that follows."""
    with pytest.raises(Stopped):
        run_conv(run, sources(), setup, checkpoint=file, after_step=stop_after(until * 6))
    return torch.load(file, weights_only=True)


class Stopped(Exception):
    pass


def stop_after(steps: int) -> Any:
    seen = 0

    def count(more: int) -> None:
        nonlocal seen
        seen += more
        if seen > steps:
            raise Stopped

    return count


def test_a_run_freezes_after_its_first_task(tmp_path: Path) -> None:
    frozen = replace(PROTECTED, norm="frozen-after-first")
    first, second = (last_state(frozen, SMALL, tmp_path / f"{until}", until) for until in (1, 2))
    moving = last_state(PROTECTED, SMALL, tmp_path / "moving", 2)
    statistics = [name for name in first["model"] if "running" in name]
    assert len(statistics) == 6
    for name in statistics:
        assert torch.equal(first["model"][name], second["model"][name])
        assert not torch.equal(first["model"][name], moving["model"][name])
        assert not torch.equal(first["model"][name], torch.zeros_like(first["model"][name]))
    assert not torch.equal(first["model"]["0.weight"], second["model"]["0.weight"])


@pytest.mark.parametrize("importance", ["none", "fisher", "mas", "si"])
def test_an_interrupted_run_goes_on_with_the_same_bits(importance: str, tmp_path: Path) -> None:
    run, file = replace(PROTECTED, importance=importance), tmp_path / "state.pt"
    whole, steps = run_conv(run, sources(), SMALL), []
    assert last_state(run, SMALL, file, 2)["tasks"] == 2
    with pytest.raises(ValueError, match="remove it to begin anew"):
        run_conv(replace(run, seed=1), sources(), SMALL, checkpoint=file)
    again = run_conv(run, sources(), SMALL, checkpoint=file, after_step=steps.append)
    assert steps == [12, *[1] * 6]
    assert again.per_task == whole.per_task
    assert again.per_task_own_statistics == whole.per_task_own_statistics
    assert again.when_learned == whole.when_learned
    assert again.stats == whole.stats  # to the bit: drift and importances of the end
    assert (whole.stats["max"] == 0) == (importance == "none")
    assert not file.exists()


def test_a_run_that_diverges_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.functional, "cross_entropy", lambda z, _: (z * float("nan")).sum())
    found = run_conv(PROTECTED, sources(), SMALL)
    assert found.diverged == 0
    assert len(found.when_learned) == 1


def test_own_statistics_bring_back_what_shifted_statistics_lost() -> None:
    """Two tasks that differ in brightness alone: the last one's statistics fit the first one's data badly."""
    data = sources()
    bright = Split(data[0].train_x + 5, data[0].train_y, data[0].test_x + 5, data[0].test_y)
    setup = replace(SMALL, tasks=2, epochs=12, lr=3e-3)
    found = run_conv(replace(PROTECTED, importance="none"), (data[0], bright), setup)
    assert found.per_task_own_statistics[0] > found.per_task[0] + 0.2


def test_the_authors_runs_are_found_under_their_lambda() -> None:
    plain = conv.authors_run(Run("fisher", "plain", 1350.0, "as-they-are", 0))
    assert plain == {"mean": 0.58337, "sd": 0.03335, "n": 30}
    stabilized = conv.authors_run(Run("mas", "stabilized", 450.0, "as-they-are", 0))
    assert stabilized == {"mean": 0.59305, "sd": 0.03258, "n": 20}
    assert conv.authors_run(Run("none", "plain", 0.0, "as-they-are", 0)) == {"mean": 0.3142, "sd": 0.00659, "n": 31}
    assert conv.authors_run(Run("mas", "wva", 450.0, "as-they-are", 0)) is None


def flat(*_: object, fashion: bool, **__: object) -> Split:
    found = prototypes(train=60, test=40, pixels=196)
    return Split(1 - found.train_x, found.train_y, 1 - found.test_x, found.test_y) if fashion else found


def test_the_program_does_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(conv, "load_mnist", flat)
    out = tmp_path / "out.json"
    words = [
        "--importance", "none", "si", "--variant", "plain", "--lambdas", "48", "--tasks", "2", "--epochs", "1",
        "--train-samples", "40", "--work", str(tmp_path / "work"), "--out", str(out),
    ]  # fmt: skip
    assert conv.main([*words, "--seeds", "1"]) == 0
    rows = json.loads(out.read_text())
    curves = [f"conv/none/plain/0/{norm}" for norm in conv.NORMS] + [f"conv/si/plain/48/{norm}" for norm in conv.NORMS]
    assert [one["name"] for one in rows] == [f"{curve}/seed 0" for curve in curves]
    assert all(one["extra"]["setup"]["train_samples"] == 40 for one in rows)
    for one in rows:
        assert one["median"] == pytest.approx(sum(one["extra"]["per_task"]) / 2)
        own = one["extra"]["per_task_own_statistics"]
        assert one["extra"]["accuracy_own_statistics"] == pytest.approx(sum(own) / 2)
    capsys.readouterr()
    assert conv.main([*words, "--seeds", "2", "--norm", "as-they-are"]) == 0
    said = capsys.readouterr().out
    assert said.count(" s\n") == 2  # the second seed of two curves was missing
    assert "0.5106" in said  # the authors' mean for SI
    with pytest.raises(ValueError, match="give another --out"):
        conv.main([*words, "--tasks", "1"])
    assert conv.main(["--epochs", "1"]) == 2


def test_first_samples_keep_the_test_set_unless_asked() -> None:
    assert len(first_samples(prototypes(), 7, 5).test_y) == 5
    found = first_samples(prototypes(), 7)
    assert [len(one) for one in (found.train_x, found.train_y, found.test_x)] == [7, 7, 60]
