"""Local partial sums of many tensors, in float64, without a copy of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..kernels.blocks import block_size, blocks, small_size
from ..kernels.scratch import Scratch
from .metric import ABS, COUNT, MAX, MIN, SQUARE, SUM, Moment


def wide_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 where the device has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def local_moments(
    tensors: Sequence[Tensor], moments: Iterable[Moment], scratch: Scratch | None = None
) -> dict[Moment, Tensor]:
    """Each moment over all elements of `tensors` (one device), as a 0-d float64 tensor there.

    A NaN anywhere makes every moment NaN. Without elements a moment is its identity. scratch: where blocks are worked on.
    """
    scratch = scratch or Scratch()
    parts: dict[Moment, list[Tensor]] = {moment: [] for moment in moments}
    for _, (pieces,) in blocks(tensors):
        for moment, (value,) in _of_rows(_widened(pieces, scratch).view(1, -1), parts, scratch).items():
            parts[moment].append(value)
    device = tensors[0].device if tensors else torch.device("cpu")
    return {moment: combine(values or [identity(moment, device)], moment) for moment, values in parts.items()}


def moments_of_each(
    tensors: Sequence[Tensor], moments: Iterable[Moment], scratch: Scratch
) -> list[dict[Moment, Tensor]]:
    """`local_moments` of every single one of `tensors`, which have one device and equally many elements, not none."""
    numel, device = tensors[0].numel(), tensors[0].device
    if len(tensors) == 1 or numel > small_size(device):
        return [local_moments([tensor], moments, scratch) for tensor in tensors]
    found: list[dict[Moment, Tensor]] = []
    rows = block_size(device) // numel
    for start in range(0, len(tensors), rows):
        some = tensors[start : start + rows]
        values = _of_rows(_widened(some, scratch).view(len(some), numel), moments, scratch)
        found += [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
    return found


def identity(moment: Moment, device: torch.device) -> Tensor:
    """What a rank without elements contributes, 0-d."""
    return torch.full((), moment.identity, dtype=wide_dtype(device), device=device)


def combine(values: list[Tensor], moment: Moment) -> Tensor:
    """One 0-d number out of several of the same moment."""
    if len(values) == 1:
        return values[0]
    stacked = torch.stack(values)
    if moment.is_sum:
        return stacked.sum()
    return stacked.amax() if moment == MAX else stacked.amin()


def _widened(pieces: Sequence[Tensor], scratch: Scratch) -> Tensor:
    """All elements of `pieces` in float64, flat: squares and powers taken in float32 would overflow, vanish, and round."""
    numel, device, dtype = sum(piece.numel() for piece in pieces), pieces[0].device, pieces[0].dtype
    wide = scratch.take("wide", numel, device, wide_dtype(device))
    if len(pieces) == 1:
        wide.view(pieces[0].shape).copy_(pieces[0])
        return wide
    # torch joins many tensors fast only where it need not convert them.
    one_dtype = all(piece.dtype == dtype for piece in pieces)
    narrow = scratch.take("narrow", numel, device, dtype) if one_dtype else wide
    torch.cat([piece.reshape(-1) for piece in pieces], out=narrow)
    return wide.copy_(narrow)


def _of_rows(x: Tensor, moments: Iterable[Moment], scratch: Scratch) -> dict[Moment, Sequence[Tensor]]:
    """Moments of each row of a block; leaves anything in it."""
    # The sum first: the others may leave absolute values behind.
    wanted = sorted(moments, key=lambda moment: moment != SUM)
    return {moment: _of_row(x, moment, scratch).unbind() for moment in wanted}


def _of_row(x: Tensor, moment: Moment, scratch: Scratch) -> Tensor:
    if moment == SUM:
        return x.sum(1)
    if moment == SQUARE:
        # Not by `dot`, which adds up as it comes: `sum` goes by halves, and a variance needs its digits.
        return scratch.make("mul", "power", [x], x)[0].sum(1)
    if moment == COUNT:
        # A NaN is not zero; adding 0·(Σx − Σx) would hide infinities, so it is asked for by name.
        return torch.where(x.isnan().any(1), torch.nan, torch.count_nonzero(x, 1).to(x.dtype))
    x.abs_()
    if moment == ABS:
        return x.sum(1)
    if moment in (MAX, MIN):
        return x.amax(1) if moment == MAX else x.amin(1)
    return scratch.make("pow", "power", [x], moment.p)[0].sum(1)
