"""The Triton kernels of sum_grad_power and squared_norm_grad, compiled ahead of time for every target.

No register spills; 16-bit products, and on AMD's cards all, are on tensor cores, float32 ones in IEEE arithmetic; loads
are wide and, on NVIDIA's cards, asynchronous, and the loop over samples does not wait for one product before the next.
All variants are compiled for sm_90. For the other targets those that contain the rest: three dimensions where two have
the same tile, both kinds of sums of a sample in 16 bits, products of squares.
"""

import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from fastewc.ops._tiles import ELEMENTS
from fastewc.ops.squared_norm_grad import triton as norm
from fastewc.ops.sum_grad_power import kernels
from fastewc.ops.sum_grad_power import triton as sums
from tests.ops import interpreter
from tests.ops.triton_compiler import TARGETS, Code, Job, compiled

pytestmark = pytest.mark.skipif(interpreter.INTERPRETED, reason="the interpreter is on: nothing is compiled")

GENERATIONS = {"sm_80": 8, "sm_90": 9, "sm_100": 10, "gfx942": 0}
# What Triton knows of a layer 768 wide, of a convolution in channels_last memory, and of one with its pixels in a row.
_WIDE = dict.fromkeys(("total_o", "x_n", "x_s", "x_d", "x_h", "x_w", "g_n", "g_t", "O", "C", "I"), 16)
LINEAR = _WIDE | {"x_c": 1, "g_o": 1, "total_c": 1}
CHANNELS_LAST = _WIDE | {"x_c": 1, "g_o": 1, "total_k": 1}
CONTIGUOUS = _WIDE | {"x_c": 16, "x_w": 1, "g_o": 16, "g_t": 1, "T": 16, "total_k": 1, "spread": 1}
ODD = {"x_w": 1, "g_t": 1, "total_k": 1}
# dtype, p, dimensions, T, single: long samples, short ones, T = 1; and what others contain.
TILES = [
    *((torch.bfloat16, 2, dims, 1024, False) for dims in (0, 3)), (torch.float32, 2, 2, 1024, False),
    (torch.bfloat16, 1, 2, 10, False), (torch.float32, 2, 0, 1024, True), (torch.float64, 2, 0, 1024, False),
]  # fmt: skip
CONTAINED = [
    (torch.bfloat16, 2, 2, 1024, False), (torch.float32, 1, 0, 10, False), (torch.bfloat16, 1, 0, 1024, True),
]  # fmt: skip
ROWS = [
    (torch.bfloat16, 10), (torch.float32, 32_768), (torch.float32, 200_000), (torch.float64, 8192),
]  # fmt: skip


def job(target: str, kernel: str, specialisation: dict, known: dict[str, int], dtype: torch.dtype) -> Job:
    constants = {name: value for name, value in specialisation.items() if name.isupper()}
    options = {name: value for name, value in specialisation.items() if not name.isupper()}
    own = {name: value for name, value in known.items() if name in vars_of(kernel)}
    return Job(target, kernel, constants, options, own, ELEMENTS[dtype])


def vars_of(kernel: str) -> list[str]:
    module = norm if kernel in ("_whole_rows", "_long_row") else kernels
    return getattr(module, kernel).arg_names


def jobs() -> list[Job]:
    made = []
    for target, generation in GENERATIONS.items():
        every = target == "sm_90"
        for dtype, p, dims, T, single in TILES + CONTAINED * every + CONTAINED[:1] * (target == "sm_100"):
            constants = sums.tiles_specialisation(dtype, p, dims, (768, 768, T), single, True, generation)
            made.append(job(target, "tiles", constants, CHANNELS_LAST if dims else LINEAR, dtype))
        constants = sums.tiles_specialisation(torch.bfloat16, 2, 0, (768, 768, 784), False, True, generation)
        made.append(job(target, "tiles", constants, CONTIGUOUS, torch.bfloat16))  # kernels of one position
        for dtype, dims in ((torch.bfloat16, 2), (torch.float32, 2), (torch.bfloat16, 0))[: 2 + every]:
            constants = sums.tiles_specialisation(dtype, 2, dims, (5000, 147, 1023), False, False, generation)
            made.append(job(target, "tiles", constants, ODD if dims else {"x_c": 1, "g_o": 1}, dtype))
        for dtype, channels_last in ((torch.bfloat16, True), (torch.float32, False), (torch.float64, True)):
            constants = sums.channels_specialisation(dtype, 2, 2, (256, 9, 784), channels_last, generation)
            known = CHANNELS_LAST | {"spread": 1} if channels_last else CONTIGUOUS
            made.append(job(target, "channels", constants, known, dtype))
        for dtype, channels_last in ((torch.bfloat16, True), (torch.float32, True), (torch.float32, False))[
            not every :
        ]:
            constants = sums.channels_specialisation(dtype, 2, 2, (256, 1, 784), channels_last, generation)  # scales
            known = CHANNELS_LAST | {"spread": 1} if channels_last else CONTIGUOUS
            made.append(job(target, "channels", constants, known, dtype))
        for dtype, C in ROWS[not every :]:
            constants = norm.specialisation(dtype, C, TARGETS[target].backend)
            kernel = "_long_row" if constants["BLOCK"] < C else "_whole_rows"
            made.append(job(target, kernel, constants, {"C": 16}, dtype))
    return made


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> list[Code]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
            return list(pool.map(compiled, jobs(), chunksize=8))


def of(codes: list[Code], kernel: str, *targets: str) -> list[Code]:
    found = [code for code in codes if code.job.kernel == kernel and code.job.target in targets]
    assert found
    return found


def test_nothing_spills(codes: list[Code]):
    assert not [(code.job.id, code.spilled) for code in codes if code.spilled]
    for target in TARGETS:
        for kernel in ("tiles", "channels", "_whole_rows", "_long_row"):
            used = [code.registers for code in of(codes, kernel, target)]
            print(f"{target} {kernel}: {len(used)} variants, {min(used)} to {max(used)} registers")


def on_cores(code: Code) -> bool:
    """Whether 16-bit numbers are multiplied as they are; a square has more digits than they."""
    c = code.job.constants
    return code.job.element.primitive_bitwidth == 16 and not (c["KIND"] == "single" and c["P"] == 2)


def test_products_are_where_they_should_be(codes: list[Code]):
    names = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma_f32"}
    for target, name in names.items():
        for code in of(codes, "tiles", target):
            wide = code.job.element.primitive_bitwidth < 64
            assert not wide or (name in code.text) == (on_cores(code) or target == "gfx942"), code.job.id
            assert "tf32" not in code.text and "xf32" not in code.text, code.job.id


def test_operands_come_in_wide_asynchronous_copies(codes: list[Code]):
    for code in of(codes, "tiles", "sm_80", "sm_90", "sm_100"):
        if "I" not in code.job.known:  # widths that no vector divides
            continue
        sizes = set(re.findall(r"cp\.async\.c[ag]\.shared\.global .*?, (0x\w+|\d+)", code.text))
        assert sizes and {int(size, 0) for size in sizes} <= {8, 16}, (code.job.id, sizes)


def test_a_product_runs_while_the_next_one_is_issued(codes: list[Code]):
    for code in of(codes, "tiles", "sm_90"):
        if code.job.constants["KIND"] == "long" and on_cores(code) and "I" in code.job.known:
            waits = re.findall(r"wgmma\.wait_group\.sync\.aligned\s+(\d)", code.text)
            assert waits.count("1") == 1, (code.job.id, waits)  # in the loop; 0 at a sample's end


def test_rows_are_read_and_written_in_vectors(codes: list[Code]):
    """A thread's share of the tile, once each way; twice in the second reading of a long row."""
    for kernel in ("_whole_rows", "_long_row"):
        for code in of(codes, kernel, *TARGETS):
            c, options = code.job.constants, code.job.options
            threads = options["num_warps"] * (64 if code.job.target == "gfx942" else 32)
            share = c["ROWS"] * c["BLOCK"] // threads * code.job.element.primitive_bitwidth // 8
            assert code.stored == share, (code.job.id, code)
            assert code.loaded >= share * (2 if kernel == "_long_row" else 1), (code.job.id, code)


@pytest.mark.parametrize("kernel", [kernels.tiles, kernels.channels], ids=lambda kernel: kernel.__name__)
def test_positions_and_samples_compile_nothing(kernel):
    """The number of samples, the windows and all that follows from them change from batch to batch, layer to layer."""
    bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
    known, seen = {**_WIDE, "x_c": 1}, set()
    for integer in (1, 2, 7, 16, 10_007):
        arguments = {}
        for param in kernel.params:
            if param.is_constexpr:
                arguments[param.name] = 1
            elif param.name.endswith("_ptr"):
                arguments[param.name] = torch.zeros(16)
            else:
                arguments[param.name] = integer if param.name in kernels.VARYING else known.get(param.name, 3)
        _, specialization, _ = bind(**arguments)
        seen.add(tuple(specialization))
    assert len(seen) == 1
