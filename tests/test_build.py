"""How the sources are compiled: side by side, and nothing is left of a build that fails, hangs or is interrupted."""

import os
import time
from pathlib import Path

import pytest

from fastewc import _build

# Fails to link, so that a test needs no real compiler; $FOLDER is the test's.
PREAMBLE = """#!/bin/sh
case "$*" in *-shared*) echo linking >&2; exit 7;; esac
echo $$ > "$FOLDER/$$.pid"
"""
HANG = "sleep 300 & echo $! > $FOLDER/$!.pid; wait"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "lib" / "_cpu.abi3.so"
    path.parent.mkdir()
    path.write_text("old")
    return path


def use_compiler(body: str, folder: Path, monkeypatch: pytest.MonkeyPatch, cpus: int = 2) -> None:
    script = folder / "c++"
    script.write_text(PREAMBLE + body + "\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("FOLDER", str(folder))
    monkeypatch.setattr(_build, "_cpus", lambda: cpus)


def started(folder: Path) -> list[int]:
    return [int(path.stem) for path in folder.glob("*.pid")]


def runs(pid: int) -> bool:
    """Whether a process is there and is not a zombie, which only waits for whoever adopted it."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.is_file() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


def assert_nothing_is_left(folder: Path, target: Path) -> None:
    """The old library is untouched, no scratch is beside it and every process ends (killed, but perhaps not yet)."""
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    assert target.read_text() == "old"
    deadline = time.monotonic() + 10
    while any(runs(pid) for pid in started(folder)):
        assert time.monotonic() < deadline, "a compiler is still running"
        time.sleep(0.01)


def test_sources_are_compiled_at_the_same_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, target: Path) -> None:
    both = "until [ $(ls $FOLDER/*.pid | wc -l) -ge 2 ]; do sleep 0.01; done"
    use_compiler(both, tmp_path, monkeypatch)
    monkeypatch.setattr(_build, "_TIMEOUT_SECONDS", 30)
    with pytest.raises(_build.BuildError, match="exit status 7:\nlinking"):
        _build.compile_library("cpu", target)
    sources = list(_build.source_folder().rglob("*_cpu.cpp"))
    assert len(started(tmp_path)) == len(sources) > 2
    assert_nothing_is_left(tmp_path, target)


def test_never_more_at_a_time_than_there_are_cpus(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, target: Path
) -> None:
    alone = 'mkdir "$FOLDER/busy" || { echo "not alone" >&2; exit 3; }; sleep 0.01; rmdir "$FOLDER/busy"'
    use_compiler(alone, tmp_path, monkeypatch, cpus=1)
    with pytest.raises(_build.BuildError, match="exit status 7"):
        _build.compile_library("cpu", target)


def test_the_first_failure_ends_the_others_and_its_last_lines_are_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, target: Path
) -> None:
    one_fails = 'mkdir "$FOLDER/once" 2>/dev/null || { seq 100; echo "no luck" >&2; exit 3; }; ' + HANG
    use_compiler(one_fails, tmp_path, monkeypatch)
    with pytest.raises(_build.BuildError, match="failed with exit status 3:\n") as caught:
        _build.compile_library("cpu", target)
    assert str(caught.value).splitlines()[1:] == [*map(str, range(87, 101)), "no luck"]
    assert_nothing_is_left(tmp_path, target)


def test_an_interrupt_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, target: Path) -> None:
    use_compiler(HANG, tmp_path, monkeypatch)
    sleep = time.sleep

    def interrupted(seconds: float) -> None:
        if len(started(tmp_path)) == 4:
            raise KeyboardInterrupt
        sleep(seconds)

    monkeypatch.setattr(_build.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _build.compile_library("cpu", target)
    monkeypatch.setattr(_build.time, "sleep", sleep)
    assert_nothing_is_left(tmp_path, target)


def test_the_timeout_is_for_the_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, target: Path) -> None:
    use_compiler("sleep 0.4", tmp_path, monkeypatch, cpus=1)
    monkeypatch.setattr(_build, "_TIMEOUT_SECONDS", 0.6)
    with pytest.raises(_build.BuildError, match=r"c\+\+ took longer than 0.6 s"):
        _build.compile_library("cpu", target)
    assert_nothing_is_left(tmp_path, target)


def test_temporary_files_of_the_compiler_go_with_the_scratch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, target: Path
) -> None:
    use_compiler('echo "$TMPDIR" > "$FOLDER/where"; touch "$TMPDIR/left"; exit 3', tmp_path, monkeypatch)
    with pytest.raises(_build.BuildError, match="exit status 3"):
        _build.compile_library("cpu", target)
    assert Path((tmp_path / "where").read_text().strip()).parent == target.parent
    assert_nothing_is_left(tmp_path, target)
