"""The ways to get Ω = (1/N) Σ_n |∂ value_n / ∂w|^p of a whole model, from the batch-1 loop to fastewc.

A builder prepares a model for one way and returns the pass over batches, which gives Ω by parameter name. What
changes a model (hooks, wrappers) works on a copy of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastewc
from benchmarks.importance.workloads import Batch, Workload, chunks
from fastewc.testing import op_dtype

Run = Callable[[Sequence[Batch]], Mapping[str, Tensor]]
#: Bytes that gradients of single samples may take at once, where a contender keeps them.
KEPT = {"cpu": 1 << 30, "cuda": 8 << 30}


@dataclass(frozen=True)
class Quantity:
    """Fisher or MAS.

    Attributes:
        name: "fisher" or "mas".
        power: p, 2 or 1.
        value: (output, y) → Σ_n value_n.
        public: fastewc's function for it.
    """

    name: str
    power: int
    value: Callable[[Tensor, Tensor], Tensor]
    public: Callable[[nn.Module, Any], fastewc.Importance]

    def summed(self, per_sample: Tensor) -> Tensor:
        """Σ_n |g_n|^p of gradients [N, ...]."""
        return (per_sample.square() if self.power == 2 else per_sample.abs()).sum(0)


@dataclass(frozen=True)
class Job:
    """One quantity of one workload."""

    workload: Workload
    quantity: Quantity

    @property
    def model(self) -> nn.Module:
        return self.workload.model

    @property
    def chunk(self) -> int:
        """How many samples' gradients are kept at once."""
        p = next(self.model.parameters())
        return max(1, KEPT[p.device.type] // (p.element_size() * self.workload.weights))

    def value(self, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
        """Σ_n value_n, in the workload's precision."""
        with self.workload.precision():
            return self.quantity.value(model(x), y)


Builder = Callable[[Job], Run]


def negative_log_likelihood(output: Tensor, y: Tensor) -> Tensor:
    """Σ −log p(y | x) over samples and their positions."""
    return F.cross_entropy(output.flatten(0, -2), y.flatten(), reduction="sum")


def squared_norm(output: Tensor, y: Tensor) -> Tensor:
    """Σ ‖f(x)‖² over samples and their positions."""
    return output.to(op_dtype(output.dtype)).square().sum()


QUANTITIES = {
    one.name: one
    for one in (
        Quantity("fisher", 2, negative_log_likelihood, fastewc.fisher_importance),
        Quantity("mas", 1, squared_norm, fastewc.mas_importance),
    )
}


class Sums:
    """Σ over samples by parameter name, and how many samples there were."""

    def __init__(self, model: nn.Module) -> None:
        self.total = {name: torch.zeros_like(p, requires_grad=False) for name, p in model.named_parameters()}
        self.samples = 0

    def mean(self) -> dict[str, Tensor]:
        """(1/N) Σ."""
        return {name: total.div_(self.samples) for name, total in self.total.items()}


def plain(job: Job) -> Run:
    """The unit: forward and backward of the batch's mean loss, what a training step pays anyway. Gives no Ω."""
    workload, model = job.workload, job.model

    def run(batches: Sequence[Batch]) -> dict[str, Tensor]:
        for x, y in batches:
            model.zero_grad(set_to_none=True)
            with workload.precision():
                loss = F.cross_entropy(model(x).flatten(0, -2), y.flatten())
            loss.backward()
        return {}

    return run


def batch_one(job: Job) -> Run:
    """A backward pass for each sample, the loop of nearly all published EWC code that is right."""
    parameters = list(job.model.parameters())

    def run(batches: Sequence[Batch]) -> dict[str, Tensor]:
        sums = Sums(job.model)
        for x, y in chunks(batches, 1):
            gradients = torch.autograd.grad(job.value(job.model, x, y), parameters)
            for total, g in zip(sums.total.values(), gradients, strict=True):
                if job.quantity.power == 2:
                    total.addcmul_(g, g)
                else:
                    total.add_(g.abs())
            sums.samples += 1
        return sums.mean()

    return run


def vmap_grad(job: Job) -> Run:
    """torch.func's per-sample gradients, as many samples at once as memory allows."""
    model = job.model
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def value(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return job.value(lambda x: functional_call(model, (parameters, buffers), (x,)), x[None], y[None])

    per_sample = vmap(grad(value), in_dims=(None, 0, 0))

    def run(batches: Sequence[Batch]) -> dict[str, Tensor]:
        sums = Sums(model)
        for x, y in chunks(batches, job.chunk):
            with sdpa_kernel(SDPBackend.MATH):  # the only attention that vmap can batch
                gradients = per_sample(parameters, x, y)
            for name, total in sums.total.items():
                total.add_(job.quantity.summed(gradients[name]))
            sums.samples += len(x)
        return sums.mean()

    return run


def ours(job: Job) -> Run:
    """The public function, as a user calls it."""

    def run(batches: Sequence[Batch]) -> fastewc.Importance:
        with job.workload.precision():
            return job.quantity.public(job.model, batches)

    return run
