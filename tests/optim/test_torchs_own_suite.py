"""torch's own optimizer tests, in torch's own words, on our optimizers: where there is a network, or a checkout."""

import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.optim import torchs_own
from tests.optim.optimizer_infos import NAMED

STAND_IN = """
import torch
from optim.test_lrscheduler import TestLRScheduler  # noqa: F401
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_optimizers import optim_db, optims
from torch.testing._internal.common_utils import TestCase


class TestOptimRenewed(TestCase):
    @optims(optim_db, dtypes=[torch.float32])
    def test_tensor_lr(self, device, dtype, optim_info):
        self.assertTrue(optim_info.optim_cls.__module__.startswith("fastewc.optim"))

    @optims([o for o in optim_db if "fused" in o.supported_impls], dtypes=[torch.float32])
    def test_param_groups_lr(self, device, dtype, optim_info):
        self.assertFalse("differentiable" in optim_info.supported_impls)
        self.assertNotEqual(optim_info.name, "Adam")

    @optims(optim_db)
    def test_another(self, device, dtype, optim_info):
        raise AssertionError("nobody asked for this one")


instantiate_device_type_tests(TestOptimRenewed, globals(), only_for="cpu")
"""


def test_torchs_own_tests_pass(tmp_path: Path):
    try:
        text = torchs_own.source()
    except torchs_own.CannotBeHad as reason:
        pytest.skip(str(reason))
    found = torchs_own.run(text, tmp_path)
    failed = [f"{test}: {why}" for test, outcome, why in found if outcome == "failed"]
    assert not failed, "\n".join(failed)
    passed = [test for test, outcome, _ in found if outcome == "passed"]
    written = [name for name in NAMED if f"def {name}(" in text.read_text(encoding="utf-8")]
    needs_a_gpu = {"test_fused_does_not_step_if_foundinf", "test_mixed_device_dtype"}
    assert [n for n in written if n not in needs_a_gpu and not any(f"{n}_" in test for test in passed)] == []
    assert len(written) > 20


def test_our_optimizers_are_what_torchs_text_meets(tmp_path: Path):
    text = tmp_path / "test_optim.py"
    text.write_text(STAND_IN, encoding="utf-8")
    found = torchs_own.run(text, tmp_path)
    outcomes = {test.split("::")[-1]: outcome for test, outcome, _ in found}
    assert outcomes == {
        **{f"test_tensor_lr_{name}_cpu_float32": "passed" for name in ("SGD", "Adam", "AdamW")},
        **{f"test_param_groups_lr_{name}_cpu_float32": "passed" for name in ("SGD", "AdamW")},
        "test_param_groups_lr_Adam_cpu_float32": "failed",
    }
    with pytest.raises(RuntimeError, match="no test of"):
        torchs_own.run(text, tmp_path, ("test_that_is_not_there",))


def test_the_text_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Answer:
        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def read(self) -> bytes:
            return b"# tests"

    asked: list[str] = []
    monkeypatch.delenv(torchs_own.CHECKOUT, raising=False)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr("torch.__version__", "2.11.0+cpu")
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: asked.append(url) or Answer())
    assert torchs_own.source().read_text(encoding="utf-8") == "# tests"
    assert torchs_own.source().parent.name == "v2.11.0"
    assert asked == ["https://raw.githubusercontent.com/pytorch/pytorch/v2.11.0/test/test_optim.py"]

    def refuses(url: str, timeout: float) -> Any:
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", refuses)
    torchs_own.source()
    monkeypatch.setattr("torch.__version__", "2.12.0")
    with pytest.raises(torchs_own.CannotBeHad, match=r"v2\.12\.0/test/test_optim\.py cannot be fetched .*no route"):
        torchs_own.source()
    another = os.getuid() + 1
    monkeypatch.setattr("os.getuid", lambda: another)
    (tmp_path / f"fastewc-torch-tests-{os.getuid()}").mkdir()
    with pytest.raises(torchs_own.CannotBeHad, match="belongs to somebody else"):
        torchs_own.source()
