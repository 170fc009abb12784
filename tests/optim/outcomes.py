"""A pytest plugin that writes every test's outcome to the file that FASTEWC_OUTCOMES names: [[id, outcome, why], …]."""

import json
import os
from pathlib import Path

import pytest

FILE = "FASTEWC_OUTCOMES"
_found: list[tuple[str, str, str]] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext[-400:]
        _found.append((report.nodeid, report.outcome, why))


def pytest_sessionfinish() -> None:
    Path(os.environ[FILE]).write_text(json.dumps(_found), encoding="utf-8")
