"""Stochastic rounding to bf16 and fp16: up with the probability of the fractional distance.

What decides is a hash of an element's place in the *whole* tensor, and not of how the tensor is cut. So ranks that hold
copies of an element round it alike, and a sharded run has the bits of one that is not.

Which places a local tensor holds are "rows of runs" (GlobalIndices). A tensor of 4 × 8, cut along both dimensions, of which
this rank holds what is marked:

    place of the whole     0  1 [2  3  4] 5  6  7        runs  = ((2, 3),)           one run of 3 places, from place 2
                           8  9 10 11 12 13 14 15        outer = ((((0, 1), (2, 4)), 8),)
                          16 17[18 19 20]21 22 23                  rows 0, 2 and 3 are held, and a row is 8 places long
                          24 25[26 27 28]29 30 31

    local element          0  1  2 | 3  4  5 | 6  7  8   row = 3 elements, in local order
    its place              2  3  4 |18 19 20 |26 27 28   = (place of the row) + (place within the row)

Cut along the first dimension only, all is one run and there is no `outer`. Strided shards have several runs in a row. A
dimension that is cut and is not the last one that is adds an entry to `outer`: the intervals of indices that are held, and
how far apart two neighbouring indices are in the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .blocks import Workspace, block_size

LOW = (torch.bfloat16, torch.float16)

# An odd number near 2^32/φ spreads neighbouring places over the 32 bits; the other two are multipliers of a published
# integer hash (Wellons, "Prospecting for hash functions", lowbias32).
_SPREAD, _FIRST, _SECOND = 0x9E3779B1, 0x7FEB352D, 0x846CA68B

Run = tuple[int, int]
# (position of the tensor, from, to): elements of a local tensor, counted row by row.
Span = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class GlobalIndices:
    """Which places of a whole tensor, counted row by row, a local tensor holds: rows of runs, in local order.

    runs: (first place, length) of each stretch of one row.
    outer: for every dimension before the runs, outermost first: the intervals [start, stop) of indices that are held, and
        how many places of the whole one index is apart from the next.
    """

    runs: tuple[Run, ...]
    outer: tuple[tuple[tuple[Run, ...], int], ...] = ()

    @property
    def row(self) -> int:
        """Elements of one row."""
        return sum(length for _, length in self.runs)

    def place_of_row(self, number: int) -> int:
        """Where in the whole a row begins."""
        place = 0
        # Rows are counted in local order, so the innermost dimension is what changes fastest.
        for intervals, stride in reversed(self.outer):
            number, index = divmod(number, sum(stop - start for start, stop in intervals))
            for start, stop in intervals:
                if index < stop - start:
                    place += (start + index) * stride
                    break
                index -= stop - start
        return place

    def places_of_rows(self, first: int, last: int, device: torch.device) -> Tensor:
        """`place_of_row` of the rows from `first` to before `last`, [rows] int64, computed on the device."""
        number = torch.arange(first, last, device=device)
        place = torch.zeros_like(number)
        for intervals, stride in reversed(self.outer):
            held = sum(stop - start for start, stop in intervals)
            index, number = number % held, number.div(held, rounding_mode="floor")
            place += index * stride
            jump, passed = 0, 0
            for start, stop in intervals:
                # From here on, indices are this much further along than they are in the local tensor.
                place += (index >= passed) * ((start - passed - jump) * stride)
                jump, passed = start - passed, passed + stop - start
        return place


@dataclass(frozen=True, slots=True)
class RandomBits:
    """Random bits for one write to a list of tensors: a hash of the write, the tensor and the place in the whole tensor.

    Where keys are uniform, so are the bits, exactly.

    global_indices: of each tensor.
    keys: of each tensor, 32 bits.
    key: of the write, 32 bits.
    starts: of each tensor, which element of a local tensor it begins with; (): the first.
    """

    global_indices: Sequence[GlobalIndices]
    keys: Sequence[int]
    key: int
    starts: Sequence[int] = ()

    def of_parts(self, parts: Sequence[tuple[int, int]]) -> RandomBits:
        """The same bits for parts of the tensors; parts: (position of the tensor, its element that the part begins with)."""
        indices = [self.global_indices[position] for position, _ in parts]
        keys = [self.keys[position] for position, _ in parts]
        return replace(self, global_indices=indices, keys=keys, starts=[start for _, start in parts])

    def round_(
        self,
        workspace: Workspace,
        positions: Sequence[int],
        wholes: Sequence[Tensor],
        targets: list[Tensor],
        values: list[Tensor],
    ) -> None:
        """targets ← values, each element rounded once.

        workspace: where random bits are made.
        positions: of the tensors of this block, in `wholes`.
        wholes: the local tensors.
        targets: bf16 or fp16, what a block has of those tensors: all elements, or a slice of one as a view.
        values: float32, of the shapes of `targets`.
        """
        spans: list[Span] = []
        for position, target in zip(positions, targets, strict=True):
            whole = wholes[position]
            # A tensor with gaps always comes whole, and its offsets do not count elements.
            is_slice = target.numel() != whole.numel()
            start = int(target.storage_offset() - whole.storage_offset()) if is_slice else 0
            start += self.starts[position] if self.starts else 0
            spans.append((position, start, start + target.numel()))
        # One flat tensor, however many targets: a hash is a dozen operations, and each is one call then.
        flat = values[0].reshape(-1) if len(values) == 1 else torch.cat([value.reshape(-1) for value in values])
        rounded = dithered(flat, self.bits(spans, flat.device, workspace), targets[0].dtype)
        parts = rounded.split([target.numel() for target in targets])
        torch._foreach_copy_(targets, [part.view_as(target) for part, target in zip(parts, targets, strict=True)])

    def bits(self, spans: Sequence[Span], device: torch.device, workspace: Workspace) -> Tensor:
        """Random int32, one for each element of `spans`, flat."""
        num = sum(stop - start for _, start, stop in spans)
        x, shifted = (workspace.empty(num, device, torch.int32) for _ in range(2))
        # x ← spread · place + key (mod 2^32)
        filled = 0
        for index, start, stop in spans:
            held, key = self.global_indices[index], self.keys[index]
            part = x[filled : (filled := filled + stop - start)]
            row = held.row
            first, last = start // row, (stop - 1) // row
            if last - first < 2:
                # Long rows: a call or two for each, with the place of the row as a number.
                for number in range(first, last + 1):
                    offset = held.place_of_row(number) * _SPREAD + key
                    done = max(number * row - start, 0)
                    _seed_row(part[done:], held.runs, offset, start - number * row, stop - number * row, workspace)
            else:
                # Many short rows: places of the rows, plus places within a row, all at once.
                inner = torch.empty(row, dtype=torch.int32, device=device)
                _seed_row(inner, held.runs, 0, 0, row, workspace)
                rows = held.places_of_rows(first, last + 1, device).mul_(_SPREAD).add_(key).to(torch.int32)
                part.copy_((rows[:, None] + inner).view(-1)[start - first * row : stop - first * row])
        # Arithmetic shifts: each forgets one bit of 32, and none of those that are used.
        for shift, factor in ((15, _FIRST), (13, _SECOND)):
            x.bitwise_xor_(torch.bitwise_right_shift(x, shift, out=shifted)).mul_(_signed(factor))
            if factor == _FIRST:
                x.add_(_signed(self.key))
        return x.bitwise_xor_(torch.bitwise_right_shift(x, 16, out=shifted))


def dithered(x: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """x rounded at random to numbers that `dtype` has: up with the probability of the distance from the one below.

    x: float32. bits: random int32 of the same shape, used up. dtype: bf16 or fp16.
    Returns float32. What lies beyond the largest finite number stays, for the nearest to decide; inf and NaN stay.
    """
    if dtype == torch.bfloat16:
        # bf16 is the upper half of float32, subnormals too: the lower half is the distance, in 65536ths.
        rounded = bits.bitwise_and_(0xFFFF).add_(x.view(torch.int32)).bitwise_and_(-0x10000).view(torch.float32)
    else:
        # The gap between neighbours is 2^-10 of the power of two below |x|, and no smaller than that of the subnormals.
        # Division by it is exact, and so is the fraction; 24 random bits are what float32 can hold.
        gap = (x.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_min(2.0**-14).mul_(2.0**-10)
        steps = x.abs().div_(gap)
        below = steps.floor()
        up = bits.bitwise_and_(0xFFFFFF).to(torch.float32).mul_(2.0**-24) < steps.sub_(below)
        rounded = below.add_(up).mul_(gap).copysign_(x)
    return torch.where(x.abs() <= torch.finfo(dtype).max, rounded, x, out=rounded)


def _seed_row(x: Tensor, runs: Sequence[Run], offset: int, start: int, stop: int, workspace: Workspace) -> None:
    """x ← spread · place + offset (mod 2^32), for what lies of the runs of a row between `start` and `stop`."""
    # spread·0, spread·1, spread·2, ... (mod 2^32), int32: made once and kept, a block long.
    ramp, length = workspace.ramps.get(x.device), min(len(x), max(length for _, length in runs))
    if ramp is None or len(ramp) < length:
        ramp = (torch.arange(max(length, block_size(x.device)), device=x.device) * _SPREAD).to(torch.int32)
        if length <= block_size(x.device):
            workspace.ramps[x.device] = ramp
    filled = 0
    for place, length in runs:
        begin, end = max(start, 0), min(stop, length)
        if begin < end:
            part = x[filled : (filled := filled + end - begin)]
            torch.add(ramp[: end - begin], _signed((place + begin) * _SPREAD + offset), out=part)
        start, stop = start - length, stop - length


def _signed(value: int) -> int:
    """`value` mod 2^32 as an int32."""
    return (value + 0x80000000) % 0x100000000 - 0x80000000
