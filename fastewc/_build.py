"""How the sources in csrc become libraries: one recipe for setup.py, ``python -m fastewc build`` and the first call.

There are two, the CPU's and CUDA's, which needs a part of torch that only its CUDA builds have. Standard library only,
and no import of torch: setup.py runs it where torch may be absent.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

#: Stable ABI of torch 2.11: a library built against any later torch runs on every torch from 2.11 on.
TORCH_TARGET_VERSION = "0x020b000000000000"
DEVICE_TYPES = ("cpu", "cuda")
COMMAND = "python -m fastewc build"

_PACKAGE = Path(__file__).resolve().parent
# -fopenmp-simd honours `#pragma omp simd` (which vectorises sums) without linking OpenMP; unlike -ffast-math,
# -fno-trapping-math and -fno-math-errno change no result, and NaN and infinities keep their meaning.
# --fmad=false: which multiply and add are fused would depend on what surrounds them, and Ω = 0 has to give the bits of
# no penalty. These kernels wait for memory, not for arithmetic. --expt-relaxed-constexpr: torch's BFloat16 needs it.
_FLAGS = {
    "cpu": (
        "-std=c++20",
        "-O2",
        "-ftree-vectorize",
        "-fvect-cost-model=dynamic",
        "-fPIC",
        "-fvisibility=hidden",
        "-fopenmp-simd",
        "-fno-math-errno",
        "-fno-trapping-math",
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
    ),
    "cuda": (
        "-std=c++20",
        "-O3",
        "--fmad=false",
        "--expt-relaxed-constexpr",
        "-Xcompiler=-fPIC,-fvisibility=hidden",
        "-DUSE_CUDA",
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
    ),
}
_SOURCES = {"cpu": "*_cpu.cpp", "cuda": "*_cuda.cu"}
_LINKED = {"cpu": ("-ltorch_cpu",), "cuda": ("-ltorch_cpu", "-ltorch_cuda")}
# Machine code for the A100 and the H100 and what is compatible; PTX, which the driver compiles, for all that is newer.
_DEFAULT_ARCHS = ("80", "90+PTX")
_TIMEOUT_SECONDS = 600
_LINES_SHOWN = 15


class BuildError(RuntimeError):
    """The native parts can't be built here; the text says why, with the compiler's last lines if it ran."""


def library_name(device_type: str) -> str:
    """The file name of the kernels for "cpu" or "cuda" tensors."""
    return f"_{device_type}.abi3.so"


def source_folder() -> Path:
    """The folder of the C++ sources: in the installed package, or beside it in a checkout.

    Raises:
        BuildError: neither exists.
    """
    for folder in (_PACKAGE / "csrc", _PACKAGE.parent / "csrc"):
        if (folder / "common.h").is_file():
            return folder
    raise BuildError(f"no C++ sources: csrc/common.h is neither in {_PACKAGE} nor beside it; reinstall fastewc")


def compiler(device_type: str = "cpu") -> list[str]:
    """The compiler as a command.

    CPU: $CXX, else the first of c++, g++, clang++ on the PATH. CUDA: $CUDACXX, else the nvcc of $CUDA_HOME, of the PATH
    or of /usr/local/cuda; it knows where its headers are.

    Raises:
        BuildError: there is none, a variable names one that does not exist, or torch is not a CUDA build.
    """
    if sys.platform == "win32":
        raise BuildError("the native parts need GCC or Clang on Linux or macOS; they are not built on Windows")
    if device_type == "cuda":
        return _nvcc()
    named = _named("CXX", "C++ compiler")
    if named:
        return named
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name) is not None:
            return [name]
    raise BuildError("no C++ compiler: none of c++, g++, clang++ is on the PATH; install one or set CXX")


def _nvcc() -> list[str]:
    if not any((torch_folder() / "lib").glob("*torch_cuda.*")):
        raise BuildError("this torch is not a CUDA build")
    named = _named("CUDACXX", "CUDA compiler")
    if named:
        return named
    home = os.environ.get("CUDA_HOME")
    for path in (*([f"{home}/bin"] if home else []), os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"):
        found = shutil.which("nvcc", path=path)
        if found is not None:
            return [found]
    raise BuildError("no CUDA compiler: nvcc is not on the PATH; install the CUDA toolkit or set CUDA_HOME or CUDACXX")


def _named(variable: str, what: str) -> list[str]:
    command = shlex.split(os.environ.get(variable, ""))
    if command and shutil.which(command[0]) is None:
        raise BuildError(f"no {what}: {variable}={command[0]} was not found")
    return command


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


@functools.cache
def gpus() -> tuple[str, ...]:
    """The compute capabilities of this machine's GPUs, "90" for 9.0; asked without starting CUDA in this process."""
    try:
        command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return tuple(sorted({major + minor for major, minor in re.findall(r"^(\d+)\.(\d)$", done.stdout, re.MULTILINE)}))


def cuda_archs() -> tuple[str, ...]:
    """What the CUDA library is compiled for: $FASTEWC_CUDA_ARCHS, else the GPUs present, else A100, H100 and newer.

    "90" is machine code for capability 9.0 (and later 9.x), "90+PTX" also code that the driver compiles for newer ones.
    """
    named = os.environ.get("FASTEWC_CUDA_ARCHS", "").replace(".", "").replace(",", " ").replace(";", " ").split()
    for arch in named:
        if not re.fullmatch(r"\d+[af]?(\+PTX)?", arch):
            raise BuildError(f"FASTEWC_CUDA_ARCHS: wanted architectures such as 80 or 90+PTX, given {arch}")
    return tuple(named) or gpus() or _DEFAULT_ARCHS


def source_digest(device_type: str = "cpu") -> str:
    """Hash of sources and flags; compiled into the library, so that one of other sources is recognised."""
    folder = source_folder()
    digest = hashlib.sha256(" ".join(_FLAGS[device_type]).encode())
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".h" or path.match(_SOURCES[device_type]):
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return "fastewc-sources-" + digest.hexdigest()[:24]


def is_current(library: Path, device_type: str) -> bool:
    """Whether the file was compiled from exactly the present sources and, if for CUDA, runs on this machine's GPUs."""
    found = re.search(source_digest(device_type).encode() + rb" for ([^;]*);", library.read_bytes())
    if found is None or device_type == "cpu":
        return found is not None
    archs = found[1].decode().split()
    return all(any(_runs(arch, gpu) for arch in archs) for gpu in gpus())


def _runs(arch: str, gpu: str) -> bool:
    """Machine code runs on its own generation from its own number on, PTX on everything from its number on."""
    number = re.sub(r"\D.*", "", arch)
    return int(number) <= int(gpu) and (arch.endswith("+PTX") or number[:-1] == gpu[:-1])


class _Job(NamedTuple):
    """One run of the compiler; what it prints goes to ``log``."""

    command: list[str]
    log: Path

    def start(self) -> subprocess.Popen[bytes]:
        """Its temporary files go where ``log`` is; the compiler and what it starts can be ended together."""
        env = {**os.environ, "TMPDIR": str(self.log.parent)}
        with self.log.open("wb") as output:
            return subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
            )

    def failure(self, status: int) -> BuildError:
        printed = self.log.read_text(errors="replace").strip().splitlines() or ["(it printed nothing)"]
        last = "\n".join(printed[-_LINES_SHOWN:])
        return BuildError(f"{self.command[0]} failed with exit status {status}:\n{last}")


def _jobs(device_type: str, scratch: Path) -> tuple[list[_Job], _Job, Path]:
    """What compiles each source, what links them, and the file that comes out."""
    csrc, torch = source_folder(), torch_folder()
    # The largest first: what takes longest must not be what starts last.
    sources = sorted(csrc.rglob(_SOURCES[device_type]), key=lambda path: (-path.stat().st_size, path))
    archs = cuda_archs() if device_type == "cuda" else ()
    command = compiler(device_type)
    link = [*command, "-shared"]
    command += [*_FLAGS[device_type], f"-I{torch / 'include'}"]
    command += [f'-DFASTEWC_SOURCE_DIGEST="{source_digest(device_type)} for {" ".join(archs)};"']
    for arch in archs:
        number = arch.removesuffix("+PTX")
        code = f"[sm_{number},compute_{number}]" if arch.endswith("+PTX") else f"sm_{number}"
        command.append(f"-gencode=arch=compute_{number},code={code}")
        link.append(command[-1])
    if device_type == "cuda":
        command.append(f"--threads={max(1, _cpus() // len(sources))}")  # architectures of one source side by side
    compiled = []
    for i, source in enumerate(sources):
        link.append(str(scratch / f"{i}.o"))
        compiled.append(_Job([*command, "-c", str(source), "-o", link[-1]], scratch / f"{i}.log"))
    built = scratch / library_name(device_type)
    link += [f"-L{torch / 'lib'}", *_LINKED[device_type], "-o", str(built)]
    if sys.platform == "darwin":
        link += ["-undefined", "dynamic_lookup"]
    return compiled, _Job(link, scratch / "link.log"), built


def _cpus() -> int:
    return os.cpu_count() or 1


def _run(jobs: list[_Job], deadline: float) -> None:
    """Run as many at a time as there are CPUs; after a failure, Ctrl-C or the deadline none is left running."""
    waiting, running = list(jobs), list[tuple[_Job, subprocess.Popen[bytes]]]()
    try:
        while waiting or running:
            while waiting and len(running) < _cpus():
                running.append((waiting[0], waiting.pop(0).start()))
            for job, process in list(running):
                status = process.poll()
                if status is not None:
                    running.remove((job, process))
                if status:
                    raise job.failure(status)
            if time.monotonic() > deadline:
                raise BuildError(f"{jobs[0].command[0]} took longer than {_TIMEOUT_SECONDS} s")
            time.sleep(0.02)
    finally:
        for _, process in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def compile_library(device_type: str, target: Path) -> None:
    """Compile the kernels to ``target``; readers see the old file or the complete new one, never a part.

    Raises:
        BuildError: no compiler, no headers, or the compilation failed.
        OSError: the folder of ``target`` can't be written.
    """
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    compiler(device_type)  # whatever is missing is said before a folder is made
    torch_folder()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as scratch:
        compiled, link, built = _jobs(device_type, Path(scratch))
        _run(compiled, deadline)
        _run([link], deadline)
        if not built.is_file():
            raise link.failure(0)
        os.replace(built, target)
