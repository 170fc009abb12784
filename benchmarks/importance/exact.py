"""Whether fastewc's Ω is that of a float64 batch-1 loop, elementwise, in batches of any size.

python -m benchmarks.importance.exact [--workloads mlp-b100 ...] [--samples 12] [--data-root PATH] [--threads N]

The models are those of the benchmark as they are initialised, whole samples, and the paper's network after an epoch of
MNIST. A line for each model and quantity; the first element outside its bound (``gate.py``) ends the run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.nn import functional as F

import fastewc
from benchmarks.importance.contenders import QUANTITIES, Job, Quantity, ours
from benchmarks.importance.gate import ROUNDINGS, Gate
from benchmarks.importance.workloads import Batch, Workload, chunks, data_root_or_none, make, mnist

TRAINED = "mlp-trained"
MODELS = ("mlp-b100", "resnet18-b16", "vit-tiny-b16", "gpt2-4x256-t256-b8", "gpt2-4x256-t32-b64", TRAINED)


def trained(data_root: str) -> Workload:
    """The paper's network after one epoch: many of its samples have tiny gradients, unlike those of a fresh one."""
    workload, data = make("mlp-b100", "cpu", data_root), mnist(data_root)
    optimizer = fastewc.optim.Adam(workload.model.parameters(), lr=1e-3)
    torch.manual_seed(0)
    for rows in torch.randperm(len(data.train_x)).split(100):
        optimizer.zero_grad()
        F.cross_entropy(workload.model(data.train_x[rows]), data.train_y[rows]).backward()
        optimizer.step()
    return replace(workload, name=TRAINED)


def check(workload: Workload, quantity: Quantity, samples: int) -> list[int]:
    """Compare a few batch sizes in float32, and one in float64; returns them. AssertionError where one is not right."""

    def first(batches: Sequence[Batch]) -> list[Batch]:
        x, y = (torch.cat([batch[i] for batch in batches])[:samples] for i in (0, 1))
        return [(x, y)]

    gate = Gate(Job(workload, quantity), first)
    sizes = [1, 5, samples]
    runs = [(gate.timed, torch.float32, gate.roundings, size) for size in sizes]
    for job, dtype, roundings, size in [*runs, (gate.double, torch.float64, ROUNDINGS, samples)]:
        got = ours(job)(list(chunks(job.workload.batches, size)))
        assert got.keys() == gate.oracle.keys()
        gate.compare(f"{workload.name}, batches of {size}:", got, dtype, roundings)
    return sizes


def main() -> None:
    """Check and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument("--data-root", help="folder with MNIST/raw and text/*.txt (default: FASTEWC_DATA)")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    data_root = data_root_or_none(args.data_root)
    for name in args.workloads:
        if name == TRAINED and data_root is None:
            print(f"without {TRAINED}: it needs MNIST, see --data-root")
            continue
        workload = trained(str(data_root)) if name == TRAINED else make(name, "cpu", data_root)
        for quantity in QUANTITIES.values():
            begun = time.perf_counter()
            sizes = check(workload, quantity, args.samples)
            print(
                f"{quantity.name} {name}: {workload.weights:,} elements, {args.samples} samples in batches of "
                f"{', '.join(map(str, sizes))}: all within the bound ({time.perf_counter() - begun:.1f} s)",
                flush=True,
            )


if __name__ == "__main__":
    main()
