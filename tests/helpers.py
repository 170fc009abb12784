"""Small models and importances that many tests use."""

import torch
from torch import nn

from fastewc import EWC, Importance
from fastewc.ops.importance_codes import BLOCK


def net(seed: int = 0, out: int = 2) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, out))


class Odd(nn.Module):
    """Parameters of every layout: several pieces and a rest, channels_last, permuted, with gaps, 0-dim, empty."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.long = nn.Parameter(torch.randn(3 * BLOCK + 17))
        self.image = nn.Parameter(torch.randn(30, 20, 3, 3).to(memory_format=torch.channels_last))
        self.turned = nn.Parameter(torch.randn(40, 70).T)
        self.gaps = nn.Parameter(torch.randn(50, 120)[:, ::2])
        self.number = nn.Parameter(torch.randn(()))
        self.empty = nn.Parameter(torch.randn(0, 3))


def importance_of(model: nn.Module, value=None, seed: int = 1, num_samples: int = 10) -> Importance:
    g = torch.Generator().manual_seed(seed)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    values = {
        n: torch.rand(p.shape, generator=g) if value is None else torch.full(p.shape, float(value))
        for n, p in named.items()
    }
    return Importance(values, num_samples=num_samples, method="test")


def move(model: nn.Module, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn(p.shape, generator=g, dtype=p.dtype).to(p.device)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def filled(model, **options):
    ewc = EWC(
        model,
        **({"ewc_lambda": 4.0, "variant": "plain", "gamma": 0.5, "anchor": "weighted", "exclude": "0.bias"} | options),
    )
    ewc.consolidate(importance_of(model))
    move(model, 7)
    ewc.consolidate(importance_of(model, seed=2))
    return ewc


def assert_same(a: EWC, b: EWC) -> None:
    x, y = a.state_dict(), b.state_dict()
    tensors = ("importance", "importance_scales", "anchor")
    assert {k: v for k, v in x.items() if k not in tensors} == {k: v for k, v in y.items() if k not in tensors}
    for key in tensors:
        assert list(x[key]) == list(y[key])
        assert all(torch.equal(x[key][n], y[key][n]) and x[key][n].dtype == y[key][n].dtype for n in x[key])
