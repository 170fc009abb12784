"""Ω and w* in host memory: the same bits as beside the weights, and no buffer read too early or overwritten too soon.

Without a GPU both queues are imitated: copies happen as late as they may, what has been read is poisoned, and every
access is checked against the events that were waited for. With one: the real streams, against the resident path.
"""

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from fastewc import EWC, PathIntegral, _fold, _offload
from fastewc import optim as ours
from fastewc._offload import CudaStreams, Part, Stager, can_cut
from fastewc.ops.ewc_step import api
from fastewc.ops.importance_codes import BLOCK, Codes, in_memory
from fastewc.optim import _plan
from fastewc.testing import assert_within_roundings
from tests.helpers import Odd, assert_same, importance_of, move, net
from tests.ops import interpreter

VARIANTS = ["plain", "stabilized", "proximal", "wva"]
KINDS = [(torch.float32, None), (torch.bfloat16, torch.bfloat16), (torch.uint8, torch.bfloat16), (torch.uint8, None)]
kinds = pytest.mark.parametrize(("importance_dtype", "anchor_dtype"), KINDS, ids=str)
pytestmark = pytest.mark.filterwarnings("ignore:anchors were rounded")
#: Cuts Odd.long into parts, and spreads the rest over several pieces.
SMALL = 8 * BLOCK


class LateStreams:
    """Two queues on a CPU. Work is done when it is asked for, copies only once work waits for them.

    Time is counted in each queue; an event is the time that the other one knows of once it has waited.
    """

    def __init__(self) -> None:
        self.queued: list[tuple[Tensor, Tensor]] = []
        self.made = self.work = 0  # copies carried out; pieces read
        self.work_knows = self.copies_know = 0
        self.reads: list[tuple[range, int]] = []
        self.writes: list[tuple[range, int]] = []
        self.kept: list[Tensor] = []

    def copy(self, target: Tensor, source: Tensor) -> None:
        assert target.dtype == source.dtype and target.shape == source.shape
        for span, time in self.reads:
            assert time <= self.copies_know or not overlap(span, span_of(target)), "overwritten while it may be read"
        self.queued.append((target, source))
        self.writes.append((span_of(target), len(self.queued)))

    def copied(self) -> int:
        return len(self.queued)

    def worked(self) -> int:
        return self.work

    def copies_wait(self, event: int) -> None:
        self.copies_know = max(self.copies_know, event)

    def work_waits(self, event: int) -> None:
        self.work_knows = max(self.work_knows, event)
        for target, source in self.queued[self.made : event]:
            target.copy_(source)
        self.made = max(self.made, event)

    def keep(self, memory: Tensor) -> None:
        self.kept.append(memory)

    def synchronize(self) -> None:
        self.work_waits(len(self.queued))

    def read(self, tensor: Tensor) -> None:
        self.work += 1
        for span, time in self.writes:
            assert time <= self.work_knows or not overlap(span, span_of(tensor)), "read before it is copied"
        self.reads.append((span_of(tensor), self.work))


def span_of(tensor: Tensor) -> range:
    return range(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)


def overlap(a: range, b: range) -> bool:
    return a.start < b.stop and b.start < a.stop


def tensors_of(piece: _offload.Piece) -> list[Tensor]:
    held = [h for column in piece.columns for h in column if h is not None]
    return [t for h in held for t in ((h.codes, h.scales) if isinstance(h, Codes) else (h,)) if t.numel()]


class Watched(Stager):
    """Reports what a piece's work reads, and poisons it afterwards."""

    sent = cut = 0

    def pieces(self, columns, cuttable) -> Iterator[_offload.Piece]:
        for piece in super().pieces(columns, cuttable):
            self.sent += 1
            self.cut += sum(not part.whole for part in piece.parts)
            for t in tensors_of(piece):
                assert any(overlap(span_of(t), span_of(memory)) for memory in self.streams.kept)
                self.streams.read(t)
            yield piece
            for t in tensors_of(piece):
                in_memory(t).view(torch.uint8).fill_(255)


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> list[Watched]:
    """Whoever has offload=True is staged on the CPU too; the stagers that were made."""
    made: list[Watched] = []

    def stager(self: EWC, device: torch.device) -> Stager | None:
        if not self._options.offload:
            return None
        if device not in self._stagers:
            made.append(Watched(device, LateStreams(), SMALL))
            self._stagers[device] = made[-1]
        return self._stagers[device]

    monkeypatch.setattr(EWC, "stager", stager)
    return made


def twins(model: nn.Module, **options) -> list[EWC]:
    """The same state beside the weights and on the host."""
    found = []
    for offload in (False, True):
        ewc = EWC(copy.deepcopy(model), ewc_lambda=4.0, offload=offload, **options)
        for task in range(2):
            ewc.consolidate(importance_of(ewc.model, seed=task))
            move(ewc.model, task)
        found.append(ewc)
    return found


@torch.no_grad()
def give_grads(model: nn.Module, step: int) -> None:
    g = torch.Generator().manual_seed(step)
    for i, p in enumerate(model.parameters()):
        grad = torch.randn(p.shape, generator=g).to(p)
        p.grad = None if (i + step) % 7 == 6 else torch.empty_like(p).copy_(grad)


def assert_bits(a: EWC, b: EWC, *optimizers: torch.optim.Optimizer) -> None:
    for (name, x), y in zip(a.model.named_parameters(), b.model.parameters(), strict=True):
        assert torch.equal(x, y), name
        if optimizers:
            states = [o.state[p] for o, p in zip(optimizers, (x, y), strict=True)]
            assert states[0].keys() == states[1].keys()
            for key, value in states[0].items():
                assert not isinstance(value, Tensor) or torch.equal(value, states[1][key]), (name, key)


STEPS = {
    "sgd": ("SGD", {"lr": 0.05}),
    "momentum": ("SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "adam": ("Adam", {"lr": 0.01, "amsgrad": True, "max_grad_norm": 1.0}),
    "adamw": ("AdamW", {"lr": 0.01, "path_integral": True}),
    "clipped": ("AdamW", {"lr": 0.01, "max_grad_norm": 1.0, "clip_penalty": True}),
    "reference": ("AdamW", {"lr": 0.01, "fused": False}),
    "reference momentum": ("SGD", {"lr": 0.05, "momentum": 0.9, "fused": False}),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("variant", VARIANTS)
@kinds
def test_fused_steps_have_the_bits_of_the_resident_ones(step, variant, importance_dtype, anchor_dtype, forced):
    name, arguments = STEPS[step]
    pair = twins(Odd(), variant=variant, importance_dtype=importance_dtype, anchor_dtype=anchor_dtype)
    opts = [getattr(ours, name)(e.model.named_parameters(), ewc=e, **arguments) for e in pair]
    for k in range(3):
        for ewc, opt in zip(pair, opts, strict=True):
            give_grads(ewc.model, k)
            versions = [p._version for p in ewc.model.parameters()]
            opt.step()
            stepped = zip(ewc.model.parameters(), versions, strict=True)
            assert all(p._version > version for p, version in stepped if p.grad is not None)
    assert_bits(*pair, *opts)
    assert forced[0].sent > 6 and (forced[0].cut > 3 or step == "clipped")
    if "max_grad_norm" in arguments:
        assert torch.equal(opts[0].grad_norm, opts[1].grad_norm)


@pytest.mark.skipif(
    not interpreter.INTERPRETED, reason="test_triton_in_the_interpreter runs it in a process of its own"
)
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("variant", VARIANTS)
def test_triton_steps(variant, forced, monkeypatch):
    from fastewc.ops.ewc_step import triton

    monkeypatch.setattr(_plan, "implementation", lambda impl, device: api._counted(triton.ewc_step))
    pair = twins(Odd(), variant=variant, importance_dtype=torch.uint8)
    opts = [ours.AdamW(e.model.parameters(), lr=0.01, ewc=e) for e in pair]
    for k in range(2):
        for ewc, opt in zip(pair, opts, strict=True):
            give_grads(ewc.model, k)
            opt.step()
    assert_bits(*pair, *opts)
    assert forced[0].cut > 3


def test_triton_in_the_interpreter():
    interpreter.run(f"{__file__}::test_triton_steps")


@pytest.mark.parametrize("step", ["momentum", "adam"])
def test_halves_and_wide_moments_of_bfloat16_weights(step, forced):
    name, arguments = STEPS[step]
    pair = twins(Odd().bfloat16(), anchor_dtype=torch.float32)
    opts = [getattr(ours, name)(e.model.parameters(), ewc=e, master_weights=True, **arguments) for e in pair]
    for k in range(3):
        for ewc, opt in zip(pair, opts, strict=True):
            give_grads(ewc.model, k)
            opt.step()
    assert_bits(*pair, *opts)
    assert forced[0].cut > 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_other_dtypes_of_weights_and_scaled_gradients(dtype, variant, forced):
    anchor_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    pair = twins(Odd().to(dtype), variant=variant, importance_dtype=torch.uint8, anchor_dtype=anchor_dtype)
    opts = [ours.AdamW(e.model.parameters(), lr=0.01, ewc=e) for e in pair]
    for k, found in enumerate((0.0, 1.0, 0.0)):
        for ewc, opt in zip(pair, opts, strict=True):
            give_grads(ewc.model, k)
            opt.grad_scale, opt.found_inf = torch.tensor(8.0), torch.tensor(found)
            opt.step()
    assert_bits(*pair, *opts)
    assert {int(s["step"]) for s in opts[1].state.values()} <= {1, 2} and forced[0].cut > 0


@pytest.mark.parametrize("variant", VARIANTS)
@kinds
def test_attached_steps_and_the_penalty_have_the_bits_of_the_resident_ones(
    variant, importance_dtype, anchor_dtype, forced
):
    pair = twins(Odd(), variant=variant, importance_dtype=importance_dtype, anchor_dtype=anchor_dtype)
    opts = [torch.optim.SGD(e.model.parameters(), lr=0.05) for e in pair]
    for ewc in pair:
        give_grads(ewc.model, 0)
    if variant in ("plain", "stabilized"):
        values = [ewc.penalty(lr=0.05) for ewc in pair]
        # Each piece is rounded to float32, and so are the partial sums of the pieces, all of one sign.
        assert_within_roundings(values[1].detach(), values[0].detach().double(), roundings=40)
        for value in values:
            value.backward()
        assert_gradients(*pair)
    stats = [ewc.stats(0.05) for ewc in pair]
    for key, value in stats[0].items():
        if key in ("penalty", "rms_drift"):
            # Σ by blocks in float64, each of float32 sums of 1,024; the reference sums a part in float32.
            one, other = torch.tensor([stats[1][key]]).double(), torch.tensor([value]).double()
            assert_within_roundings(one, other, roundings=40, dtype=torch.float32)
        else:
            assert stats[1][key] == value
    for ewc, opt in zip(pair, opts, strict=True):
        ewc.attach(opt)
        trackers = PathIntegral(opt, model=ewc.model)
        for k in range(2):
            give_grads(ewc.model, k)
            opt.step()
        trackers.remove()
    assert_bits(*pair)
    assert forced[0].cut > 0


def assert_gradients(a: EWC, b: EWC) -> None:
    for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True):
        assert torch.equal(x.grad, y.grad)


def test_second_derivatives_of_the_penalty(forced):
    for ewc in (pair := twins(Odd(), variant="plain")):
        params = list(ewc.model.parameters())
        first = torch.autograd.grad(ewc.penalty(), params, create_graph=True)
        for p, g in zip(params, torch.autograd.grad(sum((g * g).sum() for g in first), params), strict=True):
            p.grad = g
    assert_gradients(*pair)


def test_the_path_integral_beside_a_penalty_in_the_loss(forced):
    totals = []
    for ewc in twins(Odd()):
        opt = torch.optim.SGD(ewc.model.parameters(), lr=0.05)
        tracker = PathIntegral(opt, model=ewc.model, ewc=ewc)
        ewc.penalty(lr=opt).backward()
        opt.step()
        totals.append(tracker.path_integrals())
    assert all(torch.equal(totals[0][n].omega, totals[1][n].omega) for n in totals[0]) and forced[0].sent


def test_a_buffer_that_is_overwritten_or_read_too_early_is_noticed(forced, monkeypatch):
    """So that the tests above can fail."""
    _, ewc = twins(Odd())
    opt = ours.AdamW(ewc.model.parameters(), lr=0.01, ewc=ewc)
    give_grads(ewc.model, 0)
    for forgotten, noticed in (("copies_wait", "overwritten while"), ("work_waits", "read before")):
        with monkeypatch.context() as patch:
            patch.setattr(LateStreams, forgotten, lambda self, event: None)
            with pytest.raises(AssertionError, match=noticed):
                opt.step()
                opt.step()
    opt.step()
    monkeypatch.setattr(LateStreams, "worked", lambda self: 0)  # an event before the work that it should follow
    with pytest.raises(AssertionError, match="overwritten while"):
        opt.step()


def test_the_next_piece_is_queued_before_the_work_on_this_one():
    """Otherwise nothing overlaps; and never more than one piece ahead, since there are two buffers."""
    streams = LateStreams()
    columns = [[torch.full((BLOCK,), float(i)) for i in range(6)]]
    stager = Stager(torch.device("cpu"), streams, capacity=4 * BLOCK)
    for k, piece in enumerate(stager.pieces(columns, [True] * 6)):
        assert len(streams.queued) == min(k + 2, 6) and streams.made == k + 1
        streams.read(piece.columns[0][0])
        assert torch.equal(piece.columns[0][0], columns[0][k])
    assert k == 5 and len({memory.data_ptr() for memory in streams.kept}) == 2


def test_a_pass_whose_caller_raised_leaves_nothing_in_use(forced):
    pair = twins(Odd())
    opts = [ours.AdamW(e.model.parameters(), lr=0.01, ewc=e) for e in pair]
    stager = pair[1].stager(torch.device("cpu"))
    columns = list(zip(*(pair[1].held(p) for p in pair[1].model.parameters()), strict=True))
    abandoned = stager.pieces(columns, [True] * len(columns[0]))
    next(abandoned), next(abandoned)
    for ewc, opt in zip(pair, opts, strict=True):
        give_grads(ewc.model, 0)
        opt.step()
    assert_bits(*pair, *opts)


@pytest.mark.parametrize("capacity", [1, 3 * BLOCK, 1 << 30])
def test_parts_cover_every_element_once_and_begin_with_a_block(capacity):
    model = Odd()
    ewc = EWC(model, ewc_lambda=1.0, importance_dtype=torch.uint8)
    ewc.consolidate(importance_of(model))
    params = list(model.parameters())
    omegas, anchors = zip(*(ewc.held(p) for p in params), strict=True)
    cuttable = [can_cut(*row) for row in zip(params, omegas, anchors, strict=True)]
    assert sum(cuttable) == len(params) - 1 and not cuttable[3]  # gaps in memory
    stager = Stager(torch.device("cpu"), LateStreams(), capacity)
    seen: dict[int, list[Part]] = {}
    for piece in stager.pieces([omegas, [None] * len(params)], cuttable):
        assert all(star is None for star in piece.columns[1])
        for part, omega in zip(piece.parts, piece.columns[0], strict=True):
            seen.setdefault(part.row, []).append(part)
            assert part.begin % BLOCK == 0
            assert torch.equal(omega.decoded(), part.of(omegas[part.row]).decoded())
    for row, parts in seen.items():
        assert [p.begin for p in parts] == [0, *(p.end for p in parts[:-1])]
        assert parts[-1].end == params[row].numel() and (len(parts) == 1) == parts[0].whole
    assert len(seen) == len(params) and (len(seen[0]) > 1) == (capacity < 1 << 30)


def test_a_task_waits_for_the_copies_of_what_it_overwrites(forced, monkeypatch):
    _, ewc = twins(Odd())
    stager = ewc.stager(torch.device("cpu"))
    columns = list(zip(*(ewc.held(p) for p in ewc.model.parameters()), strict=True))
    next(stager.pieces(columns, [True] * len(columns[0])))  # its second piece is on its way
    streams, write = stager.streams, _fold.Fold.write

    def checked(self, *args):
        assert streams.made == len(streams.queued)
        return write(self, *args)

    assert streams.made < len(streams.queued)
    monkeypatch.setattr(_fold.Fold, "write", checked)
    ewc.consolidate(importance_of(ewc.model))


def test_a_cuda_graph_is_refused(forced, monkeypatch):
    _, ewc = twins(net())
    opt = ours.AdamW(ewc.model.parameters(), lr=0.01, ewc=ewc, capturable=True)
    give_grads(ewc.model, 0)
    before = [p.clone() for p in ewc.model.parameters()]
    monkeypatch.setattr(_offload, "capturing", lambda: True)
    for use in (opt.step, lambda: ewc.stats(0.1)):
        with pytest.raises(RuntimeError, match=r"offload=True.*CUDA graph.*offload=False"):
            use()
    assert all(map(torch.equal, before, ewc.model.parameters()))


def test_on_a_cpu_it_changes_nothing(tmp_path):
    pair = twins(Odd(), importance_dtype=torch.uint8)
    opts = [ours.AdamW(e.model.parameters(), lr=0.01, ewc=e) for e in pair]
    for ewc, opt in zip(pair, opts, strict=True):
        give_grads(ewc.model, 0)
        opt.step()
    assert_bits(*pair, *opts)
    assert pair[1].stager(torch.device("cpu")) is None and not pair[1]._stagers


def test_the_option_is_part_of_the_state(tmp_path, forced):
    _, ewc = twins(Odd(), importance_dtype=torch.uint8)
    ewc.stats(0.1)  # makes a stager, which no copy takes along
    other = EWC(Odd(), ewc_lambda=0.0)
    other.load_state_dict(ewc.state_dict())
    ewc.save(tmp_path / "f")
    loaded = EWC.load(tmp_path / "f", Odd())
    for twin in (other, loaded, copy.deepcopy(ewc), pickle.loads(pickle.dumps(ewc))):
        assert_same(ewc, twin)
        assert twin.state_dict()["offload"] is True and not twin._stagers
        twin.stats(0.1)
    old = {key: value for key, value in ewc.state_dict().items() if key != "offload"}
    other.load_state_dict(old)
    assert other.state_dict()["offload"] is False
    with pytest.raises(TypeError, match=r"offload must be True or False, got 1"):
        EWC(Odd(), ewc_lambda=1.0, offload=1)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
@kinds
def test_on_a_gpu(variant, importance_dtype, anchor_dtype, monkeypatch):
    """Pinned memory on the host, the bits of the resident path, several streams, and little memory on the device."""
    stager = Stager(torch.device("cuda", 0), CudaStreams(torch.device("cuda", 0)), capacity=1 << 20)
    monkeypatch.setattr(EWC, "stager", lambda self, device: stager if self._options.offload else None)
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(700, 700) for _ in range(8)), nn.Linear(700, 4000)).cuda()
    options = {"variant": variant, "importance_dtype": importance_dtype, "anchor_dtype": anchor_dtype}
    pair = []
    for offload in (False, True):
        ewc = EWC(copy.deepcopy(model), ewc_lambda=4.0, anchor="weighted", offload=offload, **options)
        for task in range(2):
            ewc.consolidate(importance_of(ewc.model, seed=task))
            with torch.no_grad():
                for p in ewc.model.parameters():
                    p.mul_(1.1)
        pair.append(ewc)
    for p in pair[1].model.parameters():
        omega, anchor = pair[1].held(p)
        held = (omega.codes, omega.scales, anchor) if isinstance(omega, Codes) else (omega, anchor)
        assert all(t.is_pinned() and t.device.type == "cpu" for t in held)
    opts = [ours.AdamW(e.model.parameters(), lr=0.01, ewc=e, max_grad_norm=1.0) for e in pair]
    for k in range(4):
        for ewc, opt in zip(pair, opts, strict=True):
            for p in ewc.model.parameters():
                g = torch.Generator("cuda").manual_seed(k)
                p.grad = torch.randn(p.shape, generator=g, device="cuda")
            with torch.cuda.stream(torch.cuda.Stream() if k == 2 else torch.cuda.current_stream()):
                torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
                opt.step()
            torch.cuda.synchronize()
    assert_bits(*pair, *opts)
    attached = [torch.optim.SGD(e.model.parameters(), lr=0.01) for e in pair]
    for ewc, opt in zip(pair, attached, strict=True):
        ewc.attach(opt)
        opt.step()
    assert_bits(*pair)
    assert len(stager._slots) == 2 and all(slot.memory.numel() <= 1 << 20 for slot in stager._slots)
    monkeypatch.undo()
    pair[1].model.cpu()
    assert pair[1].held(next(pair[1].model.parameters()))[1].device.type == "cpu"
    pair[1].model.cuda()
    pair[1].stats(0.1)


@pytest.mark.gpu
def test_on_a_gpu_the_host_does_not_wait():
    model = nn.Sequential(*(nn.Linear(500, 500) for _ in range(4))).cuda()
    ewc = EWC(model, ewc_lambda=1.0, offload=True)
    ewc.consolidate({n: torch.ones_like(p) for n, p in model.named_parameters()})
    opt = ours.AdamW(model.parameters(), lr=0.01, ewc=ewc)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        opt.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_on_a_gpu_a_capture_is_refused():
    model = net().cuda()
    ewc = EWC(model, ewc_lambda=1.0, offload=True)
    ewc.consolidate(importance_of(model))
    opt = ours.AdamW(model.parameters(), lr=0.01, ewc=ewc, capturable=True)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    with pytest.raises(RuntimeError, match=r"offload=True.*CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        opt.step()
