"""The CPU kernels under AddressSanitizer and UBSan: every case of every native op, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastewc import _build
from fastewc._dispatch import _KERNELS

# Last on the command line, so that it wins: unoptimised code compiles in seconds, and ifunc, which chooses the vector
# clones, runs before AddressSanitizer is ready.
FLAGS = "-O0 -g1 -DFASTEWC_NO_CPU_CLONES -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all"
OPS = sorted(op for op, impl in _KERNELS if impl == "native" and "cpu" in _KERNELS[op, impl])

RUN_CASES = """
import importlib, sys
from pathlib import Path

import torch

import fastewc
from fastewc import _extension

_extension._candidates = lambda device_type: [Path(sys.argv[1])]
count = 0
for op in sys.argv[2:]:
    for case in importlib.import_module(f"fastewc.ops.{op}.cases").CASES:
        for dtype in case.dtypes:
            case.run("native", dtype)
            count += 1

# More samples than sum_grad_power takes at a time, and blocks of rows for several threads.
from fastewc.ops.sum_grad_power.cases import ConvCase
ConvCase(30, 64, 8, (12, 12), (3, 3), padding=1).run("native", torch.float32)

# Enough weights for several threads, through the public doors.
model = torch.nn.Linear(301, 211)
ewc = fastewc.EWC(model, ewc_lambda=2.0)
ewc.consolidate({name: torch.rand_like(p) for name, p in model.named_parameters()})
model(torch.randn(3, 301)).square().sum().backward()
fastewc.optim.AdamW(model.parameters(), ewc=ewc, max_grad_norm=1.0, path_integral=True).step()
fastewc.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, ewc=ewc).step()
plain = torch.optim.SGD(model.parameters(), lr=0.1)
with ewc.attach(plain):
    plain.step()
ewc.stats(0.1)
ewc.penalty(lr=0.1).backward()
assert _extension.status().reason.endswith(sys.argv[1])
print("ran", count)
"""

# What must be noticed, in memory that torch has allocated, as the kernels' is.
WRONG = """
extern "C" float past_the_end(const float* x, long n) { return x[n]; }
extern "C" float next_number(const float* x, long n) { return static_cast<float>(static_cast<int>(n) + 1); }
"""
CALL_WRONG = """
import ctypes, sys, torch

x, n = torch.zeros(16), int(sys.argv[3])
function = getattr(ctypes.CDLL(sys.argv[1]), sys.argv[2])
for last in (n - 1, n):
    function(ctypes.c_void_p(x.data_ptr()), ctypes.c_long(last))
    print("noticed nothing at", last, flush=True)
"""


def output_of(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiler with the sanitizers switched on, as one command."""
    try:
        command = " ".join(_build.compiler())
    except _build.BuildError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("sanitizers")
    script, source, library = folder / "c++", folder / "wrong.cpp", folder / "wrong.so"
    script.write_text(f'#!/bin/sh\nexec {command} "$@" {FLAGS}\n')
    script.chmod(0o755)
    source.write_text(WRONG)
    done = subprocess.run([script, "-shared", "-fPIC", source, "-o", library], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"{command} can't compile with {FLAGS}: {done.stderr.strip().splitlines()[-1:]}")
    return script


@pytest.fixture(scope="module")
def environment(compiler: Path) -> dict[str, str]:
    """Of a process in which the sanitizers were there before everything else."""
    # libstdc++ too: else AddressSanitizer, loaded before it, could not pass exceptions on.
    names = ("libasan.so", "libubsan.so", "libstdc++.so")
    runtimes = [output_of(compiler, f"-print-file-name={name}") for name in names]
    for path in runtimes:
        if not Path(path).is_absolute():
            pytest.skip(f"{path}: the sanitizers' runtime is not GCC's, or not shared")
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(Path(_build.__file__).parents[1]),
        "OMP_NUM_THREADS": "2",
    }


def python(script: str, *args: str | Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *args]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize(
    ("function", "n", "said"),
    [
        ("past_the_end", 16, "AddressSanitizer: heap-buffer-overflow"),
        ("next_number", 2**31 - 1, "signed integer overflow: 2147483647 + 1"),
    ],
)
def test_a_wrong_access_and_an_overflow_are_noticed(
    function: str, n: int, said: str, compiler: Path, environment: dict[str, str]
):
    done = python(CALL_WRONG, compiler.parent / "wrong.so", function, str(n), environment=environment)
    assert done.stdout == f"noticed nothing at {n - 1}\n", done.stderr[-2000:]
    assert said in done.stderr
    assert done.returncode != 0


def test_every_case_of_every_native_op(compiler: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    assert OPS
    monkeypatch.setenv("CXX", str(compiler))
    library = compiler.parent / "kernels.so"
    _build.compile_library("cpu", library)
    done = python(RUN_CASES, library, *OPS, environment=environment)
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stdout.startswith("ran ")
    assert int(done.stdout.split()[1]) > 100
