"""torch's own file of optimizer tests: fetched for the torch that is installed, and run over our optimizers."""

import json
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import torch

from tests.optim import outcomes
from tests.optim.optimizer_infos import NAMED

#: A torch checkout, for machines without a network.
CHECKOUT = "FASTEWC_TORCH_CHECKOUT"
ROOT = Path(__file__).parents[2]
_FILE = "test/test_optim.py"
_SECONDS = 10


class CannotBeHad(Exception):
    """Why torch's file is not here."""


def source() -> Path:
    """torch's file of optimizer tests, fetched at most once a version into the user's own temporary folder.

    Raises:
        CannotBeHad: no network, or no such file.
    """
    if checkout := os.environ.get(CHECKOUT):
        return Path(checkout) / _FILE
    version = torch.__version__.split("+")[0]
    ref = f"v{version}" if version.replace(".", "").isdigit() else torch.version.git_version
    kept = _folder() / ref / Path(_FILE).name
    if not kept.exists():
        url = f"https://raw.githubusercontent.com/pytorch/pytorch/{ref}/{_FILE}"
        try:
            with urllib.request.urlopen(url, timeout=_SECONDS) as answer:
                text = answer.read()
        except (urllib.error.URLError, OSError) as error:
            raise CannotBeHad(
                f"torch's own tests were not run: {url} cannot be fetched ({error}); {CHECKOUT}=PATH names a checkout"
            ) from error
        kept.parent.mkdir(exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}")
        partial.write_bytes(text)
        partial.replace(kept)
    return kept


def _folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"fastewc-torch-tests-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise CannotBeHad(f"torch's own tests were not run: {folder} belongs to somebody else")
    return folder


def run(text: Path, folder: Path, names: tuple[str, ...] = NAMED) -> list[tuple[str, str, str]]:
    """[(test, outcome, why)] of these tests of a file, in a process of its own, where optim_db holds our optimizers."""
    (folder / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    results = folder / "outcomes.json"
    results.unlink(missing_ok=True)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib"),
            *("-p", "tests.optim.run_on_ours", "-p", "tests.optim.outcomes", "-W", "ignore"),
            *("-c", str(folder / "pytest.ini"), "--rootdir", str(folder), "-k", " or ".join(names), str(text)),
        ],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), outcomes.FILE: str(results)},
        capture_output=True,
        text=True,
        check=False,
    )
    if not results.exists() or not json.loads(results.read_text(encoding="utf-8")):
        raise RuntimeError(f"no test of {text} was run:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return [tuple(one) for one in json.loads(results.read_text(encoding="utf-8"))]
