"""Loads a native library once per process: the package's own, else from the user's cache, else compiled now.

There is one for CPU and one for CUDA tensors, each with its own fate.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from fastewc import _build

_log = logging.getLogger("fastewc")
_lock = threading.Lock()
_package = Path(__file__).resolve().parent
_FORBIDDEN = "not built, and FASTEWC_JIT=0 forbids building at the first call"


class NativeUnavailable(RuntimeError):
    """A native library can't be had on this machine; the text says why and what would add it."""


@dataclass(frozen=True)
class Status:
    """Where a native library stands: ``state``, and ``reason`` in words."""

    state: Literal["loaded", "built", "buildable", "missing"]
    reason: str


@dataclass
class _Outcome:
    """What this process found; at most one of the two is ever set."""

    loaded: Path | None = None
    failure: str | None = None


_outcomes = {device_type: _Outcome() for device_type in _build.DEVICE_TYPES}


def cache_folder(device_type: str = "cpu") -> Path:
    """The user's cache folder for these sources, this torch and this CPU or these GPUs; it may not exist yet.

    Raises:
        fastewc._build.BuildError: the user has no home folder and XDG_CACHE_HOME is not set.
    """
    if os.environ.get("XDG_CACHE_HOME"):
        root = Path(os.environ["XDG_CACHE_HOME"])
    else:
        home = Path(os.path.expanduser("~"))  # which is left as it is where there is no home
        if not home.is_absolute():
            raise _build.BuildError("no folder to build in: this user has no home; set XDG_CACHE_HOME")
        root = home / "Library" / "Caches" if sys.platform == "darwin" else home / ".cache"
    machine = _cpu() if device_type == "cpu" else f"{platform.machine()} {' '.join(_build.cuda_archs())}"
    key = "\0".join((_build.source_digest(device_type), torch.__version__, machine))
    return root / "fastewc" / hashlib.sha256(key.encode()).hexdigest()[:24]


def _cpu() -> str:
    """The instruction set: a home folder may be shared by different machines."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.is_file() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{sys.platform} {platform.machine()} {flags}"


def _candidates(device_type: str) -> list[Path]:
    """Libraries of exactly the present sources, best first: the package's own, then the cache's."""
    folders = [_package]
    with contextlib.suppress(_build.BuildError):
        folders.append(cache_folder(device_type))
    paths = [folder / _build.library_name(device_type) for folder in folders]
    return [path for path in paths if path.is_file() and _build.is_current(path, device_type)]


def _jit_allowed() -> bool:
    return os.environ.get("FASTEWC_JIT", "1") != "0"


def status(device_type: str = "cpu") -> Status:
    """What :func:`load` would find, without loading or compiling anything."""
    outcome = _outcomes[device_type]
    if outcome.loaded is not None:
        return Status("loaded", f"loaded from {outcome.loaded}")
    if outcome.failure is not None:
        return Status("missing", outcome.failure)
    try:
        if built := _candidates(device_type):
            return Status("built", f"prebuilt at {built[0]}")
        if not _jit_allowed():
            return Status("missing", f"{_FORBIDDEN}; then {_advice()}")
        cache_folder(device_type)
        _build.torch_folder()
        found = " ".join(_build.compiler(device_type))
    except _build.BuildError as error:
        return Status("missing", f"{error}; then {_advice()}")
    return Status("buildable", f"buildable: {found} compiles it at the first call; now: `{_build.COMMAND}`")


def load(device_type: str = "cpu") -> None:
    """Load the library; where it is missing and a compiler is present, first compile it into the user's cache.

    The outcome, good or bad, holds for the rest of the process.

    Args:
        device_type: "cpu" or "cuda": where the tensors are that its kernels are for.

    Raises:
        NativeUnavailable: no library could be loaded or built; the text has the compiler's last lines.
    """
    outcome = _outcomes[device_type]
    if outcome.loaded is not None:
        return
    with _lock:
        if outcome.loaded is None and outcome.failure is None:
            try:
                outcome.loaded = _load_or_build(device_type)
            except (_build.BuildError, OSError) as error:
                outcome.failure = f"{error}; then {_advice()}"
        if outcome.failure is not None:
            raise NativeUnavailable(outcome.failure)


def _load_or_build(device_type: str) -> Path:
    for path in _candidates(device_type):
        try:
            _load_library(path)
        except OSError as error:
            _log.warning("fastewc: %s does not load (%s); looking further", path, error)
        else:
            return path
    if not _jit_allowed():
        raise _build.BuildError(_FORBIDDEN)
    target = cache_folder(device_type) / _build.library_name(device_type)
    _build.compiler(device_type)
    kernels = {"cpu": "the CPU kernels once (up to a minute)", "cuda": "the CUDA kernels once (some minutes)"}
    _log.warning("fastewc: compiling %s, into %s (FASTEWC_JIT=0 forbids it)", kernels[device_type], target)
    _build.compile_library(device_type, target)
    _load_library(target)
    return target


def _load_library(path: Path) -> None:
    torch.ops.load_library(path)  # type: ignore[no-untyped-call]


def build(device_type: str = "cpu") -> Path:
    """Compile the library into the package, or into the user's cache where the package can't be written.

    Returns:
        The file that was written; processes started from now on load it.

    Raises:
        fastewc._build.BuildError: it can't be compiled; the text says why.
        OSError: neither folder can be written.
    """
    name = _build.library_name(device_type)
    try:
        target = _package / name
        _build.compile_library(device_type, target)
    except OSError as error:
        _log.warning("fastewc: %s can't be written (%s); using the cache", _package, error)
        target = cache_folder(device_type) / name
        _build.compile_library(device_type, target)
    return target


def _advice() -> str:
    return f"`{_build.COMMAND}` adds it"
