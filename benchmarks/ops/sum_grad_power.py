"""Times of sum_grad_power beside the gradient that it replaces; first it must agree with the float64 reference.

python -m benchmarks.ops.sum_grad_power [--out FILE] [--seconds 1] [--device cpu] [--threads N]

Per layer: torch's own weight gradient (of the whole batch, what an ordinary backward computes), every implementation,
and bmm + square + sum, which stores the gradients of all samples. Ratios are medians over rounds in which everyone had
a turn, so they hold on a machine whose speed changes. Shares are those of the FLOP/s of a large torch.mm in the same
rounds; all contenders are counted with the FLOPs of the weight gradient.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.ops.command_line import Rows, run
from benchmarks.results_row import measure_in_turn, row, timing_of
from fastewc._dispatch import IMPLS, choose
from fastewc.ops.sum_grad_power import cases
from fastewc.ops.sum_grad_power.api import add_conv_grad_power, add_sum_grad_power
from fastewc.testing import assert_all_within_roundings

MLP = ((784, 300), (300, 150), (150, 10))
VIT = ((192, 576), (192, 768), (768, 192))
GPT = ((256, 768), (256, 1024), (1024, 256), (256, 5000))
# channels, outputs, size, kernel, stride of ResNet-18's layers on images of 64 × 64.
RESNET = (
    (3, 64, 64, 7, 2), (64, 64, 16, 3, 1), (64, 128, 16, 3, 2), (64, 128, 16, 1, 2), (128, 128, 8, 3, 1),
    (128, 256, 8, 3, 2), (128, 256, 8, 1, 2), (256, 256, 4, 3, 1), (256, 512, 4, 3, 2), (256, 512, 4, 1, 2),
    (512, 512, 2, 3, 1),
)  # fmt: skip
LARGEST_STORED = 1 << 28  # numbers that bmm + square + sum may store
PEAK = 2048  # size of the large product


@dataclass(frozen=True)
class Contender:
    """A way to the answer, or to what it replaces; ``per_sample``: the result is that of the op."""

    name: str
    call: Callable[[], Tensor]
    per_sample: bool = True


def layers(device: str) -> Iterator[tuple[str, cases.SegmentsCase | cases.ConvCase]]:
    """(model, case); GPUs get batches that fill them."""
    more = 1 if device == "cpu" else 8
    for N in (100, 1000, 5000):
        yield from ((f"mlp N={N}", cases.SegmentsCase(N, (1,), I, O)) for I, O in MLP)
    for N in (16 * more, 32 * more):
        for C, O, size, kernel, stride in RESNET:
            k, s = (size, size), (kernel, kernel)
            yield f"resnet18 N={N}", cases.ConvCase(N, C, O, k, s, stride=stride, padding=kernel // 2)
    for T in (65, 197):
        yield from ((f"vit-tiny T={T}", cases.SegmentsCase(16 * more, (T,), I, O)) for I, O in VIT)
    for T, N in ((256, 1), (256, 8 * more), (32, 8), (32, 64 * more)):
        yield from ((f"gpt2 shape T={T} N={N}", cases.SegmentsCase(N, (T,), I, O)) for I, O in GPT)


def linear_contenders(total: Tensor, a: Tensor, g: Tensor, p: int) -> Iterator[Contender]:
    flat_a, flat_g = a.flatten(0, 1), g.flatten(0, 1)
    yield Contender("weight gradient", lambda: flat_g.T @ flat_a, per_sample=False)
    for impl in available(a.device):
        yield Contender(impl, lambda impl=impl: added(add_sum_grad_power, total, a, g, p, impl=impl))
    if len(a) * total.numel() <= LARGEST_STORED:
        yield Contender("bmm + square + sum", lambda: total + (g.mT @ a).square().sum(0))


def conv_contenders(total: Tensor, x: Tensor, g: Tensor, case: cases.ConvCase) -> Iterator[Contender]:
    s, weight = case.settings, torch.zeros_like(total).to(x.dtype)
    backward = torch.ops.aten.convolution_backward
    where = [list(s[name]) for name in ("stride", "padding", "dilation")]

    def gradient() -> Tensor:
        return backward(g, x, weight, None, *where, False, [0, 0], s["groups"], [False, True, False])[1]

    def stored() -> Tensor:
        patches = functional.unfold(x, case.kernel, s["dilation"], s["padding"], s["stride"])
        return total + (g.flatten(2) @ patches.mT).square().sum(0).view_as(total)

    yield Contender("weight gradient", gradient, per_sample=False)
    for impl in available(x.device):
        yield Contender(impl, lambda impl=impl: added(add_conv_grad_power, total, x, g, case.p, **s, impl=impl))
    if case.groups == 1 and len(x) * total.numel() <= LARGEST_STORED:
        yield Contender("bmm + square + sum", stored)


def added(op: Callable[..., None], total: Tensor, a: Tensor, g: Tensor, p: int, **settings: Any) -> Tensor:
    """Into the total itself, as in an importance pass; the gate looks at a copy of it."""
    op(total, [(a, g)], p, **settings)
    return total


def available(device: torch.device) -> list[str]:
    found = []
    for impl in IMPLS:
        try:
            found.append(choose("sum_grad_power", impl, device))
        except NotImplementedError:
            continue
    return [impl for impl in found if impl != "reference"]


def rows(args: argparse.Namespace) -> Rows:
    for device in args.device:
        for dtype in (torch.float32,) if device == "cpu" else (torch.float32, torch.bfloat16):
            for model, case in layers(device):
                yield from rows_of(model, case, dtype, device, args.seconds)


def rows_of(
    model: str, case: cases.SegmentsCase | cases.ConvCase, dtype: torch.dtype, device: str, seconds: float
) -> Rows:
    label = f"sum_grad_power {model} {case.id} {str(dtype).removeprefix('torch.')} {device}"
    total, [(a, g)] = case.make_inputs(dtype, device)
    made = linear_contenders(total, a, g, case.p) if isinstance(case, cases.SegmentsCase) else None
    contenders = list(made or conv_contenders(total, a, g, case))
    check(label, case, contenders, dtype, total)
    square = torch.randn(PEAK, PEAK, device=device, dtype=dtype)
    calls = [*((lambda: None, one.call) for one in contenders), (lambda: None, lambda: square @ square)]
    *times, peak = measure_in_turn(calls, device=device, seconds=seconds)
    flops = 2 * g.numel() * math.prod(total.shape[1:])
    print(label)
    for one, own in zip(contenders, times, strict=True):
        ratio = statistics.median(t / base for t, base in zip(own, times[0], strict=True))
        timing = timing_of(own)
        rate = flops / timing.median
        share = statistics.median(flops / t / (2 * PEAK**3 / best) for t, best in zip(own, peak, strict=True))
        print(f"  {one.name:<20}{timing.median * 1e6:12.1f} µs {rate / 1e9:9.1f} GFLOP/s {share:6.1%} {ratio:7.2f}")
        yield row(
            "ops", f"{label} {one.name}", timing, op="sum_grad_power", contender=one.name, model=model,
            case=case.id, dtype=str(dtype), device=device, flops_per_second=rate, share_of_mm=share,
            ratio_to_weight_gradient=ratio,
        )  # fmt: skip


def check(
    label: str,
    case: cases.SegmentsCase | cases.ConvCase,
    contenders: list[Contender],
    dtype: torch.dtype,
    total: Tensor,
) -> None:
    """Every contender that claims the op's result, against the float64 reference."""
    before = total.clone()
    oracle, scale = case.oracle(dtype), case.error_scale(dtype)
    for one in contenders:
        if one.per_sample:
            got = one.call().clone()
            total.copy_(before)
            assert_all_within_roundings(
                [got], oracle, roundings=case.roundings, error_scale=scale, context=f"{label} {one.name}"
            )


if __name__ == "__main__":
    run(__doc__, "sum_grad_power", rows)
