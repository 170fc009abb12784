"""Which vector clone of each function of the loaded CPU library runs: what GNU ifunc chose, read from memory."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

from fastewc import _build

_CLONE = re.compile(r"([0-9a-f]{16}) .* (\S+)\.(arch_x86_64_v\d|default|resolver)$", re.MULTILINE)
_CHOICE = re.compile(r"([0-9a-f]{16}) R_X86_64_IRELATIVE? *\*ABS\*\+0x([0-9a-f]+)")


def loaded_library() -> tuple[Path, int] | None:
    """The CPU library of this process and the address that it was loaded at; None before it is loaded."""
    maps = Path("/proc/self/maps")
    for line in maps.read_text().splitlines() if maps.is_file() else []:
        span, *_, path = line.split(maxsplit=5)
        if Path(path).name == _build.library_name("cpu"):
            return Path(path), int(span.partition("-")[0], 16)  # the first mapping is that of the file's beginning
    return None


def clones(library: Path) -> dict[str, dict[str, int]]:
    """Mangled function name -> "arch_x86_64_v4", "arch_x86_64_v3", "default", "resolver" -> address in the file."""
    found: dict[str, dict[str, int]] = defaultdict(dict)
    for address, name, clone in _CLONE.findall(_objdump("-t", library)):
        found[name][clone] = int(address, 16)
    return {name: of for name, of in found.items() if len(of) > 1}


def chosen_clones() -> dict[str, str] | None:
    """Mangled function name -> the clone that a call of it runs; None without the library, objdump or clones."""
    loaded = loaded_library()
    if loaded is None or shutil.which("objdump") is None:
        return None
    library, base = loaded
    slots = {int(resolver, 16): int(slot, 16) for slot, resolver in _CHOICE.findall(_objdump("-R", library))}
    chosen = {}
    for name, addresses in clones(library).items():
        slot = slots.get(addresses.get("resolver", -1))
        if slot is not None:
            runs = ctypes.c_uint64.from_address(base + slot).value - base
            chosen[name] = next((clone for clone, address in addresses.items() if address == runs), "not resolved yet")
    return chosen or None


def chosen_isas() -> list[str] | None:
    """The clones that run, each once, e.g. ["x86_64_v4"]; None where :func:`chosen_clones` is."""
    chosen = chosen_clones()
    return None if chosen is None else sorted({clone.removeprefix("arch_") for clone in chosen.values()})


def _objdump(what: str, library: Path) -> str:
    return subprocess.run(["objdump", what, str(library)], capture_output=True, text=True, check=True).stdout
