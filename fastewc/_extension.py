"""Loads the native library once per process: the package's own, else from the user's cache, else compiled now."""

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
    """The native library can't be had on this machine; the text says why and what would add it."""


@dataclass(frozen=True)
class Status:
    """Where the native library stands: ``state``, and ``reason`` in words."""

    state: Literal["loaded", "built", "buildable", "missing"]
    reason: str


@dataclass
class _Outcome:
    """What this process found; at most one of the two is ever set."""

    loaded: Path | None = None
    failure: str | None = None


_outcome = _Outcome()


def cache_folder() -> Path:
    """The user's cache folder for these sources, this torch and this CPU; it may not exist yet.

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
    key = "\0".join((_build.source_digest(), torch.__version__, _cpu()))
    return root / "fastewc" / hashlib.sha256(key.encode()).hexdigest()[:24]


def _cpu() -> str:
    """The instruction set: a home folder may be shared by different machines."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.is_file() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{sys.platform} {platform.machine()} {flags}"


def _candidates() -> list[Path]:
    """Libraries of exactly the present sources, best first: the package's own, then the cache's."""
    digest = _build.source_digest().encode()
    folders = [_package]
    with contextlib.suppress(_build.BuildError):
        folders.append(cache_folder())
    paths = [folder / _build.LIBRARY_NAME for folder in folders]
    return [path for path in paths if path.is_file() and digest in path.read_bytes()]


def _jit_allowed() -> bool:
    return os.environ.get("FASTEWC_JIT", "1") != "0"


def status() -> Status:
    """What :func:`load` would find, without loading or compiling anything."""
    if _outcome.loaded is not None:
        return Status("loaded", f"loaded from {_outcome.loaded}")
    if _outcome.failure is not None:
        return Status("missing", _outcome.failure)
    try:
        if built := _candidates():
            return Status("built", f"prebuilt at {built[0]}")
        if not _jit_allowed():
            return Status("missing", f"{_FORBIDDEN}; then {_advice()}")
        cache_folder()
        _build.torch_folder()
        found = " ".join(_build.compiler())
    except _build.BuildError as error:
        return Status("missing", f"{error}; then {_advice()}")
    return Status("buildable", f"buildable: {found} compiles it at the first call; now: `{_build.COMMAND}`")


def load() -> None:
    """Load the library; where it is missing and a compiler is present, first compile it into the user's cache.

    The outcome, good or bad, holds for the rest of the process.

    Raises:
        NativeUnavailable: no library could be loaded or built; the text has the compiler's last lines.
    """
    if _outcome.loaded is not None:
        return
    with _lock:
        if _outcome.loaded is None and _outcome.failure is None:
            try:
                _outcome.loaded = _load_or_build()
            except (_build.BuildError, OSError) as error:
                _outcome.failure = f"{error}; then {_advice()}"
        if _outcome.failure is not None:
            raise NativeUnavailable(_outcome.failure)


def _load_or_build() -> Path:
    for path in _candidates():
        try:
            _load_library(path)
        except OSError as error:
            _log.warning("fastewc: %s does not load (%s); looking further", path, error)
        else:
            return path
    if not _jit_allowed():
        raise _build.BuildError(_FORBIDDEN)
    target = cache_folder() / _build.LIBRARY_NAME
    _build.compiler()
    _log.warning("fastewc: compiling the CPU kernels once, into %s (FASTEWC_JIT=0 forbids it)", target)
    _build.compile_library(target)
    _load_library(target)
    return target


def _load_library(path: Path) -> None:
    torch.ops.load_library(path)  # type: ignore[no-untyped-call]


def build() -> Path:
    """Compile the library into the package, or into the user's cache where the package can't be written.

    Returns:
        The file that was written; processes started from now on load it.

    Raises:
        fastewc._build.BuildError: it can't be compiled; the text says why.
        OSError: neither folder can be written.
    """
    try:
        target = _package / _build.LIBRARY_NAME
        _build.compile_library(target)
    except OSError as error:
        _log.warning("fastewc: %s can't be written (%s); using the cache", _package, error)
        target = cache_folder() / _build.LIBRARY_NAME
        _build.compile_library(target)
    return target


def _advice() -> str:
    return f"`{_build.COMMAND}` adds it"
