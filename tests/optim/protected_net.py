"""The small protected model that the optimizer tests share."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastewc import EWC, Importance

VARIANTS = ["plain", "stabilized", "proximal", "wva"]


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(5)
        self.a = nn.Parameter(torch.randn(4, 3, generator=g, dtype=torch.float64).to(dtype))
        self.b = nn.Parameter(torch.randn(5, generator=g, dtype=torch.float64).to(dtype))
        self.head = nn.Parameter(torch.randn((), generator=g, dtype=torch.float64).to(dtype))


def importances(model: Net, seed: int = 6) -> Importance:
    """αλΩ from 1e-6 to about 1e2 at αλ = 0.1, exact zeros among them."""
    g = torch.Generator().manual_seed(seed)
    values = {}
    for name, p in model.named_parameters():
        if name != "head":
            values[name] = 10 ** (8 * torch.rand(p.shape, generator=g, dtype=torch.float64) - 5)
            values[name].view(-1)[0] = 0
    return Importance(values, num_samples=8, method="test")


def protect(model: Net, variant: str = "stabilized", ewc_lambda: float = 2.0) -> EWC:
    ewc = EWC(model, ewc_lambda=ewc_lambda, variant=variant, exclude="head")
    ewc.consolidate(importances(model))
    return ewc


def gradients(model: Net, step: int) -> Iterator[tuple[str, nn.Parameter, Tensor | None]]:
    g = torch.Generator().manual_seed(1000 + step)
    for name, p in model.named_parameters():
        value = torch.randn(p.shape, generator=g, dtype=torch.float64)
        yield name, p, None if name == "b" and step in (1, 7) else value


def assert_equal_trees(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal_trees(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal_trees(x, y)
    elif isinstance(a, Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    else:
        assert a == b
