"""The parameters as they were before their hosts stepped, and what the hosts did: the difference."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..kernels.apply import apply_from_
from ..kernels.buffers import BufferPool
from ..sharding.local import local_tensor
from ..sharding.params import NamedParam
from ..step.step import Batch, Step


class SnapshotCapture:
    """The local parameters as they were before a host stepped: right for every host."""

    def __init__(self) -> None:
        self.before: dict[int, Tensor] = {}
        self._buffers = BufferPool()

    def take(self, entries: Iterable[tuple[int, NamedParam]]) -> None:
        """Copy the parameters of these (position, entry) pairs, into the buffers of earlier snapshots where they fit."""
        found = [(position, local_tensor(entry.tensor)) for position, entry in entries]
        positions, locals_ = [position for position, _ in found], [local for _, local in found]
        copies = self._buffers.take(positions, locals_)
        self.before = dict(zip(positions, copies, strict=True))
        alike: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        for copy, local in zip(copies, locals_, strict=True):
            olds, news = alike.setdefault((local.device, local.dtype), ([], []))
            olds.append(copy)
            news.append(local)
        for olds, news in alike.values():
            torch._foreach_copy_(olds, news)

    @contextmanager
    def adopted(self, step: Step, batches: Sequence[Batch], per_lr: bool, decayed_at_once: bool) -> Iterator[None]:
        """Make these batches of `step` ones before the host's: their parameters the old ones, the update what it did (over lr, if asked).

        When the block has ended, its pulls, which are of the old parameters, are written to the new ones. decayed_at_once: a rule
        changes the old parameters themselves; then the whole step is written to those instead. Where the decay fails, as when
        another rank has died, the host's step is undone.
        """
        try:
            step.old = self.before
            moved_to = self._rewind(batches, per_lr)
            yield
            _write(batches, moved_to, decayed_at_once)
        except Exception:
            for position, old in self.before.items():
                local_tensor(step.entries[position].tensor).copy_(old)
            raise

    def _rewind(self, batches: Sequence[Batch], per_lr: bool) -> list[list[Tensor]]:
        """Returns the parameters as they are now, by batch."""
        moved_to = []
        for batch in batches:
            moved_to.append(batch.params)
            batch.params = [self.before[position] for position in batch.index]
            # new − old is −update. It is left to whoever needs it, a block at a time.
            batch.update, batch.minus, batch.owns_update, batch.flipped = moved_to[-1], batch.params, False, True
            batch.ahead = batch.group["lr"] if per_lr else None
        return moved_to


def _write(batches: Sequence[Batch], moved_to: Sequence[list[Tensor]], decayed_at_once: bool) -> None:
    for batch, params in zip(batches, moved_to, strict=True):
        if batch.absorbed or decayed_at_once:
            batch.apply_(batch.terms, batch.update, batch.signed_scale)
            torch._foreach_copy_(params, batch.params)
        else:
            apply_from_(
                params,
                batch.params,
                batch.terms,
                batch.mask,
                workspace=batch.workspace,
                random_bits=batch.random_bits,
                tally=batch.tally,
            )
