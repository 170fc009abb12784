"""The contenders of ``benchmarks.ops.ewc_step`` under pytest-benchmark, each behind the same gate.

pytest benchmarks/ops --benchmark-only [--benchmark-group-by=param:model] [-k "mlp and fastewc"]
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from benchmarks.cpu_clones import chosen_isas
from benchmarks.ops.ewc_step import Gate
from benchmarks.ops.ewc_step_contenders import Board, builders
from benchmarks.ops.model_shapes import MODELS

BUILDERS = builders(compile_seconds=180.0)


@functools.lru_cache(maxsize=1)
def gate_of(model: str) -> Gate:
    """One model's memory at a time."""
    board = Board(MODELS[model], "cuda" if torch.cuda.is_available() else "cpu")
    board.drift()
    return Gate(board)


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("model", ["mlp", "resnet18"])
def test_step(model: str, name: str, benchmark: Any) -> None:
    gate = gate_of(model)
    board = gate.board
    try:
        contender = BUILDERS[name](board)
    except NotImplementedError as error:
        pytest.skip(str(error))
    gate.check(name, contender)
    benchmark.extra_info |= {
        "bytes_per_weight": contender.bytes_per_weight,
        "weights": sum(p.numel() for p in board.params),
        "device": str(board.device),
        "clones": chosen_isas(),
    }

    def call() -> None:
        contender.call()
        if board.device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(call, setup=contender.prepare, rounds=30, warmup_rounds=3)
