"""Same seeds and poisoned memory for every test; tests that need a GPU say so where there is none."""

import random
from collections.abc import Callable

import numpy
import pytest
import torch
from torch import Tensor


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test marked gpu is skipped, with the reason, where torch sees no CUDA device."""
    if not torch.cuda.is_available():
        reason = f"needs a CUDA GPU, and torch {torch.__version__} sees none"
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Every device type there may be; the CUDA half is marked gpu."""
    return request.param


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def allocate_nan(*args: object, **kwargs: object) -> Tensor:
        tensor = allocate(*args, **kwargs)
        # Under no_grad and through .data: a new buffer's history and version are the caller's business.
        if tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1 and not tensor.is_meta:
            with torch.no_grad():
                tensor.data.fill_(float("nan"))
        return tensor

    return allocate_nan


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """New buffers hold NaN, so that an element a kernel forgets to write can't pass for a number."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
