"""Work on many tensors in pieces that stay in the cache, so that temporaries are small and memory is read once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Elements in a block. On a CPU, what several operations in a row touch should fit into the second-level cache; on a GPU a
# block should be large enough that launches do not count, and small enough that its temporaries do not either.
_CPU_BLOCK = 1 << 17
_GPU_BLOCK = 1 << 22


def block_size(device: torch.device) -> int:
    """The number of elements worked on at a time on `device`."""
    return _CPU_BLOCK if device.type == "cpu" else _GPU_BLOCK


def blocks(*lists: Sequence[Tensor]) -> Iterator[tuple[list[int], tuple[list[Tensor], ...]]]:
    """Cut equally long lists of equally shaped tensors alike; yields (places in the lists, lists of pieces).

    Large tensors come in flat slices, small ones together, empty ones not at all. The pieces are views: writing to them
    writes to the tensors. A tensor that is not contiguous comes whole.
    """
    size = block_size(lists[0][0].device) if lists[0] else 0
    places: list[int] = []
    filled = 0
    for place, tensors in enumerate(zip(*lists, strict=True)):
        numel = tensors[0].numel()
        if numel > size and all(tensor.is_contiguous() for tensor in tensors):
            yield from _slices(place, tensors, size)
        elif numel:
            places.append(place)
            filled += numel
            if filled >= size:
                yield places, tuple([tensors[i] for i in places] for tensors in lists)
                places, filled = [], 0
    if places:
        yield places, tuple([tensors[i] for i in places] for tensors in lists)


def _slices(place: int, tensors: tuple[Tensor, ...], size: int) -> Iterator[tuple[list[int], tuple[list[Tensor], ...]]]:
    for parts in zip(*(tensor.view(-1).split(size) for tensor in tensors), strict=True):
        yield [place], tuple([part] for part in parts)
