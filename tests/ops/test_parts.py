"""Lists of tensors as kernels take them: themselves where possible, else copies, and nothing stale is remembered."""

import gc

import pytest
import torch
from torch import Tensor

from fastewc.ops import _parts
from fastewc.ops._parts import Dtypes, Part, parts, take

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


@pytest.fixture(autouse=True)
def nothing_seen():
    _parts._seen.clear()
    yield
    _parts._seen.clear()


def float32(own: Dtypes) -> Dtypes:
    return tuple(dtype and F32 for dtype in own)


def arranged(*lists: list[Tensor], fresh: tuple[int, ...] = (1,), wanted=float32) -> list[Part]:
    return parts(lists, fresh=fresh, wanted=wanted, written=[True] * len(lists))


def same_objects(a, b) -> bool:
    return [list(map(id, entries)) for entries in a] == [list(map(id, entries)) for entries in b]


def test_contiguous_tensors_are_taken_as_they_are():
    lists = (
        [torch.zeros(2, 3), torch.zeros(()), torch.zeros(0, 3)],
        [torch.ones(2, 3), torch.ones(()), torch.ones(0, 3)],
        [],
    )
    for _ in range(2):
        (part,) = arranged(*lists)
        assert same_objects(part.columns, lists) and not part.copies
        assert part.own == part.dtypes == (F32, F32, None) and part.chosen == slice(None)
        assert part.addresses == tuple(tuple(t.data_ptr() for t in entries) for entries in lists)


def test_tensors_of_one_dense_order_are_taken_as_they_are():
    params = [torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), torch.zeros(()), torch.zeros(0, 3)]
    moments = [torch.empty_like(p) for p in params]
    counts = [torch.zeros(()) for _ in params]
    (part,) = arranged(params, moments, counts)
    assert same_objects(part.columns, (params, moments, counts)) and not part.copies


def test_others_are_copied_into_the_order_of_their_parameter_and_back():
    param = torch.arange(6.0).view(2, 3).t()  # [3, 2], dense, reversed
    grad = torch.arange(6.0).view(3, 2)
    sliced = torch.arange(12.0).view(3, 4)[:, ::2]
    wide = torch.arange(6.0, dtype=F64).view(3, 2)
    (part,) = arranged([param], [grad], [sliced], [wide])
    (kept,), *others = part.columns
    assert kept is param and part.own == (F32, F32, F32, F64)
    for (stand_in,), own in zip(others, (grad, sliced, wide), strict=True):
        assert stand_in.stride() == param.stride() and stand_in.dtype == F32
        assert torch.equal(stand_in, own.float())
        stand_in.neg_()
    before = sliced.clone()
    part.copy_back(skip=torch.tensor(1.0))
    assert torch.equal(sliced, before)
    part.copy_back(skip=torch.tensor(0.0))
    assert torch.equal(sliced, -before) and torch.equal(wide.float(), -before.new_tensor(range(6)).view(3, 2))


def test_a_parameter_with_gaps_is_copied_with_its_whole_row():
    param, grad = torch.arange(12.0)[::2], torch.arange(6.0)
    (part,) = arranged([param], [grad])
    (stand_in,), (own,) = part.columns
    assert own is grad and stand_in.is_contiguous() and part.copies[0][0] is param


def test_rows_of_several_dtypes_are_several_parts():
    a, b = torch.zeros(1), torch.zeros(1, dtype=BF16)
    found = arranged([a, b, a], [a, a, a], [], wanted=lambda own: own)
    assert [(part.own, part.chosen) for part in found] == [((F32, F32, None), [0, 2]), ((BF16, F32, None), [1])]
    assert same_objects(found[0].columns, ([a, a], [a, a], [])) and same_objects(found[1].columns, ([b], [a], []))
    assert take([1, 2, 3], [0, 2]) == [1, 3] and take([], [0]) == [] and take([1], slice(None)) == [1]


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many lists were looked at, time by time."""
    counts: list[int] = []
    look = _parts._look

    def counted(lists):
        counts.append(len(lists))
        return look(lists)

    monkeypatch.setattr(_parts, "_look", counted)
    return counts


def test_only_fresh_lists_are_looked_at_again(looks: list[int]):
    params, moments = [torch.zeros(4)], [torch.zeros(4)]
    for _ in range(3):
        arranged(params, [torch.zeros(4)], moments)
    assert looks == [2, 1, 1, 1]
    (part,) = arranged(params, [torch.zeros(8)[::2]], moments)
    assert part.columns[1][0].is_contiguous()
    arranged(params, [torch.zeros(4)], [torch.zeros(4)])  # another moment
    assert looks[4:] == [1, 2, 1]


def test_new_memory_and_new_dtypes_are_noticed(looks: list[int]):
    param, grad = torch.zeros(4), torch.zeros(4)
    arranged([param], [grad])
    param.data = torch.zeros(4, dtype=F64)
    (part,) = arranged([param], [grad])
    assert part.own == (F64, F32) and part.copies
    assert looks == [1, 1, 1, 1]


def test_another_tensor_in_the_same_place_is_noticed():
    storage = torch.zeros(16)
    for _ in range(50):  # of which some have the identity of their predecessor
        for view in (storage[:4], storage[:8:2], storage.view(4, 4)[:2, :2]):
            grad = torch.zeros(view.shape)
            (part,) = arranged([view], [grad])
            assert part.columns[0][0].is_contiguous()
            assert (part.columns[0][0] is view) == view.is_contiguous()
            del view, part


def test_tensors_that_come_anew_each_time_are_not_remembered(looks: list[int]):
    param, grad = torch.zeros(4), torch.zeros(4)
    for _ in range(4):
        arranged([param.detach()], [grad])
        gc.collect()
    (seen,) = _parts._seen.values()
    assert len(seen.references) == 1 and looks == [1, 1] * 4


def test_little_is_remembered(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_parts, "CACHED", 3)
    kept = [torch.zeros(4) for _ in range(5)]
    for t in kept:
        arranged([t], [t])
    assert len(_parts._seen) == 3
