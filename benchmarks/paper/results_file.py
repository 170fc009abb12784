"""The results of a program that can be interrupted: a file of rows, written whole after each one."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.results_row import Timing, row, write

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


class Results:
    """The rows of a results file; written whole after each addition.

    Raises:
        ValueError: the file holds runs of another setup.
    """

    def __init__(self, file: Path, setup: DataclassInstance) -> None:
        self.file, self._setup = file, json.loads(json.dumps(asdict(setup)))  # as it is read back: no tuples
        self.rows: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
        other = next((one["extra"]["setup"] for one in self.rows if one["extra"]["setup"] != self._setup), None)
        if other is not None:
            raise ValueError(f"{file} holds runs of {other}, not {self._setup}; give another --out")

    def __contains__(self, name: str) -> bool:
        return any(one["name"] == name for one in self.rows)

    def add(
        self, name: str, timing: Timing | None = None, *, unit: str, value: float | None = None, **extra: Any
    ) -> None:
        """One more row."""
        self.rows.append(row("paper", name, timing, value=value, unit=unit, setup=self._setup, **extra))
        write(self.file, self.rows)
