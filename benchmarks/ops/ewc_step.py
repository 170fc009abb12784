"""Times of one protected optimizer step on three models, against what people run today.

Every contender must first make the same step as the float64 reference, then all are timed in turns.

python -m benchmarks.ops.ewc_step [--shapes mlp resnet18 gpt2] [--seconds 1] [--device cpu] [--threads N] [--out FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from benchmarks.cpu_clones import chosen_isas
from benchmarks.ops.command_line import Rows, run
from benchmarks.ops.ewc_step_contenders import BASELINES, STEPS, Board, Contender, builders
from benchmarks.ops.model_shapes import MODELS
from benchmarks.results_row import measure_in_turn, row, timing_of
from fastewc.ops.ewc_step import StepRule, StepTensors
from fastewc.ops.ewc_step.cases import Case
from fastewc.testing import assert_all_within_roundings

# Elements of a tensor that are compared: all of a small one, else so many, evenly spaced, first and last among them.
_COMPARED = 65_536
# Elements of each operand of the streaming kernels at most: more than any cache holds.
_STREAMED = 1 << 27


@dataclass(frozen=True)
class Sampled(Case):
    """A case whose inputs are given."""

    tensors: StepTensors = field(default_factory=StepTensors)

    def inputs(self, dtype: torch.dtype) -> StepTensors:
        return deepcopy(self.tensors)


class Gate:
    """Lets a contender through that makes the step of the float64 reference.

    The step is elementwise, so it is judged on a sample of each tensor; only the sample is put back before a step.
    """

    def __init__(self, board: Board) -> None:
        self.board = board
        self.indices = [
            torch.linspace(0, p.numel() - 1, min(p.numel(), _COMPARED), dtype=torch.float64, device=p.device).long()
            for p in board.params
        ]
        self.before = {name: self._take(name) for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
        self.held = {name: self._take(name) for name in ("importances", "anchors")}
        self._wanted: dict[StepRule, tuple[list[Tensor], list[Tensor]]] = {}

    def check(self, name: str, contender: Contender) -> None:
        """Make one step; AssertionError if it is not the reference's, or if the task's gradient has changed."""
        for written in ("params", "exp_avgs", "exp_avg_sqs"):
            for flat, index, values in zip(self._flat(written), self.indices, self.before[written], strict=True):
                flat[index] = values.to(flat.device)
        contender.prepare()
        contender.call()
        adam = contender.rule.kind == "adam"
        got = [self._take(one) for one in ("params", "exp_avgs", *(["exp_avg_sqs"] if adam else []))]
        oracle, scale = self._oracle(contender.rule)
        together = [tensor for one in got for tensor in one]
        assert_all_within_roundings(
            together, oracle, roundings=contender.roundings, error_scale=scale, context=f"{name}:"
        )
        if not all(map(torch.equal, self._take("grads"), self.before["grads"])):
            raise AssertionError(f"{name} changed the task's gradient")

    def _oracle(self, rule: StepRule) -> tuple[list[Tensor], list[Tensor]]:
        if rule not in self._wanted:
            n, adam, held = len(self.indices), rule.kind == "adam", rule.ewc_lambda != 0
            tensors = StepTensors(
                params=self.before["params"],
                grads=self.before["grads"],
                momentum_buffers=[] if adam else self.before["exp_avgs"],
                exp_avgs=self.before["exp_avgs"] if adam else [],
                exp_avg_sqs=self.before["exp_avg_sqs"] if adam else [],
                steps=[torch.tensor(float(STEPS))] * n if adam else [],
                importances=self.held["importances"] if held else [None] * n,
                anchors=self.held["anchors"] if held else [None] * n,
                path_integrals=[None] * n,
            )
            case = Sampled("benchmark", rule, tensors=tensors)
            count = n * (3 if adam else 2)  # the counters come last
            self._wanted[rule] = case.oracle(torch.float32)[:count], case.error_scale(torch.float32)[:count]
        return self._wanted[rule]

    def _flat(self, name: str) -> Iterable[Tensor]:
        return (t.detach().view(-1) for t in getattr(self.board, name))

    def _take(self, name: str) -> list[Tensor]:
        return [flat[index].cpu() for flat, index in zip(self._flat(name), self.indices, strict=True)]


def built(board: Board, compile_seconds: float) -> dict[str, Contender]:
    """Every contender that runs here and passed the gate; the reason is printed for the others."""
    found: dict[str, Contender] = {}
    absent: dict[str, list[str]] = {}
    for name, build in builders(compile_seconds).items():
        try:
            found[name] = build(board)
        except NotImplementedError as error:
            absent.setdefault(str(error), []).append(name)
    for reason, names in absent.items():
        print(f"  without {', '.join(names)}: {reason}")
    board.rest()
    board.drift()
    gate = Gate(board)
    for name, contender in found.items():
        gate.check(name, contender)
    return found


def yardsticks(board: Board) -> dict[str, tuple[Callable[[], object], int]]:
    """Name -> (call, bytes) of plain streaming kernels on three flat tensors as large as the step's six lists.

    The fastest is called the bandwidth. They write in place, as the step does, so every byte on the bus is counted, and
    have about as many reads for a write (6 to 3): a += b (2 to 1), and b ← μb + g, w ← w − αb (3 to 2), torch's fused
    SGD, which has more streams and gets more out of one core. A copy is no measure on a CPU: its stores bypass the
    caches, or fetch lines that nobody counts. On a GPU, where neither happens, it is measured as well.
    """
    n = min(2 * sum(p.numel() for p in board.params), _STREAMED)
    w, g, b = (torch.full((n,), 1e-3, device=board.device) for _ in range(3))
    options = {"weight_decay": 0.0, "momentum": 0.9, "lr": 1e-3, "dampening": 0.0, "nesterov": False}
    momentum = partial(torch._fused_sgd_, [w], [g], [b], **options, maximize=False, is_first_step=False)
    found: dict[str, tuple[Callable[[], object], int]] = {
        "a += b": (lambda: w.add_(g, alpha=1e-6), 12 * n),
        "b = mb + g, w -= ab": (momentum, 20 * n),
    }
    if board.device.type == "cuda":
        found["copy"] = (lambda: b.copy_(g), 8 * n)
    return found


def rows(args: argparse.Namespace) -> Rows:
    for device in args.device:
        for model in args.shapes:
            yield from rows_of(model, device, args.seconds, args.compile_seconds)


def rows_of(model: str, device: str, seconds: float, compile_seconds: float) -> Rows:
    shapes = MODELS[model]
    board = Board(shapes, device)
    weights = sum(p.numel() for p in board.params)
    print(f"ewc_step {model} {device}: {weights:,} weights in {len(shapes)} tensors")
    contenders = built(board, compile_seconds)
    isa = {"isa": torch.backends.cpu.get_cpu_capability(), "clones": chosen_isas()}
    print(f"  {torch.get_num_threads()} CPU threads; torch's vectors: {isa['isa']}, ours: {isa['clones']}")
    plain = yardsticks(board)
    pairs = [(one.prepare, one.call) for one in contenders.values()]
    pairs += [(lambda: None, call) for call, _ in plain.values()]
    times = dict(zip([*contenders, *plain], measure_in_turn(pairs, device=device, seconds=seconds), strict=True))
    common = {"op": "ewc_step", "model": model, "weights": weights, "tensors": len(shapes), "device": device, **isa}
    rates = {name: moved / timing_of(times[name]).median / 1e9 for name, (_, moved) in plain.items()}
    bandwidth = max(rates.values())
    for name, rate in rates.items():
        timing = timing_of(times[name])
        print(f"  {name:<41}{timing.median * 1e3:10.3f} ms{'':29}{rate:8.1f} GB/s")
        yield row("ops", f"ewc_step {model} {device} {name}", timing, **common, gigabytes_per_second=rate)
    for name, one in contenders.items():
        baseline = times[BASELINES[one.rule.kind]]
        ratio = timing_of(own / other for own, other in zip(times[name], baseline, strict=True))
        timing = timing_of(times[name])
        rate = one.bytes_per_weight * weights / timing.median / 1e9
        print(
            f"  {name:<41}{timing.median * 1e3:10.3f} ms  {ratio.median:6.2f}× ({ratio.p20:.2f}–{ratio.p80:.2f})"
            f"{one.bytes_per_weight:4} B {rate:8.1f} GB/s {rate / bandwidth:5.0%}"
        )
        yield row(
            "ops", f"ewc_step {model} {device} {name}", timing, **common, contender=name, dtype="torch.float32",
            bytes_per_weight=one.bytes_per_weight, gigabytes_per_second=rate, share_of_bandwidth=rate / bandwidth,
            baseline=BASELINES[one.rule.kind], ratio=ratio.median, ratio_p20=ratio.p20, ratio_p80=ratio.p80,
        )  # fmt: skip


if __name__ == "__main__":
    run(__doc__, "ewc_step", rows)
