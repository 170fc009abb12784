"""Triton kernels on CPU tensors: a test file runs itself once more, in a process where Triton's interpreter is on.

The interpreter stands in for the hardware, with these repairs: float32 becomes bfloat16 by rounding (it cuts, and its
own rounding loses the carry), dot products and absolute values of bfloat16 are not those of its bits, scalars become
Python's also in Triton 3.6 with numpy 2.4, a helper's call does not patch the language again (a millisecond each, and
the kernel's call has done so), and numpy does not warn of masked lanes.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"


#: For tests in which kernels run: here interpreted, else on a GPU.
needs_kernels = pytest.mark.filterwarnings("default") if INTERPRETED else pytest.mark.gpu


def run(path: str) -> None:
    """Run the tests of a file in the interpreter; skip with the reason where this Triton has none that works."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not in_the_interpreter", path]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout, done.stdout[-2000:]


def _repair() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    cast = builder.cast_impl

    def rounded(self, source, target):
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            nearest = torch.from_numpy(source.data.copy()).bfloat16().view(torch.uint16).numpy()
            return interpreter.TensorHandle(nearest, target.scalar)
        return cast(self, source, target)

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(numpy.uint32) << 16).view(numpy.float32), tl.float32)

    dot, fabs = builder.create_dot, builder.create_fabs

    def wide_dot(self, a, b, *others):
        return dot(self, widened(a), widened(b), *others)

    def wide_fabs(self, x):
        if x.dtype.scalar != tl.bfloat16:
            return fabs(self, x)
        return interpreter.TensorHandle(x.data & numpy.uint16(0x7FFF), x.dtype.scalar)

    function = interpreter.InterpretedFunction
    call, patched = function.__call__, set()

    def called(self, *args, **kwargs):
        module = self.fn.__module__
        if module.startswith("fastewc") or module in patched:
            return self.rewrite()(*args, **kwargs)
        patched.add(module)  # Triton's own helpers see another part of the language, which stays patched
        return call(self, *args, **kwargs)

    patch_tensor = interpreter._patch_lang_tensor

    def patched_tensor(tensor, *scope):
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    builder.cast_impl, function.__call__ = rounded, called
    builder.create_dot, builder.create_fabs = wide_dot, wide_fabs
    interpreter._patch_lang_tensor = patched_tensor
    numpy.seterr(all="ignore")


if INTERPRETED:
    _repair()
