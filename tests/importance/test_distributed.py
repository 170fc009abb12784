"""Two real gloo ranks give what one process gives; a rank that fails takes the others with it."""

import os
import socket
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from fastewc import fisher_importance, mas_importance, signal_importance
from fastewc.testing import assert_within_roundings


def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double().eval()
    model.spare = nn.Parameter(torch.ones(2).double())
    model[0].weight.data = model[0].weight.data.t().contiguous().t()  # sums of strided parameters are reduced too
    return model


def data(n=7):
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, generator=g, dtype=torch.float64), torch.randint(0, 3, (n,), generator=g)


def same(got, wanted):
    assert list(got) == list(wanted)
    for name in wanted:
        assert_within_roundings(got[name], wanted[name], roundings=200, context=name)
    assert got.num_samples == wanted.num_samples
    assert {n: path for n, (path, _) in got.report.items()} == {n: path for n, (path, _) in wanted.report.items()}


def sums_over_ranks(rank):
    x, y = data()
    for importance in (fisher_importance, mas_importance, signal_importance):
        exclude = "spare" if importance is signal_importance else ()
        wanted = importance(net(), [(x, y)], process_group=False, exclude=exclude)
        cut = slice(0, 2) if rank == 0 else slice(2, 7)
        same(importance(net(), [(x[cut], y[cut])], exclude=exclude), wanted)
        same(importance(net(), [(x[cut], y[cut])], exclude=exclude, process_group=dist.group.WORLD), wanted)
        alone = importance(net(), [(x[cut], y[cut])], exclude=exclude, process_group=False)
        assert alone.num_samples == (2 if rank == 0 else 5)
        # All of the data on rank 1: rank 0 has none, which is not an error.
        same(importance(net(), [(x, y)] if rank else [], exclude=exclude), wanted)


def sampler_padding(rank):
    x, y = data()
    dataset = TensorDataset(x, y)
    model = DistributedDataParallel(net(), find_unused_parameters=True).eval()
    loader = DataLoader(dataset, batch_size=3, sampler=DistributedSampler(dataset, shuffle=False))
    wanted = fisher_importance(net(), [(x, y)], process_group=False)
    same(fisher_importance(model, loader, max_samples=len(dataset)), wanted)
    assert fisher_importance(model, loader).num_samples == 8  # the padding counts where it is not cut
    few = fisher_importance(net(), [(x[:1], y[:1])], process_group=False)
    same(fisher_importance(model, loader, max_samples=1), few)
    assert all(p.grad is None for p in model.parameters())
    model(x).sum().backward()  # DDP itself still works


def used_on_one_rank_only(rank):
    def forward(model, batch):
        out = model(batch[0])
        return (out @ torch.outer(model.spare, model.spare).sum().expand(3, 3) if rank else out), batch[1]

    x, y = data()
    got = fisher_importance(net(), [(x, y)], forward=forward)
    assert got.report["spare"] == (got.report["spare"] if rank else ("op", "on another rank"))
    assert got.report["spare"][0] == "op"


def one_rank_fails(rank):
    x, y = data()
    bad = y.clone()
    bad[-1] = 99
    for fail in (
        lambda: fisher_importance(net(), [(x, bad if rank else y)]),
        lambda: mas_importance(net(), 3 if rank else [x]),
        lambda: fisher_importance(net(), [(x, y)], max_samples=0 if rank else None),
        lambda: fisher_importance(net(), [(x, y)], impl="fast" if rank else "auto"),
        lambda: fisher_importance(net(), [(x, y)], exclude="nope" if rank else ()),
        lambda: signal_importance((lambda x: x) if rank else net(), [x], exclude="spare"),
    ):
        try:
            fail()
        except (ValueError, TypeError):
            assert rank == 1
        except RuntimeError as error:
            assert rank == 0
            assert "another rank" in str(error)
        else:
            raise AssertionError("no error")


def ranks_disagree(rank):
    x, y = data()
    with pytest.raises(RuntimeError, match="same importance pass"):
        fisher_importance(net(), [(x, y)], exclude="spare" if rank else ())


def only_one_is_a_member(rank):
    x, y = data()
    group = dist.new_group([0])
    if rank:
        with pytest.raises(ValueError, match="not a member"):
            fisher_importance(net(), [(x, y)], process_group=group)
    else:
        assert fisher_importance(net(), [(x, y)], process_group=group).num_samples == 7


def nobody_has_samples(rank):
    with pytest.raises(ValueError, match="no samples"):
        mas_importance(net(), [])


def _rank(rank, port, scenario, queue):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        for step in scenario:
            step(rank)
        queue.put((rank, None))
    except BaseException:  # noqa: BLE001 (the parent raises it)
        queue.put((rank, traceback.format_exc()))
    finally:
        dist.destroy_process_group()


def test_two_ranks():
    scenario = [
        sums_over_ranks,
        sampler_padding,
        used_on_one_rank_only,
        one_rank_fails,
        ranks_disagree,
        only_one_is_a_member,
        nobody_has_samples,
    ]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_rank, args=(rank, port, scenario, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    results = dict(queue.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(30)
    assert results == {0: None, 1: None}, results
