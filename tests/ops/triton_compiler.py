"""Triton kernels to machine code, no GPU needed: what the compilers say of registers, spills and accesses."""

import contextlib
import io
import re
from dataclasses import dataclass, field
from typing import Any

import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastewc.ops import _tiles
from fastewc.ops.ewc_penalty import triton as penalty
from fastewc.ops.ewc_step import counters
from fastewc.ops.ewc_step import triton as step
from fastewc.ops.squared_norm_grad import triton as norm
from fastewc.ops.sum_grad_power import kernels as sums

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
KERNELS = {
    "_step": step._step, "_penalty": penalty._penalty, "advance": counters.advance, "_whole_rows": norm._whole_rows,
    "_long_row": norm._long_row, "tiles": sums.tiles, "channels": sums.channels,
}  # fmt: skip
_POINTERS = {"table_ptr": "*i64", "blocks_ptr": "*i64", "partials_ptr": "*fp64", "corrections_ptr": "*fp64"}
_DTYPES = {element: dtype for dtype, element in _tiles.ELEMENTS.items()}


@dataclass(frozen=True)
class Job:
    """One kernel for one target; ``constants`` are its compile-time arguments.

    ``options`` are those of ``_tiles`` if there are none; ``known`` says which arguments are 1 or multiples of 16, and
    ``element`` of which type the kernel's inputs are.
    """

    target: str
    kernel: str
    constants: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    known: dict[str, int] = field(default_factory=dict)
    element: Any = tl.float32

    @property
    def id(self) -> str:
        """In words."""
        return " ".join([self.target, self.kernel, str(self.element), *map(str, self.constants.values())])


@dataclass(frozen=True)
class Code:
    """What one thread of a compiled kernel needs, and moves in accesses of several words."""

    job: Job
    registers: int
    limit: int
    spilled: int
    shared: int
    loaded: int
    stored: int
    text: str


def compiled(job: Job) -> Code:
    """Compile as a launch would; the cache must be cold, for only the compiler's log knows the spills."""
    kernel, cuda = KERNELS[job.kernel], TARGETS[job.target].backend == "cuda"
    arithmetic = _DTYPES[job.constants.get("OP", tl.float32)]
    options = job.options or _tiles.options(arithmetic, TARGETS[job.target].backend)
    signature, aligned = {}, {}
    for i, param in enumerate(kernel.params):
        signature[param.name] = kind = _kind(job, param)
        if kind.startswith("*") or job.known.get(param.name) == 16:
            aligned[(i,)] = [["tt.divisibility", 16]]
    constants = job.constants | {name: 1 for name, value in job.known.items() if value == 1}
    knobs.nvidia.dump_ptxas_log = True
    with contextlib.redirect_stdout(io.StringIO()) as log:
        code = triton.compile(
            ASTSource(kernel, signature, constants, aligned), target=TARGETS[job.target], options=options
        )
    text = code.asm["ptx" if cuda else "amdgcn"]
    if cuda:
        registers, spilled = (
            _numbers(r"Used (\d+) registers", log.getvalue()),
            _numbers(r"(\d+) bytes spill", log.getvalue()),
        )
        accesses = [
            (way, int(n) * int(bits) // 8) for way, n, bits in re.findall(r"(ld|st)\.global\S*\.v(\d)\.b(\d+)", text)
        ]
    else:
        registers, spilled = _numbers(r"\.vgpr_count:\s+(\d+)", text), _numbers(r"\.[sv]gpr_spill_count:\s+(\d+)", text)
        found = re.findall(r"^\s+(?:global|buffer|flat)_(lo|st)\w+_dwordx(\d)", text, re.MULTILINE)
        accesses = [("ld" if way == "lo" else "st", 4 * int(n)) for way, n in found]
    return Code(
        job,
        max(registers),
        options.get("maxnreg", 256),
        sum(spilled),
        code.metadata.shared,
        sum(size for way, size in accesses if way == "ld"),
        sum(size for way, size in accesses if way == "st"),
        text if job.kernel in ("tiles", "channels") else "",
    )


def _kind(job: Job, param: Any) -> str:
    if param.is_constexpr or job.known.get(param.name) == 1:
        return "constexpr"
    if param.name.endswith("_ptr"):
        own = job.constants["OP"] if param.name == "total_ptr" else job.element
        return _POINTERS.get(param.name, f"*{own.name}")
    return param.annotation_type or "i32"


def _numbers(pattern: str, text: str) -> list[int]:
    found = [int(number) for number in re.findall(pattern, text)]
    assert found, f"{pattern!r} not in the compiler's output"
    return found
