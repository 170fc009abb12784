"""Accuracy over the share of zeroed weights: are importances a better order of pruning than magnitude?

    python -m benchmarks.paper.pruning --data-root PATH [--download] [--seeds 10] [--threads 1]

Kutalev & Lapina (arXiv 2109.10021), section 4: the protocol's network learns MNIST, then weights are zeroed, least
salient first, and it is tested without further training. Biases stay. Weights are taken in one order from the *whole*
network, or *per layer*, the same share of each. Equal saliencies (of pixels that are black in all images, mostly) are
zeroed in random order. All orders prune the same networks, so differences from magnitude are paired.

Here Fisher, MAS (on the softmax) and SIG come from 5,000 training samples, SI from the training itself; the published
script measures them on the 10,000 test images, and orders by |Ω|.

Shapes: S networks, O outputs, I inputs.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import fastewc
from benchmarks.paper.command_line import begin
from benchmarks.paper.mnist_tasks import Split
from benchmarks.paper.protocol import Protocol
from benchmarks.paper.stacked import (
    StackedMLP,
    accuracies_of,
    initial_stack,
    measure_stack,
    sample_orders,
    train_stack,
)
from benchmarks.results_row import row, student_half_width, write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARES = (
    0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99,
)  # fmt: skip
PRINTED = (0.5, 0.8, 0.9, 0.95, 0.98)
SCOPES = ("whole", "per layer")
ALLOWED_LOSS = 0.01
BASELINE = "magnitude"


def trained(seeds: Sequence[int], data: Split, protocol: Protocol) -> tuple[StackedMLP, fastewc.Importance]:
    """Networks that have learned the task, and their SI."""
    model = initial_stack(seeds, data, protocol)
    optimizer = fastewc.optim.Adam(model.named_parameters(), lr=protocol.lr, path_integral=True)
    train_stack(model, optimizer, data, protocol, sample_orders(seeds))
    return model, fastewc.si_importance(optimizer, damping=0.1)


@torch.no_grad()
def saliencies(model: StackedMLP, si: fastewc.Importance, data: Split, protocol: Protocol) -> dict[str, list[Tensor]]:
    """What each order goes by: for each layer [S, O, I]."""
    weights = [weight.detach() for weight in model.weights]
    names = [f"weights.{i}" for i in range(len(weights))]
    found = {kind: measure_stack(kind, model, data, protocol) for kind in ("fisher", "mas", "signal")}
    importances = {kind: [one[name] for name in names] for kind, one in (found | {"si": si}).items()}
    generator = torch.Generator().manual_seed(0)
    return {
        BASELINE: [weight.abs() for weight in weights],
        **importances,
        # What zeroing a weight costs to second order: ½ Ω w², with Ω for the curvature.
        **{
            f"{kind}·w²": [one * weight**2 for one, weight in zip(importances[kind], weights, strict=True)]
            for kind in ("fisher", "mas")
        },
        "random": [torch.rand(weight.shape, generator=generator) for weight in weights],
    }


def ranks(saliency: Sequence[Tensor], scope: str) -> list[Tensor]:
    """Each weight's place in the order of zeroing, 0 first, in its whole network or in its layer [S, O, I].

    Args:
        saliency: for each layer [S, O, I]; the smallest go first, equal ones in random order.
        scope: "whole" or "per layer".
    """
    flat = [one.flatten(1) for one in saliency]
    generator = torch.Generator().manual_seed(1)
    places = []
    for values in [torch.cat(flat, 1)] if scope == "whole" else flat:
        mixed = torch.randperm(values.shape[1], generator=generator)
        order = mixed[values[:, mixed].argsort(dim=1, stable=True)]
        places.append(order.argsort(dim=1))
    if scope == "whole":
        places = list(places[0].split([one.shape[1] for one in flat], 1))
    return [place.view_as(one) for place, one in zip(places, saliency, strict=True)]


def kept(places: Sequence[Tensor], scope: str, share: float) -> list[Tensor]:
    """True for the weights that stay when the first ``share`` of the whole network or of each layer is zeroed."""
    sizes = [place[0].numel() for place in places]
    counts = [sum(sizes)] * len(sizes) if scope == "whole" else sizes
    return [place >= round(share * count) for place, count in zip(places, counts, strict=True)]


@torch.no_grad()
def prune(
    model: StackedMLP, saliency: Sequence[Tensor], scope: str, data: Split, shares: Sequence[float] = SHARES
) -> Tensor:
    """Test accuracy of each network with each share of its weights zeroed [S, shares]; the model stays as it is."""
    pruned, places, found = copy.deepcopy(model), ranks(saliency, scope), []
    for share in shares:
        for weight, trained_weight, keep in zip(pruned.weights, model.weights, kept(places, scope, share), strict=True):
            weight.copy_(trained_weight * keep)
        found.append(accuracies_of(pruned, data.test_x, data.test_y))
    return torch.stack(found, 1)


def prunable_share(accuracies: Sequence[float], shares: Sequence[float] = SHARES) -> float:
    """The share at which accuracy first falls :data:`ALLOWED_LOSS` below the first; linear between two shares."""
    floor = accuracies[0] - ALLOWED_LOSS
    for (share, before), (after_share, after) in pairwise(zip(shares, accuracies, strict=True)):
        if after < floor:
            return share + (after_share - share) * (before - floor) / (before - after)
    return shares[-1]


def results(curves: dict[tuple[str, str], Tensor], protocol: Protocol, seconds: float) -> list[dict[str, Any]]:
    """A row for each order and scope, from accuracies [S, shares]: means and 95 % half widths over the networks.

    The row's number is the share that can be zeroed for :data:`ALLOWED_LOSS` of accuracy.
    """
    rows = []
    for (name, scope), curve in curves.items():
        runs = [[round(one, 4) for one in run] for run in curve.tolist()]
        prunable = [prunable_share(run) for run in runs]
        less = (curve - curves[BASELINE, scope]).T.tolist()
        rows.append(
            row(
                "paper", f"pruning/{scope}/{name}", value=sum(prunable) / len(prunable), unit="share of weights",
                order=name, scope=scope, allowed_loss=ALLOWED_LOSS, half_width_95=student_half_width(prunable),
                shares=list(SHARES), accuracy=curve.mean(0).tolist(),
                accuracy_half_width_95=[student_half_width(one) for one in curve.T.tolist()],
                minus_magnitude=[sum(one) / len(one) for one in less],
                minus_magnitude_half_width_95=[student_half_width(one) for one in less],
                runs=runs, protocol=asdict(protocol), seconds=seconds,
            )
        )  # fmt: skip
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Accuracy at some shares and the share of the row, marked where it is better or worse than magnitude's."""
    lines = [f"{'':<22}" + "".join(f"{share:>17.0%}" for share in PRINTED) + f"{f'-{ALLOWED_LOSS:.0%} at':>16}"]
    prunable = {one["name"]: [prunable_share(run) for run in one["extra"]["runs"]] for one in rows}
    for one in rows:
        extra, cells = one["extra"], ""
        for at in (SHARES.index(share) for share in PRINTED):
            sign = _sign(extra["minus_magnitude"][at], extra["minus_magnitude_half_width_95"][at])
            cells += f"{extra['accuracy'][at]:>8.4f} ± {extra['accuracy_half_width_95'][at]:.4f}{sign}"
        baseline = prunable[f"pruning/{extra['scope']}/{BASELINE}"]
        less = [a - b for a, b in zip(prunable[one["name"]], baseline, strict=True)]
        sign = _sign(sum(less) / len(less), student_half_width(less) or 0.0)
        label = f"{extra['scope']} {extra['order']}"
        lines.append(f"{label:<22}{cells}{one['median']:>9.3f} ± {extra['half_width_95']:.3f}{sign}")
    return "\n".join([*lines, f"paired, 95 %: * better than {BASELINE}, † worse"])


def _sign(difference: float, half_width: float) -> str:
    return " " if abs(difference) <= half_width else "*" if difference > 0 else "†"


def draw(rows: Sequence[dict[str, Any]], figure: Figure) -> None:
    """Accuracy over the share of zeroed weights, a panel for each scope; bands are 95 % intervals of the mean."""
    figure.set_size_inches(12, 5)
    panels = dict(zip(SCOPES, figure.subplots(1, len(SCOPES), sharey=True), strict=True))
    for scope, axes in panels.items():
        axes.set(title=f"zeroed: {scope}", xlabel="share of zeroed weights", ylabel="test accuracy")
        axes.grid(alpha=0.3)
    for one in rows:
        extra = one["extra"]
        line = {"magnitude": "k-", "random": "k:"}.get(extra["order"], "--" if "w²" in extra["order"] else "-")
        (drawn,) = panels[extra["scope"]].plot(extra["shares"], extra["accuracy"], line, label=extra["order"])
        pairs = list(zip(extra["accuracy"], extra["accuracy_half_width_95"], strict=True))
        panels[extra["scope"]].fill_between(
            extra["shares"], [a - h for a, h in pairs], [a + h for a, h in pairs], color=drawn.get_color(), alpha=0.2
        )
    panels[SCOPES[0]].legend()


def main(argv: Sequence[str] | None = None) -> int:
    """Train, prune in every order, print a table, write the JSON."""
    args, protocol, data = begin("pruning", __doc__, argv, published=Protocol(tasks=1), seeds=10, least_seeds=2)
    begun = time.perf_counter()
    model, si = trained(range(args.seeds), data, protocol)
    print(f"{args.seeds} networks trained in {time.perf_counter() - begun:.0f} s", flush=True)
    orders = saliencies(model, si, data, protocol)
    curves = {(name, scope): prune(model, by, scope, data) for scope in SCOPES for name, by in orders.items()}
    rows = results(curves, protocol, time.perf_counter() - begun)
    print(table(rows))
    write(args.out, rows)
    print(f"written: {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
