"""Finding and building the native libraries. What loads one for real is in test_install.py, in processes of its own."""

from pathlib import Path

import pytest
import torch

from fastewc import _build, _extension

both = pytest.mark.parametrize("device_type", _build.DEVICE_TYPES)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A process that has looked for nothing yet, an empty cache and a package without a library."""
    forget(monkeypatch)
    monkeypatch.setattr(_extension, "_package", tmp_path / "package")
    monkeypatch.setattr(_build, "gpus", lambda: ())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for variable in ("FASTEWC_JIT", "CXX", "CUDACXX", "CUDA_HOME", "FASTEWC_CUDA_ARCHS"):
        monkeypatch.delenv(variable, raising=False)


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = {device_type: _extension._Outcome() for device_type in _build.DEVICE_TYPES}
    monkeypatch.setattr(_extension, "_outcomes", outcomes)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler is on the PATH, as far as anyone can see without running it."""
    monkeypatch.setattr(_build, "compiler", lambda device_type: ["c++"])


def put_library(folder: Path, device_type: str, digest: str | None = None, archs: str = "80 90+PTX") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _build.library_name(device_type)
    digest = digest or _build.source_digest(device_type)
    path.write_bytes(b"\x7fELF" + f"{digest} for {archs if device_type == 'cuda' else ''};".encode() + b"\0")
    return path


@both
def test_buildable_until_built(compiler: None, device_type: str) -> None:
    status = _extension.status(device_type)
    assert status.state == "buildable"
    assert "buildable" in status.reason
    assert "python -m fastewc build" in status.reason


@both
def test_the_package_comes_before_the_cache(compiler: None, tmp_path: Path, device_type: str) -> None:
    cached = put_library(_extension.cache_folder(device_type), device_type)
    assert _extension.status(device_type) == _extension.Status("built", f"prebuilt at {cached}")
    packaged = put_library(tmp_path / "package", device_type)
    assert _extension.status(device_type) == _extension.Status("built", f"prebuilt at {packaged}")


@both
def test_a_library_of_other_sources_is_not_used(compiler: None, tmp_path: Path, device_type: str) -> None:
    put_library(tmp_path / "package", device_type, "fastewc-sources-000000000000000000000000")
    assert _extension.status(device_type).state == "buildable"


@pytest.mark.parametrize(
    ("archs", "present", "usable"),
    [
        ("80 90", ("80", "86", "90"), True),  # machine code serves later GPUs of its generation
        ("90", ("80", "90"), False),
        ("86", ("80",), False),
        ("80", ("90",), False),  # but no other generation
        ("80+PTX", ("75", "90"), False),
        ("80+PTX", ("90", "120"), True),
        ("90a", ("90",), True),
    ],
)
def test_a_library_for_other_gpus_is_not_used(
    compiler: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, archs: str, present: tuple[str, ...], usable: bool
) -> None:
    put_library(tmp_path / "package", "cuda", archs=archs)
    monkeypatch.setattr(_build, "gpus", lambda: present)
    assert _extension.status("cuda").state == ("built" if usable else "buildable")


@both
def test_jit_can_be_forbidden(compiler: None, monkeypatch: pytest.MonkeyPatch, device_type: str) -> None:
    monkeypatch.setenv("FASTEWC_JIT", "0")
    monkeypatch.setattr(_build, "compile_library", lambda *args: pytest.fail("compiled although it was forbidden"))
    status = _extension.status(device_type)
    assert status.state == "missing"
    with pytest.raises(_extension.NativeUnavailable, match=r"FASTEWC_JIT=0 forbids.*`python -m fastewc build` adds it"):
        _extension.load(device_type)


def test_missing_pieces_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -x")
    assert "CXX=no-such-compiler was not found; then `python -m fastewc build` adds it" in _extension.status().reason
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "none of c++, g++, clang++ is on the PATH" in _extension.status().reason
    assert _extension.status().state == "missing"


def torch_in(folder: Path, cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "lib").mkdir(parents=True)
    (folder / "lib" / ("libtorch_cuda.so" if cuda else "libtorch_cpu.so")).write_text("")
    monkeypatch.setattr(_build, "torch_folder", lambda: folder)


def put_nvcc(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nvcc").write_text("#!/bin/sh\n")
    (folder / "nvcc").chmod(0o755)
    return str(folder / "nvcc")


def test_nvcc_is_searched_in_a_fixed_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch_in(tmp_path / "torch", True, monkeypatch)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    found = {name: put_nvcc(tmp_path / name) for name in ("path", "home/bin", "named")}
    assert _build.compiler("cuda") == [found["path"]]
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert _build.compiler("cuda") == [found["home/bin"]]
    monkeypatch.setenv("CUDACXX", f"{found['named']} -ccbin g++")
    assert _build.compiler("cuda") == [found["named"], "-ccbin", "g++"]
    monkeypatch.setenv("CUDACXX", "no-such-nvcc")
    assert "CUDACXX=no-such-nvcc was not found; then `python -m" in _extension.status("cuda").reason


def test_without_a_cuda_build_of_torch_there_is_no_cuda_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch_in(tmp_path / "torch", False, monkeypatch)
    status = _extension.status("cuda")
    assert status.state == "missing"
    assert "this torch is not a CUDA build" in status.reason
    with pytest.raises(_extension.NativeUnavailable, match="not a CUDA build"):
        _extension.load("cuda")


@pytest.mark.parametrize(
    ("named", "present", "wanted"),
    [
        ("", (), ("80", "90+PTX")),
        ("", ("86", "90"), ("86", "90")),
        ("8.0; 9.0a,10.0+PTX", ("86",), ("80", "90a", "100+PTX")),
    ],
)
def test_architectures(
    named: str, present: tuple[str, ...], wanted: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTEWC_CUDA_ARCHS", named)
    monkeypatch.setattr(_build, "gpus", lambda: present)
    assert _build.cuda_archs() == wanted


def test_an_unknown_architecture_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTEWC_CUDA_ARCHS", "80 hopper")
    with pytest.raises(_build.BuildError, match=r"wanted architectures such as 80 or 90\+PTX, given hopper"):
        _build.cuda_archs()


def test_gpus_are_asked_of_the_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _build.gpus.__wrapped__() == ()
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf '9.0\\n8.6\\n9.0\\n'\n")
    smi.chmod(0o755)
    assert _build.gpus.__wrapped__() == ("86", "90")


def test_a_failed_build_is_remembered_with_the_compilers_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log = tmp_path / "runs"
    broken = tmp_path / "broken-c++"
    broken.write_text(f'#!/bin/sh\necho run >> "{log}"\necho "first" >&2\necho "internal error: no luck" >&2\nexit 3\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    runs = []
    for _ in range(2):
        with pytest.raises(_extension.NativeUnavailable) as caught:
            _extension.load()
        runs.append(log.read_text())
        for words in ("exit status 3", "internal error: no luck", "`python -m fastewc build` adds it"):
            assert words in str(caught.value)
    assert runs[0] == runs[1]
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
    forget(monkeypatch)
    put_library(tmp_path / "package", "cpu")
    assert _extension.status().state == "built"


@both
def test_build_goes_to_the_package_else_to_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device_type: str
) -> None:
    def compile_library(device_type: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("")

    monkeypatch.setattr(_build, "compile_library", compile_library)
    name = f"_{device_type}.abi3.so"
    assert _extension.build(device_type) == tmp_path / "package" / name
    # Root may write anywhere but not below a file, so this is read-only for every user.
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(_extension, "_package", tmp_path / "file")
    assert _extension.build(device_type) == _extension.cache_folder(device_type) / name


@both
def test_the_cache_is_keyed_by_sources_torch_and_machine(monkeypatch: pytest.MonkeyPatch, device_type: str) -> None:
    folders = {_extension.cache_folder(device_type)}
    for owner, name, other in (
        (_build, "source_digest", lambda device_type: "others"),
        (torch, "__version__", "2.99.0"),
        (_extension, "_cpu", lambda: "another machine"),
        (_build, "gpus", lambda: ("86",)),
    ):
        with monkeypatch.context() as changed:
            changed.setattr(owner, name, other)
            folders.add(_extension.cache_folder(device_type))
    assert len(folders) == 4  # the CPU doesn't matter to one library, the GPUs don't to the other
    assert _extension.cache_folder(device_type) in folders


def test_the_digest_follows_every_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "csrc"
    (folder / "op").mkdir(parents=True)
    monkeypatch.setattr(_build, "source_folder", lambda: folder)
    digests: dict[str, list[str]] = {"cpu": [], "cuda": []}

    def changed() -> list[str]:
        """The device types whose digest is another than before."""
        for device_type, seen in digests.items():
            seen.append(_build.source_digest(device_type))
        return [device_type for device_type, seen in digests.items() if seen[-1] not in seen[:-1]]

    for name, concerns in (
        ("common.h", ["cpu", "cuda"]),
        ("op/op_cpu.cpp", ["cpu"]),
        ("op/op_cuda.cu", ["cuda"]),
        ("op/README.md", []),
    ):
        for text in ("a", "b"):
            (folder / name).write_text(text)
            assert changed() == concerns, name
    monkeypatch.setitem(_build._FLAGS, "cuda", (*_build._FLAGS["cuda"], "-g"))
    assert changed() == ["cuda"]


def test_torch_without_stable_headers_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Found:
        submodule_search_locations = (str(tmp_path),)

    monkeypatch.setattr(_build.importlib.util, "find_spec", lambda name: Found)
    with pytest.raises(_build.BuildError, match=r"no Stable ABI headers; wanted torch >= 2.11"):
        _build.torch_folder()
    monkeypatch.setattr(_build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(_build.BuildError, match="torch is not installed"):
        _build.torch_folder()
