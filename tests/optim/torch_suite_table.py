"""What torch's optimizer tests say of ours, as a table: ``python -m tests.optim.torch_suite_table``.

A row for each named test. The first columns are the tests as rebuilt in test_torch_suite.py, for each implementation
and device; the last one is torch's own text, where it can be fetched. A cell counts tests by outcome; the reasons of
skipped and failed ones follow below. Exits with 1 if any test failed.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import torch

from tests.optim import outcomes, torchs_own
from tests.optim.optimizer_infos import NAMED

Outcome = tuple[str, str, str]
OWN = "torch's own text"


def rebuilt(folder: Path, *, interpreted: bool) -> list[Outcome]:
    """The rebuilt tests, in this process's Python; in Triton's interpreter where asked for."""
    results = folder / f"rebuilt-{interpreted}.json"
    environment = os.environ | {outcomes.FILE: str(results), "TRITON_INTERPRET": str(int(interpreted))}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.optim.outcomes", "-p", "no:cacheprovider"]
    chosen = ["-k", "not in_the_interpreter", "tests/optim/test_torch_suite.py"]
    subprocess.run([*command, *chosen], cwd=torchs_own.ROOT, env=environment, stdout=subprocess.DEVNULL, check=False)
    return json.loads(results.read_text(encoding="utf-8"))


def column(test: str) -> str | None:
    """ "native on cpu" of a test with such parameters."""
    found = re.search(r"(reference|native|triton)-(cpu|cuda)", test)
    return f"{found[1]} on {found[2]}" if found else None


def table(cells: dict[str, dict[str, list[Outcome]]], columns: list[str]) -> str:
    """Markdown."""
    lines = [f"| torch {torch.__version__} | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
    for name in NAMED:
        counts = [Counter(outcome for _, outcome, _ in cells[name][c]) for c in columns]
        told = [", ".join(f"{n} {outcome}" for outcome, n in sorted(count.items())) or "–" for count in counts]
        lines.append(f"| {name} | {' | '.join(told)} |")
    return "\n".join(lines)


def main() -> int:
    cells: dict[str, dict[str, list[Outcome]]] = defaultdict(lambda: defaultdict(list))
    remarks: dict[str, None] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        found = [(column(one[0]), one) for i in (False, True) for one in rebuilt(folder, interpreted=i)]
        try:
            found += [(OWN, one) for one in torchs_own.run(torchs_own.source(), folder)]
        except torchs_own.CannotBeHad as reason:
            remarks[str(reason)] = None
    columns = list(dict.fromkeys(place for place, _ in found if place))
    for place, one in found:
        test, outcome, why = one
        names = [name for name in NAMED if re.search(rf"\b{name}(_(SGD|Adam|AdamW|impl|is_named)\w*)?\b", test)]
        if place and names:
            cells[max(names, key=len)][place].append(one)
        if outcome != "passed" and not (outcome == "skipped" and "CUDA GPU" in why):
            remarks[f"{outcome}: {test}: {why}"] = None
    print(table(cells, [c for c in columns if any(one[1] != "skipped" for row in cells.values() for one in row[c])]))
    print("\n".join(remarks))
    return int(any(remark.startswith("failed") for remark in remarks))


if __name__ == "__main__":
    sys.exit(main())
