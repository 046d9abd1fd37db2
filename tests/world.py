"""Real gloo ranks for the tests: a pool of processes that is started once and run many times.

Workers are forked from a server that has imported torch already, so a new pool costs a fraction of a second,
and a pool in doubt (an error, a hang) is thrown away instead of mended.
Worlds of different sizes are different pools, each with a process group of exactly its own ranks:
code under test meets its default group, never a sub-group made by the harness.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import multiprocessing
import multiprocessing.connection
import pickle
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from torch.distributed import TCPStore

from tests.releases import TORCH, OldTorch

RUN_TIMEOUT = 120.0  # seconds for one call: the machine may be busy, a hang is forever
WIRE_TIMEOUT = 30.0  # a collective without its partners fails after this, on its own
STRANDED = 5.0  # once a rank has failed, how long the others may still take to report it too

_PRELOAD = [
    "torch",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.optim",
]


class RankError(AssertionError):
    """A function raised on some rank; the message holds each rank's traceback."""


class World:
    """`ranks` processes with one process group; `ranks=0` is one process without any.

    wire_timeout: seconds after which a collective without its partners fails.
    """

    def __init__(self, ranks: int, wire_timeout: float = WIRE_TIMEOUT):
        self.ranks = ranks
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        # Each pool meets at a port of its own, so any number of pytest workers can run side by side.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._pipes, self._processes = [], []
        for rank in range(max(ranks, 1)):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, ranks, self._store.port, wire_timeout, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float = RUN_TIMEOUT) -> list[Any]:
        """Call the top-level function `fn(*args)` on every rank; its results, by rank.

        Raises RankError with the tracebacks where it raised, TimeoutError where it hung. The world is dead then.
        Skips the test where every rank raised OldTorch.
        """
        call = pickle.dumps((fn, args))
        try:
            for pipe in self._pipes:
                pipe.send_bytes(call)
            replies = self._collect(timeout)
        except BaseException:
            self.kill()
            raise
        failures = {rank: reply[1] for rank, reply in replies.items() if not reply[0]}
        if len(failures) == len(self._pipes) and all(isinstance(reason, OldTorch) for reason in failures.values()):
            # On all ranks alike, before any of them talked: the world is as good as before.
            pytest.skip(str(failures[0]))
        missing = sorted(set(range(len(self._pipes))) - set(replies))
        if failures or missing:
            self.kill()
            name = getattr(fn, "__name__", repr(fn))
            reports = "".join(f"\n--- rank {rank} raised:\n{text}" for rank, text in sorted(failures.items()))
            silent = f"\n--- ranks {missing} never came back" if missing else ""
            raise (RankError if failures else TimeoutError)(f"{name} on {self.ranks} ranks:{reports}{silent}")
        return [replies[rank][1] for rank in range(len(self._pipes))]

    def _collect(self, timeout: float) -> dict[int, tuple[bool, Any]]:
        waiting = dict(enumerate(self._pipes))
        replies: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + timeout
        while waiting and time.monotonic() < deadline:
            left = max(deadline - time.monotonic(), 0)
            for pipe in multiprocessing.connection.wait(list(waiting.values()), left):
                rank = self._pipes.index(pipe)
                del waiting[rank]
                try:
                    replies[rank] = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    replies[rank] = (False, "the process died")
                if not replies[rank][0]:
                    deadline = min(deadline, time.monotonic() + STRANDED)
        return replies

    @property
    def alive(self) -> bool:
        return bool(self._processes) and all(process.is_alive() for process in self._processes)

    def close(self) -> None:
        """Let every rank leave its process group in good order."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send_bytes(pickle.dumps(None))
        for process in self._processes:
            process.join(10)
        self.kill()

    def kill(self) -> None:
        for process in self._processes:
            if process.is_alive():
                process.kill()
            process.join(10)
            process.close()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []


class Worlds:
    """The worlds of one pytest process, each started when first needed and again when it has died."""

    def __init__(self) -> None:
        self._open: dict[int, World] = {}

    def run(self, ranks: int, fn: Callable[..., Any], *args: Any, timeout: float = RUN_TIMEOUT) -> list[Any]:
        if ranks not in self._open or not self._open[ranks].alive:
            if ranks in self._open:
                self._open.pop(ranks).kill()
            self._open[ranks] = World(ranks)
        return self._open[ranks].run(fn, *args, timeout=timeout)

    def close(self) -> None:
        for world in self._open.values():
            world.close()
        self._open.clear()


def _serve(rank: int, ranks: int, port: int, wire_timeout: float, pipe: multiprocessing.connection.Connection) -> None:
    """The life of one rank: join the group, answer calls, leave together."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    # torch's own objects are not looked at again: neither by the garbage collector nor in the search for DDP models.
    gc.freeze()
    # What distwd warns of is a failure here, as it is in the pytest process.
    warnings.filterwarnings("error", module=r"distwd(\.|$)")
    if TORCH < (2, 10):
        # Said now and then when the garbage collector meets a tensor of torch's own, inside whatever operation runs.
        warnings.filterwarnings("ignore", message="Deallocating Tensor that still has live PyObject references")
    if ranks:
        wait = datetime.timedelta(seconds=wire_timeout)
        meeting = dist.TCPStore("127.0.0.1", port, is_master=False)
        dist.init_process_group("gloo", store=meeting, rank=rank, world_size=ranks, timeout=wait)
    while True:
        try:
            call = pipe.recv_bytes()
        except EOFError:
            break
        request = pickle.loads(call)
        if request is None:
            break
        pipe.send_bytes(_answer(*request))
    if ranks:
        with contextlib.suppress(RuntimeError):
            dist.barrier()  # without it gloo workers sometimes abort while others still talk
            dist.destroy_process_group()


def _answer(fn: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    try:
        return pickle.dumps((True, fn(*args)))
    except OldTorch as reason:
        return pickle.dumps((False, reason))
    except BaseException:
        return pickle.dumps((False, traceback.format_exc()))
