"""A torch checkpoint → ours → torch, and the other way, with the same bits at every station."""

import copy
import io
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastewc
from fastewc.testing import assert_within_roundings
from tests.optim.protected_net import Net, assert_equal_trees, gradients, protect
from tests.optim.torch_cases import CASES, IDS, NAMES, give_gradients, groups, make_params, ours, theirs

Optimizer = torch.optim.Optimizer
Maker = Callable[..., Optimizer]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def stepped(make: Maker, params: list[nn.Parameter], arguments: dict[str, Any], steps: range) -> Optimizer:
    optimizer = make(groups(params), **copy.deepcopy(arguments))
    advance(optimizer, params, steps)
    return optimizer


def advance(optimizer: Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        give_gradients([params], step)
        optimizer.step()


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "arguments"), CASES, ids=IDS)
def test_a_checkpoint_comes_back_with_its_bits(name: str, arguments: dict[str, Any], dtype: torch.dtype, impl: str):
    mine: Maker = lambda params, **kwargs: ours(name)(params, impl=impl, **kwargs)  # noqa: E731
    for first, second in itertools.permutations((mine, theirs(name))):
        params = make_params(dtype)
        saved = stepped(first, params, arguments, range(3)).state_dict()
        assert len(saved["state"]) == len(params) or name == "SGD"
        there = second(groups(params))
        there.load_state_dict(through_a_file(saved))
        assert_equal_trees(there.state_dict(), saved)
        back = first(groups(params))
        back.load_state_dict(through_a_file(there.state_dict()))
        assert_equal_trees(back.state_dict(), saved)
        # And of a state that the other one has stepped on.
        advance(there, params, range(3, 5))
        back.load_state_dict(through_a_file(there.state_dict()))
        assert_equal_trees(back.state_dict(), there.state_dict())


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(("name", "arguments"), CASES, ids=IDS)
def test_training_goes_on_with_torchs_bits(name: str, arguments: dict[str, Any], dtype: torch.dtype):
    """Twelve steps: of torch alone, and of torch, ours, torch, ours in turns, each from the other's checkpoint."""
    alone, shared = make_params(dtype), make_params(dtype)
    one = stepped(theirs(name), alone, arguments, range(12))
    mine: Maker = lambda params, **kwargs: ours(name)(params, impl="reference", **kwargs)  # noqa: E731
    other = stepped(theirs(name), shared, arguments, range(3))
    for turn, make in enumerate((mine, theirs(name), mine)):
        following = make(groups(shared))
        following.load_state_dict(through_a_file(other.state_dict()))
        other = following
        advance(other, shared, range(3 * turn + 3, 3 * turn + 6))
    assert all(torch.equal(p, q) for p, q in zip(alone, shared, strict=True))
    assert_equal_trees(one.state_dict(), other.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_the_state_of_a_protected_optimizer_goes_through_torch(name: str):
    """num_tasks travels in the groups, so a penalty that was forgotten on the way is noticed after it too."""
    model = Net()
    ewc = protect(model)
    make = getattr(fastewc.optim, name)
    a = make(model.parameters(), lr=0.1, ewc=ewc)
    for step in range(3):
        for _, p, grad in gradients(model, step):
            p.grad = grad
        a.step()
    between = getattr(torch.optim, name)(model.parameters(), lr=0.1)
    between.load_state_dict(through_a_file(a.state_dict()))
    back = make(model.parameters(), lr=0.5, ewc=ewc)
    back.load_state_dict(through_a_file(between.state_dict()))
    assert_equal_trees(back.state_dict(), a.state_dict())
    with pytest.raises(ValueError, match="saved with 1 consolidated tasks"):
        make(model.parameters(), lr=0.5).load_state_dict(through_a_file(between.state_dict()))


def test_a_checkpoint_older_than_an_option_selects_nothing():
    p = nn.Parameter(torch.ones(3))
    for name in NAMES:
        old = getattr(torch.optim, name)([p]).state_dict()
        del old["param_groups"][0]["fused"]
        optimizer = ours(name)([p])
        optimizer.load_state_dict(old)
        assert optimizer.param_groups[0]["fused"] is None


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_fused_false_does_not_override_an_explicit_impl(name: str):
    p = nn.Parameter(torch.ones(3))
    slow = theirs(name)([p], lr=0.25).state_dict()
    optimizer = ours(name)([p], lr=0.5, impl="native")
    with pytest.raises(ValueError, match=r"fused=False, which selects the reference .*impl='native'"):
        optimizer.load_state_dict(slow)
    assert optimizer.param_groups[0]["lr"] == 0.5
    for impl in ("auto", "reference"):
        optimizer = ours(name)([p], lr=0.5, impl=impl)
        optimizer.load_state_dict(slow)
        assert optimizer.choose(optimizer.param_groups[0], p.device) == "reference"


def test_torchs_distributed_checkpoint_names_carry_over():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = nn.Linear(3, 2)
    for name in NAMES:
        arguments = {"momentum": 0.9} if name == "SGD" else {}
        saved = getattr(torch.optim, name)(model.parameters(), lr=0.1, **arguments)
        model(torch.ones(1, 3)).sum().backward()
        saved.step()
        saved.zero_grad()
        by_name = get_optimizer_state_dict(model, saved)
        loaded = ours(name)(model.parameters(), lr=0.3, **arguments)
        set_optimizer_state_dict(model, loaded, by_name)
        assert_equal_trees(loaded.state_dict(), saved.state_dict())
        assert_equal_trees(get_optimizer_state_dict(model, loaded), by_name)


def test_a_parameter_twice_in_a_group_is_stepped_twice():
    """torch warns and steps it twice, one after the other; in one launch the two would race."""
    for name, impl in itertools.product(NAMES, ("reference", "auto")):
        arguments = {"momentum": 0.5} if name == "SGD" else {}
        mine, torchs = (nn.Parameter(torch.full((40_000,), 2.0, dtype=torch.float64)) for _ in range(2))
        with pytest.warns(UserWarning, match="duplicate parameters"):
            a = ours(name)([mine, mine], lr=0.5, impl=impl, **arguments)
        with pytest.warns(UserWarning, match="duplicate parameters"):
            b = theirs(name)([torchs, torchs], lr=0.5, **arguments)
        for step in range(3):
            for p, o in ((mine, a), (torchs, b)):
                p.grad = torch.full_like(p, 0.25 * (step + 1))
                o.step()
        if impl == "reference":
            assert torch.equal(mine, torchs), name
        assert len(a._plans[0].calls) == 2
        assert_within_roundings(mine, torchs.detach(), roundings=6 * 16, error_scale=torchs.detach().abs() + 6)


def test_things_that_hooks_keep_in_the_state_are_left_alone():
    model = nn.Linear(2, 2)
    optimizer = fastewc.optim.SGD(model.named_parameters(), lr=0.1, path_integral=True)
    optimizer.state["kept"] = 1
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert optimizer.path_integral_steps == 1
    optimizer.reset_path_integral()
    assert optimizer.state["kept"] == 1
    assert optimizer.path_integral_steps == 0
