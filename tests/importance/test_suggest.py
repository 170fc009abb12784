"""suggest_lambda: the quantile of αλΩ meets the target."""

import numpy as np
import pytest
import torch

from fastewc import Importance, suggest_lambda

IMP = Importance({"a": torch.linspace(0, 4, 101), "b": torch.zeros(7, 3)}, num_samples=1, method="test")
GOOD = {"variant": "stabilized", "optimizer": "sgd", "target": 0.5}


@pytest.mark.parametrize("quantile", [0.0, 0.5, 0.99, 1.0])
def test_meets_the_target_over_positive_weights(quantile):
    found = suggest_lambda(IMP, 0.01, quantile=quantile, **GOOD)
    positive = IMP["a"][1:].double().numpy()  # the zeros of a and b do not count
    assert 0.01 * found * np.quantile(positive, quantile) == pytest.approx(0.5, rel=1e-12)
    assert suggest_lambda(dict(IMP), torch.tensor(0.01, dtype=torch.float64), quantile=quantile, **GOOD) == found


def test_optimizer_objects_are_understood():
    p = [torch.nn.Parameter(torch.ones(1))]
    wanted = suggest_lambda(IMP, 0.01, **GOOD)
    for opt in (torch.optim.SGD(p, lr=1.0), torch.optim.SGD(p, momentum=0.9, lr=1.0), torch.optim.AdamW(p)):
        assert suggest_lambda(IMP, 0.01, **(GOOD | {"optimizer": opt})) == wanted


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"variant": "x"}, ValueError, "variant must be one of"),
        ({"optimizer": "rprop"}, ValueError, "optimizer must be one of sgd, momentum, adam"),
        ({"optimizer": 3}, TypeError, "got int"),
        ({"lr": 0.0}, ValueError, "lr must be finite and > 0"),
        ({"lr": "x"}, TypeError, "got str"),
        ({"quantile": 1.5}, ValueError, "quantile"),
        ({"target": 0.0}, ValueError, "target"),
        ({"importance": {"a": torch.zeros(3)}}, ValueError, "zero everywhere"),
        ({"importance": {"a": torch.tensor([-1.0])}}, ValueError, "'a' has negative"),
    ],
)
def test_bad_input(change, error, text):
    arguments = {"importance": IMP, "lr": 0.01} | GOOD | change
    with pytest.raises(error, match=text):
        suggest_lambda(arguments.pop("importance"), arguments.pop("lr"), **arguments)
