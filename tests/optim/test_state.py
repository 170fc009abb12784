"""State dicts, copies and pickles of protected optimizers."""

import copy
import pickle
from typing import Any

import pytest
import torch

import fastewc
from fastewc import EWC
from tests.optim.protected_net import Net, assert_equal_trees, gradients, importances, protect


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_state_dict_carries_num_tasks_and_refuses_another(name: str):
    cls = getattr(fastewc.optim, name)
    model = Net()
    ewc = protect(model)
    opt = cls(model.parameters(), lr=0.1, ewc=ewc)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    assert [g["num_tasks"] for g in saved["param_groups"]] == [1]
    assert "num_tasks" not in opt.param_groups[0]

    without = cls(model.parameters(), lr=0.3)
    unchanged = copy.deepcopy(without.state_dict())
    with pytest.raises(ValueError, match=r"saved with 1 consolidated tasks, but this optimizer has no ewc.*EWC\.load"):
        without.load_state_dict(saved)
    assert_equal_trees(without.state_dict(), unchanged)
    fresh = cls(model.parameters(), lr=0.3, ewc=EWC(model, ewc_lambda=1.0))
    with pytest.raises(ValueError, match="has an ewc with 0 consolidated tasks"):
        fresh.load_state_dict(saved)

    same = cls(model.parameters(), lr=0.3, ewc=ewc)
    same.load_state_dict(saved)
    assert same.param_groups[0]["lr"] == 0.1
    assert "num_tasks" not in same.param_groups[0]
    assert_equal_trees(same.state_dict(), saved)
    ewc.consolidate(importances(model))
    assert same.state_dict()["param_groups"][0]["num_tasks"] == 2
    with pytest.raises(ValueError, match="saved with 1 consolidated tasks, but this optimizer has an ewc with 2"):
        same.load_state_dict(saved)


def test_zero_tasks_load_without_ewc_and_torchs_checkpoints_always():
    model = Net()
    zero = fastewc.optim.SGD(model.parameters(), lr=0.1, ewc=EWC(model, ewc_lambda=1.0)).state_dict()
    assert zero["param_groups"][0]["num_tasks"] == 0
    plain = fastewc.optim.SGD(model.parameters(), lr=0.3)
    plain.load_state_dict(zero)
    assert "num_tasks" not in plain.state_dict()["param_groups"][0]
    torchs = torch.optim.SGD(model.parameters(), lr=0.2).state_dict()
    protected = fastewc.optim.SGD(model.parameters(), lr=0.1, ewc=protect(model))
    protected.load_state_dict(torchs)
    assert protected.param_groups[0]["lr"] == 0.2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_resuming_with_a_path_integral_is_bitwise(dtype: torch.dtype, tmp_path: Any):
    def made() -> tuple[Net, torch.optim.Optimizer]:
        model = Net(dtype)
        return model, fastewc.optim.AdamW(model.parameters(), lr=0.1, ewc=protect(model), path_integral=True)

    def run(model: Net, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            for _, p, g in gradients(model, step):
                p.grad = None if g is None else g.to(dtype)
            optimizer.step()

    one, a = made()
    run(one, a, range(4))
    torch.save((one.state_dict(), a.state_dict()), tmp_path / "both.pt")
    two, b = made()
    weights, state = torch.load(tmp_path / "both.pt", weights_only=True)
    two.load_state_dict(weights)
    b.register_load_state_dict_pre_hook(lambda _, sd: {**sd, "state": dict(reversed(sd["state"].items()))})
    b.load_state_dict(state)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(t.omega.dtype == t.start.dtype == wide for t in b.path_integrals().values())
    run(one, a, range(4, 8))
    run(two, b, range(4, 8))
    assert_equal_trees(a.state_dict(), b.state_dict())
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
    assert b.path_integral_steps == 8


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_keep_their_own_ewc_and_step_alike(how: str):
    model = Net()
    opt = fastewc.optim.Adam(
        model.parameters(), lr=0.1, ewc=protect(model), path_integral="regularized", max_grad_norm=1.0
    )
    for _, p, g in gradients(model, 0):
        p.grad = g
    opt.step()
    pair = (model, opt)
    twin, other = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert other.ewc is not opt.ewc
    assert other.ewc.num_tasks == 1
    assert other.path_integral == "regularized"
    for m in (model, twin):
        for _, p, g in gradients(m, 2):
            p.grad = g
    opt.step()
    other.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    assert_equal_trees(opt.state_dict(), other.state_dict())
