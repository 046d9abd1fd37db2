"""Decay that has to wait until its hosts have stepped, since it looks at what they did."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from ..kernels.formulas import Rate
from ..sharding.local import local_tensor
from ..sharding.params import NamedParam
from ..step.runner import StepRunner
from ..step.step import Batch, Step, check_gradient
from .snapshot import SnapshotCapture
from .zero_proxy import ZeroProxyCapture, can_be_doubled, can_stand_aside

InnerOptimizer = torch.optim.Optimizer


class UpdateCapture:
    """Learns what hosts do in a step: from zeros in a parameter's stead where that is the same, else from a copy made before.

    Which way a parameter goes depends on nothing but the parameter, its host and the rules. So all its copies on other ranks go
    the same way, whatever those ranks hold beside it: the two round differently.

    per_lr: whether what they did is over lr. decays_at_once: whether a rule changes the parameters before the step is written.
    waits: whether the decay of one host waits for the others. Until then its step is to be seen, and its lr may change.
    """

    def __init__(self, per_lr: bool, decays_at_once: bool, waits: bool) -> None:
        self._per_lr, self._decays_at_once, self._waits = per_lr, decays_at_once, waits
        self.forget()

    def forget(self) -> None:
        """Let go of all memory."""
        self._snapshot, self._stand_ins = SnapshotCapture(), ZeroProxyCapture()
        self._aside: set[int] = set()
        self._lrs: dict[int, Rate] = {}

    def begin(self, hosts: Sequence[InnerOptimizer], conductor: StepRunner) -> None:
        """Before the first of these hosts steps, which will step together."""
        self._stand_ins.begin()
        self._aside, self._lrs = set(), {}
        copied = []
        for host in hosts:
            is_doubled = self._is_doubled(host)
            for position, entry in _playing(host, conductor):
                if is_doubled and can_stand_aside(local_tensor(entry.tensor)):
                    self._aside.add(position)
                else:
                    copied.append((position, entry))
        self._snapshot.take(copied)

    def _is_doubled(self, host: InnerOptimizer) -> bool:
        # A decay at once is undone from the copy if the step fails.
        return not self._decays_at_once and not self._waits and can_be_doubled(host)

    def double_of(self, host: InnerOptimizer) -> InnerOptimizer | None:
        """What steps instead of `host`, once its gradients have been shown; None if that is the host itself."""
        return self._stand_ins.double_of(host) if self._is_doubled(host) else None

    def show(self, host: InnerOptimizer, conductor: StepRunner) -> None:
        """`host` steps now, and its gradients are there. Raises ValueError for sparse ones."""
        moving = []
        for position, entry in _playing(host, conductor):
            if (grad := entry.tensor.grad) is not None:
                check_gradient(entry.name, grad)
                if position in self._aside:
                    moving.append((position, entry.tensor, local_tensor(entry.tensor)))
        if self._is_doubled(host):
            self._stand_ins.show(host, moving)
        for group in host.param_groups if self._waits else ():
            if (lr := group.get("lr")) is not None:
                self._lrs[id(group)] = lr.clone() if isinstance(lr, torch.Tensor) else lr

    def take_back(self, host: InnerOptimizer, stepped: InnerOptimizer) -> None:
        """`host` has stepped, or what has `stepped` for it. Raises ValueError if that is not its double, and it has one."""
        if self._is_doubled(host):
            self._stand_ins.take_back(host, stepped)

    @contextmanager
    def adopted(self, step: Step) -> Iterator[None]:
        """What the hosts did is the pending update of `step`, which is written when the block has ended."""
        for batch in step.batches:
            if id(batch.group) in self._lrs:
                batch.group = {**batch.group, "lr": self._lrs[id(batch.group)]}
        moved, copied = self._stand_ins.positions, self._snapshot.before
        aside: list[Batch] = [part for batch in step.batches if (part := batch.part(moved)).index]
        rest: list[Batch] = [part for batch in step.batches if (part := batch.part(copied)).index]
        step.batches = aside + rest
        with (
            self._stand_ins.adopted(aside, self._per_lr),
            self._snapshot.adopted(step, rest, self._per_lr, self._decays_at_once),
        ):
            yield


def _playing(host: InnerOptimizer, conductor: StepRunner) -> Iterator[tuple[int, NamedParam]]:
    """The parameters of a host that are shown now, with their positions among all."""
    own = set(map(id, host.param_groups))
    indices = {index for index, group in enumerate(conductor.groups) if id(group) in own}
    return ((position, entry) for position, entry in conductor.playing() if entry.group in indices)
