"""Work on many tensors in pieces that stay in the cache, so that temporaries are small and memory is read once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# Elements in a block. On a CPU, what several operations in a row touch should stay in the cache; but every operation ends
# in a barrier of all threads, so a block grows with them. On a GPU a block should be large enough that launches do not
# count, and small enough that its temporaries do not either.
_CPU_BLOCK = 1 << 17  # for each thread
_CPU_LEAST = 1 << 18  # in all
_CPU_CACHE = 1 << 21  # bytes of a core's second-level cache that hold the block of a thread and its float64 copy
_CPU_MOST = 1 << 21
_GPU_BLOCK = 1 << 22

# Larger tensors come alone on a CPU: there a list saves no launches, only the overhead of small operations. Where only a few
# operations are made, that overhead counts for more than what is in the cache, up to a larger size.
_CPU_SMALL = 1 << 15
_CPU_SMALL_FOR_FEW = 1 << 16


def block_size(device: torch.device) -> int:
    """The number of elements worked on at a time on `device`, at most."""
    if device.type != "cpu":
        return _GPU_BLOCK
    return min(max(_CPU_BLOCK * torch.get_num_threads(), _cpu_least()), _CPU_MOST)


def _cpu_least() -> int:
    """Smaller only where a core's cache holds it; elsewhere the calls of smaller blocks cost more than they save."""
    known: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # an older torch does not tell
    return _CPU_BLOCK if known.get("l2_cache_size", 0) >= _CPU_CACHE else _CPU_LEAST


def small_size(device: torch.device, few_operations: bool = False) -> int:
    """Up to how many elements a tensor shares a block with others; few_operations: where these are all there is to do with it."""
    if device.type != "cpu":
        return _GPU_BLOCK
    return _CPU_SMALL_FOR_FEW if few_operations else _CPU_SMALL


def is_large(pieces: Sequence[Tensor]) -> bool:
    """Whether a block is a flat stretch of a large tensor, or several whole ones."""
    return pieces[0].dim() == 1 and pieces[0].numel() > small_size(pieces[0].device)


Block = tuple[list[int], tuple[list[Tensor], ...]]


def blocks(*lists: Sequence[Tensor], together: int = 0, few_operations: bool = False) -> Iterator[Block]:
    """Cut equally long lists of equally shaped tensors alike; yields (places in the lists, lists of pieces).

    Large tensors come in flat slices, small ones together, empty ones not at all. The pieces are views: writing
    to them writes to the tensors. A tensor that is not contiguous comes as it is.
    together: large tensors come that many at a time, uncut but for a few, so that it comes out even; one by one where that would
    make small ones of them. 0: cut.
    few_operations: as in `small_size`.
    """
    device = lists[0][0].device if lists[0] else torch.device("cpu")
    size, small = block_size(device), small_size(device, few_operations)
    places: list[int] = []
    filled = 0
    uncut: list[Block] = []
    for place, tensors in enumerate(zip(*lists, strict=True)):
        numel = tensors[0].numel()
        if numel > small:
            if together and all(tensor.is_contiguous() for tensor in tensors):
                uncut.append(([place], tuple([tensor.view(-1)] for tensor in tensors)))
            else:
                yield from _slices(place, tensors, size)
        elif numel:
            if filled + numel > size:
                yield places, _chosen(lists, places)
                places, filled = [], 0
            places.append(place)
            filled += numel
    if places:
        yield places, _chosen(lists, places)
    while uncut:
        some, uncut = _divided(uncut[:together], together, small), uncut[together:]
        if len(some) == together:
            yield _merged(some)
        else:
            yield from some


def _divided(some: list[Block], number: int, small: int) -> list[Block]:
    """Blocks of one flat piece each, the largest halved until there are `number`; as they are if that makes small ones."""
    parts = list(some)
    while len(parts) < number:
        largest = max(range(len(parts)), key=lambda index: parts[index][1][0][0].numel())
        place, lists = parts[largest]
        half = lists[0][0].numel() // 128 * 64  # whole vectors
        if half <= small:
            return some
        parts[largest : largest + 1] = [
            (place, tuple([piece[where] for piece in pieces] for pieces in lists))
            for where in (slice(half), slice(half, None))
        ]
    return parts


def _merged(some: Sequence[Block]) -> Block:
    """One block of several."""
    places = [place for own, _ in some for place in own]
    return places, tuple(
        [piece for pieces in one for piece in pieces] for one in zip(*(lists for _, lists in some), strict=True)
    )


def _chosen(lists: tuple[Sequence[Tensor], ...], places: list[int]) -> tuple[list[Tensor], ...]:
    return tuple([tensors[place] for place in places] for tensors in lists)


def _slices(place: int, tensors: tuple[Tensor, ...], size: int) -> Iterator[Block]:
    if not all(tensor.is_contiguous() for tensor in tensors):
        yield [place], tuple([tensor] for tensor in tensors)
        return
    for parts in zip(*(tensor.view(-1).split(size) for tensor in tensors), strict=True):
        yield [place], tuple([part] for part in parts)
