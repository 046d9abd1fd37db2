"""Decay that has to wait until its hosts have stepped, since it looks at what they did."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from .conductor import Conductor
from .local import local_tensor
from .snapshot import Snapshot
from .stand_ins import StandIns, can_be_doubled, can_stand_aside
from .step import Batch, Step, check_gradient

Host = torch.optim.Optimizer


class Following:
    """Learns what hosts do in a step: from zeros in a parameter's stead where that is the same, else from a copy made before.

    Which way a parameter goes depends on nothing but the parameter, its host and the rules. So all its copies on other ranks go
    the same way, whatever those ranks hold beside it: the two round differently.

    per_lr: whether what they did is over lr. decays_at_once: whether a rule changes the parameters before the step is written.
    """

    def __init__(self, hosts: Sequence[Host], per_lr: bool, decays_at_once: bool) -> None:
        self._hosts, self._per_lr, self._decays_at_once = hosts, per_lr, decays_at_once
        self.forget()

    def forget(self) -> None:
        """Let go of all memory."""
        self._snapshot, self._stand_ins = Snapshot(), StandIns()
        self._aside: set[int] = set()

    def begin(self, conductor: Conductor) -> None:
        """Before the first host steps."""
        self._stand_ins.begin()
        doubled = {id(group) for host in self._hosts if self._doubles(host) for group in host.param_groups}
        indices = {index for index, group in enumerate(conductor.groups) if id(group) in doubled}
        playing = conductor.playing()
        self._aside = {
            position
            for position, entry in playing
            if entry.group in indices and can_stand_aside(local_tensor(entry.tensor), entry.tensor)
        }
        self._snapshot.take([(position, entry) for position, entry in playing if position not in self._aside])

    def _doubles(self, host: Host) -> bool:
        # A decay at once is undone from the copy if the step fails.
        return not self._decays_at_once and can_be_doubled(host)

    def double_of(self, host: Host) -> Host | None:
        """What steps instead of `host`, once its gradients have been shown; None if that is the host itself."""
        return self._stand_ins.double_of(host) if self._doubles(host) else None

    def show(self, host: Host, conductor: Conductor) -> None:
        """`host` steps now, and its gradients are there. Raises ValueError for sparse ones."""
        own = {id(group) for group in host.param_groups}
        indices = {index for index, group in enumerate(conductor.groups) if id(group) in own}
        moving = []
        for position, entry in conductor.playing():
            if entry.group in indices and (grad := entry.tensor.grad) is not None:
                check_gradient(entry.name, grad)
                if position in self._aside:
                    moving.append((position, entry.tensor, local_tensor(entry.tensor)))
        if self._doubles(host):
            self._stand_ins.show(host, moving)

    def take_back(self, host: Host) -> None:
        """`host` has stepped."""
        self._stand_ins.take_back(host)

    @contextmanager
    def adopted(self, step: Step) -> Iterator[None]:
        """What the hosts did is the pending update of `step`, which is written when the block has ended."""
        moved, copied = self._stand_ins.positions, self._snapshot.before
        aside: list[Batch] = [part for batch in step.batches if (part := batch.part(moved)).index]
        rest: list[Batch] = [part for batch in step.batches if (part := batch.part(copied)).index]
        step.batches = aside + rest
        with (
            self._stand_ins.adopted(aside, self._per_lr),
            self._snapshot.adopted(step, rest, self._per_lr, self._decays_at_once),
        ):
            yield
