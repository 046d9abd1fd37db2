"""The processes that `bench.py` measures in: how they start, and what a rank can measure."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bench_cases import Named, Shapes, Way
from torch import Tensor
from torch.autograd.profiler import profile, record_function
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.multiprocessing.spawn import spawn

# Larger than the last-level cache of most machines: adding one to it leaves nothing else in there.
_SWEEP = 1 << 26


@dataclass(frozen=True)
class Here:
    """A rank: where it stands and what it measures with. mesh: None in a world of one. sweep: what clears the caches."""

    device: torch.device
    threads: int
    mesh: DeviceMesh | None
    rank: int
    size: int
    sweep: Tensor

    @classmethod
    def alone(cls, device: str, threads: int) -> Here:
        """This process, in a world of one."""
        torch.set_num_threads(threads)
        return cls(torch.device(device), threads, None, 0, 1, torch.zeros(_SWEEP // 4, device=device))

    @classmethod
    def among(cls, device: str, threads: int) -> Here:
        """This process among those of the process group, on a device of its own."""
        rank, size = dist.get_rank(), dist.get_world_size()
        if device == "cuda":
            torch.cuda.set_device(rank)
        return replace(cls.alone(device, threads), mesh=init_device_mesh(device, (size,)), rank=rank, size=size)

    def shards(self, shapes: Shapes, seed: int) -> list[Tensor]:
        """Random tensors, cut by rows over the ranks as FSDP2 does: this rank's part of each."""
        generator = torch.Generator(self.device).manual_seed(seed + self.rank)
        return [torch.randn(_local(shape, self), generator=generator, device=self.device) for _, shape in shapes]

    def named(self, shapes: Shapes, values: Sequence[Tensor], grads: Sequence[Tensor]) -> Named:
        """Parameters of their own, that start at `values` and share `grads`."""
        found: Named = []
        for (name, shape), value, grad in zip(shapes, values, grads, strict=True):
            param = torch.nn.Parameter(self._whole(value.clone(), shape))
            param.grad = self._whole(grad, shape)
            found.append((name, param))
        return found

    def _whole(self, local: Tensor, shape: tuple[int, ...]) -> Tensor:
        if self.mesh is None:
            return local
        strides = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            local, self.mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=strides
        )

    def say(self, text: str) -> None:
        """A word on how far it is, once."""
        if self.rank == 0:
            print(text, file=sys.stderr, flush=True)

    # --- measuring --------------------------------------------------------------------------------------------------

    def seconds(self, work: Callable[[], object]) -> float:
        """How long `work` takes, begun with a cold cache and at the same time on every rank."""
        self.sweep.add_(1)
        if self.size > 1:
            dist.barrier()
        if self.device.type != "cuda":
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1000

    def worst(self, numbers: list[float]) -> list[float]:
        """The largest over the ranks, one by one: a step is over when the last rank is."""
        if self.size == 1:
            return numbers
        everyone: list[list[float]] = [[]] * self.size
        dist.all_gather_object(everyone, numbers)
        return [max(values) for values in zip(*everyone, strict=True)]

    def bytes_of(self, begin: Callable[[], object], work: Callable[[], object]) -> tuple[int, int]:
        """What `begin` has left in the allocator's hands, and the most there was during `work`, both since before `begin`."""
        if self.device.type != "cuda":
            return _cpu_bytes_of(begin, work)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        begin()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated() - before
        work()
        torch.cuda.synchronize()
        return held, torch.cuda.max_memory_allocated() - before


def collectives_of(step: Way) -> int:
    """How many collectives a step starts."""
    with CommDebugMode() as counted:
        step()
    return int(counted.get_total_counts())


def _local(shape: tuple[int, ...], here: Here) -> tuple[int, ...]:
    rows = -(-shape[0] // here.size)
    return (max(0, min(rows, shape[0] - rows * here.rank)), *shape[1:])


def _cpu_bytes_of(begin: Callable[[], object], work: Callable[[], object]) -> tuple[int, int]:
    """From the profiler's record of every block that torch's CPU allocator gave out and took back."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or it tells of its own beginning and end on every use
    with profile(profile_memory=True) as record:
        begin()
        gc.collect()
        with record_function("work"):
            work()
    events = record.kineto_results.events()
    start = next(event.start_ns() for event in events if event.name() == "work")
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = sum(change for when, change in changes if when < start)
    return held, max(accumulate((change for when, change in changes if when >= start), initial=held))


def lost_in_waiting(threads: int, seconds: float = 0.5) -> float:
    """The share of time that threads lose because one of them has no core while the others wait for it.

    Operations of some µs one after the other: on cores that other work keeps busy, many take a time slice of the scheduler, 1 ms or more.
    """
    torch.set_num_threads(threads)
    tensor, lost = torch.zeros(1 << 16), 0.0
    begin = last = time.perf_counter()
    while last < begin + seconds:
        tensor.add_(1)
        now = time.perf_counter()
        lost += now - last if now - last > 1e-3 else 0.0
        last = now
    return lost / (last - begin)


# --- starting ---------------------------------------------------------------------------------------------------------


def run_on_ranks(ranks: int, work: Callable[..., Any], device: str, threads: int, *arguments: Any) -> Any:
    """`work(here, *arguments)` on new processes, one for each rank; what rank 0 returns.

    A world of one is a new process too, so that all begin alike and leave their memory behind.
    """
    with tempfile.TemporaryDirectory() as folder:
        spawn(_new_rank, (ranks, folder, work, device, threads, *arguments), nprocs=ranks)
        return torch.load(Path(folder) / "result", weights_only=True)


def _new_rank(rank: int, ranks: int, folder: str, *work: Any) -> None:
    if ranks > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks))
    result = on_this_rank(*work, meet=f"file://{folder}/meet")
    if rank == 0:
        torch.save(result, Path(folder) / "result")


def on_this_rank(work: Callable[..., Any], device: str, threads: int, *arguments: Any, meet: str | None = None) -> Any:
    """`work(here, *arguments)` in this process. meet: where it finds the others; None: torchrun has told it."""
    gc.freeze()  # what the imports have made is not looked through again by every collection
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        return work(Here.alone(device, threads), *arguments)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=meet, rank=rank, world_size=size)
    try:
        result = work(Here.among(device, threads), *arguments)
        dist.barrier()  # one that leaves early ends the others
        return result
    finally:
        dist.destroy_process_group()


def is_under_torchrun() -> bool:
    """Whether this process has been started as one of several ranks already."""
    return "WORLD_SIZE" in os.environ
