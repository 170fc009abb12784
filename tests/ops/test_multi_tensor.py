"""The table that a Triton launch over many tensors reads: who works where, and when it is sent again."""

import gc
import weakref

import pytest
import torch
from torch import Tensor

from fastewc.ops import _multi_tensor as multi
from fastewc.ops import _parts
from fastewc.ops._parts import Part

CPU = torch.device("cpu")
MLP = (784 * 300, 300, 300 * 150, 150, 150 * 10, 10)  # 0.28 M parameters
BLOCK = 1024


@pytest.fixture(autouse=True)
def no_tables():
    multi._tables.clear()
    yield
    multi._tables.clear()


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each copy to the device has."""
    counts: list[int] = []
    staged = multi._staged

    def counted(rows: tuple[tuple[int, ...], ...], n: int, device: torch.device) -> Tensor:
        counts.append(len(rows))
        return staged(rows, n, device)

    monkeypatch.setattr(multi, "_staged", counted)
    return counts


def scratch(n: int, programs: int, device: torch.device) -> Tensor:
    return torch.zeros(n, programs, device=device)


def table(*columns: list[Tensor], name: str = "test") -> multi.Table:
    addresses = tuple(tuple(t.data_ptr() for t in column) for column in columns)
    return multi.table(name, Part((), (), slice(None), columns, addresses), BLOCK, scratch=scratch)


def tensors(*sizes: int) -> list[Tensor]:
    return [torch.zeros(size) for size in sizes]


@pytest.mark.parametrize("sizes", [(0,), (1,), (5, 0, 4, 3), (8, 8, 8), (0, 0, 17, 1, 0)])
@pytest.mark.parametrize("chunk", [1, 4, 8])
def test_programs_take_every_element_once(sizes: tuple[int, ...], chunk: int):
    owners, begins = multi.block_list(sizes, chunk).tolist()
    taken = [(i, e) for i, b in zip(owners, begins, strict=True) for e in range(b, min(b + chunk, sizes[i]))]
    assert taken == [(i, e) for i, size in enumerate(sizes) for e in range(size)]


def test_more_than_two_to_the_31_elements():
    sizes = (2**31 + 5, 0, 2**33 + 1, 3)
    blocks = multi.block_list(sizes, 16 * BLOCK)
    assert blocks.dtype == torch.int64
    owners, begins = blocks
    for i, size in enumerate(sizes):
        own = begins[owners == i]
        assert torch.equal(own, torch.arange(-(-size // (16 * BLOCK))) * 16 * BLOCK)


def test_small_nets_fill_the_device_and_large_ones_take_long_chunks():
    processors = 132
    programs = multi.block_list(MLP, multi.chunk_size(MLP, BLOCK, processors)).shape[1]
    assert programs >= 2 * processors
    large = (10**9,)
    assert multi.chunk_size(large, BLOCK, processors) == multi.MAX_TILES * BLOCK
    for million in range(1, 100):
        sizes = (million * 10**6,)
        programs = multi.block_list(sizes, multi.chunk_size(sizes, BLOCK, processors)).shape[1]
        assert programs >= min(multi.PROGRAMS_PER_PROCESSOR * processors, sizes[0] // BLOCK)


def test_rows_are_counts_and_addresses(sent: list[int]):
    params, grads = tensors(3, 0, 2000), tensors(3, 0, 2000)
    found = table(params, grads, [])
    assert found.rows.tolist() == [
        [3, 0, 2000],
        [t.data_ptr() for t in params],
        [t.data_ptr() for t in grads],
        [0, 0, 0],
    ]
    assert (found.n, found.programs, found.scratch.shape) == (3, 3, (3, 3))
    assert found.blocks.tolist() == [[0, 2, 2], [0, 0, 1024]]


def test_only_rows_that_changed_are_sent_again(sent: list[int]):
    params, grads, moments = tensors(3, 70), tensors(3, 70), tensors(3, 70)
    first = table(params, grads, moments)
    assert sent == [4]
    assert table(params, grads, moments) is first and sent == [4]
    fresh = tensors(3, 70)
    assert table(params, fresh, moments) is first and sent == [4, 1]
    assert first.rows[2].tolist() == [t.data_ptr() for t in fresh]
    moments[1].data = torch.zeros(70)  # the same tensor, in other memory
    assert table(params, fresh, moments) is first and sent == [4, 1, 1]
    assert first.rows[3].tolist() == [t.data_ptr() for t in moments]


def test_other_parameters_sizes_names_and_streams_have_their_own_table(monkeypatch: pytest.MonkeyPatch):
    storage = torch.zeros(100)
    first = table([storage[:50]])
    assert table([storage[:60]]) is not first  # the same address, more elements
    assert table([storage[:50]], name="other") is not first
    monkeypatch.setattr(multi, "_stream", lambda device: (1, False))
    assert table([storage[:50]]) is not first


def test_a_captured_graph_has_a_table_of_its_own(monkeypatch: pytest.MonkeyPatch):
    params = tensors(5)
    eager = table(params)
    monkeypatch.setattr(multi, "_stream", lambda device: (0, True))
    captured = table(params)
    assert captured is not eager and table(params) is not captured
    assert list(multi._tables.values()) == [eager]


def test_tables_keep_no_tensor_alive_and_are_few(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_parts, "CACHED", 3)
    kept = [tensors(i + 1) for i in range(5)]
    found = [weakref.ref(table(params)) for params in kept]
    table(kept[2])  # used again: not the next to go
    table(tensors(9))
    gc.collect()
    assert [ref() is not None for ref in found] == [False, False, True, False, True]
    alive = [weakref.ref(params[0]) for params in kept]
    kept.clear()
    gc.collect()
    assert not any(ref() for ref in alive)
