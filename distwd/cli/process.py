"""The processes of a command: which device each takes, how they begin, fail and end together."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
import torch.version

import distwd

from ..sharding.collectives import gather_objects
from ..sharding.world import ErrorStore, World

T = TypeVar("T")
# What a check may raise: our own errors and torch's, and what a wrong plan leads to further on.
_FAULTS = (AssertionError, LookupError, RuntimeError, TypeError, ValueError)
AXES = ("dp", "fsdp", "tp")  # from the outermost to the innermost: tp talks most, so its ranks are neighbours


def parse_mesh(text: str) -> dict[str, int]:
    """`"fsdp=2,tp=2"` -> `{"fsdp": 2, "tp": 2}`, outermost axis first.

    Raises ValueError if the axes are unknown or come twice.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, number = part.strip().partition("=")
        if axis not in AXES or axis in sizes or not number.isdecimal() or int(number) < 1:
            raise ValueError(
                f"--mesh {text}: cannot read {part!r}; write each of {', '.join(AXES)} once at most, "
                "with a size, as in fsdp=2,tp=2"
            )
        sizes[axis] = int(number)
    if "dp" in sizes:
        sizes.setdefault("fsdp", 1)  # replication is the outer half of HSDP
    return {axis: sizes[axis] for axis in AXES if axis in sizes}


def pick_device() -> torch.device:
    """A GPU for each rank where there are GPUs, else the CPU. Raises ValueError if they are too few."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    ranks, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if ranks > gpus:
        raise ValueError(
            f"{ranks} ranks were started on a machine with {gpus} GPU{'s' * (gpus > 1)}; start {gpus}, "
            'or use the CPU with CUDA_VISIBLE_DEVICES=""'
        )
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def num_cores() -> int:
    """The cores that this process may use, where the system tells."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def set_threads(threads: int | None) -> int:
    """Share the cores among the ranks of this machine. Returns the threads of each.

    torchrun sets OMP_NUM_THREADS=1 where nobody did, which leaves most of a large machine idle;
    more threads than cores is worse, as every small operation ends in a barrier of its threads.
    """
    if threads is None and os.environ.get("OMP_NUM_THREADS", "1") == "1" and "LOCAL_WORLD_SIZE" in os.environ:
        threads = max(1, num_cores() // int(os.environ["LOCAL_WORLD_SIZE"]))
    if threads is not None:
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def is_first() -> bool:
    """Whether this process writes for all, from what torchrun has said: before there is a process group, too."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Tell how far a long command is, once, where it does not mix with its output."""
    if is_first():
        print(text, file=sys.stderr, flush=True)


@dataclass(slots=True)
class Ranks:
    """The processes that torchrun has started, or one that was started alone.

    device: of this process.
    backend: of their process group.
    rank, size: of this process, and how many there are.
    hosts: the names of their machines, each once.
    """

    device: torch.device
    backend: str
    rank: int
    size: int
    hosts: tuple[str, ...] = ()
    _num_attempts: int = 0

    def gather(self, value: T) -> list[T]:
        """What each rank has to say, in order of rank."""
        return gather_objects(value, World.of(None))

    def attempt(self, what: str, work: Callable[[], T]) -> T | str:
        """What `work` returns; or why it failed, if it failed on every rank. what: how to call it.

        A PlanError comes on all ranks alike, and they can go on to the next thing. A rank that fails alone says so on
        stderr and ends this process: the others may be in a collective that nobody can finish.
        """
        self._num_attempts += 1
        try:
            return work()
        except _FAULTS as error:
            reason = f"{type(error).__name__}: {error}"
        store = ErrorStore.of(dist.group.WORLD, self._num_attempts)
        if store is not None:
            try:
                store.rendezvous(reason)
            except distwd.PlanError:
                print(f"FAIL {what}, error, rank {self.rank} alone: {reason}", file=sys.stderr, flush=True)
                end_process(1)
        return reason


@contextmanager
def join_ranks(device: torch.device, backend: str | None, timeout: float) -> Iterator[Ranks]:
    """Join the process group that torchrun prepared; without torchrun, be a group of one.

    backend: None: nccl for GPUs, gloo for CPUs.
    timeout: seconds that a collective waits for a rank that does not come.
    """
    backend = backend or ("nccl" if device.type == "cuda" else "gloo")
    wait = timedelta(seconds=timeout)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=wait)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=wait)
    ranks = Ranks(device, backend, dist.get_rank(), dist.get_world_size())
    ranks.hosts = tuple(dict.fromkeys(ranks.gather(socket.gethostname())))
    yield ranks
    # Not in a `finally`: after an error on one rank alone, the others would be waited for forever. All meet here, since a
    # rank that left early would take the store along.
    ranks.gather(None)
    dist.destroy_process_group()


def end_process(status: int) -> NoReturn:
    """The end of a program that has left its process group.

    On gloo without Python's shutdown: a mesh keeps the group's threads alive, and a busy machine's shutdown then aborts
    now and then ("terminate called without an active exception").
    """
    if not torch.cuda.is_available():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def versions(device: torch.device) -> dict[str, Any]:
    """What to report beside a number: versions, and what it was computed on."""
    return {
        "distwd": distwd.__version__,
        "torch": torch.version.__version__,
        "python": sys.version.split()[0],
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }
