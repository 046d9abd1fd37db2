"""Ranks as threads of this process: the same code as on real ranks, a hundred times as many cases.

torch keeps a process group for its own tests whose ranks are threads. It is private, so this file is the only one that knows it.
What runs here is run on real processes too (`tests.world`) by spot checks that must see the same.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

RUN_TIMEOUT = 120.0


def run(ranks: int, fn: Callable[..., Any], *args: Any, timeout: float = RUN_TIMEOUT) -> list[Any]:
    """Call `fn(*args)` on `ranks` threads with one default group; its results, by rank. The first error is raised here."""
    from torch.testing._internal.distributed.multi_threaded_pg import ProcessLocalGroup

    results: list[Any] = [None] * ranks
    errors: list[BaseException] = []

    def body(rank: int, store: dist.Store) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=ranks, store=store)
            results[rank] = fn(*args)
        except SystemExit:  # how threads that wait are let go when another one has failed
            pass
        except BaseException as error:
            errors.append(error)
            ProcessLocalGroup.exception_handle(error)

    with _threads_are_ranks():
        store = dist.HashStore()
        threads = [threading.Thread(target=body, args=(rank, store), daemon=True) for rank in range(ranks)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + timeout
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in threads) and not errors:
            errors.append(TimeoutError(f"{getattr(fn, '__name__', fn)} on {ranks} threads: a rank never came back"))
            ProcessLocalGroup.exception_handle(errors[0])
    if errors:
        raise errors[0]
    return results


@contextmanager
def _threads_are_ranks() -> Iterator[None]:
    """While this lasts, torch.distributed's state is each thread's own."""
    from torch._C._distributed_c10d import _set_thread_isolation_mode
    from torch.testing._internal.distributed import multi_threaded_pg as threaded

    # The threaded group is written in Python: it names no device, where a gloo group names the CPU, and has no backend
    # with a timeout of its own, so that a plan has no error store (distwd/sharding/world.py).
    attributes = {
        "_device_types": property(lambda group: [torch.device("cpu")]),
        "_get_backend": lambda group, device: None,
    }
    _set_thread_isolation_mode(True)
    threaded._install_threaded_pg()
    try:
        with (
            mock.patch.multiple(threaded.ProcessLocalGroup, create=True, **attributes),
            # torch 2.15 records what groups with devices do, under a name that threaded groups do not have; 0: not at all.
            mock.patch.dict(os.environ, {"TORCH_FR_BUFFER_SIZE": "0"}),
        ):
            yield
    finally:
        threaded._uninstall_threaded_pg()
        threaded.ProcessLocalGroup.reset()
        _set_thread_isolation_mode(False)
