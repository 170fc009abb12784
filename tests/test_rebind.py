"""EWC holds names: what happens when the model is wrapped, replaced, grown, renamed or converted."""

import copy

import pytest
import torch
from torch import nn

from fastewc import EWC
from fastewc.optim import SGD
from fastewc.testing import assert_within_roundings
from tests.helpers import importance_of, move, net


def test_heads_may_come_before_the_first_task():
    model = net()
    ewc = EWC(model, ewc_lambda=1.0, exclude="head.*")
    model.add_module("head", nn.Linear(2, 2))
    model.add_module("extra", nn.Linear(2, 2))
    ewc.consolidate(importance_of(model))
    assert "extra.weight" in ewc.importances() and "head.weight" not in ewc.importances()


def test_names_are_those_of_the_unwrapped_model():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(2, 2)  # a user's own submodule called "module" keeps its name

    plain = nn.Sequential(Inner(), Inner())
    wrapped = nn.Sequential(torch.compile(plain[0], backend="eager"), nn.DataParallel(plain[1]))
    names = ["0.module.weight", "0.module.bias", "1.module.weight", "1.module.bias"]
    assert [n for n, _ in plain.named_parameters()] == names
    for model in (wrapped, nn.DataParallel(wrapped), torch.compile(wrapped, backend="eager")):
        assert list(EWC(model, ewc_lambda=1.0).importances()) == names


def test_state_follows_the_model_dtype():
    model = net()
    ewc = EWC(model, ewc_lambda=4.0)
    ewc.consolidate(importance_of(model))
    model.double()
    ewc.penalty(lr=0.1).backward()
    assert all(t.dtype == torch.float64 for t in ewc.importances().values())
    model.bfloat16()
    assert all(t.dtype == torch.bfloat16 for t in ewc.anchors().values())
    assert all(t.dtype == torch.float32 for t in ewc.importances().values())


def test_weighted_anchor_needs_more_than_float16():
    with pytest.raises(NotImplementedError, match=r"anchor_dtype=torch\.float32"):
        EWC(net().half(), ewc_lambda=1.0, anchor="weighted")
    model = net().half()
    ewc = EWC(model, ewc_lambda=1.0, anchor="weighted", anchor_dtype=torch.float32)
    ewc.consolidate(importance_of(model))
    assert all(t.dtype == torch.float32 for t in ewc.anchors().values())


def test_a_changed_model_is_noticed_and_rebind_takes_it_over():
    model = net()
    ewc = EWC(model, ewc_lambda=4.0)
    ewc.consolidate(importance_of(model))
    old = {n: t.clone() for n, t in ewc.importances().items()}
    model[2] = nn.Linear(4, 3)
    model.extra = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"of another shape: 2\.weight, 2\.bias.*rebind"):
        SGD(model.parameters(), lr=0.1, ewc=ewc)
    with pytest.raises(ValueError, match=r"missing: extra\.weight, extra\.bias; grown: 2\.weight, 2\.bias"):
        ewc.rebind()
    with pytest.warns(UserWarning, match="grown: 2.weight"):
        changes = ewc.rebind(strict=False)
    assert (changes.added, changes.grown, changes.dropped) == (
        ["extra.weight", "extra.bias"],
        ["2.weight", "2.bias"],
        [],
    )
    new = ewc.importances()
    assert (
        torch.equal(new["2.weight"][:2], old["2.weight"])
        and not new["2.weight"][2].any()
        and not new["extra.weight"].any()
    )
    assert torch.equal(ewc.anchors()["2.weight"][2], model[2].weight[2])
    del model.extra
    with pytest.warns(UserWarning, match="dropped: extra.weight"):
        assert ewc.rebind(strict=False).dropped == ["extra.weight", "extra.bias"]
    model[2] = nn.Linear(4, 1)
    with pytest.raises(ValueError, match="may grow, never shrink"):
        ewc.rebind(strict=False)
    assert ewc.importances()["2.weight"].shape == (3, 4)


def test_rebind_renames_and_follows_another_object():
    model = net()
    ewc = EWC(model, ewc_lambda=4.0, variant="plain")
    ewc.consolidate(importance_of(model))
    old = ewc.importances()
    other = nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(4, 2)})
    rename = {"0.weight": "a.weight", "0.bias": "a.bias", "2.weight": "b.weight", "2.bias": "b.bias"}
    with pytest.raises(ValueError, match="nope is not held"):
        ewc.rebind(other, rename=rename | {"nope": "x"})
    with pytest.raises(ValueError, match=r"would become a\.weight"):
        ewc.rebind(other, rename=rename | {"0.bias": "a.weight"})
    assert not ewc.rebind(other, rename=rename)
    assert all(torch.equal(ewc.importances()[new], old[name]) for name, new in rename.items())
    assert ewc.model is other and ewc.penalty().item() > 0


def test_an_optimizer_of_the_former_model_is_told_so():
    model = net()
    ewc = EWC(model, ewc_lambda=4.0)
    ewc.consolidate(importance_of(model))
    opt = SGD(model.parameters(), lr=0.1, ewc=ewc)
    ewc.rebind(copy.deepcopy(model))
    with pytest.raises(RuntimeError, match="rebound to another model"):
        opt.step()


def test_unknown_optimizer_parameters_are_named_once():
    model, extra = net(), nn.Linear(1, 1)
    ewc = EWC(model, ewc_lambda=4.0, exclude="2.*")
    ewc.consolidate(importance_of(model))
    model.late = extra
    with pytest.warns(UserWarning, match=r"2 parameters that ewc does not know.*late\.weight, late\.bias") as caught:
        SGD(model.parameters(), lr=0.1, ewc=ewc)
    assert len(caught) == 1
    SGD(model.parameters(), lr=0.1, ewc=ewc)  # once: a second warning would be an error here
    with pytest.raises(ValueError, match="no parameter of this ewc's model"):
        SGD(net().parameters(), lr=0.1, ewc=ewc)


def test_an_optimizer_of_excluded_parameters_only_is_fine():
    model = net()
    ewc = EWC(model, ewc_lambda=4.0, exclude="2.*")
    ewc.consolidate(importance_of(model))
    opt = SGD(model[2].parameters(), lr=0.1, ewc=ewc)
    move(model, 1)
    model(torch.ones(1, 3)).sum().backward()
    wanted = {n: p.detach().double() - 0.1 * p.grad.double() for n, p in model[2].named_parameters()}
    opt.step()
    for name, p in model[2].named_parameters():
        assert_within_roundings(p, wanted[name], roundings=4, error_scale=wanted[name].abs() + 1)


def test_penalty_and_stats_see_a_replaced_parameter():
    model = net()
    ewc = EWC(model, ewc_lambda=4.0, variant="plain")
    ewc.consolidate(importance_of(model, 1.0))
    model[0].weight = nn.Parameter(model[0].weight.detach() + 1)
    value = ewc.penalty()  # ½ · 4 · 12 weights · 1²
    value.backward()
    assert value.item() == pytest.approx(24.0, rel=1e-5) and model[0].weight.grad is not None
    assert ewc.stats(0.1)["penalty"] == pytest.approx(24.0, rel=1e-5)
    del model[2]
    for call in (ewc.penalty, lambda: ewc.stats(0.1)):
        with pytest.raises(ValueError, match=r"missing: 2\.weight, 2\.bias"):
            call()


def test_a_head_that_came_late_is_told_how_to_join():
    model = net()
    ewc = EWC(model, ewc_lambda=4.0)
    ewc.consolidate(importance_of(model))
    model.add_module("head", nn.Linear(2, 2))
    with pytest.raises(
        ValueError, match=r"head\.weight, head\.bias joined the model after the first task: ewc\.rebind"
    ):
        ewc.consolidate(importance_of(model))
    model.requires_grad_(False)
    model[2].requires_grad_(True)
    with pytest.raises(ValueError, match=r"missing: 0\.weight, 0\.bias.*0\.weight, 0\.bias do not require a gradient"):
        ewc.consolidate({n: torch.ones_like(p) for n, p in model[2].named_parameters(prefix="2")})


def test_weighted_anchors_are_refused_in_float16_whenever_the_model_gets_there():
    model = net()
    ewc = EWC(model, ewc_lambda=1.0, anchor="weighted")
    ewc.consolidate(importance_of(model))
    model.half()
    for call in (lambda: ewc.consolidate(importance_of(model)), ewc.rebind):
        with pytest.raises(NotImplementedError, match="float16 anchors"):
            call()


def test_an_optimizer_in_a_reference_cycle_no_longer_counts():
    model = net()
    ewc = EWC(model, ewc_lambda=4.0)
    opt = SGD(model.parameters(), lr=0.1, ewc=ewc)
    opt.me = opt
    del opt
    ewc.penalty(lr=0.1).backward()
