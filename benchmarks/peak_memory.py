"""How much memory a call takes at its peak: of the process on a CPU, of torch's allocator on a GPU.

The process reads the high-water mark of its own address space, VmHWM, after setting it to the present size;
getrusage's ru_maxrss can't be set back, and after an exec begins with the parent's. It should do nothing else: a
process never gives all its memory back.
"""

from __future__ import annotations

import ctypes
import gc
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def high_water(call: Callable[[], Any], device: torch.device | str = "cpu") -> tuple[int, int] | None:
    """Bytes in use (before ``call``, at the highest during it); None where this system can't tell."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return before, torch.cuda.max_memory_allocated()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        CLEAR.write_text("5")
    except OSError:
        return None
    before = _bytes("VmRSS")
    call()
    return before, _bytes("VmHWM")


def _bytes(field: str) -> int:
    found = re.search(rf"{field}:\s*(\d+) kB", STATUS.read_text())
    assert found is not None, f"{STATUS} has no {field}"
    return 1024 * int(found[1])
