"""Local partial sums of many tensors, in float64, without a copy of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..kernels.blocks import blocks
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
    # The sum first: the others may leave absolute values behind.
    wanted = sorted(moments, key=lambda moment: moment != SUM)
    scratch = scratch or Scratch()
    parts: dict[Moment, list[Tensor]] = {moment: [] for moment in wanted}
    for _, (pieces,) in blocks(tensors):
        wide = _widened(pieces, scratch)
        for moment in wanted:
            parts[moment].append(_of_block(wide, moment, scratch))
    device = tensors[0].device if tensors else torch.device("cpu")
    return {moment: combine(values or [identity(moment, device)], moment) for moment, values in parts.items()}


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


def _widened(pieces: list[Tensor], scratch: Scratch) -> Tensor:
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


def _of_block(x: Tensor, moment: Moment, scratch: Scratch) -> Tensor:
    """A moment of one block; may leave |x| in `x`."""
    if moment == SUM:
        return x.sum()
    if moment == SQUARE:
        # Not by `dot`, which adds up as it comes: `sum` goes by halves, and a variance needs its digits.
        return scratch.make("mul", "power", [x], x)[0].sum()
    if moment == COUNT:
        # A NaN is not zero; adding 0·(Σx − Σx) would hide infinities, so it is asked for by name.
        return torch.where(x.isnan().any(), torch.nan, torch.count_nonzero(x).to(x.dtype))
    x.abs_()
    if moment == ABS:
        return x.sum()
    if moment in (MAX, MIN):
        return x.amax() if moment == MAX else x.amin()
    return scratch.make("pow", "power", [x], moment.p)[0].sum()
