"""BatchOneSums: terms, weights, sparse gradients, .grad put back."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastewc.per_sample import BatchOneSums, Term


def test_terms_by_hand():
    model = nn.Linear(2, 1, bias=False)
    for power, wanted in ((2, [[1.0 + 0.5 * 9.0, 4.0 + 0.5 * 9.0]]), (1, [[1.0 + 0.5 * 3.0, 2.0 + 0.5 * 3.0]])):
        sums = BatchOneSums(model, {"w": model.weight}, power)
        x = torch.tensor([1.0, -2.0])
        sums.add([Term(model(x)), Term(model(torch.ones(2)), torch.tensor([3.0]), weight=0.5)])
        assert sums.sums["w"].tolist() == wanted
        assert sums.used == {"w"}
        assert sums.terms == 2


def test_a_value_that_depends_on_nothing_adds_nothing():
    model = nn.Linear(2, 1)
    sums = BatchOneSums(model, dict(model.named_parameters()), 2)
    sums.add([Term(torch.ones(()))])
    assert not sums.reached
    assert sums.used == set()


@pytest.mark.parametrize("keep", [True, False])
def test_one_graph_many_terms(keep):
    model, x = nn.Linear(2, 3), torch.randn(2)
    out = checkpoint(torch.tanh, model(x), use_reentrant=True) if keep else model(x).tanh()
    sums = BatchOneSums(model, dict(model.named_parameters()), 2)
    model.weight.grad = kept = torch.ones(3, 2)
    sums.add(Term(out, torch.eye(3)[i], keep_graph=True) for i in range(3))
    slope = 1 - out.detach() ** 2
    assert torch.equal(sums.sums["bias"], slope.square())
    assert model.weight.grad is kept
    assert bool((kept == 1).all())
    assert model.bias.grad is None
