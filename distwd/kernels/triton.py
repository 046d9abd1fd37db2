"""Formulas as Triton kernels, on GPUs: everything that a write or a metric reads is read once, in one launch for all tensors.

No formula stands here. The functions of formulas.py, apply.py and sums.py run once for each form with a `Listing` for their
operations, which writes them down as the lines of a kernel. Only what is no operation of theirs has its text here: how
elements are read and rounded, how random bits are made, and how numbers are added up.

A kernel takes tables: where tensors lie (`rows`), and which piece of which tensor each program works on (`chunks`). So its
code depends on the form alone, and not on the model, and one launch takes any number of tensors. Each operation rounds once,
as in IEEE arithmetic: products and sums are not contracted, and division is exact to the last bit. So bits do not depend on
where a tensor is cut, and are those of the same formula done operation by operation.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import linecache
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .apply import write_block_
from .blocks import Call, Ops, Workspace
from .formulas import ELEMENTARY_ORDS, Numbers, Write, difference, power
from .stochastic import _FIRST, _SECOND, _SPREAD, LOW, GlobalIndices, RandomBits, _signed
from .sums import COUNT, SUM, Statistic, Vectors, read_vectors

# Elements that a program works on, and how many of them at once. A chunk is long enough that what a program reads from the
# tables does not count.
_CHUNK = 1 << 14
_BLOCK = 1 << 10
_FEW_SUMS, _MOST_SUMS = 3, 15
# No product is contracted with a sum: it would be rounded once, where operations round twice.
WAYS = {"num_warps": 4, "enable_fp_fusion": False}
# Places in a row, or in a matrix, are counted in 32 bits, with room for a chunk.
_LONGEST = 1 << 30
_MAX_KEPT = 64
_PLAIN = {Tensor, torch.nn.Parameter}

# What lies in memory, and what it is in a kernel. bf16 is read and written as the upper half of a float32, so that it is
# rounded the same way everywhere.
_STORED = {torch.bfloat16: "int16", torch.float16: "float16", torch.float32: "float32", torch.float64: "float64"}
# The operations of Ops, by the name of what they do to one tensor. Comparisons are written so that a NaN comes through.
_TEXTS = {
    "mul": "{0} * {1}",
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "div": "{0} / {1}",  # but see `Listing.run`
    "abs": "tl.abs({0})",
    "sign": "tl.where({0} > 0, 1.0, tl.where({0} < 0, -1.0, 0.0)).to(tl.{dtype})",
    "clamp_min": "tl.where({0} < {1}, {1}, tl.where({1} == {1}, {0}, {1}))",
    "clamp_max": "tl.where({0} > {1}, {1}, tl.where({1} == {1}, {0}, {1}))",
}


@dataclass(slots=True)
class Value:
    """A tensor of a kernel: the name of what it holds now, and its dtype. An operation in place gives it another name."""

    name: str
    dtype: torch.dtype


class Listing(Ops):
    """The operations of a formula, written down instead of done: `lines` of a kernel. Lists are of Values, one each."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def new(self, text: str, dtype: torch.dtype) -> Value:
        """What `text` computes."""
        name = f"v{len(self.lines)}"
        self.lines.append(f"{name} = {text}")
        return Value(name, dtype)

    def run(self, one: Call, each: Call, in_place: bool, xs: list[Any], *ys: Any, **settings: float) -> list[Any]:
        """Write an operation down."""
        (x,) = xs
        name, operands = one.__name__.rstrip("_"), [x.name]
        if name == "copy":
            ((y,),) = ys
            found = self.converted(y, x.dtype)
        else:
            for y in ys:
                if isinstance(y, list):
                    (y,) = y
                if isinstance(y, Value):
                    assert y.dtype == x.dtype, "torch would convert one of the two, and round it"
                    operands.append(y.name)
                else:
                    # As a tensor of its dtype: a plain number in the text is float32.
                    operands.append(self.new(f"tl.full((1,), {float(y)!r}, tl.{_STORED[x.dtype]})", x.dtype).name)
            if settings:
                assert settings in ({"alpha": 1}, {"alpha": -1}), "torch rounds x + alpha·y once or twice"
                name = name if settings["alpha"] == 1 else "sub"
            text = _TEXTS[name]
            if name == "div" and x.dtype == torch.float32:
                text = "tl.div_rn({0}, {1})"  # a plain quotient of float32 is approximate on GPUs
            found = self.new(text.format(*operands, dtype=_STORED[x.dtype]), x.dtype)
        if in_place:
            x.name = found.name
            return xs
        return [found]

    def copies(self, xs: list[Any], dtype: torch.dtype) -> list[Any]:
        """x in another dtype."""
        return [self.converted(x, dtype) for x in xs]

    def clear_(self, xs: list[Any]) -> None:
        """x ← 0."""
        for x in xs:
            x.name = self.new(f"tl.zeros_like({x.name})", x.dtype).name

    def converted(self, x: Value, dtype: torch.dtype) -> Value:
        """x in another dtype, rounded to the nearest."""
        if x.dtype == dtype:
            return Value(x.name, dtype)
        if x.dtype == torch.bfloat16:
            x = self.new(f"({x.name}.to(tl.int32) << 16).to(tl.float32, bitcast=True)", torch.float32)
        if dtype != torch.bfloat16:
            return x if x.dtype == dtype else self.new(f"{x.name}.to(tl.{_STORED[dtype]})", dtype)
        x = self.converted(x, torch.float32)
        bits = self.new(f"{x.name}.to(tl.int32, bitcast=True)", torch.int32).name
        nearest = self.new(f"({bits} + 0x7FFF + (({bits} >> 16) & 1)) >> 16", torch.int32).name
        # Of a NaN the carry would run into the sign.
        return self.new(f"tl.where({x.name} == {x.name}, {nearest}, 0x7FC0).to(tl.int16)", dtype)

    def dithered(self, x: Value, dtype: torch.dtype) -> Value:
        """x, float32, rounded at random as `stochastic.dithered` does, by a hash of `seed`, int32, and `key`."""
        bits = self.new(f"(seed ^ (seed >> 15)) * {_signed(_FIRST)} + key", torch.int32).name
        bits = self.new(f"({bits} ^ ({bits} >> 13)) * {_signed(_SECOND)}", torch.int32).name
        bits = self.new(f"{bits} ^ ({bits} >> 16)", torch.int32).name
        own = self.new(f"{x.name}.to(tl.int32, bitcast=True)", torch.int32).name
        if dtype == torch.bfloat16:
            rounded = self.new(f"((({bits} & 0xFFFF) + {own}) & -0x10000).to(tl.float32, bitcast=True)", x.dtype).name
        else:
            gap = self.new(f"({own} & 0x7F800000).to(tl.float32, bitcast=True)", x.dtype).name
            gap = self.new(f"tl.where({gap} < {2.0**-14!r}, {2.0**-14!r}, {gap}) * {2.0**-10!r}", x.dtype).name
            steps = self.new(f"tl.div_rn(tl.abs({x.name}), {gap})", x.dtype).name
            # Below 2^11 where it matters; Triton's floor takes the smallest numbers for 0.
            below = self.new(f"{steps}.to(tl.int32).to(tl.float32)", x.dtype).name
            up = f"(({bits} & 0xFFFFFF).to(tl.float32) * {2.0**-24!r} < {steps} - {below}).to(tl.float32)"
            size = self.new(f"(({below} + {up}) * {gap}).to(tl.int32, bitcast=True)", torch.int32).name
            rounded = self.new(f"({size} | ({own} & -0x80000000)).to(tl.float32, bitcast=True)", x.dtype).name
        most = torch.finfo(dtype).max
        return self.converted(self.new(f"tl.where(tl.abs({x.name}) <= {most!r}, {rounded}, {x.name})", x.dtype), dtype)


# --- kernels ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Frame:
    """What is around the lines of a formula: how elements and numbers get there, and where results go.

    dtypes: of each list.
    varies: of each number that the formula takes, whether there is one for each tensor, or for each matrix; else one for all.
    by_matrix: whether a tensor may have several of them, one for each matrix of a stack.
    is_random: whether what is written is rounded at random.
    """

    dtypes: tuple[torch.dtype, ...]
    varies: tuple[bool, ...] = ()
    by_matrix: bool = False
    is_random: bool = False

    @property
    def columns(self) -> list[str]:
        """What `rows` says of each tensor: addresses, and numbers of elements and places."""
        return [
            *(f"address{number}" for number in range(len(self.dtypes))),
            "numel",
            *(["first"] if any(self.varies) else []),
            *(["length"] if self.by_matrix else []),
            *(["row", "stride", "base"] if self.is_random else []),
        ]


# Writes a formula down: `body(listing, frame, pieces, numbers, *form)` returns which lists are stored, and what is added up:
# (a statistic, float64).
Body = Callable[..., tuple[list[int], list[tuple[Statistic, Value]]]]


def text_of(body: Body, frame: Frame, *form: Any) -> str:
    """The source of a kernel.

    rows: [tensors, columns] int64. chunks: [chunks, 2] int32: a tensor, and which of its chunks. One program for each chunk.
    n0, n1, ...: the numbers, in the dtype of the arithmetic; [1], or [tensors], or [matrices].
    keys, key: of random bits, [tensors] int64, and int32. sums: [statistics, chunks] float64.
    """
    columns, listing = frame.columns, Listing()
    pieces = [[Value(f"x{number}", dtype)] for number, dtype in enumerate(frame.dtypes)]
    computed = torch.float64 if frame.dtypes[0] == torch.float64 else torch.float32
    numbers = [[Value(f"n{number}", computed)] for number in range(len(frame.varies))]
    stored, sums = body(listing, frame, pieces, numbers, *form)

    arguments = ["rows", "chunks", *(f"n{number}s" for number in range(len(frame.varies)))]
    arguments += ["keys", "key"] if frame.is_random else []
    arguments += ["sums", "num_chunks"] if sums else []
    lines = [
        f"def kernel({', '.join(arguments)}, CHUNK: tl.constexpr, BLOCK: tl.constexpr):",
        "    program = tl.program_id(0)",
        "    tensor = tl.load(chunks + 2 * program).to(tl.int64)",
        "    start = tl.load(chunks + 2 * program + 1).to(tl.int64) * CHUNK",
        *(f"    {name} = tl.load(rows + tensor * {len(columns)} + {place})" for place, name in enumerate(columns)),
    ]
    for number, dtype in enumerate(frame.dtypes):
        lines.append(f"    p{number} = address{number}.to(tl.pointer_type(tl.{_STORED[dtype]})) + start")
    for number, varies in enumerate(frame.varies):
        if not (varies and frame.by_matrix):
            lines.append(f"    n{number} = tl.load(n{number}s{' + first' if varies else ''})")
    if frame.by_matrix:
        lines += ["    matrix = start // length", "    passed = (start - matrix * length).to(tl.int32)"]
        lines += ["    length = length.to(tl.int32)", "    matrix += first"]
    if frame.is_random:
        lines += [
            "    line = start // row",
            "    done = (start - line * row).to(tl.int32)",
            "    row = row.to(tl.int32)",
        ]
        lines += ["    own_key = tl.load(keys + tensor)"]
    for number, (statistic, _) in enumerate(sums):
        zero = 'float("inf")' if statistic.identity == math.inf else "0.0"
        lines.append(f"    sum{number} = tl.full((BLOCK,), {zero}, tl.float64)")

    # Whole chunks of tensors that begin at whole vectors are read and written in 16 bytes at once. Of an address out of a
    # table the compiler knows nothing, so it is told; and ends, and what is cut at odd places, go another way.
    aligned = " | ".join(f"address{number}" for number in range(len(frame.dtypes)))
    for is_whole in (True, False):
        lines.append(f"    if (start + CHUNK <= numel) & ((({aligned}) & 15) == 0):" if is_whole else "    else:")
        for number in range(len(frame.dtypes)) if is_whole else ():
            lines.append(f"        p{number} = tl.multiple_of(p{number}, 16)")
        lines += ["        for offset in range(0, CHUNK, BLOCK):", "            i = offset + tl.arange(0, BLOCK)"]
        inner, mask = [] if is_whole else ["inside = start + i < numel"], "" if is_whole else ", mask=inside"
        other = mask and mask + ", other=0"
        inner += [f"x{number} = tl.load(p{number} + i{other})" for number in range(len(frame.dtypes))]
        if frame.by_matrix:
            for number, varies in enumerate(frame.varies):
                if varies:
                    inner.append(f"n{number} = tl.load(n{number}s + matrix + (passed + i) // length{other})")
        if frame.is_random:
            inner += ["lines = (done + i) // row", "place = base + (line + lines) * stride + (done + i - lines * row)"]
            inner += [f"seed = (place * {_signed(_SPREAD)} + own_key).to(tl.int32)"]
        inner += listing.lines
        inner += [f"tl.store(p{number} + i, {pieces[number][0].name}{mask})" for number in stored]
        for number, (statistic, value) in enumerate(sums):
            zero = 'float("inf")' if statistic.identity == math.inf else "0.0"
            found = value.name if is_whole else f"tl.where(inside, {value.name}, {zero})"
            if statistic.is_sum:
                inner.append(f"sum{number} += {found}")
            else:
                sign = ">" if statistic.kind == "max" else "<"
                inner.append(f"new{number} = {found}")
                # A NaN is taken, and stays.
                better = f"(new{number} {sign} sum{number}) | (new{number} != new{number})"
                inner.append(f"sum{number} = tl.where({better}, new{number}, sum{number})")
        lines += [f"            {line}" for line in inner]
    for number, (statistic, _) in enumerate(sums):
        total = f"tl.sum(sum{number}, 0)"
        if not statistic.is_sum:
            # Triton's own maximum drops a NaN.
            lines.append(f"    is_number = sum{number} == sum{number}")
            total = f"tl.{statistic.kind}(tl.where(is_number, sum{number}, 0.0), 0)"
            total += f" + tl.sum(tl.where(is_number, 0.0, sum{number}), 0)"
        lines.append(f"    tl.store(sums + {number} * num_chunks + program, {total})")
    return "\n".join(lines) + "\n"


@functools.cache
def kernel_of(body: Body, frame: Frame, *form: Any) -> Any:
    """The kernel of a form. Triton compiles it when it is first launched, in a second or so, and keeps it on disk."""
    text = text_of(body, frame, *form)
    triton = importlib.import_module("triton")
    # Triton reads the source of what it compiles, and this one is in no file.
    name = f"<distwd kernel {len(linecache.cache)} {body.__name__}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    scope: dict[str, Any] = {"tl": triton.language, "__name__": __name__}
    exec(compile(text, name, "exec"), scope)
    kernel = scope["kernel"]
    # Nothing depends on the numbers given, nor on where tables and numbers lie: or it would be compiled several times.
    names = [one for one in inspect.signature(kernel).parameters if not one.isupper()]
    return triton.jit(do_not_specialize=names)(kernel)


# --- tables ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Table:
    """What a kernel is told of the tensors, on their device; kept from step to step by what it says.

    is_captured: whether a CUDA graph reads it, which holds no reference to it: then it is kept for good.
    """

    rows: Tensor
    chunks: Tensor
    is_captured: bool = False


def table_of(
    workspace: Workspace, rows: Sequence[tuple[int, ...]], numels: Sequence[int], device: torch.device
) -> Table | None:
    """The table that says this; None where it is not there and cannot be sent, since a CUDA graph is being captured."""
    key = (device, _CHUNK, tuple(rows), tuple(numels))
    captures = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    kept: Table | None = workspace.tables.get(key)
    if kept is None:
        if captures:
            return None
        # Gradients have new addresses when they have been freed, but the same numbers of elements.
        chunks = next((other.chunks for known, other in workspace.tables.items() if known[3] == key[3]), None)
        if chunks is None:
            counts = torch.tensor(numels).add_(_CHUNK - 1).div_(_CHUNK, rounding_mode="floor")
            owner = torch.repeat_interleave(counts)
            number = torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]
            chunks = _sent(torch.stack([owner, number], 1).to(torch.int32), device)
        if len(workspace.tables) >= _MAX_KEPT:
            workspace.tables = {key: table for key, table in workspace.tables.items() if table.is_captured}
        kept = workspace.tables[key] = Table(_sent(torch.tensor(rows, dtype=torch.int64), device), chunks)
    kept.is_captured = kept.is_captured or captures
    return kept


def _sent(numbers: Tensor, device: torch.device) -> Tensor:
    """Numbers of the host, on `device`, without waiting for it."""
    return numbers if device.type == "cpu" else numbers.pin_memory().to(device, non_blocking=True)


def _by_dtypes(
    lists: Sequence[Sequence[Tensor]], are_equal: Callable[[tuple[torch.dtype, ...]], bool]
) -> tuple[dict[tuple[torch.dtype, ...], list[int]], list[int]]:
    """By the dtypes of each list the positions of what a kernel serves, and the positions of all else that is not empty.

    are_equal: whether tensors of these dtypes can meet without torch converting one of them, which would round.
    """
    device = lists[0][0].device

    def is_plain(tensors: Sequence[Tensor]) -> bool:
        # An address is all that a kernel sees: so nothing that is more than its memory, row by row.
        return (
            set(map(type, tensors)) <= _PLAIN
            and {one.dtype for one in tensors} <= _STORED.keys()
            and {one.device for one in tensors} == {device}
            and all(map(Tensor.is_contiguous, tensors))
            and not any(map(Tensor.is_neg, tensors))
        )

    positions = [position for position, numel in enumerate(map(Tensor.numel, lists[0])) if numel]
    # Most often all are of one kind. Asked list by list: tensor by tensor it takes several times as long.
    kinds = [{one.dtype for one in some} for some in lists]
    if all(len(kind) == 1 for kind in kinds) and all(map(is_plain, lists)):
        dtypes = tuple(dtype for (dtype,) in kinds)
        if are_equal(dtypes):
            return ({dtypes: positions} if positions else {}), []
    served, rest = defaultdict[tuple[torch.dtype, ...], list[int]](list), list[int]()
    for position in positions:
        tensors = [some[position] for some in lists]
        dtypes = tuple(one.dtype for one in tensors)
        (served[dtypes] if is_plain(tensors) and are_equal(dtypes) else rest).append(position)
    return served, rest


def block_of(num_sums: int) -> int:
    """How many elements a program works on at once."""
    # With many sums at once a thread would run out of registers.
    return _BLOCK if num_sums <= _FEW_SUMS else _BLOCK // 2


def _launch(kernel: Any, table: Table, numbers: Sequence[Any], num_sums: int = 0) -> None:
    """Start a program for each chunk."""
    device = table.rows.device
    # Triton starts on the current device, whatever the tensors are on.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(len(table.chunks),)](table.rows, table.chunks, *numbers, CHUNK=_CHUNK, BLOCK=block_of(num_sums), **WAYS)


# --- writes ----------------------------------------------------------------------------------------------------------


def _list_write(
    listing: Listing,
    frame: Frame,
    pieces: list[list[Any]],
    numbers: list[list[Any]],
    write: Write,
) -> tuple[list[int], list[tuple[Statistic, Value]]]:
    """`apply.write_block_` of one tensor, written down."""
    given = iter(numbers)
    named = Numbers(
        keep=next(given) if write.has_keep else None,
        rates=[next(given) for _ in write.kinds],
        scale=next(given) if write.unit_scale is None else None,
        proximal=[next(given) for _ in range(2 * len(write.proximal))],
    )

    def round_(targets: list[Any], values: list[Any]) -> None:
        targets[0].name = listing.dithered(values[0], targets[0].dtype).name

    write_block_(listing, write, named, range(1), pieces, None, round_ if frame.is_random else None)
    return [0, *([write.us] if write.spends_us and write.us is not None else [])], []


def write_(
    workspace: Workspace,
    write: Write,
    numbers: Numbers,
    lists: Sequence[list[Tensor]],
    num_cells: Sequence[int] | None,
    random_bits: RandomBits | None,
) -> list[int]:
    """Write what a kernel can; returns the positions of what is left to be written otherwise.

    write, numbers, lists: as in `formulas.update_`; numbers that are tensors lie where the parameters do, in the dtype of the
        arithmetic.
    num_cells: how many matrices each parameter has, where 1-d numbers are by matrix; None: they are by tensor.
    random_bits: of stochastic rounding; None: round to the nearest.
    """
    like = lists[0][0]
    is_low = like.dtype in LOW
    computed = torch.float32 if is_low else like.dtype
    # Those that the formula converts itself.
    converted = {place for kind in (*write.kinds, *write.proximal) for place in (kind.anchors, kind.masked_by)}
    converted -= {write.ps, write.us, write.mask_us, write.mask_minus}

    def are_equal(dtypes: tuple[torch.dtype, ...]) -> bool:
        return is_low or all(dtype == computed or place in converted for place, dtype in enumerate(dtypes))

    served, rest = _by_dtypes(lists, are_equal)
    given: list[Any] = [
        one for one in (numbers.keep, *numbers.rates, numbers.scale, *numbers.proximal) if one is not None
    ]
    tensors = [
        one.contiguous() if isinstance(one, Tensor) else torch.full((), one, dtype=computed, device=like.device)
        for one in given
    ]
    varies = tuple(one.dim() > 0 for one in tensors)
    counts = [1] * len(lists[0]) if num_cells is None else num_cells
    firsts = list(accumulate(counts, initial=0))
    for dtypes, positions in served.items():
        by_matrix = any(varies) and any(counts[position] > 1 for position in positions)
        frame = Frame(dtypes, varies, by_matrix, random_bits is not None)
        chosen = positions
        if by_matrix:
            chosen = [one for one in chosen if lists[0][one].numel() // counts[one] <= _LONGEST]
        places = []
        if random_bits is not None:
            found = {one: _even_rows(random_bits.global_indices[one]) for one in chosen}
            places = [rows for rows in found.values() if rows is not None]
            chosen = [one for one, rows in found.items() if rows is not None]
        rest += set(positions).difference(chosen)
        tensors_of = [[some[one] for one in chosen] for some in lists]
        numels = list(map(Tensor.numel, tensors_of[0]))
        columns = [*(list(map(Tensor.data_ptr, some)) for some in tensors_of), numels]
        columns += [[firsts[one] for one in chosen]] if any(varies) else []
        columns += [[numel // counts[one] for one, numel in zip(chosen, numels, strict=True)]] if by_matrix else []
        columns += map(list, zip(*places, strict=True))
        table = table_of(workspace, list(zip(*columns, strict=True)), numels, like.device) if chosen else None
        if table is None:
            rest += chosen
            continue
        arguments: list[Any] = list(tensors)
        if random_bits is not None:
            keys = torch.tensor([random_bits.keys[position] for position in chosen], dtype=torch.int64)
            arguments += [_sent(keys, like.device), _signed(random_bits.key)]
        kernel = kernel_of(_list_write, frame, write)
        _launch(kernel, table, arguments)
        stored = [0, *([write.us] if write.spends_us and write.us is not None else [])]
        # So that autograd still notices what was overwritten before a backward pass that needs it.
        torch.autograd.graph.increment_version([one for number in stored for one in tensors_of[number]])
    return sorted(rest)


def _even_rows(indices: GlobalIndices) -> tuple[int, int, int] | None:
    """Elements of a row, how far apart rows are in the whole, and where the first begins; None if they lie otherwise."""
    if len(indices.runs) != 1:
        return None
    ((place, length),) = indices.runs
    if not indices.outer:
        # One stretch of any length: rows that follow one another.
        return _LONGEST, _LONGEST, place
    if len(indices.outer) > 1 or len(indices.outer[0][0]) != 1 or length > _LONGEST:
        return None
    (((start, _),), stride) = indices.outer[0]
    return length, stride, start * stride + place


# --- statistics ------------------------------------------------------------------------------------------------------


def can_add(wanted: Sequence[Statistic] | Vectors) -> bool:
    """Whether there is a kernel for these."""
    if isinstance(wanted, Vectors):
        is_exact = all(kind.ord in ELEMENTARY_ORDS for kind in wanted.write.kinds)
        return is_exact and len(wanted.statistics) <= _MOST_SUMS
    return len(wanted) <= _MOST_SUMS and all(one.kind != "power" or one.p + 1 in ELEMENTARY_ORDS for one in wanted)


def _list_sums(
    listing: Listing,
    frame: Frame,
    pieces: list[list[Any]],
    numbers: list[list[Any]],
    wanted: tuple[Statistic, ...] | Vectors,
) -> tuple[list[int], list[tuple[Statistic, Value]]]:
    """The summands of each statistic of one tensor, written down."""
    wide = torch.float64
    if isinstance(wanted, Vectors):
        flat = [listing.copies(one, wide) for one in read_vectors(listing, wanted, pieces)]
        pairs = [(one, two) for place, two in enumerate(flat) for one in flat[: place + 1]]
        products: list[Any] = [listing.mul(one, two)[0] for one, two in pairs]
        return [], list(zip(wanted.statistics, products, strict=True))
    x = listing.copies(pieces[0] if len(pieces) == 1 else difference(listing, *pieces), wide)
    found = []
    for statistic in wanted:
        value = x
        if statistic == COUNT:
            name = x[0].name
            value = [listing.new(f"tl.where({name} == {name}, ({name} != 0).to(tl.float64), {name})", wide)]
        elif statistic != SUM:
            # What `power` uses up is a copy.
            value = listing.abs(x)
            value = power(listing, value, int(statistic.p)) if statistic.kind == "power" else value
        found.append((statistic, value[0]))
    return [], found


def add_up(
    workspace: Workspace,
    wanted: tuple[Statistic, ...] | Vectors,
    lists: Sequence[Sequence[Tensor]],
    num_rows: int = 0,
) -> tuple[list[dict[Statistic, Tensor]], list[int]]:
    """Statistics of what a kernel can read, and the positions of what is left.

    wanted: what `can_add` says yes to.
    lists: what is summed, and what is subtracted from it; or the lists of vectors.
    num_rows: 0: one value of each statistic for all tensors of the same dtypes, 0-d; else so many for each tensor, in order,
        [tensors · num_rows], of tensors with equally many elements.
    """
    converted: set[int | None] = set()
    if isinstance(wanted, Vectors):
        converted = {place for kind in wanted.write.kinds for place in (kind.anchors, kind.masked_by)}

    def are_equal(dtypes: tuple[torch.dtype, ...]) -> bool:
        return dtypes[0] in LOW or all(dtype == dtypes[0] or place in converted for place, dtype in enumerate(dtypes))

    served, rest = _by_dtypes(lists, are_equal)
    statistics, parts = wanted.statistics if isinstance(wanted, Vectors) else wanted, []
    for dtypes, positions in served.items():
        tensors_of = [[some[one] for one in positions] for some in lists]
        numels, device = list(map(Tensor.numel, tensors_of[0])), lists[0][0].device
        columns = [*(list(map(Tensor.data_ptr, some)) for some in tensors_of), numels]
        if num_rows > 1:
            # Each row is a tensor of its own, behind the one before it.
            length = numels[0] // num_rows
            numels = [length] * (num_rows * len(positions))
            columns = [
                [address + number * length * dtype.itemsize for address in column for number in range(num_rows)]
                for column, dtype in zip(columns, dtypes, strict=False)
            ]
            columns.append(numels)
        table = table_of(workspace, list(zip(*columns, strict=True)), numels, device)
        if table is None:
            rest += positions
            continue
        num_chunks = len(table.chunks)
        sums = torch.empty((len(statistics), num_chunks), dtype=torch.float64, device=device)
        kernel = kernel_of(_list_sums, Frame(dtypes), wanted)
        _launch(kernel, table, [sums, num_chunks], len(statistics))
        # One number of each chunk: added up by halves, in an order that depends on the shapes alone.
        by_row = sums.view(len(statistics), len(numels) if num_rows else 1, -1)
        values = [statistic.combine(some) for statistic, some in zip(statistics, by_row, strict=True)]
        parts.append({one: value if num_rows else value[0] for one, value in zip(statistics, values, strict=True)})
    return parts, sorted(rest)
