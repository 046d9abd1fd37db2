"""Zeros for an optimizer to step in the parameters' stead: what they become is −lr·update."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Zeros:
    """Buffers like local parameters, by position; kept, since a buffer made anew costs more than clearing one.

    They are cleared where the step is written, while a block is in the cache; what was not is cleared when it is taken.
    """

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}
        self._strides: dict[
            int, tuple[int, ...]
        ] = {}  # of the parameters: fused kernels take elements as they lie in memory
        self._clean: set[int] = set()

    def take(self, positions: Sequence[int], params: Sequence[Tensor]) -> list[Tensor]:
        """Zeros in the shape of the local parameters at these positions, to be written to."""
        zeros = []
        for position, param in zip(positions, params, strict=True):
            kept = self._kept.get(position)
            if kept is None or not _is_like(kept, param) or self._strides[position] != param.stride():
                kept = self._kept[position] = torch.empty_like(param, requires_grad=False)
                self._strides[position] = param.stride()
                self._clean.discard(position)
            zeros.append(kept)
        if dirty := [zero for position, zero in zip(positions, zeros, strict=True) if position not in self._clean]:
            torch._foreach_zero_(dirty)
        self._clean.difference_update(positions)
        return zeros

    def taken(self, positions: Sequence[int]) -> list[Tensor]:
        """What was last taken for these positions."""
        return [self._kept[position] for position in positions]

    def cleared(self, positions: Sequence[int], tensors: Sequence[Tensor]) -> None:
        """Learn that `tensors` hold zeros, if they are those that were taken for the parameters at these positions."""
        self._clean.update(p for p, tensor in zip(positions, tensors, strict=True) if tensor is self._kept.get(p))


def _is_like(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
