"""How the C++ sources become a library: one recipe for setup.py, ``python -m fastewc build`` and the first call.

Standard library only, and no import of torch: setup.py runs it where torch may be absent.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

#: Stable ABI of torch 2.11: a library built against any later torch runs on every torch from 2.11 on.
TORCH_TARGET_VERSION = "0x020b000000000000"
LIBRARY_NAME = "_cpu.abi3.so"
COMMAND = "python -m fastewc build"

_PACKAGE = Path(__file__).resolve().parent
# -fopenmp-simd honours `#pragma omp simd` (which vectorises sums) without linking OpenMP; unlike -ffast-math,
# -fno-trapping-math and -fno-math-errno change no result, and NaN and infinities keep their meaning.
_FLAGS = (
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
)
_TIMEOUT_SECONDS = 600
_LINES_SHOWN = 15


class BuildError(RuntimeError):
    """The native parts can't be built here; the text says why, with the compiler's last lines if it ran."""


def source_folder() -> Path:
    """The folder of the C++ sources: in the installed package, or beside it in a checkout.

    Raises:
        BuildError: neither exists.
    """
    for folder in (_PACKAGE / "csrc", _PACKAGE.parent / "csrc"):
        if (folder / "common.h").is_file():
            return folder
    raise BuildError(f"no C++ sources: csrc/common.h is neither in {_PACKAGE} nor beside it; reinstall fastewc")


def compiler() -> list[str]:
    """The C++ compiler as a command: $CXX, else the first of c++, g++, clang++ on the PATH.

    Raises:
        BuildError: there is none, or $CXX names one that does not exist.
    """
    if sys.platform == "win32":
        raise BuildError("the native parts need GCC or Clang on Linux or macOS; they are not built on Windows")
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        if shutil.which(named[0]) is None:
            raise BuildError(f"no C++ compiler: CXX={named[0]} was not found")
        return named
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name) is not None:
            return [name]
    raise BuildError("no C++ compiler: none of c++, g++, clang++ is on the PATH; install one or set CXX")


def torch_folder() -> Path:
    """The folder of the installed torch, found without importing it.

    Raises:
        BuildError: torch is absent, or too old to have the Stable ABI's headers.
    """
    found = importlib.util.find_spec("torch")
    if found is None or not found.submodule_search_locations:
        raise BuildError("torch is not installed in this Python")
    folder = Path(next(iter(found.submodule_search_locations)))
    if not (folder / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
        raise BuildError(f"torch in {folder} has no Stable ABI headers; wanted torch >= 2.11")
    return folder


def source_digest() -> str:
    """Hash of sources and flags; compiled into the library, so that one of other sources is recognised."""
    folder = source_folder()
    digest = hashlib.sha256(" ".join(_FLAGS).encode())
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".cpp", ".h"):
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return "fastewc-sources-" + digest.hexdigest()[:24]


def compile_library(target: Path) -> None:
    """Compile the CPU kernels to ``target``; readers see the old file or the complete new one, never a part.

    Raises:
        BuildError: no compiler, no headers, or the compilation failed.
        OSError: the folder of ``target`` can't be written.
    """
    csrc, torch, command = source_folder(), torch_folder(), compiler()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as scratch:
        built = Path(scratch) / LIBRARY_NAME
        command += [*_FLAGS, f'-DFASTEWC_SOURCE_DIGEST="{source_digest()}"']
        command += [f"-I{torch / 'include'}", *map(str, sorted(csrc.rglob("*_cpu.cpp")))]
        command += ["-o", str(built), f"-L{torch / 'lib'}", "-ltorch_cpu"]
        if sys.platform == "darwin":
            command += ["-undefined", "dynamic_lookup"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
        except subprocess.TimeoutExpired as error:
            raise BuildError(f"{command[0]} took longer than {_TIMEOUT_SECONDS} s") from error
        if done.returncode != 0 or not built.is_file():
            printed = (done.stderr + done.stdout).strip().splitlines() or ["(it printed nothing)"]
            last = "\n".join(printed[-_LINES_SHOWN:])
            raise BuildError(f"{command[0]} failed with exit status {done.returncode}:\n{last}")
        os.replace(built, target)
