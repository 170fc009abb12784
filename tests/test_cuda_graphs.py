"""CUDA graphs: a replay reads the learning rate and λ as they are then, and nothing of the step waits for the host.

Without a GPU a graph is imitated on the CPU: every operation of a step is recorded, and replayed on the same tensors
with the numbers that it was given; whoever asks a tensor for a number fails. And the host's part of a step on a GPU
runs on fake tensors, which have no numbers. With a GPU: captured steps against eager ones, bit for bit.
"""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import fastewc
from fastewc import EWC, _dispatch
from fastewc.ops.ewc_penalty import api as penalty_api
from fastewc.ops.ewc_step import whole
from fastewc.testing import assert_within_roundings
from tests.helpers import importance_of, move

NAMES = ["SGD", "Adam", "AdamW"]
VARIANTS = ["plain", "stabilized", "proximal", "wva"]


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def protected(variant: str, model: nn.Module) -> EWC:
    ewc = EWC(model, ewc_lambda=4.0, variant=variant)
    ewc.consolidate(importance_of(model))
    move(model, 3)
    return ewc


def arguments(name: str, lr: Any) -> dict[str, Any]:
    return {"lr": lr, "momentum": 0.9} if name == "SGD" else {"lr": lr, "capturable": True}


@torch.no_grad()
def fill_grads(model: nn.Module, step: int) -> None:
    g = torch.Generator().manual_seed(step)
    for p in model.parameters():
        value = torch.randn(p.shape, generator=g).to(p)
        if p.grad is None:
            p.grad = value
        else:
            p.grad.copy_(value)  # where the graph reads it


class GraphOnCpu(TorchDispatchMode):
    """What a CUDA graph is: operations, their numbers, and the memory that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reads = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero")
        assert func._schema.name not in reads, f"{func} brings a number to the host"
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, tree_map(lambda x: x, args), kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old is not new:
                    old.copy_(new)


class PlainDescent(torch.optim.Optimizer):
    """w ← w − αg, with α a tensor: no operation of it needs a number."""

    def __init__(self, params: Any, lr: Tensor) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad)


def hooked(model: nn.Module, ewc: EWC, make: Any) -> torch.optim.Optimizer:
    optimizer = make(model)
    ewc.attach(optimizer)
    return optimizer


WAYS = {
    "SGD": lambda m, ewc, lr: fastewc.optim.SGD(m.parameters(), ewc=ewc, **arguments("SGD", lr)),
    "Adam": lambda m, ewc, lr: fastewc.optim.Adam(m.parameters(), ewc=ewc, **arguments("Adam", lr)),
    "AdamW-clipped": lambda m, ewc, lr: fastewc.optim.AdamW(
        m.parameters(), ewc=ewc, max_grad_norm=0.5, **arguments("AdamW", lr)
    ),
    "AdamW-halves": lambda m, ewc, lr: fastewc.optim.AdamW(
        m.bfloat16().parameters(), ewc=ewc, master_weights=True, **arguments("AdamW", lr)
    ),
    "SGD-halves": lambda m, ewc, lr: fastewc.optim.SGD(
        m.bfloat16().parameters(), ewc=ewc, master_weights=True, **arguments("SGD", lr)
    ),
    "attached": lambda m, ewc, lr: hooked(m, ewc, lambda m: PlainDescent(m.parameters(), lr)),
    "attached-AdamW": lambda m, ewc, lr: hooked(
        m, ewc, lambda m: fastewc.optim.AdamW(m.parameters(), **arguments("AdamW", lr))
    ),
}
#: (α, λ) of each replay.
CHANGES = [(0.125, 4.0), (0.25, 4.0), (0.25, 0.5), (0.0625, 64.0), (0.0625, 0.0)]


def weights(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Copies of the parameters, or the float32 weights of their halves."""
    lows = [optimizer.state.get(p, {}).get("param_remainder") for p in model.parameters()]
    return [
        p.detach().clone() if low is None else whole(p, low) for p, low in zip(model.parameters(), lows, strict=True)
    ]


@pytest.fixture
def imitated(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Element 0: whether a capture is imitated now."""
    now = [False]
    for module in ("_graphs", "ewc", "attach", "optim._base"):
        monkeypatch.setattr(f"fastewc.{module}.capturing", lambda: now[0])
    return now


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("way", WAYS)
def test_a_replay_on_the_cpu_reads_lr_and_lambda(way: str, variant: str, imitated: list[bool]):
    models, lrs = [net(), net()], [torch.tensor(0.5, dtype=torch.float64) for _ in range(2)]
    ewcs = [protected(variant, m) for m in models]
    replayed, eager = (WAYS[way](*three) for three in zip(models, ewcs, lrs, strict=True))
    for m, optimizer in zip(models, (replayed, eager), strict=True):
        for step in range(2):
            fill_grads(m, step)
            optimizer.step()
    start = [p.detach().clone() for p in models[0].parameters()]
    state = copy.deepcopy(replayed.state_dict()["state"])
    imitated[0] = True
    with GraphOnCpu() as graph:
        replayed.step()
    imitated[0] = False
    with torch.no_grad():  # capturing does nothing; recording did one step
        for p, old in zip(models[0].parameters(), start, strict=True):
            p.copy_(old)
        for i, p in enumerate(models[0].parameters()):
            for key, value in state.get(i, {}).items():
                replayed.state[p][key].copy_(value)
    for step, (lr, ewc_lambda) in enumerate(CHANGES):
        for m, ewc, live in zip(models, ewcs, lrs, strict=True):
            fill_grads(m, 10 + step)
            ewc.ewc_lambda = ewc_lambda
            live.fill_(lr)
        before = weights(models[0], replayed)
        graph.replay()
        eager.step()
        for p, q, w in zip(weights(models[0], replayed), weights(models[1], eager), before, strict=True):
            # λ stands in another place of the formula, so it may round otherwise: 8 roundings a step of pull and map.
            scale = (w.abs() + (p - w).abs() + 1).double()
            assert_within_roundings(p, q.double(), roundings=32 * (step + 1), error_scale=scale, context=f"{step}")
            assert not torch.equal(p, w)


def test_a_replayed_penalty_reads_lambda(imitated: list[bool]):
    for variant in VARIANTS[:2]:
        model = net()
        ewc, lr = protected(variant, model), torch.tensor(0.5)
        ewc.penalty(lr=lr)
        imitated[0] = True
        with GraphOnCpu() as graph:
            value = ewc.penalty(lr=lr)
            value.backward()
        imitated[0] = False
        for alpha, ewc_lambda in CHANGES:
            ewc.ewc_lambda = ewc_lambda
            lr.fill_(alpha)
            graph.replay()
            grads = [p.grad for p in model.parameters()]
            wanted = ewc.penalty(lr=lr)
            pulls = torch.autograd.grad(wanted, list(model.parameters()))
            assert_within_roundings(value, wanted.detach().double(), roundings=64)
            for got, pull in zip(grads, pulls, strict=True):
                assert_within_roundings(got, pull.double(), roundings=16)


def test_lambda_on_a_device_follows(imitated: list[bool]):
    model = net()
    ewc = protected("stabilized", model)
    live = ewc.live_lambda(torch.device("cpu"))
    assert (live.item(), live.dtype) == (4.0, torch.float64)
    ewc.ewc_lambda = 7.0
    assert ewc.live_lambda(torch.device("cpu")) is live
    assert live.item() == 7.0
    saved = ewc.state_dict()
    ewc.ewc_lambda = 1.0
    ewc.load_state_dict(saved)
    assert live.item() == 7.0
    imitated[0] = True
    with pytest.raises(RuntimeError, match="at least one step before the capture"):
        ewc.live_lambda(torch.device("meta"))


@pytest.mark.parametrize("name", NAMES)
def test_what_a_graph_cannot_hold_is_refused(name: str, imitated: list[bool]):
    make, options = getattr(fastewc.optim, name), arguments(name, torch.tensor(0.5))
    model = net()
    fill_grads(model, 0)
    before = [p.detach().clone() for p in model.parameters()]
    imitated[0] = True
    with pytest.raises(RuntimeError, match="every replay would reset its state: run at least one step before"):
        make(model.parameters(), **options).step()
    with pytest.raises(RuntimeError, match="with path_integral: its steps are counted on the host"):
        make(model.named_parameters(), path_integral=True, **options).step()
    if name != "SGD":
        with pytest.raises(RuntimeError, match="needs capturable=True in every group"):
            make(model.parameters(), lr=0.5).step()
    else:
        halved = net(torch.bfloat16)
        fill_grads(halved, 0)
        with pytest.raises(RuntimeError, match="every replay would reset its state"):
            make(halved.parameters(), lr=options["lr"], master_weights=True).step()  # no other state without momentum
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    make(net().parameters(), **options).step()  # nothing to step, nothing to refuse


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Fake CUDA tensors, and kernels of the op that do nothing: only the host's part of a step runs."""
    monkeypatch.setattr(_dispatch, "_reason_against", lambda *_: None)
    choose = _dispatch.choose
    native = lambda op, impl, device: choose(op, "native" if impl == "auto" else impl, device)  # noqa: E731
    monkeypatch.setattr(_dispatch, "choose", native)
    monkeypatch.setattr(penalty_api, "choose", native)
    for check in ("require_finite", "check_finite"):  # consolidate() looks at every number, a step at none
        monkeypatch.setattr(f"fastewc._state.{check}", lambda *_: None)
    with FakeTensorMode():
        yield "cuda"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_no_number_comes_to_the_host(name: str, impl: str, variant: str, dtype: torch.dtype, fake_gpu: str):
    model = nn.Linear(5, 7, device=fake_gpu, dtype=dtype)
    ewc = EWC(model, ewc_lambda=4.0, variant=variant)
    ewc.consolidate({n: torch.empty_like(p) for n, p in model.named_parameters()})
    options = {**arguments(name, 0.5), "max_grad_norm": 1.0, "weight_decay": 0.1, "impl": impl, "ewc": ewc}
    options["master_weights"] = dtype == torch.bfloat16
    optimizer = getattr(fastewc.optim, name)(model.parameters(), **options)
    for group in optimizer.param_groups:
        group["lr"] = torch.zeros((), device=fake_gpu)  # the constructor looks at it
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    optimizer.grad_scale = torch.zeros((), device=fake_gpu)
    optimizer.step()
    if impl != "reference":  # which waits for it, as does the first step of a momentum
        optimizer.found_inf = torch.zeros((), device=fake_gpu)
    for _ in range(2):
        optimizer.step()
    assert all(t.is_cuda for state in optimizer.state.values() for t in state.values())
    with pytest.raises(DataDependentOutputException):  # a number would have been noticed
        float(optimizer.grad_norm)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_number_comes_to_the_host_of_a_hook(variant: str, fake_gpu: str):
    model = nn.Linear(5, 7, device=fake_gpu)
    ewc = EWC(model, ewc_lambda=4.0, variant=variant)
    ewc.consolidate({n: torch.empty_like(p) for n, p in model.named_parameters()})
    optimizer = PlainDescent(model.parameters(), torch.zeros((), device=fake_gpu))
    ewc.attach(optimizer)
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    for _ in range(3):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_host_of_the_triton_step_reads_nothing(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("triton")
    from fastewc.ops.ewc_step import counters
    from fastewc.ops.ewc_step import triton as triton_step

    launched: list[tuple[Any, ...]] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **_: launched.append(args)

    monkeypatch.setattr(triton_step, "_step", Kernel())
    monkeypatch.setattr(counters, "advance", Kernel())
    monkeypatch.setitem(_dispatch._KERNELS, ("ewc_step", "triton"), ("cpu",))
    model = net(dtype)
    options = arguments(name, torch.tensor(0.5)) | {"max_grad_norm": 1.0, "impl": "triton"}
    options["master_weights"] = dtype == torch.bfloat16
    optimizer = getattr(fastewc.optim, name)(model.parameters(), ewc=protected("plain", model), **options)
    for step in range(3):
        fill_grads(model, step)
        with GraphOnCpu():
            optimizer.step()
    assert len(launched) >= 3


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("impl", ["triton", "native", "reference", "attached", "triton-halves", "native-halves"])
@pytest.mark.parametrize("name", NAMES)
def test_a_captured_step_is_the_eager_one(name: str, impl: str, variant: str):
    """α and λ change between the replays; what was captured and what steps eagerly end with the same bits."""
    sides = []
    for _ in range(2):
        model, lr = net(torch.bfloat16 if "halves" in impl else torch.float32).cuda(), torch.tensor(0.5, device="cuda")
        ewc = protected(variant, model)
        options: dict[str, Any] = arguments(name, lr)
        if impl == "attached":
            of_torch = {"SGD": PlainDescent, "Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}[name]
            options.pop("momentum", None)  # torch's SGD reads a tensor α on the host
            optimizer: Any = of_torch(model.parameters(), **options)
            ewc.attach(optimizer)
        else:
            options |= {"impl": impl.partition("-")[0], "master_weights": "halves" in impl}
            optimizer = getattr(fastewc.optim, name)(model.parameters(), ewc=ewc, **options)
        sides.append((model, lr, ewc, optimizer))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for model, _, _, optimizer in sides:
            for step in range(3):
                fill_grads(model, step)
                optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sides[0][3].step()
    for step, (alpha, ewc_lambda) in enumerate(CHANGES):
        for model, lr, ewc, _ in sides:
            fill_grads(model, 10 + step)
            lr.fill_(alpha)
            ewc.ewc_lambda = ewc_lambda
        captured, eager = ((model, optimizer) for model, _, _, optimizer in sides)
        before = weights(*captured)
        graph.replay()
        eager[1].step()
        for p, q, w in zip(weights(*captured), weights(*eager), before, strict=True):
            scale = (w.abs() + (p - w).abs() + 1).double()
            assert_within_roundings(p, q.double(), roundings=32 * (step + 1), error_scale=scale)
            assert not torch.equal(p, w)
