"""Pruning zeroes the share asked for, the least salient first, and the program writes what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import fastewc
from benchmarks.paper import command_line, plot, pruning
from benchmarks.paper.protocol import measure_importance
from benchmarks.paper.stacked import accuracies_of, initial_stack
from fastewc.testing import assert_within_roundings
from tests.benchmarks.test_permuted_mnist import SMALL, prototypes

ORDERS = ["magnitude", "fisher", "mas", "signal", "si", "fisher·w²", "mas·w²", "random"]


def saliency(networks: int = 2) -> list[torch.Tensor]:
    """Three layers of different scale; a quarter of the first is 0, as for pixels that are always black."""
    generator = torch.Generator().manual_seed(3)
    layers = [
        scale * torch.rand(networks, *shape, generator=generator) for scale, shape in ((1, (16, 36)), (5, (12, 16)))
    ]
    layers[0][:, :, :9] = 0
    return [*layers, 0.1 * torch.rand(networks, 10, 12, generator=generator)]


@pytest.mark.parametrize("share", pruning.SHARES)
def test_the_least_salient_of_the_whole_network_go(share: float) -> None:
    layers = saliency()
    stay = pruning.kept(pruning.ranks(layers, "whole"), "whole", share)
    values, kept = (torch.cat([one.flatten(1) for one in these], 1) for these in (layers, stay))
    gone = round(share * values.shape[1])
    assert (~kept).sum(1).tolist() == [gone, gone]
    for s in range(2):
        assert gone == 0 or values[s][~kept[s]].max() <= values[s][kept[s]].min()
    if share > 0.2:  # in one order, so layers of small saliencies lose more
        assert stay[2].double().mean() < stay[1].double().mean()


@pytest.mark.parametrize("share", pruning.SHARES)
def test_per_layer_each_loses_the_same_share(share: float) -> None:
    layers = saliency()
    for values, kept in zip(layers, pruning.kept(pruning.ranks(layers, "per layer"), "per layer", share), strict=True):
        gone = round(share * values[0].numel())
        for s in range(2):
            assert (~kept[s]).sum() == gone
            assert gone == 0 or values[s][~kept[s]].max() <= values[s][kept[s]].min()


@pytest.mark.parametrize("scope", pruning.SCOPES)
def test_equal_saliencies_go_in_random_order_and_each_time_the_same(scope: str) -> None:
    equal = [torch.zeros(1, 40, 50), torch.zeros(1, 40, 50)]
    kept = pruning.kept(pruning.ranks(equal, scope), scope, 0.5)
    for one in kept:  # 1,000 of 2,000 ± 22, and 25 of the 50 of a row ± 3.5
        assert 850 < one.sum() < 1150
        assert all(5 < row < 45 for row in one[0].sum(1))
    again = pruning.kept(pruning.ranks(equal, scope), scope, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def test_saliencies_are_the_librarys_importances_of_each_network() -> None:
    data = prototypes()
    model, si = pruning.trained([0, 1], data, SMALL)
    assert si.num_samples == SMALL.epochs * len(data.train_y) // SMALL.batch
    found = pruning.saliencies(model, si, data, SMALL)
    assert list(found) == ORDERS
    last_x, last_y = data.train_x[-40:], data.train_y[-40:]
    for s in range(2):
        alone = model.network(s)
        for layer, module in enumerate(alone[::2]):
            weight = module.weight.detach()
            assert torch.equal(found["magnitude"][layer][s], weight.abs())
            assert torch.equal(found["si"][layer][s], si[f"weights.{layer}"][s])
            for kind in ("fisher", "mas", "signal"):
                wanted = measure_importance(kind, alone, last_x, last_y)[f"{2 * layer}.weight"]
                assert torch.equal(found[kind][layer][s], wanted)
                if kind != "signal":
                    product = wanted.double() * weight.double() ** 2
                    assert_within_roundings(found[f"{kind}·w²"][layer][s], product, roundings=3, error_scale=product)


def test_pruning_zeroes_weights_only_and_leaves_the_model_alone() -> None:
    data = prototypes()
    model, _ = pruning.trained([0, 1], data, SMALL)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    curve = pruning.prune(model, [weight.detach().abs() for weight in model.weights], "whole", data, (0.0, 0.5, 1.0))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert curve[:, 0].tolist() == accuracies_of(model, data.test_x, data.test_y).tolist()
    only_biases = [int(one.argmax()) for one in model.biases[-1][:, 0]]  # no weights: one answer for all images
    assert curve[:, 2].tolist() == [(data.test_y == answer).double().mean().item() for answer in only_biases]
    by_hand = initial_stack([0, 1], data, SMALL)
    by_hand.load_state_dict(before)
    with torch.no_grad():
        for s in range(2):
            weights = torch.cat([weight[s].flatten() for weight in by_hand.weights])
            bound = weights.abs().sort().values[round(weights.numel() / 2)]
            for weight in by_hand.weights:
                weight[s][weight[s].abs() < bound] = 0
    assert curve[:, 1].tolist() == accuracies_of(by_hand, data.test_x, data.test_y).tolist()


def test_the_share_that_can_be_zeroed_by_hand() -> None:
    shares = (0.0, 0.5, 0.8, 0.9)
    assert pruning.prunable_share([0.98, 0.98, 0.96, 0.98], shares) == pytest.approx(0.65)
    assert pruning.prunable_share([0.98, 0.98, 0.97, 0.975], shares) == 0.9
    assert pruning.prunable_share([0.98, 0.88, 0.98, 0.98], shares) == pytest.approx(0.05)


def test_the_program_writes_every_order_and_the_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command_line, "load_mnist", lambda *_, **__: prototypes())
    out = tmp_path / "machine" / "paper_pruning.json"
    assert pruning.main(["--seeds", "2", "--epochs", "1", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())
    assert [one["name"] for one in rows] == [f"pruning/{scope}/{name}" for scope in pruning.SCOPES for name in ORDERS]
    printed = capsys.readouterr().out
    for one in rows:
        extra = one["extra"]
        assert extra["shares"] == list(pruning.SHARES) and extra["protocol"]["epochs"] == 1
        runs = torch.tensor(extra["runs"], dtype=torch.float64)
        assert runs.shape == (2, len(pruning.SHARES))
        assert extra["accuracy"] == pytest.approx(runs.mean(0).tolist(), abs=1e-4)  # runs have four digits
        assert one["median"] == pytest.approx(sum(map(pruning.prunable_share, extra["runs"])) / 2)
        assert f"{extra['scope']} {extra['order']}" in printed
        baseline = next(o for o in rows if o["name"] == f"pruning/{extra['scope']}/magnitude")["extra"]
        less = [a - b for a, b in zip(extra["accuracy"], baseline["accuracy"], strict=True)]
        assert extra["minus_magnitude"] == pytest.approx(less, abs=1e-9)
    assert plot.main(["--results", str(tmp_path), "--out", str(tmp_path / "figures")]) == 0
    assert (tmp_path / "figures" / "machine" / "paper_pruning.png").stat().st_size > 10_000
    assert plot.main(["--results", str(tmp_path / "none")]) == 1


def test_marks_say_which_order_is_surely_better_or_worse_than_magnitude() -> None:
    flat, early = [0.98] * len(pruning.SHARES), [0.98] + [0.5] * (len(pruning.SHARES) - 1)
    noisy = [[a - 0.001 * s for a in flat] for s in range(3)]
    curves = {
        ("magnitude", "whole"): torch.tensor(noisy, dtype=torch.float64),
        ("same", "whole"): torch.tensor(noisy[::-1], dtype=torch.float64),
        ("worse", "whole"): torch.tensor([early] * 3, dtype=torch.float64),
    }
    lines = pruning.table(pruning.results(curves, SMALL, 0.0)).splitlines()
    assert [line.count("†") for line in lines[1:4]] == [0, 0, len(pruning.PRINTED) + 1]
    assert not any("*" in line for line in lines[1:4])
    curves = {(name, "whole"): curves[other, "whole"] for name, other in (("magnitude", "worse"), ("x", "same"))}
    lines = pruning.table(pruning.results(curves, SMALL, 0.0)).splitlines()
    assert lines[2].count("*") == len(pruning.PRINTED) + 1 and "†" not in lines[2]


def test_a_trial_says_where_its_results_go(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, message in ((["--epochs", "1"], "give --out"), (["--seeds", "1"], "at least 2")):
        with pytest.raises(SystemExit):
            pruning.main(argv)
        assert message in capsys.readouterr().err


def test_si_is_damped_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    real = fastewc.si_importance
    monkeypatch.setattr(fastewc, "si_importance", lambda *a, **k: asked.append(k["damping"]) or real(*a, **k))
    pruning.trained([0], prototypes(), SMALL)
    assert asked == [0.1]
