"""EWC's state dict: what it restores, what it refuses, copies and pickles."""

import copy
import pickle

import pytest
import torch

from fastewc import EWC
from tests.helpers import assert_same, filled, importance_of, move, net


def test_state_dict_round_trip_restores_options(tmp_path):
    model = net()
    ewc = filled(model)
    torch.save(ewc.state_dict(), tmp_path / "state.pt")
    other = EWC(net(1), ewc_lambda=0.0)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_same(ewc, other)
    assert (other.ewc_lambda, other.variant, other.gamma, other.anchor, other.exclude) == (
        4.0,
        "plain",
        0.5,
        "weighted",
        ("0.bias",),
    )
    before = other.importances()["0.weight"]
    ewc.consolidate(importance_of(model))
    assert torch.equal(other.importances()["0.weight"], before)  # loading copied


def test_state_dict_has_the_same_keys_before_the_first_task():
    model = net()
    ewc = EWC(model, ewc_lambda=1.0)
    empty = copy.deepcopy(ewc.state_dict())
    ewc.consolidate(importance_of(model))
    full = ewc.state_dict()
    assert empty.keys() == full.keys() and empty["importance"].keys() == full["importance"].keys()
    ewc.load_state_dict(empty)
    assert ewc.num_tasks == 0 and ewc.penalty(lr=0.1).item() == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.pop("gamma"),
        lambda s: s["importance"].pop("0.weight"),
        lambda s: (s["importance"].pop("0.weight"), s["anchor"].pop("0.weight")),
        lambda s: s["importance"].__setitem__("0.weight", torch.full((4, 3), float("nan"))),
        lambda s: s["anchor"].__setitem__("0.weight", torch.ones(5)),
        lambda s: s["anchor"].__setitem__("0.weight", torch.ones(4, 3, dtype=torch.float64)),
        lambda s: s.__setitem__("variant", "unknown"),
        lambda s: s.__setitem__("ewc_lambda", -1.0),
    ],
)
def test_a_bad_state_dict_changes_nothing(change):
    ewc = filled(net())
    good, bad = copy.deepcopy(ewc.state_dict()), copy.deepcopy(ewc.state_dict())
    change(bad)
    with pytest.raises(ValueError):
        ewc.load_state_dict(bad)
    again = EWC(net(1), ewc_lambda=0.0)
    again.load_state_dict(good)
    assert_same(ewc, again)


def test_copies_and_pickles():
    model = net()
    ewc = filled(model)
    for other in (copy.deepcopy(ewc), pickle.loads(pickle.dumps(ewc))):
        assert_same(ewc, other)
        assert other.model is not model
        move(other.model, 3)
        assert other.penalty().item() != ewc.penalty().item()
