"""Decay that has to wait until its hosts have stepped, since it looks at what they did."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from .conductor import Conductor
from .snapshot import Snapshot
from .stand_ins import StandIns
from .step import Step


class Following:
    """Learns what hosts do in a step: from zeros in the parameters' stead where that is the same, else from a copy made before.

    per_lr: whether what they did is over lr. decays_at_once: whether a rule changes the parameters before the step is written.
    """

    def __init__(self, hosts: Sequence[torch.optim.Optimizer], per_lr: bool, decays_at_once: bool) -> None:
        self._hosts, self._per_lr, self._decays_at_once = hosts, per_lr, decays_at_once
        self._snapshot, self._stand_ins = Snapshot(), StandIns()
        self._on_zeros = False

    def begin(self, conductor: Conductor) -> None:
        """Before the first host steps."""
        # Of several hosts, one may look at what another has done; and a decay at once is undone from the copy if the step fails.
        self._on_zeros = len(self._hosts) == 1 and not self._decays_at_once
        self._on_zeros = self._on_zeros and self._stand_ins.can_serve(self._hosts[0], conductor.entries)
        if not self._on_zeros:
            self._snapshot.take(conductor.playing())

    def show(self, host: torch.optim.Optimizer, conductor: Conductor) -> None:
        """`host` steps now; a closure has been evaluated before, on the parameters."""
        if self._on_zeros:
            self._stand_ins.show(host, conductor.playing())

    def take_back(self, stepped: bool) -> None:
        """See `StandIns.take_back`."""
        self._stand_ins.take_back(stepped)

    @contextmanager
    def adopted(self, step: Step) -> Iterator[None]:
        """What the hosts did is the pending update of `step`, which is written when the block has ended."""
        if self._on_zeros:
            way = self._stand_ins.adopted(step, self._per_lr)
        else:
            way = self._snapshot.adopted(step, self._per_lr, self._decays_at_once)
        with way:
            yield
