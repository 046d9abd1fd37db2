"""The process group is made after the optimizer, or anew with other ranks; or it is one that does not know its ranks."""

from __future__ import annotations

import datetime
import multiprocessing as mp

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from distwd import LR, Adam, Chain, RelativeWeightDecay, Sharded, WeightDecay, attach, global_metric

KINDS = ["chain", "attach"]


def made(kind: str, rank: int) -> tuple:
    """An optimizer of this rank's piece of a tensor, and what shows its numbers."""
    w = nn.Parameter(torch.full((2,), 1.0 + rank))
    rule, layout = RelativeWeightDecay(0.0, norm_input="params", metric="l1"), {"w": Sharded()}
    if kind == "chain":
        held = optimizer = Chain([("w", w)], rule, LR(1.0), layout=layout)
    else:
        optimizer = torch.optim.SGD([("w", w)], lr=1.0)
        held = attach(optimizer, rule, layout=layout)
    w.grad = torch.zeros(2)
    return optimizer, held


def through_worlds(rank: int, base: str, results: mp.Queue) -> None:
    """Step alone, then in a world of two that is made meanwhile, and then, as rank 0, in a world of one again."""
    found: dict[str, list] = {kind: [] for kind in KINDS}

    def step(kind: str) -> None:
        optimizer, held = optimizers[kind]
        optimizer.step()
        found[kind].append((held.stats()["RelativeWeightDecay"]["metric"].item(), held.phases))

    def init(number: int, size: int) -> None:
        store = dist.FileStore(f"{base}{number}", size)
        timeout = datetime.timedelta(seconds=60)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)

    optimizers = {kind: made(kind, rank) for kind in KINDS if rank == 0 or kind == "chain"}
    for kind in optimizers:
        step(kind)
    init(0, 2)
    # One that takes its first step now, with one that has taken it before there was a group.
    optimizers.setdefault("attach", made("attach", rank))
    for kind in KINDS:
        step(kind)
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        init(1, 1)
        for kind in KINDS:
            step(kind)
        dist.destroy_process_group()
    results.put((rank, found))


def test_numbers_are_of_the_ranks_that_are_there_now(tmp_path):
    context = mp.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=through_worlds, args=(rank, str(tmp_path / "store"), results)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    found = dict(results.get(timeout=60) for _ in ranks)
    for process in ranks:
        process.join(20)
    assert found[0] == {kind: [(2.0, 0), (6.0, 1), (2.0, 0)] for kind in KINDS}
    assert found[1] == {"chain": [(4.0, 0), (6.0, 1)], "attach": [(6.0, 1)]}


def group_that_is_gone() -> str:
    """torch says a ValueError of its own where a group that was destroyed does not answer; here without the wait."""
    w = nn.Parameter(torch.ones(2))
    chain = Chain([("w", w)], RelativeWeightDecay(0.1), LR(1.0), group=dist.new_group())
    w.grad = torch.ones(2)
    chain.step()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", destroyed)
        with pytest.raises(ValueError, match="planned for is gone") as refusal:
            chain.step()
    return str(refusal.value)


def destroyed(*args, **kwargs) -> None:
    raise ValueError("Process group <...> is not initialized in the world group map.")


def test_a_group_that_was_destroyed_is_named_on_every_rank(worlds):
    for text in worlds.run(2, group_that_is_gone):
        assert "the process group of 2 ranks" in text
        assert "make the optimizer (or the attachment) anew" in text


def managed_group() -> list[str]:
    """As torchft registers one: torch knows it as a world of this rank alone, and its size is that of all replicas."""
    rank = dist.get_rank()

    class Managed(dist.ProcessGroup):
        def size(self):
            return 2

        def getBackendName(self):
            return "managed"

        group_name = property(lambda self: self._own_name)

        def _set_group_name(self, name):
            self._own_name = name

    dist.Backend.register_backend("managed", lambda store, r, size, timeout: Managed(r, size), devices=["cpu"])
    group = dist.new_group(ranks=[rank], backend="managed", use_local_synchronization=True)
    named = [("w", nn.Parameter(torch.ones(2)))]
    texts = []
    for call in (
        lambda: Chain(named, WeightDecay(0.1), LR(1.0), group=group),
        lambda: attach(torch.optim.SGD(named, lr=1.0), RelativeWeightDecay(0.1), group=group),
        lambda: global_metric(named, "l1", group=group),
        lambda: Chain(named, WeightDecay(0.1), LR(1.0), layout={"w": Sharded(group)}),
    ):
        with pytest.raises(ValueError, match="managed group") as refusal:
            call()
        texts.append(str(refusal.value))
    return texts


def test_a_managed_group_is_refused_with_the_way_out(worlds):
    for texts in worlds.run(2, managed_group):
        assert all("pass the group of the ranks within one replica" in text for text in texts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("is_sharded", [True, False])
def test_a_fake_backend_lets_a_configuration_be_tried_out(kind, rank, is_sharded):
    """One process stands for eight; nothing is sent, the step runs, and its numbers mean nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=8, store=FakeStore())
    try:
        model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 8))
        if is_sharded:
            fully_shard(model, mesh=dist.init_device_mesh("cpu", (8,)))
        if kind == "chain":
            optimizer = Chain(model.named_parameters(), Adam(), RelativeWeightDecay(0.1), LR(0.1))
        else:
            optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.1, weight_decay=0)
            attach(optimizer, RelativeWeightDecay(0.1))
        for _ in range(2):
            model(torch.ones(2, 16)).sum().backward()
            optimizer.step()
    finally:
        dist.destroy_process_group()
