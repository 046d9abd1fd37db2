"""Local partial sums of many tensors, in float64, without a copy of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..kernels.blocks import block_size, blocks, is_large, small_size
from ..kernels.compiled import TOGETHER, TRACED, compiled
from ..kernels.joined import can_be_joined, joined
from ..kernels.pull import difference
from ..kernels.scratch import Scratch
from .metric import ABS, COUNT, MAX, MIN, SQUARE, SUM, Moment

# A compiled sum reads a tensor in so many stretches at once: with one it waits for memory most of the time. (From eight on torch
# would take them for a dimension of a loop, and read one after the other.)
STRETCHES = 4


def wide_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 where the device has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def local_moments(
    tensors: Sequence[Tensor], moments: Iterable[Moment], scratch: Scratch | None = None, minus: Sequence[Tensor] = ()
) -> dict[Moment, Tensor]:
    """Each moment over all elements of `tensors` (one device), as a 0-d float64 tensor there.

    A NaN anywhere makes every moment NaN. Without elements a moment is its identity. scratch: where blocks are worked on.
    minus: measure the differences to these; empty: none.
    """
    scratch, ordered = scratch or Scratch(), _ordered(moments)
    parts: dict[Moment, list[Tensor]] = {moment: [] for moment in ordered}
    together = TOGETHER if scratch.compiles else 0
    measured = (tensors, minus) if minus else (tensors,)
    # A sum is a few operations; but what is large the compiler does in one.
    for _, lists in blocks(*measured, together=together, few_operations=not scratch.compiles):
        for values in _of_tensors(lists, ordered, scratch):
            for moment, value in zip(ordered, values, strict=True):
                parts[moment].append(value[0])
    device = tensors[0].device if tensors else torch.device("cpu")
    return {moment: combine(values or [identity(moment, device)], moment) for moment, values in parts.items()}


def moments_of_each(
    tensors: Sequence[Tensor], minus: Sequence[Tensor], moments: Iterable[Moment], scratch: Scratch
) -> dict[Moment, Tensor]:
    """`local_moments` of every single one of `tensors`, [tensors] each; they have one device and equally many elements, not none."""
    numel, device, ordered = tensors[0].numel(), tensors[0].device, _ordered(moments)
    found: dict[Moment, list[Tensor]] = {moment: [] for moment in ordered}
    if len(tensors) == 1 or numel > small_size(device, few_operations=not scratch.compiles):
        for number, tensor in enumerate(tensors):
            for moment, value in local_moments([tensor], ordered, scratch, minus[number : number + 1]).items():
                found[moment].append(value.view(1))
    else:
        rows = block_size(device) // numel
        for start in range(0, len(tensors), rows):
            some, less = tensors[start : start + rows], minus[start : start + rows]
            values = _of_block(some, less, moments=ordered, rows=len(some), scratch=scratch)
            for moment, value in zip(ordered, values, strict=True):
                found[moment].append(value)
    return {moment: torch.cat(values) for moment, values in found.items()}


def identity(moment: Moment, device: torch.device) -> Tensor:
    """What a rank without elements contributes, 0-d."""
    return torch.full((), moment.identity, dtype=wide_dtype(device), device=device)


def combine(values: list[Tensor], moment: Moment) -> Tensor:
    """One 0-d number out of several of the same moment."""
    if len(values) == 1:
        return values[0]
    return _combined(torch.stack(values), moment)


def _combined(values: Tensor, moment: Moment) -> Tensor:
    """The moment of all of which the last dimension holds the moments of parts."""
    if moment.is_sum:
        return values.sum(-1)
    return values.amax(-1) if moment == MAX else values.amin(-1)


def _ordered(moments: Iterable[Moment]) -> tuple[Moment, ...]:
    """The sum first: the others leave absolute values behind."""
    return tuple(sorted(moments, key=lambda moment: moment != SUM))


def _of_tensors(lists: Sequence[list[Tensor]], moments: tuple[Moment, ...], scratch: Scratch) -> Iterator[list[Tensor]]:
    """The moments of a block, [1] each; where they are compiled, those of what the stretches leave over come after them."""
    if not (scratch.compiles and is_large(lists[0])):
        yield _of_block(*lists, moments=moments, rows=1, scratch=scratch)
        return
    ends = [piece.numel() // STRETCHES * STRETCHES for piece in lists[0]]
    even = [[piece[:end] for piece, end in zip(pieces, ends, strict=True)] for pieces in lists]
    yield compiled(_traced, moments, len(ends))(*even)
    over = [[piece[end:] for piece, end in zip(pieces, ends, strict=True) if piece.numel() > end] for pieces in lists]
    if over[0]:
        yield _of_block(*over, moments=moments, rows=1, scratch=scratch)


def _traced(moments: tuple[Moment, ...], num: int, *lists: list[Tensor]) -> list[Tensor]:
    """The moments over `num` tensors (minus as many others, if there is a second list), each [1]."""
    each = [
        _of_block(*([one[place].view(STRETCHES, -1)] for one in lists), moments=moments, rows=1, scratch=TRACED)
        for place in range(num)
    ]
    return [
        _combined(torch.cat(rows), moment).view(1)
        for moment, rows in zip(moments, zip(*each, strict=True), strict=True)
    ]


def _of_block(
    pieces: Sequence[Tensor],
    minus: Sequence[Tensor] = (),
    *,
    moments: Sequence[Moment],
    rows: int,
    scratch: Scratch,
) -> list[Tensor]:
    """Each moment, [rows], of `pieces` (− minus); a row is equally many elements of them."""
    if minus:
        pieces = _differences(pieces, minus, scratch)
    signed = SUM in moments
    x = _widened(pieces, signed, scratch)
    if scratch is not TRACED:
        return [_of_row(x.view(rows, -1), moment, signed, scratch) for moment in moments]
    # Stretches beside each other: each element with those at its place in the others, and then along them.
    return [_combined(_of_row(x.view(1, STRETCHES, -1), moment, signed, scratch), moment) for moment in moments]


def _differences(new: Sequence[Tensor], old: Sequence[Tensor], scratch: Scratch) -> list[Tensor]:
    """new − old, of many small tensors as one."""
    if can_be_joined(new) and can_be_joined(old):  # both or none
        new, old = (
            [joined(some, use, scratch, some[0].dtype)[0]] for use, some in (("joined new", new), ("joined old", old))
        )
    return difference(list(new), list(old), scratch)


def _widened(pieces: Sequence[Tensor], signed: bool, scratch: Scratch) -> Tensor:
    """All elements of `pieces` in float64, flat: squares and powers taken in float32 would overflow, vanish, and round.

    signed: as they are; else their absolute values, taken where that costs least.
    """
    if len(pieces) == 1:
        return _one_widened(pieces[0], signed, scratch)
    dtype, wide = pieces[0].dtype, wide_dtype(pieces[0].device)
    # torch joins many tensors fast only where it need not convert them.
    dtype = dtype if all(piece.dtype == dtype for piece in pieces) else wide
    flat, is_own = joined(pieces, "narrow", scratch, dtype)
    if is_own:
        return _one_widened(flat, signed, scratch)
    if not signed:
        flat.abs_()
    return flat if dtype == wide else scratch.copies("float64", [flat], wide)[0]


def _one_widened(piece: Tensor, signed: bool, scratch: Scratch) -> Tensor:
    wide = wide_dtype(piece.device)
    if signed:
        return scratch.copies("float64", [piece], wide)[0]
    if scratch is TRACED:  # a compiled loop has half as many float32 as float64 to take the absolute value of
        return scratch.copies("float64", scratch.make("abs", "narrow", [piece]), wide)[0]
    return scratch.copies("float64", [piece], wide)[0].abs_()


def _of_row(x: Tensor, moment: Moment, signed: bool, scratch: Scratch) -> Tensor:
    """The moment of each row, [rows]; leaves anything in `x`. signed: whether `x` is not absolute values already."""
    if moment == SUM:
        return x.sum(1)
    if moment == SQUARE:
        # Not by `dot`, which adds up as it comes: `sum` goes by halves, and a variance needs its digits.
        return scratch.make("mul", "power", [x], x)[0].sum(1)
    if moment == COUNT:
        # A NaN is not zero; adding 0·(Σx − Σx) would hide infinities, so it is asked for by name.
        return torch.where(x.isnan().any(1), torch.nan, torch.count_nonzero(x, 1).to(x.dtype))
    if signed:
        x.abs_()
    if moment == ABS:
        return x.sum(1)
    if moment in (MAX, MIN):
        return x.amax(1) if moment == MAX else x.amin(1)
    return scratch.make("pow", "power", [x], moment.p)[0].sum(1)
