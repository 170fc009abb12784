"""Every Triton kernel of the steps and penalties, compiled ahead of time: no register spills, and accesses are wide.

All variants are compiled for sm_90. For the other targets those that contain the rest: with a momentum buffer or
amsgrad's maximum, protected, tracked (but also untracked where that makes a tile wider), the modes of the penalty that
do most. A variant with less of it is the same code without some loads, registers and stores; float16 differs from
bfloat16 by the name of a conversion.
"""

import dataclasses
import itertools
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from fastewc.ops import _tiles
from fastewc.ops.ewc_penalty import triton as penalty
from fastewc.ops.ewc_step import counters
from fastewc.ops.ewc_step import triton as step
from fastewc.ops.ewc_step.rule import StepRule
from tests.ops import interpreter
from tests.ops.triton_compiler import TARGETS, Code, Job, compiled

DTYPES = tuple(dtype for dtype in _tiles.ELEMENTS if dtype.is_floating_point)
RULES = (
    StepRule("sgd", lr=0.1),
    StepRule("sgd", lr=0.1, momentum=0.9),
    StepRule("adam", lr=0.1),
    StepRule("adam", lr=0.1, amsgrad=True),
)
pytestmark = pytest.mark.skipif(interpreter.INTERPRETED, reason="the interpreter is on: nothing is compiled")


HELD = ("plain", "stabilized", "proximal", "wva")
#: Parameters and the narrower dtype that their Ω is stored in; w* is then bfloat16.
COMPRESSED = ((torch.float32, torch.uint8), (torch.bfloat16, torch.uint8), (torch.float32, torch.bfloat16))
#: bfloat16 parameters with wider moments or gradients, or that are the upper halves of float32 weights.
MIXED: tuple[dict[str, Any], ...] = (
    {"moment": torch.float32},
    {"split": True},
    {"split": True, "moment": torch.float32},
    {"split": True, "moment": torch.float32, "grad": torch.float32},
)


def distinct(variants: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({tuple(constants.items()): constants for constants in variants}.values())


def step_variants() -> list[dict[str, Any]]:
    ways = itertools.product(RULES, HELD, (False, True), (False, True), DTYPES, DTYPES)
    return distinct(
        step.specialisation(
            dataclasses.replace(rule, variant=variant), held=held, tracked=tracked, param=param,
            anchor=penalty.stored_anchor(param, anchor),
        )
        for rule, variant, held, tracked, param, anchor in ways
    ) + distinct(
        step.specialisation(
            dataclasses.replace(rule, variant=variant), held=True, tracked=tracked, param=param, omega=omega,
            anchor=penalty.stored_anchor(param, torch.bfloat16),
        )
        for rule, variant, tracked, (param, omega) in itertools.product(RULES, HELD, (False, True), COMPRESSED)
    ) + mixed_variants()  # fmt: skip


def mixed_variants() -> list[dict[str, Any]]:
    param = torch.bfloat16
    stored = ((None, param), (None, torch.float32), (torch.uint8, param))
    ways = itertools.product(RULES, HELD, (False, True), (False, True), stored, MIXED)
    every = distinct(
        step.specialisation(
            dataclasses.replace(rule, variant=variant), held=held, tracked=tracked, param=param, anchor=anchor,
            omega=omega if held else None, **mixed,
        )
        for rule, variant, held, tracked, (omega, anchor), mixed in ways
    )  # fmt: skip
    return [c for c in every if c["SPLIT"] or c["MOMENT"] != c["PARAM"]]


def penalty_variants() -> list[dict[str, Any]]:
    ways = itertools.product(penalty.MODES, DTYPES, DTYPES)
    return distinct(
        penalty.specialisation(mode, param, penalty.stored_anchor(param, anchor)) for mode, param, anchor in ways
    ) + distinct(
        penalty.specialisation(mode, param, penalty.stored_anchor(param, torch.bfloat16), omega)
        for mode, (param, omega) in itertools.product(penalty.MODES, COMPRESSED)
    )


def counter_variants() -> list[dict[str, Any]]:
    steps = (torch.float32, torch.float64)
    return [counters.specialisation(own, param) for own in steps for param in steps]


def fullest(job: Job) -> bool:
    c = job.constants
    if job.kernel == "_step":
        wide_tile = c["TRACKED"] or c["BLOCK"] == 1024 or c["SPLIT"]
        kinds = {c["PARAM"], c["GRAD"], c["MOMENT"]}
        usual = c["GRAD"] == c["PARAM"] and c["SPLIT"] == (len(kinds) == 2)  # as master weights have it by default
        full = c["KIND"] in ("momentum", "amsgrad") and c["HELD"] != "free" and wide_tile and c["PARAM"].name != "fp16"
        return usual and full
    return job.kernel == "advance" or (c["MODE"] in ("pulled", "hold_back", "stats") and c["PARAM"].name != "fp16")


def jobs() -> list[Job]:
    kernels = {"_step": step_variants(), "_penalty": penalty_variants(), "advance": counter_variants()}
    every = [
        Job(target, kernel, constants)
        for target in TARGETS
        for kernel, variants in kernels.items()
        for constants in variants
    ]
    return [job for job in every if job.target == "sm_90" or fullest(job)]


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> list[Code]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
            return list(pool.map(compiled, jobs(), chunksize=16))


def test_nothing_spills(codes: list[Code]):
    assert not [(code.job.id, code.spilled) for code in codes if code.spilled or code.registers > code.limit]
    for target, kernel in itertools.product(TARGETS, ("_step", "_penalty", "advance")):
        used = [code.registers for code in codes if (code.job.target, code.job.kernel) == (target, kernel)]
        print(f"{target} {kernel}: {len(used)} variants, {min(used)} to {max(used)} registers")


def test_every_tensor_is_read_and_written_in_vectors(codes: list[Code]):
    """Bytes that a thread moves in vectors: its share of each tensor's tile, once each way; of codes that is a word."""
    for code in codes:
        if code.job.kernel != "advance":
            share = code.job.constants["BLOCK"] // 128
            sizes = [[share * element.primitive_bitwidth // 8 for element in part] for part in tensors(code.job)]
            wanted = [sum(size for size in part if size > 4) for part in sizes]
            moved = [code.loaded, code.stored]
            if code.job.target == "gfx942":  # where two words, such as an address or a float64, are a vector too
                moved = list(map(min, moved, wanted))
            assert moved == wanted, (code.job.id, code, wanted)


def tensors(job: Job) -> tuple[list[Any], list[Any]]:
    """Element types of what a kernel reads and writes."""
    c = job.constants
    param, wide, omega, anchor = c["PARAM"], c["OP"], c["OMEGA"], c["ANCHOR"]
    if job.kernel == "_penalty":
        own = {"pull": [param], "pulled": [param], "hold_back": [param]}.get(c["MODE"], [])
        return [param, omega, anchor] + [param] * (c["MODE"] == "pulled"), own
    moments = {"sgd": 0, "momentum": 1, "adam": 2, "amsgrad": 3}[c["KIND"]]
    state = [param] * (1 + c["SPLIT"]) + [c["MOMENT"]] * moments + [wide] * c["TRACKED"]
    held = {"free": [], "wva": [omega]}.get(c["HELD"], [omega, anchor])
    return [*state, c["GRAD"], *held], state


def test_tiles_do_not_pass_through_shared_memory(codes: list[Code]):
    # The sums of a value or of statistics do: a few words per warp.
    sums = [code.job.constants.get("MODE") in ("value", "stats") for code in codes]
    assert not [code.job.id for code, summed in zip(codes, sums, strict=True) if code.shared and not summed]


@pytest.mark.parametrize("kernel", [step._step, penalty._penalty, counters.advance], ids=lambda kernel: kernel.__name__)
def test_no_argument_compiles_another_kernel(kernel):
    """Learning rates, flags, sizes and addresses change from step to step: Triton must not look at their values."""
    bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
    table = torch.zeros(16, dtype=torch.int64)
    seen = set()
    for integer, real in itertools.product((0, 1, 7, 16, 2**31, 2**40), (0.0, 1.0, 1e-300)):
        arguments = {}
        for param in kernel.params:
            if param.is_constexpr:
                arguments[param.name] = 1
            elif param.name.endswith("_ptr"):
                arguments[param.name] = table
            else:
                arguments[param.name] = real if param.annotation_type == "fp64" else integer
        _, specialization, _ = bind(**arguments)
        seen.add(tuple(specialization))
    assert len(seen) == 1


def test_the_variants_are_few():
    counts = len(step_variants()), len(penalty_variants()), len(counter_variants())
    assert counts == (500, 50, 4)
