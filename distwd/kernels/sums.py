"""Sums, maxima and counts of many local tensors, in float64, without a copy of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import Ops, Workspace, block_size, blocks, is_large, small_size
from .compile import TOGETHER, TRACED, compiled
from .formulas import difference

# A compiled sum reads a tensor in so many stretches at once: with one it waits for memory most of the time. (From eight on
# torch would take them for a dimension of a loop, and read one after the other.)
STRETCHES = 4


@dataclass(frozen=True, slots=True)
class Statistic:
    """One number that every rank can compute over its own elements, and that combines over ranks.

    kind: "sum" Σx · "power" Σ|x|^p · "count" number of non-zeros · "max" max|x| · "min" min|x|.
    p: the exponent of a "power".
    """

    kind: str
    p: float = 1.0

    @property
    def is_sum(self) -> bool:
        """Whether ranks combine by adding; else by the extremum."""
        return self.kind not in ("max", "min")

    @property
    def identity(self) -> float:
        """What a rank without elements contributes."""
        return math.inf if self.kind == "min" else 0.0

    def combine(self, values: Tensor) -> Tensor:
        """The statistic of all, of which the last dimension of `values` holds the statistics of parts."""
        # A NaN comes through each of the three, and so shows on every rank.
        if self.is_sum:
            return values.sum(-1)
        return values.amax(-1) if self.kind == "max" else values.amin(-1)


SUM, ABS, SQUARE = Statistic("sum"), Statistic("power", 1.0), Statistic("power", 2.0)
COUNT, MAX, MIN = Statistic("count"), Statistic("max"), Statistic("min")


def wide_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 where the device has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def local_statistics(
    tensors: Sequence[Tensor],
    statistics: Iterable[Statistic],
    workspace: Workspace | None = None,
    minus: Sequence[Tensor] = (),
) -> dict[Statistic, Tensor]:
    """Each statistic over all elements of `tensors` (− minus), as a 0-d float64 tensor on their device.

    tensors: local tensors of one device, any float dtypes.
    workspace: where blocks are worked on; None: a new one.
    minus: what is subtracted, of the shapes of `tensors`; empty: nothing.

    A NaN anywhere makes every statistic NaN. Without elements a statistic is its identity.
    """
    workspace, wanted = workspace or Workspace(), tuple(statistics)
    found: list[list[Tensor]] = [[] for _ in wanted]
    compiles = workspace.compiles
    measured = (tensors, minus) if minus else (tensors,)
    # A sum is a few operations; but what is large the compiler does in one.
    for _, pieces in blocks(*measured, together=TOGETHER if compiles else 0, few_operations=not compiles):
        parts = []
        if compiles and is_large(pieces[0]):
            ends = [piece.numel() // STRETCHES * STRETCHES for piece in pieces[0]]
            even = [[piece[:end] for piece, end in zip(some, ends, strict=True)] for some in pieces]
            parts.append(compiled(_traced, wanted, len(ends))(*even))
            # What the stretches leave over: a few elements of each tensor.
            rest = [[piece[end:] for piece, end in zip(some, ends, strict=True)] for some in pieces]
            pieces = tuple([piece for piece in some if piece.numel()] for some in rest)
        # What a compiled call left over may be nothing.
        if pieces[0]:
            workspace.begin_block()
            parts.append(_of_rows(workspace, wanted, 1, *pieces))
        for part in parts:
            for values, value in zip(found, part, strict=True):
                values.append(value[0])
    totals = {}
    for statistic, values in zip(wanted, found, strict=True):
        if not values:
            device = tensors[0].device if tensors else torch.device("cpu")
            values = [torch.full((), statistic.identity, dtype=wide_dtype(device), device=device)]
        # A model of small tensors is one block: two calls less, for each statistic.
        totals[statistic] = values[0] if len(values) == 1 else statistic.combine(torch.stack(values))
    return totals


def statistics_of_each(
    tensors: Sequence[Tensor],
    minus: Sequence[Tensor],
    statistics: Iterable[Statistic],
    workspace: Workspace,
    num_rows: int = 1,
) -> dict[Statistic, Tensor]:
    """`local_statistics` of every single row of `tensors`, [tensors · num_rows] each.

    tensors: local tensors of one device and dtype with equally many elements, not none. The rest as in `local_statistics`.
    num_rows: of each tensor: stretches of equally many elements, of which each is measured by itself.
    """
    numel, device, wanted = tensors[0].numel(), tensors[0].device, tuple(statistics)
    found: list[list[Tensor]] = [[] for _ in wanted]
    small = small_size(device, few_operations=not workspace.compiles)
    if numel > small and num_rows > 1:
        # Rows of one large tensor lie beside each other already: as many as fill a block are measured at once, without a
        # copy. Rows that are large themselves come one by one, as tensors of their own would.
        size, length = block_size(device), numel // num_rows
        step = max(1, size // length) if length <= small or not workspace.compiles else 1
        for number, matrices in enumerate(tensors):
            both = [one.reshape(num_rows, length) for one in (matrices, *minus[number : number + 1])]
            for start in range(0, num_rows, step):
                block, *taken_off = [one[start : start + step] for one in both]
                if step == 1:
                    of_one = local_statistics([block[0]], wanted, workspace, [one[0] for one in taken_off])
                    parts = [of_one[statistic].view(1) for statistic in wanted]
                else:
                    workspace.begin_block()
                    parts = _of_rows(workspace, wanted, len(block), [block], taken_off)
                for values, value in zip(found, parts, strict=True):
                    values.append(value)
    # Large tensors are blocks of their own anyway; and of one there is nothing to join.
    elif num_rows == 1 and (len(tensors) == 1 or numel > small):
        for number, tensor in enumerate(tensors):
            of_one = local_statistics([tensor], wanted, workspace, minus[number : number + 1])
            for values, statistic in zip(found, wanted, strict=True):
                values.append(of_one[statistic].view(1))
    else:
        # Many small tensors: each is a row of a block, or several, and a block is a few operations.
        step = block_size(device) // numel
        for start in range(0, len(tensors), step):
            some, less = list(tensors[start : start + step]), list(minus[start : start + step])
            workspace.begin_block()
            for values, value in zip(found, _of_rows(workspace, wanted, len(some) * num_rows, some, less), strict=True):
                values.append(value)
    return {statistic: torch.cat(values) for statistic, values in zip(wanted, found, strict=True)}


def _traced(statistics: tuple[Statistic, ...], num: int, *lists: list[Tensor]) -> list[Tensor]:
    """The statistics over `num` large tensors (minus as many others, if there is a second list), each [1], for the compiler."""
    each = [
        _of_rows(TRACED, statistics, 1, *([some[place].view(STRETCHES, -1)] for some in lists)) for place in range(num)
    ]
    return [
        statistic.combine(torch.cat(rows)).view(1)
        for statistic, rows in zip(statistics, zip(*each, strict=True), strict=True)
    ]


def _of_rows(
    ops: Ops, statistics: Sequence[Statistic], num_rows: int, pieces: list[Tensor], minus: Sequence[Tensor] = ()
) -> list[Tensor]:
    """Each statistic of each row, [num_rows], of a block of `pieces` (− minus); a row is equally many elements of them."""
    if minus:
        pieces = difference(ops, pieces, list(minus))
    # All elements in float64, flat: squares and powers taken in float32 would overflow, vanish, and round. Where no sum needs
    # their signs, they are absolute values, taken where that costs least.
    is_signed, wide = SUM in statistics, wide_dtype(pieces[0].device)
    if isinstance(ops, Workspace) and len(pieces) > 1:
        # Small tensors are joined, so that each operation is one call. torch joins many fast only where it need not
        # convert them: first in their own dtype, if they have one, and then all at once.
        dtype = pieces[0].dtype
        if any(piece.dtype != dtype for piece in pieces):
            # Of two kinds of numbers torch takes the wider one, but for float8, which it refuses to join with others.
            dtype = wide
            pieces = [piece.to(wide) if piece.dtype.itemsize == 1 else piece for piece in pieces]
        x = ops.empty(sum(piece.numel() for piece in pieces), pieces[0].device, dtype)
        shapes = {piece.shape for piece in pieces}
        rows = {shape[1:] for shape in shapes}
        # With rows of one shape they are joined as they are: flat views of many cost as much as all the rest.
        if len(rows) == 1 and all(shapes):
            torch.cat(pieces, out=x.view(-1, *rows.pop()))
        else:
            torch.cat([piece.reshape(-1) for piece in pieces], out=x)
        if not is_signed:
            x.abs_()
        if dtype != wide:
            (x,) = ops.copies([x], wide)
    elif ops is TRACED and not is_signed:
        # A compiled loop has half as many float32 as float64 to take the absolute value of.
        (x,) = ops.copies(ops.abs(pieces), wide)
    else:
        (x,) = ops.copies(pieces, wide)
        if not is_signed:
            x.abs_()
    # Where it is traced, stretches lie beside each other: first each element with those at its place in the others (over
    # dimension 1), and then along them.
    x = x.view(1, STRETCHES, -1) if ops is TRACED else x.view(num_rows, -1)
    found = []
    for statistic in statistics:
        if statistic == SUM:
            value = x.sum(1)
        elif statistic == SQUARE:
            # Not by `dot`, which adds up as it comes: `sum` goes by halves, and a variance needs its digits.
            value = ops.mul([x], [x])[0].sum(1)
        elif statistic == COUNT:
            # A NaN is not zero; adding 0·(Σx − Σx) would hide infinities, so it is asked for by name.
            value = torch.where(x.isnan().any(1), torch.nan, torch.count_nonzero(x, 1).to(x.dtype))
        else:
            magnitudes = ops.abs([x])[0] if is_signed else x
            if statistic in (MAX, MIN):
                value = magnitudes.amax(1) if statistic == MAX else magnitudes.amin(1)
            else:
                value = (magnitudes if statistic == ABS else ops.pow([magnitudes], statistic.p)[0]).sum(1)
        found.append(statistic.combine(value) if ops is TRACED else value)
    return found
