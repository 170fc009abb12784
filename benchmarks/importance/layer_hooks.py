"""The strongest thing that is quickly written by hand: hooks on linear and convolutional layers, bmm, square, sum.

It gives Ω of those layers alone (norms, embeddings, attention's packed projections and weights with a second use are
left out), and pays less for it: weights are frozen, so backward forms no ordinary weight gradient.
Letters: N samples, T positions, I inputs, O outputs; a [N, T, I] what a layer saw, g [N, T, O] its output's gradient.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.importance.contenders import Job, Run
from benchmarks.importance.workloads import Batch
from benchmarks.ops.ewc_step_contenders import time_limit
from fastewc.testing import op_dtype

NAME = "torch.compile of bmm, square, sum in hooks (linear and conv only)"
# Elements of per-sample gradients, or of unfolded inputs, at once.
_HELD = 1 << 26


def pair_sum(a: Tensor, g: Tensor, power: int) -> Tensor:
    """Σ_n |Σ_t g a|^p, [O, I]."""
    per_sample = torch.bmm(g.mT, a).to(op_dtype(g.dtype))
    return (per_sample.square() if power == 2 else per_sample.abs()).sum(0)


def single_sum(a: Tensor, g: Tensor, power: int) -> Tensor:
    """The same for one position: a [N, I], g [N, O], one product of powers."""
    a, g = a.to(op_dtype(g.dtype)), g.to(op_dtype(g.dtype))
    return g.square().T @ a.square() if power == 2 else g.abs().T @ a.abs()


def compiled(power: int, like: Tensor, seconds: float) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Both sums compiled for any sizes; NotImplementedError if that takes longer than ``seconds``."""
    if seconds <= 0:
        raise NotImplementedError("no time to compile was given")
    torch._dynamo.config.recompile_limit = 64  # layers come in more than the usual eight kinds of strides
    pair, single = (torch.compile(one, dynamic=True, fullgraph=True) for one in (pair_sum, single_sum))
    with time_limit(seconds, "torch.compile"):
        pair(like.new_ones(3, 5, 7), like.new_ones(3, 5, 6), power)
        single(like.new_ones(3, 7), like.new_ones(3, 6), power)
    return pair, single


def is_linear(module: nn.Module) -> bool:
    """nn.Linear, or transformers' Conv1D, whose weight is [I, O]."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


class Layer:
    """One hooked layer: adds its weight's and its bias's sums when its output's gradient arrives."""

    def __init__(self, module: nn.Module, job: Job, pair: Callable[..., Tensor], single: Callable[..., Tensor]) -> None:
        self.module, self.quantity, self.pair, self.single = module, job.quantity, pair, single
        self.weight, self.bias = torch.zeros(()), torch.zeros(())
        module.register_forward_hook(self.after)

    def after(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Wait for the gradient of ``output``; the first layer's has to be asked for, as no weight does."""
        if not output.requires_grad:
            output.requires_grad_()
        output.register_hook(partial(self.add, inputs[0].detach()))

    def add(self, x: Tensor, g: Tensor) -> None:
        """One use of the layer."""
        power, linear, x = self.quantity.power, is_linear(self.module), x.to(g.dtype)
        if linear:
            a, g = (t.reshape(len(t), -1, t.shape[-1]) for t in (x, g))
        else:
            a, g = x, g.flatten(2).mT
        self.bias = self.bias + self.quantity.summed(g.sum(1).to(op_dtype(g.dtype)))
        if linear and a.shape[1] == 1:
            self.weight = self.weight + self.single(a[:, 0], g[:, 0], power)
            return
        held = self.module.weight.numel()
        if not linear:  # windows, each as large as one output's weights
            held = max(held, g.shape[1] * self.module.weight[0].numel())
        for one, its in zip(a.split(max(1, _HELD // held)), g.split(max(1, _HELD // held)), strict=True):
            self.weight = self.weight + self.pair(one if linear else self.unfolded(one), its, power)

    def unfolded(self, x: Tensor) -> Tensor:
        """[N, T, I] of a convolution: T windows of I inputs."""
        m = self.module
        return F.unfold(x, m.kernel_size, m.dilation, m.padding, m.stride).mT

    def sums(self) -> dict[str, Tensor]:
        """The sums in the shapes of the parameters; none where the model goes round the module's forward."""
        if self.weight.ndim == 0:
            return {}
        weight = self.weight.T if type(self.module).__name__ == "Conv1D" else self.weight
        found = {"weight": weight.reshape(self.module.weight.shape)}
        if self.module.bias is not None:
            found["bias"] = self.bias
        self.weight, self.bias = torch.zeros(()), torch.zeros(())
        return found


def hooked(job: Job, *, compile_seconds: float, functions: Any = None) -> Run:
    """Hooks on a frozen copy; ``functions``: the two sums themselves instead of their compiled forms."""
    model = deepcopy(job.model).requires_grad_(False)
    like = next(model.parameters())
    if like.dtype == torch.float64:  # the gate's, never timed
        functions = pair_sum, single_sum
    pair, single = functions or compiled(job.quantity.power, like, compile_seconds)
    uses = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    layers = {
        name: Layer(module, job, pair, single)
        for name, module in model.named_modules()
        if is_linear(module) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    }
    wanted = {
        f"{name}.{kind}": (name, kind)
        for name, layer in layers.items()
        for kind, p in layer.module.named_parameters(recurse=False)
        if uses[id(p)] == 1
    }

    def run(batches: Sequence[Batch]) -> dict[str, Tensor]:
        count = 0
        for x, y in batches:
            job.value(model, x, y).backward()
            count += len(x)
        sums = {name: layer.sums() for name, layer in layers.items()}
        return {full: sums[name][kind] / count for full, (name, kind) in wanted.items() if sums[name]}

    return run
