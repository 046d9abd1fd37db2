"""The processes that `bench.py` measures in, and how they start."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from distwd.cli.timing import Here


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
        if device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)))
        result = work(Here.among(device, threads), *arguments)
        dist.barrier()  # one that leaves early ends the others
        return result
    finally:
        dist.destroy_process_group()


def is_under_torchrun() -> bool:
    """Whether this process has been started as one of several ranks already."""
    return "WORLD_SIZE" in os.environ
