"""A board in a process group's store, where a rank says why it cannot go on, or asks what costs no collective.

Host memory only. A step that goes well looks once, if it is the first: whether it is a real one.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from .._torch import first_backend, timeout_of
from ..errors import PlanError


@dataclass(frozen=True, slots=True, eq=False)
class ErrorStore:
    """Where the ranks of one plan leave word for those whose collective fails.

    store: of the process group, for this plan alone. backend: of the process group, whose timeout may be changed.
    """

    store: Store
    rank: int
    size: int
    backend: Any

    @classmethod
    def of(cls, group: dist.ProcessGroup | None, number: int) -> ErrorStore | None:
        """The board of the plan called `number`; None where there is nobody else, or the backend has no timeout (a fake one)."""
        if group is None or group.size() == 1:
            return None
        backend = first_backend(group)
        if timeout_of(backend) is None:
            return None
        store = PrefixStore(f"distwd/{number}", group.get_group_store())
        return cls(store, group.rank(), group.size(), backend)

    @property
    def patience(self) -> timedelta:
        """How long a rank waits for the others at a meeting: half the group's timeout.

        So whoever waits for this rank in a collective meanwhile still waits when the meeting has failed.
        """
        timeout = timeout_of(self.backend)
        assert timeout is not None  # or `of` would have made no store
        return timeout / 2

    def say(self, reason: str) -> None:
        """Leave word; another word of this rank is replaced."""
        with contextlib.suppress(RuntimeError):  # a store that died with its rank: nobody is left to read
            self.store.set(_word(self.rank), reason)

    def wipe(self) -> None:
        """Take this rank's word back."""
        with contextlib.suppress(RuntimeError):
            self.store.delete_key(_word(self.rank))

    def read(self) -> str:
        """`rank 1: why; rank 2: why`, or "" if nobody has left word."""
        words: list[str] = []
        with contextlib.suppress(RuntimeError):
            there = [rank for rank in range(self.size) if self.store.check([_word(rank)])]
            words = [f"rank {rank}: {self.store.get(_word(rank)).decode()}" for rank in there]
        return "; ".join(words)

    def is_true_on_any(self, flag: bool, number: int) -> bool:
        """Whether `flag` is true on any rank; number: of the question, the same on every rank. No collective.

        A rank that says yes goes on at once. The others wait until one has said yes, or all have said no. Raises PlanError if
        neither comes.
        """
        answer = f"answer {number}"
        if flag:
            self.store.set(answer, "yes")
            return True
        self.store.set(f"no {number} of rank {self.rank}", "")
        if self.store.check([f"no {number} of rank {rank}" for rank in range(self.size)]):
            self.store.set(answer, "no")
        try:
            self.store.wait([answer], self.patience)
        except RuntimeError as error:
            raise PlanError(
                f"rank {self.rank} of {self.size} has come to a step, and another rank of the group has not ({error}); step the "
                "optimizer on every rank, or find the rank that died"
            ) from error
        return self.store.get(answer) == b"yes"

    def meet(self, reason: str) -> None:
        """Wait until every rank has come here. Raises PlanError with the reasons of those that came, if some did not.

        An exchange that others do not expect would pair up with whatever collective they are in.
        """
        self.say(reason)
        if self.store.add("met", 1) == self.size:
            self.store.set("go", "")
        try:
            self.store.wait(["go"], self.patience)
        except RuntimeError as error:
            # Whoever takes its name off the list again cannot be counted by one that comes later.
            if self.store.add("met", -1) + 1 < self.size:
                raise PlanError(self.read()) from error
        self.wipe()


def _word(rank: int) -> str:
    return f"word of rank {rank}"
