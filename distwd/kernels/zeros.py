"""Zeros for an optimizer to step in the parameters' stead: what they become is −lr·update."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .buffers import BufferPool


class ZeroPool:
    """Buffers like local parameters, by position, that hold zeros when they are taken.

    They are cleared where the step is written, while a block is in the cache; what was not is cleared when it is taken.
    """

    def __init__(self) -> None:
        self._buffers = BufferPool()
        self._clean: dict[int, Tensor] = {}

    def take(self, positions: Sequence[int], params: Sequence[Tensor]) -> list[Tensor]:
        """Zeros in the shape of the local parameters at these positions, to be written to."""
        zeros = self._buffers.take(positions, params)
        clean = [self._clean.pop(position, None) for position in positions]
        if dirty := [zero for zero, known in zip(zeros, clean, strict=True) if zero is not known]:
            torch._foreach_zero_(dirty)
        return zeros

    def taken(self, positions: Sequence[int]) -> list[Tensor]:
        """What was last taken for these positions."""
        return self._buffers.taken(positions)

    def cleared(self, positions: Sequence[int], tensors: Sequence[Tensor]) -> None:
        """Learn that `tensors` hold zeros; only those count that were taken for the parameters at these positions."""
        known = zip(positions, tensors, strict=True)
        self._clean.update((position, tensor) for position, tensor in known if self._buffers.holds(position, tensor))
