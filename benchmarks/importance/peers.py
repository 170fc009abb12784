"""BackPACK and Opacus, each given what its documentation asks for: layers extended, in-place off, train mode."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.importance.contenders import Job, Run, Sums
from benchmarks.importance.workloads import Batch, Missing, chunks


def copy_without_in_place(model: nn.Module) -> nn.Module:
    """A copy whose activations leave their input alone: module hooks can't work with the others."""
    copied = deepcopy(model)
    for module in copied.modules():
        if isinstance(getattr(module, "inplace", None), bool):
            module.inplace = False
    return copied


@contextmanager
def quiet() -> Iterator[None]:
    """Without the peers' warnings: what they leave out or get wrong, the gate says."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def backpack(job: Job) -> Run:
    """SumGradSquared on every module that holds parameters itself; the other modules need no extension for it."""
    try:
        with quiet():
            from backpack import backpack as extension
            from backpack import extend
            from backpack.extensions import SumGradSquared
    except ImportError as error:
        raise Missing("BackPACK is not installed: pip install 'fastewc[bench]'") from error
    model = copy_without_in_place(job.model)
    for module in model.modules():
        if any(True for _ in module.parameters(recurse=False)):
            extend(module)

    @quiet()
    def run(batches: Sequence[Batch]) -> dict[str, Tensor]:
        sums = Sums(model)
        without = set()
        for x, y in chunks(batches, job.chunk):
            model.zero_grad(set_to_none=True)
            with extension(SumGradSquared()):
                job.value(model, x, y).backward()
            for name, p in model.named_parameters():
                if hasattr(p, "sum_grad_squared"):
                    sums.total[name].add_(p.sum_grad_squared)
                    del p.sum_grad_squared
                else:
                    without.add(name)
            sums.samples += len(x)
        return {name: value for name, value in sums.mean().items() if name not in without}

    return run


def opacus(job: Job) -> Run:
    """Per-sample gradients from Opacus' module hooks, which are off in eval mode."""
    try:
        with quiet():
            from opacus import GradSampleModule
    except ImportError as error:
        raise Missing("Opacus is not installed: pip install 'fastewc[bench]'") from error
    model = copy_without_in_place(job.model).train()
    wrapped = GradSampleModule(model, loss_reduction="sum")

    @quiet()
    def run(batches: Sequence[Batch]) -> dict[str, Tensor]:
        sums = Sums(model)
        for x, y in chunks(batches, job.chunk):
            wrapped.zero_grad(set_to_none=True)
            with sdpa_kernel(SDPBackend.MATH):  # it batches some layers by vmap, which knows no other attention
                job.value(wrapped, x, y).backward()
            for name, p in model.named_parameters():
                sums.total[name].add_(job.quantity.summed(p.grad_sample))
            sums.samples += len(x)
        wrapped.zero_grad(set_to_none=True)
        return sums.mean()

    return run
