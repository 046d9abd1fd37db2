"""Sums, maxima and counts of many local tensors, in float64, without a copy of them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import Ops, Workspace, block_size, blocks, is_large, small_size
from .compile import TOGETHER, TRACED, compiled, way_of
from .formulas import Write, decay, difference
from .stochastic import LOW

# A compiled sum reads a tensor in so many stretches at once: with one it waits for memory most of the time. (From eight on
# torch would take them for a dimension of a loop, and read one after the other.)
STRETCHES = 4
_STRETCH = 1 << 14  # elements of a product that are added up one after the other


@dataclass(frozen=True, slots=True)
class Statistic:
    """One number that every rank can compute over its own elements, and that combines over ranks.

    kind: "sum" Σx · "power" Σ|x|^p · "count" number of non-zeros · "max" max|x| · "min" min|x| · "product" Σ xᵢ·xⱼ.
    p: the exponent of a "power".
    pair: of a "product": which two of several vectors, see `Vectors`.
    """

    kind: str
    p: float = 1.0
    pair: tuple[int, int] = (0, 0)

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
RESTING = Statistic("product", pair=(-1, -1))
COUNT, MAX, MIN = Statistic("count"), Statistic("max"), Statistic("min")


@dataclass(frozen=True, slots=True)
class Vectors:
    """What products are of: vector 0 is θ, 1 is u, and the others are directions d(θ), read from several lists of tensors.

    write: the directions (`kinds`), and which list θ (`ps`), u (`us`, None: there is none) and a mask are.
    minus: the list that is subtracted from u; None: nothing.
    numbers: which vector each direction is.
    rests: whether the parameters have no update and no decay now: then there is vector -1, θ, and no other.
    """

    write: Write
    minus: int | None = None
    numbers: tuple[int, ...] = ()
    rests: bool = False

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The products of all these vectors."""
        return (RESTING,) if self.rests else products_of([0, 1, *self.numbers])


def products_of(numbers: Sequence[int]) -> tuple[Statistic, ...]:
    """The products of all pairs of vectors with these numbers."""
    return tuple(
        Statistic("product", pair=(one, two)) for place, two in enumerate(numbers) for one in numbers[: place + 1]
    )


# What a norm tells, and of which order.
_ORDERS = {ABS: 1.0, SQUARE: 2.0, MAX: math.inf}
_NORMED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def are_norms(tensors: Sequence[Tensor], statistics: Sequence[Statistic]) -> bool:
    """Whether these tensors can be read once, on a GPU, for each of the statistics.

    There torch's norm of a list, asked for in float64, adds up in float64 what it reads in the tensors' own dtype, in a
    kernel for many tensors at once. On a CPU it would copy each of them to float64 first, and elsewhere it has no such kernel;
    nor where a tensor has gaps.
    """
    return (
        bool(tensors)
        and tensors[0].device.type == "cuda"
        and all(statistic in _ORDERS for statistic in statistics)
        and all(tensor.dtype in _NORMED and tensor.numel() and tensor.is_contiguous() for tensor in tensors)
    )


def norms_of_each(tensors: Sequence[Tensor], statistic: Statistic) -> Tensor:
    """[tensors] float64: Σ|x|, Σx² or max|x| of each, by its norm.

    tensors: of one device and dtype, none empty.
    """
    norms = torch._foreach_norm(list(tensors), _ORDERS[statistic], dtype=torch.float64)
    values = torch.stack(norms)
    return values.square() if statistic == SQUARE else values


def wide_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 where the device has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def local_statistics(
    tensors: Sequence[Tensor],
    wanted: Iterable[Statistic] | Vectors,
    workspace: Workspace | None = None,
    *others: Sequence[Tensor],
) -> dict[Statistic, Tensor]:
    """Each statistic over all elements of `tensors` (− others), as a 0-d float64 tensor on their device.

    tensors: local tensors of one device, any float dtypes.
    wanted: statistics; or vectors, whose products are wanted.
    workspace: where blocks are worked on; None: a new one.
    others: of the shapes of `tensors`: what is subtracted from them; of vectors the lists from number 1 on. Empty: none.

    A NaN anywhere makes every statistic NaN (of products: each that it is part of). Without elements a statistic is its
    identity.
    """
    workspace = workspace or Workspace()
    wanted = wanted if isinstance(wanted, Vectors) else tuple(wanted)
    statistics = wanted.statistics if isinstance(wanted, Vectors) else wanted
    found: list[list[Tensor]] = [[] for _ in statistics]
    measured = (tensors, *(other for other in others if other))
    way = way_of(workspace, tensors[0].device) if workspace.compiles and tensors else None
    if way == "triton":
        from . import triton  # not before, since it needs this module

        if triton.can_add(wanted):
            kernels, left = triton.add_up(workspace, wanted, measured)
            found = [[part[statistic] for part in kernels] for statistic in statistics]
            # What no kernel serves comes by blocks.
            measured = tuple([some[place] for place in left] for some in measured)
    elif not any(others) and are_norms(tensors, statistics):
        by_dtype = defaultdict[torch.dtype, list[Tensor]](list)
        for tensor in tensors:
            by_dtype[tensor.dtype].append(tensor)
        norms = {one: [norms_of_each(some, one) for some in by_dtype.values()] for one in statistics}
        return {one: one.combine(torch.cat(values)) for one, values in norms.items()}
    compiles = way == "compiler"
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
    for statistic, values in zip(statistics, found, strict=True):
        if not values:
            device = tensors[0].device if tensors else torch.device("cpu")
            values = [torch.full((), statistic.identity, dtype=wide_dtype(device), device=device)]
        # A model of small tensors is one block: two calls less, for each statistic.
        totals[statistic] = values[0] if len(values) == 1 else statistic.combine(torch.stack(values))
    return totals


def statistics_of_each(
    tensors: Sequence[Tensor],
    wanted: Iterable[Statistic] | Vectors,
    workspace: Workspace,
    *others: Sequence[Tensor],
    num_rows: int = 1,
) -> dict[Statistic, Tensor]:
    """`local_statistics` of every single row of `tensors`, [tensors · num_rows] each.

    tensors: local tensors of one device and dtype with equally many elements, not none. The rest as in `local_statistics`.
    num_rows: of each tensor: stretches of equally many elements, of which each is measured by itself.
    """
    numel, device = tensors[0].numel(), tensors[0].device
    wanted = wanted if isinstance(wanted, Vectors) else tuple(wanted)
    statistics = wanted.statistics if isinstance(wanted, Vectors) else wanted
    lists = [tensors, *(other for other in others if other)]
    way = way_of(workspace, device) if workspace.compiles else None
    if way == "triton":
        from . import triton  # not before, since it needs this module

        if triton.can_add(wanted):
            kernels, left = triton.add_up(workspace, wanted, lists, num_rows)
            if kernels and not left:
                return kernels[0]
    elif num_rows == 1 and not any(others) and are_norms(tensors, statistics):
        return {statistic: norms_of_each(tensors, statistic) for statistic in statistics}
    found: list[list[Tensor]] = [[] for _ in statistics]
    compiles = way == "compiler"
    small = small_size(device, not compiles, compiles)
    if numel > small and num_rows > 1:
        # Rows of one large tensor lie beside each other already: as many as fill a block are measured at once, without a
        # copy. Rows that are large themselves come one by one, as tensors of their own would.
        size, length = block_size(device), numel // num_rows
        step = max(1, size // length) if length <= small or not compiles else 1
        for each in zip(*lists, strict=True):
            matrices = [one.reshape(num_rows, length) for one in each]
            for start in range(0, num_rows, step):
                block = [one[start : start + step] for one in matrices]
                if step == 1:
                    first, *rest = ([one[0]] for one in block)
                    of_one = local_statistics(first, wanted, workspace, *rest)
                    parts = [of_one[statistic].view(1) for statistic in statistics]
                else:
                    workspace.begin_block()
                    parts = _of_rows(workspace, wanted, len(block[0]), *([one] for one in block))
                for values, value in zip(found, parts, strict=True):
                    values.append(value)
    # Large tensors are blocks of their own anyway; and of one there is nothing to join.
    elif num_rows == 1 and (len(tensors) == 1 or numel > small):
        for number in range(len(tensors)):
            first, *rest = ([some[number]] for some in lists)
            of_one = local_statistics(first, wanted, workspace, *rest)
            for values, statistic in zip(found, statistics, strict=True):
                values.append(of_one[statistic].view(1))
    else:
        # Many small tensors: each is a row of a block, or several, and a block is a few operations.
        step = block_size(device) // numel
        for start in range(0, len(tensors), step):
            pieces = [list(some[start : start + step]) for some in lists]
            workspace.begin_block()
            num = len(pieces[0]) * num_rows
            for values, value in zip(found, _of_rows(workspace, wanted, num, *pieces), strict=True):
                values.append(value)
    return {statistic: torch.cat(values) for statistic, values in zip(statistics, found, strict=True)}


def _traced(wanted: tuple[Statistic, ...] | Vectors, num: int, *lists: list[Tensor]) -> list[Tensor]:
    """What is wanted of `num` large tensors (and as many others, if there are more lists), each [1], for the compiler."""
    statistics = wanted.statistics if isinstance(wanted, Vectors) else wanted
    each = [_of_rows(TRACED, wanted, 1, *([some[place].view(STRETCHES, -1)] for some in lists)) for place in range(num)]
    return [
        statistic.combine(torch.cat(rows)).view(1)
        for statistic, rows in zip(statistics, zip(*each, strict=True), strict=True)
    ]


def _of_rows(ops: Ops, wanted: tuple[Statistic, ...] | Vectors, num_rows: int, *lists: list[Tensor]) -> list[Tensor]:
    """What is wanted of each row, [num_rows] each, of a block of several lists of pieces; a row is equally many elements."""
    if isinstance(wanted, Vectors):
        return _products(ops, wanted, num_rows, lists)
    statistics, pieces, minus = wanted, lists[0], lists[1] if len(lists) > 1 else []
    if minus:
        pieces = difference(ops, pieces, minus)
    # All elements in float64, flat: squares and powers taken in float32 would overflow, vanish, and round. Where no sum needs
    # their signs, they are absolute values, taken where that costs least.
    is_signed, wide = SUM in statistics, wide_dtype(pieces[0].device)
    if isinstance(ops, Workspace) and len(pieces) > 1:
        x = _joined(ops, pieces)
        if not is_signed:
            x.abs_()
        if x.dtype != wide:
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


def _joined(workspace: Workspace, pieces: list[Tensor]) -> Tensor:
    """Small tensors as one flat tensor, so that each operation on them is one call."""
    # torch joins many fast only where it need not convert them: first in their own dtype, if they have one, and then all
    # at once.
    dtype = pieces[0].dtype
    if any(piece.dtype != dtype for piece in pieces):
        # Of two kinds of numbers torch takes the wider one, but for float8, which it refuses to join with others.
        dtype = wide_dtype(pieces[0].device)
        pieces = [piece.to(dtype) if piece.dtype.itemsize == 1 else piece for piece in pieces]
    numel = 0
    for piece in pieces:
        numel += piece.numel()
    x = workspace.empty(numel, pieces[0].device, dtype)
    shapes = {piece.shape for piece in pieces}
    rows = {shape[1:] for shape in shapes}
    # With rows of one shape they are joined as they are: flat views of many cost as much as all the rest.
    if len(rows) == 1 and all(shapes):
        torch.cat(pieces, out=x.view(-1, *rows.pop()))
    else:
        torch.cat([piece.reshape(-1) for piece in pieces], out=x)
    return x


def read_vectors(ops: Ops, vectors: Vectors, lists: Sequence[list[Tensor]]) -> list[list[Tensor]]:
    """The vectors of a block, in the dtype of the arithmetic."""
    write = vectors.write
    # Directions have the bits that a step subtracts: of bf16 and fp16 they are taken in float32.
    if lists[0][0].dtype in LOW:
        lists = [ops.copies(some, torch.float32) for some in lists]
    thetas = lists[write.ps]
    found = [thetas]
    if not vectors.rests:
        assert write.us is not None, "only what rests has no update"
        us, mask = lists[write.us], write.mask_of(ops, lists)
        found.append(us if vectors.minus is None else difference(ops, us, lists[vectors.minus]))
        found += [decay(ops, kind, 1.0, thetas, mask, lists) for kind in write.kinds]
    return found


def _products(ops: Ops, vectors: Vectors, num_rows: int, lists: Sequence[list[Tensor]]) -> list[Tensor]:
    """The product of each pair of vectors, [num_rows] each, of a block; a row is equally many elements."""
    found, like = read_vectors(ops, vectors, lists), lists[0][0]
    wide, num = wide_dtype(like.device), sum(piece.numel() for piece in found[0])
    if isinstance(ops, Workspace) and like.device.type == "cpu":
        # Side by side, so that one product of matrices reads each vector once.
        xs = ops.empty(len(found) * num, like.device, wide).view(len(found), num)
        for x, pieces in zip(xs, found, strict=True):
            x.copy_(_joined(ops, pieces) if len(pieces) > 1 else pieces[0].reshape(-1))
        gram = _gram(xs.view(len(found), num_rows, -1))
        return [gram[:, one, two] for two in range(len(found)) for one in range(two + 1)]
    flat = []
    for pieces in found:
        x = _joined(ops, pieces) if isinstance(ops, Workspace) and len(pieces) > 1 else pieces[0]
        # float64 before anything is multiplied: squares of float32 would overflow, vanish, and round.
        x = x if x.dtype == wide else ops.copies([x], wide)[0]
        flat.append(x.reshape(1, STRETCHES, -1) if ops is TRACED else x.reshape(num_rows, -1))
    products = [ops.mul([one], [two])[0].sum(1) for place, two in enumerate(flat) for one in flat[: place + 1]]
    return [product.sum(-1) for product in products] if ops is TRACED else products


def _gram(vectors: Tensor) -> Tensor:
    """All products of some vectors, by rows: [vectors, rows, n] -> [rows, vectors, vectors]."""
    num, num_rows, numel = vectors.shape
    by_row = vectors.transpose(0, 1)
    # A product of matrices adds up as it comes, so it is given short stretches; their sum goes by halves.
    whole = numel // _STRETCH * _STRETCH
    if whole == 0 or numel == _STRETCH:
        return torch.bmm(by_row, by_row.mT)
    stretches = by_row[..., :whole].unflatten(-1, (-1, _STRETCH)).transpose(1, 2).reshape(-1, num, _STRETCH)
    found = torch.bmm(stretches, stretches.mT).view(num_rows, -1, num, num).sum(1)
    return found if whole == numel else found + torch.bmm(by_row[..., whole:], by_row[..., whole:].mT)
