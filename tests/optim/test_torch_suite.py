"""torch's own optimizer tests, rebuilt over torch's own configurations, to run everywhere.

Names are those of torch's test/test_optim.py, whose text test_torchs_own_suite.py runs where it can be had. Where torch
allows its default tolerances these want the same bits, or a bound counted from roundings.
"""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, OptimizerInfo

from fastewc import _dispatch
from fastewc.testing import assert_within_roundings, op_dtype
from tests.ops import interpreter
from tests.ops.interpreter import INTERPRETED
from tests.optim import optimizer_infos
from tests.optim.optimizer_infos import NAMED, NAMES, configs
from tests.optim.protected_net import assert_equal_trees
from tests.optim.torch_cases import direction_terms, load, theirs, wide

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
CPU_RUNS = [("triton", "cpu")] if INTERPRETED else [("reference", "cpu"), ("native", "cpu")]
STEPS = 4 if INTERPRETED else 20
GPU_RUNS = [] if INTERPRETED else [(impl, "cuda") for impl in ("reference", "native", "triton")]


@pytest.fixture(params=[*CPU_RUNS, *(pytest.param(run, marks=pytest.mark.gpu) for run in GPU_RUNS)], ids="-".join)
def run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """(implementation, device): what "auto" chooses; ``fused=False`` selects the reference all the same."""
    impl, _ = request.param
    choose = _dispatch.choose
    if request.param == ("triton", "cpu"):
        monkeypatch.setitem(_dispatch._KERNELS, ("ewc_step", "triton"), ("cpu", "cuda"))
    monkeypatch.setattr(_dispatch, "choose", lambda op, asked, d: choose(op, impl if asked == "auto" else asked, d))
    return request.param


@pytest.fixture
def device(run: tuple[str, str]) -> str:
    return run[1]


@pytest.fixture(params=NAMES)
def info(request: pytest.FixtureRequest, run: tuple[str, str]) -> OptimizerInfo:
    return optimizer_infos.info(request.param)


def test_in_the_interpreter():
    interpreter.run(__file__)


def test_none_is_missing():
    assert [name for name in NAMED if name not in globals()] == []


def test_auto_is_the_implementation_under_test(info: OptimizerInfo, run: tuple[str, str]):
    impl, device = run
    for fused, chosen in ((None, impl), (True, impl), (False, "reference")):
        optimizer = info.optim_cls(weight_and_bias(device), fused=fused)
        assert optimizer.choose(optimizer.param_groups[0], torch.device(device)) == chosen


def weight_and_bias(device: str) -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(11)
    return [nn.Parameter(torch.randn(shape, generator=g).to(device)) for shape in ((10, 5), (10,))]


def copied(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in params]


def fill_grads(params: list[nn.Parameter]) -> Tensor:
    """The gradients of a quadratic loss."""
    weight, bias = params[:2]
    for p in params[:2]:
        p.grad = None
    loss = (weight.mv(torch.linspace(-1, 1, 5, device=weight.device)) + bias).square().sum()
    loss.backward()
    return loss.detach()


def descend(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: int) -> list[float]:
    """The losses before each step."""
    losses = []
    for _ in range(steps):
        losses.append(fill_grads(params).item())
        optimizer.step()
    return losses


def assert_equal_bits(one: list[nn.Parameter], other: list[nn.Parameter], context: str) -> None:
    assert all(torch.equal(p, q) for p, q in zip(one, other, strict=True)), context


def assert_right_direction(losses: list[float], arguments: dict[str, Any], context: str) -> None:
    assert (losses[-1] > losses[0]) if arguments.get("maximize") else (losses[-1] < losses[0]), context


@pytest.mark.parametrize("fused", [True] if INTERPRETED else [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_matches_forloop(info: OptimizerInfo, device: str, dtype: torch.dtype, fused: bool):
    """Both paths of ours against torch's for-loop in float64, over steps with a frozen layer and without gradients."""
    for one in info.optim_inputs_func(device, dtype):
        if device == "cpu" and one.kwargs.get("capturable"):
            continue
        models = [
            nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1), nn.Sigmoid()).to(device, d)
            for d in (dtype, torch.float64)
        ]
        models[1].load_state_dict(models[0].state_dict())
        scalars = [nn.Parameter(torch.tensor(0.5, device=device, dtype=d)) for d in (dtype, torch.float64)]
        mine, torchs = ([*m.parameters(), s] for m, s in zip(models, scalars, strict=True))
        a = info.optim_cls(mine, fused=fused, **one.kwargs)
        b = theirs(info.name)(torchs, **wide(one.kwargs))
        scalars[0].grad = torch.tensor(0.25, device=device, dtype=dtype)
        x = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]], device=device, dtype=dtype)
        for step in range(7):
            models[0][2].requires_grad_(step not in (3, 4))
            models[0].zero_grad()
            if step != 2:
                models[0](x).sum().backward()
            for p, q in zip(mine, torchs, strict=True):
                q.grad = None if p.grad is None else p.grad.double()
            before = [q.detach().clone() for q in torchs]
            moments = copy.deepcopy(b.state_dict()["state"])
            a.step()
            b.step()
            for i, (p, q, w) in enumerate(zip(mine, torchs, before, strict=True)):
                context = f"{one.desc}, step {step}, parameter {i}"
                scale = w.abs() + 2 * (q.detach() - w).abs() + direction_terms(q, b)
                bound = {"roundings": 16, "dtype": op_dtype(dtype), "context": context}
                assert_within_roundings(p, q.detach(), error_scale=scale, **bound)
                for key, value in b.state.get(q, {}).items():
                    if key == "step":
                        assert a.state[p][key] == value
                        continue
                    old = moments.get(i, {}).get(key, torch.zeros_like(q)).abs()
                    new = w.abs() if q.grad is None else q.grad.abs() + w.abs()
                    assert_within_roundings(
                        a.state[p][key], value, error_scale=value.abs() + old + new + new**2, **bound
                    )
            with torch.no_grad():
                for p, q in zip(mine, torchs, strict=True):
                    q.copy_(p)
            load(b, a.state_dict())  # both go on from numbers of the tested dtype


def test_fused_does_not_step_if_foundinf(info: OptimizerInfo, device: str):
    for one in info.optim_inputs_func(device):
        for scale in (None, torch.ones(1, device=device)):
            params = [nn.Parameter(torch.ones(1, device=device)) for _ in range(5)]
            optimizer = info.optim_cls(params, fused=True, **one.kwargs)
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.grad_scale, optimizer.found_inf = scale, torch.ones((), device=device)
            optimizer.step()
            assert all(p.item() == 1 for p in params), one.desc
            assert all(state.get("step", 0) == 0 for state in optimizer.state.values()), one.desc
            optimizer.found_inf = torch.zeros((), device=device)
            optimizer.step()
            assert all(p.item() != 1 for p in params), one.desc
            assert all(state.get("step", 1) == 1 for state in optimizer.state.values()), one.desc


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_tensor_lr(info: OptimizerInfo, device: str, dtype: torch.dtype):
    tried = 0
    for words, arguments in configs(info, device):
        one = weight_and_bias(device)
        other, lr = copied(one), 2.0**-8
        a = info.optim_cls(one, **{**arguments, "lr": lr})
        try:
            b = info.optim_cls(other, **{**arguments, "lr": torch.tensor(lr, dtype=dtype)})
        except ValueError as error:
            assert "lr as a Tensor is not supported" in str(error)
            continue
        tried += 1
        travelled = [torch.zeros_like(p) for p in one]
        for _ in range(5):
            before = [p.detach().clone() for p in one]
            descend(a, one, 1)
            descend(b, other, 1)
            for far, p, w in zip(travelled, one, before, strict=True):
                far += (p.detach() - w).abs()
        if dtype == torch.float64:
            assert_equal_bits(one, other, words)
        else:  # α/(1 − βᵗ) of a float32 tensor is rounded to float32: one rounding of each move
            for p, q, far in zip(one, other, travelled, strict=True):
                scale = p.detach().double().abs() + far.double()
                assert_within_roundings(q, p.detach().double(), roundings=16 * 5, error_scale=scale, context=words)
    assert tried


def test_param_groups_lr(info: OptimizerInfo, device: str):
    for words, arguments in configs(info, device):
        arguments.setdefault("lr", 1e-3)
        params, still = weight_and_bias(device), nn.Parameter(torch.ones(2, device=device))
        alone = copied(params)
        grouped = info.optim_cls([{"params": params, **arguments}, {"params": [still]}], lr=1e-28)
        single = info.optim_cls(alone, **copy.deepcopy(arguments))
        still.grad = torch.full_like(still, 0.3)
        losses = descend(grouped, params, STEPS)
        descend(single, alone, STEPS)
        assert_right_direction(losses, arguments, words)
        assert_equal_bits(params, alone, words)
        assert torch.equal(still, torch.ones_like(still)), words


def test_param_groups_weight_decay(info: OptimizerInfo, device: str):
    for words, arguments in configs(info, device):
        free = {**copy.deepcopy(arguments), "weight_decay": 0.0}
        params = weight_and_bias(device)
        apart = copied(params)
        grouped = info.optim_cls([{"params": params[:1], **arguments}, {"params": params[1:], **free}])
        singles = [info.optim_cls(apart[:1], **copy.deepcopy(arguments)), info.optim_cls(apart[1:], **free)]
        losses = descend(grouped, params, STEPS)
        for _ in range(STEPS):
            fill_grads(apart)
            for single in singles:
                single.step()
        assert_right_direction(losses, arguments, words)
        assert_equal_bits(params, apart, words)


def test_step_is_noop_when_params_have_no_grad(info: OptimizerInfo, device: str):
    for words, arguments in configs(info, device):
        for requires_grad in (False, True):
            params = [torch.ones(2, 3, device=device, requires_grad=requires_grad) for _ in range(2)]
            optimizer = info.optim_cls(params, **arguments)
            assert optimizer.step(lambda: torch.tensor([1.0])).item() == 1, words
            assert all(torch.equal(p, torch.ones_like(p)) for p in params), words
            assert not optimizer.state, words


def test_step_is_noop_for_zero_grads(info: OptimizerInfo, device: str):
    for words, arguments in configs(info, device):
        p = nn.Parameter(torch.ones(5, 1, device=device))
        optimizer = info.optim_cls([p], **{**arguments, "weight_decay": 0})
        p.grad = torch.zeros_like(p)
        optimizer.step(lambda: 1.0)
        assert torch.equal(p, torch.ones_like(p)), words


def named(params: list[nn.Parameter], wanted: bool) -> Any:
    return [(f"name{i}", p) for i, p in enumerate(params)] if wanted else params


def without_names(state_dict: dict[str, Any]) -> dict[str, Any]:
    groups = [{k: v for k, v in group.items() if k != "param_names"} for group in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}


@pytest.mark.parametrize("names", [(False, False), (True, False), (False, True), (True, True)])
def test_state_dict_deterministic(info: OptimizerInfo, device: str, names: tuple[bool, bool]):
    for words, arguments in configs(info, device):
        params = weight_and_bias(device)
        a = info.optim_cls(named(params, names[0]), **arguments)
        descend(a, params, 4)
        twins = copied(params)
        b = info.optim_cls(named(twins, names[1]), **arguments)
        b.load_state_dict(copy.deepcopy(a.state_dict()))
        descend(a, params, 4)
        descend(b, twins, 4)
        assert_equal_bits(params, twins, words)
        assert_equal_trees(without_names(a.state_dict()), without_names(b.state_dict()))
        b.param_groups.extend(b.param_groups)  # a parameter that comes twice has one number
        repeated = without_names(b.state_dict())["param_groups"]
        assert_equal_trees(repeated[-1], without_names(a.state_dict())["param_groups"][-1])


def test_can_load_older_state_dict(info: OptimizerInfo, device: str):
    for words, arguments in configs(info, device):
        params = weight_and_bias(device)
        a = info.optim_cls(params, **arguments)
        descend(a, params, 3)
        old, defaults = copy.deepcopy(a.state_dict()), info.optim_cls([torch.ones(1)]).param_groups[0]
        new = copy.deepcopy(old)
        for group in old["param_groups"]:
            for flag in info.not_og_supported_flags:
                group.pop(flag, None)
        for group in new["param_groups"]:
            group |= {flag: defaults[flag] for flag in info.not_og_supported_flags if flag in group}
        twins = copied(params)
        b = info.optim_cls(twins, **arguments)
        a.load_state_dict(old)
        b.load_state_dict(new)
        before = copied(params)
        descend(a, params, 2)
        descend(b, twins, 2)
        assert_equal_bits(params, twins, words)
        assert not any(torch.equal(p, q) for p, q in zip(params, before, strict=True)), words


@pytest.mark.parametrize("names", [(False, False), (True, False), (False, True), (True, True)])
def test_can_load_from_to_named_state_dict(info: OptimizerInfo, device: str, names: tuple[bool, bool]):
    for words, arguments in configs(info, device):
        params = weight_and_bias(device)
        a = info.optim_cls(named(params, names[0]), **arguments)
        descend(a, params, 2)
        b = info.optim_cls(named(params, names[1]), **arguments)
        b.load_state_dict(copy.deepcopy(a.state_dict()))
        descend(b, params, 1)
        wanted = ["name0", "name1"] if any(names) else None
        assert b.state_dict()["param_groups"][0].get("param_names") == wanted, words


@pytest.mark.parametrize("names", [False, True])
def test_save_load_equality_with_weights_only(info: OptimizerInfo, device: str, names: bool):
    for words, arguments in configs(info, device):
        params = weight_and_bias(device)
        a = info.optim_cls(named(params, names), **arguments)
        descend(a, params, 3)
        file = io.BytesIO()
        torch.save(a.state_dict(), file)
        for weights_only in (False, True):
            file.seek(0)
            loaded = torch.load(file, weights_only=weights_only)
            assert_equal_trees(loaded, a.state_dict())
        twins = copied(params)
        b = info.optim_cls(named(twins, names), **arguments)
        b.load_state_dict(loaded)
        descend(a, params, 2)
        descend(b, twins, 2)
        assert_equal_bits(params, twins, words)


def test_load_nontensor_step(info: OptimizerInfo, device: str):
    for words, arguments in configs(info, device):
        params = weight_and_bias(device)
        a = info.optim_cls(params, **arguments)
        descend(a, params, 3)
        numbers = copy.deepcopy(a.state_dict())
        for state in numbers["state"].values():
            state |= {key: value.item() for key, value in state.items() if key == "step"}
        twins = copied(params)
        b = info.optim_cls(twins, **arguments)
        b.load_state_dict(numbers)
        descend(a, params, 2)
        descend(b, twins, 2)
        assert_equal_bits(params, twins, words)
        assert_equal_trees(a.state_dict()["state"], b.state_dict()["state"])


def test_grads_are_never_inplaced_into(info: OptimizerInfo, device: str):
    for words, arguments in configs(info, device):
        params = weight_and_bias(device)
        optimizer = info.optim_cls(params, **arguments)
        for step in range(3):
            fill_grads(params)
            grads = [p.grad for p in params]
            kept = [(g.clone(), g._version) for g in grads]
            optimizer.step()
            assert all(p.grad is g for p, g in zip(params, grads, strict=True)), words
            # The kernels write past autograd, so the numbers are looked at as well.
            assert all(torch.equal(g, old) and g._version == v for g, (old, v) in zip(grads, kept, strict=True)), (
                f"{words}, step {step}"
            )


def keep_a_test_key(optimizer: Any) -> None:
    optimizer.state["test"] = 1


def drop_the_test_key(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    state_dict["ran_pre_hook"] = state_dict["state"].pop("test", None) == 1
    return state_dict


def each(info: OptimizerInfo, device: str) -> Any:
    for words, arguments in configs(info, device):
        yield words, info.optim_cls([torch.ones(2, 3, device=device, requires_grad=True)], **arguments)


def test_state_dict_pre_hook(info: OptimizerInfo, device: str):
    for words, optimizer in each(info, device):
        optimizer.register_state_dict_pre_hook(keep_a_test_key)
        assert optimizer.state_dict()["state"]["test"] == 1, words


def test_state_dict_post_hook(info: OptimizerInfo, device: str):
    for words, optimizer in each(info, device):
        optimizer.register_state_dict_post_hook(drop_the_test_key)
        assert optimizer.state_dict()["ran_pre_hook"] is False, words


def test_state_dict_pre_post_hook(info: OptimizerInfo, device: str):
    for words, optimizer in each(info, device):
        optimizer.register_state_dict_pre_hook(keep_a_test_key)
        optimizer.register_state_dict_post_hook(drop_the_test_key)
        state_dict = optimizer.state_dict()
        assert state_dict["ran_pre_hook"] is True, words
        assert "test" not in state_dict["state"], words


def lr_in_place(_: Any, state_dict: dict[str, Any]) -> None:
    state_dict["param_groups"][0]["lr"] = 0.002


def lr_in_a_copy(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    state_dict = copy.deepcopy(state_dict)
    state_dict["param_groups"][0]["lr"] = 0.003
    return state_dict


def test_load_state_dict_pre_hook_and_prepend(info: OptimizerInfo, device: str):
    for words, optimizer in each(info, device):
        state_dict = optimizer.state_dict()
        optimizer.register_load_state_dict_pre_hook(lr_in_place)
        optimizer.load_state_dict(state_dict)
        assert optimizer.param_groups[0]["lr"] == 0.002, words
        optimizer.register_load_state_dict_pre_hook(lr_in_a_copy, prepend=True)
        optimizer.load_state_dict(state_dict)
        assert optimizer.param_groups[0]["lr"] == 0.002, words  # the one that was there before runs last


def note_the_lr(seen: list[Any]) -> Callable[[Any], None]:
    return lambda optimizer: seen.append(optimizer.param_groups[0]["lr"])


def test_load_state_dict_post_hook(info: OptimizerInfo, device: str):
    for words, optimizer in each(info, device):
        seen: list[Any] = []
        optimizer.register_load_state_dict_post_hook(note_the_lr(seen))
        optimizer.load_state_dict(optimizer.state_dict())
        assert seen == [optimizer.param_groups[0]["lr"]], words


def test_load_state_dict_pre_post_hook(info: OptimizerInfo, device: str):
    for words, optimizer in each(info, device):
        seen: list[Any] = []
        optimizer.register_load_state_dict_pre_hook(lr_in_a_copy)
        optimizer.register_load_state_dict_post_hook(note_the_lr(seen))
        optimizer.load_state_dict(optimizer.state_dict())
        assert seen == [0.003], words


def test_step_pre_hook(info: OptimizerInfo, device: str):
    for words, optimizer in each(info, device):
        calls: list[Any] = []
        handle = optimizer.register_step_pre_hook(lambda *hooked, calls=calls: calls.append(hooked))
        optimizer.step()
        optimizer.step(lambda: 1.0)
        assert [args[0] for args in calls] == [optimizer] * 2, words
        handle.remove()
        optimizer.step()
        assert len(calls) == 2, words


def test_step_post_hook(info: OptimizerInfo, device: str):
    for words, optimizer in each(info, device):
        p = optimizer.param_groups[0]["params"][0]
        p.grad, seen = torch.ones_like(p), list[Tensor]()
        handle = optimizer.register_step_post_hook(lambda *_, seen=seen, p=p: seen.append(p.detach().clone()))
        optimizer.step()
        assert len(seen) == 1 and torch.equal(seen[0], p), words
        assert not torch.equal(p, torch.ones_like(p)), words
        handle.remove()
        optimizer.step()
        assert len(seen) == 1, words


def test_step_all_hooks(info: OptimizerInfo, device: str):
    for words, optimizer in each(info, device):
        order: list[str] = []
        other = torch.optim.SGD([torch.ones(1)])
        handles = [
            register_optimizer_step_pre_hook(lambda *_, order=order: order.append("all before")),
            register_optimizer_step_post_hook(lambda *_, order=order: order.append("all after")),
        ]
        for one in (optimizer, other):
            handles.append(one.register_step_pre_hook(lambda *_, order=order: order.append("before")))
            handles.append(one.register_step_post_hook(lambda *_, order=order: order.append("after")))
        for one in (optimizer, other, optimizer):
            one.step()
        for handle in handles:
            handle.remove()
        optimizer.step()
        assert order == ["all before", "before", "after", "all after"] * 3, words


def test_deepcopy_copies_all_public_attrs(info: OptimizerInfo, device: str):
    for words, arguments in configs(info, device):
        params = weight_and_bias(device)
        optimizer = info.optim_cls(params, **arguments)
        descend(optimizer, params, 3)
        twin = copy.deepcopy(optimizer)
        assert {k for k in vars(optimizer) if k[0] != "_"} == {k for k in vars(twin) if k[0] != "_"}, words
        copies = twin.param_groups[0]["params"]
        descend(optimizer, params, 2)
        descend(twin, copies, 2)
        assert_equal_bits(params, copies, words)


def test_mixed_device_dtype(info: OptimizerInfo, device: str):
    """Each parameter steps as it would alone; on a GPU half of them stay on the CPU."""
    for words, arguments in configs(info, device):
        if arguments.get("capturable") and device == "cuda":
            continue  # of one device only, as torch's
        g = torch.Generator().manual_seed(2)
        places = [(dtype, where) for where in sorted({device, "cpu"}) for dtype in DTYPES]
        params = [nn.Parameter(torch.rand(2, 3, generator=g).to(where, dtype)) for dtype, where in places]
        apart = copied(params)
        together, singles = info.optim_cls(params, **arguments), [info.optim_cls([p], **arguments) for p in apart]
        for _ in range(2):
            for p, q in zip(params, apart, strict=True):
                p.grad = torch.rand(2, 3, generator=g).to(p)
                q.grad = p.grad.clone()
            for optimizer in (together, *singles):
                optimizer.step()
        assert_equal_bits(params, apart, words)
        for p, q, single in zip(params, apart, singles, strict=True):
            assert_equal_trees(dict(together.state.get(p, {})), dict(single.state.get(q, {})))


def test_errors(info: OptimizerInfo, device: str):
    for error in info.optim_error_inputs_func(device=device, dtype=torch.float32):
        params, arguments = error.optimizer_error_input.params, error.optimizer_error_input.kwargs
        params = [torch.ones(1, requires_grad=True)] if params is None else params
        expected = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
        with expected(error.error_type, match=error.error_regex):
            optimizer = info.optim_cls(params, **arguments)
            if error.error_on == OptimizerErrorEnum.STEP_ERROR:
                optimizer.step()
