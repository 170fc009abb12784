"""The CPU library's hot functions are vector code, and the widest clone that this CPU can run is the one that runs."""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.cpu_clones import chosen_clones, clones, loaded_library
from fastewc import _extension

REGISTERS = {"arch_x86_64_v4": "zmm", "arch_x86_64_v3": "ymm", "default": "xmm"}
# The float32 step has all three: "ps". ("pd" is float64, "ss" and "sd" one number at a time.) The baseline lacks fma.
PACKED = {
    "arch_x86_64_v4": ("sqrtps", "divps", r"fn?m(add|sub)\d+ps"),
    "arch_x86_64_v3": ("sqrtps", "divps", r"fn?m(add|sub)\d+ps"),
    "default": ("sqrtps", "divps", "mulps"),
}
# What the x86-64 levels ask of a CPU, in the words of /proc/cpuinfo.
NEEDED = {
    "arch_x86_64_v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
    "arch_x86_64_v3": {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"},
}


@pytest.fixture(scope="module")
def library() -> Path:
    if platform.machine() != "x86_64":
        pytest.skip(f"{platform.machine()}: only x86-64 has clones")
    if shutil.which("objdump") is None:
        pytest.skip("needs objdump (binutils), which is not on the PATH")
    try:
        _extension.load()
    except _extension.NativeUnavailable as error:
        pytest.skip(str(error))
    path, _ = loaded_library()
    if not clones(path):
        pytest.skip(f"{path} has no clones: it was not compiled by GCC 12 or later against glibc")
    return path


def disassembly(library: Path, part: str = "ewc_step") -> dict[str, str]:
    """Symbol -> its instructions, of the functions that have the part in their names."""
    text = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", str(library)], capture_output=True, text=True, check=True
    ).stdout
    blocks = re.split(r"^[0-9a-f]{16} <(.*)>:$", text, flags=re.MULTILINE)
    return {name: body for name, body in zip(blocks[1::2], blocks[2::2], strict=True) if part in name}


def test_every_clone_of_the_step_has_packed_roots_quotients_and_products(library: Path):
    code = disassembly(library)
    for clone, instructions in PACKED.items():
        bodies = [body for name, body in code.items() if name.endswith(f".{clone}")]
        assert bodies, f"{library} has no {clone} clone of ewc_step"
        for what in instructions:
            pattern = rf"\sv?{what}\s.*%{REGISTERS[clone]}"
            assert any(re.search(pattern, body) for body in bodies), f"no {pattern} in the {clone} clones of ewc_step"


def test_no_loop_of_the_step_was_left_to_single_numbers(library: Path):
    """A vectorised loop has one square root in full vectors and one for the rest; a loop that is not has the latter."""
    for name, body in disassembly(library).items():
        clone = name.rpartition(".")[2]
        if clone in PACKED:
            packed = len(re.findall(rf"\sv?sqrtp[sd]\s.*%{REGISTERS[clone]}", body))
            single = len(re.findall(r"\sv?sqrts[sd]\s", body))
            assert packed >= max(single, 1), f"{packed} packed and {single} single square roots in {name}"


def test_codes_are_decoded_in_whole_vectors(library: Path):
    """Bytes are widened and turned into floats many at a time, where they are read by themselves and in the step."""
    for part in ("decode_vectorised", "ewc_step"):
        code = disassembly(library, part)
        for clone in ("arch_x86_64_v4", "arch_x86_64_v3"):
            bodies = [body for name, body in code.items() if name.endswith(f".{clone}")]
            register = REGISTERS[clone]
            assert any(
                re.search(rf"vpmovzx[bw][wd] .*%{register}", body) and re.search(rf"vcvtdq2ps .*%{register}", body)
                for body in bodies
            ), f"codes are not decoded in vectors in the {clone} clones of {part}"


def test_weights_are_split_and_joined_in_whole_vectors(library: Path):
    for part in ("write_halves", "read_whole"):
        code = disassembly(library, part)
        for clone in ("arch_x86_64_v4", "arch_x86_64_v3"):
            bodies = [body for name, body in code.items() if name.endswith(f".{clone}")]
            assert any(re.search(rf"vpaddd .*%{REGISTERS[clone]}", body) for body in bodies), (part, clone)


def test_the_widest_clone_that_this_cpu_can_run_is_the_one_that_runs(library: Path):
    flags = set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1].split())
    runnable = [clone for clone, needed in NEEDED.items() if needed <= flags] + ["default"]
    has = clones(library)
    chosen = chosen_clones()
    assert chosen is not None
    assert any("ewc_step" in name for name in chosen)
    for name, clone in chosen.items():
        assert clone == next(one for one in runnable if one in has[name]), name


@pytest.mark.parametrize(("isa", "register"), [("avx512", "zmm"), ("avx2", "ymm")])
def test_the_inner_loop_of_sum_grad_power_is_multiply_adds_on_registers(library: Path, isa: str, register: str):
    """Twelve of them for each position, of whole vectors; none of the vectors is kept on the stack meanwhile.

    There are two micro-kernels for each width: with one number for all lanes, and with one for each.
    """
    tiles = disassembly(library, f"tile_{isa}")
    assert len(tiles) == 2, f"{library} has the micro-kernels {list(tiles)}"
    for name, body in tiles.items():
        assert not re.search(r"\sv?(fmadd|mul|add)\w*s[sd]\s", body), f"single numbers in {name}"
        lines = [line.split("\t", 1)[1] for line in body.splitlines() if "\t" in line]
        products = [i for i, line in enumerate(lines) if re.match(rf"vfmadd\d+ps .*%{register}", line)]
        # The loop ends in a jump; the products of the power at the end of a sample come later.
        loops = [i for i, line in enumerate(lines) if re.match(r"j(ne|nz|b|l|g|a)\w*\s", line) and i > products[0]]
        loop = lines[products[0] : loops[0]]
        assert sum(i < loops[0] for i in products) == 12, f"{name}: {loop}"
        assert not any(re.search(rf"vmov\w+ .*%{register}", line) and "%rsp" in line for line in loop), name
