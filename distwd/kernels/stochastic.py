"""How bf16 and fp16 are written: to the nearest, or up with the probability of the fractional distance, by noise that
depends on an element's place in the whole tensor and not on how the tensor is cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import block_size
from .workspace import Workspace

LOW = (torch.bfloat16, torch.float16)

# An odd number near 2^32/φ spreads neighbouring places over the 32 bits; the other two are multipliers of a published
# integer hash (Wellons, "Prospecting for hash functions", lowbias32).
_SPREAD, _FIRST, _SECOND = 0x9E3779B1, 0x7FEB352D, 0x846CA68B

Run = tuple[int, int]
Span = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class GlobalIndices:
    """Which places of a whole tensor, counted row by row, a local tensor holds: rows of runs, in local order.

    runs: (first place, length) of each stretch of one row. outer: for every dimension before the runs, outermost first,
    the intervals [start, stop) of indices held there, and how many places of the whole one index is apart from the next.
    """

    runs: tuple[Run, ...]
    outer: tuple[tuple[tuple[Run, ...], int], ...] = ()

    @property
    def row(self) -> int:
        """Elements of one row."""
        return sum(length for _, length in self.runs)


class Ramp:
    """s·0, s·1, s·2, ... (mod 2^32) on each device; made once, a block long."""

    def __init__(self) -> None:
        self._kept: dict[torch.device, Tensor] = {}

    def __call__(self, length: int, device: torch.device) -> Tensor:
        """The first `length` of them."""
        kept = self._kept.get(device)
        if kept is None or len(kept) < length:
            kept = (torch.arange(max(length, block_size(device)), device=device) * _SPREAD).to(torch.int32)
            if length <= block_size(device):
                self._kept[device] = kept
        return kept[:length]


@dataclass(frozen=True, slots=True)
class RandomBits:
    """Random bits for one write to a list of tensors: a hash of the write (`key`), the tensor (its own of `keys`) and the place.

    The bits of an element do not depend on where its tensor is cut. Where keys (of 32 bits) are uniform, so are they, exactly.
    """

    global_indices: Sequence[GlobalIndices]
    keys: Sequence[int]
    key: int
    ramp: Ramp

    def bits(self, spans: Sequence[Span], device: torch.device, workspace: Workspace) -> Tensor:
        """Random int32, one for each element of `spans`: (which tensor, from, to), elements of the local tensor row by row."""
        x, shifted = (workspace.take(use, _num(spans), device, torch.int32) for use in ("noise", "shifted"))
        filled = 0
        for span in spans:
            self._seed(x[filled : (filled := filled + span[2] - span[1])], *span)
        # Arithmetic shifts: each forgets one bit of 32, and none of those that are used.
        for shift, factor in ((15, _FIRST), (13, _SECOND)):
            x.bitwise_xor_(torch.bitwise_right_shift(x, shift, out=shifted)).mul_(_signed(factor))
            if factor == _FIRST:
                x.add_(_signed(self.key))
        return x.bitwise_xor_(torch.bitwise_right_shift(x, 16, out=shifted))

    def _seed(self, x: Tensor, index: int, start: int, stop: int) -> None:
        """x ← spread · place + key."""
        extent, key = self.global_indices[index], self.keys[index]
        row = extent.row
        first, last = start // row, (stop - 1) // row
        if last - first < 2:
            for number in range(first, last + 1):
                offset = _place_of_row(extent, number) * _SPREAD + key
                done = max(number * row - start, 0)
                self._runs(x[done:], extent.runs, offset, start - number * row, stop - number * row)
        else:
            inner = torch.empty(row, dtype=torch.int32, device=x.device)
            self._runs(inner, extent.runs, 0, 0, row)
            rows = _places_of_rows(extent, first, last + 1, x.device).mul_(_SPREAD).add_(key).to(torch.int32)
            x.copy_((rows[:, None] + inner).view(-1)[start - first * row : stop - first * row])

    def _runs(self, x: Tensor, runs: Sequence[Run], offset: int, start: int, stop: int) -> None:
        """x ← what lies of the runs between `start` and `stop`, counted along them."""
        filled = 0
        for place, length in runs:
            begin, end = max(start, 0), min(stop, length)
            if begin < end:
                part = x[filled : (filled := filled + end - begin)]
                torch.add(self.ramp(end - begin, x.device), _signed((place + begin) * _SPREAD + offset), out=part)
            start, stop = start - length, stop - length


class RandomStream:
    """The noise of one batch of tensors in one step; another at each write."""

    def __init__(self, make: Callable[[int], RandomBits]) -> None:
        self._make = make
        self._num_writes = 0

    def next(self) -> RandomBits:
        """For the next write."""
        self._num_writes += 1
        return self._make(self._num_writes - 1)


def write_(
    targets: list[Tensor],
    values: list[Tensor],
    random_bits: RandomBits | None,
    spans: Sequence[Span],
    workspace: Workspace,
) -> None:
    """targets ← values (float32), each rounded once: to the nearest, or as `noise` decides for the elements of `spans`."""
    if random_bits is None:
        torch._foreach_copy_(targets, values)
        return
    flat = _joined([value.reshape(-1) for value in values])
    rounded = dithered(flat, random_bits.bits(spans, flat.device, workspace), targets[0].dtype)
    parts = rounded.split([target.numel() for target in targets])
    torch._foreach_copy_(targets, [part.view_as(target) for part, target in zip(parts, targets, strict=True)])


def dithered(x: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """x (float32) as numbers that `dtype` has, still in float32: the neighbour above with the probability of the distance from that below.

    bits: random int32, used up. What lies beyond the largest finite number stays, for the nearest to decide; inf and NaN stay.
    """
    rounded = _dithered_bf16(x, bits) if dtype == torch.bfloat16 else _dithered_fp16(x, bits)
    return torch.where(x.abs() <= torch.finfo(dtype).max, rounded, x, out=rounded)


def _dithered_bf16(x: Tensor, bits: Tensor) -> Tensor:
    # bf16 is the upper half of float32, subnormals too: the lower half is the distance, in 65536ths.
    return bits.bitwise_and_(0xFFFF).add_(x.view(torch.int32)).bitwise_and_(-0x10000).view(torch.float32)


def _dithered_fp16(x: Tensor, bits: Tensor) -> Tensor:
    # The gap between neighbours is 2^-10 of the power of two below |x|, and no smaller than that of the subnormals.
    # Division by it is exact, and so is the fraction; 24 random bits are what float32 can hold.
    gap = (x.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_min(2.0**-14).mul_(2.0**-10)
    steps = x.abs().div_(gap)
    below = steps.floor()
    up = bits.bitwise_and_(0xFFFFFF).to(torch.float32).mul_(2.0**-24) < steps.sub_(below)
    return below.add_(up).mul_(gap).copysign_(x)


def spans_of(parts: list[Tensor], places: list[int], wholes: Sequence[Tensor]) -> list[Span]:
    """Which elements of `wholes` at `places` these blocks of them are: all, or a stretch of one."""
    return [_span(place, part, wholes[place]) for place, part in zip(places, parts, strict=True)]


def _span(place: int, part: Tensor, whole: Tensor) -> Span:
    start = 0 if part.numel() == whole.numel() else int(part.storage_offset() - whole.storage_offset())
    return place, start, start + part.numel()


def _place_of_row(extent: GlobalIndices, number: int) -> int:
    place = 0
    for intervals, stride in reversed(extent.outer):
        number, index = divmod(number, sum(stop - start for start, stop in intervals))
        for start, stop in intervals:
            if index < stop - start:
                place += (start + index) * stride
                break
            index -= stop - start
    return place


def _places_of_rows(extent: GlobalIndices, first: int, last: int, device: torch.device) -> Tensor:
    """`_place_of_row` of the rows from `first` to before `last`, [rows] int64, computed on the device."""
    number = torch.arange(first, last, device=device)
    place = torch.zeros_like(number)
    for intervals, stride in reversed(extent.outer):
        held = sum(stop - start for start, stop in intervals)
        index, number = number % held, number.div(held, rounding_mode="floor")
        place += index * stride
        jump, passed = 0, 0
        for start, stop in intervals:
            # From here on, indices are this much further along than they are in the local tensor.
            place += (index >= passed) * ((start - passed - jump) * stride)
            jump, passed = start - passed, passed + stop - start
    return place


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _num(spans: Sequence[Span]) -> int:
    return sum(stop - start for _, start, stop in spans)


def _signed(value: int) -> int:
    """`value` mod 2^32 as an int32."""
    return (value + 0x80000000) % 0x100000000 - 0x80000000
