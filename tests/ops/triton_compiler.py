"""Triton kernels to machine code, no GPU needed: what the compilers say of registers, spills and accesses."""

import contextlib
import io
import re
from dataclasses import dataclass
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

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
KERNELS = {"_step": step._step, "_penalty": penalty._penalty, "advance": counters.advance}
_POINTERS = {"table_ptr": "*i64", "blocks_ptr": "*i64", "partials_ptr": "*fp64", "corrections_ptr": "*fp64"}
_DTYPES = {element: dtype for dtype, element in _tiles.ELEMENTS.items()}


@dataclass(frozen=True)
class Job:
    """One kernel for one target; ``constants`` are its compile-time arguments."""

    target: str
    kernel: str
    constants: dict[str, Any]

    @property
    def id(self) -> str:
        """In words."""
        return " ".join([self.target, self.kernel, *map(str, self.constants.values())])


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


def compiled(job: Job) -> Code:
    """Compile as a launch would; the cache must be cold, for only the compiler's log knows the spills."""
    kernel, cuda = KERNELS[job.kernel], TARGETS[job.target].backend == "cuda"
    arithmetic = _DTYPES[job.constants.get("OP", tl.float32)]
    options = _tiles.options(arithmetic, TARGETS[job.target].backend)
    signature, aligned = {}, {}
    for i, param in enumerate(kernel.params):
        kind = "constexpr" if param.is_constexpr else param.annotation_type or _POINTERS[param.name]
        signature[param.name] = kind
        if kind.startswith("*"):
            aligned[(i,)] = [["tt.divisibility", 16]]
    knobs.nvidia.dump_ptxas_log = True
    with contextlib.redirect_stdout(io.StringIO()) as log:
        code = triton.compile(
            ASTSource(kernel, signature, job.constants, aligned), target=TARGETS[job.target], options=options
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
    )


def _numbers(pattern: str, text: str) -> list[int]:
    found = [int(number) for number in re.findall(pattern, text)]
    assert found, f"{pattern!r} not in the compiler's output"
    return found
