"""Many runs of the protocol as one: S networks in a leading dimension, trained by one program.

Each network has its own start, its own order of samples and its own λ; a step is one batched product per layer and one
fused optimizer step over all of them. The gradient of the sum of their losses holds each network's own gradient, Adam
works entry by entry, and every penalty has λ only in the product λΩ: so λ goes into Ω, and each network does what it
would do alone (``protocol.run_once``), up to the order of additions in a product.

Shapes: S networks, B samples, I inputs, O outputs.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastewc
from benchmarks.paper.mnist_tasks import Split, pixel_orders
from benchmarks.paper.protocol import Protocol, build_mlp, measure_importance

SLOPE = 0.01
Moments = dict[int, dict[str, Any]]
_MOMENTS = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")


@dataclass(frozen=True)
class Method:
    """How all networks of a stack are protected."""

    importance: str  # "fisher", "mas", "si" or "signal"
    variant: str


@dataclass(frozen=True)
class Network:
    """One run: λ in this library's convention, and the seed of its start and of its order of samples."""

    ewc_lambda: float
    seed: int


@dataclass(frozen=True)
class Training:
    """How the networks are trained, where that is not as in the protocol."""

    optimizer: Literal["adam", "sgd", "momentum"] = "adam"  # momentum: SGD with 0.9
    cosine: bool = False  # the learning rate falls to 0 within each task
    fixed_alpha: bool = False  # the stabilised penalty's α stays at the protocol's learning rate
    clip: float | None = None  # L2 norm of each network's gradient at most
    clip_sum: bool = False  # of the gradient with the penalty's; else of the task's alone

    @property
    def by_loss(self) -> bool:
        """True where the penalty has to be a part of the loss."""
        return self.fixed_alpha or (self.clip is not None and self.clip_sum)


@dataclass(frozen=True)
class StackOutcome:
    """What S runs give: accuracies in 0..1 [S][task], seconds of all together.

    ``moments``: the optimizer's by index of the parameter, [S, …]. ``diverged``: in which task a network's weights or
    importances became infinite; its weights are 0 from there on. ``stiffest``: each network's largest αλΩ at the end.
    """

    per_task: list[list[float]]
    when_learned: list[list[float]]
    seconds: float
    importance_seconds: float
    moments: Moments
    diverged: list[int | None]
    stiffest: list[float]


class StackedMLP(nn.Module):
    """S networks of linear layers with LeakyReLU between them: weights [S, O, I], biases [S, 1, O]."""

    def __init__(self, networks: Sequence[nn.Sequential]) -> None:
        super().__init__()
        layers = [[layer for layer in one if isinstance(layer, nn.Linear)] for one in networks]
        self.weights = nn.ParameterList(torch.stack([one.weight for one in same]) for same in zip(*layers, strict=True))
        self.biases = nn.ParameterList(
            torch.stack([one.bias for one in same]).unsqueeze(1) for same in zip(*layers, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[S, B, I] → [S, B, classes]."""
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, F.leaky_relu(x, SLOPE) if i else x, weight.mT)
        return x

    def network(self, s: int) -> nn.Sequential:
        """One of the networks, on the same memory, in eval mode."""
        layers: list[nn.Module] = []
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            layer = nn.Linear(weight.shape[2], weight.shape[1], device="meta")
            layer.weight, layer.bias = nn.Parameter(weight.detach()[s]), nn.Parameter(bias.detach()[s, 0])
            layers += [nn.LeakyReLU(SLOPE), layer] if i else [layer]
        return nn.Sequential(*layers).eval()


def run_stack(
    method: Method,
    networks: Sequence[Network],
    data: Split,
    *,
    protocol: Protocol,
    training: Training | None = None,
    moments: Moments | None = None,
    checkpoint: Path | None = None,
    after_task: Callable[[], object] = lambda: None,
) -> StackOutcome:
    """Train all networks on all tasks in a row and test them on all.

    Args:
        method: the protection.
        networks: λ and seed of each.
        data: MNIST as it is, on the device to run on.
        protocol: its numbers.
        training: what differs from it; None: nothing.
        moments: those of another stack's Adam to go on from; None: a new Adam.
        checkpoint: a file that keeps the state after each task, and is removed at the end; a run goes on from it.
        after_task: called after each task.
    """
    device, training = data.train_x.device, training or Training()
    model = initial_stack([one.seed for one in networks], data, protocol)
    ewc = fastewc.EWC(model, ewc_lambda=1.0, variant=method.variant)
    optimizer = _optimizer(method, model, training, protocol, None if training.by_loss else ewc)
    if moments is not None:
        optimizer.load_state_dict({**optimizer.state_dict(), "state": copy.deepcopy(moments)})
    orders = sample_orders([one.seed for one in networks])
    strengths = torch.tensor([one.ewc_lambda for one in networks], device=device).view(-1, 1, 1)
    when_learned: list[Tensor] = []
    diverged: list[int | None] = [None] * len(networks)
    first, spent = 0, {"all": 0.0, "importance": 0.0}
    if checkpoint is not None and checkpoint.exists():
        kept = torch.load(checkpoint, weights_only=True)
        if kept["networks"] != [(one.ewc_lambda, one.seed) for one in networks]:
            raise ValueError(f"{checkpoint} is of other networks; remove it to begin anew")
        model.load_state_dict(kept["model"])
        ewc.load_state_dict(kept["ewc"])
        optimizer.load_state_dict(kept["optimizer"])
        for order, state in zip(orders, kept["orders"], strict=True):
            order.set_state(state)
        first, spent, when_learned, diverged = (kept[key] for key in ("tasks", "spent", "when_learned", "diverged"))
        for _ in range(first):
            after_task()

    pixels = pixel_orders(protocol.tasks, data.train_x.shape[1], protocol.permutations)
    for k in range(first, protocol.tasks):
        begun = time.perf_counter()
        task = data.permuted(pixels[k].to(device))
        train_stack(model, optimizer, task, protocol, orders, training, ewc)
        _reset(model, optimizer, diverged, k, ~_finite(model.parameters()))
        when_learned.append(accuracies_of(model, task.test_x, task.test_y))
        if k < protocol.tasks - 1:
            paused = time.perf_counter()
            if method.importance == "si":  # the published protocol: ξ = 0.1, with the regularised gradient
                found: Mapping[str, Tensor] = fastewc.si_importance(optimizer, damping=0.1)
            else:
                found = measure_stack(method.importance, model, task, protocol)
            _reset(model, optimizer, diverged, k, ~_finite(found.values()))
            alive = torch.tensor([one is None for one in diverged], device=device).view(-1, 1, 1)
            ewc.consolidate({name: (strengths * value).where(alive, 0) for name, value in found.items()})
            spent["importance"] += time.perf_counter() - paused
        spent["all"] += time.perf_counter() - begun
        if checkpoint is not None:
            save_state(checkpoint, {
                "networks": [(one.ewc_lambda, one.seed) for one in networks], "model": model.state_dict(),
                "ewc": ewc.state_dict(), "optimizer": optimizer.state_dict(),
                "orders": [order.get_state() for order in orders], "tasks": k + 1, "spent": spent,
                "when_learned": when_learned, "diverged": diverged,
            })  # fmt: skip
        after_task()
    begun = time.perf_counter()
    per_task = torch.stack([accuracies_of(model, data.test_x[:, one.to(device)], data.test_y) for one in pixels], 1)
    spent["all"] += time.perf_counter() - begun
    state = optimizer.state_dict()["state"]
    stiffest = torch.stack([value.flatten(1).amax(1) for value in ewc.state_dict()["importance"].values()]).amax(0)
    if checkpoint is not None:
        checkpoint.unlink()
    return StackOutcome(
        per_task.tolist(), torch.stack(when_learned, 1).tolist(), spent["all"], spent["importance"],
        {i: {key: one[key] for key in _MOMENTS if key in one} for i, one in state.items()},
        diverged, (protocol.lr * stiffest).tolist(),
    )  # fmt: skip


def initial_stack(seeds: Sequence[int], data: Split, protocol: Protocol) -> StackedMLP:
    """Each seed's freshly initialised network, on the device of the data."""
    networks = []
    for seed in seeds:
        torch.manual_seed(seed)
        one = build_mlp(data.train_x.shape[1], protocol.hidden, int(data.train_y.max()) + 1)
        networks.append(one.to(data.train_x.dtype))
    return StackedMLP(networks).to(data.train_x.device)


def _optimizer(
    method: Method, model: StackedMLP, training: Training, protocol: Protocol, ewc: fastewc.EWC | None
) -> torch.optim.Optimizer:
    named, options = list(model.named_parameters()), {"lr": protocol.lr, "ewc": ewc}
    options["path_integral"] = "regularized" if method.importance == "si" else False
    if training.optimizer == "adam":
        return fastewc.optim.Adam(named, **options)
    return fastewc.optim.SGD(named, momentum=0.9 if training.optimizer == "momentum" else 0.0, **options)


def sample_orders(seeds: Sequence[int]) -> list[torch.Generator]:
    """What draws the order of the samples, for each network of a stack."""
    return [torch.Generator().manual_seed(10_000 + seed) for seed in seeds]


def train_stack(
    model: StackedMLP, optimizer: torch.optim.Optimizer, task: Split, protocol: Protocol,
    orders: list[torch.Generator], training: Training | None = None, ewc: fastewc.EWC | None = None,
) -> None:  # fmt: skip
    """``protocol.epochs`` passes over the training set, each network in its own order.

    ``ewc`` is for a training whose penalty is a part of the loss; otherwise the optimizer has it.
    """
    training = training or Training()
    group, steps, step = optimizer.param_groups[0], protocol.epochs * -(-len(task.train_y) // protocol.batch), 0
    for _ in range(protocol.epochs):
        epoch = torch.stack([torch.randperm(len(task.train_y), generator=order) for order in orders])
        for index in epoch.to(task.train_x.device).split(protocol.batch, 1):
            if training.cosine:
                group["lr"] = protocol.lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            logits = model(task.train_x[index])
            losses = F.cross_entropy(logits.flatten(0, 1), task.train_y[index].flatten(), reduction="sum")
            loss = losses / index.shape[1]
            if ewc is not None and training.by_loss:
                loss = loss + ewc.penalty(protocol.lr if training.fixed_alpha else group["lr"])
            optimizer.zero_grad()
            loss.backward()
            if training.clip is not None:
                _clip(model, training.clip)
            optimizer.step()
            step += 1


def _clip(model: StackedMLP, most: float) -> None:
    """Each network's gradient, as torch.nn.utils.clip_grad_norm_ does it for one."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norms = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()
    factors = (most / (norms + 1e-6)).clamp(max=1.0).view(-1, 1, 1)
    for g in gradients:
        g.mul_(factors)


def _finite(tensors: Iterable[Tensor]) -> Tensor:
    """[S]: which networks have nothing but finite numbers."""
    return torch.stack([tensor.detach().isfinite().flatten(1).all(1) for tensor in tensors]).all(0)


@torch.no_grad()
def _reset(
    model: StackedMLP, optimizer: torch.optim.Optimizer, diverged: list[int | None], task: int, broken: Tensor
) -> None:
    """Note which networks have diverged, and set all that is theirs to 0."""
    for s in broken.nonzero().flatten().tolist():
        diverged[s] = task if diverged[s] is None else diverged[s]
        for p in model.parameters():
            for tensor in (p, *(t for t in optimizer.state[p].values() if torch.is_tensor(t) and t.shape == p.shape)):
                tensor[s] = 0


def measure_stack(kind: str, model: StackedMLP, task: Split, protocol: Protocol) -> dict[str, Tensor]:
    """Fisher, MAS or SIG of all networks from the last training samples, by the names of the stack's parameters."""
    last = slice(-protocol.importance_samples, None)
    x, y = task.train_x[last], task.train_y[last]
    found = [measure_importance(kind, model.network(s), x, y) for s in range(len(model.weights[0]))]
    stacked = [torch.stack([one[name] for one in found]) for name in found[0]]  # weight, bias, weight, bias, …
    weights = {f"weights.{i}": value for i, value in enumerate(stacked[::2])}
    return weights | {f"biases.{i}": value.unsqueeze(1) for i, value in enumerate(stacked[1::2])}


@torch.no_grad()
def accuracies_of(model: StackedMLP, x: Tensor, y: Tensor) -> Tensor:
    """The share of right answers of each network [S]."""
    S = len(model.weights[0])
    right = [
        (model(some.expand(S, *some.shape)).argmax(2) == wanted).sum(1)
        for some, wanted in zip(x.split(2000), y.split(2000), strict=True)
    ]
    return torch.stack(right).sum(0).double().cpu() / len(y)


def save_state(file: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint; one of that name is replaced whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, file.with_suffix(".tmp"))
    os.replace(file.with_suffix(".tmp"), file)
