"""Local partial sums of many tensors, in float64, without a copy of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..kernels.blocks import blocks
from .metric import ABS, COUNT, MAX, MIN, SQUARE, SUM, Moment


def wide_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 where the device has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def local_moments(tensors: Sequence[Tensor], moments: Iterable[Moment]) -> dict[Moment, Tensor]:
    """Each moment over all elements of `tensors` (one device), as a 0-d float64 tensor there.

    A NaN anywhere makes every moment NaN. Without elements a moment is its identity.
    """
    wanted = tuple(moments)
    parts: dict[Moment, list[Tensor]] = {moment: [] for moment in wanted}
    for _, (pieces,) in blocks(tensors):
        x = pieces[0].reshape(-1) if len(pieces) == 1 else torch.cat([piece.reshape(-1) for piece in pieces])
        for moment in wanted:
            parts[moment].append(_of_block(x, moment))
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


def _of_block(x: Tensor, moment: Moment) -> Tensor:
    wide = wide_dtype(x.device)
    if moment == ABS:
        return x.abs().sum(dtype=wide)
    if moment == SUM:
        return x.sum(dtype=wide)
    if moment == MAX:
        return x.abs().amax().to(wide)
    if moment == MIN:
        return x.abs().amin().to(wide)
    if moment == COUNT:
        # A NaN is not zero; adding 0·(Σx − Σx) would hide infinities, so it is asked for by name.
        return torch.where(x.isnan().any(), torch.nan, torch.count_nonzero(x).to(wide))
    # Squares and powers are taken in float64: in float32 they would overflow, vanish, and round.
    y = x.to(wide)
    return torch.mul(y, y).sum() if moment == SQUARE else y.abs().pow_(moment.p).sum()
