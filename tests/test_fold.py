"""consolidate() works in pieces: same numbers, no second copy of what is held, nothing half-changed unsaid."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastewc import EWC, _fold, _storage
from fastewc.ops.importance_codes import BLOCK, numbers
from fastewc.optim import SGD
from tests.helpers import Odd, assert_same, importance_of, move, net

KINDS = [(torch.float32, None), (torch.bfloat16, torch.bfloat16), (torch.uint8, torch.bfloat16), (torch.uint8, None)]
kinds = pytest.mark.parametrize(("importance_dtype", "anchor_dtype"), KINDS, ids=str)
pytestmark = pytest.mark.filterwarnings("ignore:anchors were rounded")


def odd(tasks: int, anchor: str = "latest", **options: object) -> EWC:
    model = Odd()
    ewc = EWC(model, ewc_lambda=4.0, gamma=0.5, anchor=anchor, **options)
    for task in range(tasks):
        ewc.consolidate(importance_of(model, seed=task))
        move(model, task)
    return ewc


@kinds
@pytest.mark.parametrize("anchor", ["latest", "weighted"])
def test_the_first_two_tasks_are_the_equations(importance_dtype, anchor_dtype, anchor, monkeypatch):
    monkeypatch.setattr(_fold, "PIECE", BLOCK)
    ewc = odd(1, anchor, importance_dtype=importance_dtype, anchor_dtype=anchor_dtype)
    before, star = dict(ewc.importances()), ewc.anchors()
    fresh = {n: t.contiguous() for n, t in importance_of(ewc.model, seed=5).items()}
    rounded_up = {torch.uint8: 0.06, torch.bfloat16: 2**-7, torch.float32: 0.0}[importance_dtype]
    ewc.consolidate(fresh)
    for name, p in ewc.model.named_parameters():
        total = 0.5 * before[name] + fresh[name]
        got = ewc.importances()[name]
        assert ((got - total).abs() <= rounded_up * total).all()
        wanted = p.detach()
        if anchor == "weighted":
            wanted = torch.lerp(star[name].float(), wanted, torch.where(total > 0, fresh[name] / total, 1.0))
        kept = ewc.anchors()[name]
        off = (kept.float() - wanted).abs()
        assert (off <= (2**-7 * wanted.abs() if anchor_dtype else 0 * wanted)).all() and kept.shape == p.shape


@kinds
def test_pieces_change_no_number(importance_dtype, anchor_dtype, monkeypatch):
    """Neither their size nor the layout of Ω; rounding to nearest, since other pieces meet other random numbers."""
    monkeypatch.setattr(_storage, "draws", lambda *args: None)
    options = {"importance_dtype": importance_dtype, "anchor_dtype": anchor_dtype, "anchor": "weighted"}
    whole = odd(3, **options)
    monkeypatch.setattr(_fold, "PIECE", BLOCK)
    assert_same(whole, odd(3, **options))


@kinds
def test_a_later_task_is_written_in_place_without_a_second_copy(importance_dtype, anchor_dtype, monkeypatch):
    monkeypatch.setattr(_fold, "PIECE", BLOCK)
    model = nn.Linear(256, 40 * BLOCK // 256, bias=False)
    ewc = EWC(model, ewc_lambda=1.0, importance_dtype=importance_dtype, anchor_dtype=anchor_dtype)
    ewc.consolidate(importance_of(model))
    held = ewc.held(model.weight)
    fresh = importance_of(model, seed=3)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
            out = func(*args, **(kwargs or {}))
            for t in tree_leaves(out):
                if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in known:
                    largest = max(largest, t.untyped_storage().nbytes())
            return out

    before = numbers(held[0], torch.float32).clone()
    with Watch():
        ewc.consolidate(fresh)
    assert largest <= 8 * BLOCK < model.weight.numel()
    assert ewc.held(model.weight)[0] is held[0] and ewc.held(model.weight)[1] is held[1]
    assert not torch.equal(numbers(held[0], torch.float32), before)


def test_an_error_in_the_last_parameter_changes_nothing(monkeypatch):
    monkeypatch.setattr(_fold, "PIECE", BLOCK)
    ewc = odd(2, "weighted", importance_dtype=torch.uint8)
    before = copy.deepcopy(ewc)
    bad = dict(importance_of(ewc.model))
    bad["gaps"] = bad["gaps"].clone()
    bad["gaps"][-1, -1] = torch.inf
    with pytest.raises(ValueError, match=r"importance of 'gaps' has infinite"):
        ewc.consolidate(bad)
    assert_same(ewc, before)
    assert ewc.num_tasks == 2


def test_what_was_stopped_while_it_wrote_refuses_every_use_until_a_state_is_loaded(monkeypatch):
    model = net()
    ewc = EWC(model, ewc_lambda=1.0, variant="plain")
    write, calls = _fold.Fold.write, []

    def stopped(self, *args):
        calls.append(self.name)
        if len(calls) % 3 == 0:
            raise KeyboardInterrupt
        return write(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(_fold.Fold, "write", stopped)
        with pytest.raises(KeyboardInterrupt):
            ewc.consolidate(importance_of(model))
        assert ewc.num_tasks == 0 and ewc.penalty() == 0  # the first task has nothing to overwrite
    ewc.consolidate(importance_of(model))
    state = copy.deepcopy(ewc.state_dict())
    opt = SGD(model.parameters(), lr=0.1, ewc=ewc)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    with monkeypatch.context() as patch:
        patch.setattr(_fold.Fold, "write", stopped)
        with pytest.raises(KeyboardInterrupt):
            ewc.consolidate(importance_of(model))
    for use in (
        opt.step,
        ewc.state_dict,
        ewc.importances,
        lambda: ewc.stats(0.1),
        lambda: ewc.rebind(),
        lambda: ewc.consolidate(importance_of(model)),
    ):
        with pytest.raises(RuntimeError, match=r"stopped while it wrote.*load_state_dict"):
            use()
    ewc.load_state_dict(state)
    opt.step()
    assert ewc.num_tasks == 1 and ewc.stats(0.1)["penalty"] > 0
