"""The processes of a run: who they are, how they are laid out, how they start and end together."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from distwd.cli import process
from distwd.cli.process import end_process as end_process
from distwd.cli.process import pick_device, set_threads

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among the others.

    mesh: None in a process that was started alone, without torchrun.
    num_readers: the ranks that read different sequences; tensor-parallel ranks read the same ones.
    """

    device: torch.device
    mesh: DeviceMesh | None
    rank: int = 0
    size: int = 1
    reader: int = 0
    num_readers: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def mean(self, number: torch.Tensor) -> torch.Tensor:
        """The mean over all ranks. Tensor-parallel copies count alike, so it is the one over the readers, too."""
        if self.mesh is None:
            return number
        total = number.clone()
        dist.all_reduce(total)
        return total / self.size

    def gather(self, thing: T) -> list[T]:
        """What each rank has to say, in order of rank."""
        if self.mesh is None:
            return [thing]
        everyone: list[T] = [thing] * self.size
        dist.all_gather_object(everyone, thing)
        return everyone

    def together(self, work: Callable[[], T]) -> T:
        """Do `work` on every rank; if it failed on one, end all of them with its reason.

        A rank that gave up alone would leave the others waiting in their next collective.
        """
        result, problem = None, None
        try:
            result = work()
        except (OSError, ValueError) as error:
            problem = str(error)
        problems = self.gather(problem)
        if any(problems):
            leave(merge(problems))
        return result  # type: ignore[return-value]

    def say(self, text: str) -> None:
        if self.is_main:
            print(text, flush=True)


def merge(problems: list[str | None]) -> str:
    """One line for all ranks, which names ranks only where they differ."""
    first = problems[0]
    if first and all(problem == first for problem in problems):
        return first
    return "; ".join(f"rank {rank}: {problem}" for rank, problem in enumerate(problems) if problem)


def leave(problem: str) -> NoReturn:
    """End this process with exit status 2. To be called on every rank, with the same reason."""
    together = dist.is_initialized()
    # Before there is a group, every rank says it: torchrun ends the others as soon as the first is gone.
    if not together or dist.get_rank() == 0:
        sys.stderr.write(f"train.py: error: {problem}\n")
        sys.stderr.flush()
    if together:
        dist.barrier()
        dist.destroy_process_group()
    raise SystemExit(2)


def parse_mesh(text: str | None, size: int) -> dict[str, int]:
    """`"fsdp=2,tp=2"` -> `{"fsdp": 2, "tp": 2}`, outermost axis first. `None`: fsdp over all ranks.

    Raises ValueError if the axes are unknown, come twice or do not multiply to `size`.
    """
    if text is None:
        return {"fsdp": size}
    sizes = process.parse_mesh(text)
    check_size(text, math.prod(sizes.values()), size)
    return sizes


def check_size(text: str, wanted: int, size: int) -> None:
    if wanted == size:
        return
    raise ValueError(
        f"--mesh {text} is for {wanted} process{'es' * (wanted > 1)}, and {size} {'were' if size > 1 else 'was'} "
        f"started; start it with torchrun --nproc-per-node {wanted}, or change --mesh"
    )


@contextmanager
def start_world(mesh: str | None, threads: int | None) -> Iterator[World]:
    """Join the process group that torchrun prepared; without torchrun, be a world of one process and no group."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    try:
        sizes = parse_mesh(mesh, size)
        device = pick_device()
    except ValueError as error:
        leave(str(error))  # known from the command line and the machine alone, so every rank leaves
    set_threads(threads)
    if "WORLD_SIZE" not in os.environ:
        yield World(device, mesh=None)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    yield make_world(device, init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes)))
    # Not in a `finally`: after an error on one rank alone, a barrier would wait forever.
    dist.barrier()
    dist.destroy_process_group()


def make_world(device: torch.device, mesh: DeviceMesh) -> World:
    """Number the readers along the axes that cut the batch, dp outermost."""
    reader, num_readers = 0, 1
    for axis in mesh.mesh_dim_names or ():
        if axis != "tp":
            length = mesh[axis].size()
            reader, num_readers = reader * length + mesh.get_local_rank(axis), num_readers * length
    return World(device, mesh, dist.get_rank(), dist.get_world_size(), reader, num_readers)
