"""Local partial sums of many tensors, in float64, without a copy of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..metrics.metric import ABS, COUNT, MAX, MIN, SQUARE, SUM, Statistic
from .blocks import block_size, blocks, is_large, small_size
from .compile import TOGETHER, TRACED, compiled
from .formulas import difference
from .joined import can_be_joined, joined
from .workspace import Workspace

# A compiled sum reads a tensor in so many stretches at once: with one it waits for memory most of the time. (From eight on torch
# would take them for a dimension of a loop, and read one after the other.)
STRETCHES = 4


def wide_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 where the device has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def local_statistics(
    tensors: Sequence[Tensor],
    statistics: Iterable[Statistic],
    workspace: Workspace | None = None,
    minus: Sequence[Tensor] = (),
) -> dict[Statistic, Tensor]:
    """Each moment over all elements of `tensors` (one device), as a 0-d float64 tensor there.

    A NaN anywhere makes every moment NaN. Without elements a moment is its identity. scratch: where blocks are worked on.
    minus: measure the differences to these; empty: none.
    """
    workspace, ordered = workspace or Workspace(), _ordered(statistics)
    parts: dict[Statistic, list[Tensor]] = {statistic: [] for statistic in ordered}
    together = TOGETHER if workspace.compiles else 0
    measured = (tensors, minus) if minus else (tensors,)
    # A sum is a few operations; but what is large the compiler does in one.
    for _, lists in blocks(*measured, together=together, few_operations=not workspace.compiles):
        for values in _of_tensors(lists, ordered, workspace):
            for statistic, value in zip(ordered, values, strict=True):
                parts[statistic].append(value[0])
    device = tensors[0].device if tensors else torch.device("cpu")
    return {
        statistic: combine(values or [identity(statistic, device)], statistic) for statistic, values in parts.items()
    }


def statistics_of_each(
    tensors: Sequence[Tensor], minus: Sequence[Tensor], statistics: Iterable[Statistic], workspace: Workspace
) -> dict[Statistic, Tensor]:
    """`local_moments` of every single one of `tensors`, [tensors] each; they have one device and equally many elements, not none."""
    numel, device, ordered = tensors[0].numel(), tensors[0].device, _ordered(statistics)
    found: dict[Statistic, list[Tensor]] = {statistic: [] for statistic in ordered}
    if len(tensors) == 1 or numel > small_size(device, few_operations=not workspace.compiles):
        for number, tensor in enumerate(tensors):
            for statistic, value in local_statistics([tensor], ordered, workspace, minus[number : number + 1]).items():
                found[statistic].append(value.view(1))
    else:
        rows = block_size(device) // numel
        for start in range(0, len(tensors), rows):
            some, less = tensors[start : start + rows], minus[start : start + rows]
            values = _of_block(some, less, statistics=ordered, rows=len(some), workspace=workspace)
            for statistic, value in zip(ordered, values, strict=True):
                found[statistic].append(value)
    return {statistic: torch.cat(values) for statistic, values in found.items()}


def identity(statistic: Statistic, device: torch.device) -> Tensor:
    """What a rank without elements contributes, 0-d."""
    return torch.full((), statistic.identity, dtype=wide_dtype(device), device=device)


def combine(values: list[Tensor], statistic: Statistic) -> Tensor:
    """One 0-d number out of several of the same moment."""
    if len(values) == 1:
        return values[0]
    return _combined(torch.stack(values), statistic)


def _combined(values: Tensor, statistic: Statistic) -> Tensor:
    """The moment of all of which the last dimension holds the moments of parts."""
    if statistic.is_sum:
        return values.sum(-1)
    return values.amax(-1) if statistic == MAX else values.amin(-1)


def _ordered(statistics: Iterable[Statistic]) -> tuple[Statistic, ...]:
    """The sum first: the others leave absolute values behind."""
    return tuple(sorted(statistics, key=lambda statistic: statistic != SUM))


def _of_tensors(
    lists: Sequence[list[Tensor]], statistics: tuple[Statistic, ...], workspace: Workspace
) -> Iterator[list[Tensor]]:
    """The moments of a block, [1] each; where they are compiled, those of what the stretches leave over come after them."""
    if not (workspace.compiles and is_large(lists[0])):
        yield _of_block(*lists, statistics=statistics, rows=1, workspace=workspace)
        return
    ends = [piece.numel() // STRETCHES * STRETCHES for piece in lists[0]]
    even = [[piece[:end] for piece, end in zip(pieces, ends, strict=True)] for pieces in lists]
    yield compiled(_traced, statistics, len(ends))(*even)
    over = [[piece[end:] for piece, end in zip(pieces, ends, strict=True) if piece.numel() > end] for pieces in lists]
    if over[0]:
        yield _of_block(*over, statistics=statistics, rows=1, workspace=workspace)


def _traced(statistics: tuple[Statistic, ...], num: int, *lists: list[Tensor]) -> list[Tensor]:
    """The moments over `num` tensors (minus as many others, if there is a second list), each [1]."""
    each = [
        _of_block(*([one[place].view(STRETCHES, -1)] for one in lists), statistics=statistics, rows=1, workspace=TRACED)
        for place in range(num)
    ]
    return [
        _combined(torch.cat(rows), statistic).view(1)
        for statistic, rows in zip(statistics, zip(*each, strict=True), strict=True)
    ]


def _of_block(
    pieces: Sequence[Tensor],
    minus: Sequence[Tensor] = (),
    *,
    statistics: Sequence[Statistic],
    rows: int,
    workspace: Workspace,
) -> list[Tensor]:
    """Each moment, [rows], of `pieces` (− minus); a row is equally many elements of them."""
    if minus:
        pieces = _differences(pieces, minus, workspace)
    signed = SUM in statistics
    x = _widened(pieces, signed, workspace)
    if workspace is not TRACED:
        return [_of_row(x.view(rows, -1), statistic, signed, workspace) for statistic in statistics]
    # Stretches beside each other: each element with those at its place in the others, and then along them.
    return [
        _combined(_of_row(x.view(1, STRETCHES, -1), statistic, signed, workspace), statistic)
        for statistic in statistics
    ]


def _differences(new: Sequence[Tensor], old: Sequence[Tensor], workspace: Workspace) -> list[Tensor]:
    """new − old, of many small tensors as one."""
    if can_be_joined(new) and can_be_joined(old):  # both or none
        new, old = (
            [joined(some, use, workspace, some[0].dtype)[0]] for use, some in (("joined new", new), ("joined old", old))
        )
    return difference(list(new), list(old), workspace)


def _widened(pieces: Sequence[Tensor], signed: bool, workspace: Workspace) -> Tensor:
    """All elements of `pieces` in float64, flat: squares and powers taken in float32 would overflow, vanish, and round.

    signed: as they are; else their absolute values, taken where that costs least.
    """
    if len(pieces) == 1:
        return _one_widened(pieces[0], signed, workspace)
    dtype, wide = pieces[0].dtype, wide_dtype(pieces[0].device)
    # torch joins many tensors fast only where it need not convert them.
    dtype = dtype if all(piece.dtype == dtype for piece in pieces) else wide
    flat, is_own = joined(pieces, "narrow", workspace, dtype)
    if is_own:
        return _one_widened(flat, signed, workspace)
    if not signed:
        flat.abs_()
    return flat if dtype == wide else workspace.copies("float64", [flat], wide)[0]


def _one_widened(piece: Tensor, signed: bool, workspace: Workspace) -> Tensor:
    wide = wide_dtype(piece.device)
    if signed:
        return workspace.copies("float64", [piece], wide)[0]
    if workspace is TRACED:  # a compiled loop has half as many float32 as float64 to take the absolute value of
        return workspace.copies("float64", workspace.make("abs", "narrow", [piece]), wide)[0]
    return workspace.copies("float64", [piece], wide)[0].abs_()


def _of_row(x: Tensor, statistic: Statistic, signed: bool, workspace: Workspace) -> Tensor:
    """The moment of each row, [rows]; leaves anything in `x`. signed: whether `x` is not absolute values already."""
    if statistic == SUM:
        return x.sum(1)
    if statistic == SQUARE:
        # Not by `dot`, which adds up as it comes: `sum` goes by halves, and a variance needs its digits.
        return workspace.make("mul", "power", [x], x)[0].sum(1)
    if statistic == COUNT:
        # A NaN is not zero; adding 0·(Σx − Σx) would hide infinities, so it is asked for by name.
        return torch.where(x.isnan().any(1), torch.nan, torch.count_nonzero(x, 1).to(x.dtype))
    if signed:
        x.abs_()
    if statistic == ABS:
        return x.sum(1)
    if statistic in (MAX, MIN):
        return x.amax(1) if statistic == MAX else x.amin(1)
    return workspace.make("pow", "power", [x], statistic.p)[0].sum(1)
