"""Times of squared_norm_grad: first every implementation must agree with the float64 reference, then it is timed.

python -m benchmarks.ops.squared_norm_grad [--out FILE] [--seconds 1] [--device cpu cuda] [--threads N]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.ops.command_line import Rows, run
from benchmarks.results_row import measure, row
from fastewc._dispatch import IMPLS, choose
from fastewc.ops import squared_norm_grad
from fastewc.ops.squared_norm_grad.cases import Case
from fastewc.testing import assert_all_within_roundings

# (rows, classes): digits or MNIST, CIFAR-100, ImageNet, GPT-2's vocabulary, a large multilingual one.
SHAPES = ((5000, 10), (512, 100), (128, 1000), (32, 50257), (4, 200_000))
DTYPES = (torch.float32, torch.bfloat16)


def eager(y: Tensor) -> Tensor:
    """What a user would write; it cancels where a row is confident, so it is timed without being right."""
    p = torch.softmax(y.float(), dim=-1)
    return (2 * p * (p - (p * p).sum(dim=-1, keepdim=True))).to(y.dtype)


def contenders(y: Tensor) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """(name, call) of a copy (as few bytes as can be), the eager expression, and each implementation that runs."""
    out = torch.empty_like(y)
    yield "copy", lambda: out.copy_(y)
    yield "eager", lambda: eager(y)
    for impl in IMPLS:
        try:
            choose("squared_norm_grad", impl, y.device)
        except NotImplementedError:
            continue
        yield impl, lambda impl=impl: squared_norm_grad(y, "softmax", impl)


def rows(args: argparse.Namespace) -> Rows:
    for device in args.device:
        for shape in SHAPES:
            for dtype in DTYPES:
                yield from rows_of(shape, dtype, device, args.seconds)


def rows_of(shape: tuple[int, int], dtype: torch.dtype, device: str, seconds: float) -> Rows:
    case = Case(shape, "softmax")
    y = case.make_inputs(dtype, device)
    label = f"squared_norm_grad {shape[0]}x{shape[1]} {str(dtype).removeprefix('torch.')} {device}"
    print(label)
    for impl, call in contenders(y):
        if impl in IMPLS:
            assert_all_within_roundings(
                [call()],
                case.oracle(dtype),
                roundings=case.roundings,
                error_scale=case.error_scale(dtype),
                context=f"{label} {impl}",
            )
        timing = measure(call, device=device, seconds=seconds)
        per_second = 2 * y.numel() * y.element_size() / timing.median / 1e9
        print(f"  {impl:<10}{timing.median * 1e6:10.1f} µs  {per_second:8.1f} GB/s")
        yield row(
            "ops", f"{label} {impl}", timing, op="squared_norm_grad", impl=impl, shape=shape,
            dtype=str(dtype), device=device, gigabytes_per_second=per_second,
        )  # fmt: skip


if __name__ == "__main__":
    run(__doc__, "squared_norm_grad", rows)
