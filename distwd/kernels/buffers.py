"""Tensors beside the parameters that are kept from step to step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .blocks import small_size
from .ordinary import ORDINARY

Kind = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]


class BufferPool:
    """Tensors like local parameters, by position; kept, since memory given out anew in every step costs more than what is written to it."""

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}
        self._kinds: dict[int, Kind] = {}

    def take(self, positions: Sequence[int], params: Sequence[Tensor]) -> list[Tensor]:
        """One for each of the local parameters at these positions; it holds what it held, or anything if it is new."""
        kinds = self._kinds
        missing = [place for place, param in enumerate(params) if kinds.get(positions[place]) != _kind(param)]
        for place, made in zip(missing, _like([params[place] for place in missing]), strict=True):
            self._kept[positions[place]], kinds[positions[place]] = made, _kind(params[place])
        return self.taken(positions)

    def taken(self, positions: Sequence[int]) -> list[Tensor]:
        """What was last taken for these positions."""
        return [self._kept[position] for position in positions]

    def holds(self, position: int, tensor: Tensor) -> bool:
        """Whether `tensor` itself was last taken for this position."""
        return self._kept.get(position) is tensor


def _kind(param: Tensor) -> Kind:
    """What a buffer has in common with its parameter; strides too, since fused kernels take elements as they lie in memory."""
    return param.shape, param.stride(), param.dtype, param.device


def _like(params: Sequence[Tensor]) -> list[Tensor]:
    """New tensors like `params`. On a CPU small ones lie one after the other, so that they can be joined without a copy (see joined.py)."""
    made: dict[int, Tensor] = {}
    rows = defaultdict[torch.dtype, list[int]](list)
    for place, param in enumerate(params):
        is_small = param.numel() <= small_size(param.device, few_operations=True)
        if is_small and type(param) in ORDINARY and param.device.type == "cpu" and param.is_contiguous():
            rows[param.dtype].append(place)
        else:
            made[place] = torch.empty_like(param, requires_grad=False)
    for dtype, places in rows.items():
        some = [params[place] for place in places]
        made.update(zip(places, _in_a_row(some, dtype), strict=True))
    return [made[place] for place in range(len(params))]


def _in_a_row(params: Sequence[Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
    """Tensors of one storage, but no views of one another: to autograd each is its own."""
    offset, memory = 0, torch.empty(sum(param.numel() for param in params), dtype=dtype).untyped_storage()
    for param in params:
        yield torch.empty(0, dtype=dtype).set_(memory, offset, param.shape, param.stride())
        offset += param.numel()
