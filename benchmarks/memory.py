"""What protection costs in memory: bytes per parameter beyond the parameter and its gradient, measured.

python -m benchmarks.memory [--device cpu] [--only SUBSTRING ...] [--out FILE]

Every configuration has a process of its own, which makes a transformer's parameters and gradients, and nothing else,
before it begins. Two kinds of figures:

* held: the storages of all tensors that the process still holds on the device after twenty steps and two tasks.
* peaks beyond parameters, gradients and (of consolidate) the importance that it is given: of the process's resident
  memory on a CPU, of torch's allocator on a GPU. Blocks of the C allocator go back to the system as they are freed
  (MALLOC_MMAP_THRESHOLD_), so that what one call frees is not counted for the next.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastewc
from benchmarks.ops.model_shapes import Shape, gpt2
from benchmarks.peak_memory import high_water
from benchmarks.results_row import ROOT, machine, row, write

STEPS = 10
#: 28 million parameters in 100 tensors.
MODEL: list[Shape] = list(gpt2(width=512, blocks=8, words=5000, positions=256))
FIGURES = ("held", "steps", "first_consolidate", "consolidate")


@dataclass(frozen=True)
class Configuration:
    """One choice of a user.

    Attributes:
        optimizer: a class of torch.optim and of fastewc.optim.
        how: "fused", "attach" or "penalty"; "none" for torch's optimizer without any penalty.
        ewc: arguments of fastewc.EWC.
        arguments: further ones of the optimizer.
        dtype: of the parameters.
    """

    optimizer: str = "AdamW"
    how: str = "fused"
    ewc: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        """Unique; what --only looks at."""
        options = {**self.arguments, **self.ewc}
        if self.dtype != torch.float32:
            options["parameters"] = self.dtype
        told = ", ".join(f"{key}={str(value).removeprefix('torch.')}" for key, value in options.items())
        return f"{self.optimizer} {self.how}" + (f", {told}" if told else "")


BFLOAT16 = {"importance_dtype": torch.bfloat16, "anchor_dtype": torch.bfloat16}
BYTE = {"importance_dtype": torch.uint8}
SMALLEST = {**BYTE, "anchor_dtype": torch.bfloat16}
KEPT: tuple[Mapping[str, Any], ...] = ({}, BFLOAT16, BYTE, SMALLEST)


def _configurations() -> list[Configuration]:
    optimizers = (("SGD", {}), ("SGD", {"momentum": 0.9}), ("Adam", {}), ("AdamW", {}))
    found = []
    for optimizer, arguments in optimizers:
        found.append(Configuration(optimizer, "none", {}, arguments))
        found += [Configuration(optimizer, "fused", kept, arguments) for kept in KEPT]
    for kept in ({}, SMALLEST):
        found.append(Configuration(ewc=kept, arguments={"path_integral": True}))
        found += [Configuration(how=how, ewc=kept) for how in ("attach", "penalty")]
        found.append(Configuration(how="attach", ewc={"variant": "wva", **kept}))
    found.append(Configuration(how="none", dtype=torch.bfloat16))
    found += [Configuration(ewc=kept, dtype=torch.bfloat16) for kept in ({}, BFLOAT16, SMALLEST)]
    for moments in ({}, {"state_dtype": torch.bfloat16}):
        halves = {"master_weights": True, **moments}
        found += [Configuration(ewc=kept, arguments=halves, dtype=torch.bfloat16) for kept in ({}, SMALLEST)]
    found += [Configuration(how=how, ewc={**SMALLEST, "offload": True}) for how in ("fused", "attach", "penalty")]
    return found


CONFIGURATIONS = {configuration.name: configuration for configuration in _configurations()}


class Run:
    """A model with gradients, and what a configuration adds to it."""

    def __init__(self, configuration: Configuration, shapes: Sequence[Shape], device: str) -> None:
        self.configuration, self.device = configuration, device
        dtype = configuration.dtype
        weights = (torch.randn(shape, device=device).mul_(0.02).to(dtype) for shape in shapes)
        self.model = nn.ParameterList(nn.Parameter(w) for w in weights)
        for p in self.model:
            p.grad = torch.randn_like(p).mul_(1e-3)
        self.count = sum(p.numel() for p in self.model)
        self.ewc: fastewc.EWC | None = None
        self.optimizer: torch.optim.Optimizer | None = None

    def importance(self) -> dict[str, Tensor]:
        """Ω in float32, as a pass leaves it."""
        return {name: torch.rand(p.shape, device=self.device) for name, p in self.model.named_parameters()}

    def consolidate(self, importance: dict[str, Tensor]) -> None:
        """End a task; the first one makes the EWC."""
        if self.configuration.how == "none":
            return
        if self.ewc is None:
            self.ewc = fastewc.EWC(self.model, **{"ewc_lambda": 1.0, **self.configuration.ewc})
        self.ewc.consolidate(importance)

    def steps(self) -> None:
        """Ten of them; the first one makes the optimizer and its state."""
        for _ in range(STEPS):
            if self.optimizer is None:
                self.optimizer = self._optimizer()
            if self.configuration.how == "penalty" and self.ewc is not None:
                self.ewc.penalty(lr=1e-3).backward()
            self.optimizer.step()

    def _optimizer(self) -> torch.optim.Optimizer:
        name, arguments = self.configuration.optimizer, {"lr": 1e-3, **self.configuration.arguments}
        if self.configuration.how == "fused":
            return getattr(fastewc.optim, name)(self.model.named_parameters(), ewc=self.ewc, **arguments)
        found: torch.optim.Optimizer = getattr(torch.optim, name)(self.model.parameters(), fused=True, **arguments)
        if self.configuration.how == "attach" and self.ewc is not None:
            self.ewc.attach(found)
        return found


def storages(device: str) -> dict[int, int]:
    """Address → bytes of every storage on the device that a Python tensor holds in this process."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if type(found) in (Tensor, nn.Parameter)]
    held = [t.untyped_storage() for t in tensors if t.layout == torch.strided and t.device.type == device]
    return {storage.data_ptr(): storage.nbytes() for storage in held}


def measure(configuration: Configuration, device: str, shapes: Sequence[Shape] = MODEL) -> dict[str, float | None]:
    """Bytes per parameter, by the names in FIGURES; None where this system can't tell a peak."""
    rehearsal = Run(configuration, [(64, 64)], device)  # what libraries keep after their first use is not counted
    rehearsal.consolidate(rehearsal.importance())
    rehearsal.steps()
    rehearsal.consolidate(rehearsal.importance())
    del rehearsal
    run = Run(configuration, shapes, device)
    before, baseline = storages(device), high_water(lambda: None, device)

    def peak(call: Callable[[], None], given: Mapping[str, Tensor]) -> float | None:
        found = high_water(call, device)
        if found is None or baseline is None:
            return None
        return (found[1] - baseline[0] - sum(t.nbytes for t in given.values())) / run.count

    importance = run.importance()
    first = peak(lambda: run.consolidate(importance), importance)
    importance.clear()
    steps = peak(run.steps, {})
    importance.update(run.importance())
    later = peak(lambda: run.consolidate(importance), importance)
    importance.clear()
    run.steps()  # a plan of the optimizer may hold what consolidate has replaced
    held = sum(size for address, size in storages(device).items() if address not in before)
    return dict(zip(FIGURES, (held / run.count, steps, first, later), strict=True))


def measured_apart(name: str, device: str, threads: int) -> dict[str, float | None]:
    """:func:`measure` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory", "--one", name, "--device", device, "--threads", str(threads)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr}")
    found: dict[str, float | None] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", default=[""], help="configurations whose name has one of these in it")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="the JSON file; default benchmarks/results/<machine>/memory.json")
    parser.add_argument("--one", choices=[*CONFIGURATIONS], help=argparse.SUPPRESS)  # in this process
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one is not None:
        warnings.simplefilter("ignore", UserWarning)  # of how far anchors were rounded
        print(json.dumps(measure(CONFIGURATIONS[args.one], args.device)))
        return
    weights, rows = sum(torch.Size(shape).numel() for shape in MODEL), []
    print(f"{weights:,} parameters in {len(MODEL)} tensors; bytes per parameter")
    print(f"{'':98}" + "".join(f"{figure:>20}" for figure in FIGURES))
    for name in CONFIGURATIONS:
        of_no_effect = args.device == "cpu" and "offload" in CONFIGURATIONS[name].ewc
        if of_no_effect or not any(part in name for part in args.only):
            continue
        found = measured_apart(name, args.device, args.threads)
        print(
            f"{name:98}" + "".join(f"{'?' if value is None else format(value, '.2f'):>20}" for value in found.values())
        )
        rows += [
            row("memory", f"{name} {figure}", value=value, unit="B/parameter", device=args.device, weights=weights,
                tensors=len(MODEL), configuration=name, figure=figure)
            for figure, value in found.items()
            if value is not None
        ]  # fmt: skip
        write(args.out or ROOT / "benchmarks" / "results" / machine() / "memory.json", rows)


if __name__ == "__main__":
    main()
