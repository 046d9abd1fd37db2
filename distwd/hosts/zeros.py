"""Zeros for an optimizer to step in the parameters' stead: what they become is −lr·update."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.blocks import small_size


class Zeros:
    """Buffers like local parameters, by position; kept, since a buffer made anew costs more than clearing one.

    They are cleared where the step is written, while a block is in the cache; what was not is cleared when it is taken.
    """

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}
        self._kinds: dict[int, Kind] = {}
        self._clean: set[int] = set()

    def take(self, positions: Sequence[int], params: Sequence[Tensor]) -> list[Tensor]:
        """Zeros in the shape of the local parameters at these positions, to be written to."""
        kinds = self._kinds
        missing = [place for place, param in enumerate(params) if kinds.get(positions[place]) != _kind(param)]
        for place, made in zip(missing, _like([params[place] for place in missing]), strict=True):
            position = positions[place]
            self._kept[position], kinds[position] = made, _kind(params[place])
            self._clean.discard(position)
        zeros = self.taken(positions)
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


def _like(params: Sequence[Tensor]) -> list[Tensor]:
    """New tensors like `params`. Small ones lie one after the other, so that they can be joined without a copy (see joined.py)."""
    made: dict[int, Tensor] = {}
    small = defaultdict[Any, list[int]](list)
    for place, param in enumerate(params):
        if param.numel() <= small_size(param.device) and param.is_contiguous():
            small[param.device, param.dtype].append(place)
        else:
            made[place] = torch.empty_like(param, requires_grad=False)
    for (device, dtype), places in small.items():
        sizes = [params[place].numel() for place in places]
        parts = torch.empty(sum(sizes), device=device, dtype=dtype).split(sizes)
        made.update((place, part.view(params[place].shape)) for place, part in zip(places, parts, strict=True))
    return [made[place] for place in range(len(params))]


Kind = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]


def _kind(param: Tensor) -> Kind:
    """What zeros must have in common with a parameter; strides too, since fused kernels take elements as they lie in memory."""
    return param.shape, param.stride(), param.dtype, param.device
