"""The ranks that together hold the model, and the key-value store where they publish why a step failed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store

from .._torch import device_types, first_backend, store_of, timeout_of
from ..errors import PlanError

MAX_ACCELERATORS = 6  # device types besides the CPU that one group is looked at for


@dataclass(frozen=True, slots=True)
class World:
    """The ranks that together hold the model.

    group: their process group; None for this process alone.
    rank: the rank of this process in the group.
    size: number of ranks in the group.
    serves: device types that the group's backends can send from ("cpu", "cuda", ...).
    device: where numbers are brought before they are sent. Of one type on every rank: in a group of gloo and NCCL each
        serves its own devices, and a rank that sends with one would wait for ever for a rank that sends with the other.
    error_store: where these ranks publish why they cannot continue; None without a plan, on one rank, and where the
        backend has no timeout.
    is_fake: whether the backend is torch's "fake" one, which sends nothing: one process stands for many ranks, to try
        out a configuration or its memory. A step runs, and its numbers mean nothing.
    """

    group: dist.ProcessGroup | None
    rank: int
    size: int
    serves: tuple[str, ...]
    device: torch.device
    error_store: ErrorStore | None = None
    is_fake: bool = False

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> World:
        """The world of a process group.

        group: None for all ranks if torch.distributed is initialised, else for this process alone.
        Raises ValueError for what is not a group of this process, see `check_group`.
        """
        group = current_group(group)
        if group is None:
            return cls(None, 0, 1, (), torch.device("cpu"))
        check_group(group)
        serves, is_fake = device_types(group), dist.get_backend(group) == "fake"
        return cls(group, dist.get_rank(group), dist.get_world_size(group), serves, _device(serves), is_fake=is_fake)

    def sendable(self, tensor: Tensor) -> Tensor:
        """`tensor` on the device that every rank sends from."""
        # Not where it is, though the group may serve that: another rank may hold nothing, or hold it elsewhere.
        return tensor.to(self.device)

    def types_of(self, devices: Iterable[torch.device]) -> int:
        """Which accelerators that the group serves are among `devices`, as bits that ranks can exchange; see `at`."""
        held = {device.type for device in devices}
        return sum(1 << number for number, kind in enumerate(self._accelerators) if kind in held)

    def at(self, devices: Sequence[torch.device], types: int) -> World:
        """The same ranks, which send from where their tensors are; from an accelerator if any rank holds tensors there.

        devices: of this rank's tensors.
        types: the `types_of` of all ranks together, so that every rank decides alike.
        """
        kinds = [kind for number, kind in enumerate(self._accelerators) if types >> number & 1]
        if self.size == 1:  # nothing is sent, but numbers of no tensors lie there, too
            kinds = [device.type for device in devices if device.type != "cpu"]
        if not kinds:
            return self
        own = [device for device in devices if device.type == kinds[0]]
        return replace(self, device=own[0] if own else _current(kinds[0]))

    @property
    def _accelerators(self) -> tuple[str, ...]:
        return tuple(kind for kind in self.serves if kind != "cpu")[:MAX_ACCELERATORS]

    def meet(self, what: str) -> None:
        """Wait, in the store of the group, until every rank has come to do `what` with the others.

        Before an exchange that no step expects: it would be paired with whatever collective the others are in, and break
        the backend's messages. Raises PlanError if some do not come within the group's timeout.
        """
        # Zero is the number of no plan.
        if (store := ErrorStore.of(self.group, 0)) is not None:
            store.meet(f"rank {self.rank} of {self.size} has come to {what}, and another rank of the group has not. ")

    def published_errors(self) -> str:
        """`rank 1: reason; rank 2: reason`, or "" if no rank has published one. For when a collective has failed."""
        return "" if self.error_store is None else self.error_store.read()


def current_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The process group that an argument `group=` means now: None is the default group, if there is one at this moment."""
    if group is None and dist.is_available() and dist.is_initialized():
        return dist.group.WORLD
    return group


def check_group(group: Any) -> None:
    """Raise ValueError for what is not a process group that this process belongs to, or does not know its ranks."""
    # What `new_group` returns on ranks that it leaves out.
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            "group: this process is not a member of it; build the optimizer only on the ranks of the group"
        )
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"group must be a torch.distributed.ProcessGroup, not {type(group).__name__}; for a DeviceMesh pass mesh.get_group(...)"
        )
    # torchft registers every replica's group as one of this rank alone, under a size() of all. Each rank would take itself
    # for the first, and own everything.
    num_known = len(dist.get_process_group_ranks(group))
    if num_known != group.size():
        raise ValueError(
            f"group: torch knows it as a group of {num_known}, and its size() is {group.size()} (a managed group, such as "
            "torchft's), so no rank knows its place in it; pass the group of the ranks within one replica. Replicas are "
            "equal: each finds the same numbers by itself"
        )


def _device(serves: tuple[str, ...]) -> torch.device:
    """Where to send from until a plan tells: the CPU if the group serves it, else this process's current card."""
    # What ranks exchange before they have a plan is made on the CPU.
    if "cpu" in serves:
        return torch.device("cpu")
    return _current(serves[0])


def _current(kind: str) -> torch.device:
    """This process's current card. Not card 0: NCCL refuses two ranks on one card."""
    return torch.device(kind, getattr(torch, kind).current_device())


# What to do, of a rank that has come alone.
_ALONE = (
    "Call param_groups, and read optimizer.plan, on every rank, and print on one; give every rank the same group= and the same "
    "rules (with absolute decay only none builds a plan); or find the rank that died."
)


@dataclass(frozen=True, slots=True, eq=False)
class ErrorStore:
    """Keys of the ranks of one plan in the key-value store of their process group.

    A rank that raises in a step leaves the others waiting in a collective. It publishes its reason here, and the others
    read it when the backend has given up. The store is host memory behind a socket, so it works while collectives do
    not.
    A step that goes well touches it once: the first step asks whether it is a real one.

    store: the group's store, with a prefix of this plan.
    rank: of this process in the group.
    size: number of ranks in the group.
    backend: of the group's first device, for its timeout, which a user may change later.
    """

    store: Store
    rank: int
    size: int
    backend: Any

    @classmethod
    def of(cls, group: dist.ProcessGroup | None, number: int) -> ErrorStore | None:
        """The store of the plan called `number`; None for one rank, and for a backend without timeout.

        number: the same on every rank, and another for every plan.
        """
        if group is None or group.size() == 1:
            return None
        backend = first_backend(group)
        # torch's fake backend, used to simulate a cluster in one process. Its other ranks do not exist and answer
        # nothing.
        if timeout_of(backend) is None:
            return None
        store = PrefixStore(f"distwd/{number}", store_of(group))
        return cls(store, group.rank(), group.size(), backend)

    @property
    def timeout(self) -> timedelta:
        """How long to wait for other ranks here: half of the group's timeout, as it is now.

        A rank that waits in a collective for this one then still waits when this one has given up, and gets its reason.
        """
        timeout = timeout_of(self.backend)
        assert timeout is not None  # or `of` would have made no store
        return timeout / 2

    def publish(self, reason: str) -> None:
        """Leave the reason why this rank does not continue; replaces its last one."""
        # The store dies with the rank that serves it. Then nobody is left to read.
        with contextlib.suppress(RuntimeError):
            self.store.set(f"error of rank {self.rank}", reason)

    def clear(self) -> None:
        """Delete what this rank has published."""
        with contextlib.suppress(RuntimeError):
            self.store.delete_key(f"error of rank {self.rank}")

    def read(self) -> str:
        """`rank 1: reason; rank 2: reason`, or "" if no rank has published one."""
        reasons: list[str] = []
        with contextlib.suppress(RuntimeError):
            # Asked first, since `get` would wait for a key that is missing.
            keys = {rank: key for rank in range(self.size) if self.store.check([key := f"error of rank {rank}"])}
            reasons = [f"rank {rank}: {self.store.get(key).decode()}" for rank, key in keys.items()]
        return "; ".join(reasons)

    def is_true_on_any(self, flag: bool, number: int) -> bool:
        """Whether `flag` is true on any rank. No collective.

        flag: of this rank. A rank with True returns at once; the others wait until one has True, or all have False.
        number: of the question, the same on every rank.
        Raises PlanError if neither is known within the timeout.
        """
        answer = f"answer {number}"
        # One True decides, so this rank need not wait. Ranks that train then meet in the collective that follows.
        if flag:
            self.store.set(answer, "yes")
            return True
        self.store.set(f"no {number} of rank {self.rank}", "")
        # Whoever comes last sees all the others' keys, whatever the order of arrival.
        if self.store.check([f"no {number} of rank {rank}" for rank in range(self.size)]):
            self.store.set(answer, "no")
        try:
            self.store.wait([answer], self.timeout)
        except RuntimeError as error:
            raise PlanError(
                f"rank {self.rank} of {self.size} has come to a step, and another rank of the group has not ({error}); step the "
                "optimizer on every rank, or find the rank that died"
            ) from error
        return self.store.get(answer) == b"yes"

    def meet(self, alone: str) -> None:
        """Wait until every rank has called this as often as this one has.

        alone: what the error says of a rank that was alone.
        Raises PlanError if others do not come within the group's timeout.
        """
        this = came = 0
        try:
            # `add` is atomic. The ranks come in rounds: nobody is counted in the next one before it has left this one.
            came = self.store.add("came", 1)
            this = (came - 1) // self.size
            if came == (this + 1) * self.size:
                self.store.set(f"met {this}", "")
                self.store.delete_key(f"met {this - 1}")
            # Nobody waits for this rank meanwhile, so it may wait as long as a collective would.
            self.store.wait([f"met {this}"], 2 * self.timeout)
        except RuntimeError as error:
            # As in `rendezvous`: this rank is taken off, unless the others have been let go meanwhile. Where the store has
            # died with its rank there is nothing to take it off from.
            with contextlib.suppress(RuntimeError):
                if came and self.store.add("came", -1) + 1 >= (this + 1) * self.size:
                    return
            raise PlanError(alone + _ALONE) from error

    def rendezvous(self, reason: str) -> None:
        """Wait until every rank has called this.

        An exchange that the other ranks do not expect would be paired with whatever collective they are in, and corrupt
        it. So before a plan is rebuilt the ranks meet here first.

        reason: why this rank is here, for those that are not.
        Raises PlanError with the reasons of the ranks that came, if some did not come within the timeout.
        """
        self.publish(reason)
        # `add` is atomic: exactly one rank is the last.
        if self.store.add("met", 1) == self.size:
            self.store.set("go", "")
        try:
            self.store.wait(["go"], self.timeout)
        except RuntimeError as error:
            # Take this rank off the count, so that a rank which comes too late cannot complete it. If the count was
            # complete meanwhile, the others have left already, and this rank follows.
            if self.store.add("met", -1) + 1 < self.size:
                raise PlanError(self.read()) from error
        self.clear()
