"""The install paths, really taken, offline: wheels with and without native parts, the first native call, the cache."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from fastewc import _build

ROOT = Path(__file__).resolve().parents[1]

FIRST_CALL = """
import sys, torch, fastewc
from fastewc import _extension
assert fastewc.__file__.startswith(sys.argv[1]), fastewc.__file__
print(fastewc.impl_report()["squared_norm_grad"]["native"]["reason"])
for impl in sys.argv[2:]:
    try:
        print(impl, fastewc.ops.squared_norm_grad(torch.tensor([1.0, -2.0]), "logits", impl=impl).tolist())
    except NotImplementedError as error:
        print(impl, "raised", " ".join(str(error).split()))
print(fastewc.impl_report()["squared_norm_grad"]["native"])
print("loaded", _extension._outcomes["cpu"].loaded)
"""


def has_compiler() -> bool:
    try:
        return bool(_build.compiler())
    except _build.BuildError:
        return False


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler, and there is none here")


def environment(**extra: str) -> dict[str, str]:
    """The outer environment without what steers the build, and without nvcc: test_cuda_build.py waits for it once."""
    steering = ("CXX", "FASTEWC_JIT", "PYTHONPATH")
    kept = {name: text for name, text in os.environ.items() if name not in steering}
    no_cuda = {"CUDACXX": "/bin/false", "CUDA_VISIBLE_DEVICES": ""}
    return {**kept, **no_cuda, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **extra}


def build_wheel(folder: Path, python: str = sys.executable, **env: str) -> Path:
    """pip wheel of a copy of the checkout: what `pip install .` does, without leaving files in the checkout."""
    source = folder / "source"
    source.mkdir(parents=True)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("fastewc", "csrc"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    options = ["--no-deps", "--no-build-isolation", "-w", str(folder / "wheels")]
    command = [python, "-m", "pip", "wheel", *options, "."]
    done = subprocess.run(command, cwd=source, env=environment(**env), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (folder / "wheels").glob("*.whl")
    return wheel


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def wheel_without_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("broken"), CXX="/bin/false")


@pytest.fixture
def installed(wheel_without_library: Path, tmp_path: Path) -> Path:
    """A folder with the package as pip leaves it where nothing could be compiled."""
    with zipfile.ZipFile(wheel_without_library) as archive:
        archive.extractall(tmp_path / "site")
    return tmp_path / "site"


def call(site: Path, *impls: str, **env: str) -> subprocess.CompletedProcess[str]:
    """FIRST_CALL in a new process that sees only the installed package, with a cache folder beside it."""
    env = environment(PYTHONPATH=str(site), XDG_CACHE_HOME=str(site.parent / "cache"), **env)
    command = [sys.executable, "-c", FIRST_CALL, str(site), *impls]
    done = subprocess.run(command, cwd=site.parent, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def our_lines(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("fastewc:")]


@needs_compiler
def test_wheel_built_beside_torch_has_the_library_for_every_later_python(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path)
    assert "-cp310-abi3-" in wheel.name
    assert {"fastewc/_cpu.abi3.so", "fastewc/csrc/common.h", "fastewc/py.typed"} <= names_in(wheel)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    done = call(tmp_path / "site", "native", "auto", FASTEWC_JIT="0")
    assert "native [2.0, -4.0]\nauto [2.0, -4.0]" in done.stdout
    assert f"loaded {tmp_path / 'site' / 'fastewc' / '_cpu.abi3.so'}" in done.stdout
    assert not (tmp_path / "cache").exists()


def test_a_broken_compiler_never_fails_the_install(wheel_without_library: Path) -> None:
    names = names_in(wheel_without_library)
    assert not [name for name in names if name.endswith(".so")]
    sources = {f"fastewc/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "csrc").rglob("*.*")}
    assert sources <= names


def test_without_torch_the_wheel_is_pure_python(tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", symlinks=True)
    python = next((tmp_path / "venv").glob("bin/python"))
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    # find_spec would warn where a test before has imported distutils.
    tools = Path(importlib.metadata.distribution("setuptools").locate_file(""))
    (described,) = tools.glob("setuptools-*.dist-info")
    pip = Path(importlib.metadata.distribution("pip").locate_file("pip"))
    for folder in (pip, tools / "setuptools", tools / "_distutils_hack", described):
        (packages / folder.name).symlink_to(folder)
    command = [python, "-c", "import torch"]
    absent = subprocess.run(command, env=environment(), capture_output=True, check=False)
    assert absent.returncode != 0
    wheel = build_wheel(tmp_path, str(python))
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "fastewc/csrc/common.h" in names_in(wheel)
    assert not [name for name in names_in(wheel) if name.endswith(".so")]


@needs_compiler
def test_the_first_native_call_builds_into_the_cache_once(installed: Path) -> None:
    first = call(installed, "auto", "native")
    assert "buildable" in first.stdout.splitlines()[0]
    assert "auto [2.0, -4.0]\nnative [2.0, -4.0]" in first.stdout
    assert len(our_lines(first.stderr)) == 1
    assert "compiling" in first.stderr
    (library,) = (installed.parent / "cache").rglob("*.so")
    assert f"loaded {library}" in first.stdout
    second = call(installed, "native", FASTEWC_JIT="0")
    assert "native [2.0, -4.0]" in second.stdout
    assert our_lines(second.stderr) == []
    assert list((installed.parent / "cache").rglob("*.so")) == [library]
    assert not list((installed.parent / "cache").rglob(".build-*"))


@needs_compiler
def test_processes_may_build_at_the_same_time(installed: Path) -> None:
    env = environment(PYTHONPATH=str(installed), XDG_CACHE_HOME=str(installed.parent / "cache"))
    command = [sys.executable, "-c", FIRST_CALL, str(installed), "native"]
    running = [
        subprocess.Popen(
            command, cwd=installed.parent, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for process in running:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert "native [2.0, -4.0]" in out
    assert len(list((installed.parent / "cache").rglob("*.so"))) == 1


def test_forbidden_to_build_auto_takes_the_reference_and_native_raises(installed: Path) -> None:
    done = call(installed, "auto", "auto", "native", FASTEWC_JIT="0")
    assert done.stdout.count("auto [2.0, -4.0]") == 2
    assert "native raised" in done.stdout
    assert "FASTEWC_JIT=0 forbids building at the first call; then `python -m fastewc build` adds it" in done.stdout
    assert "'available': False" in done.stdout
    assert len(our_lines(done.stderr)) == 1
    assert not (installed.parent / "cache").exists()


@pytest.mark.parametrize(
    ("env", "reason"),
    [({"CXX": "/bin/false"}, "/bin/false failed with exit status 1"), ({"PATH": "/nowhere"}, "no C++ compiler")],
    ids=["broken", "absent"],
)
def test_without_a_working_compiler(installed: Path, env: dict[str, str], reason: str) -> None:
    done = call(installed, "auto", "native", **env)
    assert "auto [2.0, -4.0]" in done.stdout
    raised = next(line for line in done.stdout.splitlines() if line.startswith("native raised"))
    assert reason in raised
    assert "python -m fastewc build" in raised
    assert sum("goes without" in line for line in our_lines(done.stderr)) == 1


@needs_compiler
def test_build_command_adds_the_library_to_the_installed_package(installed: Path) -> None:
    env = environment(PYTHONPATH=str(installed), XDG_CACHE_HOME=str(installed.parent / "cache"))
    command = [sys.executable, "-m", "fastewc", "build"]
    done = subprocess.run(command, cwd=installed.parent, env=env, capture_output=True, text=True, check=False)
    library = installed / "fastewc" / "_cpu.abi3.so"
    assert (done.returncode, done.stdout) == (0, f"built {library}\n"), done.stderr
    used = call(installed, "native", FASTEWC_JIT="0")
    assert f"prebuilt at {library}" in used.stdout
    assert "native [2.0, -4.0]" in used.stdout
    env["CXX"] = "/bin/false"
    broken = subprocess.run(command, cwd=installed.parent, env=env, capture_output=True, text=True, check=False)
    assert broken.returncode == 1
    assert "/bin/false failed with exit status 1" in broken.stderr
    assert library.is_file()
