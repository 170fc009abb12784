"""Without ewc the optimizers are torch's: arguments, results, state, state dicts, hooks, schedulers."""

import copy
import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fastewc.testing import assert_within_roundings
from tests.optim.torch_cases import (
    CASES,
    IDS,
    NAMES,
    assert_same_state,
    direction_terms,
    give_gradients,
    groups,
    load,
    make_params,
    ours,
    theirs,
    wide,
)

EXTRAS = ["ewc", "max_grad_norm", "path_integral", "clip_penalty", "impl", "master_weights", "state_dtype"]


@pytest.mark.parametrize("name", NAMES)
def test_arguments_have_torchs_names_order_and_defaults(name: str):
    mine = inspect.signature(ours(name).__init__).parameters
    torchs = inspect.signature(getattr(torch.optim, name).__init__).parameters
    assert list(mine) == [*torchs, *EXTRAS]
    for key, parameter in torchs.items():
        assert mine[key].kind == parameter.kind
        assert mine[key].default == parameter.default
    assert all(mine[key].kind == inspect.Parameter.KEYWORD_ONLY for key in EXTRAS)
    assert issubclass(ours(name), getattr(torch.optim, name))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("name", "arguments"), CASES, ids=IDS)
def test_reference_has_torchs_bits_over_50_steps(name: str, arguments: dict[str, Any], dtype: torch.dtype):
    # The reference does the operations of torch's for-loop in their order, so there is no rounding to allow for.
    mine, torchs = make_params(dtype), make_params(dtype)
    arguments = copy.deepcopy(arguments)
    a = ours(name)(groups(mine), impl="reference", **arguments)
    b = theirs(name)(groups(torchs), **arguments)
    for step in range(50):
        give_gradients((mine, torchs), step)
        a.step()
        b.step()
    for p, q, start in zip(mine, torchs, make_params(dtype), strict=True):
        assert torch.equal(p, q)
        assert p.numel() == 0 or not torch.equal(p, start)
    assert_same_state(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("name", "arguments"), CASES, ids=IDS)
def test_auto_is_torch_within_roundings_over_50_steps(name: str, arguments: dict[str, Any], dtype: torch.dtype):
    """Each of 50 steps from torch's own float64 state rounded to dtype, so errors cannot hide in a trajectory.

    A step adds at most about 8 roundings to the direction (g + ηw, the moments, their quotient) and 2 to w. Its
    error scale is |w| + |Δw|·(1 + V/v): V/v ≤ 1 for a sum of squares without cancellation.
    """
    torchs, mine = make_params(torch.float64), make_params(dtype)
    b = theirs(name)(groups(torchs), **wide(arguments))
    a = ours(name)(groups(mine), **copy.deepcopy(arguments))
    for step in range(50):
        with torch.no_grad():
            for p, q in zip(mine, torchs, strict=True):
                p.copy_(q)
                q.copy_(p)  # both start from numbers of the tested dtype
        give_gradients((mine, torchs), step)
        for p, q in zip(mine, torchs, strict=True):
            if p.grad is not None:
                q.grad = p.grad.double()
        before = [q.detach().clone() for q in torchs]
        load(a, b.state_dict())  # casts the state to the dtype of the parameters,
        load(b, a.state_dict())  # and back
        a.step()
        b.step()
        for p, q, w in zip(mine, torchs, before, strict=True):
            scale = w.abs() + 2 * (q.detach() - w).abs() + direction_terms(q, b)
            assert_within_roundings(p, q.detach(), roundings=16, error_scale=scale, context=f"step {step}")


@pytest.mark.parametrize("name", NAMES)
def test_low_precision_is_computed_in_float32_and_rounded_once(name: str):
    mine, wide = make_params(torch.bfloat16), make_params(torch.float64)
    a = ours(name)(mine, lr=0.01, weight_decay=0.1)
    b = theirs(name)(wide, lr=0.01, weight_decay=0.1)
    give_gradients((mine, wide), 0)
    for p, q in zip(mine, wide, strict=True):
        q.data.copy_(p.data)
        q.grad = p.grad.double()
    a.step()
    b.step()
    for p, q in zip(mine, wide, strict=True):
        scale = q.detach().abs() + 0.01 * (10 + p.grad.double().abs())
        assert p.dtype == torch.bfloat16
        assert_within_roundings(p, q.detach(), roundings=16, error_scale=scale)
        assert all(value.dtype == p.dtype for key, value in a.state.get(p, {}).items() if key != "step")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("flags", [{"foreach": True}, {"foreach": False}, {"fused": True}, {"fused": False}])
def test_foreach_and_fused_are_accepted_and_change_nothing(name: str, flags: dict[str, bool]):
    mine, torchs = make_params(torch.float64), make_params(torch.float64)
    a, b = ours(name)(mine, lr=0.1, **flags), theirs(name)(torchs, lr=0.1)
    for step in range(5):
        give_gradients((mine, torchs), step)
        a.step()
        b.step()
    scale = [q.detach().abs() + 5 for q in torchs]
    for p, q, s in zip(mine, torchs, scale, strict=True):
        assert_within_roundings(p, q.detach(), roundings=32, error_scale=s)
    assert all(a.param_groups[0][key] is value for key, value in flags.items())


@pytest.mark.parametrize("name", NAMES)
def test_a_float64_default_dtype_makes_torchs_state(name: str):
    torch.set_default_dtype(torch.float64)
    try:
        mine, torchs = make_params(torch.float64), make_params(torch.float64)
        a, b = ours(name)(mine, lr=0.1), theirs(name)(torchs, lr=0.1)
        give_gradients((mine, torchs), 0)
        a.step()
        b.step()
        assert_same_state(a, b)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_is_torchs_and_goes_both_ways(name: str):
    mine, torchs = make_params(torch.float32), make_params(torch.float32)
    extra = {"momentum": 0.9} if name == "SGD" else {"amsgrad": True}
    a = ours(name)(groups(mine), lr=0.1, impl="reference", **extra)
    b = theirs(name)(groups(torchs), lr=0.1, **extra)
    for step in range(3):
        give_gradients((mine, torchs), step)
        a.step()
        b.step()
    keys = [list(group) for group in b.state_dict()["param_groups"]]
    assert [list(group) for group in a.state_dict()["param_groups"]] == keys
    there = ours(name)(groups(mine), impl="reference")
    there.load_state_dict(copy.deepcopy(b.state_dict()))
    back = theirs(name)(groups(torchs))
    back.load_state_dict(copy.deepcopy(a.state_dict()))
    for step in range(3, 6):
        give_gradients((mine, torchs), step)
        there.step()
        back.step()
    assert all(torch.equal(p, q) for p, q in zip(mine, torchs, strict=True))
    assert_same_state(there, back)


@pytest.mark.parametrize("name", NAMES)
def test_profilers_see_the_step_under_torchs_label(name: str):
    params = make_params(torch.float32)
    optimizer = ours(name)(params, lr=0.1)
    give_gradients((params,), 0)
    optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        optimizer.step()
    assert [e.count for e in profile.key_averages() if e.key == f"Optimizer.step#{name}.step"] == [1]


@pytest.mark.parametrize("name", NAMES)
def test_global_step_hooks_run(name: str):
    optimizer, calls = ours(name)(make_params(torch.float32), lr=0.1), list[str]()
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("pre")),
        register_optimizer_step_post_hook(lambda *_: calls.append("post")),
    ]
    try:
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert calls == ["pre", "post"]


@pytest.mark.parametrize("name", NAMES)
def test_schedulers_closures_and_hooks(name: str):
    mine, torchs = make_params(torch.float64), make_params(torch.float64)
    a, b = ours(name)(mine, lr=0.1, impl="reference"), theirs(name)(torchs, lr=0.1)
    schedulers = [
        torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=12, cycle_momentum=False) for o in (a, b)
    ]
    calls: list[str] = []
    a.register_step_pre_hook(lambda *_: calls.append("pre"))
    a.register_step_post_hook(lambda *_: calls.append("post"))

    def closure(params: list[nn.Parameter], o: torch.optim.Optimizer) -> Tensor:
        assert torch.is_grad_enabled()
        o.zero_grad()
        loss = sum((p.square().sum() * (i + 1) for i, p in enumerate(params)), torch.zeros((), dtype=torch.float64))
        loss.backward()
        return loss

    for _ in range(10):
        assert torch.equal(a.step(lambda: closure(mine, a)), b.step(lambda: closure(torchs, b)))
        for scheduler in schedulers:
            scheduler.step()
    assert calls == ["pre", "post"] * 10
    assert all(torch.equal(p, q) for p, q in zip(mine, torchs, strict=True))
    assert a.step() is None


@pytest.mark.parametrize("name", NAMES)
def test_a_backward_after_the_step_is_noticed(name: str):
    p = nn.Parameter(torch.ones(3))
    o = ours(name)([p], lr=0.1)
    loss = (p * p).sum()
    loss.backward(retain_graph=True)
    o.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_never_written(name: str):
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    o = ours(name)([p], lr=0.1, weight_decay=0.1, maximize=True, max_grad_norm=0.01)
    for _ in range(3):
        p.grad = torch.tensor([1.0, -2.0, 3.0], dtype=torch.bfloat16)
        version = p.grad._version
        o.step()
        assert p.grad._version == version
        assert p.grad.tolist() == [1.0, -2.0, 3.0]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_moves_without_gradients(name: str):
    params = make_params(torch.float32)
    o = ours(name)(params, lr=0.1)
    o.step()
    assert all(torch.equal(p, q) for p, q in zip(params, make_params(torch.float32), strict=True))
    assert o.state_dict()["state"] == {}


@pytest.mark.parametrize("name", NAMES)
def test_torchs_constructor_errors_remain(name: str):
    p = [nn.Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match="Invalid learning rate"):
        ours(name)(p, lr=-1.0)
    with pytest.raises(ValueError, match="Tensor lr must be 1-element"):
        ours(name)(p, lr=torch.tensor([0.1, 0.2]))
    with pytest.raises(RuntimeError, match="cannot be `True` together"):
        ours(name)(p, lr=0.1, fused=True, foreach=True)
    with pytest.raises(ValueError, match="empty parameter list"):
        ours(name)([], lr=0.1)
    with pytest.raises(ValueError, match="more than one parameter group"):
        ours(name)([{"params": p}, {"params": p}])
    with pytest.raises(TypeError):
        ours(name)(p, 0.1, (0.9, 0.9), 0, 0, False, True)  # keyword-only from there on


@pytest.mark.parametrize("name", NAMES)
def test_our_constructor_errors(name: str):
    p = [nn.Parameter(torch.ones(2))]
    with pytest.raises(NotImplementedError, match="differentiable=True"):
        ours(name)(p, lr=0.1, differentiable=True)
    for bad in (0, -1.0, math.nan):
        with pytest.raises(ValueError, match="max_grad_norm must be positive"):
            ours(name)(p, lr=0.1, max_grad_norm=bad)
    with pytest.raises(ValueError, match="path_integral must be False, True or"):
        ours(name)(p, lr=0.1, path_integral="regularised")
    with pytest.raises(ValueError, match=r"named_parameters\(\)"):
        ours(name)(p, lr=0.1, path_integral=True)
    with pytest.raises(ValueError, match="impl must be"):
        ours(name)(p, lr=0.1, impl="fast")
    with pytest.raises(NotImplementedError, match="triton"):
        ours(name)(p, lr=0.1, impl="triton")
    with pytest.raises(ValueError, match="fused=False selects the reference"):
        ours(name)(p, lr=0.1, impl="triton", fused=False)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_that_cannot_be_stepped_are_refused_before_anything_changes(name: str):
    good, sparse = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3, 2))
    o = ours(name)([good, sparse], lr=0.1)
    good.grad = torch.ones(2)
    sparse.grad = torch.eye(3, 2).to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        o.step()
    assert good.tolist() == [1.0, 1.0]
    z = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    o = ours(name)([good, z], lr=0.1)
    z.grad = torch.ones_like(z)
    with pytest.raises(NotImplementedError, match="complex64"):
        o.step()
    assert good.tolist() == [1.0, 1.0]
    assert not o.state_dict()["state"]


@pytest.mark.parametrize("name", NAMES)
def test_fused_refuses_meta_parameters_as_torch_does(name: str):
    model = nn.Linear(2, 2, device="meta")
    o = ours(name)(model.parameters(), lr=0.1, fused=True)
    model.weight.grad = torch.empty_like(model.weight)
    with pytest.raises(RuntimeError, match="`fused=True` requires all the params to be floating point Tensors of"):
        o.step()


@pytest.mark.parametrize("name", NAMES)
def test_deepcopy_print_and_pickle(name: str):
    params = make_params(torch.float32)
    o = ours(name)(params, lr=0.1, max_grad_norm=2.0, clip_penalty=True, impl="reference")
    give_gradients([params], 0)
    o.step()
    public = {key for key in vars(o) if not key.startswith("_")}
    twin = copy.deepcopy(o)
    assert {key for key in vars(twin) if not key.startswith("_")} == public
    assert (twin.max_grad_norm, twin.clip_penalty, twin.impl) == (2.0, True, "reference")
    assert torch.equal(twin.grad_norm, o.grad_norm)
    assert repr(twin) == repr(o)
    assert name in repr(o)
    copied = twin.param_groups[0]["params"]
    give_gradients([params, copied], 1)
    o.step()
    twin.step()
    assert all(torch.equal(p, q) for p, q in zip(params, copied, strict=True))
    assert not any(p is q for p, q in zip(params, copied, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_add_param_group_and_named_parameters(name: str):
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    o = ours(name)(model[0].named_parameters(), lr=0.1)
    assert o.param_groups[0]["param_names"] == ["weight", "bias"]
    with pytest.raises(ValueError, match="with/without names"):
        o.add_param_group({"params": model[1].parameters()})
    o.add_param_group({"params": list(model[1].named_parameters()), "lr": 0.0})
    model(torch.ones(1, 2)).sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    o.step()
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert moved == [True, True, False, False]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_capturable_is_torchs_on_a_gpu(name: str):
    mine = [nn.Parameter(p.detach().cuda()) for p in make_params(torch.float32)]
    torchs = [nn.Parameter(p.detach().double().cuda()) for p in make_params(torch.float32)]
    lr = torch.tensor(0.01, device="cuda")
    a = ours(name)(mine, lr=lr, capturable=True, weight_decay=0.1)
    b = theirs(name)(torchs, lr=lr.double(), capturable=True, weight_decay=0.1)
    for step in range(20):
        give_gradients((mine, torchs), step)
        for p, q in zip(mine, torchs, strict=True):
            p.grad = None if p.grad is None else p.grad.cuda()
            q.grad = None if p.grad is None else p.grad.double()
        a.step()
        b.step()
    assert all(a.state[p]["step"].is_cuda for p in mine if p in a.state)
    for p, q in zip(mine, torchs, strict=True):
        # 20 steps of |Δw| ≤ lr·√(1/(1 − β₂)) at worst, each with 16 roundings.
        scale = q.detach().abs() + 20 * 0.01 * 10
        assert_within_roundings(p, q.detach(), roundings=20 * 16, error_scale=scale)


@pytest.mark.gpu
def test_capturing_a_graph_without_capturable_is_refused():
    p = nn.Parameter(torch.ones(3, device="cuda"))
    o = ours("Adam")([p], lr=0.1)
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="capturable=True"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        o.step()
