"""python -m fastewc: what each command prints and how it exits."""

import sys
import types
from pathlib import Path

import pytest
import torch

from fastewc import __main__ as command_line
from fastewc import _build, _extension, impl_report
from fastewc.ops.squared_norm_grad import cases


def test_info_prints_the_versions_and_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert f"torch {torch.__version__}" in printed
    assert str(impl_report()) in printed


def few_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    few = [case for case in cases.CASES if case.id in ("logits-33x10-normal", "softmax-33x10-normal")]
    assert len(few) == 2
    monkeypatch.setattr(command_line, "_cases", lambda: iter([("squared_norm_grad", case) for case in few]))


def test_check_passes_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    few_cases(monkeypatch)
    assert command_line.main(["check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "all agree with the reference"
    assert any(
        line.split()[:3] == ["squared_norm_grad", "reference", "cpu"] and "8 of 8 agree" in line for line in lines
    )
    assert any(
        line.split()[:3] == ["squared_norm_grad", "triton", "cpu"] and "not implemented" in line for line in lines
    )


def test_check_fails_on_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    few_cases(monkeypatch)
    right = cases.squared_norm_grad
    monkeypatch.setattr(cases, "squared_norm_grad", lambda y, output, impl: right(y, output, impl) * 1.5)
    assert command_line.main(["check"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED: 0 of 8 agree" in printed
    assert "outside the rounding bound" in printed


def test_check_finds_every_op_with_cases() -> None:
    folder = Path(command_line.ops.__file__).parent
    wanted = {path.parent.name for path in folder.glob("*/cases.py")}
    assert {op for op, _ in command_line._cases()} == wanted
    assert "squared_norm_grad" in wanted


def test_build_says_where(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(_extension, "build", lambda device_type: Path(f"/somewhere/{device_type}.so"))
    assert command_line.main(["build"]) == 0
    assert capsys.readouterr().out == "built /somewhere/cpu.so\nbuilt /somewhere/cuda.so\n"


@pytest.mark.parametrize(("broken", "gpu", "status"), [("cpu", False, 1), ("cuda", False, 0), ("cuda", True, 1)])
def test_build_fails_where_something_that_could_run_is_missing(
    broken: str, gpu: bool, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build(device_type: str) -> Path:
        if device_type == broken:
            raise _build.BuildError("no compiler")
        return Path("/somewhere")

    monkeypatch.setattr(_extension, "build", build)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert command_line.main(["build"]) == status
    assert f"the native {broken.upper()} kernels could not be built: no compiler" in capsys.readouterr().err


def test_demo_gets_its_own_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []

    def main(argv: list[str]) -> int:
        given.append(argv)
        return 7

    demo = types.SimpleNamespace(main=main)
    monkeypatch.setitem(sys.modules, "fastewc.demo", demo)
    monkeypatch.setattr(command_line.importlib.import_module("fastewc"), "demo", demo, raising=False)
    assert command_line.main(["demo", "--tasks", "3", "--help"]) == 7
    assert given == [["--tasks", "3", "--help"]]


@pytest.mark.parametrize("argv", [[], ["frobnicate"], ["info", "--nonsense"]])
def test_unknown_words_exit_with_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command_line.main(argv)
    assert stopped.value.code == 2
    assert "info | check | build | demo" in capsys.readouterr().err
