"""Finding and building the native library. What loads one for real is in test_install.py, in processes of its own."""

from pathlib import Path

import pytest
import torch

from fastewc import _build, _extension


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A process that has looked for nothing yet, an empty cache and a package without a library."""
    monkeypatch.setattr(_extension, "_outcome", _extension._Outcome())
    monkeypatch.setattr(_extension, "_package", tmp_path / "package")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTEWC_JIT", raising=False)
    monkeypatch.delenv("CXX", raising=False)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler is on the PATH, as far as anyone can see without running it."""
    monkeypatch.setattr(_build, "compiler", lambda: ["c++"])


def put_library(folder: Path, digest: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _build.LIBRARY_NAME
    path.write_bytes(b"\x7fELF" + digest.encode() + b"\0")
    return path


def test_buildable_until_built(compiler: None) -> None:
    status = _extension.status()
    assert status.state == "buildable"
    assert "buildable" in status.reason
    assert "python -m fastewc build" in status.reason


def test_the_package_comes_before_the_cache(compiler: None, tmp_path: Path) -> None:
    cached = put_library(_extension.cache_folder(), _build.source_digest())
    assert _extension.status() == _extension.Status("built", f"prebuilt at {cached}")
    packaged = put_library(tmp_path / "package", _build.source_digest())
    assert _extension.status() == _extension.Status("built", f"prebuilt at {packaged}")


def test_a_library_of_other_sources_is_not_used(compiler: None, tmp_path: Path) -> None:
    put_library(tmp_path / "package", "fastewc-sources-000000000000000000000000")
    assert _extension.status().state == "buildable"


def test_jit_can_be_forbidden(compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTEWC_JIT", "0")
    monkeypatch.setattr(_build, "compile_library", lambda target: pytest.fail("compiled although it was forbidden"))
    status = _extension.status()
    assert status.state == "missing"
    with pytest.raises(_extension.NativeUnavailable, match=r"FASTEWC_JIT=0 forbids.*`python -m fastewc build` adds it"):
        _extension.load()


def test_missing_pieces_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -x")
    assert "CXX=no-such-compiler was not found; then `python -m fastewc build` adds it" in _extension.status().reason
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "none of c++, g++, clang++ is on the PATH" in _extension.status().reason
    assert _extension.status().state == "missing"


def test_a_failed_build_is_remembered_with_the_compilers_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log = tmp_path / "runs"
    broken = tmp_path / "broken-c++"
    broken.write_text(f'#!/bin/sh\necho run >> "{log}"\necho "first" >&2\necho "internal error: no luck" >&2\nexit 3\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    for _ in range(2):
        with pytest.raises(_extension.NativeUnavailable) as caught:
            _extension.load()
        for words in ("exit status 3", "internal error: no luck", "`python -m fastewc build` adds it"):
            assert words in str(caught.value)
    assert log.read_text() == "run\n"
    assert _extension.status().state == "missing"
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_an_unwritable_cache_is_a_reason_not_a_crash(
    compiler: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(_extension.NativeUnavailable, match="Not a directory"):
        _extension.load()


def test_without_a_home_the_package_still_serves(
    compiler: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(_extension.os.path, "expanduser", lambda path: path)
    assert "this user has no home; set XDG_CACHE_HOME" in _extension.status().reason
    with pytest.raises(_extension.NativeUnavailable, match="set XDG_CACHE_HOME"):
        _extension.load()
    monkeypatch.setattr(_extension, "_outcome", _extension._Outcome())
    put_library(tmp_path / "package", _build.source_digest())
    assert _extension.status().state == "built"


def test_build_goes_to_the_package_else_to_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def compile_library(target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("")

    monkeypatch.setattr(_build, "compile_library", compile_library)
    assert _extension.build() == tmp_path / "package" / "_cpu.abi3.so"
    # Root may write anywhere but not below a file, so this is read-only for every user.
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(_extension, "_package", tmp_path / "file")
    assert _extension.build() == _extension.cache_folder() / "_cpu.abi3.so"


def test_the_cache_is_keyed_by_sources_torch_and_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    folders = {_extension.cache_folder()}
    with monkeypatch.context() as changed:
        changed.setattr(_build, "source_digest", lambda: "others")
        folders.add(_extension.cache_folder())
    with monkeypatch.context() as changed:
        changed.setattr(torch, "__version__", "2.99.0")
        folders.add(_extension.cache_folder())
    with monkeypatch.context() as changed:
        changed.setattr(_extension, "_cpu", lambda: "another machine")
        folders.add(_extension.cache_folder())
    assert len(folders) == 4
    assert _extension.cache_folder() in folders


def test_the_digest_follows_every_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "csrc"
    (folder / "op").mkdir(parents=True)
    (folder / "common.h").write_text("a")
    (folder / "op" / "op_cpu.cpp").write_text("b")
    monkeypatch.setattr(_build, "source_folder", lambda: folder)
    digests = [_build.source_digest()]
    (folder / "common.h").write_text("c")
    digests.append(_build.source_digest())
    (folder / "op" / "op_cpu.cpp").write_text("d")
    digests.append(_build.source_digest())
    monkeypatch.setattr(_build, "_FLAGS", (*_build._FLAGS, "-g"))
    digests.append(_build.source_digest())
    assert len(set(digests)) == 4


def test_a_failed_compilation_leaves_the_old_file_and_no_scratch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    target = tmp_path / "lib" / "_cpu.abi3.so"
    target.parent.mkdir()
    target.write_text("old")
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(_build.BuildError, match="exit status 1"):
        _build.compile_library(target)
    assert [path.name for path in target.parent.iterdir()] == ["_cpu.abi3.so"]
    assert target.read_text() == "old"


def test_torch_without_stable_headers_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Found:
        submodule_search_locations = (str(tmp_path),)

    monkeypatch.setattr(_build.importlib.util, "find_spec", lambda name: Found)
    with pytest.raises(_build.BuildError, match=r"no Stable ABI headers; wanted torch >= 2.11"):
        _build.torch_folder()
    monkeypatch.setattr(_build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(_build.BuildError, match="torch is not installed"):
        _build.torch_folder()
