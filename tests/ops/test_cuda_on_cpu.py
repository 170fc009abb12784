"""The CUDA sources without a GPU: compiled as plain C++ and run thread by thread, they pass the tests of their ops."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastewc import _build

ROOT = Path(__file__).resolve().parents[2]
FLAGS = (
    *("-std=c++20", "-O1", "-fPIC", "-shared", "-w", f"-DTORCH_TARGET_VERSION={_build.TORCH_TARGET_VERSION}"),
    "-ffp-contract=off",  # as nvcc's --fmad=false
    "-fno-strict-aliasing",  # vectors are loaded from arrays of numbers, as CUDA C++ allows
    *("-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"),  # a GPU traps too
    '-DFASTEWC_SOURCE_DIGEST="not the real library"',
)


def compiler() -> list[str]:
    if not sys.platform.startswith("linux"):
        pytest.skip("the threads of a block are ucontext fibers, of Linux")
    try:
        return _build.compiler("cpu")
    except _build.BuildError as error:
        pytest.skip(str(error))


def test_the_cuda_kernels_pass_the_tests_of_their_ops(tmp_path: Path) -> None:
    torch, csrc, library = _build.torch_folder(), _build.source_folder(), tmp_path / "kernels.so"
    sources = [str(path) for path in sorted(csrc.glob("*/*_cuda.cu"))]
    includes = [f"-I{ROOT / 'tests' / 'cuda_on_cpu'}", f"-I{torch / 'include'}"]
    command = [*compiler(), *FLAGS, *includes, "-x", "c++", *sources, "-o", str(library), f"-L{torch / 'lib'}"]
    done = subprocess.run([*command, "-ltorch_cpu"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # In a process of its own: here, the CPU's own kernels may be loaded already.
    plugins = ["-p", "tests.cuda_on_cpu.plugin", "-p", "no:cacheprovider"]
    files = [
        f"tests/{name}.py"
        for name in (
            "cuda_on_cpu/kernels",
            "cuda_on_cpu/sums",
            "ops/test_parity",
            "ops/test_ewc_step",
            "ops/test_ewc_step_halves",
        )
    ]
    ops = [path.parent.name for path in csrc.glob("*/*_cuda.cu")]
    tests = [*files, "tests/ops/test_ewc_penalty.py", "-k", " or ".join(["cuda_on_cpu", *ops])]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", *plugins, *tests],
        cwd=ROOT, env={**os.environ, "FASTEWC_CUDA_ON_CPU": str(library)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    print(done.stdout.splitlines()[-1])
