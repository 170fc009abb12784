"""Arguments, parameters and gradients with which our optimizers are compared with torch's."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

import fastewc

NAMES = ["SGD", "Adam", "AdamW"]

SGD_ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"lr": 0.05},
    {"lr": torch.tensor(0.05)},
    {"lr": torch.tensor([0.05])},
    {"lr": 0.05, "momentum": 0.9},
    {"lr": 0.05, "momentum": 0.9, "dampening": 0.3},
    {"lr": torch.tensor(0.05, dtype=torch.float64), "momentum": 0.9, "nesterov": True},
    {"lr": 0.05, "weight_decay": 0.1},
    {"lr": 0.05, "weight_decay": torch.tensor(0.1)},
    {"lr": 0.05, "maximize": True, "momentum": 0.5, "weight_decay": 0.01},
    {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "maximize": True},
]
ADAM_ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"lr": 0.02, "betas": (0.8, 0.95)},
    {"lr": 0.02, "betas": (0.0, 0.0)},
    {"lr": 0.02, "betas": (torch.tensor(0.8), torch.tensor(0.95))},
    {"lr": torch.tensor(0.02), "amsgrad": True},
    {"lr": torch.tensor([0.02], dtype=torch.float64), "weight_decay": 0.0},
    {"lr": 0.02, "eps": 0.1},
    {"lr": 0.02, "weight_decay": 0.1},
    {"lr": torch.tensor(0.02), "weight_decay": 0.1},
    {"lr": 0.02, "weight_decay": 0.0},
    {"lr": 0.02, "amsgrad": True, "weight_decay": 0.05, "maximize": True, "eps": 1e-3},
]
CASES = (
    [("SGD", a) for a in SGD_ARGUMENTS]
    + [(name, a) for name in ("Adam", "AdamW") for a in ADAM_ARGUMENTS]
    + [("Adam", {"lr": 0.02, "weight_decay": 0.1, "decoupled_weight_decay": True})]
)
IDS = [f"{name}-{i}" for i, (name, _) in enumerate(CASES)]


def ours(name: str) -> type[torch.optim.Optimizer]:
    return getattr(fastewc.optim, name)


def theirs(name: str) -> Callable[..., torch.optim.Optimizer]:
    """torch's for-loop implementation: its fused CPU kernels are wrong for strided parameters in some versions."""
    cls = getattr(torch.optim, name)
    return lambda params, **kwargs: cls(params, foreach=False, fused=False, **kwargs)


def make_params(dtype: torch.dtype, seed: int = 3) -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(seed)
    shapes = [(), (0,), (5,), (7, 9), (4, 3, 5, 2), (6, 8)]
    values = [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]
    values[4] = values[4].contiguous(memory_format=torch.channels_last)
    values[5] = values[5][:, ::2]
    return [nn.Parameter(value) for value in values]


def give_gradients(pairs: Iterable[list[nn.Parameter]], step: int) -> None:
    """The same gradient for every list; parameter 2 has none in step 2, parameter 3 is frozen in steps 10 to 14."""
    g = torch.Generator().manual_seed(100 + step)
    lists = list(pairs)
    for i, params in enumerate(zip(*lists, strict=True)):
        value = torch.randn(params[0].shape, generator=g, dtype=torch.float64) * 10.0 ** (step % 5 - 2)
        absent = (i == 2 and step == 2) or (i == 3 and 10 <= step < 15)
        for p in params:
            p.grad = None if absent else torch.empty_like(p).copy_(value)  # autograd's layout


def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:3]}, {"params": params[3:], "weight_decay": 0.03}]


def load(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Load a state but keep the groups: ``fused``, which chooses what runs, travels with them."""
    groups = [
        {**own, "params": saved["params"]}
        for own, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True)
    ]
    optimizer.load_state_dict({"state": copy.deepcopy(state_dict["state"]), "param_groups": groups})


def wide(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same numbers with tensors in float64: torch computes 1 − βᵗ in the dtype that a tensor β has."""
    return {
        key: tuple(map(as_wide, value)) if isinstance(value, tuple) else as_wide(value)
        for key, value in arguments.items()
    }


def as_wide(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) else value


def assert_same_state(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    one, other = a.state_dict()["state"], b.state_dict()["state"]
    assert one.keys() == other.keys()
    for i in one:
        assert one[i].keys() == other[i].keys()
        for key, value in one[i].items():
            assert value.dtype == other[i][key].dtype, key
            assert value.stride() == other[i][key].stride(), key
            assert torch.equal(value, other[i][key]), key


def direction_terms(q: nn.Parameter, optimizer: torch.optim.Optimizer) -> Tensor:
    """Σ|terms| of Δw where they cancel: g against the moment or decay that it joins, times how far one unit moves w."""
    group = next(g for g in optimizer.param_groups if any(q is p for p in g["params"]))
    if q.grad is None:
        return torch.zeros_like(q)
    lr, g = float(group["lr"]), q.grad.abs() + float(group["weight_decay"]) * 2 * q.detach().abs()
    state = optimizer.state[q]
    if "exp_avg_sq" not in state:
        mu = group["momentum"]
        # |b_old| ≤ (|b| + g)/μ, and Nesterov adds μ|b| to g.
        return lr * (3 * g + (0 if mu == 0 else 2 * state["momentum_buffer"].abs()))
    beta1, beta2 = (float(beta) for beta in group["betas"])
    t = float(state["step"])
    v = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
    denominator = (v / (1 - beta2**t)).sqrt() + group["eps"]
    return lr / (1 - beta1**t) * (state["exp_avg"].abs() + 2 * (1 - beta1) * g) / denominator
