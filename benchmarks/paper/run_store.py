"""Finished runs on disk, one JSON line each, so that an interrupted benchmark goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.paper.protocol import Outcome, Protocol


class Run(NamedTuple):
    """Which run: the row's name, "fresh" or "carried", and the seed."""

    row: str
    mode: str
    seed: int

    @property
    def before(self) -> Run | None:
        """The run whose final Adam state this one starts from; None for a new Adam.

        A carried chain is carried 0, carried 1, …; in front of it stands the fresh run of seed 0, so that no member
        of the chain starts with a new Adam. The published averages are of that kind: each process of the authors ran
        many λ with one Adam, and only its very first run began with a new one.
        """
        if self.mode == "fresh":
            return None
        return Run(self.row, "carried", self.seed - 1) if self.seed else Run(self.row, "fresh", 0)


class RunStore:
    """Results under ``out`` (one file per row and mode), Adam states under ``work``.

    Raises:
        ValueError: ``out`` holds runs of a different protocol.
    """

    def __init__(self, out: Path, work: Path, protocol: Protocol) -> None:
        self.out, self.work, self.protocol = out, work, protocol
        self.finished: dict[Run, dict[str, Any]] = {}
        wanted = json.loads(json.dumps(asdict(protocol)))
        for file in sorted(out.glob("*.jsonl")):
            for line in file.read_text().splitlines():
                record = json.loads(line)
                if record["protocol"] != wanted:
                    raise ValueError(
                        f"{file} holds runs of protocol {record['protocol']}, this one is {wanted}; give another --out"
                    )
                self.finished[Run(record["row"], record["mode"], record["seed"])] = record
        out.mkdir(parents=True, exist_ok=True)
        work.mkdir(parents=True, exist_ok=True)

    def _state_file(self, run: Run) -> Path:
        return self.work / f"adam-{run.row}-{run.mode}-{run.seed}.pt"

    def adam_state(self, run: Run) -> dict[str, Any] | None:
        """The state that ``run`` starts from; RuntimeError if the run before it left none."""
        if run.before is None:
            return None
        file = self._state_file(run.before)
        if not file.exists():
            raise RuntimeError(
                f"{run} starts from Adam's state at the end of {run.before}, but {file} is missing: give the "
                f"--work folder of the earlier call, or remove the runs of {run.row} from {self.out} and repeat them"
            )
        state: dict[str, Any] = torch.load(file, weights_only=True)
        return state

    def add(self, run: Run, outcome: Outcome, extra: Mapping[str, Any]) -> None:
        """Write one finished run: the state first, since a result without its state could not be continued."""
        if run.mode == "carried" or run.seed == 0:
            file = self._state_file(run)
            torch.save(outcome.adam_state, file.with_suffix(".tmp"))
            os.replace(file.with_suffix(".tmp"), file)
        record = {
            **run._asdict(),
            "accuracy": outcome.accuracy,
            "per_task": outcome.per_task,
            "when_learned": outcome.when_learned,
            "seconds": round(outcome.seconds, 2),
            "importance_seconds": round(outcome.importance_seconds, 2),
            "protocol": asdict(self.protocol),
            **extra,
        }
        with (self.out / f"{run.row}-{run.mode}.jsonl").open("a") as stream:
            stream.write(json.dumps(record) + "\n")
        self.finished[run] = record

    def accuracies(self, row: str, mode: str, seeds: int) -> list[float]:
        """Final accuracies of the finished runs of one row, in the order of their seeds."""
        return [
            self.finished[run]["accuracy"] for seed in range(seeds) if (run := Run(row, mode, seed)) in self.finished
        ]
