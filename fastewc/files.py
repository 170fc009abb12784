"""Safetensors files that say what they hold, written atomically and read strictly. No pickle anywhere."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastewc._names import refuse_dtensor
from fastewc._version import __version__

FORMAT_VERSION = 1
_KEY = "fastewc"  # the one metadata entry: a JSON object

PathLike = str | os.PathLike[str]


def save_tensors(path: PathLike, tensors: Mapping[str, Tensor], header: Mapping[str, Any], kind: str) -> None:
    """Write tensors and a JSON header to one safetensors file, or leave the old file as it was.

    Args:
        path: file to write; its folder must exist.
        tensors: name → tensor, any device and layout.
        header: JSON-able facts about them (method, samples, λ, …).
        kind: what the file holds, "importance" or "ewc"; checked on load.

    Raises:
        NotImplementedError: a tensor is a DTensor.
        OSError: the file cannot be written; an older file of that name is then unchanged.
    """
    refuse_dtensor(tensors, "save")
    path = Path(os.path.realpath(path))  # a link stays a link: what it points to is replaced
    full = {
        **header,
        "kind": kind,
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "tensors": {name: {"shape": list(t.shape), "dtype": str(t.dtype)} for name, t in tensors.items()},
    }
    # safetensors refuses views of one storage; contiguous() alone would keep an alias between tied entries.
    plain = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    try:
        try:
            save_file(plain, temporary, metadata={_KEY: json.dumps(full)})
        except SafetensorError as error:  # how safetensors reports a full disk
            raise OSError(f"cannot write {path}: {error}") from error
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's files are private
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def load_tensors(
    path: PathLike, kind: str, device: torch.device | str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save_tensors` wrote: (tensors by name, header).

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is truncated, is no safetensors file, was not written by fastewc, holds another kind of
            object, was written by a newer format, or its tensors are not those its header lists.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is a folder, wanted a file" if path.is_dir() else f"no file {path}")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            header = _header(path, file.metadata(), kind)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a readable safetensors file (truncated, damaged or of another kind): {error}"
        ) from error
    listed = header["tensors"]
    found = {name: {"shape": list(t.shape), "dtype": str(t.dtype)} for name, t in tensors.items()}
    if found != listed:
        odd = sorted(name for name in found.keys() | listed.keys() if found.get(name) != listed.get(name))
        raise ValueError(f"{path}: tensors differ from the file's own header (damaged file): {', '.join(odd[:8])}")
    return tensors, header


def _umask() -> int:
    """The process's umask; it can only be read by setting it."""
    current = os.umask(0o077)
    os.umask(current)
    return current


def _header(path: Path, metadata: Mapping[str, str] | None, kind: str) -> dict[str, Any]:
    text = (metadata or {}).get(_KEY)
    if text is None:
        raise ValueError(
            f"{path} is a safetensors file, but not one that fastewc wrote (no {_KEY!r} entry in its header)"
        )
    try:
        header = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: the fastewc header is damaged: {error}") from error
    if not isinstance(header, dict) or not isinstance(header.get("tensors"), dict):
        raise ValueError(f"{path}: the fastewc header is damaged: it lists no tensors")
    version = header.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise ValueError(f"{path}: the fastewc header is damaged: format_version {version!r}")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version}, written by fastewc {header.get('library_version')}; this is "
            f"fastewc {__version__}, which reads up to {FORMAT_VERSION}. Upgrade fastewc."
        )
    if header.get("kind") != kind:
        loaders = {"importance": "fastewc.Importance.load", "ewc": "fastewc.EWC.load"}
        hint = f"; read it with {loaders[header['kind']]}" if str(header.get("kind")) in loaders else ""
        raise ValueError(f"{path} holds {header.get('kind')!r}, wanted {kind!r}{hint}")
    return header
