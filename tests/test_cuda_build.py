"""The CUDA library as nvcc makes it, looked at without a GPU: it loads, spills nothing and moves whole vectors."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastewc import _build

OPS = (
    *("ewc_step", "ewc_penalty_value", "ewc_penalty_grads", "ewc_hold_back_", "ewc_stats_terms"),
    *("squared_norm_grad", "add_sum_grad_power", "add_conv_grad_power"),
)
LOAD = """
import shutil, sys, torch
from pathlib import Path
from fastewc import _extension
from fastewc.ops.ewc_penalty import native as _
from fastewc.ops.ewc_step import native as _
from fastewc.ops.squared_norm_grad import native as _
from fastewc.ops.sum_grad_power import native as _

_extension._package = Path("/nowhere")
folder = _extension.cache_folder("cuda")
folder.mkdir(parents=True)
shutil.copy(sys.argv[1], folder)
_extension.load("cuda")
assert _extension.status("cuda").reason == f"loaded from {folder / Path(sys.argv[1]).name}"
for op in sys.argv[2:]:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastewc::{op}", "CUDA"), op
    assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"fastewc::{op}", "CPU"), op
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        _build.compiler("cuda")
    except _build.BuildError as error:
        pytest.skip(str(error))
    path = tmp_path_factory.mktemp("cuda") / _build.library_name("cuda")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("FASTEWC_CUDA_ARCHS", "80 90+PTX")
        _build.compile_library("cuda", path)
    return path


def dump(library: Path, option: str) -> str:
    """What cuobjdump, of the CUDA toolkit or of Triton, prints."""
    triton = importlib.util.find_spec("triton")
    places = [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    places += [f"{folder}/backends/nvidia/bin" for folder in (triton.submodule_search_locations if triton else ())]
    tool = shutil.which("cuobjdump", path=os.pathsep.join(places))
    if tool is None:
        pytest.skip("neither a CUDA toolkit nor Triton has cuobjdump here")
    return subprocess.run([tool, option, str(library)], capture_output=True, text=True, check=True).stdout


def short(mangled: str) -> str:
    """The kernel's name and the letters of its template arguments."""
    found = re.search(r"\d([a-z_]+_kernel)(?:I(\w+?)EE|E)?", mangled)
    assert found is not None, mangled
    return found[1] + (f"<{found[2]}>" if found[2] else "")


def test_it_loads_where_there_is_no_gpu_and_has_every_kernel(library: Path, tmp_path: Path) -> None:
    assert b"libtorch_cuda.so" in library.read_bytes()
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "FASTEWC_CUDA_ARCHS": "80 90+PTX", "FASTEWC_JIT": "0"}
    command = [sys.executable, "-c", LOAD, str(library), *OPS]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_nothing_is_spilled(library: Path) -> None:
    usage = r"arch = (\w+)|Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    arch, seen = "", []
    for named, function, registers, stack, shared, local in re.findall(usage, dump(library, "-res-usage")):
        arch = named or arch
        if function:
            print(f"{arch} {short(function):<30} {registers:>4} registers, {shared:>6} bytes shared")
            assert int(stack) == int(local) == 0, function
            assert int(shared) <= 48 * 1024, function
            seen.append((arch, short(function)))
    kernels = {kernel for _, kernel in seen}
    assert {"ewc_step_kernel<fLb1>", "value_kernel<f>", "stats_kernel<d>", "tile_kernel<d>"} <= kernels
    assert set(seen) == {(arch, kernel) for arch in ("sm_80", "sm_90") for kernel in kernels}


def test_memory_is_moved_in_whole_vectors(library: Path) -> None:
    vectors: dict[str, set[str]] = {}
    for part in re.split(r"Function : ", dump(library, "-sass"))[1:]:
        name, code = part.split("\n", 1)
        kernel = short(name)
        vectors.setdefault(kernel, set()).update(re.findall(r"\b((?:LDG|STG)\.E\S*\.128)\b", code))
        assert not re.search(r"\b(LD|ST|LDL|STL)\.", code), f"{kernel} does not know that its pointers are global"
    for kernel, found in vectors.items():
        if kernel.startswith(("ewc_step", "value", "grads", "hold_back", "stats")):
            assert any(one.startswith("LDG") for one in found), kernel
        if kernel.startswith(("ewc_step", "grads", "hold_back")):
            assert any(one.startswith("STG") for one in found), kernel
