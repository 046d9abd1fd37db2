"""Who owns what: each rank describes its pieces as rows of integers, and all find the same owners in all rows.

A row has seven int64 columns, so 56 bytes for each parameter that a rank holds. Every number is the same in every
process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .pieces import Piece

# NAME: hash of the name. META: hash of what must be equal on all ranks. WHOLE, VOLUME: of the whole tensor and of the
# piece, see `_volume`. NUMEL: elements of the piece. CHECKSUM: of its bits. CELLS: twice the number of matrices in the whole,
# and 1 more if the piece's elements are not all equal.
NUM_COLUMNS = 7
NAME, META, WHOLE, VOLUME, NUMEL, CHECKSUM, CELLS = range(NUM_COLUMNS)
_CHECKSUM_BLOCK = 1 << 20
_INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


# --- one rank's rows --------------------------------------------------------------------------------------------------


def rows_of(
    pieces: Sequence[Piece], groups: Sequence[int], checksums: Sequence[tuple[int, int]], named: bool
) -> Tensor:
    """This rank's pieces as rows of integers.

    pieces: in any order, which the rows keep.
    groups: the index of the param group of each piece.
    checksums: two numbers for the bits of each piece, see `checksums_of`.
    named: whether users gave the names; else pieces are matched by position.
    Returns [pieces, 7] int64.
    """
    rows = []
    for piece, group, (checksum, varies) in zip(pieces, groups, checksums, strict=True):
        # Position is a weak name: a rank with other layers has other parameters at the same positions. Equal positions
        # must at least live on equal meshes. And the group counts, since per-group numbers add up what has one group
        # index.
        meta = (piece.shape, piece.is_counted, str(piece.dtype), () if named else piece.mesh, group)
        whole = _volume([((0, size),) for size in piece.shape])
        described = [stable_hash(piece.name), stable_hash(meta), whole, _volume(piece.cuts), piece.numel]
        rows.append([*described, checksum, 2 * piece.num_cells + varies])
    return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), NUM_COLUMNS)


def stable_hash(value: object) -> int:
    """A signed 64-bit hash of `repr(value)`, the same in every process (Python's own hash of strings is not)."""
    digest = hashlib.blake2b(repr(value).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _volume(cuts: Sequence[Sequence[tuple[int, int]]]) -> int:
    """A number for a box of indices, such that the numbers of disjoint boxes add up to that of their union (mod 2^64).

    μ = Π over dimensions of Σ over intervals of (R(stop) − R(start)),  R: a random number for each dimension and index

    So pieces cover the whole exactly once if and only if (up to a chance of 2^-64) their numbers add up to the whole's,
    whatever their shapes are; and equal pieces have equal numbers.
    """
    volume = 1
    for dim, cut in enumerate(cuts):
        volume *= sum(stable_hash((dim, stop)) - stable_hash((dim, start)) for start, stop in cut)
    # Into the range of int64, which wraps around in the same way when torch adds.
    return (volume + (1 << 63)) % (1 << 64) - (1 << 63)


def checksums_of(locals_: Sequence[Tensor]) -> list[tuple[int, int]]:
    """For the bits of each local tensor:  Σᵢ (2i + 1)·bitsᵢ  mod 2^64,  and 1 if the elements are not all equal, else 0.

    Works through blocks, so without a copy of a tensor, and reads all devices once, at the end.
    """
    if not locals_:
        return []
    sums = []
    for tensor in locals_:
        bits = tensor.detach().contiguous().view(-1).view(_INTEGER_OF_SIZE[tensor.element_size()])
        total = torch.zeros(2, dtype=torch.int64, device=tensor.device)
        for start in range(0, bits.numel(), _CHECKSUM_BLOCK):
            block = bits[start : start + _CHECKSUM_BLOCK].to(torch.int64)
            # A plain sum would not notice two elements that changed places. Odd weights lose no bit of any element.
            weight = torch.arange(start, start + block.numel(), device=tensor.device, dtype=torch.int64).mul_(2).add_(1)
            total[0] += (block * weight).sum()
            total[1] |= (block != bits[0]).any()
        sums.append(total)
    return [(checksum, varies) for checksum, varies in torch.stack([total.cpu() for total in sums]).tolist()]


# --- all ranks' rows --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OwnerTable:
    """What the rows of all ranks say together; but for the three fields of `rank`, the same on every rank.

    names: [names] int64, sorted hashes of every name that any rank holds; per-tensor numbers are in this order.
    num_cells: [names] int64, how many matrices each whole tensor is.
    numel: elements of all whole tensors.
    name_ids: [rows of rank] int64, the place of each row's name in `names`.
    owned: [rows of rank] bool, whether this rank owns the piece.
    holders: [rows of rank] int64, how many ranks hold the piece.
    has_copies: whether any piece is held by several ranks.
    mismatched: places in `names` where ranks mean different shapes, dtypes or groups.
    uncovered: places where the pieces do not cover the whole exactly once.
    drifted: places where copies have different bits. If all three are empty, the plan holds.
    alike: tuples of places that may be one weight under several names: the same bits, and no rank holds two of them.
    """

    names: Tensor
    num_cells: Tensor
    numel: int
    name_ids: Tensor
    owned: Tensor
    holders: Tensor
    has_copies: bool
    mismatched: list[int]
    uncovered: list[int]
    drifted: list[int]
    alike: list[tuple[int, ...]]


def resolve(rows: Sequence[Tensor], rank: int) -> OwnerTable:
    """Find the owner of every piece, the lowest rank that holds it, and what is wrong.

    rows: [rows of the rank, 7] int64 for each rank, in order of rank.
    rank: for whose rows to return owners.
    Time and memory grow with the number of all rows.
    """

    def column(number: int) -> Tensor:
        return torch.cat([part[:, number] for part in rows])

    # One column at a time: all rows in another order would be a second and a third copy of everything.
    names, name_ids = torch.unique(column(NAME), return_inverse=True)
    num_names = len(names)
    zeros = torch.zeros(num_names, dtype=torch.int64)
    # Sorted by name, then by volume: equal pieces become neighbours, and stay in order of rank since the sorts are
    # stable.
    order = torch.argsort(column(VOLUME), stable=True)
    order = order[torch.argsort(name_ids[order], stable=True)]
    ids, volume, elements = name_ids[order], column(VOLUME)[order], column(NUMEL)[order]
    first = torch.ones_like(ids, dtype=torch.bool)
    first[1:] = (ids[1:] != ids[:-1]) | (volume[1:] != volume[:-1])
    # A piece without elements has no owner: nothing of it could be measured.
    owned = first & (elements > 0)
    # Here pieces without elements count, since a whole without elements must be covered too. Sums wrap at 2^64, as
    # volumes do.
    covered = zeros.index_add(0, ids[first], volume[first])
    whole = zeros.scatter(0, ids, column(WHOLE)[order])
    run = first.cumsum(0) - 1  # number of the run of equal pieces that each sorted row is in
    checksum = column(CHECKSUM)[order]
    drifted = (checksum != checksum[first][run]) & (elements > 0)
    # Where ranks do not mean the same tensor, their pieces cannot cover it either; that would be said twice.
    low = zeros.scatter_reduce(0, name_ids, column(META), "amin", include_self=False)
    high = zeros.scatter_reduce(0, name_ids, column(META), "amax", include_self=False)
    mismatched = low != high
    # A name's bits on any sharding that cuts it alike: the sum over its pieces of a hash of (which piece, its bits).
    bits = checksum * 0x2545F4914F6CDD1D + volume
    bits = (bits ^ (bits >> 29)) * 0x369DEA0F31A53F85
    bits_of_name = zeros.index_add(0, ids[owned], bits[owned])
    # Every rank needs the number of matrices of every name: those of a pipeline stage count on all ranks.
    cells = column(CELLS)
    varies = zeros.scatter_reduce(0, name_ids, cells % 2, "amax") > 0
    # The rows of `rank`, found among the sorted ones and put back into their own order.
    begin = sum(len(part) for part in rows[:rank])
    own = (order >= begin) & (order < begin + len(rows[rank]))
    back = order[own].argsort()
    return OwnerTable(
        names,
        zeros.scatter_reduce(0, name_ids, cells // 2, "amax"),
        int(elements[owned].sum()),
        ids[own][back],
        owned[own][back],
        run.bincount()[run[own]][back],
        has_copies=bool((~first & (elements > 0)).any()),
        mismatched=mismatched.nonzero().flatten().tolist(),
        uncovered=((covered != whole) & ~mismatched).nonzero().flatten().tolist(),
        drifted=ids[drifted].unique().tolist(),
        alike=_alike(bits_of_name + whole, varies, name_ids, [len(part) for part in rows]),
    )


def _alike(bits: Tensor, varies: Tensor, name_ids: Tensor, num_rows: Sequence[int]) -> list[tuple[int, ...]]:
    """The names that may be one weight, see `OwnerTable.alike`.

    bits, varies: [names] a hash of all bits; whether the elements are not all equal.
    name_ids: [rows of all ranks] the place of each row's name.
    num_rows: of each rank.
    """
    # Norms begin as ones and biases as zeros: those are alike and not tied.
    candidates = varies.nonzero().flatten()
    _, kinds, counts = torch.unique(bits[candidates], return_inverse=True, return_counts=True)
    ranks = torch.arange(len(num_rows)).repeat_interleave(torch.tensor(num_rows))
    found = []
    for kind in (counts > 1).nonzero().flatten():
        names = candidates[kinds == kind]
        holders = [set(ranks[name_ids == name].tolist()) for name in names]
        # A rank that holds two of them in different memory has not tied them: layers that begin alike, as Mamba's A.
        if len(set().union(*holders)) == sum(map(len, holders)):
            found.append(tuple(names.tolist()))
    return found


def offsets_of(pieces: Sequence[Piece], gathered: Sequence[Tensor]) -> tuple[int, ...]:
    """For each counted piece, how many elements of its whole come before it; 0 for the other pieces.

    pieces: of this rank.
    gathered: the rows of every rank. Random bits are drawn by an element's index in the whole, and only here does a
        rank learn how long the pieces of lower numbers are.
    """
    counted = torch.tensor([stable_hash(piece.name) for piece in pieces if piece.is_counted], dtype=torch.int64)
    table = torch.cat(list(gathered))[:, [NAME, VOLUME, NUMEL]]
    numel = {(name, volume): size for name, volume, size in table[torch.isin(table[:, 0], counted)].tolist()}
    most = max((piece.shape[0] for piece in pieces if piece.is_counted), default=0)
    volumes = [_volume([((number, number + 1),)]) for number in range(most)]
    offsets = []
    for piece in pieces:
        before = volumes[: piece.cuts[0][0][0]] if piece.is_counted else []
        offsets.append(sum(numel[stable_hash(piece.name), volume] for volume in before))
    return tuple(offsets)
