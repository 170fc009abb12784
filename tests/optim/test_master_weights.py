"""bfloat16 models whose optimizer keeps the other 16 bits: training and saving are float32's, misuse is refused."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastewc
from fastewc import EWC
from fastewc.ops.ewc_step import halves, whole
from tests.helpers import importance_of
from tests.optim.protected_net import VARIANTS, Net, assert_equal_trees, importances

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
MAKERS: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("SGD", {"weight_decay": 0.01}),
    "SGD-momentum": ("SGD", {"momentum": 0.9, "nesterov": True}),
    "Adam": ("Adam", {"weight_decay": 0.01}),
    "AdamW-amsgrad": ("AdamW", {"amsgrad": True}),
}
every_maker = pytest.mark.parametrize("maker", MAKERS)


def nets() -> tuple[Net, Net]:
    """The same weights in bfloat16 and in float32."""
    narrow = Net(torch.bfloat16)
    wide = Net(torch.float32)
    with torch.no_grad():
        for p, q in zip(wide.parameters(), narrow.parameters(), strict=True):
            p.copy_(q)
    return narrow, wide


def make(maker: str, model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    name, own = MAKERS[maker]
    return getattr(fastewc.optim, name)(model.named_parameters(), **({"lr": 1e-4} | own | options))


def protected(model: Net, variant: str = "stabilized") -> EWC:
    ewc = EWC(model, ewc_lambda=2.0, variant=variant, exclude="head")
    ewc.consolidate(importances(model))
    return ewc


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        gen = torch.Generator().manual_seed(step)
        for i, p in enumerate(model.parameters()):
            grad = torch.randn(p.shape, generator=gen).bfloat16()
            p.grad = None if i == 1 and step % 4 == 1 else grad.to(p.dtype)
        optimizer.step()


def weights(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    states = [optimizer.state.get(p, {}) for p in model.parameters()]
    return [whole(p, s["param_remainder"]) for p, s in zip(model.parameters(), states, strict=True)]


@pytest.mark.parametrize("impl", ["reference", "native"])
@pytest.mark.parametrize("variant", VARIANTS)
@every_maker
def test_training_is_that_of_float32(maker: str, variant: str, impl: str):
    narrow, wide = nets()
    options = {"impl": impl, "max_grad_norm": 0.5, "path_integral": True}
    a = make(maker, narrow, ewc=protected(narrow, variant), master_weights=True, **options)
    b = make(maker, wide, ewc=protected(wide, variant), **options)
    train(narrow, a, range(60))
    train(wide, b, range(60))
    for p, w, q in zip(narrow.parameters(), weights(narrow, a), wide.parameters(), strict=True):
        assert torch.equal(w, q)
        assert torch.equal(p, halves(q.detach())[0])
        assert a.state[p]["param_remainder"].dtype == torch.int16
        assert a.state[p]["param_remainder"].shape == p.shape
        own = {key: value for key, value in a.state[p].items() if key != "param_remainder"}
        assert_equal_trees(own, b.state[q])
    # The importances of the path too: they see how far the whole weight has moved, also on the path that comes next.
    for _ in range(2):
        assert_equal_trees(dict(fastewc.si_importance(a)), dict(fastewc.si_importance(b)))
        train(narrow, a, range(60, 63))
        train(wide, b, range(60, 63))


@every_maker
def test_plain_bfloat16_loses_what_it_keeps(maker: str):
    narrow, wide = nets()
    for model in (narrow, wide):
        train(model, make(maker, model, lr=1e-3), range(60))
    rounded = [halves(q.detach())[0] for q in wide.parameters()]
    assert not all(map(torch.equal, narrow.parameters(), rounded))


@pytest.mark.parametrize("maker", ["SGD-momentum", "Adam", "AdamW-amsgrad"])
def test_moments_have_the_dtype_that_was_asked_for(maker: str):
    wanted = {
        (False, None): torch.bfloat16, (True, None): torch.float32, (False, torch.float32): torch.float32,
        (True, torch.bfloat16): torch.bfloat16, (False, torch.bfloat16): torch.bfloat16,
    }  # fmt: skip
    for impl in ("reference", "native"):
        for (master, state_dtype), dtype in wanted.items():
            model = nets()[0]
            model.extra = nn.Parameter(torch.ones(2))  # float32: stepped as ever, with moments of its own
            optimizer = make(maker, model, impl=impl, master_weights=master, state_dtype=state_dtype)
            train(model, optimizer, range(3))
            for name, p in model.named_parameters():
                found = {value.dtype for key, value in optimizer.state[p].items() if key in MOMENTS}
                assert found == {torch.float32 if name == "extra" else dtype}
                assert ("param_remainder" in optimizer.state[p]) == (master and name != "extra")
                counters = [value.dtype for key, value in optimizer.state[p].items() if key == "step"]
                assert counters in ([], [torch.float32])


def test_parameters_of_other_dtypes_are_stepped_as_ever():
    for dtype in (torch.float32, torch.float64):
        one, other = Net(dtype), Net(dtype)
        a, b = (make("Adam", m, master_weights=master) for m, master in ((one, True), (other, False)))
        train(one, a, range(5))
        train(other, b, range(5))
        assert all(map(torch.equal, one.parameters(), other.parameters()))
        assert_equal_trees(a.state_dict(), b.state_dict())


def through_a_file(both: Any) -> Any:
    file = io.BytesIO()
    torch.save(both, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


WAYS: dict[str, Callable[[Any], Any]] = {
    "memory": lambda saved: saved,
    "file": through_a_file,
    "deepcopy": copy.deepcopy,
    "pickle": lambda saved: pickle.loads(pickle.dumps(saved)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16], ids=str)
@every_maker
def test_resuming_from_a_state_dict_is_bitwise(maker: str, state_dtype: Any, way: str):
    def made() -> tuple[Net, torch.optim.Optimizer]:
        model = nets()[0]
        options = {"path_integral": True, "master_weights": True, "state_dtype": state_dtype}
        return model, make(maker, model, ewc=protected(model), **options)

    one, a = made()
    train(one, a, range(10))
    saved, state = WAYS[way]((one.state_dict(), a.state_dict()))
    two, b = made()
    two.load_state_dict(saved)
    b.load_state_dict(state)
    assert_equal_trees(b.state_dict(), copy.deepcopy(state))
    if way == "memory":  # torch shares what it need not cast
        b.load_state_dict(copy.deepcopy(state))
    train(one, a, range(10, 20))
    train(two, b, range(10, 20))
    assert all(map(torch.equal, one.parameters(), two.parameters()))
    assert_equal_trees(a.state_dict(), b.state_dict())


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@every_maker
def test_copies_go_on_alike(maker: str, how: str):
    model = nets()[0]
    pair = (model, make(maker, model, ewc=protected(model), master_weights=True))
    train(*pair, range(5))
    twin, other = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert other.master_weights and other.state_dtype == torch.float32
    train(*pair, range(5, 10))
    train(twin, other, range(5, 10))
    assert all(map(torch.equal, weights(*pair), weights(twin, other)))
    assert_equal_trees(pair[1].state_dict(), other.state_dict())


@pytest.mark.parametrize("maker", ["SGD-momentum", "Adam", "AdamW-amsgrad"])
def test_a_checkpoint_of_torch_loads_and_goes_on(maker: str):
    name, arguments = MAKERS[maker]
    model = nets()[0]
    theirs = getattr(torch.optim, name)(model.parameters(), lr=0.01, **arguments)
    train(model, theirs, range(4))
    saved = copy.deepcopy(theirs.state_dict())
    rounded = [p.detach().clone() for p in model.parameters()]
    ours = make(maker, model, master_weights=True)
    ours.load_state_dict(through_a_file(saved))
    for i, p in enumerate(model.parameters()):
        for key in set(MOMENTS) & saved["state"][i].keys():
            assert ours.state[p][key].dtype == torch.float32
            assert torch.equal(ours.state[p][key], saved["state"][i][key].float())
        assert "param_remainder" not in ours.state[p]
    for group in ours.param_groups:
        group["lr"] = 0.0
    train(model, ours, range(4, 5))  # the first step starts at remainder 0, whatever it is
    assert all(torch.equal(w, p.float()) for w, p in zip(weights(model, ours), rounded, strict=True))
    # Moments that bfloat16 cannot hold come back narrower where nobody asked for more.
    plain = make(maker, model)
    plain.load_state_dict(saved)
    assert {v.dtype for s in plain.state.values() for k, v in s.items() if k in MOMENTS} == {torch.bfloat16}


def test_a_remainder_that_would_be_lost_is_refused():
    model, wide = nets()
    a = make("Adam", model, master_weights=True)
    train(model, a, range(3))
    saved = copy.deepcopy(a.state_dict())
    plain = make("Adam", model, lr=0.5)
    unchanged = copy.deepcopy(plain.state_dict())
    with pytest.raises(ValueError, match=r'this optimizer has master_weights=False.*delete "param_remainder"'):
        plain.load_state_dict(saved)
    assert_equal_trees(plain.state_dict(), unchanged)
    with pytest.raises(ValueError, match=r"has a torch\.float32 parameter"):
        make("Adam", wide, master_weights=True).load_state_dict(saved)
    through_torch = torch.optim.Adam(model.parameters())
    through_torch.load_state_dict(saved)
    with pytest.raises(ValueError, match=r"param_remainder is torch\.bfloat16, wanted torch\.int16"):
        make("Adam", model, master_weights=True).load_state_dict(through_torch.state_dict())
    for state in saved["state"].values():
        del state["param_remainder"]
    plain.load_state_dict(saved)
    train(model, plain, range(3, 4))


def test_wrong_arguments_are_refused():
    half = nn.Linear(2, 2).half()
    with pytest.raises(ValueError, match=r"float16 parameter.*model\.bfloat16\(\)"):
        fastewc.optim.AdamW(half.parameters(), master_weights=True)
    with pytest.raises(ValueError, match=r"state_dtype=torch\.bfloat16 with a torch\.float16 parameter"):
        fastewc.optim.AdamW(half.parameters(), state_dtype=torch.bfloat16)
    for wrong in (torch.float64, torch.int16, "float32"):
        with pytest.raises(ValueError, match="state_dtype must be"):
            fastewc.optim.SGD(nn.Linear(2, 2).parameters(), state_dtype=wrong)
    with pytest.raises(TypeError):
        fastewc.optim.SGD(nn.Linear(2, 2).parameters(), 0.1, 0, 0, 0, False, True)  # keyword-only


def test_a_model_that_changes_its_dtype_is_noticed():
    model = nets()[0]
    optimizer = make("Adam", model, master_weights=True)
    train(model, optimizer, range(3))
    model.float()
    train(model, optimizer, range(3, 4))
    assert not any("param_remainder" in optimizer.state[p] for p in model.parameters())
    model.half()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="float16 parameter"):
        train(model, optimizer, range(4, 5))
    assert all(map(torch.equal, before, model.parameters()))
    model.bfloat16()
    train(model, optimizer, range(4, 5))
    assert all("param_remainder" in optimizer.state[p] for p in model.parameters())


@every_maker
def test_an_overflow_leaves_both_halves(maker: str):
    model = nets()[0]
    optimizer = make(maker, model, master_weights=True)
    train(model, optimizer, range(3))
    before = [p.detach().clone() for p in model.parameters()], copy.deepcopy(optimizer.state_dict())
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(1.0), torch.tensor(4.0)
    optimizer.step()
    assert all(map(torch.equal, before[0], model.parameters()))
    assert_equal_trees(optimizer.state_dict(), before[1])


def test_channels_last_and_views_keep_their_layout():
    weight = torch.randn(4, 6, 3, 3).bfloat16().contiguous(memory_format=torch.channels_last)
    strided = torch.zeros(9, 28, dtype=torch.bfloat16)[:, 1::2]
    params = [nn.Parameter(p) for p in (weight, strided, torch.zeros((), dtype=torch.bfloat16))]
    optimizer = fastewc.optim.AdamW(params, lr=1e-4, master_weights=True)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.state[params[0]]["param_remainder"].is_contiguous(memory_format=torch.channels_last)
    assert all(bool(optimizer.state[p]["param_remainder"].any()) for p in params[:2])


def test_clipping_the_sum_measures_the_whole_weights():
    narrow, wide = nets()
    options = {"max_grad_norm": 0.1, "clip_penalty": True, "impl": "reference"}
    a = make("SGD", narrow, ewc=protected(narrow, "plain"), master_weights=True, **options)
    b = make("SGD", wide, ewc=protected(wide, "plain"), **options)
    train(narrow, a, range(30))
    train(wide, b, range(30))
    assert torch.equal(a.grad_norm, b.grad_norm)
    assert all(map(torch.equal, weights(narrow, a), wide.parameters()))


def test_the_anchor_is_the_rounded_weight():
    """What the docstring says of ``consolidate``: w* lies within half an ulp of the weight."""
    model = nn.Linear(40, 40).bfloat16()
    optimizer = fastewc.optim.AdamW(model.parameters(), lr=1e-3, master_weights=True)
    train(model, optimizer, range(5))
    ewc = EWC(model, ewc_lambda=1.0)
    ewc.consolidate(importance_of(model))
    for (_, anchor), w in zip(ewc.anchors().items(), weights(model, optimizer), strict=True):
        off = (anchor.double() - w.double()).abs()
        assert bool((off <= w.double().abs() / 256).all()) and bool(off.any())
