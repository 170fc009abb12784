"""The only chooser: what "auto" takes, what an explicit request gets, what the report says."""

import importlib.util
import logging
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from fastewc import _dispatch, _extension
from fastewc._dispatch import IMPLS, OPS, choose, impl_report

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """Pretend that the library loads (None) or fails with a reason."""

    def pretend(failure: str | None) -> None:
        def load(device_type: str) -> None:
            if failure is not None:
                raise _extension.NativeUnavailable(failure)

        monkeypatch.setattr(_extension, "load", load)
        monkeypatch.setattr(_dispatch, "_told", set())

    return pretend


def test_auto_takes_the_best_that_runs(native: Callable[[str | None], None]) -> None:
    native(None)
    assert choose("squared_norm_grad", "auto", CPU) == "native"
    assert choose("squared_norm_grad", "auto", CUDA) == "triton"
    assert choose("sum_grad_power", "auto", CUDA) == "triton"
    assert choose("squared_norm_grad", "auto", torch.device("meta")) == "reference"
    assert choose("ewc_penalty", "auto", CPU) == "native"
    assert choose("sum_grad_power", "auto", CPU) == "native"


def test_auto_prefers_triton_on_cuda_and_never_on_the_cpu(
    native: Callable[[str | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    native(None)
    kernels = {("ewc_step", "triton"): ("cuda",), ("ewc_step", "native"): ("cpu", "cuda")}
    monkeypatch.setattr(_dispatch, "_KERNELS", kernels)
    assert choose("ewc_step", "auto", CUDA) == "triton"
    assert choose("ewc_step", "auto", CPU) == "native"
    monkeypatch.setattr(_dispatch, "_KERNELS", {("ewc_step", "native"): ("cpu", "cuda")})
    assert choose("ewc_step", "auto", CUDA) == "native"


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("device", [CPU, CUDA, torch.device("meta")], ids=str)
def test_the_reference_runs_everywhere(op: str, device: torch.device) -> None:
    assert choose(op, "reference", device) == "reference"


def test_auto_falls_back_with_one_log_line(
    native: Callable[[str | None], None], caplog: pytest.LogCaptureFixture
) -> None:
    native("no C++ compiler")
    with caplog.at_level(logging.WARNING, "fastewc"):
        assert [choose("squared_norm_grad", "auto", CPU) for _ in range(3)] == ["reference"] * 3
    assert [record.message for record in caplog.records] == [
        'fastewc: no native CPU kernels, impl="auto" goes without: no C++ compiler'
    ]


def test_an_explicit_request_never_falls_back(native: Callable[[str | None], None]) -> None:
    native("no C++ compiler; then `python -m fastewc build` adds it")
    with pytest.raises(NotImplementedError, match=r"no C\+\+ compiler; then `python -m fastewc build` adds it"):
        choose("squared_norm_grad", "native", CPU)
    native(None)
    with pytest.raises(
        NotImplementedError, match=r"can't run on meta tensors: not implemented yet.*for CPU and CUDA tensors only"
    ):
        choose("squared_norm_grad", "native", torch.device("meta"))
    for op in OPS:
        with pytest.raises(NotImplementedError, match=rf"{op} with impl='triton'.*not implemented yet"):
            choose(op, "triton", CPU)


def test_without_triton_cuda_tensors_go_to_the_native_kernels(
    native: Callable[[str | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    native(None)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find_spec(name))
    assert choose("ewc_step", "auto", CUDA) == "native"
    with pytest.raises(NotImplementedError, match="Triton is not installed: `pip install triton` adds it"):
        choose("ewc_step", "triton", CUDA)
    cell = impl_report()["ewc_step"]["triton"]
    assert cell["available"] is False and "Triton is not installed" in cell["reason"]


def test_unknown_names_raise() -> None:
    for impl in ("cuda", "Reference", "", None, 3):
        with pytest.raises(ValueError, match="impl must be 'auto', 'reference', 'triton' or 'native', not"):
            choose("ewc_step", impl, CPU)
    with pytest.raises(ValueError, match="unknown op 'fisher'; wanted one of sum_grad_power"):
        choose("fisher", "auto", CPU)


def test_report_covers_every_op_and_impl_and_prints_as_a_table() -> None:
    report = impl_report()
    assert isinstance(report, dict)
    assert tuple(report) == OPS
    for impls in report.values():
        assert tuple(impls) == IMPLS
        assert all(set(cell) == {"available", "reason"} and cell["reason"] for cell in impls.values())
        assert impls["reference"]["available"] is True
    lines = str(report).splitlines()
    assert lines[0].split() == ["op", "impl", "available", "reason"]
    assert len(lines) == 1 + len(OPS) * len(IMPLS)
    assert [line.split()[:2] for line in lines[1:]] == [[op, impl] for op in OPS for impl in IMPLS]


@pytest.mark.parametrize(
    ("state", "available"), [("loaded", True), ("built", True), ("buildable", True), ("missing", False)]
)
def test_report_repeats_what_the_extension_says(state: str, available: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "status", lambda _: _extension.Status(state, f"{state}: because\nof this"))
    report = impl_report()
    cell = report["squared_norm_grad"]["native"]
    assert cell["available"] is available
    assert f"{state}: because" in cell["reason"]
    assert f"CPU: {state}: because of this" in str(report)
    assert f"CUDA: {state}: because" in report["ewc_step"]["native"]["reason"]


def test_importing_fastewc_loads_neither_triton_nor_the_library() -> None:
    code = """
import sys, torch
before = set(sys.modules)
import fastewc
from fastewc import _extension
new = set(sys.modules) - before
kernels = [name for name in new if name.startswith("fastewc") and name.endswith((".triton", ".native"))]
fast = kernels + [name for name in new if name == "triton"]
assert not fast, fast
fastewc.impl_report()
assert not any(outcome.loaded for outcome in _extension._outcomes.values())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
